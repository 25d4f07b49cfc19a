"""The training loop: a known optimum, its schedule, and that a stopped run goes on as if nothing had happened."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recursivemas.errors import ConfigError, NumericsError, OutputError
from recursivemas.training.loop import LoopSettings, RunDirectory, fit, learning_rate

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
def uninterrupted() -> tuple[list[float], dict[str, Tensor]]:
    parameters, loss_of_step = problem()
    return fit("stage", parameters, loss_of_step, SETTINGS), {name: p.detach() for name, p in parameters.items()}


def test_a_known_optimum_is_found() -> None:
    parameters, loss_of_step = problem()
    losses = fit("stage", parameters, loss_of_step, LoopSettings(num_train_steps=400, lr=0.05))
    assert losses[-1] < 1e-3 * losses[0]
    assert len(losses) == 400


def test_training_is_the_same_twice(uninterrupted: tuple[list[float], dict[str, Tensor]]) -> None:
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


# Metrics


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
    )
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == [("stage", step, 20) for step in range(2, 21, 2)]
    assert [record["step"] for record in records] == list(range(2, 21, 2))
    assert [record["loss"] for record in records] == losses[1::2]
    assert records[0]["lr"] == pytest.approx(learning_rate(1, SETTINGS))


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
    tmp_path: Path, uninterrupted: tuple[list[float], dict[str, Tensor]], interrupt: Any, step: int
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
    tmp_path: Path, uninterrupted: tuple[list[float], dict[str, Tensor]], method: str, call: int, after: bool
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
    tmp_path: Path, uninterrupted: tuple[list[float], dict[str, Tensor]]
) -> None:
    class Killed(BaseException):
        """What no code can answer, such as SIGKILL."""

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

    with pytest.raises(NumericsError, match=r"stage: the loss .* not finite at step 7; .* Lower the learning rate"):
        fit("stage", parameters, faulty, SETTINGS, run=open_run(tmp_path))
    assert torch.equal(parameters["weight"], before[0])
    assert not parameters["weight"].requires_grad


# The directory


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


def test_a_damaged_state_is_refused_by_its_file(tmp_path: Path) -> None:
    parameters, loss_of_step = problem()
    fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))
    file = tmp_path / "state" / "stage.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OutputError, match=r"stage\.pt is damaged .*delete it"):
        fit("stage", parameters, loss_of_step, SETTINGS, run=open_run(tmp_path))


@pytest.mark.parametrize("setting", ["num_train_steps", "lr", "max_grad_norm", "log_every", "save_every"])
def test_settings_must_be_positive(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        LoopSettings(**{setting: 0})
