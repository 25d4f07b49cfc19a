"""A recipe: everything a training run needs to be repeated, and the run itself, stage by stage.

    inner        each agent's inner link, on its own text (eq. 5)
    alignment    each edge's outer link, on text that its sender writes and its reader reads
    outer        all links together, from the loss of the answer through the whole recursion (eq. 6)

A recipe trains the agents of a system that there is, or new ones that it names, with a pattern and prompts. What is
trained on comes as functions (`Material`), since a recipe does not know the worlds and files it comes from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from recursivemas.checkpoint import SystemSettings
from recursivemas.config import Config
from recursivemas.errors import ConfigError, InputError, PatternError, unknown_name
from recursivemas.links import DEFAULT_DESIGN
from recursivemas.patterns import Edge, Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import AlignmentPairs, AlignmentSettings, alignment_pairs, train_alignment
from recursivemas.training.data import EncodedTurn, Question, RoleSample, check_disjoint, encode_turns
from recursivemas.training.inner import InnerSettings, train_inner
from recursivemas.training.loop import Progress, RunDirectory
from recursivemas.training.outer import OuterSettings, check_outer, train_outer

STAGES: tuple[Literal["inner"], Literal["alignment"], Literal["outer"]] = ("inner", "alignment", "outer")


@dataclass(frozen=True)
class Material:
    """What a system is trained on, and what chooses its checkpoint."""

    turns: Callable[[str, int], list[RoleSample]]
    """Given a role and a number: that many of its turns, for training."""
    questions: Callable[[str, int], list[Question]]
    """Given a split (train, validation) and a number: that many of its questions, with what is to be answered."""
    score: Callable[[RecursiveSystem, Sequence[Question]], float] | None = None
    """Scores a system on questions, the higher the better; without it the last weights are kept."""
    test: Sequence[Question] = ()
    """Questions that must be in none of these."""


class WorldSettings(Config):
    """Which world the turns come from."""

    name: str
    seed: int = 0


class LinkSettings(Config):
    """The links that are trained."""

    start: Literal["new", "given"] = "new"
    """Drawn anew in the form below, or those that the system has."""
    design: str = DEFAULT_DESIGN
    bias: bool | None = None


class QuestionFiles(Config):
    """JSON Lines files of the user's own with the columns `question` and `answer`; of no other use is `test`.

    Without a world, `train` also has a column for each role, by its name, with what the role should write: the stages
    before the outer loop are trained on it. For the answering role that is `answer`, unless it has a column.
    """

    train: Path
    validation: Path
    test: Path | None = None
    """Given only to make sure that none of its questions is in the other two."""


class DataSets(Config):
    """Data sets of the Hugging Face hub, by stage."""

    inner: str | dict[str, str]
    """One for all roles, or one for each."""
    outer: str


class Lengths(Config):
    """Tokens that texts are taken to have where there is nothing to count yet (`recursivemas train --dry-run`)."""

    question: int = Field(default=128, ge=1)
    reply: int = Field(default=512, ge=1)


class Recipe(Config):
    """The content of a recipe file (YAML)."""

    system: str | None = None
    """Whose agents, pattern and prompts are taken: a bundled system, or a directory."""
    agents: dict[str, str] = Field(default_factory=dict)
    """Or else the models of a new system, by role: Hugging Face names, or directories."""
    pattern: str = "sequential"
    """Of a new system: a bundled pattern, or a YAML file."""
    prompts: str | None = None
    """Of a new system: a bundled prompt set, or a YAML file; by default the bundled one of the pattern's name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the agents. Links and their optimizer are in float32 in any case."""
    world: WorldSettings | None = None
    """Where the text comes from, for agents that live in a world."""
    questions: QuestionFiles | None = None
    """The outer loop's questions from files; by default they come from the world. Without a world, all text."""
    data: DataSets | None = None
    """Or else data sets. So far they can only be planned with (`--dry-run`), not read."""
    lengths: Lengths = Lengths()
    stages: tuple[Literal["inner", "alignment", "outer"], ...] = Field(default=STAGES, min_length=1)
    """What is trained unless the command says otherwise."""
    output: str
    """Directory of the run: metrics, state, and in the end the system."""
    seed: int = 0
    """Draws the links and the batches."""
    num_rounds: int | None = Field(default=None, ge=1)
    """Settings of the trained system, this one and the next four; by default those of `system`."""
    num_latent_steps: int | None = Field(default=None, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    message: Literal["inner+outer", "outer"] | None = None
    variant: str | None = None
    """The wording of the prompts in which links are trained, and the kind of text they are aligned on."""
    links: LinkSettings = LinkSettings()
    inner: InnerSettings = InnerSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    outer: OuterSettings = OuterSettings()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of weights on disk."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if (self.system is None) == (not self.agents):
            raise ConfigError("a recipe names the system whose agents it trains (system), or new agents (agents): one")
        if self.system is None and self.links.start == "given":
            raise ConfigError("new agents have no links to start from; leave out links.start, or name a system")
        if self.world is None and self.questions is None and self.data is None:
            raise ConfigError("a recipe says where its text comes from: world, questions (files), or data (data sets)")
        return self

    @property
    def new_pattern(self) -> Pattern:
        """The pattern of a new system. Raises `PatternError` if its roles are not those of the agents."""
        pattern = Pattern.load(self.pattern)
        by_role = self.data.inner if self.data is not None and isinstance(self.data.inner, dict) else {}
        for role in (*self.agents, *by_role):
            if role not in pattern.roles:
                raise PatternError(f"pattern '{pattern.name}': " + unknown_name("role", role, pattern.roles))
        for role in pattern.roles:
            if role not in self.agents:
                raise PatternError(f"the pattern '{pattern.name}' needs an agent for the role '{role}'")
        return pattern

    @property
    def new_prompts(self) -> PromptSet:
        """The prompts of a new system."""
        return PromptSet.load(self.prompts or self.new_pattern.name)


def parse_stages(text: str) -> tuple[str, ...]:
    """Stages from `all`, or names separated by commas; in the order in which they are trained."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*STAGES, "all"):
            raise ConfigError(unknown_name("stage", name, [*STAGES, "all"]))
    if not names:
        raise ConfigError(f"no stage was named; choose among {', '.join(STAGES)}, or all")
    return STAGES if "all" in names else tuple(stage for stage in STAGES if stage in names)


def settings_of(recipe: Recipe, base: SystemSettings | None = None) -> SystemSettings:
    """How the trained system runs: as the recipe says, else as the system it starts from, else by default."""
    names = ("num_rounds", "num_latent_steps", "max_new_tokens", "message", "variant")
    changed = {name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None}
    return (base or SystemSettings(name=recipe.new_pattern.name)).model_copy(update=changed)


def base_system(recipe: Recipe, *, device: str | None = None) -> RecursiveSystem:
    """The system whose agents a recipe trains: the one it names, or a new one of the agents it names."""
    if recipe.system is not None:
        return RecursiveSystem.from_pretrained(recipe.system, device=device, dtype=recipe.dtype)
    return RecursiveSystem.build(
        agents=recipe.agents,
        pattern=recipe.new_pattern,
        prompts=recipe.new_prompts,
        device=device,
        dtype=recipe.dtype,
        **settings_of(recipe).model_dump(),
    )


def starting_system(system: RecursiveSystem, recipe: Recipe) -> RecursiveSystem:
    """The same agents, pattern and prompts with the recipe's settings and links: drawn from its seed, or as given."""
    settings = settings_of(recipe, system.settings)
    if recipe.links.start == "given":
        return RecursiveSystem(
            system.agents, system.links, system.pattern, system.prompts, settings, training=system.training
        )
    return RecursiveSystem.build(
        agents={role: agent.model for role, agent in system.agents.items()},
        pattern=system.pattern,
        prompts=system.prompts,
        design=recipe.links.design,
        link_options={"bias": recipe.links.bias},
        seed=recipe.seed,
        **settings.model_dump(),
    )


def train(
    system: RecursiveSystem,
    recipe: Recipe,
    material: Material,
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
    check_recipe(system, recipe, material, stages)
    _check_order(system, stages, run)
    fingerprints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    reports: dict[str, Any] = {}
    warms_up = "inner" in stages or _is_begun(run, "inner")
    aligns = "alignment" in stages or _is_begun(run, "alignment")
    learns = "outer" in stages or _is_begun(run, "outer")
    is_anchored = learns and recipe.outer.anchor > 0
    turns = _turns(system, recipe, material) if warms_up or aligns or is_anchored else {}
    if warms_up:
        for role, agent in system.agents.items():
            chosen = turns[role][: recipe.inner.num_samples]
            reports[f"inner {role}"] = train_inner(
                agent, chosen, recipe.inner, seed=recipe.seed, run=run, progress=progress
            )
    pairs: dict[str, AlignmentPairs] = {}
    for name in system.links if aligns or is_anchored else ():
        edge = Edge.parse(name)
        pairs[name] = alignment_pairs(
            system.agents[edge.source].model,
            system.agents[edge.target].model,
            turns[edge.source][: recipe.alignment.num_samples],
            num_tokens=recipe.alignment.num_tokens,
        )
    if aligns:
        for name, link in system.links.items():
            inner = system.agents[Edge.parse(name).source].inner_link
            with torch.no_grad():
                states = pairs[name].states
                features = inner(states) if system.settings.message == "inner+outer" else states
            reports[f"alignment {name}"] = train_alignment(
                name,
                link,
                features,
                pairs[name].targets,
                recipe.alignment,
                seed=recipe.seed,
                run=run,
                progress=progress,
            )
    if learns:
        reports["outer"] = _train_outer(system, recipe, material, pairs, run, progress)
    for role, agent in system.agents.items():
        assert agent.model.fingerprint() == fingerprints[role], f"the frozen model of the {role} changed in training"
    return reports


def check_recipe(system: RecursiveSystem, recipe: Recipe, material: Material, stages: Sequence[str]) -> None:
    """Find mistakes of the later stages before the first is trained. Raises `ConfigError` or `InputError`."""
    if "outer" not in stages:
        return
    check_outer(system, recipe.outer)
    splits = {
        "train": material.questions("train", recipe.outer.num_samples),
        "validation": material.questions("validation", recipe.outer.num_validation),
        "test": material.test,
    }
    check_disjoint(splits)
    if recipe.outer.distillation:
        for question in splits["train"]:
            if not question.posterior:
                raise ConfigError(f"distillation needs a posterior for every question; {question.id} has none")


def _check_order(system: RecursiveSystem, stages: Sequence[str], run: RunDirectory | None) -> None:
    """A stage must not be trained after those that were built on it."""
    if run is None:
        return
    is_done = {
        "inner": all(run.load(f"inner-{role}") is not None for role in system.agents),
        "alignment": all(run.load(f"alignment-{edge}") is not None for edge in system.links),
    }
    for earlier, later in (("inner", "alignment"), ("inner", "outer"), ("alignment", "outer")):
        if earlier in stages and run.has(later) and not is_done[earlier]:
            raise ConfigError(
                f"{run.path} holds links of the stage {later} that were trained on others than the stage {earlier} "
                "would make now; train in a new directory (--set output=...)"
            )


def _turns(system: RecursiveSystem, recipe: Recipe, material: Material) -> dict[str, list[EncodedTurn]]:
    """Turns of every role in which it thinks: where the answering role speaks, it does not, and they are left out."""
    number = max(recipe.inner.num_samples, recipe.alignment.num_samples)
    turns: dict[str, list[EncodedTurn]] = {}
    for role, agent in system.agents.items():
        samples = [each for each in material.turns(role, number) if not _speaks(each, system.pattern)]
        if not samples:
            raise InputError(f"there is no turn of the {role} to train on in which it thinks")
        turns[role] = encode_turns(samples, agent.model, system.prompts)
    return turns


def _train_outer(
    system: RecursiveSystem,
    recipe: Recipe,
    material: Material,
    pairs: dict[str, AlignmentPairs],
    run: RunDirectory | None,
    progress: Progress | None,
) -> dict[str, Any]:
    settings = recipe.outer
    questions = material.questions("train", settings.num_samples)
    held_out = material.questions("validation", settings.num_validation)
    before = {name: nn.utils.parameters_to_vector(link.parameters()).clone() for name, link in system.all_links.items()}
    score = material.score
    fitted = train_outer(
        system,
        questions,
        settings,
        anchors=pairs if settings.anchor else {},
        validate=None if score is None else lambda trained: score(trained, held_out),
        seed=recipe.seed,
        run=run,
        progress=progress,
    )
    moved = {
        name: ((nn.utils.parameters_to_vector(link.parameters()) - before[name]).norm() / before[name].norm()).item()
        for name, link in system.all_links.items()
    }
    return {
        "questions": len(questions),
        "steps": len(fitted.losses),
        "best_step": fitted.best_step,
        "validation": {str(step): value for step, value in fitted.scores.items()},
        "stopped": fitted.stopped,
        "moved": moved,
        "unmoved_tensors": [name for name, distance in fitted.movement.items() if distance == 0],
    }


def _speaks(sample: RoleSample, pattern: Pattern) -> bool:
    return sample.role == pattern.answers and (sample.solo or sample.round == sample.num_rounds)


def _is_begun(run: RunDirectory | None, stage: str) -> bool:
    return run is not None and run.has(stage)
