"""The training loop: optimizer, schedule, validation, logging, resume. It knows no stage, no model and no data.

A stage gives the loop its parameters and a function from the number of a step to its loss, whole or in parts. Since
everything random in a step follows from its number, a run that was killed and started again goes on as if nothing had
happened: same losses, same weights (float32 on a CPU). A stage with a `Validation` ends with the weights that did best
on it.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from recursivemas.config import Config
from recursivemas.errors import ConfigError, NumericsError, OutputError
from recursivemas.training.processes import Processes

Losses = Tensor | Iterable[Tensor]
"""The loss of a step, or parts that add up to it: gradients of one are computed before the next is made."""
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
    max_loss_ratio: float | None = Field(default=None, gt=1)
    """Stop when the mean loss of ten steps is so many times what it was in the beginning, or a validation less than
    half of the first: the stage has diverged."""
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=100, ge=1)
    """Steps between saves of the state that a killed run resumes from."""


@dataclass(frozen=True)
class Validation:
    """When a stage is judged, by what, and when it has gone on for long enough."""

    score: Callable[[], float]
    """The higher, the better."""
    every: int
    """Steps between two validations; one is made before the first step, and one after the last."""
    patience: int | None = None
    """The stage ends after so many validations in a row without a better score."""


@dataclass
class Fitted:
    """How the training of a stage went."""

    losses: list[float] = field(default_factory=list)
    """Of every step."""
    scores: dict[int, float] = field(default_factory=dict)
    """Validation scores by the number of steps done."""
    stopped: str | None = None
    """Why the stage ended before its last step."""
    movement: dict[str, float] = field(default_factory=dict)
    """How far each parameter went, relative to its own norm at the start of the stage."""

    @property
    def best_step(self) -> int:
        """Steps done when the weights were best: those of the first best validation, or the last."""
        return max(self.scores, key=lambda step: (self.scores[step], -step)) if self.scores else len(self.losses)


class RunDirectory:
    """Where a training run keeps its metrics and its state, so that it can be watched and resumed."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, tensorboard: bool = False, is_first: bool = True
    ) -> None:
        """Open or create the directory. Raises `ConfigError` if it belongs to a run with other settings.

        With `tensorboard` metrics also go to event files in `PATH/tensorboard`, if TensorBoard is installed. Of several
        processes that share a run all read its state, and the first alone (`is_first`) writes.
        """
        self.path = path
        self._writes = is_first
        self._writers: dict[str, Any] = {}
        self._tensorboard = tensorboard
        record = path / "config.json"
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        try:
            (path / "state").mkdir(parents=True, exist_ok=True)
            if record.exists():
                _refuse_changes(json.loads(record.read_text(encoding="utf-8")), json.loads(text), path)
            elif self._writes:
                write_atomically(record, text.encode())
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot use {path} as the directory of a training run: {error}") from None

    def has(self, stage: str) -> bool:
        """Whether any state of a stage (of whatever link) was saved."""
        place = self.path / "state"
        return (place / f"{stage}.pt").exists() or any(place.glob(f"{stage}-*.pt"))

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
        if not self._writes:
            return
        draft = self._state_file(stage).with_suffix(".draft")
        try:
            torch.save(state, draft)
            draft.replace(self._state_file(stage))
        except (OSError, RuntimeError) as error:
            draft.unlink(missing_ok=True)
            raise OutputError(f"cannot save the training state to {draft.parent}: {error}") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if not self._writes:
            return
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}/metrics.jsonl: {error}") from None
        writer = self._writer(record["stage"], record["step"])
        if writer is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    writer.add_scalar(f"{record['stage']}/{name}", value, record["step"])
            writer.flush()

    def _writer(self, stage: str, step: int) -> Any:
        """The event file of a stage; records of an earlier, killed run from this step on are hidden by it."""
        if self._tensorboard and stage not in self._writers:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # an optional dependency (recursivemas[trackers]); metrics.jsonl has it all
                self._tensorboard = False
                return None
            place = self.path / "tensorboard" / _file_name(stage)
            self._writers[stage] = SummaryWriter(log_dir=str(place), purge_step=step)
        return self._writers.get(stage)

    def forget(self, stage: str, after: int) -> None:
        """Drop the records of a stage after a step: they will be written again."""
        file = self.path / "metrics.jsonl"
        if not file.exists() or not self._writes:
            return
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [each for each in records if each.get("stage") != stage or each.get("step", 0) <= after]
        write_atomically(file, "".join(json.dumps(each) + "\n" for each in kept).encode())

    def _state_file(self, stage: str) -> Path:
        return self.path / "state" / f"{_file_name(stage)}.pt"


ALONE = Processes()


