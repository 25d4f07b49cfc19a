"""What the JSON files of a release say: which outer links there are, of which type and widths, and in which files.

    outerlink_config.json                  `adapters`, or `tasks` with `adapters` for each; one entry a link
    outer_adapter_config[(task)].json      <link>_type, <link>_in_dim, <link>_out_dim; what the trainer writes
    innerlink_config.json                  for each task the file of a role's inner link
    adapter_config.json                    its type

Where both outer files are there, they must agree. Knows JSON and names; knows nothing of tensors or models.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from recursivemas.config import Config, parse
from recursivemas.errors import CheckpointError, ConfigError, unknown_name
from recursivemas.release.layout import LAYOUTS, names_of, words

OUTER_MANIFEST = "outerlink_config.json"
INNER_MANIFEST = "innerlink_config.json"
LEGACY_CONFIG = "outer_adapter_config.json"
_KEYS = {key: name for name, layout in LAYOUTS.items() for key in layout.keys}
_PARADIGMS = {
    "sequential": "sequential",
    "chain": "sequential",
    "mixture": "mixture",
    "hie": "mixture",
    "distill": "distillation",
    "deliberation": "deliberation",
}


class _Entry(Config, extra="ignore"):
    """One link in outerlink_config.json."""

    legacy_key: str
    filename: str
    adapter_type: str | None = None
    in_dim: int | None = None
    out_dim: int | None = None
    source_role: str | None = None
    target_role: str | None = None


class _Scope(Config, extra="ignore"):
    """outerlink_config.json, or what it holds for one task."""

    adapters: list[_Entry] = Field(min_length=1)
    paradigm: str | None = None
    legacy_config_filename: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class OuterEntry:
    """One outer link: its file, and what is said of it."""

    file: Path
    adapter_type: str
    described_in: Path
    in_dim: int | None = None
    out_dim: int | None = None


@dataclass(frozen=True)
class OuterManifest:
    """The outer links of a release."""

    pattern: str
    entries: dict[str, OuterEntry]
    """By the letters of source and target."""
    num_rounds: int | None = None
    """How many rounds they were trained for, if that is said."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; restore it from where the release came from") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); is it truncated?") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def named_file(directory: Path, name: str, named_in: Path) -> Path:
    """A file of a directory that a manifest names. Raises `CheckpointError` for one that is elsewhere, or missing.

    Goes by the name alone: in the cache of the hub every file is a link to somewhere else.
    """
    place = Path(os.path.normpath(directory / name))
    if "\0" in name or place == directory or not place.is_relative_to(os.path.normpath(directory)):
        raise CheckpointError(f"{named_in} names the file '{name}', which is outside of {directory}; it is not read")
    if not place.is_file():
        raise CheckpointError(f"{named_in} names the file '{name}', which is missing in {directory}")
    return place


def is_outer(directory: Path) -> bool:
    """Whether a directory holds the outer links of a release."""
    return (directory / OUTER_MANIFEST).is_file() or any(_legacy_files(directory))


def _legacy_files(directory: Path) -> list[Path]:
    stem, suffix = LEGACY_CONFIG.split(".")
    return sorted(file for file in directory.glob(f"{stem}*.{suffix}") if file.is_file())


def scoped_names(name: str, task: str) -> tuple[str, str]:
    """The names a file may have: of one task, `adapter(math).pt`, or of all, `adapter.pt`."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}({task}){dot}{suffix}", name


def inner_file(directory: Path, name: str, task: str) -> Path:
    """`adapter.pt` or `adapter_config.json` of a role for a task.

    As the authors' code finds it: the manifest's word comes first, then the name with the task, then the plain name.
    """
    manifest = directory / INNER_MANIFEST
    if manifest.is_file():
        tasks = read_json(manifest).get("tasks")
        scope = tasks.get(task) if isinstance(tasks, dict) else None
        named = scope.get(name) if isinstance(scope, dict) else None
        if isinstance(named, str):
            return named_file(directory, named, manifest)
    candidates = [directory / each for each in scoped_names(name, task)]
    for file in candidates:
        if file.is_file():
            return file
    raise CheckpointError(
        f"{directory} holds neither {candidates[0].name} nor {name}; restore it from where the release came from"
    )


def read_outer_manifest(directory: Path, task: str) -> OuterManifest:
    """Which outer links a directory holds for a task. Raises `CheckpointError` naming file and field."""
    manifest = directory / OUTER_MANIFEST
    if manifest.is_file():
        scope, found, said = _read_entries(manifest, task)
        legacy = _legacy_config(directory, task, scope.legacy_config_filename, manifest)
        if legacy is not None:
            found = {key: _agreed(key, entry, manifest, *legacy) for key, entry in found.items()}
            said = {**legacy[1], **said}
        entries = found
    else:
        manifest, said = _legacy_config(directory, task, None, manifest) or (manifest, {})
        entries = _legacy_entries(directory, manifest, said, task)
    files = {key: named_file(directory, entry.filename, manifest) for key, entry in entries.items()}
    pattern = _pattern_of(entries, manifest, said)
    result: dict[str, OuterEntry] = {}
    for key, entry in entries.items():
        _check_roles(key, entry, pattern, manifest)
        if entry.adapter_type is None:
            raise CheckpointError(f"{manifest} gives no adapter_type for outer_{key}, and no other file does")
        result[key] = OuterEntry(files[key], entry.adapter_type, manifest, entry.in_dim, entry.out_dim)
    rounds = said.get("num_recursive_rounds")
    trained_for = rounds if isinstance(rounds, int) and 1 <= rounds <= 1000 else None
    return OuterManifest(pattern, {key: result[key] for key in LAYOUTS[pattern].keys}, trained_for)


def _read_entries(manifest: Path, task: str) -> tuple[_Scope, dict[str, _Entry], dict[str, Any]]:
    """What outerlink_config.json says of a task: the scope, its entries by key, and all fields beside these."""
    content = read_json(manifest)
    scope = content
    tasks = content.get("tasks")
    if tasks is not None:
        if not isinstance(tasks, dict):
            raise CheckpointError(f"{manifest}: 'tasks' is a {type(tasks).__name__}, expected an object")
        if task not in tasks:
            raise CheckpointError(f"{manifest}: " + unknown_name("task", task, tasks))
        scope = tasks[task]
        if not isinstance(scope, dict):
            raise CheckpointError(f"{manifest}: the task '{task}' is a {type(scope).__name__}, expected an object")
    try:
        parsed = parse(_Scope, scope, where=str(manifest))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    entries: dict[str, _Entry] = {}
    for entry in parsed.adapters:
        key = _short(entry.legacy_key, manifest)
        if key in entries:
            raise CheckpointError(f"{manifest} names the link outer_{key} twice")
        entries[key] = entry
    return parsed, entries, {**content, **scope, **parsed.meta}


def _short(key: str, where: Path) -> str:
    """`outer_12` -> `12`. Raises `CheckpointError` for a link of no pattern."""
    short = key.removeprefix("outer_")
    if short not in _KEYS:
        raise CheckpointError(f"{where}: " + unknown_name("legacy_key", key, [f"outer_{each}" for each in _KEYS]))
    return short


def _legacy_config(directory: Path, task: str, named: str | None, named_in: Path) -> tuple[Path, dict[str, Any]] | None:
    """The trainer's configuration for a task, if it is there."""
    names = scoped_names(LEGACY_CONFIG, task)
    if named is not None and Path(named).name != named:
        raise CheckpointError(f"{named_in} names the file '{named}', which is outside of {directory}; it is not read")
    for name in names if named is None else (named, *names):
        if (directory / name).is_file():
            return directory / name, read_json(directory / name)
    return None


