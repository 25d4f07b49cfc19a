"""Released systems from the hub: what is asked for, told and downloaded, with a hub made of directories."""

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from tests.release.theirs import Release

from recursivemas.errors import CheckpointError
from recursivemas.release.layout import STYLES
from recursivemas.release.reading import layout_of_release, read_release
from recursivemas.system import RecursiveSystem

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as directories; whatever is done with them is written down in order."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.cache = place / "cache"
        self.done: list[str] = []

    def model_info(self, name: str, *, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        self.done.append(f"ask {name}")
        files = [file for file in (self.place / name).rglob("*") if file.is_file()]
        return SimpleNamespace(
            sha=REVISION,
            siblings=[
                SimpleNamespace(rfilename=str(file.relative_to(self.place / name)), size=file.stat().st_size)
                for file in files
            ],
        )

    def snapshot_download(self, name: str, *, revision: str = REVISION, allow_patterns: Any = None) -> str:
        self.done.append(f"get {name}")
        assert revision == REVISION
        snapshot = self.cache / name / "snapshots" / revision
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in (self.place / name).iterdir():
            if allow_patterns is None or any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                # As in the real cache, where a file is a link to somewhere else.
                blob = self.cache / "blobs" / f"{name.replace('/', '-')}-{file.name}"
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(file, blob)
                if not (snapshot / file.name).is_symlink():
                    (snapshot / file.name).symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(small: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The small release as the repositories of sequential_light, and a picture beside."""
    style = STYLES["sequential_light"]
    for folder, name in zip(("planner", "critic", "solver"), style.repositories.values(), strict=True):
        shutil.copytree(small.place / folder, tmp_path / name)
        (tmp_path / name / "teaser.png").write_bytes(b"0" * 1000)
    shutil.copytree(small.place / "outer", tmp_path / style.outer)
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda api, *args, **kwargs: made.model_info(*args, **kwargs)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    return made


def get(hub: Hub, small: Release, **options: Any) -> RecursiveSystem:
    return RecursiveSystem.from_release("sequential_light", prompts=small.prompts, device="cpu", **options)


def test_the_styles_are_the_repositories_of_the_release() -> None:
    assert [*STYLES["sequential_light"].repositories.values(), STYLES["sequential_light"].outer] == [
        "RecursiveMAS/Sequential-Light-Planner-Qwen3-1.7B",
        "RecursiveMAS/Sequential-Light-Critic-Llama3.2-1B",
        "RecursiveMAS/Sequential-Light-Solver-Qwen2.5-Math-1.5B",
        "RecursiveMAS/Sequential-Light-Outerlinks",
    ]
    assert STYLES["mixture"].repositories["s"] == "RecursiveMAS/Mixture-Summarizer-Qwen3.5-2B"
    assert STYLES["deliberation"].repositories["t"] == "RecursiveMAS/Deliberation-Toolcaller-Qwen3.5-4B"
    assert len({*STYLES}) == 5


def test_a_style_is_downloaded_and_is_the_same_system(hub: Hub, small: Release, tmp_path: Path) -> None:
    system = get(hub, small)
    assert system.settings.name == "sequential_light"
    for name, link in system.all_links.items():
        assert torch.equal(link.w1.weight, small.weights[name]["proj1.weight"])
    # Only what is needed: nothing for another task, no picture; and all sizes are asked for before the first download.
    cached = {file.name for file in hub.cache.glob("*/*/snapshots/*/*")}
    assert {"adapter(math).pt", "outer_12(math).pt", "model.safetensors", "outerlink_config.json"} <= cached
    assert not {"adapter(code).pt", "outer_12(code).pt", "teaser.png"} & cached
    assert [each.split()[0] for each in hub.done] == ["ask"] * 4 + ["get"] * 4
    assert not any("Mixture" in each for each in hub.done)


def test_sizes_are_told_before_anything_is_downloaded(
    hub: Hub, small: Release, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def announce(line: str) -> None:
        assert not any(each.startswith("get") for each in hub.done)
        told.append(line)

    here = ("config.json", "model.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: "x" if file in here else None
    )
    read_release("sequential_light", prompts=small.prompts, device="cpu", announce=announce)
    planner = small.place / "planner"
    sizes = {file.name: file.stat().st_size for file in planner.iterdir() if "(code)" not in file.name}
    to_come = sum(size for name, size in sizes.items() if name not in here)
    assert told[0] == (
        f"RecursiveMAS/Sequential-Light-Planner-Qwen3-1.7B: {sum(sizes.values()) / 1e3:.1f} kB, "
        f"of which {to_come / 1e3:.1f} kB to download"
    )
    assert told[-1].startswith("to download in all: ")
    capsys.readouterr()
    get(hub, small)
    assert capsys.readouterr().err.splitlines() == told


def test_agents_from_the_hub_are_saved_by_name_and_revision(hub: Hub, small: Release, tmp_path: Path) -> None:
    get(hub, small).save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "agents").exists()
    agents = json.loads((tmp_path / "ours" / "system.json").read_text())["agents"]
    assert agents["critic"]["model"] == "RecursiveMAS/Sequential-Light-Critic-Llama3.2-1B"
    assert agents["critic"]["revision"] == REVISION
    assert agents["critic"]["local"] is False


def test_without_a_network_an_earlier_download_serves(
    hub: Hub, small: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    system = get(hub, small)
    assert not any(each.startswith("ask") for each in hub.done)
    assert system.agents["planner"].model.revision == REVISION


def test_the_layout_of_a_style_is_known_without_a_download(hub: Hub) -> None:
    assert layout_of_release("sequential_light", "math")[0] == "sequential"
    assert layout_of_release("mixture", "math")[1]["s"] == "summarizer"
    assert not hub.done


@pytest.mark.parametrize("offline", [True, False])
def test_what_cannot_be_downloaded_is_named(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    class NoNetworkError(Exception):
        """What the network library of the day raises is no OSError."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NoNetworkError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    hint = "HF_HUB_OFFLINE is set" if offline else "directory of a release"
    with pytest.raises(CheckpointError, match=f"Planner-Qwen3-1.7B.*Name or service not known.*{hint}"):
        RecursiveSystem.from_release("sequential_light")