def fit(
    stage: str,
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: Callable[[int], Losses],
    settings: LoopSettings,
    *,
    lr_ratios: Mapping[str, float] | None = None,
    observe: Callable[[int], dict[str, float]] | None = None,
    validation: Validation | None = None,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Fitted:
    """Train `parameters` in place.

    With several `processes` each computes its part of every loss, and of every validation; gradients and losses are
    added up.

    `lr_ratios` gives parameters a share of the learning rate of their own. `observe` is called after every backward
    pass, before gradients are clipped; what it returns is logged. With a `validation` the weights at the end are those
    that scored best. With a `run` the stage resumes where it was left, and returns at once if it was done; interrupted
    (Ctrl-C), it saves its state first.

    Raises `NumericsError` before an update with a loss or gradient that is not finite, and when the loss has grown
    beyond `max_loss_ratio`; the weights are then the best so far, or without a validation those of the step before.
    """
    job = _Fitting(stage, parameters, settings, lr_ratios or {}, validation, run, processes)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    done = job.fitted
    first, started = len(done.losses), time.perf_counter()
    try:
        if not done.scores:
            job.validate(progress)
        job.is_whole = True
        for step in range(first, settings.num_train_steps if done.stopped is None else first):
            figures = job.update(step, loss_of_step, observe)
            is_last = step + 1 == settings.num_train_steps
            job.judge(is_last, progress)
            if is_last or done.stopped or (step + 1) % settings.log_every == 0:
                seconds = (time.perf_counter() - started) / (step + 1 - first)
                job.record(figures, seconds, progress)
            if is_last or done.stopped or (step + 1) % settings.save_every == 0:
                job.save()
            job.is_whole = True
            if done.stopped:
                break
    except KeyboardInterrupt:
        if job.is_whole:
            job.save()
        raise
    except NumericsError as error:
        said = str(error)
        if not said.startswith(stage):
            said = f"{stage}, step {len(done.losses) + 1}: {said}"
        raise NumericsError(f"{said} {job.keep_best()}") from None
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    job.keep_best()
    done.movement = job.movement()
    return done


_FIRST, _LATEST = 5, 10
"""Steps whose median loss is the beginning, and steps whose mean loss is compared with it."""


class _Fitting:
    """The state of a stage while it is trained."""

    def __init__(
        self,
        stage: str,
        parameters: Mapping[str, nn.Parameter],
        settings: LoopSettings,
        lr_ratios: Mapping[str, float],
        validation: Validation | None,
        run: RunDirectory | None,
        processes: Processes,
    ) -> None:
        self.stage = stage
        self.processes = processes
        self.parameters = parameters
        self.settings = settings
        self.validation = validation
        self.run = run
        self.start = _copied(parameters)
        self.best: dict[str, Tensor] | None = None
        self.fitted = Fitted()
        self.is_whole = False
        """Whether a state saved now would be one from which an uninterrupted run goes on."""
        # One group for each learning rate: an optimizer with a group for each parameter would be slow.
        of_ratio: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            of_ratio.setdefault(lr_ratios.get(name, 1.0), []).append(parameter)
        groups = [{"params": each, "ratio": ratio} for ratio, each in of_ratio.items()]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        if run is not None:
            self._resume(run)

    def update(
        self,
        step: int,
        loss_of_step: Callable[[int], Losses],
        observe: Callable[[int], dict[str, float]] | None,
    ) -> dict[str, float]:
        """One step of the optimizer; return what is known of it."""
        lr = learning_rate(step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.zero_grad()
        with self.processes.together():
            loss = self._backward(loss_of_step(step))
        loss = self.processes.total(loss)
        self.processes.add(self._gradients())
        with self.processes.together():
            observed = observe(step) if observe is not None else {}
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        losses = self.fitted.losses
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise NumericsError(
                f"{self.stage}: the loss ({loss}) or its gradient (norm {norm.item()}) is not finite at step "
                f"{step + 1}. Lower the learning rate ({self.settings.lr})."
            )
        ratio = self.settings.max_loss_ratio or math.inf
        if len(losses) >= _FIRST + _LATEST and _mean(losses[-_LATEST:]) > ratio * median(losses[:_FIRST]):
            raise NumericsError(
                f"{self.stage} has diverged: at step {step + 1} the loss is {_mean(losses[-_LATEST:]):.4g}, and it was "
                f"{median(losses[:_FIRST]):.4g} in the beginning. Lower the learning rate ({self.settings.lr})."
            )
        self.is_whole = False
        self.optimizer.step()
        losses.append(loss)
        return {"loss": losses[-1], "grad_norm": norm.item(), "lr": lr, **observed}

    @staticmethod
    def _backward(losses: Losses) -> float:
        """Compute the gradients of a loss, or of each of its parts; return the loss."""
        total = 0.0
        for part in [losses] if isinstance(losses, Tensor) else losses:
            part.backward()
            total += part.item()
        return total

    def _gradients(self) -> list[Tensor]:
        """The gradient of every parameter, in one order in all processes; zeros where nothing has arrived."""
        if self.processes.count > 1:
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def judge(self, is_last: bool, progress: Progress | None) -> None:
        """Validate when it is time, and see whether to go on."""
        if self.validation is None or not (is_last or len(self.fitted.losses) % self.validation.every == 0):
            return
        self.validate(progress)
        scores, best = self.fitted.scores, self.fitted.best_step
        score = scores[len(self.fitted.losses)]
        if self.settings.max_loss_ratio is not None and score < scores[0] / 2 and scores[0] > 0.1:
            # Losses of answers at chance are not much above those of good ones: validation sees it first.
            raise NumericsError(
                f"{self.stage} has diverged: after step {len(self.fitted.losses)} the validation is {score:.4f}, less "
                f"than half of what it was at the start. Lower the learning rate ({self.settings.lr})."
            )
        since = sum(step > best for step in scores)
        if self.validation.patience is not None and since >= self.validation.patience and not is_last:
            self.fitted.stopped = f"no better validation since step {best}, {since} validations ago"

    def validate(self, progress: Progress | None) -> None:
        """Score the weights as they are, and keep them if no earlier ones were better."""
        if self.validation is None:
            return
        step = len(self.fitted.losses)
        score = self.validation.score()
        if not self.fitted.scores or score > max(self.fitted.scores.values()):
            self.best = _copied(self.parameters)
        self.fitted.scores[step] = score
        if self.run is not None:
            self.run.log({"stage": self.stage, "step": step, "validation": score})
        if progress is not None:
            progress(self.stage, step, self.settings.num_train_steps, {"validation": score})

    def record(self, figures: dict[str, float], seconds: float, progress: Progress | None) -> None:
        """Log the step that was just made; `seconds` is what a step takes."""
        step, total = len(self.fitted.losses), self.settings.num_train_steps
        figures |= {"steps_per_second": float(f"{1 / seconds:.4g}"), "seconds_left": round((total - step) * seconds, 1)}
        figures |= {"memory_mb": _peak_memory(self.parameters)}
        figures |= {f"moved/{name}": round(value, 6) for name, value in self.movement().items()}
        if self.run is not None:
            self.run.log({"stage": self.stage, "step": step, **figures})
        if progress is not None:
            progress(self.stage, step, total, figures)

    def keep_best(self) -> str:
        """Go back to the best weights; return in words which those are."""
        if self.best is None:
            return f"The weights are those after step {len(self.fitted.losses)}."
        _copy(self.best, self.parameters)
        step = self.fitted.best_step
        return f"The weights kept are those after step {step}, the best on validation ({self.fitted.scores[step]:.4f})."

    def movement(self) -> dict[str, float]:
        """How far each parameter has gone; one that started at zero is compared with where it is."""
        found = {}
        for name, parameter in self.parameters.items():
            start, now = self.start[name], parameter.detach().cpu()
            size = start.norm().item() or now.norm().item() or 1.0
            found[name] = (now - start).norm().item() / size
        return found

    def save(self) -> None:
        if self.run is not None:
            self.run.save(
                self.stage,
                {
                    "losses": list(self.fitted.losses),
                    "scores": dict(self.fitted.scores),
                    "stopped": self.fitted.stopped,
                    "parameters": _copied(self.parameters),
                    "best": self.best,
                    "optimizer": self.optimizer.state_dict(),
                },
            )

    def _resume(self, run: RunDirectory) -> None:
        state = run.load(self.stage)
        if state is None:
            run.forget(self.stage, after=-1)
            return
        _copy(state["parameters"], self.parameters)
        self.optimizer.load_state_dict(state["optimizer"])
        self.fitted = Fitted(state["losses"], state["scores"], state["stopped"])
        self.best = state["best"]
        run.forget(self.stage, after=len(self.fitted.losses))


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


def _copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _peak_memory(parameters: Mapping[str, nn.Parameter]) -> int:
    """The most memory used so far, in MiB: of the GPU that holds the parameters, or else of this process."""
    device = next(iter(parameters.values())).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def _file_name(stage: str) -> str:
    return stage.replace("->", "-to-")


def _refuse_changes(old: Any, new: Any, path: Path, key: str = "") -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            _refuse_changes(old.get(name), new.get(name), path, f"{key}.{name}" if key else name)
    elif old != new:
        raise ConfigError(
            f"{path} belongs to a run with {key} = {old}, now it is {new}; set it back to resume that run, or give "
            "another output directory (--set output=...)"
        )
