"""A release made into the parts of a system: from a directory, or from the hub by the name of a style.

    some-release/
      planner/ critic/ solver/      a whole model each, with adapter.pt or adapter(task).pt, and its type beside it
      outer/                        outerlink_config.json, and the files it names

Directories are found by what they hold and what they are called: `critic`, `refiner` and
`Sequential-Light-Critic-Llama3.2-1B` are the same role. Every link becomes a `RecursiveLink` in float32. Putting the
parts together is the system's business.
"""

import filecmp
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recursivemas.agents import Agent
from recursivemas.config import read_yaml
from recursivemas.errors import CheckpointError, ModelError, unknown_name
from recursivemas.links import RecursiveLink
from recursivemas.loading import DTYPES
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.release.hub import Announce, Snapshot, download_style
from recursivemas.release.layout import LAYOUTS, STYLES, Layout, names_of, plain, words
from recursivemas.release.manifest import OuterEntry, inner_file, is_outer, read_json, read_outer_manifest
from recursivemas.release.tensors import read_released_link

# The released code is run with 16 to 48 latent steps: mostly 32 or 48, on code 16.
_LATENT_STEPS = {"code": 16}
_DEFAULT_LATENT_STEPS = 32

Prompts = str | Path | Mapping[str, Any] | PromptSet


class ReleaseWarning(UserWarning):
    """Released links run with other words than they were trained on."""


@dataclass(frozen=True)
class Release:
    """The parts of a system, as a release has them."""

    agents: dict[str, Agent]
    links: dict[str, RecursiveLink]
    pattern: Pattern
    prompts: PromptSet
    settings: dict[str, Any]
    """Fields of `SystemSettings`."""
    origin: dict[str, Any]
    """Where each part came from."""


@dataclass(frozen=True)
class _Place:
    """Where the parts of a release are."""

    name: str
    outer: Path
    roles: dict[str, Path]
    """By letter; empty where they have to be found, in `root`."""
    root: Path
    snapshots: dict[str, Snapshot]
    """Repositories of the agents, by letter, if they came from the hub."""


def read_release(
    source: str | Path,
    task: str = "math",
    *,
    pattern: str | Path | dict[str, Any] | Pattern | None = None,
    prompts: Prompts | None = None,
    system_prompt: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    announce: Announce | None = None,
) -> Release:
    """Read a release; see `RecursiveSystem.from_release` for the arguments.

    `announce` is told, line by line, what is going to be downloaded (default: stderr).
    """
    place = _find(source, task, announce or _tell)
    outer = read_outer_manifest(place.outer, task)
    layout = LAYOUTS[outer.pattern]
    table, own = _own_roles(outer.pattern, pattern)
    folders = place.roles or _find_roles(place, layout, own)
    words_of = choose_prompts(outer.pattern, own, prompts, system_prompt)
    names = _names_in_prompts(layout, own, words_of)
    table, own = table.renamed(names), {letter: names.get(role, role) for letter, role in own.items()}

    read = {role: _read_inner(folders[letter], task) for letter, role in own.items()}
    read |= {str(layout.edge(key, own)): _read_outer(entry) for key, entry in outer.entries.items()}
    files = {name: file for name, (file, _) in read.items()}
    links = {name: link for name, (_, link) in read.items()}
    models = _load_models({role: folders[letter] for letter, role in own.items()}, dtype, device)
    for letter, snapshot in place.snapshots.items():
        model = models[own[letter]]
        if model.source is None:  # two roles may share one
            model.source, model.revision = snapshot.repository, snapshot.revision
    _check_widths(links, files, models)
    if prompts is None:
        warnings.warn(
            f"the prompts are ours ('{words_of.name}'), and the links of '{place.name}' were trained on the authors' "
            "words: give these with prompts=, or take them from a clone of the authors' code with recursivemas import "
            "--prompts-from",
            ReleaseWarning,
            stacklevel=3,
        )
    agents = {role: Agent(role, models[role], links.pop(role)) for role in own.values()}
    settings: dict[str, Any] = {
        "name": place.name,
        "num_latent_steps": _LATENT_STEPS.get(task, _DEFAULT_LATENT_STEPS),
        "message": "inner+outer",
    }
    if outer.num_rounds is not None:
        settings["num_rounds"] = outer.num_rounds
    origin = {
        "source": place.name,
        "task": task,
        "links": {name: f"{file.parent.name}/{file.name}" for name, file in files.items()},
        "repositories": {each.repository: each.revision for each in place.snapshots.values()},
    }
    return Release(agents, links, table, words_of, settings, origin)


