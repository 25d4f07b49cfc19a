"""Releases of tiny random models, written by theirs.py."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.families.table import save_checkpoint
from tests.release.theirs import Release, write_theirs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, int]]:
    """A random checkpoint of a family and its width, made once."""
    made: dict[tuple[str, int], Path] = {}

    def of(family: str, width: int) -> tuple[Path, int]:
        if (family, width) not in made:
            place = tmp_path_factory.mktemp(family)
            made[family, width] = save_checkpoint(family, place, width=width, seed=len(made))
        return made[family, width], width

    return of


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> Release:
    """A sequential release with links for two tasks; not to be changed."""
    models = {"planner": checkpoint("qwen3", 48), "critic": checkpoint("llama", 40), "solver": checkpoint("qwen2", 56)}
    return write_theirs(tmp_path_factory.mktemp("release") / "small", "sequential", models)


@pytest.fixture
def damaged(small: Release, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(small.place, tmp_path / "release"))
