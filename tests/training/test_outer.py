"""The outer loop: its loss by hand, what it moves, how it resumes, and how it fails."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import FEW_WORDS
from torch import Tensor

from recursivemas.agents import Agent, Reading
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError, NumericsError
from recursivemas.links import RecursiveLink
from recursivemas.patterns import Edge
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import AlignmentPairs
from recursivemas.training.data import Question
from recursivemas.training.loop import RunDirectory
from recursivemas.training.outer import (
    OuterLoop,
    OuterSettings,
    Phase,
    expected_loss,
    learning_rate_ratios,
    train_outer,
)
from recursivemas.training.processes import Processes

MakeSystem = Callable[..., RecursiveSystem]

QUESTIONS = [
    Question(id="q-0", text="What is 2 + 2?", answer="four", posterior={"four": 0.6, "forty-two": 0.3, "no": 0.1}),
    Question(id="q-1", text="How far did the fox run?", answer="no", posterior={"no": 1.0}),
    Question(id="q-2", text="Why?", answer="forty-two", posterior={"river bank": 0.25, "forty-two": 0.75}),
    Question(id="q-3", text="Name the river at dawn.", answer="river bank", posterior={"river bank": 0.5, "no": 0.5}),
]


def settings(**changes: Any) -> OuterSettings:
    return OuterSettings(
        **{
            "num_train_steps": 4,
            "batch_size": 3,
            "anchor": 0.0,
            "warmup_steps": 0,
            "log_every": 2,
            "save_every": 2,
            "num_validation": 2,
            "validate_every": 2,
            **changes,
        }
    )


@pytest.fixture
def system(make_system: MakeSystem) -> RecursiveSystem:
    return make_system(prompts=FEW_WORDS, num_latent_steps=2, max_new_tokens=4)


@pytest.fixture
def anchors(system: RecursiveSystem) -> dict[str, AlignmentPairs]:
    """Pairs of every edge, made up."""
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for name in system.links:
        edge = Edge.parse(name)
        sizes = [system.agents[role].model.hidden_size for role in (edge.source, edge.target)]
        states, targets = (torch.randn(40, size, generator=generator) for size in sizes)
        pairs[name] = AlignmentPairs(states, targets)
    return pairs


def copied(system: RecursiveSystem) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in system.trainable_parameters().items()}


def moved(before: dict[str, Tensor], system: RecursiveSystem) -> set[str]:
    return {
        name for name, parameter in system.trainable_parameters().items() if not torch.equal(parameter, before[name])
    }


def records_of(path: Path, key: str = "step") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if key in record]


def drawn(step: int, seed: int = 0, batch_size: int = 3) -> list[Question]:
    """The questions of a step, as drawn from its number."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return [QUESTIONS[row] for row in torch.randint(len(QUESTIONS), (batch_size,), generator=generator).tolist()]


@torch.no_grad()
def cross_entropy(system: RecursiveSystem, question: str, answer: str, round: int, num_rounds: int) -> float:
    """Of one answer to one question after a round, in a system that is played for this question alone."""
    for played in system.unroll([question], num_rounds=num_rounds, answer_rounds=[round]):
        if played.turn.speaks and played.turn.round == round:
            return played.agent.loss(played.reading, [answer]).item()
    raise AssertionError(f"nobody spoke in round {round}")


def mean_of(system: RecursiveSystem, batch: list[Question], round: int, num_rounds: int) -> float:
    return sum(cross_entropy(system, each.text, each.answer, round, num_rounds) for each in batch) / len(batch)


# The loss


@pytest.mark.parametrize(
    ("round_weights", "expected"),
    [
        ("last", {3: 1.0}),
        ("every", {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}),
        ((1.0, 0.0, 3.0), {1: 0.25, 3: 0.75}),
        ((5.0, 0.0, 1.0, 1.0), {2: 0.5, 3: 0.5}),
    ],
)
def test_the_loss_of_a_step_by_hand(system: RecursiveSystem, round_weights: Any, expected: dict[int, float]) -> None:
    loop = OuterLoop(system, QUESTIONS, settings(round_weights=round_weights, num_rounds=3), seed=4)
    for step in (0, 6):
        batch = drawn(step, seed=4)
        by_hand = {round: mean_of(system, batch, round, 3) for round in expected}
        assert sum(loop.losses(step)).item() == pytest.approx(sum(expected[r] * by_hand[r] for r in expected), rel=1e-5)
        figures = loop.observe(step)
        assert figures == {f"loss/round {round}": pytest.approx(value, rel=1e-5) for round, value in by_hand.items()}
    assert drawn(0, seed=4) != drawn(6, seed=4)


