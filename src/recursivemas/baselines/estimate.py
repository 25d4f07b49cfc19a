"""What a method would take, before anything is loaded: trained parameters, memory, and the arithmetic of a step.

By the formulas of `training/estimate.py`, and of these:

    full          16 bytes a parameter, in float32: weight, gradient, two moments of AdamW
    lora          the weights in the agents' precision; 16 bytes for each parameter of an adapter
    text          as full (or as lora, for each agent), one agent after the other: those that wait, and those that are
                  done, take their weights alone
    generalist    as full; where it is not named it is taken to be the largest agent, widened
    arithmetic    2 for each position and weight read with, 2 more where a gradient passes, 2 more for a trained weight

A step of links is one of their outer loop; one of `text` trains every agent once. Knows recipes and configurations;
knows nothing of tensors that hold anything.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from recursivemas.errors import ConfigError, unknown_name
from recursivemas.loading import ModelSizes
from recursivemas.patterns import Turn
from recursivemas.training.estimate import BYTES, SHIPPED, Calculation, Team, estimate, team_of
from recursivemas.training.methods import METHODS, FineTuning
from recursivemas.training.recipe import Recipe


@dataclass(frozen=True)
class MethodEstimate:
    """What training by one method takes."""

    method: str
    trained_parameters: int
    total_parameters: int
    """Of all that runs afterwards."""
    peak_memory_bytes: int
    """On one device that holds everything."""
    questions_per_step: int
    flops_per_step: float

    @property
    def trained_share(self) -> float:
        """Of all parameters."""
        return self.trained_parameters / self.total_parameters

    @property
    def flops_per_question(self) -> float:
        """Arithmetic of one question, or one turn."""
        return self.flops_per_step / self.questions_per_step

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, what is derived included."""
        derived = {"trained_share": self.trained_share, "flops_per_question": self.flops_per_question}
        return {**asdict(self), **derived}


def estimate_method(method: str, recipe: Recipe, *, team: Team | None = None) -> MethodEstimate:
    """What training by a method takes; the team of the recipe, if that is known already.

    Raises `ConfigError`, and what `training.estimate.estimate` raises.
    """
    if method not in METHODS:
        raise ConfigError(unknown_name("method", method, METHODS))
    ours = _Method(recipe, team or team_of(recipe))
    if method in ("links", "text"):
        return ours.links() if method == "links" else ours.text()
    if method == "generalist":
        return ours.one_model(method, ours.generalist(), recipe.method.generalist)
    settings = recipe.method.lora if method == "lora" else recipe.method.full
    return ours.one_model(method, ours.team.sizes[ours.team.pattern.answers], settings)