def layout_of_release(
    source: str | Path, task: str, pattern: str | Path | dict[str, Any] | Pattern | None = None
) -> tuple[str, dict[str, str]]:
    """Which of the four layouts a release has, and the role of each letter; nothing is downloaded for it."""
    if Path(source).is_dir() or str(source) not in STYLES:
        name = read_outer_manifest(_find(source, task, _tell).outer, task).pattern
    else:
        name = STYLES[str(source)].pattern
    return name, _own_roles(name, pattern)[1]


def _own_roles(layout: str, pattern: str | Path | dict[str, Any] | Pattern | None) -> tuple[Pattern, dict[str, str]]:
    """The pattern, and its role for each letter. Raises `CheckpointError` if its edges are not those of the layout."""
    table = Pattern.load(layout if pattern is None else pattern)
    own = LAYOUTS[layout].own_roles(table)
    if own is None:
        released = ", ".join(str(LAYOUTS[layout].edge(key)) for key in LAYOUTS[layout].keys)
        raise CheckpointError(
            f"the pattern '{table.name}' does not fit this release: it has the edges {', '.join(table.edges)}, and the "
            f"release, a {layout} one, has links for {released}"
        )
    return table, own


def choose_prompts(
    layout: str, own: Mapping[str, str], prompts: Prompts | None, system_prompt: str | None
) -> PromptSet:
    """A prompt set from what a user gives: a set, its YAML file or bundled name, or templates by role.

    By default the bundled set of the layout's pattern, with its roles named as in `own`, by letter. Raises
    `ConfigError` or `PatternError`.
    """
    if isinstance(prompts, (str, Path)) and Path(prompts).suffix in (".yaml", ".yml"):
        content = read_yaml(Path(prompts))
        prompts = prompts if "roles" in content else content
    if isinstance(prompts, Mapping):
        given = dict(prompts) if "roles" in prompts else {"roles": dict(prompts)}
        chosen = PromptSet.load({"name": layout, **given})
    else:
        chosen = PromptSet.load(layout if prompts is None else prompts)
    if prompts is None:
        bundled = LAYOUTS[layout].own_roles(Pattern.load(layout)) or {}
        chosen = chosen.renamed({bundled[letter]: role for letter, role in own.items()})
    return chosen if system_prompt is None else chosen.model_copy(update={"system": system_prompt})


def _names_in_prompts(layout: Layout, own: Mapping[str, str], prompts: PromptSet) -> dict[str, str]:
    """New names for roles that the prompts call otherwise: `refiner` for the critic, `tool_caller` for `toolcaller`."""
    names = {}
    for letter, role in own.items():
        known = {plain(name) for name in names_of(layout.roles[letter])}
        other = [name for name in prompts.roles if plain(name) in known]
        if role not in prompts.roles and other:
            names[role] = other[0]
    return names


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")  # a download of gigabytes is told before it begins


# Where things are


def _find(source: str | Path, task: str, announce: Announce) -> _Place:
    """The directories of a release. Raises `CheckpointError`."""
    root = Path(source)
    if root.is_dir():
        if (root / "system.json").is_file():
            raise CheckpointError(f"{root} is a system in our own format: load it with RecursiveSystem.from_pretrained")
        return _Place(root.resolve().name, _find_outer(root), {}, root, {})
    name = str(source)
    if name in STYLES:
        agents, outer = download_style(STYLES[name], task, announce)
        folders = {letter: snapshot.folder for letter, snapshot in agents.items()}
        return _Place(name, outer.folder, folders, outer.folder, agents)
    raise CheckpointError(unknown_name("released system", name, STYLES) + "; a directory in the same layout serves too")


def _find_outer(root: Path) -> Path:
    """The directory of the outer links: one below, or the release itself."""
    found = [each for each in _directories(root) if is_outer(each)] or [each for each in (root,) if is_outer(each)]
    if not found:
        raise CheckpointError(
            f"{root} is no release: neither it nor a directory in it holds outerlink_config.json (there are: "
            f"{_names(_directories(root))})"
        )
    if len(found) > 1:
        raise CheckpointError(f"{root} holds the outer links of several releases: {_names(found)}; give one of them")
    return found[0]


