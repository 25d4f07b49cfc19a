"""Our links and agents in the authors' released layout, for their code and for whoever reads their format.

What the layout cannot say is refused, with the reason: other graphs than the four, messages that skip the inner link,
link designs without a released type. Beside what the layout has stands prompts.yaml: the words, which it has no place
for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from recursivemas.agents import Agent
from recursivemas.errors import CheckpointError, ConfigError, unknown_name
from recursivemas.links import RecursiveLink
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.release.layout import LAYOUTS, Layout
from recursivemas.release.manifest import INNER_MANIFEST, LEGACY_CONFIG, OUTER_MANIFEST, scoped_names
from recursivemas.release.tensors import released_tensors

LINK_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = "prompts.yaml"


def write_release(
    directory: Path,
    agents: Mapping[str, Agent],
    links: Mapping[str, RecursiveLink],
    pattern: Pattern,
    prompts: PromptSet,
    *,
    message: str = "inner+outer",
    num_rounds: int | None = None,
    task: str = "math",
    dtype: str = "float32",
) -> None:
    """Write a system into an empty directory; `dtype` is the precision of the links on disk.

    The agents are written whole, in the precision they are in. Where the layout has links for each task (sequential,
    distillation), these are those of `task`. Raises `CheckpointError` if the layout cannot express the system.
    """
    if dtype not in LINK_DTYPES:
        raise ConfigError(unknown_name("dtype of released links", dtype, LINK_DTYPES))
    if message != "inner+outer":
        raise CheckpointError(
            f"this system sends '{message}' messages, and the authors' code always sends inner+outer ones: the layout "
            "cannot say otherwise"
        )
    name, own = layout_of(pattern)
    layout = LAYOUTS[name]
    # First everything that may be refused, then the gigabytes.
    inner = {letter: released_tensors(role, agents[role].inner_link) for letter, role in own.items()}
    edges = {key: str(layout.edge(key, own)) for key in layout.keys}
    outer = {key: released_tensors(edge, links[edge]) for key, edge in edges.items()}

    for letter, (adapter_type, tensors) in inner.items():
        folder = directory / layout.roles[letter]
        agents[own[letter]].model.save_pretrained(folder)
        file = scoped_names("adapter.pt", task)[0 if layout.by_task else 1]
        _save(folder / file, tensors, dtype)
        _write_json(folder / "adapter_config.json", {"adapter_type": adapter_type})
        if layout.by_task:
            _write_json(folder / INNER_MANIFEST, {"format_version": 1, "tasks": {task: {"adapter.pt": file}}})
    _write_outer(directory / "outer", name, outer, task, num_rounds, dtype)
    text = yaml.safe_dump(prompts.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    (directory / PROMPTS).write_text(text, encoding="utf-8")


def layout_of(pattern: Pattern) -> tuple[str, dict[str, str]]:
    """Which released layout has the graph of a pattern, and the role of each letter.

    Raises `CheckpointError` if none has, or if only the pattern's name could tell two apart and does not.
    """
    fitting = {}
    for name, layout in LAYOUTS.items():
        own = layout.own_roles(pattern)
        if own is not None and _plays_alike(layout, own, pattern):
            fitting[name] = own
    if pattern.name in fitting:
        return pattern.name, fitting[pattern.name]
    if len(fitting) > 1:
        raise CheckpointError(
            f"the pattern '{pattern.name}' has the graph of {' and of '.join(fitting)}; call it by one of these names"
        )
    if not fitting:
        raise CheckpointError(
            f"the pattern '{pattern.name}' has none of the four graphs that the released layout knows "
            f"({', '.join(LAYOUTS)})"
        )
    return next(iter(fitting.items()))


def _plays_alike(layout: Layout, own: Mapping[str, str], pattern: Pattern) -> bool:
    """Whether the roles act in the layout's order: specialists beside each other, all others one after another."""
    *others, last = own.values()
    stages = [set(others), {last}] if layout.shape == "hie" else [{role} for role in own.values()]
    return [set(stage) for stage in pattern.stages] == stages and pattern.answers == last


def _write_outer(
    folder: Path,
    name: str,
    outer: Mapping[str, tuple[str, Mapping[str, torch.Tensor]]],
    task: str,
    num_rounds: int | None,
    dtype: str,
) -> None:
    """The directory of the outer links: their files, and the two that describe them."""
    layout = LAYOUTS[name]
    which = 0 if layout.by_task else 1
    legacy_file = scoped_names(LEGACY_CONFIG, task)[which]
    legacy: dict[str, Any] = {"mas_shape": layout.shape, "mas_task": task}
    if num_rounds is not None:
        legacy["num_recursive_rounds"] = num_rounds
    folder.mkdir()
    adapters = []
    for key, (adapter_type, tensors) in outer.items():
        file = scoped_names(f"outer_{key}.pt", task)[which]
        _save(folder / file, tensors, dtype)
        last = tensors.get("proj2.weight", tensors["proj1.weight"])
        sizes = {"in_dim": tensors["proj1.weight"].shape[1], "out_dim": last.shape[0]}
        source, target = layout.edge(key)
        adapters.append(
            {
                "legacy_key": f"outer_{key}",
                "filename": file,
                "legacy_filename": f"outer_{key}.pt",
                "adapter_type": adapter_type,
                **sizes,
                "source_role": source.capitalize(),
                "target_role": target.capitalize(),
            }
        )
        said = {"type": adapter_type, **sizes}
        legacy.update({f"outer_{key}_{field}": value for field, value in said.items()})
    scope: dict[str, Any] = {"legacy_config_filename": legacy_file, "adapters": adapters}
    if layout.by_task:
        scope = {"tasks": {task: {"task": task, **scope}}}
    _write_json(folder / OUTER_MANIFEST, {"format_version": 1, "paradigm": name, **scope})
    _write_json(folder / legacy_file, legacy)


def _save(file: Path, tensors: Mapping[str, torch.Tensor], dtype: str) -> None:
    torch.save({name: tensor.to(LINK_DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}, file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
