"""What a system of agents with links is compared with, each trained by the same recipe, data, prompts and meter.

    lora, full     the answering agent alone, asked with its `solo` prompt, trained on the questions and answers of the
                   outer loop: it can know what others know as far as these teach it
    text           every agent on the turns of its role that the first stages of links are trained on, the answering one
                   on its answers, too; in every wording that there is, of which validation chooses one
    generalist     one model in the place of all: in a world a new one, pretrained on the texts of all agents; then
                   trained on all that the others are trained on, and asked with the `solo` prompt

What comes out is a system like any other: of one agent, or of agents that hand each other text. Every method loads the
models that it trains, and no others, from where the recipe says; what stands there is never written to.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from recursivemas.agents import Agent
from recursivemas.baselines import generalist
from recursivemas.baselines.finetuning import finetune, mean_loss
from recursivemas.baselines.lora import Adapters, check_installed
from recursivemas.checkpoint import SystemSettings, find_system, load_agent_model, read_manifest
from recursivemas.errors import ConfigError, InputError, unknown_name
from recursivemas.loading import options_by_role
from recursivemas.models import LanguageModel, load_models
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.training.cost import CostMeter
from recursivemas.training.data import EncodedTurn, Question, RoleSample, check_disjoint, encode_turns
from recursivemas.training.loop import Fitted, Progress, RunDirectory
from recursivemas.training.methods import METHODS, FineTuning, LoraSettings
from recursivemas.training.recipe import Material, Recipe, base_system, settings_of
from recursivemas.worlds import load_world
from recursivemas.worlds.material import check_material, material_of


@dataclass(frozen=True)
class Origin:
    """What a recipe starts from, without the weights of its agents."""

    pattern: Pattern
    prompts: PromptSet
    settings: SystemSettings
    training: dict[str, Any]
    """How the system it names was made."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Origin":
        """Raises `CheckpointError`, `ConfigError` or `PatternError`."""
        if recipe.system is None:
            return cls(recipe.new_pattern, recipe.new_prompts, settings_of(recipe), {})
        manifest = read_manifest(find_system(recipe.system))
        settings = settings_of(recipe, manifest.settings)
        return cls(manifest.pattern, manifest.prompts, settings, dict(manifest.training))


@dataclass(frozen=True)
class Trained:
    """What a method has made."""

    system: RecursiveSystem
    report: dict[str, Any]
    trained_parameters: dict[str, int]
    """By role."""
    total_parameters: int


def check_method(method: str, recipe: Recipe) -> None:
    """Find mistakes before anything is loaded or written. Raises what `train_baseline` raises of them."""
    if method not in METHODS or method == "links":
        raise ConfigError(unknown_name("baseline", method, [each for each in METHODS if each != "links"]))
    check_material(recipe)
    if method == "lora" or (method == "text" and recipe.method.text.adapters):
        check_installed()
    if method == "generalist" and recipe.world is None and recipe.method.generalist.model is None:
        raise ConfigError(
            "the generalist is one model with about the parameters of the whole system, and only a world can make a "
            "new one; name it: --set method.generalist.model=ORGANISATION/NAME (--dry-run says how many parameters)"
        )
    origin = Origin.of(recipe)
    if method != "text":
        origin.prompts.alone(origin.pattern.answers)


