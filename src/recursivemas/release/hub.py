"""The released systems on the hub: only the repositories and files that are needed, their sizes told before.

Knows names and downloads; what is in the files is not its business.
"""

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from recursivemas.errors import CheckpointError
from recursivemas.release.layout import Style

Announce = Callable[[str], None]

_FILES = re.compile(r"\.(json|safetensors|jinja|txt|model|pt)$")
_OF_A_TASK = re.compile(r"\((\w+)\)\.\w+$")


class Snapshot(NamedTuple):
    """A repository on this disk."""

    repository: str
    revision: str
    folder: Path


class _Needed(NamedTuple):
    """What is to be fetched of a repository, in bytes."""

    revision: str
    files: tuple[str, ...]
    size: int
    to_come: int


def download_style(style: Style, task: str, announce: Announce) -> tuple[dict[str, Snapshot], Snapshot]:
    """The agents of a style, by letter, and its outer links. Raises `CheckpointError`."""
    from huggingface_hub import constants

    names = [*style.repositories.values(), style.outer]
    wanted: dict[str, _Needed] = {}
    if not constants.HF_HUB_OFFLINE:
        wanted = {name: _ask(name, task) for name in names}
        for name, needed in wanted.items():
            announce(f"{name}: {_readable(needed.size)}, of which {_readable(needed.to_come)} to download")
        announce(f"to download in all: {_readable(sum(needed.to_come for needed in wanted.values()))}")
    found = {name: _fetch(name, wanted.get(name)) for name in names}
    return {letter: found[name] for letter, name in style.repositories.items()}, found[style.outer]


def is_needed(file: str, task: str) -> bool:
    """Whether a file of a repository is needed for a task: weights of other tasks, pictures and text are not."""
    of_task = _OF_A_TASK.search(file)
    return _FILES.search(file) is not None and (of_task is None or of_task[1] == task)


def _ask(name: str, task: str) -> _Needed:
    """What is needed of the present revision of a repository, and how much of it is not on this disk yet."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info: Any = HfApi().model_info(name, files_metadata=True)
    except Exception as error:  # whatever the network library of the day raises
        raise _failure(name, error) from None
    sizes = {each.rfilename: each.size or 0 for each in info.siblings if is_needed(each.rfilename, task)}
    here = {file for file in sizes if isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)}
    to_come = sum(size for file, size in sizes.items() if file not in here)
    return _Needed(info.sha, tuple(sizes), sum(sizes.values()), to_come)


def _fetch(name: str, needed: _Needed | None) -> Snapshot:
    """Download what is not here yet; without a network, take what an earlier download left."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {}
    if needed is not None:
        options = {"revision": needed.revision, "allow_patterns": [glob.escape(file) for file in needed.files]}
    try:
        folder = Path(snapshot_download(name, **options))
    except Exception as error:  # whatever the network library of the day raises
        raise _failure(name, error) from None
    return Snapshot(name, folder.name if needed is None else needed.revision, folder)


def _failure(name: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants

    reason = " ".join(str(error).split())[:200] or type(error).__name__
    offline = "HF_HUB_OFFLINE is set: unset it, or " if constants.HF_HUB_OFFLINE else ""
    return CheckpointError(
        f"cannot get '{name}' from the hub ({reason}); {offline}give the directory of a release on this disk instead"
    )


def _readable(size: int) -> str:
    """
    >>> _readable(4_061_234_567), _readable(1_234)
    ('4.06 GB', '1.2 kB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.1f} kB"
