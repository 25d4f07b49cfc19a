"""What a world gives to training: turns for the first stages, questions and a score for the outer loop.

Knows worlds, recipes and tasks; knows nothing of how anything is trained.
"""

from collections.abc import Sequence

from recursivemas.errors import ConfigError
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.evaluation.task import Sample, load_samples
from recursivemas.patterns import Pattern
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question
from recursivemas.training.recipe import Material, Recipe
from recursivemas.worlds import World

BATCH_SIZE = 256
"""Questions that are answered together when a checkpoint is scored."""


def material_of(world: World, recipe: Recipe, pattern: Pattern) -> Material:
    """The material of a recipe. Raises `ConfigError` if the world's roles are not those of the pattern."""
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
        results = system.run([each.text for each in asked], channel="latent", trace="off", batch_size=BATCH_SIZE)
        # What a world scores by it may know of its own questions only.
        scorer = SCORERS[world.scorer if recipe.questions is None else "exact"]
        values = [
            scorer(result.text, samples[each.id].target, samples[each.id].metadata).value
            for each, result in zip(asked, results, strict=True)
        ]
        return sum(values) / len(values)

    held_out = recipe.questions.test if recipe.questions is not None else None
    return Material(
        turns=lambda role, number: world.role_samples("train", number, recipe.seed, role=role, **wording),
        questions=questions,
        score=score,
        test=[question(_named(sample, "test")) for sample in load_samples(held_out)] if held_out is not None else (),
    )


def _named(sample: Sample, split: str) -> Sample:
    """A sample of a file, whose id is no more than the number of its line."""
    return Sample(id=f"{split}-{sample.id}", question=sample.question, target=sample.target, metadata=sample.metadata)
