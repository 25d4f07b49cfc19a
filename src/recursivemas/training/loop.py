"""The training loop: optimizer, schedule, validation, logging, resume. It knows no stage, no model and no data.

A stage gives the loop its parameters and a function from the number of a step to its loss, whole or in parts. Since
everything random in a step follows from its number, a run that was killed and started again goes on as if nothing had
happened: same losses, same weights (float32 on a CPU). A stage with a `Validation` ends with the weights that did best
on it.

    metrics.jsonl                every record
    state/STAGE/manifest.json    what was saved last: the step, the hash of each file, the versions of the libraries
    state/STAGE/*.safetensors    the weights after that step (last), and those that did best (best)
    state/STAGE/*.pt             optimizer, losses, scores, random numbers; data and schedule follow from the step

The manifest is replaced at once, when all it names is on the disk: before, the state saved earlier holds, and after it
the new one. Only what is trained is ever saved, never an agent.
"""

import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recursivemas.config import Config
from recursivemas.errors import ConfigError, NumericsError, OutputError
from recursivemas.training.processes import Processes
from recursivemas.training.trackers import Trackers

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


@dataclass(frozen=True)
class State:
    """What a stage goes on from: between two steps, nothing else is known of it."""

    parameters: dict[str, Tensor]
    best: dict[str, Tensor] | None
    """Those that did best on validation so far."""
    optimizer: dict[str, Any]
    fitted: Fitted
    random: dict[str, Any]
    """Of the generators of PyTorch, by device. Nothing here draws from them, but a model with dropout would."""


MANIFEST = "manifest.json"


