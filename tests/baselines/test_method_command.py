"""`recursivemas train --method` from outside: what it writes, what it has cost, and how it fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from recursivemas.cli.main import app
from recursivemas.system import RecursiveSystem

Invoke = Callable[..., Result]
FEW = {"num_train_steps": 2, "batch_size": 4, "lr": 1e-2, "validate_every": 2}


@pytest.fixture
def invoke(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in an empty directory but for a recipe."""
    monkeypatch.chdir(tmp_path)
    loop = {"num_train_steps": 2, "batch_size": 4, "num_samples": 8}
    recipe = {
        "system": str(place / "system"),
        "data": str(place / "rows.jsonl"),
        "output": "runs/tiny",
        "inner": loop,
        "alignment": loop,
        "outer": {**loop, "num_samples": 60, "validate_every": 2},
        "method": dict.fromkeys(("lora", "full", "text"), FEW),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_a_baseline_is_a_system_that_eval_takes(invoke: Invoke, tmp_path: Path) -> None:
    trained = invoke("train", "recipe.yaml", "--method", "full", "--price-per-hour", "3", "--json")
    assert trained.exit_code == 0, trained.output
    said = json.loads(trained.stdout)
    assert said["cost"]["price"] == pytest.approx(3 * said["cost"]["seconds"] / 3600)
    assert json.loads(Path("runs/tiny/full/cost.json").read_text()) == said["cost"]
    assert list(said["cost"]["seconds_by_stage"]) == ["full"]
    system = RecursiveSystem.from_pretrained(said["system"])
    assert (system.training["method"], system.training["cost"]["method"]) == ("full", "full")
    assert said["cost"]["num_trained"] == system.agents["solver"].model.num_parameters
    (tmp_path / "asked.jsonl").write_text('{"question": "Who runs 7 miles?", "answer": "The dog."}\n')
    evaluated = invoke("eval", said["system"], "--data", "asked.jsonl", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert [arm["arm"] for arm in json.loads(evaluated.stdout)["arms"]] == ["solo"]


def test_a_text_system_is_evaluated_in_text(invoke: Invoke, tmp_path: Path) -> None:
    trained = invoke("train", "recipe.yaml", "--method", "text")
    assert trained.exit_code == 0, trained.output
    assert "planner:" in trained.stdout
    assert "together, in text" in trained.stdout
    (tmp_path / "asked.jsonl").write_text('{"question": "Who runs 7 miles?", "answer": "The dog."}\n')
    evaluated = invoke("eval", "runs/tiny/text/system", "--data", "asked.jsonl", "--rounds", "1", "--json")
    assert {arm["arm"] for arm in json.loads(evaluated.stdout)["arms"]} == {"text", "solo", "none"}


def test_links_tell_their_cost_too(invoke: Invoke) -> None:
    trained = invoke("train", "recipe.yaml", "--price-per-hour", "3")
    assert trained.exit_code == 0, trained.output
    assert "Cost of training" in trained.stdout
    cost = json.loads(Path("runs/tiny/cost.json").read_text())
    system = RecursiveSystem.from_pretrained("runs/tiny/system")
    assert cost["trained_parameters"] == {
        "inner": sum(each.numel() for agent in system.agents.values() for each in agent.inner_link.parameters()),
        "outer": sum(each.numel() for link in system.links.values() for each in link.parameters()),
    }
    assert cost["finished"] is True
    assert cost["positions_with_gradient"] > 0
    assert {"inner-planner", "outer"} <= cost["seconds_by_stage"].keys()
    assert system.training["cost"]["flops"] == cost["flops"]
    # What a baseline would be trained with does not make it another run; what that run has cost is counted on.
    assert invoke("train", "recipe.yaml", "--set", "method.full.lr=1e-4").exit_code == 0
    again = json.loads(Path("runs/tiny/cost.json").read_text())
    assert again["flops"] >= cost["flops"]
    assert again["seconds"] > cost["seconds"]


def test_a_dry_run_knows_the_adapters(invoke: Invoke) -> None:
    planned = json.loads(invoke("train", "recipe.yaml", "--method", "lora", "--dry-run", "--json").stdout)
    made = json.loads(invoke("train", "recipe.yaml", "--method", "lora", "--json").stdout)
    assert planned["trained_parameters"] == made["cost"]["num_trained"]
    assert planned["total_parameters"] == made["cost"]["total_parameters"]
    assert not Path("runs/tiny").exists() or Path("runs/tiny/lora").exists()
    for method in ("full", "text", "generalist"):
        shown = invoke("train", "recipe.yaml", "--method", method, "--dry-run")
        assert "trained parameters" in shown.stdout, shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "fulll"), ("'fulll'", "did you mean 'full'")),
        (("--method", "full", "--stage", "outer"), ("--stage", "leave it out")),
        (("--method", "full", "--price-per-hour", "-1"), ("0 or more", "-1")),
        (("--method", "generalist"), ("method.generalist.model",)),
        (("--method", "full", "--set", "method.full.rank=8"), ("rank",)),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(invoke: Invoke, arguments: tuple, words: tuple) -> None:
    result = invoke("train", "recipe.yaml", *arguments)
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(Path("runs").rglob("system"))


def test_several_processes_are_refused(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("train", "recipe.yaml", "--method", "lora")
    assert result.exit_code == 1
    assert "runs in one process, not in 2" in result.stderr
