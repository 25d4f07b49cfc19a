"""Everything that `bench` measures, on the smallest models; and the command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from recursivemas.bench import suite
from recursivemas.bench.subjects import configuration, questions_for
from recursivemas.bench.suite import SECTIONS, Effort, Subject, Suite, sections_for
from recursivemas.cli.main import app
from recursivemas.errors import ConfigError
from recursivemas.system import RecursiveSystem

EFFORT = Effort(repeats=1, quick=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and questions that do not take long."""
    for name, size in (("BATCH_SIZE", 2), ("QUESTION", 5), ("LONG_QUESTION", 9)):
        monkeypatch.setattr(suite, name, size)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def random_subject() -> Subject:
    return Subject.random(configuration("64x1"), device="cpu")


def test_every_section_of_a_random_system(random_subject: Subject) -> None:
    told: list[str] = []
    sections = list(Suite(random_subject, EFFORT, told.append).measure(SECTIONS))
    assert [section.name for section in sections] == list(SECTIONS)
    by_name = {section.name: section for section in sections}
    for name in ("rounds", "latent-steps", "agents", "batch", "prefixes"):
        assert all(row["positions"] == row["by the formula"] for row in by_name[name].rows)
    for name in ("rounds", "latent-steps", "agents", "batch"):
        assert [row["channel"] for row in by_name[name].rows] == ["latent", "latent", "text", "text"]
    assert {row["beginnings of prompts"] for row in by_name["prefixes"].rows} == {"kept", "read anew"}
    assert any("batch" in each for each in told)
    # A model this small is held to nothing but that its messages are right.
    assert all(goal.holds for section in sections for goal in section.goals)
    # Two heads' keys and values, one head of 32 in float32.
    position = next(row for row in by_name["memory"].rows if str(row["what"]).startswith("a position"))
    assert position["MB"] == pytest.approx(2 * 32 * 4 / 1e6)


def test_goals_of_whole_runs_are_set_for_one_size(random_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["rounds", "prefixes"]
    assert not any(section.goals for section in Suite(random_subject, EFFORT).measure(names))
    monkeypatch.setattr(suite, "REFERENCE", (64, 1))
    monkeypatch.setattr(Effort, "some", lambda self, sizes: [1, 4])
    found = [goal for section in Suite(random_subject, EFFORT).measure(names) for goal in section.goals]
    assert [goal.at_most for goal in found] == [4.4, 0.6]


def test_a_system_is_measured_with_its_own_agents(make_system: Callable[..., RecursiveSystem]) -> None:
    system = make_system()
    sections = {each.name: each for each in Suite(Subject.of(system), EFFORT).measure(["latent-step", "rounds"])}
    assert [row["agent"] for row in sections["latent-step"].rows] == [
        role for role in ("planner", "critic", "solver") for _ in range(2)
    ]
    latent, text = sections["rounds"].rows[0], sections["rounds"].rows[-1]
    assert latent["positions"] == latent["by the formula"]
    assert text["by the formula"] == "–"  # what random letters are read as is not known beforehand


def test_what_a_context_has_no_room_for_is_left_out(
    make_system: Callable[..., RecursiveSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make_system()
    for agent in system.agents.values():  # which other tests use, too
        monkeypatch.setattr(agent.model.config, "max_position_embeddings", 100)
    assert not list(Suite(Subject.of(system), EFFORT).measure(["latent-step", "uncached", "rounds", "prefixes"]))


def test_worlds_are_asked_their_own_questions(make_system: Callable[..., RecursiveSystem]) -> None:
    ward = questions_for(make_system(name="ward"), 3)
    assert len(set(ward)) == 3
    assert "train" not in ward[0]
    assert "train" in questions_for(make_system(), 1)[0]


def test_the_floor_is_for_gpus() -> None:
    import torch

    assert "floor" not in sections_for(torch.device("cpu"))
    assert sections_for(torch.device("cuda")) == SECTIONS


@pytest.mark.parametrize("name", ["256", "100x2", "64x0", "0x1", "qwen/qwen3-1.7b"])
def test_configurations_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match=r"256x6"):
        configuration(name)


def test_configurations_of_real_models_are_known() -> None:
    assert configuration("Qwen/Qwen3-1.7B")["num_hidden_layers"] == 28


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "place" / "bench.json"
    result = invoke("--random", "64x1", "--only", "latent-step,memory", "--repeats", 1, "--quick", "--out", file)
    assert result.exit_code == 0, result.output
    assert "A latent step beside a bare cached forward" in result.stdout
    found = json.loads(file.read_text())
    assert [section["name"] for section in found["sections"]] == ["latent-step", "memory"]
    assert found["machine"]["torch"]
    assert found["sections"][0]["rows"][0]["latent step"]["n"] == 1
    assert found["command"].startswith("recursivemas")


def test_the_command_replays_a_column(tmp_path: Path) -> None:
    result = invoke(
        "sequential_light",
        "--replay",
        "table2",
        "--scale",
        64,
        "--benchmarks",
        "Code",
        "--repeats",
        1,
        "--batch-size",
        1,
        "--json",
    )
    assert result.exit_code == 0, result.output
    names = [section["name"] for section in json.loads(result.stdout)["sections"]]
    assert names == ["replay", "replay-cells"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["ward", "--random", "--replay"]),
        (["ward", "--random", "64x1"], ["--random"]),
        (["--random", "65x1"], ["65", "256x6"]),
        (["--random", "64x1", "--only", "latent-steps,round"], ["'round'", "rounds"]),
        (["--random", "64x1", "--repeats", "0"], ["--repeats", "0"]),
        (["--replay", "table3"], ["table3", "table2"]),
        (["--replay", "table2", "--scale", "0"], ["--scale"]),
        (["--replay", "table2", "--benchmarks", "MATH"], ["MATH", "MATH500"]),
        (["--replay", "table2", "--random", "64x1"], ["--random"]),
        (["sequential", "--replay", "table2"], ["sequential", "sequential_light"]),
        (["--random", "64x1", "--benchmarks", "Code"], ["--benchmarks", "--replay"]),
        (["--random", "64x1", "--out", "."], ["directory"]),
        (["ard"], ["ward"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    for word in words:
        assert word in line
