"""A recipe: everything a training run needs to be repeated, and the run itself, stage by stage.

    inner        each agent's inner link, on its own text (eq. 5)
    alignment    each edge's outer link, on text that its sender writes and its reader reads
    outer        all links together, from the loss of the answer through the whole recursion (eq. 6)

A recipe trains the agents of a system that there is, or new ones that it names, with a pattern and prompts. What is
trained on comes as functions (`Material`), since a recipe does not know the worlds and files it comes from.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import nn

from recursivemas.checkpoint import SystemSettings
from recursivemas.config import Config
from recursivemas.errors import ConfigError, InputError, OutputError, PatternError, unknown_name
from recursivemas.links import DEFAULT_DESIGN
from recursivemas.loading import options_by_role
from recursivemas.patterns import Edge, Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import AlignmentPairs, AlignmentSettings, alignment_pairs, train_alignment
from recursivemas.training.data import EncodedTurn, Question, RoleSample, check_disjoint, encode_turns, fit_questions
from recursivemas.training.datasets import Counts, DataSets, Limits, counts_as_plain
from recursivemas.training.inner import InnerSettings, train_inner
from recursivemas.training.loop import ALONE, Progress, RunDirectory, write_atomically
from recursivemas.training.methods import MethodSettings
from recursivemas.training.outer import OuterSettings, Warn, check_outer, check_questions, logged_warnings, train_outer
from recursivemas.training.processes import Processes
from recursivemas.training.trackers import check_trackers

STAGES: tuple[Literal["inner"], Literal["alignment"], Literal["outer"]] = ("inner", "alignment", "outer")


@runtime_checkable
class Score(Protocol):
    """Scores a system on questions, the higher the better."""

    def __call__(self, system: RecursiveSystem, asked: Sequence[Question], channel: str = "latent") -> float:
        """The mean over these questions, answered through a channel."""


@dataclass(frozen=True)
class Material:
    """What a system is trained on, and what chooses its checkpoint."""

    turns: Callable[[str, int], list[RoleSample]]
    """Given a role and a number: that many of its turns, for training."""
    questions: Callable[[str, int], list[Question]]
    """Given a split (train, validation) and a number: that many of its questions, with what is to be answered."""
    score: Score | None = None
    """Chooses the checkpoint; without it the last weights are kept."""
    test: Sequence[Question] = ()
    """Questions that must be in none of these."""
    limits: Limits | None = None
    """What is done with texts that are too long for a context; by default nothing is looked for."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """What became of the samples, by role or split."""
    sets: Callable[[], list[dict[str, Any]]] | None = None
    """Tells which data sets were read."""
    fitted: dict[tuple[str, int], list[Question]] = field(default_factory=dict)
    """Questions of a split, and so many, whose lengths were looked at."""


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


class AgentOptions(Config):
    """How the model of a role is held, where that is not as for all."""

    device: str | None = None
    """Agents may be on several devices of one process: messages, and what flows back, are moved from one to another."""
    device_map: str | None = None
    """In place of `device`: auto, or another way of transformers to spread one model over several."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Weights in fewer bits, by bitsandbytes (pip install 'recursivemas[quant]'); links stay in float32."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None


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
    agent_options: dict[str, AgentOptions] = Field(default_factory=dict)
    """How models are held, by role, or `*` for all: on which device, in how many bits."""
    world: WorldSettings | None = None
    """Where the text comes from, for agents that live in a world."""
    data: DataSets | None = None
    """Or from data sets, of files or of the hub (see datasets.py). With a world: the outer loop's questions alone."""
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
    method: MethodSettings = MethodSettings()
    """How the baselines are trained, where one of them is asked for (`recursivemas train --method`)."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of weights on disk."""
    trackers: tuple[str, ...] | None = None
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, or another that accelerate knows. By default
    TensorBoard, if it is installed."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if (self.system is None) == (not self.agents):
            raise ConfigError("a recipe names the system whose agents it trains (system), or new agents (agents): one")
        if self.system is None and self.links.start == "given":
            raise ConfigError("new agents have no links to start from; leave out links.start, or name a system")
        if self.world is None and self.data is None:
            raise ConfigError("a recipe says where its text comes from: world, or data (files, or sets of the hub)")
        check_trackers(self.trackers or ())
        return self

    @property
    def new_pattern(self) -> Pattern:
        """The pattern of a new system. Raises `PatternError` if its roles are not those of the agents."""
        pattern = Pattern.load(self.pattern)
        if self.data is not None:
            self.data.check_roles(pattern.roles)
        for role in self.agents:
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
    options = {role: each.model_dump(exclude_none=True) for role, each in recipe.agent_options.items()}
    if recipe.system is not None:
        return RecursiveSystem.from_pretrained(recipe.system, device=device, dtype=recipe.dtype, options=options)
    chosen = options_by_role(options, recipe.agents)
    return RecursiveSystem.build(
        agents={role: {"model": name, **chosen[role]} for role, name in recipe.agents.items()},
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
    warn: Warn | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Train the links of a system in place, stage by stage; return what each stage reports.

    Of several `processes` the first trains the stages before the outer loop, which are cheap, and hands their links to
    the others; the outer loop is shared. A stage that is left out keeps its links as they are, unless the run has them
    trained already. The agents' weights are compared, bit by bit, before and after. Raises `AssertionError` if one of
    them changed: that would be a fault of this package.
    """
    check_recipe(system, recipe, material, stages)
    fingerprints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    pairs: dict[str, AlignmentPairs] = {}
    """Known to the first process alone, which takes the loss of the anchor."""

    def start() -> tuple[dict[str, Any], bool]:
        _check_order(system, stages, run)
        _check_same_data(material, run)
        learns = "outer" in stages or _is_begun(run, "outer")
        is_anchored = learns and recipe.outer.anchor > 0
        found = _train_early(system, recipe, material, stages, run, progress, pairs=pairs, is_anchored=is_anchored)
        _check_same_data(material, run)  # those sets, too, that have been read since
        return found, learns

    reports, learns = processes.from_first(start)
    processes.hand_out([tensor for link in system.all_links.values() for tensor in link.state_dict().values()])
    if learns:
        reports["outer"] = _train_outer(system, recipe, material, pairs, run, progress, warn, processes)
    for role, agent in system.agents.items():
        assert agent.model.fingerprint() == fingerprints[role], f"the frozen model of the {role} changed in training"
    if material.sets is not None:
        reports["data"] = {"sets": material.sets(), "samples": counts_as_plain(material.counts)}
        _log_counts(material, run)
    return reports


def _train_early(
    system: RecursiveSystem,
    recipe: Recipe,
    material: Material,
    stages: Sequence[str],
    run: RunDirectory | None,
    progress: Progress | None,
    *,
    pairs: dict[str, AlignmentPairs],
    is_anchored: bool,
) -> dict[str, Any]:
    """Train the stages before the outer loop; fill `pairs` for its anchor, and return what each stage reports."""
    reports: dict[str, Any] = {}
    warms_up = "inner" in stages or _is_begun(run, "inner")
    aligns = "alignment" in stages or _is_begun(run, "alignment")
    turns = _turns(system, recipe, material) if warms_up or aligns or is_anchored else {}
    if warms_up:
        for role, agent in system.agents.items():
            chosen = turns[role][: recipe.inner.num_samples]
            reports[f"inner {role}"] = train_inner(
                agent, chosen, recipe.inner, seed=recipe.seed, run=run, progress=progress
            )
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
    return reports


def check_recipe(system: RecursiveSystem, recipe: Recipe, material: Material, stages: Sequence[str]) -> None:
    """Find mistakes of the later stages before the first is trained. Raises `ConfigError` or `InputError`."""
    if "outer" not in stages:
        return
    check_outer(system, recipe.outer)
    splits = {
        "train": outer_questions(system, recipe, material, "train"),
        "validation": outer_questions(system, recipe, material, "validation"),
        "test": material.test,
    }
    check_disjoint(splits)
    check_questions(system, splits["train"], recipe.outer)
    if recipe.outer.distillation:
        for question in splits["train"]:
            if not question.posterior:
                raise ConfigError(f"distillation needs a posterior for every question; {question.id} has none")


def outer_questions(system: RecursiveSystem, recipe: Recipe, material: Material, split: str) -> list[Question]:
    """The outer loop's questions of a split. Raises `InputError` if some are too long, and are not to be."""
    settings = recipe.outer
    number = settings.num_samples if split == "train" else settings.num_validation
    if material.limits is None:
        return material.questions(split, number)
    if (split, number) not in material.fitted:
        num_rounds = settings.num_rounds or system.settings.num_rounds
        questions = material.questions(split, number)
        counts = replace(material.counts.get(split, Counts()), used=0)
        material.fitted[split, number] = fit_questions(
            questions,
            {role: agent.model for role, agent in system.agents.items()},
            system.pattern,
            system.prompts,
            num_rounds=num_rounds,
            num_latent_steps=system.settings.num_latent_steps,
            answer_rounds=tuple(settings.weights_of(num_rounds)),
            variant=system.settings.variant,
            limits=material.limits,
            counts=counts,
        )
        material.counts[split] = counts
        if not material.fitted[split, number]:
            raise InputError(f"none of the {len(questions)} {split} questions is left: {counts}")
    return material.fitted[split, number]


def _check_same_data(material: Material, run: RunDirectory | None) -> None:
    """Refuse data sets that have changed since the run began, and remember those that are new to it.

    Raises `ConfigError`, or `OutputError` if it cannot be remembered.
    """
    if run is None or material.sets is None:
        return
    file = run.path / "data.json"
    try:
        known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for each in material.sets():
            name = " ".join(str(each[key]) for key in ("path", "name", "split", "revision") if key in each)
            if known.setdefault(name, each["fingerprint"]) != each["fingerprint"]:
                raise ConfigError(
                    f"{each['path']} has changed since the run in {run.path} began; put it back to resume that run, or "
                    "give another output directory (--set output=...)"
                )
        write_atomically(file, json.dumps(known, indent=2).encode())
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot use {file}: {error}; without it a changed data set would not be seen") from None


def _log_counts(material: Material, run: RunDirectory | None) -> None:
    """Say in the run's log what became of the samples: once, however often the run is resumed."""
    if run is not None:
        run.forget("data", after=-1)
        plain = counts_as_plain(material.counts)
        figures = {f"{name}/{what}": float(number) for name, each in plain.items() for what, number in each.items()}
        run.log({"stage": "data", "step": 0, **figures})


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
        samples = [each for each in material.turns(role, number) if not speaks(each, system.pattern)]
        counts = replace(material.counts.get(role, Counts()), used=0)
        turns[role] = encode_turns(samples, agent.model, system.prompts, limits=material.limits, counts=counts)
        if material.limits is not None:
            material.counts[role] = counts
        if not turns[role]:
            left_out = f": {counts}" if samples else ""
            raise InputError(f"there is no turn of the {role} to train on in which it thinks{left_out}")
    return turns


def _train_outer(
    system: RecursiveSystem,
    recipe: Recipe,
    material: Material,
    pairs: dict[str, AlignmentPairs],
    run: RunDirectory | None,
    progress: Progress | None,
    warn: Warn | None,
    processes: Processes,
) -> dict[str, Any]:
    settings = recipe.outer
    questions = outer_questions(system, recipe, material, "train")
    held_out = outer_questions(system, recipe, material, "validation")
    before = {name: nn.utils.parameters_to_vector(link.parameters()).clone() for name, link in system.all_links.items()}
    own, score = processes.share(held_out), material.score

    def validate(trained: RecursiveSystem) -> float:
        total = processes.total(score(trained, own) * len(own) if score is not None and own else 0.0)
        # Shares add up to the whole but for the last bits, by which no weights should be better than others.
        return round(total / len(held_out), 12)

    fitted = train_outer(
        system,
        questions,
        settings,
        anchors=pairs if settings.anchor else {},
        validate=None if score is None else validate,
        seed=recipe.seed,
        run=run,
        progress=progress,
        warn=warn,
        processes=processes,
    )
    moved = {
        name: ((nn.utils.parameters_to_vector(link.parameters()) - before[name]).norm() / before[name].norm()).item()
        for name, link in system.all_links.items()
    }
    return {
        "questions": len(questions),
        "num_validation": len(held_out),
        "steps": len(fitted.losses),
        "best_step": fitted.best_step,
        "validation": {str(step): value for step, value in fitted.scores.items()},
        "stopped": fitted.stopped,
        "moved": moved,
        "unmoved_tensors": [name for name, distance in fitted.movement.items() if distance == 0],
        "warnings": [] if run is None else logged_warnings(run),
    }


def speaks(sample: RoleSample, pattern: Pattern) -> bool:
    """Whether a turn is one in which the answering role speaks; in all others a role thinks."""
    return sample.role == pattern.answers and (sample.solo or sample.round == sample.num_rounds)


def _is_begun(run: RunDirectory | None, stage: str) -> bool:
    return run is not None and run.has(stage)