def _agreed(key: str, entry: _Entry, manifest: Path, file: Path, config: dict[str, Any]) -> _Entry:
    """An entry, completed by what the trainer's configuration says of it. Raises `CheckpointError` if they disagree."""
    other = _legacy_entry(key, entry.filename, file, config)
    for field in ("adapter_type", "in_dim", "out_dim"):
        ours, theirs = getattr(entry, field), getattr(other, field)
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"{manifest} says {field} {ours!r} of outer_{key}, and {file.name} says {theirs!r}; which is it?"
            )
    return entry.model_copy(update={name: value for name, value in other if getattr(entry, name) is None})


def _legacy_entry(key: str, filename: str, file: Path, config: dict[str, Any]) -> _Entry:
    said = {
        "legacy_key": f"outer_{key}",
        "filename": filename,
        "adapter_type": config.get(f"outer_{key}_type"),
        "in_dim": config.get(f"outer_{key}_in_dim"),
        "out_dim": config.get(f"outer_{key}_out_dim"),
    }
    try:
        return parse(_Entry, said, where=f"{file}, outer_{key}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _legacy_entries(directory: Path, file: Path, config: dict[str, Any], task: str) -> dict[str, _Entry]:
    """The links of a directory that has the trainer's configuration only."""
    if not config:
        raise CheckpointError(
            f"{directory} holds neither {OUTER_MANIFEST} nor {LEGACY_CONFIG}, so its outer links are not known"
        )
    keys = [_short(match[1], file) for name in config if (match := re.fullmatch(r"(outer_\w+)_type", name))]
    entries = {}
    for key in keys:
        source, target = (role.capitalize() for role in LAYOUTS[_KEYS[key]].edge(key))
        names = [*scoped_names(f"outer_{key}.pt", task), *scoped_names(f"{source}-{target}-Outerlink.pt", task)]
        there = [name for name in names if (directory / name).is_file()]
        if not there:
            raise CheckpointError(f"{directory} holds no file for the link outer_{key} that {file.name} names")
        entries[key] = _legacy_entry(key, there[0], file, config)
    return entries


def _pattern_of(entries: dict[str, _Entry], manifest: Path, said: dict[str, Any]) -> str:
    """The pattern whose links these are, all of them. Raises `CheckpointError`."""
    if not entries:
        raise CheckpointError(f"{manifest} names no link")
    names = {_KEYS[key] for key in entries}
    for field in ("paradigm", "mas_shape"):
        value = said.get(field)
        if isinstance(value, str):
            names |= {name for start, name in _PARADIGMS.items() if value.lower().startswith(start)}
    if len(names) != 1:
        raise CheckpointError(
            f"{manifest}: its links ({', '.join(f'outer_{key}' for key in entries)}), 'paradigm' and 'mas_shape' "
            f"are of different patterns: {', '.join(sorted(names))}"
        )
    pattern = names.pop()
    for key in LAYOUTS[pattern].keys:
        if key not in entries:
            source, target = LAYOUTS[pattern].edge(key)
            raise CheckpointError(f"{manifest} names no link outer_{key} ({source} to {target})")
    return pattern


def _check_roles(key: str, entry: _Entry, pattern: str, manifest: Path) -> None:
    """Refuse an entry whose roles are not those of its key: a file under a wrong label."""
    roles: Sequence[str] = LAYOUTS[pattern].edge(key)
    for field, given, role in zip(
        ("source_role", "target_role"), (entry.source_role, entry.target_role), roles, strict=True
    ):
        if given is not None and not names_of(role) & words(given):
            raise CheckpointError(f"{manifest} says {field} '{given}' of outer_{key}, whose {field} is the {role}")
