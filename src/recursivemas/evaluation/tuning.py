"""Tuning: how many rounds and latent steps a system should run with, found on validation questions, under a budget.

Every pair of the two dials answers the same questions, taking turns batch by batch. The **frontier** is made of the
pairs that no other equals in accuracy at a lower cost. Chosen is the cheapest pair within the budget that is not worse
than the best one by more than one standard error of their paired difference: more rounds that may be chance are not
worth their price.

Knows systems from outside and tasks; it is for the caller to bring questions that will never judge the system.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recursivemas.errors import ConfigError
from recursivemas.evaluation.metrics import Mean, mean, paired_difference
from recursivemas.evaluation.runner import Answer, Arm, evaluate
from recursivemas.evaluation.task import Task
from recursivemas.system import RecursiveSystem

Unit = Literal["milliseconds", "tokens"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Budget:
    """The most that an answer may cost."""

    unit: Unit = "milliseconds"
    """Time of a question in its batch, or generated tokens and latent steps together."""
    most: float | None = None

    def __post_init__(self) -> None:
        if self.most is not None and not self.most > 0:
            raise ConfigError(f"a budget must be more than 0 {self.unit} for each question, got {self.most:g}")


@dataclass(frozen=True)
class Point:
    """One setting of the two dials, and what came out."""

    num_rounds: int
    num_latent_steps: int
    accuracy: Mean
    milliseconds: float
    tokens: float
    """Generated tokens and latent steps of a question."""
    scores: tuple[float, ...]
    """Of every question, in their order."""

    @property
    def name(self) -> str:
        """The setting in words."""
        return f"{self.num_rounds} rounds of {self.num_latent_steps} latent steps"


@dataclass(frozen=True)
class Tuning:
    """What was tried, what is worth having, and what to take."""

    points: tuple[Point, ...]
    budget: Budget
    frontier: tuple[Point, ...]
    """By cost; each is better than all that cost less."""
    best: Point
    """The most accurate one within the budget."""
    chosen: Point

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single scores as plain data."""

        def plain(point: Point) -> dict[str, Any]:
            values = asdict(point)
            del values["scores"]
            return values | {
                "accuracy": point.accuracy.value,
                "stderr": point.accuracy.stderr,
                "n": point.accuracy.n,
                "on_frontier": point in self.frontier,
            }

        return {
            "budget": asdict(self.budget),
            "points": [plain(point) for point in self.points],
            "best": plain(self.best),
            "chosen": plain(self.chosen),
        }


def tune(
    system: RecursiveSystem,
    task: Task,
    *,
    rounds: Sequence[int],
    latent_steps: Sequence[int],
    budget: Budget | None = None,
    batch_size: int = 64,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Try every pair of rounds and latent steps on the questions of a task, and choose one.

    With a `journal` file it goes on where it stopped. Raises `ConfigError` if there is nothing to choose among, or
    nothing fits into the budget.
    """
    budget = budget or Budget()
    if len(task.samples) < 2:
        raise ConfigError("tuning compares settings on several validation questions; give two or more")
    for name, values, least in (("rounds", rounds, 1), ("latent steps", latent_steps, 1)):
        if not values or min(values) < least:
            raise ConfigError(f"tuning needs numbers of {name} to try, each {least} or more; got {list(values)}")
    pairs = [(n, m) for m in dict.fromkeys(latent_steps) for n in dict.fromkeys(rounds)]
    log = evaluate(
        system,
        task,
        [Arm("latent", n, num_latent_steps=m) for n, m in pairs],
        batch_size=batch_size,
        seed=seed,
        journal=journal,
        progress=None if progress is None else lambda done, total, _: progress(done, total),
    )
    points = tuple(_point(arm, answers) for arm, answers in log.answers.items())
    within = [point for point in points if budget.most is None or _cost(point, budget) <= budget.most]
    if not within:
        cheapest = min(points, key=lambda point: _cost(point, budget))
        raise ConfigError(
            f"nothing fits into {budget.most:g} {budget.unit} for each question; the cheapest setting, "
            f"{cheapest.name}, takes {_cost(cheapest, budget):.3g}"
        )
    best = max(within, key=lambda point: (point.accuracy.value, -_cost(point, budget)))
    return Tuning(points, budget, _frontier(points, budget), best, _cheapest_as_good(within, best, budget))


def _point(arm: Arm, answers: Sequence[Answer]) -> Point:
    scores = tuple(answer.score for answer in answers)
    return Point(
        arm.rounds,
        arm.num_latent_steps or 0,
        mean(scores),
        1000 * mean([answer.seconds for answer in answers]).value,
        mean([float(answer.generated_tokens + answer.latent_steps) for answer in answers]).value,
        scores,
    )


def _cost(point: Point, budget: Budget) -> float:
    return point.milliseconds if budget.unit == "milliseconds" else point.tokens


def _frontier(points: Sequence[Point], budget: Budget) -> tuple[Point, ...]:
    """Those that are better than everything that costs no more."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (_cost(each, budget), -each.accuracy.value)):
        if not found or point.accuracy.value > found[-1].accuracy.value:
            found.append(point)
    return tuple(found)


def _cheapest_as_good(points: Sequence[Point], best: Point, budget: Budget) -> Point:
    """The cheapest of those that fall behind the best by no more than the standard error of the difference."""
    as_good = [best]
    for point in points:
        behind = paired_difference(best.scores, point.scores)
        if behind.value <= behind.stderr:
            as_good.append(point)
    return min(as_good, key=lambda point: _cost(point, budget))
