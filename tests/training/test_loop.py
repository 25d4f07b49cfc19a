"""The training loop: a known optimum, its schedule, and that a stopped run goes on as if nothing had happened."""

import errno
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recursivemas.errors import ConfigError, NumericsError, OutputError
from recursivemas.training import loop
from recursivemas.training.loop import Fitted, LoopSettings, RunDirectory, State, Validation, fit, learning_rate

SETTINGS = LoopSettings(num_train_steps=20, lr=0.05, warmup_steps=3, log_every=2, save_every=5)


def problem(seed: int = 0) -> tuple[dict[str, nn.Parameter], Callable[[int], Tensor]]:
    """A regression whose batches follow from the number of the step."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(4, 3, generator=generator))
    bias = nn.Parameter(torch.zeros(3))
    truth = torch.randn(4, 3, generator=generator)

    def loss_of_step(step: int) -> Tensor:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (inputs @ weight + bias - inputs @ truth).square().mean()

    return {"weight": weight, "bias": bias}, loss_of_step


def open_run(path: Path, **settings: Any) -> RunDirectory:
    return RunDirectory(path, {"seed": 0, **settings})


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[Fitted, dict[str, Tensor]]:
    parameters, loss_of_step = problem()
    return fit("stage", parameters, loss_of_step, SETTINGS), {name: p.detach() for name, p in parameters.items()}


def test_a_known_optimum_is_found() -> None:
    parameters, loss_of_step = problem()
    losses = fit("stage", parameters, loss_of_step, LoopSettings(num_train_steps=400, lr=0.05)).losses
    assert losses[-1] < 1e-3 * losses[0]
    assert len(losses) == 400


def test_training_is_the_same_twice(uninterrupted: tuple[Fitted, dict[str, Tensor]]) -> None:
    parameters, loss_of_step = problem()
    assert fit("stage", parameters, loss_of_step, SETTINGS) == uninterrupted[0]


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    settings = LoopSettings(num_train_steps=110, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    assert [learning_rate(step, settings) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(10, settings) == pytest.approx(2.0)
    assert learning_rate(60, settings) == pytest.approx(0.2 + 0.9)
    assert learning_rate(110, settings) == pytest.approx(0.2)
    assert learning_rate(5, LoopSettings(num_train_steps=10, warmup_steps=0)) == pytest.approx(
        3e-3 * 0.5 * (1 + math.cos(math.pi / 2))
    )


def test_the_gradient_is_clipped() -> None:
    weight = nn.Parameter(torch.zeros(1))
    settings = LoopSettings(num_train_steps=1, max_grad_norm=0.5)
    seen: list[float] = []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.item()))
    step = torch.optim.AdamW.step
    clipped: list[float] = []

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        clipped.append(weight.grad.item())
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        fit("stage", {"weight": weight}, lambda step: 100 * weight.sum(), settings)
    assert seen == [100]
    assert clipped == pytest.approx([0.5], rel=1e-4)


def test_parameters_train_during_the_stage_only() -> None:
    parameters, loss_of_step = problem()
    trained: list[bool] = []

    def watched(step: int) -> Tensor:
        trained.append(all(parameter.requires_grad for parameter in parameters.values()))
        return loss_of_step(step)

    fit("stage", parameters, watched, LoopSettings(num_train_steps=2))
    assert trained == [True, True]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters.values())


def test_parameters_have_their_own_share_of_the_learning_rate() -> None:
    names = ["whole", "half", "tenth", "also half", "still"]
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in names}
    settings = LoopSettings(num_train_steps=3, lr=0.1, warmup_steps=0, max_grad_norm=1e9)
    ratios = {"half": 0.5, "also half": 0.5, "tenth": 0.1, "still": 0.0}
    slopes = torch.tensor([1.0, -5.0, 20.0])
    fit(
        "stage", parameters, lambda step: sum(slopes @ each for each in parameters.values()), settings, lr_ratios=ratios
    )
    # Against a constant slope Adam goes by the learning rate itself, whatever the slope.
    expected = -sum(learning_rate(step, settings) for step in range(3)) * slopes.sign()
    for name in names:
        torch.testing.assert_close(parameters[name].detach(), ratios.get(name, 1.0) * expected, rtol=1e-5, atol=1e-7)


def test_what_is_observed_is_seen_before_clipping_and_logged(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(1))
    settings = LoopSettings(num_train_steps=4, max_grad_norm=0.5, log_every=3)
    seen: list[tuple[int, float]] = []

    def observe(step: int) -> dict[str, float]:
        seen.append((step, weight.grad.item()))
        return {"observed": 10.0 * step}

    fit("stage", {"w": weight}, lambda step: 100 * weight.sum(), settings, observe=observe, run=open_run(tmp_path))
    assert seen == [(0, 100.0), (1, 100.0), (2, 100.0), (3, 100.0)]
    assert [(record["step"], record["observed"]) for record in records_of(tmp_path)] == [(3, 20.0), (4, 30.0)]


def test_movement_is_relative_to_where_each_parameter_started() -> None:
    parameters = {"far": nn.Parameter(torch.tensor([3.0, 4.0])), "zero": nn.Parameter(torch.zeros(2))}
    parameters["still"] = nn.Parameter(torch.ones(2))
    settings = LoopSettings(num_train_steps=1, lr=0.5, warmup_steps=0)

    def loss(step: int) -> Tensor:
        return parameters["far"].sum() + parameters["zero"].sum() + 0 * parameters["still"].sum()

    movement = fit("stage", parameters, loss, settings).movement
    # One step of Adam moves each number by the learning rate: 0.5 * sqrt(2) of a norm of 5.
    assert movement == pytest.approx({"far": 0.5 * 2**0.5 / 5, "zero": 1.0, "still": 0.0}, rel=1e-4)


# Metrics


def records_of(path: Path, key: str = "step") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if key in record]


def test_metrics_are_logged_and_told(tmp_path: Path) -> None:
    parameters, loss_of_step = problem()
    told: list[tuple[str, int, int]] = []
    losses = fit(
        "stage",
        parameters,
        loss_of_step,
        SETTINGS,
        run=open_run(tmp_path),
        progress=lambda stage, step, total, figures: told.append((stage, step, total)),
    ).losses
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == [("stage", step, 20) for step in range(2, 21, 2)]
    assert [record["step"] for record in records] == list(range(2, 21, 2))
    assert [record["loss"] for record in records] == losses[1::2]
    assert records[0]["lr"] == pytest.approx(learning_rate(1, SETTINGS))
    assert set(records[0]) == {
        *("stage", "step", "loss", "grad_norm", "lr", "steps_per_second", "seconds_left", "memory_mb"),
        *("moved/weight", "moved/bias"),
    }
    for record in records:
        assert record["steps_per_second"] > 0
        assert 10 < record["memory_mb"] < 1e6
        assert record["seconds_left"] == pytest.approx(
            (20 - record["step"]) / record["steps_per_second"], rel=0.1, abs=0.1
        )
    moved = [record["moved/weight"] for record in records]
    assert moved == sorted(moved)
    assert moved[0] > 0


def test_event_files_are_written_where_tensorboard_is_installed(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    parameters, loss_of_step = problem()
    run = RunDirectory(tmp_path, {}, trackers=["tensorboard"])
    fitted = fit(
        "stage-a->b", parameters, loss_of_step, SETTINGS, run=run, validation=Validation(lambda: 0.5, every=10)
    )
    found = events.EventAccumulator(str(tmp_path / "tensorboard" / "stage-a-to-b"))
    found.Reload()
    losses = found.Scalars("stage-a->b/loss")
    assert [event.step for event in losses] == list(range(2, 21, 2))
    assert [event.value for event in losses] == pytest.approx(fitted.losses[1::2])
    assert [event.step for event in found.Scalars("stage-a->b/validation")] == [0, 10, 20]


@pytest.mark.parametrize("is_installed", [True, False])
def test_tensorboard_is_the_tracker_where_it_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[Fitted, dict[str, Tensor]],
    is_installed: bool,
) -> None:
    found = importlib.util.find_spec
    known = {"tensorboard": found("json") if is_installed else None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known[name] if name in known else found(name))
    if is_installed:
        pytest.importorskip("tensorboard")
    parameters, loss_of_step = problem()
    run = RunDirectory(tmp_path, {}, trackers=None)
    assert fit("stage", parameters, loss_of_step, SETTINGS, run=run) == uninterrupted[0]
    assert len(records_of(tmp_path)) == 10
    assert (tmp_path / "tensorboard" / "stage").exists() is is_installed


# Validation


def scripted(scores: Sequence[float], **options: Any) -> tuple[Validation, list[Tensor], dict[str, nn.Parameter], Any]:
    """A problem, and a validation that gives these scores one after the other and keeps the weights that it saw."""
    parameters, loss_of_step = problem()
    seen: list[Tensor] = []

    def score() -> float:
        seen.append(parameters["weight"].detach().clone())
        return scores[len(seen) - 1]

    return Validation(score, **options), seen, parameters, loss_of_step


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.2, 0.5, 0.4, 0.3], 2),
        ([0.5, 0.2, 0.1, 0.4, 0.3], 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4),
        ([0.1, 0.5, 0.2, 0.5, 0.5], 1),
        ([-0.5, -0.1, -0.2, -0.1, -0.3], 1),
        ([0.3, 0.3, 0.3, 0.3, 0.3], 0),
    ],
)
def test_a_stage_ends_with_the_weights_of_its_first_best_validation(
    tmp_path: Path, scores: list[float], best: int
) -> None:
    validation, seen, parameters, loss_of_step = scripted(scores, every=6)
    told: list[tuple[int, float]] = []

    def progress(stage: str, step: int, total: int, figures: dict[str, float]) -> None:
        if "validation" in figures:
            told.append((step, figures["validation"]))

    run = open_run(tmp_path)
    fitted = fit("stage", parameters, loss_of_step, SETTINGS, validation=validation, run=run, progress=progress)
    # Before the first step, every six steps, and after the last.
    steps = [0, 6, 12, 18, 20]
    assert fitted.scores == dict(zip(steps, scores, strict=True))
    assert fitted.best_step == steps[best]
    assert fitted.stopped is None
    assert len(fitted.losses) == 20
    assert len({tuple(weights.flatten().tolist()) for weights in seen}) == 5
    assert torch.equal(parameters["weight"], seen[best])
    distance = (seen[best] - seen[0]).norm() / seen[0].norm()
    assert fitted.movement["weight"] == pytest.approx(distance.item())
    assert told == list(fitted.scores.items())
    assert [(each["step"], each["validation"]) for each in records_of(tmp_path, "validation")] == told


@pytest.mark.parametrize(
    ("patience", "scores", "steps", "best"),
    [
        (1, [0.1, 0.2, 0.2], 8, 4),
        (2, [0.5, 0.4, 0.45], 8, 0),
        (2, [0.1, 0.0, 0.2, 0.1, 0.2], 16, 8),
        (3, [0.1, 0.0, 0.0, 0.2, 0.1, 0.1], 20, 12),
        (5, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], 20, 0),  # the last validation comes with the last step: no early stop
    ],
)
def test_patience_ends_a_stage_early(tmp_path: Path, patience: int, scores: list[float], steps: int, best: int) -> None:
    validation, seen, parameters, loss_of_step = scripted(scores, every=4, patience=patience)
    fitted = fit("stage", parameters, loss_of_step, SETTINGS, validation=validation, run=open_run(tmp_path))
    assert (len(fitted.losses), fitted.best_step) == (steps, best)
    assert torch.equal(parameters["weight"], seen[best // 4])
    if steps == 20:
        assert fitted.stopped is None
    else:
        assert fitted.stopped == f"no better validation since step {best}, {patience} validations ago"
        assert records_of(tmp_path, "loss")[-1]["step"] == steps
    # And it stays as it is.
    weights = parameters["weight"].detach().clone()
    again, _ = problem()
    never = Validation(lambda: pytest.fail("validated again"), every=4, patience=patience)
    same = fit("stage", again, lambda step: pytest.fail("trained"), SETTINGS, validation=never, run=open_run(tmp_path))
    assert same == fitted
    assert torch.equal(again["weight"], weights)


def test_without_validation_the_last_weights_are_the_best(uninterrupted: tuple[Fitted, dict[str, Tensor]]) -> None:
    assert (uninterrupted[0].scores, uninterrupted[0].best_step) == ({}, 20)
    assert uninterrupted[0].movement["weight"] > 0.1


# Going on


def interrupt_in_loss(step: int, patch: pytest.MonkeyPatch, loss_of_step: Any) -> Any:
    def loss(number: int) -> Tensor:
        if number == step:
            raise KeyboardInterrupt
        return loss_of_step(number)

    return loss


def interrupt_in(method: str, owner: Any, after: bool) -> Any:
    """Stop in the middle of a method at the given step: before it has done its work, or after."""

    def plan(step: int, patch: pytest.MonkeyPatch, loss_of_step: Any) -> Any:
        original, calls = getattr(owner, method), [0]

        def stopping(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] <= step:
                return original(*args, **options)
            if after:
                original(*args, **options)
            raise KeyboardInterrupt

        patch.setattr(owner, method, stopping)
        return loss_of_step

    return plan


@pytest.mark.parametrize(
    "interrupt",
    [
        interrupt_in_loss,
        interrupt_in("step", torch.optim.AdamW, after=False),
        interrupt_in("step", torch.optim.AdamW, after=True),
        interrupt_in("backward", Tensor, after=True),
        interrupt_in("zero_grad", torch.optim.AdamW, after=True),
    ],
    ids=["loss", "before update", "after update", "after backward", "after zero_grad"],
)
@pytest.mark.parametrize("step", [0, 1, 4, 5, 7, 19])
def test_an_interrupted_run_goes_on_to_the_same_losses_and_weights(
    tmp_path: Path, uninterrupted: tuple[Fitted, dict[str, Tensor]], interrupt: Any, step: int
) -> None:
    parameters, loss_of_step = problem()
    with pytest.MonkeyPatch.context() as patch:
        loss = interrupt(step, patch, loss_of_step)
        with pytest.raises(KeyboardInterrupt):
            fit("stage", parameters, loss, SETTINGS, run=open_run(tmp_path))
    # In a new process nothing is left but the directory.
    parameters, loss_of_step = problem()
    losses = fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    assert losses == uninterrupted[0]
    for name, parameter in parameters.items():
        assert torch.equal(parameter, uninterrupted[1][name])
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 21, 2))


@pytest.mark.parametrize(("method", "call"), [("log", 2), ("save", 1), ("log", 9), ("save", 3)])
@pytest.mark.parametrize("after", [True, False])
def test_a_run_interrupted_while_writing_goes_on(
    tmp_path: Path, uninterrupted: tuple[Fitted, dict[str, Tensor]], method: str, call: int, after: bool
) -> None:
    parameters, loss_of_step = problem()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(method, RunDirectory, after)(call, patch, loss_of_step)
        with pytest.raises(KeyboardInterrupt):
            fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    parameters, loss_of_step = problem()
    assert fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path)) == uninterrupted[0]
    for name, parameter in parameters.items():
        assert torch.equal(parameter, uninterrupted[1][name])
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == steps


def test_a_killed_run_goes_on_from_its_last_save(
    tmp_path: Path, uninterrupted: tuple[Fitted, dict[str, Tensor]]
) -> None:
    parameters, loss_of_step = problem()

    def dying(step: int) -> Tensor:
        if step == 13:
            raise Killed
        return loss_of_step(step)

    with pytest.raises(Killed):
        fit("stage", parameters, dying, SETTINGS, run=open_run(tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "stage", "st')
    parameters, loss_of_step = problem()
    again: list[int] = []

    def watched(step: int) -> Tensor:
        again.append(step)
        return loss_of_step(step)

    assert fit("stage", parameters, watched, SETTINGS, run=open_run(tmp_path)) == uninterrupted[0]
    assert again == list(range(10, 20))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 21, 2))


def test_a_stage_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    parameters, loss_of_step = problem()
    losses = fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    trained = {name: parameter.clone() for name, parameter in parameters.items()}
    parameters, _ = problem()

    def never(step: int) -> Tensor:
        raise AssertionError("trained again")

    assert fit("stage", parameters, never, SETTINGS, run=open_run(tmp_path)) == losses
    assert all(torch.equal(parameters[name], weight) for name, weight in trained.items())


def test_stages_keep_to_themselves(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for stage in ("inner-a", "alignment-a->b"):
        parameters, loss_of_step = problem()
        fit(stage, parameters, loss_of_step, SETTINGS, run=run)
    stages = [json.loads(line)["stage"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["inner-a"] * 10 + ["alignment-a->b"] * 10
    assert (run.has("inner"), run.has("alignment"), run.has("outer")) == (True, True, False)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power does not fail in a test, and what is written many times over need not reach the disk each time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Killed(BaseException):
    """What no code can answer, such as SIGKILL."""


class Events:
    """Ends everything at the given number of events, with an exception."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.count, self.happened = at, error, 0, False

    def __call__(self) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            self.happened = True
            raise self.error


