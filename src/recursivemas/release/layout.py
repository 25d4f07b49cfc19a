"""The names in the authors' released layout: systems, roles, links, types and tensors. Reads no file, holds no weights.

    style               pattern        outer links (letters: source, target)
    sequential_*        sequential     12 23 31                 1 planner, 2 critic, 3 solver
    mixture             mixture        1s 2s 3s, s1 s2 s3       1 math, 2 code, 3 science, s summarizer
    distillation        distillation   el le                    e expert, l learner
    deliberation        deliberation   rt tr                    r reflector, t toolcaller

    type (alias)                                   our design        inner tensors     outer tensors
    (outer_)linear_adapter      (1layer)           1-layer           proj1             proj1
    (outer_)linear_res_adapter  (1layer_res)       res-1-layer       proj1             proj1 residual_proj
    (outer_)adapter             (2layer)           2-layer           proj1 proj2       proj1 proj2
    (outer_)res_adapter         (2layer_res)       res-2-layer       proj1 proj2       proj1 proj2 residual_proj
    outer_ln_adapter                               ln-2-layer                          proj1 proj2 ln_source ln_target
    (outer_)ln_res_adapter      (2layer_ln_res)    ln-res-2-layer    proj1 proj2       proj1 proj2 residual_proj
                                                                     pre_ln post_ln    ln_source ln_target

Every layer has a bias. proj1 of a two-layer link has as many rows as the link's output is wide; in the outer types
with LayerNorms twice as many.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from recursivemas.errors import CheckpointError, unknown_name
from recursivemas.links import DESIGNS, LinkConfig
from recursivemas.patterns import Edge, Pattern


class Layout(NamedTuple):
    """How one of the four patterns is laid out."""

    roles: dict[str, str]
    """The role of each letter, in the order in which the bundled pattern of this name has them."""
    keys: tuple[str, ...]
    """The outer links, by the letters of source and target."""
    shape: str
    """What `mas_shape` says."""
    by_task: bool
    """Whether there are links for each task (math, code), or one set for all."""

    def edge(self, key: str, roles: Mapping[str, str] | None = None) -> Edge:
        """Source and target of an outer link; as roles of the release, unless others are given for the letters."""
        names = self.roles if roles is None else roles
        return Edge(names[key[0]], names[key[1]])

    def own_roles(self, pattern: Pattern) -> dict[str, str] | None:
        """The role of a pattern for each letter: by its name, and else by its place in the order.

        None if the edges of the pattern are not the links of the layout.
        """
        by_name = {plain(role): role for role in pattern.roles}
        found = {
            letter: by_name[name]
            for letter, released in self.roles.items()
            for name in map(plain, names_of(released))
            if name in by_name
        }
        others = [role for role in pattern.roles if role not in found.values()]
        letters = [letter for letter in self.roles if letter not in found]
        if len(others) != len(letters):
            return None
        own = {**found, **dict(zip(letters, others, strict=True))}
        if {self.edge(key, own) for key in self.keys} != set(pattern.graph):
            return None
        return {letter: own[letter] for letter in self.roles}


LAYOUTS = {
    "sequential": Layout({"1": "planner", "2": "critic", "3": "solver"}, ("12", "23", "31"), "chain", True),
    "mixture": Layout(
        {"1": "math", "2": "code", "3": "science", "s": "summarizer"},
        ("1s", "2s", "3s", "s1", "s2", "s3"),
        "hie",
        False,
    ),
    "distillation": Layout({"e": "expert", "l": "learner"}, ("el", "le"), "distill", True),
    "deliberation": Layout({"r": "reflector", "t": "toolcaller"}, ("rt", "tr"), "deliberation", False),
}
ALIASES = {"critic": ("refiner",)}
"""Other names the authors give a role: their training code says refiner, the rest critic."""


class Style(NamedTuple):
    """A released system on the hub."""

    pattern: str
    repositories: dict[str, str]
    """By letter."""
    outer: str

    @classmethod
    def of(cls, pattern: str, prefix: str, *models: str) -> "Style":
        """The repositories of a style: one for each role, and one for the outer links."""
        letters = LAYOUTS[pattern].roles
        names = [f"RecursiveMAS/{prefix}-{letters[each].capitalize()}-" for each in letters]
        repositories = {each: name + model for each, name, model in zip(letters, names, models, strict=True)}
        return cls(pattern, repositories, f"RecursiveMAS/{prefix}-Outerlinks")


STYLES = {
    "sequential_light": Style.of("sequential", "Sequential-Light", "Qwen3-1.7B", "Llama3.2-1B", "Qwen2.5-Math-1.5B"),
    "sequential_scaled": Style.of("sequential", "Sequential-Scaled", "Gemma3-4B", "Llama3.2-3B", "Qwen3.5-4B"),
    "mixture": Style.of(
        "mixture", "Mixture", "DeepSeek-R1-Distill-Qwen-1.5B", "Qwen2.5-Coder-3B", "BioMistral-7B", "Qwen3.5-2B"
    ),
    "distillation": Style.of("distillation", "Distillation", "Qwen3.5-9B", "Qwen3.5-4B"),
    "deliberation": Style.of("deliberation", "Deliberation", "Qwen3.5-4B", "Qwen3.5-4B"),
}

_BASE_TYPES = {
    "linear_adapter": "1-layer",
    "linear_res_adapter": "res-1-layer",
    "adapter": "2-layer",
    "res_adapter": "res-2-layer",
    "ln_adapter": "ln-2-layer",
    "ln_res_adapter": "ln-res-2-layer",
}
_TYPES = {
    # An inner link with LayerNorms and no residual was never released.
    "inner": {name: design for name, design in _BASE_TYPES.items() if name != "ln_adapter"},
    "outer": {f"outer_{name}": design for name, design in _BASE_TYPES.items()},
}
_TYPE_ALIASES = {
    "1layer": "1-layer",
    "1layer_res": "res-1-layer",
    "2layer": "2-layer",
    "2layer_res": "res-2-layer",
    "2layer_ln_res": "ln-res-2-layer",
}
_LAYERS = {"w1": "proj1", "w2": "proj2", "w3": "residual_proj"}
_NORMS = {
    "inner": {"source_norm": "pre_ln", "target_norm": "post_ln"},
    "outer": {"source_norm": "ln_source", "target_norm": "ln_target"},
}


def design_of(kind: str, adapter_type: str, where: str) -> str:
    """The design of a released type or its alias. Raises `CheckpointError` that names the file and the field."""
    known = {**_TYPES[kind], **_TYPE_ALIASES}
    if adapter_type not in known:
        raise CheckpointError(f"{where}: " + unknown_name(f"adapter_type of an {kind} link", adapter_type, known))
    return known[adapter_type]


def type_of(config: LinkConfig) -> str | None:
    """The released type of a link, or None where there is none."""
    found = [name for name, design in _TYPES[config.kind].items() if design == config.design]
    return found[0] if found else None


def released_config(kind: str, design: str, source_size: int, target_size: int) -> LinkConfig:
    """The form that every released link of a design has."""
    wide = kind == "outer" and DESIGNS[design].layer_norm
    return LinkConfig(
        kind=kind,
        source_size=source_size,
        target_size=target_size,
        design=design,
        intermediate_size=target_size * (2 if wide else 1),
        bias=True,
    )


def tensor_name(kind: str, ours: str) -> str:
    """`w1.weight` -> `proj1.weight`."""
    module, _, parameter = ours.partition(".")
    return f"{({**_LAYERS, **_NORMS[kind]})[module]}.{parameter}"


def words(name: str) -> set[str]:
    """The words of a name in lower case, and neighbours joined: `Tool_Caller-4B` has toolcaller too.

    >>> sorted(words("Deliberation-Tool_Caller"))
    ['caller', 'deliberation', 'deliberationtool', 'tool', 'toolcaller']
    """
    single = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    return {*single, *(one + other for one, other in pairwise(single))}


def plain(name: str) -> str:
    """A name without case and punctuation: `Tool_Caller` -> `toolcaller`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def names_of(role: str) -> set[str]:
    """A role of the release and its other names, plain."""
    return {role, *ALIASES.get(role, ())}
