"""The training loop: optimizer, schedule, logging, resume. It knows no stage, no model and no data.

A stage gives the loop its parameters and a function from the number of a step to its loss. Since everything random in
a step follows from its number, a run that was killed and started again goes on as if nothing had happened: same
losses, same weights (float32 on a CPU).
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from recursivemas.config import Config
from recursivemas.errors import ConfigError, NumericsError, OutputError

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Told the stage, steps done, steps in all, and the latest figures."""


class LoopSettings(Config):
    """How one stage is optimised: AdamW with linear warm-up and a cosine schedule."""

    num_train_steps: int = Field(default=300, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    """The highest learning rate, reached after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The learning rate at the end, as a share of the highest."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = Field(default=1.0, gt=0)
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=100, ge=1)
    """Steps between saves of the state that a killed run resumes from."""


class RunDirectory:
    """Where a training run keeps its metrics and its state, so that it can be watched and resumed."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or create the directory. Raises `ConfigError` if it belongs to a run with other settings."""
        self.path = path
        record = path / "config.json"
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        try:
            (path / "state").mkdir(parents=True, exist_ok=True)
            if record.exists():
                _refuse_changes(json.loads(record.read_text(encoding="utf-8")), json.loads(text), path)
            else:
                write_atomically(record, text.encode())
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot use {path} as the directory of a training run: {error}") from None

    def has(self, stage: str) -> bool:
        """Whether any state of a stage (of whatever link) was saved."""
        return any((self.path / "state").glob(f"{stage}-*.pt"))

    def load(self, stage: str) -> dict[str, Any] | None:
        """The saved state of a stage, or None."""
        file = self._state_file(stage)
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises whatever the damage leads to
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise OutputError(f"{file} is damaged ({reason}); delete it to train this stage anew") from None
        return state

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Replace the saved state of a stage, at once or not at all."""
        draft = self._state_file(stage).with_suffix(".draft")
        try:
            torch.save(state, draft)
            draft.replace(self._state_file(stage))
        except (OSError, RuntimeError) as error:
            draft.unlink(missing_ok=True)
            raise OutputError(f"cannot save the training state to {draft.parent}: {error}") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}/metrics.jsonl: {error}") from None

    def forget(self, stage: str, after: int) -> None:
        """Drop the records of a stage after a step: they will be written again."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [each for each in records if each.get("stage") != stage or each.get("step", 0) <= after]
        write_atomically(file, "".join(json.dumps(each) + "\n" for each in kept).encode())

    def _state_file(self, stage: str) -> Path:
        return self.path / "state" / f"{stage.replace('->', '-to-')}.pt"


def fit(
    stage: str,
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    settings: LoopSettings,
    *,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train `parameters` in place; return the loss of every step.

    With a `run` the stage resumes where it was left, and returns at once if it was done. Interrupted (Ctrl-C), it
    saves its state first. Raises `NumericsError` before an update with a loss or gradient that is not finite.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    losses = _resume(stage, parameters, optimizer, run)
    step = len(losses)
    started, first = time.perf_counter(), step
    try:
        for step in range(len(losses), settings.num_train_steps):
            lr = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of_step(step)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise NumericsError(
                    f"{stage}: the loss ({loss.item()}) or its gradient (norm {norm.item()}) is not finite at step "
                    f"{step + 1}; the weights are those of the step before. Lower the learning rate ({settings.lr})"
                )
            optimizer.step()
            losses.append(loss.item())
            is_last = step + 1 == settings.num_train_steps
            if is_last or (step + 1) % settings.log_every == 0:
                rate = (step + 1 - first) / (time.perf_counter() - started)
                figures = {"loss": losses[-1], "grad_norm": norm.item(), "lr": lr, "steps_per_second": round(rate, 2)}
                if run is not None:
                    run.log({"stage": stage, "step": step + 1, **figures})
                if progress is not None:
                    progress(stage, step + 1, settings.num_train_steps, figures)
            if run is not None and (is_last or (step + 1) % settings.save_every == 0):
                run.save(stage, _state(parameters, optimizer, losses))
    except KeyboardInterrupt:
        # Between a step's update and its record there is nothing to interrupt but this: losses count the updates.
        if run is not None and len(losses) == _updates(optimizer):
            run.save(stage, _state(parameters, optimizer, losses))
        raise
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses


def learning_rate(step: int, settings: LoopSettings) -> float:
    """The learning rate of a step (counted from 0): linear warm-up, then half a cosine."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    length = max(settings.num_train_steps - settings.warmup_steps, 1)
    wave = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / length))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * wave)


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a file, at once or not at all."""
    draft = file.with_name(file.name + ".draft")
    with draft.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def _state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]) -> Any:
    weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    return {"losses": list(losses), "parameters": weights, "optimizer": optimizer.state_dict()}


def _resume(
    stage: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, run: RunDirectory | None
) -> list[float]:
    state = run.load(stage) if run is not None else None
    if run is None:
        return []
    if state is None:
        run.forget(stage, after=0)
        return []
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    losses: list[float] = state["losses"]
    run.forget(stage, after=len(losses))
    return losses


def _updates(optimizer: torch.optim.Optimizer) -> int:
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def _refuse_changes(old: Any, new: Any, path: Path, key: str = "") -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            _refuse_changes(old.get(name), new.get(name), path, f"{key}.{name}" if key else name)
    elif old != new:
        raise ConfigError(
            f"{path} belongs to a run with {key} = {old}, now it is {new}; set it back to resume that run, or give "
            "another output directory (--set output=...)"
        )