@contextmanager
def watched(events: Events) -> Iterator[None]:
    """Everything that is done to weights and files is an event: when it begins, and when it is done."""

    def around(original: Any) -> Any:
        def told(*args: Any, **options: Any) -> Any:
            events()
            result = original(*args, **options)
            events()
            return result

        return told

    with pytest.MonkeyPatch.context() as patch:
        for owner, method in (
            (torch.optim.AdamW, "step"),
            (torch.optim.AdamW, "zero_grad"),
            (Tensor, "backward"),
            (RunDirectory, "log"),
            (RunDirectory, "save"),
            (loop, "save_file"),
            (torch, "save"),
            (loop, "write_atomically"),
            (Path, "replace"),
            (Path, "unlink"),
        ):
            patch.setattr(owner, method, around(getattr(owner, method)))
        yield


JUDGED = LoopSettings(num_train_steps=11, lr=0.05, warmup_steps=3, log_every=2, save_every=3)
SCORES = {
    "to its end": {0: 0.1, 4: 0.3, 8: 0.2, 11: 0.4},
    "best in the middle": {0: 0.1, 4: 0.3, 8: 0.2, 11: 0.2},
    "stopped": {0: 0.1, 4: 0.05, 8: 0.0},
}


def judged(path: Path | None, scores: dict[int, float], events: Events) -> tuple[Fitted, dict[str, Tensor]]:
    """Train with validation, in a process of which nothing is left but the directory."""
    parameters, loss_of_step = problem()
    done = 0

    def loss(step: int) -> Tensor:
        nonlocal done
        events()
        done = step + 1
        return loss_of_step(step)

    run = None if path is None else open_run(path)
    state = None if run is None else run.load("stage")
    done = 0 if state is None else len(state.fitted.losses)

    def score() -> float:
        events()
        return scores[done]

    def progress(*told: Any) -> None:
        events()

    with watched(events):
        validation = Validation(score, every=4, patience=2)
        fitted = fit("stage", parameters, loss, JUDGED, validation=validation, run=run, progress=progress)
    return fitted, {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("case", list(SCORES))
def test_wherever_a_validated_run_is_ended_it_goes_on_to_the_same_end(
    tmp_path: Path, error: type[BaseException], case: str
) -> None:
    expected, weights = judged(None, SCORES[case], Events(-1, error))
    assert (expected.stopped is not None) == (case == "stopped")
    assert expected.scores == SCORES[case]
    # Every tenth moment here, but others in each of the six: together they are of every kind.
    number = list(SCORES).index(case) + 3 * (error is Killed)
    while True:
        path, events = tmp_path / str(number), Events(number, error)
        with suppress(error):
            judged(path, SCORES[case], events)
        if not events.happened:
            break
        found, resumed = judged(path, SCORES[case], Events(-1, error))
        assert found == expected, f"ended at event {number}"
        for name, weight in weights.items():
            assert torch.equal(resumed[name], weight), f"{name}, ended at event {number}"
        for key in ("loss", "validation"):
            steps = [record["step"] for record in records_of(path, key)]
            assert steps == sorted(set(steps)), f"ended at event {number}"
            if error is Killed:
                # Whoever is killed goes back to a save, and writes everything after it again.
                wanted = [2, 4, 6, 8, 10, 11] if key == "loss" else [0, 4, 8, 11]
                assert steps == [step for step in wanted if step <= len(expected.losses)]
        number += 10
    assert number > 100


# What is not finite


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_fault_stops_before_the_update(tmp_path: Path, fault: str) -> None:
    parameters, loss_of_step = problem()
    before: list[Tensor] = []

    def faulty(step: int) -> Tensor:
        if step < 6:
            return loss_of_step(step)
        before.append(parameters["weight"].detach().clone())
        if fault == "loss":
            return loss_of_step(step) * math.inf
        # A finite loss with an infinite slope.
        return loss_of_step(step) + (parameters["weight"] * 0).abs().sqrt().sum()

    with pytest.raises(
        NumericsError, match=r"stage: the loss .* not finite at step 7\. Lower the learning rate \(0\.05\)\. .* step 6"
    ):
        fit("stage", parameters, faulty, SETTINGS, run=open_run(tmp_path))
    assert torch.equal(parameters["weight"], before[0])
    assert not parameters["weight"].requires_grad


@pytest.mark.parametrize("scores", [[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]])
@pytest.mark.parametrize("fault", ["loss", "observe", "score"])
def test_after_a_fault_the_best_weights_are_in_place(tmp_path: Path, scores: list[float], fault: str) -> None:
    validation, seen, parameters, loss_of_step = scripted(scores, every=4)

    def broken(*given: Any) -> Any:
        raise NumericsError("Something is not finite.")

    def loss(step: int) -> Tensor:
        return loss_of_step(step) * (math.nan if fault == "loss" and step == 9 else 1.0)

    def score() -> float:
        return broken() if len(seen) == 3 else validation.score()

    def observe(step: int) -> dict[str, float]:
        return broken() if fault == "observe" and step == 9 else {}

    judge = Validation(score, every=4)
    with pytest.raises(NumericsError, match=r"finite.* The weights kept are those after step .*, the best") as caught:
        fit("stage", parameters, loss, SETTINGS, validation=judge, observe=observe, run=open_run(tmp_path))
    best = scores.index(0.3)
    assert f"after step {4 * best}, the best on validation (0.3000)" in str(caught.value)
    assert torch.equal(parameters["weight"], seen[best])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters.values())