def test_rounds_are_those_of_the_system_by_default(system: RecursiveSystem) -> None:
    assert OuterLoop(system, QUESTIONS, settings()).num_rounds == 2
    assert OuterLoop(system, QUESTIONS, settings(num_rounds=5)).num_rounds == 5


def test_a_step_follows_from_its_number_and_the_seed_alone(
    system: RecursiveSystem, anchors: dict[str, AlignmentPairs]
) -> None:
    def losses(steps: list[int], seed: int = 0) -> list[float]:
        loop = OuterLoop(system, QUESTIONS, settings(anchor=1.0, anchor_batch_size=4), seed, anchors)
        return [sum(loop.losses(step)).item() for step in steps]

    forward = losses([0, 1, 2, 3])
    torch.manual_seed(99)
    assert losses([3, 2, 0, 1]) == [forward[3], forward[2], forward[0], forward[1]]
    assert len(set(forward)) == 4
    assert losses([0], seed=1) != forward[:1]


@pytest.mark.parametrize("message", ["inner+outer", "outer"])
def test_the_anchor_is_the_alignment_loss_of_the_pairs_it_draws(
    make_system: MakeSystem, anchors: dict[str, AlignmentPairs], message: str
) -> None:
    system = make_system(prompts=FEW_WORDS, num_latent_steps=2, message=message)
    chosen = settings(anchor=0.7, anchor_batch_size=16)
    loop = OuterLoop(system, QUESTIONS, chosen, seed=2, anchors=anchors)
    plain = sum(OuterLoop(system, QUESTIONS, settings(), seed=2).losses(5)).item()
    found = sum(loop.losses(5)).item()
    generator = torch.Generator().manual_seed(2 * 1_000_003 + 5)
    torch.randint(len(QUESTIONS), (3,), generator=generator)
    by_hand = []
    for name, pairs in anchors.items():
        rows = torch.randint(40, (16,), generator=generator)
        states, targets = pairs.states[rows], pairs.targets[rows]
        if message == "inner+outer":
            states = system.agents[name.split("->")[0]].inner_link(states)
        by_hand.append(((system.links[name](states) - targets) ** 2).sum() / (targets**2).sum())
    expected = torch.stack(by_hand).mean().item()
    assert expected > 0.1
    assert found == pytest.approx(plain + 0.7 * expected, rel=1e-5)
    assert loop.observe(5)["loss/anchor"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distillation_is_the_expectation_over_the_posterior(system: RecursiveSystem, share: float) -> None:
    loop = OuterLoop(system, QUESTIONS, settings(distillation=share, round_weights="last"))
    total = 0.0
    for question in drawn(1):
        expectation = sum(
            probability * cross_entropy(system, question.text, answer, 2, 2)
            for answer, probability in question.posterior.items()
        )
        total += (1 - share) * cross_entropy(system, question.text, question.answer, 2, 2) + share * expectation
    assert sum(loop.losses(1)).item() == pytest.approx(total / 3, rel=1e-5)


def test_an_expected_loss_of_a_certain_answer_is_its_loss(system: RecursiveSystem) -> None:
    *_, played = system.unroll([question.text for question in QUESTIONS])
    certain = [Question(id=each.id, text=each.text, answer="", posterior={each.answer: 1.0}) for each in QUESTIONS]
    expected = played.agent.loss(played.reading, [each.answer for each in QUESTIONS])
    torch.testing.assert_close(expected_loss(played.agent, played.reading, certain), expected)


@pytest.mark.parametrize("trained", ["outer", "inner+outer"])
def test_the_gradient_of_a_step_is_that_of_its_loss(
    system: RecursiveSystem, anchors: dict[str, AlignmentPairs], trained: str
) -> None:
    """Taken apart by rounds or not, logged or not: watching changes no bit of it."""
    chosen = settings(anchor=1.0, anchor_batch_size=8, trained=trained)
    parameters = {
        name: parameter
        for name, parameter in system.trainable_parameters().items()
        if trained == "inner+outer" or "->" in name
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loop = OuterLoop(system, QUESTIONS, chosen, anchors=anchors)
    expected = torch.autograd.grad(sum(loop.losses(1)), list(parameters.values()))
    sum(loop.losses(1)).backward()
    figures = loop.observe(1)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient), name
    for name in {name.split("/")[0] for name in parameters}:
        own = [gradient for other, gradient in zip(parameters, expected, strict=True) if other.startswith(f"{name}/")]
        norm = torch.cat([each.flatten() for each in own]).norm().item()
        assert figures[f"gradient/total/{name}"] == pytest.approx(norm, rel=1e-5)
    total = torch.cat([each.flatten() for each in expected]).norm().item()
    clipped = [value for key, value in figures.items() if key.startswith("gradient/total_clipped/")]
    assert sum(value**2 for value in clipped) ** 0.5 == pytest.approx(min(1.0, total), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_of_a_batch_add_up_to_it(system: RecursiveSystem, anchors: dict[str, AlignmentPairs], size: int) -> None:
    """Losses, gradients and figures of micro-batches, and of processes that share them, are those of the whole batch."""
    questions = [*QUESTIONS, Question(id="q-4", text="Who answers?", answer="no", rounds=2)]
    parameters = system.trainable_parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def step(size: int | None, count: int = 1) -> tuple[list[Tensor], dict[str, float]]:
        chosen = settings(batch_size=5, micro_batch_size=size, anchor=1.0, anchor_batch_size=8, clip_messages=0.5)
        figures: dict[str, float] = {}
        for parameter in parameters.values():
            parameter.grad = None
        for rank in range(count):
            loop = OuterLoop(system, questions, chosen, anchors=anchors, processes=Share(rank, count))
            parts = list(loop.losses(1))
            for part in parts:
                part.backward()
            for name, value in {**loop.observe(1), "loss": sum(part.item() for part in parts)}.items():
                figures[name] = figures.get(name, 0.0) + value
        return [parameter.grad.clone() for parameter in parameters.values()], figures

    whole, told = step(None)
    for found, figures in (step(size), step(size, 2), step(None, 3)):
        for gradient, expected in zip(found, whole, strict=True):
            assert (gradient - expected).norm() <= 1e-5 * expected.norm()
        for name in ("loss", "loss/round 1", "loss/round 2", "loss/anchor"):
            assert figures[name] == pytest.approx(told[name], rel=1e-5)
    assert step(size)[1] == pytest.approx(told, rel=1e-4, abs=1e-6)


class Share(Processes):
    """One of several processes that have not to wait for each other."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Same losses, same scores, same weights, for any number of them; and both fail if one does."""
    script = Path(__file__).with_name("in_processes.py")
    root = script.parents[2]
    found = []
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        place = tmp_path / str(count)
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(script), str(place)], env=environment, cwd=root, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((place / "found.json").read_text()))
    one, two = found
    assert (one["count"], two["count"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-6)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4)
    assert "q-1" in two["failure"]
    assert two["failure"] == two["failure of the other"]
    assert len(records_of(tmp_path / "2" / "run")) == len(records_of(tmp_path / "1" / "run"))


