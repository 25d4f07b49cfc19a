"""What a recipe will take, before anything is loaded: sizes, trained parameters, memory, disk.

Agents are known by their configurations alone, so that no weights and no network are needed. Memory is that of one
device which holds everything, in bytes:

    agents          parameters * bytes of their precision; roles with the same model share one copy
    links           4 * parameters, and 12 more for each that the outer loop trains: gradient, and two moments of AdamW
    pairs           4 * samples * reply * (width in + width out), for an inner link and for each edge's alignment; the
                    latter stay while the outer loop is anchored to them
    prompts         keys and values of each prompt up to its first slot, read once and kept
    activations     what the backward pass needs of a turn of one question, for each of its model's layers

                        p (b (2 q + 3 f) + 8 d)  +  2 b c k'

                    p positions read with gradient, c positions that they look back on; widths d of states, f of the
                    feed-forward part, q of all heads, k' of all keys (for several positions at once q: keys are then
                    repeated for each head); b bytes a number. A reading is p positions at once, each latent step one
                    more. In a layer with linear attention, where much is in float32, 2 b (p q + c k') becomes 56 p w (w
                    the width of its queries, keys and values together, p in blocks of 64), or for a single position
                    4 (3 s + 20 w), with s numbers in its state
    answers         for each token of an answer and each word of the vocabulary, b + 8 bytes

A turn needs nothing if no gradient reaches it: a prompt without messages, thought on through inner links that are not
trained. With `outer.recompute` only the largest turn counts, else all of them. Counted on tiny models, saved tensors
are within a third of this; buffers of kernels and what the allocator wastes come on top. Tokens are what `lengths` of
the recipe says, with a quarter of a token for each letter of a template and eight for what a chat template puts before
and after it.

Knows recipes and configurations; knows nothing of tensors that hold anything.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recursivemas.checkpoint import find_system, inside, read_link, read_manifest
from recursivemas.links import LinkConfig, RecursiveLink
from recursivemas.loading import ModelSizes
from recursivemas.patterns import Edge, Pattern, Turn
from recursivemas.prompts import PromptSet
from recursivemas.training.recipe import STAGES, Recipe, settings_of

SHIPPED = Path(__file__).parents[1] / "bundled" / "configs"
"""Configurations of models that recipes of this package name."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK = 64
_CHAT = 8
_SLOT = re.compile(r"\{latents:(\w+)\}")


@dataclass(frozen=True)
class RoleEstimate:
    """One agent."""

    role: str
    model: str
    sizes: ModelSizes
    shares: str | None
    """An earlier role with the same model, of which there is only one copy."""


@dataclass(frozen=True)
class LinkEstimate:
    """One link."""

    link: str
    kind: str
    source_size: int
    target_size: int
    parameters: int
    is_trained: bool
    """In the outer loop. The stages before it train all of their kind."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, on one device that holds everything."""

    agents: int
    links: int
    optimizer: int
    """Gradients and moments of the links that the outer loop trains."""
    inner: int
    """The pairs of the largest inner link with the optimizer of that link; 0 if the stage is left out, as below."""
    alignment: int
    outer: int
    """Pairs that the anchor needs, kept prompts, activations of a step, logits of the answers."""

    @property
    def peak(self) -> int:
        """Of the stage that takes most."""
        return self.agents + self.links + max(self.inner, self.alignment, self.outer and self.outer + self.optimizer)


@dataclass(frozen=True)
class Estimate:
    """All that can be said of a recipe beforehand."""

    pattern: str
    roles: tuple[RoleEstimate, ...]
    links: tuple[LinkEstimate, ...]
    num_rounds: int
    num_latent_steps: int
    dtype: str
    lengths: dict[str, int]
    """Tokens of a question and of a reply, as assumed."""
    prompts: dict[str, int]
    """Tokens of the longest prompt of each role, with the messages in its slots."""
    too_long: tuple[str, ...]
    """Roles whose model reads fewer positions than its prompt, its thoughts and a reply have."""
    memory: MemoryEstimate
    disk: int
    """Bytes of the trained system, and of the state from which a killed run resumes."""
    download: int
    """Bytes of the weights of agents that are not in a local directory, in half precision, as published."""

    @property
    def agent_parameters(self) -> int:
        """Of every model once."""
        return sum(each.sizes.num_parameters for each in self.roles if each.shares is None)

    @property
    def link_parameters(self) -> dict[str, int]:
        """By kind."""
        return {kind: sum(each.parameters for each in self.links if each.kind == kind) for kind in ("inner", "outer")}

    @property
    def trained_share(self) -> float:
        """Of all parameters, those of links."""
        trained = sum(self.link_parameters.values())
        return trained / (trained + self.agent_parameters)

    def to_plain(self) -> dict[str, Any]:
        """Everything as plain data for JSON, what is derived included."""
        return {
            **asdict(self),
            "agent_parameters": self.agent_parameters,
            "link_parameters": self.link_parameters,
            "trained_share": self.trained_share,
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
        }