def _find_roles(place: _Place, layout: Layout, own: Mapping[str, str]) -> dict[str, Path]:
    """The directory of each role, by letter. Raises `CheckpointError` where there is none, or more than one."""
    there = [each for each in _directories(place.root) if each != place.outer]
    found: dict[str, Path] = {}
    for letter, released in layout.roles.items():
        names = {plain(name) for name in (*names_of(released), own[letter])}
        fitting = [each for each in there if plain(each.name) in names] or [
            each for each in there if names & words(each.name)
        ]
        if not fitting:
            raise CheckpointError(
                f"{place.root} holds no directory of the {own[letter]} (there are: {_names(there)}); name it "
                f"'{released}'"
            )
        if len(fitting) > 1:
            raise CheckpointError(
                f"{place.root}: several directories may be that of the {own[letter]}: {_names(fitting)}"
            )
        found[letter] = fitting[0]
    return found


def _directories(root: Path) -> list[Path]:
    return sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))


def _names(places: list[Path]) -> str:
    return ", ".join(each.name for each in places) or "none"


# Links and models


def _read_inner(folder: Path, task: str) -> tuple[Path, RecursiveLink]:
    """The inner link of a role, and its file."""
    file = inner_file(folder, "adapter.pt", task)
    config = inner_file(folder, "adapter_config.json", task)
    adapter_type = read_json(config).get("adapter_type")
    if not isinstance(adapter_type, str):
        raise CheckpointError(f"{config} names no adapter_type, so it is not known what {file.name} computes")
    return file, read_released_link(file, "inner", adapter_type, described_in=config)


def _read_outer(entry: OuterEntry) -> tuple[Path, RecursiveLink]:
    """An outer link, and its file."""
    sizes = {"in_dim": entry.in_dim, "out_dim": entry.out_dim}
    return entry.file, read_released_link(
        entry.file, "outer", entry.adapter_type, described_in=entry.described_in, **sizes
    )


def _load_models(
    folders: Mapping[str, Path], dtype: str | torch.dtype | None, device: str | torch.device | None
) -> dict[str, LanguageModel]:
    """The model of each role; roles whose models are the same to the last byte share one. Raises `CheckpointError`."""
    models: dict[str, LanguageModel] = {}
    for role, folder in folders.items():
        same = [other for other in models if _same_model(folders[other], folder)]
        if same:
            models[role] = models[same[0]]
            continue
        try:
            precision = _stored_dtype(folder) if dtype == "auto" else dtype
            models[role] = LanguageModel.from_pretrained(folder, dtype=precision, device=device)
        except ModelError as error:
            raise CheckpointError(f"the agent of the {role} cannot be loaded: {error}") from None
    return models


def _same_model(one: Path, other: Path) -> bool:
    """Whether two directories hold the same model and tokenizer, byte by byte (the links beside them may differ)."""

    def parts(folder: Path) -> dict[str, Path]:
        return {
            file.name: file
            for file in folder.iterdir()
            if file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model")
            and not file.name.startswith(("adapter_config", "innerlink_config", "train_args", "README"))
        }

    first, second = parts(one), parts(other)
    if first.keys() != second.keys() or any(
        first[name].stat().st_size != second[name].stat().st_size for name in first
    ):
        return False
    return all(filecmp.cmp(first[name], second[name], shallow=False) for name in first)


def _stored_dtype(folder: Path) -> str | None:
    """The precision of the weights in a directory, if its configuration says so."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    except (OSError, ValueError, AttributeError):
        return None  # loading it says what is wrong
    return found if found in DTYPES else None


def _check_widths(
    links: Mapping[str, RecursiveLink], files: Mapping[str, Path], models: Mapping[str, LanguageModel]
) -> None:
    """Refuse a link that does not fit the models it stands between."""
    for name, link in links.items():
        source, _, target = name.partition("->")
        for role, does, size in (
            (source, "thinks", link.config.source_size),
            (target or source, "reads", link.config.target_size),
        ):
            if size != models[role].hidden_size:
                raise CheckpointError(
                    f"{files[name]} is made for {size}-wide states, but the {role} {does} in "
                    f"{models[role].hidden_size} dimensions; is it the link of another release?"
                )