def test_global_clipping_is_told(system: RecursiveSystem) -> None:
    parameters = system.trainable_parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loop = OuterLoop(system, QUESTIONS, settings(max_grad_norm=1e-3))
    sum(loop.losses(1)).backward()
    figures = loop.observe(1)
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1e-3)
    for name, link in system.all_links.items():
        norm = torch.cat([parameter.grad.flatten() for parameter in link.parameters()]).norm().item()
        assert figures[f"gradient/total_clipped/{name}"] == pytest.approx(norm, rel=1e-3)
        assert figures[f"gradient/total_clipped/{name}"] < figures[f"gradient/total/{name}"]


# Which rounds, and how much each of them counts


def test_a_curriculum_unrolls_its_rounds_in_its_steps() -> None:
    phases = (Phase(num_rounds=1, num_train_steps=2), Phase(num_rounds=4, num_train_steps=3))
    chosen = settings(num_train_steps=8, curriculum=phases)
    assert [chosen.rounds_at(step, 5) for step in range(8)] == [1, 1, 4, 4, 4, 5, 5, 5]
    # Never more than there are.
    assert [chosen.rounds_at(step, 3) for step in range(8)] == [1, 1, 3, 3, 3, 3, 3, 3]
    assert settings().rounds_at(0, 3) == 3