def train_baseline(
    method: str,
    recipe: Recipe,
    *,
    run: RunDirectory | None = None,
    meter: CostMeter | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train by one of the methods above, and put the system together.

    Raises `ConfigError` (also where peft is missing), `InputError` for data that lacks what the method is trained on,
    `CheckpointError` and `ModelError` for models that cannot be loaded, and `NumericsError` as `fit` does.
    """
    check_method(method, recipe)
    training = _Training(recipe, Origin.of(recipe), run, meter or CostMeter(method), device)
    with training.meter.running():
        training.progress = training.meter.watch(progress)
        made = {"text": training.text, "generalist": training.generalist}.get(method, lambda: training.alone(method))()
    training.meter.settle(made.trained_parameters, made.total_parameters)
    made.system.training["base"] = training.origin.training
    return made


class _Training:
    """One method at work."""

    def __init__(
        self, recipe: Recipe, origin: Origin, run: RunDirectory | None, meter: CostMeter, device: str | None
    ) -> None:
        self.recipe = recipe
        self.origin = origin
        self.run = run
        self.meter = meter
        self.device = device
        self.progress: Progress | None = None
        self.material = material_of(recipe, origin.pattern)
        self.role = origin.pattern.answers
        self.held_out = self.material.questions("validation", recipe.outer.num_validation)
        self.questions = self.material.questions("train", recipe.outer.num_samples)
        check_disjoint({"train": self.questions, "validation": self.held_out, "test": self.material.test})

    # One agent

    def alone(self, method: str) -> Trained:
        """The answering agent, by adapters or in all its weights."""
        settings = self.recipe.method.lora if method == "lora" else self.recipe.method.full
        return self._one_model(method, self._answering_model(), settings, self._asked_alone())

    def generalist(self) -> Trained:
        """One model in the place of all."""
        settings = self.recipe.method.generalist
        samples = [turn for role in self.origin.pattern.roles for turn in self._turns(role)]
        return self._one_model("generalist", self._generalist(), settings, [*samples, *self._asked_alone()])

    def _generalist(self) -> LanguageModel:
        settings = self.recipe.method.generalist
        if settings.model is not None:
            return load_models({self.role: settings.model}, dtype=self.recipe.dtype, device=self.device)[self.role]
        assert self.recipe.world is not None
        world = load_world(self.recipe.world.name, self.recipe.world.seed)
        system = base_system(self.recipe, device=self.device)
        model = generalist.new_model(world, self.role, _num_parameters(system), device=self.device)
        self.meter.count(model)
        how = settings.pretraining or generalist.default_pretraining(world)
        generalist.pretrain(model, world, how, run=self.run, progress=self.progress)
        return LanguageModel(model.network, model.tokenizer)

    def _answering_model(self) -> LanguageModel:
        given = {role: each.model_dump(exclude_none=True) for role, each in self.recipe.agent_options.items()}
        options = options_by_role(given, self.origin.pattern.roles)[self.role]
        if self.recipe.system is None:
            named = {self.role: {"model": self.recipe.agents[self.role], **options}}
            return load_models(named, dtype=self.recipe.dtype, device=self.device)[self.role]
        directory = find_system(self.recipe.system)
        record = read_manifest(directory).agents[self.role]
        options = {"dtype": self.recipe.dtype, "device": self.device, **options}
        return load_agent_model(directory, self.role, record, **options)

    def _asked_alone(self) -> list[RoleSample]:
        return [
            RoleSample(role=self.role, question=each.text, target=each.answer, solo=True) for each in self.questions
        ]

    def _one_model(
        self, method: str, model: LanguageModel, settings: FineTuning, samples: Sequence[RoleSample]
    ) -> Trained:
        """Train a model that stands alone in the end, and is judged so."""
        weights = _Weights(model, self.recipe.method.lora if method == "lora" else None, self.recipe.seed)
        system, score = self._alone(weights.model), self.material.score
        turns = self._encoded(samples, weights.model)
        self.meter.count(weights.model)
        fitted = finetune(
            method,
            weights.model,
            weights.parameters,
            turns,
            settings,
            score=None if score is None else lambda: score(system, self.held_out),
            seed=self.recipe.seed,
            run=self.run,
            progress=self.progress,
        )
        trained = self._alone(weights.finished())
        report = {"turns": len(turns), **_told(fitted)}
        return Trained(trained, report, {self.role: weights.number}, _models_of(trained))

    def _alone(self, model: LanguageModel) -> RecursiveSystem:
        """A system of one agent, in one round."""
        settings = self.origin.settings.model_dump() | {"num_rounds": 1, "channel": "none"}
        return RecursiveSystem.build(
            agents={self.role: model},
            pattern=self.origin.pattern.alone(),
            prompts=self.origin.prompts.alone(self.role),
            **settings,
        )

    # All agents

    def text(self) -> Trained:
        """Every agent on its own turns; then the wording of the prompts in which they do best together."""
        base = base_system(self.recipe, device=self.device)
        settings = self.recipe.method.text
        trained: dict[str, LanguageModel] = {}
        report: dict[str, Any] = {}
        number: dict[str, int] = {}
        of_role = {role: self._turns(role) for role in base.agents}
        for role, model in _own_models(base).items():
            weights = _Weights(model, self.recipe.method.lora if settings.adapters else None, self.recipe.seed)
            learnt, held_out = _held_out(of_role[role], settings.num_validation)
            turns = self._encoded(learnt, weights.model)
            judges = self._encoded(held_out, weights.model)
            self.meter.count(weights.model)
            fitted = finetune(
                f"text-{role}",
                weights.model,
                weights.parameters,
                turns,
                settings,
                score=_minus_loss(weights.model, judges) if judges else None,
                seed=self.recipe.seed,
                run=self.run,
                progress=self.progress,
            )
            report[role] = {"turns": len(turns), **_told(fitted)}
            number[role], trained[role] = weights.number, weights.finished()
        system, report["validation"] = self._best_wording(base, trained)
        return Trained(system, report, number, _models_of(system))

    def _best_wording(
        self, base: RecursiveSystem, models: dict[str, LanguageModel]
    ) -> tuple[RecursiveSystem, dict[str, float]]:
        """The trained agents with the wording that does best on validation, and what each of them does there."""
        found: dict[str, float] = {}
        systems: dict[str, RecursiveSystem] = {}
        for variant in self._wordings():
            settings = base.settings.model_copy(update={"channel": "text", "variant": variant})
            agents = {role: Agent(role, models[role], agent.inner_link) for role, agent in base.agents.items()}
            name = variant or "default"
            systems[name] = RecursiveSystem(agents, base.links, base.pattern, base.prompts, settings)
            if self.material.score is not None:
                found[name] = self.material.score(systems[name], self.held_out, "text")
        best = max(found, key=lambda name: found[name]) if found else next(iter(systems))
        return systems[best], found

    def _wordings(self) -> list[str | None]:
        """The wordings to train in: the recipe's, or all there are."""
        if self.recipe.variant is not None:
            return [self.recipe.variant]
        return list(self.origin.prompts.variants) or [None]

    def _turns(self, role: str) -> list[RoleSample]:
        """What a role read and should have written, in equal parts for every wording; answers included."""
        wordings = self._wordings() if self.recipe.world is not None else [self.recipe.variant]
        number = self.recipe.inner.num_samples // len(wordings)
        turns: list[RoleSample] = []
        try:
            for variant in wordings:
                turns += self._material(variant).turns(role, number)
        except InputError as error:
            raise InputError(f"this method is trained on what every role should write: {error}") from None
        if role == self.role and not any(_answers(turn) for turn in turns):
            turns += _as_answers(turns, self.questions)
        if not turns:
            raise InputError(f"there is no turn of the {role} to train on, and this method needs turns of every role")
        return turns

    def _encoded(self, samples: Sequence[RoleSample], model: LanguageModel) -> list[EncodedTurn]:
        """Turns as tokens; what is too long is treated as the data's settings say."""
        return encode_turns(samples, model, self.origin.prompts, limits=self.material.limits)

    def _material(self, variant: str | None) -> Material:
        if variant == self.recipe.variant:
            return self.material
        return material_of(self.recipe.model_copy(update={"variant": variant}), self.origin.pattern)


class _Weights:
    """What is trained of a model: all of it, in float32, or adapters."""

    def __init__(self, model: LanguageModel, adapters: LoraSettings | None, seed: int) -> None:
        if model.is_quantized:
            raise ConfigError(
                "the weights of a baseline are trained, or adapters merged into them, so they cannot be held in fewer "
                "bits; leave out quantization"
            )
        self.model = model
        self.adapters = None if adapters is None else Adapters(model, adapters, seed=seed)
        if self.adapters is None:
            model.network.float()
        self.parameters = dict(model.network.named_parameters()) if self.adapters is None else self.adapters.parameters

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(each.numel() for each in self.parameters.values())

    def finished(self) -> LanguageModel:
        """The trained model, by itself: nothing is left of what was known of it before."""
        if self.adapters is not None:
            return self.adapters.merge()
        return LanguageModel(self.model.network, self.model.tokenizer)


def _own_models(system: RecursiveSystem) -> dict[str, LanguageModel]:
    """A model for each role; where roles share one, each gets a copy to be trained by itself."""
    seen: set[int] = set()
    models = {}
    for role, agent in system.agents.items():
        model = agent.model
        is_taken = id(model) in seen
        seen.add(id(model))
        models[role] = LanguageModel(deepcopy(model.network), model.tokenizer) if is_taken else model
    return models


def _held_out(samples: Sequence[RoleSample], number: int) -> tuple[list[RoleSample], list[RoleSample]]:
    """Turns to learn from, and about so many of a tenth of the questions, of all kinds, to judge by."""
    questions = list(dict.fromkeys(sample.question for sample in samples))
    chosen = set(questions[9::10])
    held_out = [sample for sample in samples if sample.question in chosen]
    return [each for each in samples if each.question not in chosen], held_out[:: max(1, len(held_out) // number)]


def _minus_loss(model: LanguageModel, turns: Sequence[EncodedTurn]) -> Callable[[], float]:
    return lambda: -mean_loss(model, turns)


def _answers(turn: RoleSample) -> bool:
    return turn.solo or turn.round == turn.num_rounds


def _as_answers(turns: Sequence[RoleSample], questions: Sequence[Question]) -> list[RoleSample]:
    """Turns of the answering role in which it has read the same, and answers."""
    answers = {question.text: question.answer for question in questions}
    return [
        replace(turn, num_rounds=turn.round, target=answers[turn.question])
        for turn in turns
        if turn.question in answers
    ]


def _num_parameters(system: RecursiveSystem) -> int:
    """Of a whole system: its models, and its links."""
    return _models_of(system) + sum(each.numel() for link in system.all_links.values() for each in link.parameters())


def _models_of(system: RecursiveSystem) -> int:
    """Parameters of the models of a system, shared ones counted once."""
    models = {id(agent.model): agent.model.num_parameters for agent in system.agents.values()}
    return sum(models.values())


def _told(fitted: Fitted) -> dict[str, Any]:
    return {
        "steps": len(fitted.losses),
        "best_step": fitted.best_step,
        "loss": sum(fitted.losses[-10:]) / len(fitted.losses[-10:]),
        "validation": {str(step): value for step, value in fitted.scores.items()},
        "stopped": fitted.stopped,
    }