def test_a_diverging_loss_ends_the_stage_with_its_best_weights(tmp_path: Path) -> None:
    validation, seen, parameters, _ = scripted([0.1, 0.4, 0.3, 0.25], every=20)

    def loss(step: int) -> Tensor:
        # Twice as much as in the beginning, and then ten times: the mean of the latest ten is above three times it
        # when two of them are that high.
        return parameters["weight"].sum() * 1e-6 + (1.0 if step < 20 else 2.0 if step < 70 else 10.0)

    settings = LoopSettings(num_train_steps=200, lr=1e-3, max_loss_ratio=3.0)
    with pytest.raises(
        NumericsError, match=r"stage has diverged: at step 73 the loss is 3\.6, and it was 1 "
    ) as caught:
        fit("stage", parameters, loss, settings, validation=validation, run=open_run(tmp_path))
    assert "Lower the learning rate (0.001). The weights kept are those after step 20" in str(caught.value)
    assert torch.equal(parameters["weight"], seen[1])


@pytest.mark.parametrize(("latest", "has_diverged"), [(0.14, False), (0.16, True)])
def test_a_loss_that_was_next_to_nothing_may_grow(latest: float, has_diverged: bool) -> None:
    """From .01 to .14 nats a token is no divergence, though fourteen times as much."""
    parameters, _ = problem()
    settings = LoopSettings(num_train_steps=60, lr=1e-3, max_loss_ratio=3.0)

    def loss(step: int) -> Tensor:
        return parameters["weight"].sum() * 1e-6 + (0.01 if step < 20 else latest)

    with pytest.raises(NumericsError, match="diverged") if has_diverged else nullcontext():
        fit("stage", parameters, loss, settings)