def test_a_curriculum_is_played(system: RecursiveSystem) -> None:
    chosen = settings(curriculum=(Phase(num_rounds=1, num_train_steps=2),), num_rounds=3)
    loop = OuterLoop(system, QUESTIONS, chosen)
    assert sum(loop.losses(1)).item() == pytest.approx(mean_of(system, drawn(1), 1, 1), rel=1e-5)
    whole = sum(mean_of(system, drawn(2), round, 3) for round in (1, 2, 3)) / 3
    assert sum(loop.losses(2)).item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("round_weights", "num_rounds", "expected"),
    [
        ("every", 1, {1: 1.0}),
        ("every", 4, dict.fromkeys((1, 2, 3, 4), 0.25)),
        ("last", 4, {4: 1.0}),
        ((1.0, 3.0), 2, {1: 0.25, 2: 0.75}),
        ((0.0, 1.0), 2, {2: 1.0}),
        ((2.0, 1.0, 3.0), 2, {1: 0.25, 2: 0.75}),
        ((2.0, 1.0, 3.0), 1, {1: 1.0}),
    ],
)
def test_weights_of_rounds_add_up_to_one(round_weights: Any, num_rounds: int, expected: dict[int, float]) -> None:
    assert settings(round_weights=round_weights).weights_of(num_rounds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"round_weights": ()}, "round_weights"),
        ({"round_weights": (1.0, 0.0)}, "the last one more than 0"),
        ({"round_weights": (-1.0, 1.0)}, "0 or more"),
        ({"curriculum": ({"num_rounds": 1, "num_train_steps": 4},)}, "curriculum take all 4 steps"),
        ({"curriculum": ({"num_rounds": 1, "num_train_steps": 3},) * 2}, "curriculum take all 4 steps"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("anchor", -1.0),
        ("clip_messages", 0.0),
        ("distillation", 1.1),
        ("lr_ratios", {"inner": -1.0}),
        ("patience", 0),
        ("validate_every", 0),
        ("max_loss_ratio", 1.0),
        ("curriculum", ({"num_rounds": 0, "num_train_steps": 1},)),
        ("trained", "inner"),
        ("latent_source", "student"),
        ("round_weights", "first"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"round_weights": (1.0,)}, ConfigError, "round_weights has 1 weights for 2 rounds"),
        ({"lr_ratios": {"planer": 1.0}}, ConfigError, "lr_ratios: unknown link 'planer': did you mean 'planner'"),
        ({"lr_ratios": {"planner->solver": 1.0}}, ConfigError, "unknown link 'planner->solver'"),
    ],
)
def test_settings_that_do_not_fit_the_system_are_refused(
    system: RecursiveSystem, changes: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        train_outer(system, QUESTIONS, settings(**changes))


def test_there_must_be_something_to_train_on(make_system: MakeSystem) -> None:
    with pytest.raises(InputError, match="no questions"):
        train_outer(make_system(), [], settings())
    with pytest.raises(ConfigError, match="num_latent_steps of 1 or more"):
        train_outer(make_system(num_latent_steps=0), QUESTIONS, settings())


# Learning rates


def test_learning_rates_are_by_link_and_kind(system: RecursiveSystem) -> None:
    chosen = settings(lr_ratios={"inner": 0.5, "critic": 0.25, "planner->critic": 2.0})
    found = learning_rate_ratios(system, chosen)
    assert set(found) == set(system.trainable_parameters())
    by_link = {name.split("/")[0]: ratio for name, ratio in found.items()}
    assert by_link == {
        "planner": 0.5,
        "critic": 0.25,
        "solver": 0.5,
        "planner->critic": 2.0,
        "critic->solver": 1.0,
        "solver->planner": 1.0,
    }
    for name, ratio in found.items():
        assert ratio == by_link[name.split("/")[0]]
    assert set(learning_rate_ratios(system, settings(lr_ratios={"outer": 0.1, "inner": 3.0})).values()) == {0.1, 3.0}


def test_the_first_step_goes_by_each_links_learning_rate(system: RecursiveSystem) -> None:
    ratios = {"inner": 0.5, "critic": 0.0, "planner->critic": 2.0}
    before = copied(system)
    fitted = train_outer(system, QUESTIONS, settings(num_train_steps=1, lr=1e-3, lr_ratios=ratios, log_every=1))
    for name, parameter in system.trainable_parameters().items():
        link = name.split("/")[0]
        ratio = ratios.get(link, 1.0 if "->" in link else 0.5)
        # The first step of Adam is the learning rate, wherever the gradient is not all but zero.
        largest = (parameter - before[name]).abs().max().item()
        assert largest == pytest.approx(1e-3 * ratio, rel=0.02), name
        assert (fitted.movement[name] == 0) == (ratio == 0)


# Training


@pytest.mark.parametrize("trained", ["outer", "inner+outer"])
@pytest.mark.parametrize("design", ["res-2-layer", "ln-res-2-layer"])
def test_only_the_chosen_links_move_and_each_of_their_tensors_does(
    make_system: MakeSystem, trained: str, design: str
) -> None:
    system = make_system(prompts=FEW_WORDS, num_latent_steps=2, design=design, max_new_tokens=4)
    prints = {role: agent.model.fingerprint() for role, agent in system.agents.items()}
    before, buffers = copied(system), {name: link.scale.clone() for name, link in system.all_links.items()}
    fitted = train_outer(system, QUESTIONS, settings(num_train_steps=2, trained=trained))
    expected = {name for name in before if trained == "inner+outer" or "->" in name}
    assert moved(before, system) == expected
    assert set(fitted.movement) == expected
    after = copied(system)
    for name in expected:
        distance = (after[name] - before[name]).norm() / (before[name].norm() or after[name].norm())
        assert fitted.movement[name] == pytest.approx(distance.item(), rel=1e-4)
        assert fitted.movement[name] > 0
    assert all(torch.equal(link.scale, buffers[name]) for name, link in system.all_links.items())
    assert {role: agent.model.fingerprint() for role, agent in system.agents.items()} == prints
    for agent in system.agents.values():
        assert all(not p.requires_grad and p.grad is None for p in agent.model.network.parameters())
    assert not any(parameter.requires_grad for parameter in system.trainable_parameters().values())


def test_training_lowers_the_loss_of_what_it_is_trained_on(system: RecursiveSystem) -> None:
    chosen = settings(num_train_steps=12, lr=1e-2, batch_size=4, round_weights="last", log_every=100)
    before = mean_of(system, QUESTIONS, 2, 2)
    fitted = train_outer(system, QUESTIONS, chosen)
    assert len(fitted.losses) == 12
    assert mean_of(system, QUESTIONS, 2, 2) < 0.9 * before


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_clipping_at_messages_is_a_setting(system: RecursiveSystem, tmp_path: Path, clip: float | None) -> None:
    train_outer(system, QUESTIONS, settings(num_train_steps=2, clip_messages=clip), run=RunDirectory(tmp_path, {}))
    record = records_of(tmp_path, "loss")[-1]
    last = [record[f"gradient/message/critic->solver/round 2/{key}"] for key in ("maximum", "median")]
    assert min(last) > 0
    after = [key for key in record if key.startswith("gradient/message_clipped/")]
    assert len(after) == (0 if clip is None else 3 * (3 + 2))
    for key in after:
        if key.endswith("maximum"):
            assert record[key] <= 1e-3 * last[0] * (1 + 1e-5)
            assert record[key] <= record[key.replace("message_clipped", "message")]


def test_everything_is_logged(system: RecursiveSystem, tmp_path: Path, anchors: dict[str, AlignmentPairs]) -> None:
    chosen = settings(num_train_steps=5, anchor=1.0, anchor_batch_size=8, clip_messages=2.0)
    told: list[tuple[int, set[str]]] = []
    fitted = train_outer(
        system,
        QUESTIONS,
        chosen,
        anchors=anchors,
        validate=lambda system: 0.5,
        run=RunDirectory(tmp_path, {}),
        progress=lambda stage, step, total, figures: told.append((step, set(figures))),
    )
    assert [(each["step"], each["validation"]) for each in records_of(tmp_path, "validation")] == [
        (0, 0.5),
        (2, 0.5),
        (4, 0.5),
        (5, 0.5),
    ]
    records = records_of(tmp_path, "loss")
    assert [record["step"] for record in records] == [2, 4, 5]
    edges = {(edge, round) for edge in system.links for round in (1, 2)} - {("solver->planner", 2)}
    links = edges | {(role, round) for role in system.agents for round in (1, 2)} - {("solver", 2)}
    statistics = ("median", "maximum", "share")
    expected = {
        *("stage", "step", "loss", "grad_norm", "lr", "loss/round 1", "loss/round 2", "loss/anchor"),
        *("steps_per_second", "seconds_left", "memory_mb"),
        *(f"moved/{name}" for name in system.trainable_parameters()),
        *(
            f"gradient/{group}/{edge}/round {r}/{s}"
            for group in ("message", "message_clipped")
            for edge, r in edges
            for s in statistics
        ),
        *(f"gradient/link/{link}/round {r}/{s}" for link, r in links for s in statistics),
        *(f"gradient/{group}/{link}" for group in ("total", "total_clipped") for link in system.all_links),
        *(f"rounded/{link}" for link in system.all_links),
        "gradient/outlier",
    }
    # Outputs are compared when there are enough of them.
    compared = {f"output/{figure}/{link}" for figure in ("spread", "directions") for link in system.all_links}
    assert not compared & set(records[0])
    assert compared & set(records[1])
    heard = {f"output/loudness/{link}" for link in system.all_links}
    assert heard <= set(records[0]) | set(records[1])
    for record in records[:2]:
        assert set(record) - compared - heard == expected
        assert all(math.isfinite(value) for key, value in record.items() if key != "stage")
    assert {"loss", "loss/round 2", "steps_per_second"} <= set(records[2])
    assert [record["loss"] for record in records] == [fitted.losses[step - 1] for step in (2, 4, 5)]
    assert records[1]["seconds_left"] > records[2]["seconds_left"] == 0
    assert [step for step, keys in told if "validation" in keys] == [0, 2, 4, 5]
    assert [step for step, keys in told if "loss/round 1" in keys] == [2, 4, 5]


# Thoughts in words


def test_taught_thoughts_are_the_states_that_write_the_text(system: RecursiveSystem) -> None:
    texts = [question.text for question in QUESTIONS]
    steps = 5
    for role, agent in system.agents.items():
        model = agent.model
        prompts = [[model.render_chat([{"role": "user", "content": text}])] for text in texts]
        reading = agent.read([tuple(prompt) for prompt in prompts], {})
        with torch.no_grad():
            thoughts = agent.think(reading, steps, in_words=True)
            rolled = agent.think(reading, steps)
        replies = agent.speak(reading, SamplingParams(max_new_tokens=steps), texts)
        assert torch.equal(thoughts[:, 0], rolled[:, 0])
        assert not torch.allclose(thoughts[:, 1:], rolled[:, 1:])
        written = model.logits(thoughts).argmax(dim=-1).tolist()
        for row, reply in enumerate(replies):
            assert tuple(written[row][: len(reply.token_ids)]) == reply.token_ids, role
        # And the states themselves: prompt and text, read at once and without a cache.
        for row, [prompt] in enumerate(prompts):
            ids = [*model.encode(prompt), *written[row][: steps - 1]]
            with torch.no_grad():
                states = model.states(torch.tensor([ids]))[0, -steps:]
            torch.testing.assert_close(thoughts[row], states, rtol=1e-3, atol=1e-4)


def test_messages_are_made_of_taught_thoughts_on_demand(system: RecursiveSystem) -> None:
    texts = [question.text for question in QUESTIONS]

    def messages(**options: Any) -> list[Tensor]:
        with torch.no_grad():
            turns = list(system.unroll(texts, num_rounds=2, num_latent_steps=3, **options))
        return [message.latents for played in turns for message in played.messages.values()]

    default, rollout, teacher = messages(), messages(latent_source="rollout"), messages(latent_source="teacher")
    assert all(torch.equal(*pair) for pair in zip(default, rollout, strict=True))
    assert not any(torch.allclose(*pair) for pair in zip(rollout, teacher, strict=True))
    first = next(iter(system.unroll(texts, num_rounds=1, num_latent_steps=3)))
    thoughts = first.agent.think(first.reading, 3, in_words=True)
    expected = system.links["planner->critic"](first.agent.inner_link(thoughts))
    torch.testing.assert_close(teacher[0], expected.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="unknown latent source 'taecher': did you mean 'teacher'"):
        system.unroll(texts, latent_source="taecher")


def test_the_latent_source_is_a_setting_of_the_loss(system: RecursiveSystem) -> None:
    losses = {}
    for source in ("rollout", "teacher"):
        losses[source] = sum(OuterLoop(system, QUESTIONS, settings(latent_source=source)).losses(0)).item()
    assert losses["rollout"] == sum(OuterLoop(system, QUESTIONS, settings()).losses(0)).item()
    assert losses["teacher"] != pytest.approx(losses["rollout"], rel=1e-6)
    fitted = train_outer(system, QUESTIONS, settings(num_train_steps=1, latent_source="teacher"))
    assert fitted.losses == [losses["teacher"]]
    assert min(fitted.movement.values()) > 0


# What is not finite


@contextmanager
def spoilt(link: RecursiveLink, call: int, row: int, *, backward: bool = False) -> Iterator[None]:
    """What a link returns at one call (or the gradient that comes back to it) is not finite for one sample."""
    calls = [0]

    def planted(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[row].view(-1)[-1] = math.inf
        return tensor

    def hook(link: RecursiveLink, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # no step of the training: the gold answer is looked for
        calls[0] += 1
        if calls[0] != call:
            return None
        if not backward:
            return planted(output)
        output.register_hook(planted)
        return None

    handle = link.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    assert calls[0] >= call


def names_of(step: int) -> list[str]:
    return [question.id for question in drawn(step)]


@pytest.mark.parametrize(
    ("link", "call", "words"),
    [
        ("planner->critic", 3, "the message planner->critic of round 1 is not finite"),
        ("critic->solver", 4, "the message critic->solver of round 2 is not finite"),
        ("solver->planner", 2, "the message solver->planner of round 1 is not finite"),
        # Two calls a turn, two turns a step: what is thought through it is not finite either.
        ("critic", 7, "the message critic->solver of round 2 is not finite"),
    ],
)
def test_a_message_that_is_not_finite_stops_training_by_name(
    system: RecursiveSystem, tmp_path: Path, link: str, call: int, words: str
) -> None:
    """In the second step, for its second sample."""
    once = settings(num_train_steps=1, lr=1e-3, min_lr_ratio=1.0)
    with pytest.raises(NumericsError, match=words) as caught, spoilt(system.all_links[link], call, row=1):
        train_outer(system, QUESTIONS, settings(lr=1e-3, min_lr_ratio=1.0), run=RunDirectory(tmp_path, {}))
    name = names_of(1)[1]
    assert f"'{name}'" in str(caught.value) or f"{name}." in str(caught.value)
    assert ". The weights are those after step 1." in str(caught.value)
    assert_trained(system, once)


def assert_trained(system: RecursiveSystem, chosen: OuterSettings) -> None:
    """The weights are those of a training with these settings."""
    fresh = RecursiveSystem.build(
        agents={role: agent.model for role, agent in system.agents.items()},
        prompts=FEW_WORDS,
        num_rounds=2,
        num_latent_steps=2,
    )
    train_outer(fresh, QUESTIONS, chosen)
    assert not moved(copied(fresh), system)


@pytest.mark.parametrize(
    ("link", "call", "words"),
    [
        ("planner->critic", 3, "message planner->critic in round 1 is not finite for 1 of 3 samples: NAME"),
        ("critic->solver", 4, "message critic->solver in round 2 is not finite for 1 of 3 samples: NAME"),
        ("solver->planner", 2, "message solver->planner in round 1 is not finite for 1 of 3 samples: NAME"),
        ("planner", 5, "link planner in round 1 is not finite for 1 of 3 samples: NAME"),
    ],
)
@pytest.mark.parametrize("validated", [True, False])
def test_a_gradient_that_is_not_finite_stops_training_by_name(
    system: RecursiveSystem, tmp_path: Path, link: str, call: int, words: str, validated: bool
) -> None:
    before = copied(system)
    validate = (lambda system: 0.5) if validated else None
    chosen = settings(lr=1e-3, min_lr_ratio=1.0)
    with (
        pytest.raises(NumericsError, match=words.replace("NAME", names_of(1)[2])) as caught,
        spoilt(system.all_links[link], call, row=2, backward=True),
    ):
        train_outer(system, QUESTIONS, chosen, validate=validate, run=RunDirectory(tmp_path, {}))
    if validated:
        assert "The weights kept are those after step 0, the best on validation (0.5000)" in str(caught.value)
        assert not moved(before, system)
    else:
        assert "The weights are those after step 1." in str(caught.value)
        assert_trained(system, chosen.model_copy(update={"num_train_steps": 1}))
    assert all(p.isfinite().all() and p.grad is None for p in system.trainable_parameters().values())


def test_an_answer_whose_loss_is_not_finite_stops_training_by_name(
    system: RecursiveSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Agent.loss, [0]

    def planted(self: Agent, reading: Reading, texts: list[str], **options: Any) -> Tensor:
        calls[0] += 1
        losses = loss(self, reading, texts, **options)
        return losses * torch.tensor([1.0, math.nan, math.nan]) if calls[0] == 4 else losses

    monkeypatch.setattr(Agent, "loss", planted)
    samples = "2 of 3 samples: " + ", ".join(names_of(1)[1:])
    with pytest.raises(NumericsError, match=f"the solver's answer in round 2 is not finite for {samples}\\."):
        train_outer(system, QUESTIONS, settings())


def test_a_gradient_of_a_weight_alone_that_is_not_finite_stops_before_the_update(system: RecursiveSystem) -> None:
    before = copied(system)
    weight = system.links["critic->solver"].w1.weight
    weight.requires_grad_(True)
    handle = weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        NumericsError, match=r"outer: the loss \(.*\) or its gradient \(norm nan\) is not finite at step 1"
    ):
        train_outer(system, QUESTIONS, settings())
    handle.remove()
    assert not moved(before, system)


def test_a_learning_rate_that_is_far_too_high_stops_with_the_best_weights(
    system: RecursiveSystem, tmp_path: Path, anchors: dict[str, AlignmentPairs]
) -> None:
    """The loss is a hundred thousand times what it was within five steps."""
    seen: list[dict[str, Tensor]] = []

    def validate(system: RecursiveSystem) -> float:
        seen.append(copied(system))
        return 0.4 if len(seen) == 2 else 0.25

    chosen = settings(num_train_steps=60, lr=0.3, anchor=1.0, batch_size=1, num_rounds=1, log_every=100)
    with pytest.raises(NumericsError, match=r"outer has diverged: at step \d+ the loss is .*rate \(0\.3\)") as caught:
        train_outer(system, QUESTIONS, chosen, anchors=anchors, validate=validate, run=RunDirectory(tmp_path, {}))
    assert "The weights kept are those after step 2, the best on validation (0.4000)" in str(caught.value)
    assert not moved(seen[1], system)
    assert moved(seen[0], system)


def test_a_learning_rate_that_overflows_stops_with_the_best_weights(
    system: RecursiveSystem, anchors: dict[str, AlignmentPairs]
) -> None:
    before = copied(system)
    chosen = settings(lr=1e6, anchor=1.0, batch_size=1, num_rounds=1)
    with pytest.raises(NumericsError, match=r"not finite .* The weights kept are those after step 0, the best"):
        train_outer(system, QUESTIONS, chosen, anchors=anchors, validate=lambda system: 0.5)
    assert not moved(before, system)


# Going on


CURRICULUM = settings(
    num_train_steps=9,
    curriculum=(Phase(num_rounds=1, num_train_steps=3),),
    validate_every=2,
    patience=2,
    save_every=3,
    batch_size=2,
    anchor=0.5,
    anchor_batch_size=4,
    lr=3e-3,
    clip_messages=1.0,
    lr_ratios={"inner": 0.3},
)
# By the number of steps done; the last two are never reached.
SCORES = {0: 0.1, 2: 0.5, 4: 0.4, 6: 0.3, 8: 0.9, 9: 0.9}


class Killed(BaseException):
    """What no code can answer, such as SIGKILL."""


def go(
    make_system: MakeSystem,
    anchors: dict[str, AlignmentPairs],
    path: Path | None,
    *,
    stop_at: str = "",
    error: type[BaseException] = KeyboardInterrupt,
    chosen: OuterSettings = CURRICULUM,
) -> tuple[Any, RecursiveSystem]:
    """Train; end at an event such as `loss 3` or `validate 2`."""
    system = make_system(prompts=FEW_WORDS, num_latent_steps=2, max_new_tokens=4)
    losses = OuterLoop.losses
    state = None if path is None else RunDirectory(path, {}).load("outer")
    done = [0 if state is None else len(state.fitted.losses)]

    def watched(self: OuterLoop, step: int) -> list[Tensor]:
        found = list(losses(self, step))
        if stop_at == f"loss {step}":
            raise error
        done[0] = step + 1
        return found

    def validate(trained: RecursiveSystem) -> float:
        assert trained is system
        trained.run([question.text for question in QUESTIONS[:2]])
        if stop_at == f"validate {done[0]}":
            raise error
        return SCORES[done[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OuterLoop, "losses", watched)
        run = None if path is None else RunDirectory(path, {})
        fitted = train_outer(system, QUESTIONS, chosen, anchors=anchors, validate=validate, seed=3, run=run)
    return fitted, system


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """Filled by the first test that needs it."""
    return {}


# tests/training/test_loop.py ends runs wherever they can be ended; here it is the stage that goes on.
@pytest.mark.parametrize(
    ("stop_at", "error"),
    [
        ("validate 0", KeyboardInterrupt),
        ("loss 2", KeyboardInterrupt),
        ("loss 5", Killed),
        ("validate 4", KeyboardInterrupt),
        ("validate 6", Killed),
    ],
)
def test_a_stopped_outer_stage_goes_on_to_the_same_end(
    make_system: MakeSystem,
    anchors: dict[str, AlignmentPairs],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    stop_at: str,
    error: type[BaseException],
) -> None:
    if not uninterrupted:
        fitted, system = go(make_system, anchors, None)
        uninterrupted.update(fitted=fitted, weights=copied(system))
    expected = uninterrupted["fitted"]
    assert (expected.best_step, len(expected.losses), list(expected.scores)) == (2, 6, [0, 2, 4, 6])
    assert expected.stopped == "no better validation since step 2, 2 validations ago"
    with pytest.raises(error):
        go(make_system, anchors, tmp_path, stop_at=stop_at, error=error)
    found, resumed = go(make_system, anchors, tmp_path)
    assert found == expected
    assert not moved(uninterrupted["weights"], resumed)
    assert [record["step"] for record in records_of(tmp_path, "validation")] == [0, 2, 4, 6]
    assert [record["step"] for record in records_of(tmp_path, "loss")] == [2, 4, 6]


def test_a_finished_outer_stage_returns_at_once(
    make_system: MakeSystem, anchors: dict[str, AlignmentPairs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(num_train_steps=3, validate_every=2)
    first, system = go(make_system, anchors, tmp_path, chosen=chosen.model_copy(update={"num_train_steps": 2}))
    assert (first.best_step, len(first.losses)) == (2, 2)
    log = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(OuterLoop, "losses", lambda *given: pytest.fail("trained again"))
    monkeypatch.setattr(RecursiveSystem, "run", lambda *given: pytest.fail("validated again"))
    again, same = go(make_system, anchors, tmp_path, chosen=chosen.model_copy(update={"num_train_steps": 2}))
    assert again == first
    assert not moved(copied(system), same)
    assert (tmp_path / "metrics.jsonl").read_text() == log