class RunDirectory:
    """Where a training run keeps its metrics and its state, so that it can be watched and resumed."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        trackers: Sequence[str] | None = (),
        is_first: bool = True,
    ) -> None:
        """Open or create the directory. Raises `ConfigError` if it belongs to a run with other settings.

        Metrics also go to `trackers` (see there). Of several processes that share a run the first alone (`is_first`)
        reads and writes; to the others it is as if nothing were there.
        """
        self.path = path
        self._writes = is_first
        self._trackers = Trackers(trackers, path)
        if not is_first:
            return
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
        state = self.path / "state"
        return (state / stage / MANIFEST).exists() or any(state.glob(f"{stage}-*/{MANIFEST}"))

    def load(self, stage: str) -> State | None:
        """The saved state of a stage, or None. Raises `OutputError` for one that is not what was saved."""
        place = self._state_of(stage)
        earlier = place.with_name(f"{place.name}.pt")
        if self._writes and earlier.exists():
            raise OutputError(
                f"{earlier} is a state of an earlier version of this package, from which this one cannot go on; delete "
                "it to train this stage anew, or give another output directory"
            )
        if not self._writes or not (place / MANIFEST).exists():
            return None
        try:
            files: dict[str, dict[str, str]] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
            for each in files.values():
                if _sha256(place / each["file"]) != each["sha256"]:
                    raise ValueError(f"{each['file']} is not what was saved")
            rest = torch.load(place / files["rest"]["file"], weights_only=True, map_location="cpu")
            best = load_file(place / files["best"]["file"]) if "best" in files else None
            fitted = Fitted(rest["losses"], rest["scores"], rest["stopped"])
            last = load_file(place / files["last"]["file"])
            return State({name: last[name] for name in rest["names"]}, best, rest["optimizer"], fitted, rest["random"])
        except Exception as error:  # torch raises whatever the damage leads to
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise OutputError(f"{place} is damaged ({reason}); delete it to train this stage anew") from None

    def save(self, stage: str, state: State) -> None:
        """Replace the saved state of a stage, at once or not at all. Raises `OutputError`."""
        if not self._writes:
            return
        place = self._state_of(stage)
        new: list[Path] = []
        try:
            place.mkdir(parents=True, exist_ok=True)
            before = self._manifest(stage)
            number = int(before.get("number", 0)) + 1
            files: dict[str, dict[str, Any]] = {}

            def add(key: str, file: Path, **more: Any) -> None:
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                files[key] = {"file": file.name, "sha256": _sha256(file), **more}

            new.append(place / f"last-{number}.safetensors")
            save_file(_contiguous(state.parameters), new[-1])
            add("last", new[-1])
            best_step = state.fitted.best_step
            if state.best is not None and before.get("files", {}).get("best", {}).get("step") == best_step:
                files["best"] = before["files"]["best"]  # still the best: it need not be written again
            elif state.best is not None:
                new.append(place / f"best-{number}.safetensors")
                save_file(_contiguous(state.best), new[-1])
                add("best", new[-1], step=best_step, validation=state.fitted.scores[best_step])
            rest = {
                "names": list(state.parameters),
                "optimizer": state.optimizer,
                "losses": list(state.fitted.losses),
                "scores": dict(state.fitted.scores),
                "stopped": state.fitted.stopped,
                "random": state.random,
            }
            new.append(place / f"rest-{number}.pt")
            torch.save(rest, new[-1])
            add("rest", new[-1])
            manifest = {
                "stage": stage,
                "step": len(state.fitted.losses),
                "number": number,
                "stopped": state.fitted.stopped,
                "files": files,
                "versions": _versions(),
            }
            write_atomically(place / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        except (OSError, RuntimeError, SafetensorError) as error:
            for file in new:
                file.unlink(missing_ok=True)
            raise OutputError(f"cannot save the training state to {place}: {error}; the last one stays") from None
        kept = {MANIFEST, *(each["file"] for each in files.values())}
        for file in place.iterdir():
            if file.name not in kept:
                file.unlink(missing_ok=True)

    def _manifest(self, stage: str) -> dict[str, Any]:
        """What was saved of a stage; empty if nothing was, or it cannot be read, so that all is written anew."""
        try:
            found = json.loads((self._state_of(stage) / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if not self._writes:
            return
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}/metrics.jsonl: {error}") from None
        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, (int, float))}
        self._trackers.log(record["stage"], record["step"], numbers)

    def finish(self, stage: str) -> None:
        """Close what is open for a stage that is done."""
        self._trackers.finish(stage)

    def forget(self, stage: str, after: int) -> None:
        """Drop the records of a stage after a step: they will be written again."""
        file = self.path / "metrics.jsonl"
        if not file.exists() or not self._writes:
            return
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [each for each in records if each.get("stage") != stage or each.get("step", 0) <= after]
        write_atomically(file, "".join(json.dumps(each) + "\n" for each in kept).encode())

    def _state_of(self, stage: str) -> Path:
        return self.path / "state" / _file_name(stage)


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
    return job.finish()


_FIRST, _LATEST = 5, 10
"""Steps whose median loss is the beginning, and steps whose mean loss is compared with it."""
_LITTLE = 0.05
"""A beginning below this, in nats a token, counts as this: from .02 to .06 a stage has not diverged."""


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
        start = max(median(losses[:_FIRST]), _LITTLE) if losses else _LITTLE
        if len(losses) >= _FIRST + _LATEST and _mean(losses[-_LATEST:]) > ratio * start:
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
        with self.processes.together():
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

    def finish(self) -> Fitted:
        """Put the best weights in place, and say how it went."""
        self.keep_best()
        self.fitted.movement = self.movement()
        if self.run is not None:
            self.run.finish(self.stage)
        return self.fitted

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
            state = State(
                _copied(self.parameters), self.best, self.optimizer.state_dict(), self.fitted, _random_states()
            )
            self.run.save(self.stage, state)

    def _resume(self, run: RunDirectory) -> None:
        # The first process alone reads, so that all of them go on from one state, whatever the others can see.
        state = self.processes.from_first(lambda: run.load(self.stage))
        if state is None:
            run.forget(self.stage, after=-1)
            return
        if list(state.parameters) != list(self.parameters):
            raise OutputError(
                f"the state of {self.stage} in {run.path} holds other weights, or in another order, than are trained "
                "now; delete it to train this stage anew, or give another output directory"
            )
        _copy(state.parameters, self.parameters)
        self.optimizer.load_state_dict(state.optimizer)
        self.fitted = state.fitted
        self.best = state.best
        _set_random_states(state.random)
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


@cache
def _versions() -> dict[str, str]:
    libraries = ("recursivemas", "torch", "transformers", "safetensors")
    return {**{name: version(name) for name in libraries}, "python": platform.python_version()}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


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