@pytest.mark.parametrize(("growth", "ratio", "steps"), [(2.9, 3.0, 100), (3.1, 3.0, 30), (1000.0, None, 100)])
def test_a_loss_diverges_beyond_its_ratio_only(growth: float, ratio: float | None, steps: int) -> None:
    parameters, _ = problem()
    settings = LoopSettings(num_train_steps=100, lr=1e-3, max_loss_ratio=ratio)
    made: list[int] = []

    def loss(step: int) -> Tensor:
        made.append(step)
        return parameters["weight"].sum() * 1e-6 + (1.0 if step < 20 else growth)

    if steps == 100:
        assert len(fit("stage", parameters, loss, settings).losses) == 100
    else:
        # Without validation, the weights are those of the last step that was made.
        with pytest.raises(NumericsError, match="diverged: at step 31 .* The weights are those after step 30"):
            fit("stage", parameters, loss, settings)
    assert made == list(range(steps + (steps < 100)))


@pytest.mark.parametrize(
    ("scores", "ratio", "step"),
    [
        ([0.5, 0.6, 0.24], 3.0, 8),
        ([0.6, 0.29], 3.0, 4),
        ([0.5, 0.6, 0.26, 0.3, 0.4, 0.5], 3.0, None),
        # From chance on, or from little, there is nothing to fall from.
        ([0.02, 0.01, 0.0, 0.0, 0.0, 0.0], 3.0, None),
        ([0.02, 0.9, 0.1, 0.1, 0.1, 0.1], 3.0, None),
        ([0.5, 0.6, 0.1, 0.1, 0.1, 0.1], None, None),
        ([-0.4, -0.5, -0.9, -1.0, -1.0, -1.0], 3.0, None),
    ],
)
def test_a_validation_that_falls_to_less_than_half_of_the_first_ends_the_stage(
    tmp_path: Path, scores: list[float], ratio: float | None, step: int | None
) -> None:
    validation, seen, parameters, loss_of_step = scripted(scores, every=4)
    settings = SETTINGS.model_copy(update={"max_loss_ratio": ratio})
    if step is None:
        assert len(fit("stage", parameters, loss_of_step, settings, validation=validation).losses) == 20
        return
    with pytest.raises(NumericsError, match=f"diverged: after step {step} the validation is {scores[-1]}") as caught:
        fit("stage", parameters, loss_of_step, settings, validation=validation, run=open_run(tmp_path))
    best = scores.index(max(scores))
    assert f"The weights kept are those after step {4 * best}, the best" in str(caught.value)
    assert torch.equal(parameters["weight"], seen[best])
    assert records_of(tmp_path, "validation")[-1]["validation"] == scores[-1]


