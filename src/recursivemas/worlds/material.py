"""What a world, or files, give to training: turns for the first stages, questions and a score for the outer loop.

Knows worlds, recipes and tasks; knows nothing of how anything is trained.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from recursivemas.errors import ConfigError, InputError, unknown_name
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.evaluation.task import Sample, load_samples
from recursivemas.patterns import Pattern
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question, RoleSample
from recursivemas.training.recipe import Material, QuestionFiles, Recipe
from recursivemas.worlds import World, load_world

BATCH_SIZE = 256
"""Questions that are answered together when a checkpoint is scored."""


def check_material(recipe: Recipe) -> None:
    """Refuse a recipe whose text cannot be read, before any model is loaded. Raises `ConfigError`."""
    if recipe.world is None and recipe.questions is None:
        raise ConfigError(
            "the recipe takes its text from data sets (data), and this version reads worlds and files; --dry-run says "
            "what it would take, and `questions` in the place of `data` trains on JSON Lines files of your own"
        )


def material_of(recipe: Recipe, pattern: Pattern) -> Material:
    """The material of a recipe. Raises `ConfigError` or `InputError` where it does not fit, or cannot be read."""
    check_material(recipe)
    if recipe.world is not None:
        return _of_world(load_world(recipe.world.name, recipe.world.seed), recipe, pattern)
    assert recipe.questions is not None
    return _of_files(recipe.questions, pattern)


def _of_files(files: QuestionFiles, pattern: Pattern) -> Material:
    """Questions and answers from files, and from columns of the same file what each role should write."""

    def turns(role: str, number: int) -> list[RoleSample]:
        samples = load_samples(files.train, limit=number)
        return [turn for sample in samples for turn in _turns(sample, role, pattern, files.train)]

    def questions(split: str, number: int) -> list[Question]:
        file = files.train if split == "train" else files.validation
        return [_plain_question(sample, split) for sample in load_samples(file, limit=number)]

    def score(system: RecursiveSystem, asked: Sequence[Question]) -> float:
        return _mean_score(system, asked, lambda text, each: SCORERS["exact"](text, each.answer, {}).value)

    test = [] if files.test is None else [_plain_question(sample, "test") for sample in load_samples(files.test)]
    return Material(turns=turns, questions=questions, score=score, test=test)


def _plain_question(sample: Sample, split: str) -> Question:
    return Question(id=f"{split}-{sample.id}", text=sample.question, answer=sample.target)


def _turns(sample: Sample, role: str, pattern: Pattern, file: Path) -> list[RoleSample]:
    """What a role reads and should write in the first of two rounds, and in the second, if it does not answer there."""
    written = {each: _text(sample, each, pattern, file) for each in pattern.roles}
    turns = []
    for round in (1, 2):
        if role == pattern.answers and round == 2:
            continue
        heard = [edge.source for edge in pattern.sources(role) if pattern.message_round(edge, round) > 0]
        messages = {source: written[source] for source in heard}
        turns.append(
            RoleSample(
                role=role, question=sample.question, target=written[role], round=round, num_rounds=2, messages=messages
            )
        )
    return turns


def _text(sample: Sample, role: str, pattern: Pattern, file: Path) -> str:
    """What a role should write about a question: its column, or the answer. Raises `InputError`."""
    if role in sample.metadata:
        text = sample.metadata[role]
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{file}, sample {sample.id}: the column '{role}' is empty or not text")
        return text
    if role == pattern.answers:
        return sample.target
    columns = ["question", "answer", *sample.metadata]
    raise InputError(
        f"{file}, sample {sample.id}: {unknown_name('column', role, columns)}; the stages before the outer loop are "
        f"trained on what the {role} should write, and its anchor, too. Add it, or train the outer loop alone (--stage "
        "outer --set outer.anchor=0)"
    )


def _of_world(world: World, recipe: Recipe, pattern: Pattern) -> Material:
    """The material of a world. Raises `ConfigError` if its roles are not those of the pattern."""
    if set(world.roles) != set(pattern.roles):
        raise ConfigError(
            f"the world '{world.name}' has text for the roles {', '.join(world.roles)}, and the pattern "
            f"'{pattern.name}' has {', '.join(pattern.roles)}; take a system of this world's agents"
        )
    samples: dict[str, Sample] = {}
    wording = {} if recipe.variant is None else {"variant": recipe.variant}

    def question(sample: Sample) -> Question:
        samples[sample.id] = sample
        posterior = sample.metadata.get("posterior", {}) if recipe.questions is None else {}
        return Question(
            id=sample.id,
            text=sample.question,
            answer=world.answer_text(sample.target),
            rounds=sample.metadata.get("rounds", 1) if recipe.questions is None else 1,
            posterior={world.answer_text(each): probability for each, probability in posterior.items()},
        )

    def questions(split: str, number: int) -> list[Question]:
        if recipe.questions is None:
            return [question(sample) for sample in world.samples(split, number, recipe.seed)]
        file = recipe.questions.train if split == "train" else recipe.questions.validation
        return [question(_named(sample, split)) for sample in load_samples(file, limit=number)]

    def score(system: RecursiveSystem, asked: Sequence[Question]) -> float:
        # What a world scores by it may know of its own questions only.
        scorer = SCORERS[world.scorer if recipe.questions is None else "exact"]
        return _mean_score(
            system, asked, lambda text, each: scorer(text, samples[each.id].target, samples[each.id].metadata).value
        )

    held_out = recipe.questions.test if recipe.questions is not None else None
    return Material(
        turns=lambda role, number: world.role_samples("train", number, recipe.seed, role=role, **wording),
        questions=questions,
        score=score,
        test=[question(_named(sample, "test")) for sample in load_samples(held_out)] if held_out is not None else (),
    )


def _mean_score(system: RecursiveSystem, asked: Sequence[Question], score: Callable[[str, Question], float]) -> float:
    """The mean score of a system's answers."""
    results = system.run([each.text for each in asked], channel="latent", trace="off", batch_size=BATCH_SIZE)
    return sum(score(result.text, each) for each, result in zip(asked, results, strict=True)) / len(asked)


def _named(sample: Sample, split: str) -> Sample:
    """A sample of a file, whose id is no more than the number of its line."""
    return Sample(id=f"{split}-{sample.id}", question=sample.question, target=sample.target, metadata=sample.metadata)