@dataclass(frozen=True)
class _Method:
    """The formulas at the top of this file."""

    recipe: Recipe
    team: Team

    @property
    def calculation(self) -> Calculation:
        return Calculation(self.recipe, self.team)

    def one_model(self, method: str, sizes: ModelSizes, settings: FineTuning) -> MethodEstimate:
        """A model that is trained and stands alone."""
        adapters = self._adapters(sizes) if method == "lora" else 0
        template = self.team.prompts.template(self.team.pattern.answers, solo=True)
        tokens = sum(self.calculation.pieces_of(template)[:2])
        held = self._weights(sizes, bool(adapters)) + _optimizer(sizes, adapters)
        return MethodEstimate(
            method=method,
            trained_parameters=adapters or sizes.num_parameters,
            total_parameters=sizes.num_parameters,
            peak_memory_bytes=held + self._activations(sizes, settings, tokens, bool(adapters)),
            questions_per_step=settings.batch_size,
            flops_per_step=settings.batch_size * _flops(sizes, tokens, self.recipe.lengths.reply, adapters),
        )

    def text(self) -> MethodEstimate:
        """All agents, one after the other."""
        settings = self.recipe.method.text
        peak, trained, flops = 0, 0, 0.0
        # Trained by itself, an agent no longer shares its weights with others.
        agents = [self.team.sizes[role] for role in self.team.pattern.roles]
        for role, sizes in zip(self.team.pattern.roles, agents, strict=True):
            adapters = self._adapters(sizes) if settings.adapters else 0
            tokens = self._prompt_in_text(role)
            trained += adapters or sizes.num_parameters
            kept = _optimizer(sizes, adapters) + self._activations(sizes, settings, tokens, settings.adapters)
            peak = max(peak, kept)
            flops += settings.batch_size * _flops(sizes, tokens, self.recipe.lengths.reply, adapters)
        return MethodEstimate(
            method="text",
            trained_parameters=trained,
            total_parameters=sum(sizes.num_parameters for sizes in agents),
            peak_memory_bytes=peak + sum(self._weights(each, settings.adapters) for each in agents),
            questions_per_step=settings.batch_size,
            flops_per_step=flops,
        )

    def links(self) -> MethodEstimate:
        """The links, by a step of the outer loop."""
        recipe = self.recipe
        found = estimate(recipe, stages=recipe.stages, team=self.team)
        trained = sum(each.parameters for each in found.links if each.is_trained or "inner" in recipe.stages)
        return MethodEstimate(
            method="links",
            trained_parameters=trained,
            total_parameters=sum(found.link_parameters.values()) + found.agent_parameters,
            peak_memory_bytes=found.memory.peak,
            questions_per_step=recipe.outer.batch_size,
            flops_per_step=recipe.outer.batch_size * self._outer_flops(),
        )

    def _outer_flops(self) -> float:
        """Arithmetic of one question: prompts are read once up to their first slot, all else in turn."""
        settings, steps = self.recipe.outer, self.team.num_latent_steps
        num_rounds = settings.num_rounds or self.team.num_rounds
        with_gradient = 6 if settings.recompute else 4
        total = 0.0
        read_once: dict[tuple[str, str], int] = {}
        for turn in self.team.pattern.schedule(num_rounds, answer_rounds=tuple(settings.weights_of(num_rounds))):
            sizes = self.team.sizes[turn.role]
            before, after, slots = self.calculation.pieces(turn)
            read_once[turn.role, self.calculation.template(turn)] = 2 * sizes.body_parameters * before
            read = after + slots * steps if slots else 0
            written = self.recipe.lengths.reply if turn.speaks else max(steps - 1, 0)
            flows = bool(slots) or settings.trained == "inner+outer"
            total += sizes.body_parameters * (with_gradient * read + (with_gradient if flows else 2) * written)
            if turn.speaks:
                total += with_gradient * _head(sizes) * written
        return total + sum(read_once.values())

    def generalist(self) -> ModelSizes:
        """The model that is named; else the largest agent, widened to the parameters of the whole system."""
        if self.recipe.method.generalist.model is not None:
            return ModelSizes.of(self.recipe.method.generalist.model, SHIPPED)
        found = estimate(self.recipe, stages=("inner",), team=self.team)
        whole = found.agent_parameters + sum(found.link_parameters.values())
        largest = max((each.sizes for each in found.roles), key=lambda sizes: sizes.num_parameters)
        wider = (whole / largest.num_parameters) ** 0.5
        names = ("hidden_size", "intermediate_size", "query_size", "key_size", "recurrent_width")
        widths: dict[str, Any] = {name: round(getattr(largest, name) * wider) for name in names}
        return replace(
            largest,
            num_parameters=whole,
            body_parameters=round(largest.body_parameters * whole / largest.num_parameters),
            **widths,
        )

    def _adapters(self, sizes: ModelSizes) -> int:
        """Of all linear layers; named ones (`target_modules`) would be fewer."""
        return self.recipe.method.lora.rank * sizes.linear_widths

    def _weights(self, sizes: ModelSizes, is_frozen: bool) -> int:
        return sizes.num_parameters * (BYTES[self.recipe.dtype] if is_frozen else 4)

    def _activations(self, sizes: ModelSizes, settings: FineTuning, tokens: int, is_frozen: bool) -> int:
        """What the backward pass needs of the turns that are read at once, and the logits of their replies."""
        recipe = self.recipe if is_frozen else self.recipe.model_copy(update={"dtype": "float32"})
        reply = recipe.lengths.reply
        read = Calculation(recipe, self.team).activations(sizes, tokens + reply, tokens + reply)
        logits = reply * sizes.vocab_size * (BYTES[recipe.dtype] + 8)
        return min(settings.micro_batch_size or settings.batch_size, settings.batch_size) * (read + logits)

    def _prompt_in_text(self, role: str) -> int:
        """The longest prompt of a role, with a reply in every slot."""
        rounds = range(1, self.team.num_rounds + 1)
        pieces = [self.calculation.pieces(Turn(round, role, speaks=False)) for round in rounds]
        return max(before + after + slots * self.recipe.lengths.reply for before, after, slots in pieces)


def _flops(sizes: ModelSizes, tokens: int, reply: int, adapters: int) -> float:
    """Arithmetic of one turn that is learnt: all of it is read with gradient, and its reply goes through the head."""
    if adapters:
        return float((tokens + reply) * (4 * sizes.body_parameters + 6 * adapters) + 4 * reply * _head(sizes))
    return 6.0 * ((tokens + reply) * sizes.body_parameters + reply * _head(sizes))


def _head(sizes: ModelSizes) -> int:
    return sizes.vocab_size * sizes.hidden_size


def _optimizer(sizes: ModelSizes, adapters: int) -> int:
    """Gradients and moments, and adapters themselves."""
    return 16 * adapters if adapters else 12 * sizes.num_parameters