# The directory


@pytest.mark.parametrize(
    ("stages", "asked", "known"),
    [
        (["outer"], "outer", True),
        (["inner-planner"], "inner", True),
        (["alignment-a->b"], "alignment", True),
        (["inner-outer"], "outer", False),
        (["outermost"], "outer", False),
        ([], "outer", False),
    ],
)
def test_a_run_knows_which_stages_it_has(tmp_path: Path, stages: list[str], asked: str, known: bool) -> None:
    run = open_run(tmp_path)
    for stage in stages:
        run.save(stage, State({"w": torch.zeros(1)}, None, {}, Fitted(), {}))
    assert run.has(asked) is known


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (loop, "save_file")], ids=["rest", "weights"])
def test_on_a_full_disk_the_last_saved_state_stays(
    tmp_path: Path, uninterrupted: tuple[Fitted, dict[str, Tensor]], error: Exception, owner: Any, name: str
) -> None:
    parameters, loss_of_step = problem()
    save, calls = getattr(owner, name), [0]

    def full(*given: Any) -> None:
        calls[0] += 1
        save(*given)
        if calls[0] == 2:
            file = next(each for each in given if isinstance(each, Path))
            file.write_bytes(file.read_bytes()[:100])
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OutputError, match=r"cannot save the training state to .*stage: .*(No space|write failed)"):
            fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    names = {"manifest.json", "last-1.safetensors", "rest-1.pt"}
    assert {file.name for file in (tmp_path / "state" / "stage").iterdir()} == names
    assert len(open_run(tmp_path).load("stage").fitted.losses) == 5
    parameters, loss_of_step = problem()
    assert fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path)) == uninterrupted[0]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed = 0, now it is 1"),
        ({"inner": {"lr": 2}}, r"inner\.lr = 1, now it is 2"),
        ({"inner": {"lr": 1, "new": 5}}, r"inner\.new = None, now it is 5"),
    ],
)
def test_a_directory_of_a_run_with_other_settings_is_refused(tmp_path: Path, changes: dict, key: str) -> None:
    first = {"seed": 0, "inner": {"lr": 1}}
    RunDirectory(tmp_path, first)
    RunDirectory(tmp_path, first)
    with pytest.raises(ConfigError, match=key):
        RunDirectory(tmp_path, {**first, **changes})


