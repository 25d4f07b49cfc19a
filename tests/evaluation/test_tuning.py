"""Tuning of rounds and latent steps: what is on the frontier, what is chosen, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from recursivemas.errors import ConfigError
from recursivemas.evaluation import tuning
from recursivemas.evaluation.runner import Answer, Arm, EvalLog
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.evaluation.task import Sample, Task
from recursivemas.evaluation.tuning import Budget, tune
from recursivemas.system import RecursiveSystem

SAMPLES = [Sample(id=str(number), question=f"Question {number}?", target="x") for number in range(100)]
TASK = Task(name="made up", samples=SAMPLES, scorer=SCORERS["exact"])

# rounds, latent steps -> share of right answers, milliseconds, latent steps of the whole run
MADE_UP = {
    (1, 2): (0.30, 1.0, 4),
    (2, 2): (0.60, 2.0, 10),
    (3, 2): (0.61, 4.0, 16),
    (1, 4): (0.25, 1.5, 8),
    (2, 4): (0.50, 3.0, 20),
    (3, 4): (0.61, 8.0, 32),
}


def answered(accuracy: float, milliseconds: float, latent_steps: int) -> list[Answer]:
    # Slower settings are right about other questions, too.
    right = range(int(2 * milliseconds), int(2 * milliseconds) + round(accuracy * len(SAMPLES)))
    return [
        Answer(sample.id, "", float(number in right), "", True, milliseconds / 1000, 3, 10, latent_steps, 50)
        for number, sample in enumerate(SAMPLES)
    ]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> RecursiveSystem:
    """A system whose evaluations come out as `MADE_UP` says."""

    def evaluate(system: RecursiveSystem, task: Task, arms: list[Arm], **_: object) -> EvalLog:
        answers = {arm: answered(*MADE_UP[arm.rounds, arm.num_latent_steps or 0]) for arm in arms}
        return EvalLog("made up", task, 2, 0, answers)

    monkeypatch.setattr(tuning, "evaluate", evaluate)
    return RecursiveSystem.from_pretrained("ward")


def test_the_frontier_is_what_nothing_cheaper_equals(system: RecursiveSystem) -> None:
    found = tune(system, TASK, rounds=(1, 2, 3), latent_steps=(2, 4))
    assert [(p.num_rounds, p.num_latent_steps) for p in found.frontier] == [(1, 2), (2, 2), (3, 2)]
    assert len(found.points) == 6
    assert found.points[0].tokens == 7
    assert found.to_dict()["points"][0]["on_frontier"]


def test_the_cheapest_that_is_as_good_is_chosen(system: RecursiveSystem) -> None:
    found = tune(system, TASK, rounds=(1, 2, 3), latent_steps=(2, 4))
    assert (found.best.num_rounds, found.best.num_latent_steps) == (3, 2)
    # One question of a hundred is no more than chance: two rounds do.
    assert (found.chosen.num_rounds, found.chosen.num_latent_steps) == (2, 2)
    assert (tune(system, TASK, rounds=(1, 2), latent_steps=(4,)).chosen.num_rounds) == 2


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget("milliseconds", 1.9), (1, 2)),
        (Budget("milliseconds", 3.0), (2, 2)),
        (Budget("tokens", 11.0), (1, 2)),
        (Budget("tokens", 13.0), (2, 2)),
    ],
)
def test_a_budget_is_kept(system: RecursiveSystem, budget: Budget, expected: tuple[int, int]) -> None:
    found = tune(system, TASK, rounds=(1, 2, 3), latent_steps=(2, 4), budget=budget)
    assert (found.chosen.num_rounds, found.chosen.num_latent_steps) == expected


def test_what_cannot_be_tuned_is_refused(system: RecursiveSystem) -> None:
    for most in (0.0, -1.0):
        with pytest.raises(ConfigError, match="more than 0 tokens"):
            Budget("tokens", most)
    with pytest.raises(ConfigError, match=r"1 rounds of 2 latent steps, takes 1\b"):
        tune(system, TASK, rounds=(1, 2), latent_steps=(2,), budget=Budget("milliseconds", 0.5))
    with pytest.raises(ConfigError, match="numbers of rounds"):
        tune(system, TASK, rounds=(0, 1), latent_steps=(2,))
    with pytest.raises(ConfigError, match="numbers of latent steps"):
        tune(system, TASK, rounds=(1,), latent_steps=())
    with pytest.raises(ConfigError, match="two or more"):
        tune(system, dataclasses.replace(TASK, samples=SAMPLES[:1]), rounds=(1,), latent_steps=(2,))


def test_it_runs_and_goes_on(tmp_path: Path) -> None:
    """In a real system: every pair is run with its own rounds and steps, and a journal saves the work."""
    system = RecursiveSystem.from_pretrained("ward")
    journal = tmp_path / "answers.jsonl"
    task = dataclasses.replace(TASK, samples=SAMPLES[:2])
    found = tune(system, task, rounds=(1, 2), latent_steps=(1, 3), journal=journal)
    written = journal.read_text()
    # Round 1: planner and critic think. Round 2: the solver for the planner, then again planner and critic.
    steps = {record["arm"]: record["latent_steps"] for record in map(json.loads, written.splitlines()[1:])}
    assert steps == {"latent m=1 r=1": 2, "latent m=3 r=1": 6, "latent m=1 r=2": 5, "latent m=3 r=2": 15}
    assert tune(system, task, rounds=(1, 2), latent_steps=(1, 3), journal=journal).points == found.points
    assert journal.read_text() == written
