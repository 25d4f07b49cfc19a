"""Trackers: where the metrics of a run go beside metrics.jsonl, by the names that accelerate has for them.

Each stage is a run of its own in the tracker, with its own steps: `recursivemas` is the project, the directory of the
training run names the group. A run that was killed goes on in the same tracked run where the tracker can do that. What
a tracker does with metrics is its own business: one that fails while training is dropped with a warning, since
metrics.jsonl has it all. Knows names, numbers and a directory; knows nothing of models or losses.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recursivemas.errors import ConfigError, OutputError, unknown_name

PROJECT = "recursivemas"


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(each, "value", each)) for each in get_available_trackers()}
    built_in = {"tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError("trackers: " + unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS))
        if name in built_in and name not in available:
            raise ConfigError(
                f"trackers: the package of '{name}' is not installed; pip install {name.replace('_', '-')}, or leave "
                "it out (metrics.jsonl is written in any case)"
            )


class Trackers:
    """The trackers of one training run."""

    def __init__(self, names: Sequence[str] | None, place: Path) -> None:
        """`names` are accelerate's; None is TensorBoard if it is installed. Raises `ConfigError`.

        Trackers that keep files do so below `place`.
        """
        if names is None:
            names = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
        check_trackers(names)
        self._place = place
        self._names = list(dict.fromkeys(names))
        self._running: dict[tuple[str, str], Any] = {}

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Hand on figures of a stage. Raises `OutputError` if a tracker does not start."""
        for name in list(self._names):
            tracker = self._running.get((name, stage)) or self._start(name, stage, step)
            try:
                tracker.log({f"{stage}/{key}": value for key, value in figures.items()}, step=step)
            except Exception as error:  # whatever a service makes of it: training does not depend on it
                self._names.remove(name)
                reason = " ".join(str(error).split())[:200]
                warnings.warn(
                    f"the tracker {name} has failed and is left out from now on ({type(error).__name__}: {reason}); "
                    "metrics.jsonl has everything",
                    stacklevel=2,
                )

    def finish(self, stage: str) -> None:
        """Close what is open for a stage."""
        for name, each in [key for key in self._running if key[1] == stage]:
            tracker = self._running.pop((name, each))
            try:
                tracker.finish()
            except Exception as error:  # see `log`
                warnings.warn(f"the tracker {name} did not finish ({error})", stacklevel=2)

    def _start(self, name: str, stage: str, step: int) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        made = LOGGER_TYPE_TO_CLASS[name]
        label = stage.replace("->", "-to-")
        try:
            if name == "tensorboard":
                # Records of an earlier, killed run from this step on are hidden.
                tracker = made(label, str(self._place / name), purge_step=step)
            elif made.requires_logging_directory:
                tracker = made(f"{self._place.name} {label}", str(self._place / name))
            else:
                tracker = made(*self._named(name, label), **self._options(name, label))
            # Accelerate starts a tracker only where its `Accelerator` does.
            tracker.start()
        except Exception as error:  # an unknown key, no network, no disk: each has its own classes
            reason = " ".join(str(error).split())[:200]
            raise OutputError(
                f"the tracker {name} cannot be started ({type(error).__name__}: {reason}); mend it, or leave it out of "
                "`trackers`"
            ) from None
        self._running[name, stage] = tracker
        return tracker

    def _named(self, name: str, label: str) -> tuple[str, ...]:
        return (PROJECT,) if name in ("wandb", "trackio") else (f"{PROJECT} {self._place.name} {label}",)

    def _options(self, name: str, label: str) -> dict[str, Any]:
        run = f"{self._place.name} {label}"
        if name == "trackio":
            return {"name": run, "group": self._place.name, "resume": "allow"}
        if name == "wandb":
            identity = hashlib.sha256(f"{self._place.resolve()} {label}".encode()).hexdigest()[:16]
            return {"id": identity, "name": run, "group": self._place.name, "resume": "allow"}
        return {}
