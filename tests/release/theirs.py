"""A second writer of the authors' released layout, and the formulas of its links, both from its description alone.

Uses nothing of the package but the class of a system. What the package reads and writes is compared with this.
"""

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recursivemas.system import RecursiveSystem

Weights = dict[str, Tensor]

# What the authors' code has, by its own names: layers beside proj1, the shape of proj1, and which residual.
INNER_TYPES = ("linear_adapter", "linear_res_adapter", "adapter", "res_adapter", "ln_res_adapter")
OUTER_TYPES = tuple(f"outer_{name}" for name in (*INNER_TYPES[:4], "ln_adapter", "ln_res_adapter"))
ALIASES = {
    "1layer": "linear_adapter",
    "1layer_res": "linear_res_adapter",
    "2layer": "adapter",
    "2layer_res": "res_adapter",
    "2layer_ln_res": "ln_res_adapter",
}
KEYS = {
    "sequential": {"12": "planner critic", "23": "critic solver", "31": "solver planner"},
    "mixture": {
        "1s": "math summarizer",
        "2s": "code summarizer",
        "3s": "science summarizer",
        "s1": "summarizer math",
        "s2": "summarizer code",
        "s3": "summarizer science",
    },
    "distillation": {"el": "expert learner", "le": "learner expert"},
    "deliberation": {"rt": "reflector toolcaller", "tr": "toolcaller reflector"},
}


def draw(
    adapter_type: str, source_size: int, target_size: int, seed: int, dtype: torch.dtype = torch.float32
) -> Weights:
    """Random tensors of a type, with the names and shapes that the authors' code gives them."""
    outer, base = adapter_type.startswith("outer_"), adapter_type.removeprefix("outer_")
    width = 2 * target_size if outer and "ln" in base else target_size
    two_layers = "linear" not in base
    layers = {"proj1": (width if two_layers else target_size, source_size)}
    if two_layers:
        layers["proj2"] = (target_size, width)
    if outer and "res" in base:
        layers["residual_proj"] = (target_size, source_size)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in layers.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    if "ln" in base:
        names = ("ln_source", "ln_target") if outer else ("pre_ln", "post_ln")
        for name, size in zip(names, (source_size, target_size), strict=True):
            weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
            weights[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def computed(adapter_type: str, weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """The formula of a type, in float32."""
    outer, base = adapter_type.startswith("outer_"), adapter_type.removeprefix("outer_")

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].float().T + weights[f"{name}.bias"].float()

    def layer_norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return weights[f"{name}.weight"].float() * normal + weights[f"{name}.bias"].float()

    x = layer_norm("ln_source" if outer else "pre_ln", states) if "ln" in base else states
    x = linear("proj1", x) if "linear" in base else linear("proj2", functional.gelu(linear("proj1", x)))
    if "res" in base:
        x = x + (linear("residual_proj", states) if outer else states)
    return layer_norm("ln_target" if outer else "post_ln", x) if "ln" in base else x


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


@dataclass
class Release:
    """A release on disk, and what is in it by role and edge."""

    place: Path
    types: dict[str, str]
    weights: dict[str, Weights]
    prompts: dict[str, dict[str, str]]


def write_theirs(
    place: Path,
    pattern: str,
    models: Mapping[str, tuple[Path, int]],
    *,
    inner: tuple[str, ...] = ("ln_res_adapter",),
    outer: tuple[str, ...] = ("outer_ln_res_adapter",),
    dtype: torch.dtype = torch.float32,
    tasks: tuple[str, ...] = ("math", "code"),
    folders: Mapping[str, str] | None = None,
) -> Release:
    """A release as the layout's description has it; `models` gives directory and width by role.

    With `tasks` there are links and manifests for each, without any one set for all. What is returned is of the first.
    """
    types: dict[str, str] = {}
    drawn: dict[str, Weights] = {}

    def put(folder: Path, stem: str, name: str, adapter_type: str, sizes: tuple[int, int]) -> list[str]:
        types[name] = adapter_type
        files = []
        for task in tasks or (None,):
            weights = draw(adapter_type, *sizes, seed=zlib.crc32(f"{name} {task}".encode()), dtype=dtype)
            drawn.setdefault(name, weights)
            files.append(f"{stem}({task}).pt" if task else f"{stem}.pt")
            torch.save(weights, folder / files[-1])
        return files

    for number, (role, (model, width)) in enumerate(models.items()):
        folder = place / (folders or {}).get(role, role)
        folder.mkdir(parents=True)
        for file in model.iterdir():
            shutil.copy(file, folder)
        adapter_type = inner[number % len(inner)]
        files = put(folder, "adapter", role, adapter_type, (width, width))
        write_json(folder / "adapter_config.json", {"adapter_type": adapter_type})
        if tasks:
            scopes = {task: {"adapter.pt": file} for task, file in zip(tasks, files, strict=True)}
            write_json(folder / "innerlink_config.json", {"format_version": 1, "tasks": scopes})
    (place / "outer").mkdir()
    scopes: dict[str | None, list[dict[str, Any]]] = {task: [] for task in tasks or (None,)}
    for number, (key, roles) in enumerate(KEYS[pattern].items()):
        source, target = roles.split()
        sizes = (models[source][1], models[target][1])
        adapter_type = outer[number % len(outer)]
        files = put(place / "outer", f"outer_{key}", f"{source}->{target}", adapter_type, sizes)
        said = {"adapter_type": adapter_type, "in_dim": sizes[0], "out_dim": sizes[1]}
        for task, file in zip(scopes, files, strict=True):
            scopes[task].append({"legacy_key": f"outer_{key}", "filename": file, **said})
    content: dict[str, Any] = {"adapters": scopes[None]} if not tasks else {}
    if tasks:
        content["tasks"] = {task: {"adapters": entries} for task, entries in scopes.items()}
    write_json(place / "outer" / "outerlink_config.json", {"format_version": 1, **content})
    return Release(place, types, drawn, short_prompts(pattern))


def short_prompts(pattern: str) -> dict[str, dict[str, str]]:
    """Words in the form of the golden systems: few, with the slots at different places."""
    readers: dict[str, list[str]] = {}
    for roles in KEYS[pattern].values():
        source, target = roles.split()
        readers.setdefault(target, []).append(source)
    answering = [*KEYS[pattern].values()][0 if pattern in ("mixture", "distillation", "deliberation") else 1].split()[1]
    prompts = {}
    for role, sources in readers.items():
        slots = " ".join(f"{{latents:{source}}}" for source in sources)
        later = f"{slots} {{question}} as {role}" if len(sources) > 1 else f"{{question}} {slots} as {role}"
        feedback = role != answering and role not in ("critic",)
        prompts[role] = {"first": "{question} Say:", "later": later} if feedback else {"always": later}
    return prompts


def load(release: Release, **options: Any) -> RecursiveSystem:
    settings = {"prompts": release.prompts, "system_prompt": "Team.", "dtype": "float32", "device": "cpu", **options}
    return RecursiveSystem.from_release(release.place, **settings)
