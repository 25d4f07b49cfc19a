"""What a world, or data sets, give to training: turns for the first stages, questions and a score for the outer loop.

Knows worlds, recipes and scorers; knows nothing of how anything is trained.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from recursivemas.errors import ConfigError, InputError
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.evaluation.task import Sample
from recursivemas.patterns import Pattern
from recursivemas.system import RecursiveSystem
from recursivemas.tools import Toolbox
from recursivemas.training.data import Question, RoleSample, check_disjoint
from recursivemas.training.datasets import Counts, DataSet, DataSets, Limits, Reader, Row, Source
from recursivemas.training.recipe import Material, Recipe
from recursivemas.worlds import World, load_world
from recursivemas.worlds.splits import split_of

BATCH_SIZE = 256
"""Questions that are answered together when a checkpoint is scored."""

Turns = Callable[[str, int], list[RoleSample]]


def check_material(recipe: Recipe) -> None:
    """Refuse a recipe whose data cannot be read, before any model is loaded. Raises `ConfigError` or `InputError`."""
    if recipe.data is not None:
        recipe.data.check_sources()


def material_of(recipe: Recipe, pattern: Pattern) -> Material:
    """The material of a recipe. Raises `ConfigError` or `InputError` where it does not fit, or cannot be read."""
    turns = None
    if recipe.world is not None:
        world = load_world(recipe.world.name, recipe.world.seed)
        _check_roles(world, pattern)
        if recipe.data is None:
            return _of_world(world, recipe)
        turns = _world_turns(world, recipe)
    assert recipe.data is not None
    return _of_data(recipe.data, recipe, pattern, turns)


# --- data sets --------------------------------------------------------------------------------------------------------


def _of_data(settings: DataSets, recipe: Recipe, pattern: Pattern, turns: Turns | None) -> Material:
    """Turns (if they do not come from elsewhere) and questions from data sets."""
    settings.check_roles(pattern.roles)
    texts = _Texts(settings, recipe, pattern)
    texts.check()

    def score(system: RecursiveSystem, asked: Sequence[Question], channel: str = "latent") -> float:
        if settings.score == "likelihood":
            return likelihood(system, asked, channel, recipe.outer.micro_batch_size or recipe.outer.batch_size)
        scorer = SCORERS[settings.score]
        return _mean_score(system, asked, channel, lambda text, each: scorer(text, each.answer, {}).value)

    return Material(
        turns=texts.turns if turns is None else turns,
        questions=texts.questions,
        score=score,
        test=() if settings.test is None else texts.questions("test", None),
        limits=Limits(settings.on_long, settings.max_length),
        counts=texts.counts,
        sets=texts.reader.provenance,
    )


@torch.no_grad()
def likelihood(system: RecursiveSystem, asked: Sequence[Question], channel: str, batch_size: int) -> float:
    """How probable a system finds a word of the answers: the inverse of an answer's perplexity, mean over questions."""
    total = 0.0
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        texts, keys = [each.text for each in batch], [each.id for each in batch]
        for played in system.unroll(texts, channel=channel, keys=keys):
            if played.turn.speaks:
                answers, is_cut = [each.answer for each in batch], [each.is_cut for each in batch]
                losses = played.agent.loss(played.reading, answers, is_cut=is_cut)
                total += (-losses.double()).exp().sum().item()
    return total / len(asked)


