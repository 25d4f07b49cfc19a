"""Trackers: by accelerate's names, only where they are installed, and never in the way of training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking

from recursivemas.errors import ConfigError, OutputError
from recursivemas.training.recipe import Recipe
from recursivemas.training.trackers import Trackers, check_trackers


class Recorder:
    """A tracker that keeps what it is told."""

    requires_logging_directory = False
    made: list["Recorder"] = []
    failing: set[str] = set()

    def __init__(self, *names: str, **options: Any) -> None:
        self.names = names
        self.options = options
        self.events: list[Any] = []

    def start(self) -> None:
        if "start" in self.failing:
            raise RuntimeError("no key")
        type(self).made.append(self)

    def log(self, values: dict[str, float], step: int) -> None:
        if "log" in self.failing:
            raise ConnectionError("no network")
        self.events.append((step, values))

    def finish(self) -> None:
        self.events.append("finished")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """Stands for W&B, trackio and a tracker of the user's own."""
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "failing", set())
    for name in ("wandb", "trackio", "my_own"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    installed = [SimpleNamespace(value=name) for name in ("wandb", "trackio", "tensorboard")]
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: installed)
    return Recorder


def test_every_stage_is_a_run_of_its_own(recorder: type[Recorder], tmp_path: Path) -> None:
    trackers = Trackers(["wandb", "trackio", "my_own", "wandb"], tmp_path / "ward")
    trackers.log("inner-planner", 10, {"loss": 0.5})
    trackers.log("inner-planner", 20, {"loss": 0.4})
    trackers.finish("inner-planner")
    trackers.log("alignment-a->b", 10, {"loss": 0.3, "lr": 0.1})
    assert len(recorder.made) == 6
    wandb, trackio, own, later = recorder.made[:4]
    assert wandb.names == trackio.names == ("recursivemas",)
    assert wandb.options["name"] == trackio.options["name"] == "ward inner-planner"
    assert wandb.options["resume"] == "allow"
    assert own.names == ("recursivemas ward inner-planner",)
    assert own.events == [(10, {"inner-planner/loss": 0.5}), (20, {"inner-planner/loss": 0.4}), "finished"]
    assert later.options["name"] == "ward alignment-a-to-b"
    assert later.events == [(10, {"alignment-a->b/loss": 0.3, "alignment-a->b/lr": 0.1})]
    # A run that is started again goes on in the same tracked run; another does not.
    for place, same in ((tmp_path / "ward", True), (tmp_path / "other", False)):
        Trackers(["wandb"], place).log("inner-planner", 30, {"loss": 0.1})
        assert (recorder.made[-1].options["id"] == wandb.options["id"]) is same


def test_a_tracker_that_fails_is_left_out(recorder: type[Recorder], tmp_path: Path) -> None:
    trackers = Trackers(["wandb"], tmp_path)
    recorder.failing.add("log")
    with pytest.warns(UserWarning, match=r"wandb has failed .*ConnectionError: no network.*metrics\.jsonl"):
        trackers.log("outer", 1, {"loss": 1.0})
    trackers.log("outer", 2, {"loss": 1.0})
    recorder.failing.clear()
    recorder.failing.add("start")
    with pytest.raises(OutputError, match="wandb cannot be started .*no key"):
        Trackers(["wandb"], tmp_path).log("outer", 1, {"loss": 1.0})


def test_trackers_that_cannot_be_had_are_refused(recorder: type[Recorder], tmp_path: Path) -> None:
    check_trackers(["wandb", "my_own", "tensorboard"])
    with pytest.raises(ConfigError, match="unknown tracker 'wandbb': did you mean 'wandb'"):
        check_trackers(["wandbb"])
    with pytest.raises(ConfigError, match="'comet_ml' is not installed; pip install comet-ml"):
        Trackers(["comet_ml"], tmp_path)
    given = {"system": "ward", "world": {"name": "ward"}, "output": "x"}
    assert Recipe(**given, trackers=["wandb"]).trackers == ("wandb",)
    with pytest.raises(ConfigError, match="aim"):
        Recipe(**given, trackers=["aim"])