def test_a_place_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot use"):
        open_run(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(OutputError, match="cannot use"):
        open_run(tmp_path / "other")


@pytest.mark.parametrize("damaged", ["last-4.safetensors", "rest-4.pt", "manifest.json"])
def test_a_damaged_state_is_refused_by_its_file(tmp_path: Path, damaged: str) -> None:
    parameters, loss_of_step = problem()
    fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    file = tmp_path / "state" / "stage" / damaged
    content = file.read_bytes()
    words = r"state/stage is damaged .*delete it" if damaged == "manifest.json" else f"{damaged} is not what was saved"
    for spoilt in (content[:-20], content[:-1] + b"x"):
        file.write_bytes(spoilt)
        with pytest.raises(OutputError, match=words):
            fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))


def test_a_state_of_an_earlier_version_is_not_trained_over(tmp_path: Path) -> None:
    open_run(tmp_path)
    (tmp_path / "state" / "stage.pt").write_bytes(b"as it was")
    parameters, loss_of_step = problem()
    with pytest.raises(OutputError, match=r"stage\.pt is a state of an earlier version"):
        fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))


def test_a_state_is_that_of_what_is_trained(tmp_path: Path) -> None:
    parameters, loss_of_step = problem()
    fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    # The optimizer knows its moments by place: in another order they would be those of another weight.
    turned = dict(reversed(parameters.items()))
    with pytest.raises(OutputError, match="the state of stage .* holds other weights, or in another order"):
        fit("stage", turned, loss_of_step, SETTINGS, run=open_run(tmp_path))