def estimate(recipe: Recipe, *, stages: Sequence[str] = STAGES, team: "Team | None" = None) -> Estimate:
    """What training by a recipe takes, whose `team` need not be found again where it is known.

    Raises `ModelError`, `ConfigError`, `CheckpointError` or `PatternError`.
    """
    team = team or team_of(recipe)
    num_rounds, num_latent_steps = team.num_rounds, team.num_latent_steps
    calculation = Calculation(recipe, team)
    first: dict[str, str] = {}
    roles = []
    for role in team.pattern.roles:
        name = team.models[role]
        roles.append(RoleEstimate(role, name, team.sizes[role], first.get(name)))
        first.setdefault(name, role)
    agents = BYTES[recipe.dtype] * sum(each.sizes.num_parameters for each in roles if each.shares is None)
    parameters = sum(each.parameters for each in team.links)
    trained = sum(each.parameters for each in team.links if each.is_trained)
    saved = BYTES[recipe.save_dtype]
    local = [each for each in roles if Path(each.model).is_dir() and each.shares is None]
    remote = [each for each in roles if not Path(each.model).is_dir() and each.shares is None]
    prompts = {role: calculation.prompt(role) for role in team.pattern.roles}
    return Estimate(
        pattern=team.pattern.name,
        roles=tuple(roles),
        links=team.links,
        num_rounds=num_rounds,
        num_latent_steps=num_latent_steps,
        dtype=recipe.dtype,
        lengths=recipe.lengths.model_dump(),
        prompts=prompts,
        too_long=tuple(
            role
            for role, length in prompts.items()
            if (most := team.sizes[role].max_positions) is not None
            and length + max(num_latent_steps, recipe.lengths.reply) > most
        ),
        memory=MemoryEstimate(
            agents=agents,
            links=4 * parameters,
            optimizer=12 * trained if "outer" in stages else 0,
            inner=calculation.inner() if "inner" in stages else 0,
            alignment=calculation.alignment() if "alignment" in stages else 0,
            outer=calculation.outer() if "outer" in stages else 0,
        ),
        # The state holds the weights, those that were best so far, and two moments, of every stage.
        disk=saved * (parameters + sum(each.sizes.num_parameters for each in local)) + 16 * (parameters + trained),
        download=2 * sum(each.sizes.num_parameters for each in remote),
    )


# --- who plays --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Team:
    """The system that a recipe trains, as far as it can be known without its weights."""

    pattern: Pattern
    prompts: PromptSet
    models: dict[str, str]
    sizes: dict[str, ModelSizes]
    links: tuple[LinkEstimate, ...]
    num_rounds: int
    num_latent_steps: int


def team_of(recipe: Recipe) -> Team:
    given: dict[str, LinkConfig] = {}
    if recipe.system is None:
        pattern, prompts = recipe.new_pattern, recipe.new_prompts
        models = dict(recipe.agents)
        settings = settings_of(recipe)
    else:
        directory = find_system(recipe.system)
        manifest = read_manifest(directory)
        pattern, prompts = manifest.pattern, manifest.prompts
        settings = settings_of(recipe, manifest.settings)
        models = {
            role: str(inside(directory, record.model)) if record.local else record.model
            for role, record in manifest.agents.items()
        }
        if recipe.links.start == "given":
            given = {name: read_link(inside(directory, each.folder)).config for name, each in manifest.links.items()}
    sizes = {name: ModelSizes.of(name, SHIPPED) for name in dict.fromkeys(models.values())}
    by_role = {role: sizes[models[role]] for role in pattern.roles}
    inner = {role: Edge(role, role) for role in pattern.roles}
    links = [_link(recipe, role, "inner", ends, by_role, given.get(role)) for role, ends in inner.items()]
    links += [_link(recipe, str(edge), "outer", edge, by_role, given.get(str(edge))) for edge in pattern.graph]
    return Team(pattern, prompts, models, by_role, tuple(links), settings.num_rounds, settings.num_latent_steps)


def _link(
    recipe: Recipe, name: str, kind: str, ends: Edge, sizes: Mapping[str, ModelSizes], given: LinkConfig | None
) -> LinkEstimate:
    config = given or LinkConfig(
        kind=kind,
        source_size=sizes[ends.source].hidden_size,
        target_size=sizes[ends.target].hidden_size,
        design=recipe.links.design,
        bias=recipe.links.bias,
    )
    with torch.device("meta"):
        parameters = sum(each.numel() for each in RecursiveLink(config).parameters())
    trained = recipe.outer.trained == "inner+outer" or kind == "outer"
    return LinkEstimate(name, kind, config.source_size, config.target_size, parameters, trained)


