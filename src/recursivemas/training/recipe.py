"""A recipe: everything a training run needs to be repeated, and the run itself, stage by stage.

    inner        each agent's inner link, on its own text (eq. 5)
    alignment    each edge's outer link, on text that its sender writes and its reader reads

The turns to train on come as a function, since a recipe does not know the worlds they come from.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from recursivemas.config import Config
from recursivemas.errors import ConfigError, InputError, unknown_name
from recursivemas.links import DEFAULT_DESIGN
from recursivemas.patterns import Edge, Pattern
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import AlignmentSettings, alignment_pairs, train_alignment
from recursivemas.training.data import EncodedTurn, RoleSample, encode_turns
from recursivemas.training.inner import InnerSettings, train_inner
from recursivemas.training.loop import Progress, RunDirectory

STAGES = ("inner", "alignment")

SamplesOf = Callable[[str, int], list[RoleSample]]
"""Given a role and a number: that many of its turns, for training."""


class WorldSettings(Config):
    """Which world the turns come from."""

    name: str
    seed: int = 0


class LinkSettings(Config):
    """The form of the links that are trained."""

    design: str = DEFAULT_DESIGN
    bias: bool | None = None


class Recipe(Config):
    """The content of a recipe file (YAML)."""

    system: str
    """Whose agents, pattern and prompts are taken: a bundled system, or a directory. Its links are drawn anew."""
    world: WorldSettings
    output: str
    """Directory of the run: metrics, state, and in the end the system."""
    seed: int = 0
    """Draws the links and the batches."""
    num_rounds: int | None = Field(default=None, ge=1)
    """Settings of the trained system, this one and the next three; by default those of `system`."""
    num_latent_steps: int | None = Field(default=None, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    message: Literal["inner+outer", "outer"] | None = None
    links: LinkSettings = LinkSettings()
    inner: InnerSettings = InnerSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of weights on disk."""


def parse_stages(text: str) -> tuple[str, ...]:
    """Stages from `all`, or names separated by commas; in the order in which they are trained."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*STAGES, "all"):
            raise ConfigError(unknown_name("stage", name, [*STAGES, "all"]))
    if not names:
        raise ConfigError(f"no stage was named; choose among {', '.join(STAGES)}, or all")
    return STAGES if "all" in names else tuple(stage for stage in STAGES if stage in names)


def fresh_links(system: RecursiveSystem, recipe: Recipe) -> RecursiveSystem:
    """The same agents, pattern and prompts, with links drawn anew from the recipe's seed, and its settings."""
    models = {role: agent.model for role, agent in system.agents.items()}
    form = recipe.links
    names = ("num_rounds", "num_latent_steps", "max_new_tokens", "message")
    changed = {name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None}
    return RecursiveSystem.build(
        agents=models,
        pattern=system.pattern,
        prompts=system.prompts,
        design=form.design,
        link_options={"bias": form.bias},
        seed=recipe.seed,
        **{**system.settings.model_dump(), **changed},
    )


def train(
    system: RecursiveSystem,
    recipe: Recipe,
    samples_of: SamplesOf,
    *,
    stages: Sequence[str] = STAGES,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the links of a system in place, stage by stage; return what each stage reports.

    A stage that is left out keeps its links as they are, unless the run has them trained already. The agents' weights
    are compared, bit by bit, before and after. Raises `AssertionError` if one of them changed: that would be a fault of
    this package.
    """
    if run is not None and "inner" in stages and run.has("alignment") and not _is_done(run, system):
        raise ConfigError(
            f"{run.path} holds outer links that were aligned to other inner links than would be trained now; train "
            "both stages in a new directory (--set output=...)"
        )
    fingerprints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    reports: dict[str, Any] = {}
    number = max(recipe.inner.num_samples, recipe.alignment.num_samples)
    turns: dict[str, list[EncodedTurn]] = {}
    for role, agent in system.agents.items():
        # Where the answering role speaks, it does not think: those turns are left out.
        samples = [each for each in samples_of(role, number) if not _speaks(each, system.pattern)]
        if not samples:
            raise InputError(f"there is no turn of the {role} to train on in which it thinks")
        turns[role] = encode_turns(samples, agent.model, system.prompts)
    if "inner" in stages or _is_begun(run, "inner"):
        for role, agent in system.agents.items():
            chosen = turns[role][: recipe.inner.num_samples]
            reports[f"inner {role}"] = train_inner(
                agent, chosen, recipe.inner, seed=recipe.seed, run=run, progress=progress
            )
    if "alignment" in stages or _is_begun(run, "alignment"):
        for name, link in system.links.items():
            edge = Edge.parse(name)
            sender, reader = system.agents[edge.source], system.agents[edge.target].model
            features, targets = alignment_pairs(
                sender,
                reader,
                turns[edge.source][: recipe.alignment.num_samples],
                through_inner_link=system.settings.message == "inner+outer",
            )
            reports[f"alignment {name}"] = train_alignment(
                name, link, features, targets, recipe.alignment, seed=recipe.seed, run=run, progress=progress
            )
    for role, agent in system.agents.items():
        assert agent.model.fingerprint() == fingerprints[role], f"the frozen model of the {role} changed in training"
    return reports


def _speaks(sample: RoleSample, pattern: Pattern) -> bool:
    return sample.role == pattern.answers and (sample.solo or sample.round == sample.num_rounds)


def _is_done(run: RunDirectory, system: RecursiveSystem) -> bool:
    return all(run.load(f"inner-{role}") is not None for role in system.agents)


def _is_begun(run: RunDirectory | None, stage: str) -> bool:
    return run is not None and run.has(stage)