def test_a_manifest_says_what_was_saved(tmp_path: Path) -> None:
    validation, seen, parameters, loss_of_step = scripted([0.1, 0.5, 0.4, 0.3, 0.2], every=5)
    fit("stage", parameters, loss_of_step, SETTINGS, validation=validation, run=open_run(tmp_path))
    place = tmp_path / "state" / "stage"
    manifest = json.loads((place / "manifest.json").read_text())
    assert (manifest["stage"], manifest["step"], manifest["number"]) == ("stage", 20, 4)
    files = manifest["files"]
    # The best was written once, in the first save; what was saved before is gone.
    assert {key: each["file"] for key, each in files.items()} == {
        "last": "last-4.safetensors", "best": "best-1.safetensors", "rest": "rest-4.pt",
    }  # fmt: skip
    assert {file.name for file in place.iterdir()} == {"manifest.json", *(each["file"] for each in files.values())}
    for each in files.values():
        assert hashlib.sha256((place / each["file"]).read_bytes()).hexdigest() == each["sha256"]
    assert (files["best"]["step"], files["best"]["validation"]) == (5, 0.5)
    assert torch.equal(load_file(place / files["best"]["file"])["weight"], seen[1])
    assert torch.equal(load_file(place / files["last"]["file"])["weight"], seen[4])
    assert set(manifest["versions"]) == {"recursivemas", "torch", "transformers", "safetensors", "python"}


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def drawing(stop: int | None, seen: list[float]) -> Callable[[int], Tensor]:
        def loss(step: int) -> Tensor:
            if step == stop:
                raise Killed
            seen.append(torch.rand(()).item())
            return parameters["weight"].square().sum()

        return loss

    parameters, _ = problem()
    whole: list[float] = []
    torch.manual_seed(5)
    fit("stage", parameters, drawing(None, whole), SETTINGS)
    torch.manual_seed(5)
    before: list[float] = []
    parameters, _ = problem()
    with pytest.raises(Killed):
        fit("stage", parameters, drawing(12, before), SETTINGS, run=open_run(tmp_path))
    after: list[float] = []
    torch.manual_seed(6)
    fit("stage", parameters, drawing(None, after), SETTINGS, run=open_run(tmp_path))
    assert before[:10] + after == whole


@pytest.mark.parametrize("setting", ["num_train_steps", "lr", "max_grad_norm", "log_every", "save_every"])
def test_settings_must_be_positive(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        LoopSettings(**{setting: 0})