@dataclass(frozen=True)
class _Texts:
    """What the rows of data sets are to a pattern."""

    settings: DataSets
    recipe: Recipe
    pattern: Pattern
    reader: Reader = field(init=False)
    counts: dict[str, Counts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reader", Reader(self.settings))

    @property
    def by_hash(self) -> bool:
        """Whether the questions of `outer` are split by a hash, and not all of them are for training."""
        return self.settings.validation is None

    def check(self) -> None:
        """Read everything and look for every column that a question needs. Raises `InputError` or `ConfigError`."""
        for source in (self.settings.outer, self.settings.validation, self.settings.test):
            if source is not None:
                data = self.reader.read(source)
                self.reader.question_column(data)
                self.reader.answer_column(data, self.pattern.answers)

    def rows(self, source: Source, split: str) -> tuple[DataSet, list[tuple[Row, str]], int]:
        """A set, its rows of a split with their questions, and how many rows have no question."""
        data = self.reader.read(source)
        column = self.reader.question_column(data)
        asked = [(row, data.text(row, column)) for row in data.rows]
        rows = [(row, question) for row, question in asked if question is not None]
        empty = len(asked) - len(rows)
        if empty and self.settings.on_empty == "refuse":
            first = next(row for row, question in asked if question is None)
            self._refuse(data, first, column, empty)
        is_split = self.by_hash and source not in (self.settings.validation, self.settings.test)
        chosen = [(row, question) for row, question in rows if not is_split or split_of(question) == split]
        if not chosen:
            raise InputError(
                f"{data.source}: none of its {len(rows)} questions is of the split '{split}', to which they belong by "
                "a hash: of ten, about eight are for training, one for validation, one for tests; give more rows, or "
                "files of your own (data.validation)"
            )
        return data, chosen, empty

    def questions(self, split: str, number: int | None) -> list[Question]:
        """Questions of a split with what is to be answered, and what the other roles should write if that is known."""
        named = {"train": None, "validation": self.settings.validation, "test": self.settings.test}[split]
        data, rows, empty = self.rows(named or self.settings.outer, split)
        answer = self.reader.answer_column(data, self.pattern.answers)
        columns = self._target_columns(data)
        needed = columns if self.recipe.outer.latent_source == "targets" and split != "test" else {}
        questions = []
        for row, text in self._some(rows, number):
            written = {role: data.text(row, column) for role, column in columns.items()}
            told = data.text(row, answer, numbers=True)
            missing = [column for role, column in needed.items() if written[role] is None]
            if told is None or missing:
                empty += 1
                if self.settings.on_empty == "refuse":
                    self._refuse(data, row, answer if told is None else missing[0], 1)
                continue
            targets = {role: each for role, each in written.items() if each is not None}
            questions.append(Question(id=f"{split}-{row.number}", text=text, answer=told, targets=targets))
        self.counts[split] = Counts(used=len(questions), empty=empty)
        if not questions:
            raise InputError(f"{data.source}: no {split} question is left: {self.counts[split]}")
        return questions

    def turns(self, role: str, number: int) -> list[RoleSample]:
        """What a role reads and should write, in the first of two rounds or in the second; first each row once, then in
        its other round. In the second the answering role speaks, and then what it should write is the answer."""
        data, rows, empty = self.rows(self.settings.for_role(role), "train")
        self._check_held_out(data, rows, role)
        by_round = {round: self._heard(role, round) for round in (1, 2)}
        senders = [each for heard in by_round.values() for each in heard]
        columns = {each: self.reader.role_column(data, each, self.pattern.answers) for each in (role, *senders)}
        spoken = self.reader.answer_column(data, self.pattern.answers)
        samples: list[list[RoleSample]] = [[] for _ in by_round]
        for place, (row, question) in enumerate(self._some(rows, number)):
            written = {
                each: data.text(row, column, numbers=each == self.pattern.answers) for each, column in columns.items()
            }
            told = data.text(row, spoken, numbers=True)
            missing = [columns[each] for each, text in written.items() if text is None]
            missing += [spoken] if told is None and role == self.pattern.answers else []
            if missing:
                empty += 1
                if self.settings.on_empty == "refuse":
                    self._refuse(data, row, missing[0], 1)
                continue
            for index, later in enumerate(samples):
                round = 1 + (place + index) % len(samples)
                later.append(
                    RoleSample(
                        role=role,
                        question=question,
                        target=str(told if round == 2 and role == self.pattern.answers else written[role]),
                        round=round,
                        num_rounds=2,
                        messages={each: str(written[each]) for each in by_round[round]},
                        variant=self.recipe.variant,
                    )
                )
        self.counts[role] = Counts(used=sum(map(len, samples)), empty=empty)
        return [sample for each in samples for sample in each]

    def _heard(self, role: str, round: int) -> list[str]:
        sources = self.pattern.sources(role)
        return [edge.source for edge in sources if self.pattern.message_round(edge, round) > 0]

    def _target_columns(self, data: DataSet) -> dict[str, str]:
        """The columns of what the roles that do not answer should write, as far as there are any."""
        found = {}
        for role in self.pattern.roles:
            if role != self.pattern.answers:
                try:
                    found[role] = self.reader.role_column(data, role, self.pattern.answers)
                except InputError:  # only some kinds of training need them, and these say so
                    continue
        return found

    def _some(self, rows: list[tuple[Row, str]], number: int | None) -> list[tuple[Row, str]]:
        """So many of the rows, drawn from the recipe's seed, in their order."""
        if number is None or number >= len(rows):
            return rows
        return [rows[place] for place in sorted(random.Random(self.recipe.seed).sample(range(len(rows)), number))]

    def _check_held_out(self, data: DataSet, rows: list[tuple[Row, str]], role: str) -> None:
        """No question of the validation or the test split may be among those that a link is trained on."""
        if self.by_hash and self.settings.test is None:
            return
        splits = {f"train ({role})": [Question(id=str(row.number), text=text, answer="") for row, text in rows]}
        for split, source in (("validation", self.settings.validation), ("test", self.settings.test)):
            if source is not None:
                _, held_out, _ = self.rows(source, split)
                splits[split] = [Question(id=f"{split}-{row.number}", text=text, answer="") for row, text in held_out]
        check_disjoint(splits)

    def _refuse(self, data: DataSet, row: Row, column: str, number: int) -> None:
        more = f" (and in {number - 1} more rows)" if number > 1 else ""
        raise InputError(
            f"{data.where(row)}: the column '{column}' is empty{more}; write something, or leave such rows out "
            "(data.on_empty: skip)"
        )


# --- worlds -----------------------------------------------------------------------------------------------------------


def _check_roles(world: World, pattern: Pattern) -> None:
    """Raise `ConfigError` if the roles of a world are not those of a pattern."""
    if set(world.roles) != set(pattern.roles):
        raise ConfigError(
            f"the world '{world.name}' has text for the roles {', '.join(world.roles)}, and the pattern "
            f"'{pattern.name}' has {', '.join(pattern.roles)}; take a system of this world's agents"
        )


def _world_turns(world: World, recipe: Recipe) -> Turns:
    wording = {} if recipe.variant is None else {"variant": recipe.variant}
    return lambda role, number: world.role_samples("train", number, recipe.seed, role=role, **wording)


def _of_world(world: World, recipe: Recipe) -> Material:
    """Everything from a world."""
    samples: dict[str, Sample] = {}

    def question(sample: Sample) -> Question:
        samples[sample.id] = sample
        posterior = sample.metadata.get("posterior", {})
        return Question(
            id=sample.id,
            text=sample.question,
            answer=world.answer_of(sample),
            rounds=sample.metadata.get("rounds", 1),
            posterior={world.answer_of(sample, each): probability for each, probability in posterior.items()},
        )

    toolbox = cache(world.toolbox)

    def score(system: RecursiveSystem, asked: Sequence[Question], channel: str = "latent") -> float:
        # What a world scores by it knows of its own questions.
        scorer = SCORERS[world.scorer]
        return _mean_score(
            system,
            asked,
            channel,
            lambda text, each: scorer(text, samples[each.id].target, samples[each.id].metadata).value,
            toolbox(),
        )

    return Material(
        turns=_world_turns(world, recipe),
        questions=lambda split, number: [question(each) for each in world.samples(split, number, recipe.seed)],
        score=score,
    )


def _mean_score(
    system: RecursiveSystem,
    asked: Sequence[Question],
    channel: str,
    score: Callable[[str, Question], float],
    toolbox: Toolbox | None = None,
) -> float:
    """The mean score of a system's answers."""
    questions = [each.text for each in asked]
    results = system.run(questions, channel=channel, trace="off", batch_size=BATCH_SIZE, tools=toolbox)
    return sum(score(result.text, each) for each, result in zip(asked, results, strict=True)) / len(asked)