# --- how much ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calculation:
    """The formulas at the top of this file."""

    recipe: Recipe
    team: Team

    def inner(self) -> int:
        """The largest inner link's pairs, and its gradient and moments."""
        pairs = self.recipe.inner.num_samples * self.recipe.lengths.reply
        return max(
            4 * pairs * (each.source_size + each.target_size) + 12 * each.parameters
            for each in self.team.links
            if each.kind == "inner"
        )

    def alignment(self) -> int:
        """The pairs of all edges, what the link that is trained is given, and its gradient and moments."""
        outer = [each for each in self.team.links if each.kind == "outer"]
        return self._aligned_pairs() + max(
            (4 * self._num_aligned() * each.source_size + 12 * each.parameters for each in outer), default=0
        )

    def _num_aligned(self) -> int:
        settings, reply = self.recipe.alignment, self.recipe.lengths.reply
        return settings.num_samples * min(reply, settings.num_tokens or reply)

    def _aligned_pairs(self) -> int:
        outer = [each for each in self.team.links if each.kind == "outer"]
        return sum(4 * self._num_aligned() * (each.source_size + each.target_size) for each in outer)

    def outer(self) -> int:
        """A step of the outer loop, beside links and their optimizer."""
        settings = self.recipe.outer
        num_rounds = settings.num_rounds or self.team.num_rounds
        answers = tuple(settings.weights_of(num_rounds))
        turns = self.team.pattern.schedule(num_rounds, answer_rounds=answers)
        needed = [self._turn(turn) for turn in turns]
        kept = {(turn.role, self.template(turn)): self._kept_prompt(turn) for turn in turns}
        together = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
        held = max(needed) if settings.recompute else sum(needed)
        return together * (held + sum(kept.values())) + (self._aligned_pairs() if settings.anchor else 0)

    def _turn(self, turn: Turn) -> int:
        """Activations of one turn of one question."""
        sizes, steps, reply = self.team.sizes[turn.role], self.team.num_latent_steps, self.recipe.lengths.reply
        before, after, slots = self.pieces(turn)
        read = after + slots * steps
        total = self.activations(sizes, read, before + read) if slots else 0
        context = before + read
        if turn.speaks:
            logits = reply * sizes.vocab_size * (BYTES[self.recipe.dtype] + 8)
            return total + self.activations(sizes, reply, context + reply) + logits
        if slots or self.recipe.outer.trained == "inner+outer":
            total += sum(self.activations(sizes, 1, context + step) for step in range(1, steps))
        return total

    def activations(self, sizes: ModelSizes, positions: int, context: int) -> int:
        """What the backward pass needs of positions read at once, with all that they look back on."""
        size = BYTES[self.recipe.dtype]
        shared = positions * (3 * size * sizes.intermediate_size + 8 * sizes.hidden_size)
        keys = sizes.query_size if positions > 1 else sizes.key_size
        attention = 2 * size * (positions * sizes.query_size + context * keys)
        blocks = -(-positions // _BLOCK) * _BLOCK
        single = 3 * sizes.recurrent_size + 20 * sizes.recurrent_width
        linear = 4 * (14 * blocks * sizes.recurrent_width if positions > 1 else single)
        attending = sizes.num_layers - sizes.num_recurrent_layers
        return sizes.num_layers * shared + attending * attention + sizes.num_recurrent_layers * linear

    def _kept_prompt(self, turn: Turn) -> int:
        """The cache of a prompt up to its first slot."""
        sizes = self.team.sizes[turn.role]
        attending = sizes.num_layers - sizes.num_recurrent_layers
        states = 4 * sizes.num_recurrent_layers * sizes.recurrent_size
        return 2 * BYTES[self.recipe.dtype] * attending * sizes.key_size * self.pieces(turn)[0] + states

    def template(self, turn: Turn) -> str:
        """The template of a turn."""
        return self.team.prompts.template(
            turn.role, round=turn.round, is_last=turn.speaks or turn.round == self.team.num_rounds
        )

    def pieces(self, turn: Turn) -> tuple[int, int, int]:
        """Tokens of a prompt before its first slot, tokens after it, and slots."""
        return self.pieces_of(self.template(turn))

    def pieces_of(self, template: str) -> tuple[int, int, int]:
        """The same of a template."""
        before, *others = _SLOT.split(template)
        if not others:
            return _CHAT + self._tokens(before) + _CHAT, 0, 0
        roles, texts = others[::2], others[1::2]
        return _CHAT + self._tokens(before), sum(map(self._tokens, texts)) + _CHAT, len(roles)

    def _tokens(self, text: str) -> int:
        question = self.recipe.lengths.question * text.count("{question}")
        return question + -(-len(text.replace("{question}", "")) // 4)

    def prompt(self, role: str) -> int:
        """Tokens of the longest prompt of a role, with m latents in every slot."""
        steps = self.team.num_latent_steps
        rounds = range(1, self.team.num_rounds + 1)
        pieces = (self.pieces(Turn(round, role, speaks=False)) for round in rounds)
        return max(before + after + slots * steps for before, after, slots in pieces)
