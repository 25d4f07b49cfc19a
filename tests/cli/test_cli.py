"""The command line from outside: what it prints, what it writes, and how it fails (one line, no traceback)."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner, Result

from recursivemas.checkpoint import BUNDLED
from recursivemas.cli.main import app
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in an empty directory."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run(*arguments: str, **options: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict) -> Path:
    """A random system on disk."""
    directory = tmp_path_factory.mktemp("saved") / "system"
    roles = dict(zip(("planner", "critic", "solver"), tiny_models.values(), strict=True))
    system = RecursiveSystem.build(agents=roles, num_rounds=2, num_latent_steps=2, max_new_tokens=6, name="tiny")
    system.save_pretrained(directory)
    return directory


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 1, and exactly one line on stderr, that says these words."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# What every verb promises


def test_every_verb_teaches_by_an_example(invoke: Invoke) -> None:
    assert invoke("--help").exit_code == 0
    for verb in ("bench", "demo", "run", "train", "eval", "tune", "import", "export", "push", "world"):
        shown = invoke(verb, "--help").stdout
        assert "Example:" in shown
        assert f"recursivemas {verb}" in shown
    for verb in ("check", "show"):
        assert f"recursivemas pattern {verb}" in invoke("pattern", verb, "--help").stdout
    assert "recursivemas inspect links" in invoke("inspect", "links", "--help").stdout
    assert "recursivemas data build" in invoke("data", "build", "--help").stdout


def test_options_are_frozen() -> None:
    """A new option is a decision: it changes this list too."""
    found = {command.name: sorted(_options(command.callback)) for command in app.registered_commands}
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            found[f"{group.name} {command.name}"] = sorted(_options(command.callback))
    assert found == {
        "inspect links": sorted(
            [
                "system",
                "samples",
                "split",
                "rounds",
                "variant",
                "world",
                "world_seed",
                "output",
                "seed",
                "device",
                "dtype",
                "as_json",
            ]
        ),
        "data build": ["as_json", "config", "device", "dry_run", "seed", "set_"],
        "bench": sorted(
            [
                "system",
                "random",
                "replay",
                "scale",
                "benchmarks",
                "only",
                "repeats",
                "quick",
                "compile",
                "batch_size",
                "output",
                "seed",
                "device",
                "dtype",
                "as_json",
            ]
        ),
        "demo": ["as_json", "batch_size", "device", "dtype", "n", "output", "seed", "system"],
        "run": sorted(
            [
                "system",
                "questions",
                "channel",
                "rounds",
                "latent_steps",
                "variant",
                "intervene",
                "temperature",
                "top_p",
                "max_new_tokens",
                "samples",
                "stop",
                "tools",
                "search_folder",
                "tools_after",
                "max_tool_calls",
                "run_code_without_sandbox",
                "on_long_question",
                "data",
                "output",
                "question_column",
                "id_column",
                "overwrite",
                "max_batch_tokens",
                "trace",
                "replay",
                "until",
                "batch_size",
                "seed",
                "device",
                "dtype",
                "compile",
                "residency",
                "quantization",
                "vllm",
                "as_json",
            ]
        ),
        "tune": sorted(
            [
                "system",
                "task",
                "data",
                "rounds",
                "latent_steps",
                "max_ms",
                "max_tokens",
                "n",
                "question_column",
                "target_column",
                "scorer",
                "instructions",
                "output",
                "write",
                "batch_size",
                "seed",
                "device",
                "dtype",
                "as_json",
            ]
        ),
        "train": ["as_json", "device", "dry_run", "method", "price_per_hour", "recipe", "seed", "set_", "stage"],
        "eval": sorted(
            [
                "system",
                "task",
                "data",
                "arms",
                "rounds",
                "latent_steps",
                "n",
                "split",
                "by",
                "question_column",
                "target_column",
                "id_column",
                "scorer",
                "instructions",
                "repeated_calls",
                "temperature",
                "top_p",
                "max_new_tokens",
                "batch_size",
                "output",
                "overwrite",
                "seed",
                "device",
                "dtype",
                "compile",
                "residency",
                "quantization",
                "as_json",
            ]
        ),
        "import": sorted(
            [
                "release",
                "output",
                "task",
                "pattern",
                "prompts",
                "system_prompt",
                "prompts_from",
                "yes",
                "dtype",
                "as_json",
            ]
        ),
        "pattern check": ["as_json", "pattern", "prompts"],
        "pattern show": ["as_json", "pattern", "svg"],
        "export": sorted(["system", "output", "task", "link_dtype", "dtype", "as_json"]),
        "push": ["as_json", "private", "results", "system", "to"],
        "world": ["action", "as_json", "n", "name", "output", "seed", "split", "workers"],
    }


def _options(callback: object) -> list[str]:
    import inspect

    return list(inspect.signature(callback).parameters)  # type: ignore[arg-type]


# run


def test_an_answer_goes_to_stdout_and_the_rest_to_stderr(invoke: Invoke, saved: Path) -> None:
    result = invoke("run", saved, "What is 2 + 2?")
    expected = RecursiveSystem.from_pretrained(saved).run("What is 2 + 2?")
    assert result.exit_code == 0
    assert result.stdout == expected.text + "\n"
    assert "planner->critic" in result.stderr
    assert "latent steps" in result.stderr


def test_json_holds_answers_usage_and_messages(invoke: Invoke, saved: Path) -> None:
    result = invoke("run", saved, "What is 2 + 2?", "Why?", "--json", "--rounds", "1", "--latent-steps", "3")
    first, second = json.loads(result.stdout)
    assert first["question"] == "What is 2 + 2?"
    assert second["question"] == "Why?"
    assert first["usage"]["latent_steps"] == 2 * 3  # planner and critic; the solver speaks
    assert [(each["source"], each["target"]) for each in first["messages"]] == [
        ("planner", "critic"),
        ("critic", "solver"),
    ]
    assert len(first["messages"][0]["nearest"]) == 3


def test_questions_come_from_stdin(invoke: Invoke, saved: Path) -> None:
    result = invoke("run", saved, "-", "--json", input="What is 2 + 2?\n\nWhy?\n")
    assert [each["question"] for each in json.loads(result.stdout)] == ["What is 2 + 2?", "Why?"]


def test_a_file_of_questions_is_answered_into_another(
    invoke: Invoke, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["What is 2 + 2?", "Why?", "Name the river, and the town, and the bridge."]
    write_jsonl(tmp_path / "questions.jsonl", [{"question": question} for question in asked])
    # Where there is no terminal for a bar, how far it is is told in lines.
    monkeypatch.setattr("recursivemas.cli.terminal.SECONDS_PER_LINE", 0.0)
    arguments = ("run", saved, "--data", "questions.jsonl", "--out", "answers.jsonl")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"questions": 3, "answers": "answers.jsonl"}
    assert "answering: 3 of 3, " in result.stderr
    assert " a second, 0:00:00 left" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    expected = RecursiveSystem.from_pretrained(saved).run(asked)
    assert [(line["question"], line["text"]) for line in lines] == [
        (question, result.text) for question, result in zip(asked, expected, strict=True)
    ]
    assert_refused(invoke(*arguments), "answers.jsonl exists already", "--overwrite")
    assert invoke(*arguments, "--overwrite").stdout == ""


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_killed_run_over_a_file_goes_on_to_the_same_file(
    invoke: Invoke, saved: Path, tmp_path: Path, seconds: float
) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [{"question": f"What is {n} plus {n * n}?"} for n in range(400)])
    options = ("--data", "questions.jsonl", "--batch-size", "4", "--rounds", "1", "--temperature", "1")
    process = subprocess.Popen(
        command("run", saved, *options, "--out", "killed.jsonl"), cwd=tmp_path, stderr=subprocess.PIPE
    )
    part = tmp_path / "killed.jsonl.part"
    deadline = time.monotonic() + 300
    while not (part.exists() and part.read_bytes().count(b"\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed.jsonl").exists()
    kept = part.read_bytes()
    assert 5 < kept.count(b"\n") < 400
    assert_refused(invoke("run", saved, *options, "--top-p", "0.9", "--out", "killed.jsonl"), "settings (sampling)")
    assert part.read_bytes() == kept
    for out in ("killed.jsonl", "whole.jsonl"):
        assert invoke("run", saved, *options, "--out", out).exit_code == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_a_run_is_replayed_from_any_message(invoke: Invoke, saved: Path) -> None:
    recorded = invoke("run", saved, "What is 2 + 2?", "--trace", "trace", "--json")
    answer = json.loads(recorded.stdout)[0]["text"]
    for until in ("1:planner->critic", "1:solver->planner", "2:critic->solver"):
        again = invoke("run", saved, "--replay", "trace", "--until", until, "--json")
        assert again.exit_code == 0, again.stderr
        assert json.loads(again.stdout)[0]["text"] == answer
    assert_refused(invoke("run", saved, "--replay", "trace", "--until", "7:planner->critic"), "round 7", "round 1")
    assert_refused(invoke("run", saved, "--replay", "nowhere"), "nowhere", "trace")


def test_one_edge_gets_a_channel_of_its_own(invoke: Invoke, saved: Path) -> None:
    options = ("--channel", "latent", "--channel", "planner->critic=text", "--json", "--rounds", "1")
    messages = json.loads(invoke("run", saved, "Why?", *options).stdout)[0]["messages"]
    assert messages[0]["text"] is not None
    assert messages[1]["text"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "wrad", "Why?"], ["unknown system 'wrad'", "did you mean 'ward'"]),
        (["run", "SAVED", ""], ["question is empty"]),
        (["run", "SAVED"], ["no question"]),
        (["run", "SAVED", "why " * 3000], ["positions", "at most 1024"]),
        (["run", "SAVED", "Why?", "--channel", "latnet"], ["unknown channel 'latnet'", "'latent'"]),
        (["run", "SAVED", "Why?", "--channel", "planer->critic=text"], ["unknown edge", "planner->critic"]),
        (["run", "SAVED", "Why?", "--rounds", "0"], ["num_rounds", "0"]),
        (["run", "SAVED", "Why?", "--latent-steps", "-1"], ["num_latent_steps", "-1"]),
        (["run", "SAVED", "Why?", "--variant", "short"], ["unknown prompt variant 'short'"]),
        (["run", "SAVED", "Why?", "--intervene", "shufled"], ["unknown intervention", "shuffled"]),
        (["run", "SAVED", "Why?", "--device", "tpu"], ["device", "tpu"]),
        (["run", "SAVED", "Why?", "--dtype", "float23"], ["unknown dtype", "float32"]),
        (["run", "SAVED", "Why?", "--temperature", "-1"], ["temperature"]),
        (["run", "SAVED", "Why?", "--until", "1:a->b"], ["--replay"]),
        (["run", "SAVED", "--data", "missing.jsonl"], ["--out FILE.jsonl"]),
        (["run", "SAVED", "--data", "missing.jsonl", "--out", "a.jsonl"], ["there is no file missing.jsonl"]),
        (["run", "SAVED", "Why?", "--out", "a.jsonl"], ["--data FILE.jsonl"]),
        (["run", "SAVED", "Why?", "--data", "q.jsonl", "--out", "a.jsonl"], ["leave out questions"]),
        (["run", "SAVED", "--data", "q.jsonl", "--out", "a.jsonl", "--trace", "t"], ["leave out --trace"]),
        (["run", "SAVED", "Why?", "--max-batch-tokens", "0"], ["max_batch_tokens", "0"]),
        (["run", "SAVED", "Why?", "--on-long-question", "cut"], ["way with long questions", "truncate"]),
        (["eval", "SAVED"], ["--task", "--data"]),
        (["eval", "SAVED", "--task", "wrad"], ["unknown world 'wrad'", "'ward'"]),
        (["eval", "SAVED", "--data", "missing.jsonl"], ["missing.jsonl"]),
        (["world", "wrad", "build"], ["unknown world", "'ward'"]),
        (["world", "ward", "biuld"], ["unknown action", "'build'"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (["inspect", "links", "wrad"], ["unknown system 'wrad'"]),
        (["inspect", "links", "SAVED", "--world", "wrad"], ["unknown world 'wrad'", "'ward'"]),
        (["inspect", "links", "ward", "--split", "tset"], ["unknown split 'tset'", "'test'"]),
        (["inspect", "links", "ward", "--samples", "1"], ["--samples", "1"]),
        (["inspect", "links", "ward", "--samples", "2", "--rounds", "7"], ["rounds [7]", "[1, 2, 3]"]),
        (["inspect", "links", "ward", "--rounds", "one"], ["--rounds", "1,2,3"]),
        (["inspect", "links", "ward", "--variant", "shrot"], ["unknown variant 'shrot'", "'short'"]),
        (["inspect", "links", "ward", "--device", "tpu"], ["device", "tpu"]),
    ],
)
def test_bad_input_is_one_clear_line(invoke: Invoke, saved: Path, arguments: list[str], words: list[str]) -> None:
    result = invoke(*[str(saved) if argument == "SAVED" else argument for argument in arguments])
    assert_refused(result, *words)


def test_a_trace_directory_that_exists_is_refused(invoke: Invoke, saved: Path) -> None:
    assert invoke("run", saved, "Why?", "--trace", "trace").exit_code == 0
    assert_refused(invoke("run", saved, "Why?", "--trace", "trace"), "exists already")


def test_a_damaged_system_is_named(invoke: Invoke, saved: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(saved, copy)
    weights = copy / "links" / "planner-to-critic" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert_refused(invoke("run", copy, "Why?"), "planner-to-critic", "corrupt")


# inspect


def test_links_are_diagnosed_edge_by_edge(invoke: Invoke, tmp_path: Path) -> None:
    options = ("--samples", "6", "--rounds", "1", "--out", "out")
    shown = invoke("inspect", "links", "ward", *options)
    assert shown.exit_code == 0, shown.output
    assert "planner->critic, round 1: " in shown.stdout
    assert "links.json, health.svg, links.svg" in shown.stderr
    report = json.loads((tmp_path / "out" / "links.json").read_text())
    assert (report["system"], report["n"], report["split"], report["variant"]) == ("ward", 6, "validation", "short")
    assert report["world"] == {"name": "ward", "seed": 0}
    assert [(each["figures"]["edge"], each["figures"]["round"]) for each in report["edges"]] == [
        ("planner->critic", 1),
        ("critic->solver", 1),
        ("solver->planner", 1),
    ]
    assert [each["figures"]["link"] for each in report["links"]][2:4] == ["solver", "planner->critic"]
    assert {each["verdicts"][0]["cause"] for each in report["links"]} == {"no fault seen"}
    for figure in ("links.svg", "health.svg"):
        assert (tmp_path / "out" / figure).read_text().endswith("</svg>\n")
    again = json.loads(invoke("inspect", "links", "ward", *options, "--json").stdout)
    assert (again["edges"], again["links"]) == (report["edges"], report["links"])


def test_links_of_a_system_of_no_known_world_are_looked_at_by_themselves(
    invoke: Invoke, saved: Path, tmp_path: Path
) -> None:
    result = invoke("inspect", "links", saved, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "inner planner: never trained – its weights cannot be told from random numbers" in result.stdout
    assert "→ never trained: train it" in result.stdout
    assert "--world" in result.stderr
    assert "links.json, health.svg\n" in result.stderr
    report = json.loads(invoke("inspect", "links", saved, "--json").stdout)
    assert (report["world"], report["n"], report["edges"]) == (None, 0, [])
    assert {each["verdicts"][0]["cause"] for each in report["links"]} == {"never trained"}
    assert report["advice"][0].startswith("never trained: ")
    assert json.loads((tmp_path / "out" / "links.json").read_text())["links"] == report["links"]


# eval


def test_a_file_of_questions_is_evaluated(invoke: Invoke, saved: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [{"ask": "What is 2 + 2?", "is": 4}, {"ask": "Why?", "is": "1,000"}])
    columns = ("--question-column", "ask", "--target-column", "is", "--scorer", "numeric")
    result = invoke("eval", saved, "--data", data, *columns, "--json", "--out", "out", "--arms", "latent,text,solo")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["n"] == 2
    assert report["optimum"] == {}
    assert [(arm["arm"], arm["rounds"]) for arm in report["arms"]] == [
        ("latent", 1),
        ("latent", 2),
        ("text", 1),
        ("text", 2),
        ("solo", 1),
    ]
    assert (tmp_path / "out" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    again = ("eval", saved, "--data", data, *columns, "--out", "out", "--arms", "latent")
    assert_refused(invoke(*again), "finished report", "--overwrite")
    assert invoke(*again, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ('{"question": "Why?"}\n', [], ["line 1", "unknown column 'answer'"]),
        ('{"question": "", "answer": "1"}\n', [], ["line 1", "empty"]),
        ('{"question": "Why?", "answer": "1"}\nno json\n', [], ["line 2", "not valid JSON"]),
        ('["Why?"]\n', [], ["line 1", "expected a JSON object"]),
        ("", [], ["no samples"]),
        ('{"question": "Why?", "answer": "not a number"}\n', ["--scorer", "numeric"], ["not a number"]),
        ('{"question": "Why?", "answer": "1"}\n', ["--scorer", "nmeric"], ["unknown scorer", "numeric"]),
        ('{"question": "Why?", "answer": "1"}\n', ["--arms", "latent,txt"], ["unknown arm 'txt'", "'text'"]),
        ('{"question": "Why?", "answer": "1"}\n', ["--rounds", "one"], ["--rounds", "1,2,3"]),
        ('{"question": "Why?", "answer": "1"}\n', ["--rounds", "0", "--arms", "latent"], ["num_rounds"]),
        ('{"question": "Why?", "answer": "1"}\n', [], ["shuffled", "two questions"]),
        ('{"question": "Why?", "answer": "1"}\n', ["-n", "0"], ["-n"]),
    ],
)
def test_bad_data_is_one_clear_line(
    invoke: Invoke, saved: Path, tmp_path: Path, content: str, options: list[str], words: list[str]
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(content)
    assert_refused(invoke("eval", saved, "--data", data, "--out", "out", *options), *words)
    assert not (tmp_path / "out" / "report.json").exists()


# train


RECIPE = """
system: ward
world: {name: ward}
output: runs/test
num_latent_steps: 4
max_new_tokens: 24
inner: {num_samples: 48, num_train_steps: 12, save_every: 5, batch_size: 64}
alignment: {num_samples: 48, num_train_steps: 12, save_every: 5, batch_size: 64}
outer: {num_samples: 64, num_train_steps: 4, save_every: 3, batch_size: 4, anchor_batch_size: 32, log_every: 2, num_validation: 8, validate_every: 2}
"""
# Nothing but the outer loop, from the links that the system has.
OUTER = ("train", "ward.yaml", "--stage", "outer", "--set", "links.start=given")


def links_of(directory: Path) -> dict[str, Tensor]:
    links = RecursiveSystem.from_pretrained(directory).all_links
    return {f"{name}/{tensor}": value for name, link in links.items() for tensor, value in link.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of the links that are not the same."""
    return {name.split("/")[0] for name, value in one.items() if not torch.equal(value, other[name])}


def test_training_in_stages_equals_training_at_once(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    at_once = invoke("train", "ward.yaml", "--json")
    assert at_once.exit_code == 0, at_once.output
    reports = json.loads(at_once.stdout)["stages"]
    assert set(reports) == {
        "inner planner",
        "inner critic",
        "inner solver",
        "alignment planner->critic",
        "alignment critic->solver",
        "alignment solver->planner",
        "outer",
    }
    assert reports["outer"]["steps"] == 4
    assert list(reports["outer"]["validation"]) == ["0", "2", "4"]
    saved = json.loads((tmp_path / "runs" / "test" / "system" / "system.json").read_text())["training"]
    assert saved["stages"] == reports
    assert saved["recipe"]["outer"]["batch_size"] == 4
    for stage in ("inner", "alignment", "outer"):
        assert invoke("train", "ward.yaml", "--stage", stage, "--set", "output=runs/staged").exit_code == 0
    whole, staged = (links_of(tmp_path / "runs" / run / "system") for run in ("test", "staged"))
    assert not differing(whole, staged)
    # A later command that names one stage gives back the whole of what the run has trained.
    again = invoke("train", "ward.yaml", "--stage", "inner", "--set", "output=runs/staged", "--json")
    assert json.loads(again.stdout)["stages"]["outer"] == reports["outer"]
    assert not differing(whole, links_of(tmp_path / "runs" / "staged" / "system"))


# Agents of one's own, questions of one's own, and what each role should write about them.
OWN = """
agents: {planner: models/planner, critic: models/critic, solver: models/solver}
data: {outer: train.jsonl, validation: validation.jsonl}
output: runs/own
num_rounds: 2
num_latent_steps: 3
max_new_tokens: 8
lengths: {question: 12, reply: 6}
inner: {num_samples: 16, num_train_steps: 6, batch_size: 64}
alignment: {num_samples: 16, num_train_steps: 6, batch_size: 64}
outer: {num_samples: 16, num_train_steps: 3, batch_size: 4, num_validation: 4, validate_every: 2}
"""


@pytest.fixture
def own(tmp_path: Path, tiny_models: dict) -> Path:
    for role, model in zip(("planner", "critic", "solver"), tiny_models.values(), strict=True):
        model.save_pretrained(tmp_path / "models" / role)
    rows = [
        {"question": f"What is {n} + 2?", "answer": n + 2, "planner": f"Add 2 to {n}.", "critic": f"{n}, then 2 more."}
        for n in range(20)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows[:16])
    write_jsonl(tmp_path / "validation.jsonl", [{key: row[key] for key in ("question", "answer")} for row in rows[16:]])
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_agents_are_trained_on_files(invoke: Invoke, own: Path, dtype: str) -> None:
    trained = invoke("train", "own.yaml", "--set", f"dtype={dtype}", "--json")
    assert trained.exit_code == 0, trained.output
    report = json.loads(trained.stdout)
    system = RecursiveSystem.from_pretrained(report["system"])
    assert system.pattern.name == "sequential"
    assert set(report["stages"]) == {
        *(f"inner {role}" for role in system.agents),
        *(f"alignment {e}" for e in system.links),
        "outer",
        "data",
    }
    assert report["stages"]["outer"]["steps"] == 3
    assert {link.w1.weight.dtype for link in system.all_links.values()} == {torch.float32}
    health = json.loads(invoke("inspect", "links", report["system"], "--json").stdout)["links"]
    assert all(each["figures"]["moved"] > 0 for each in health)
    # Agents of no world cannot have its conversations.
    assert_refused(invoke("inspect", "links", report["system"], "--world", "ward", "--samples", "2"), "variant")


def test_a_role_without_text_is_named(invoke: Invoke, own: Path) -> None:
    write_jsonl(own / "train.jsonl", [{"question": "Why?", "answer": "So.", "planner": "Ask."}] * 2)
    assert_refused(invoke("train", "own.yaml"), "train.jsonl", "column 'critic'", "--stage outer")
    alone = ("--stage", "outer", "--set", "outer.anchor=0", "--set", "output=runs/outer")
    trained = invoke("train", "own.yaml", *alone)
    assert trained.exit_code == 0, trained.output
    assert "eval runs/outer/system --data validation.jsonl" in trained.stderr
    write_jsonl(own / "train.jsonl", [{"question": "Why?", "answer": "So.", "planner": 3, "critic": "x"}])
    assert_refused(invoke("train", "own.yaml", "--set", "output=runs/other"), "line 1", "column 'planner'", "not text")


def test_a_dry_run_says_what_training_would_take(invoke: Invoke, own: Path) -> None:
    shown = invoke("train", "own.yaml", "--dry-run")
    assert shown.exit_code == 0, shown.output
    for words in ("models/planner", "qwen3", "planner->critic", "peak", "to download: 0.00 GB"):
        assert words in shown.stdout
    assert not (own / "runs").exists()
    found = json.loads(invoke("train", "own.yaml", "--dry-run", "--json", "--stage", "outer").stdout)
    assert found["stages"] == ["outer"]
    assert found["memory"]["inner"] == 0 < found["memory"]["peak"]


@pytest.mark.parametrize("name", ["sequential_light", "sequential_scaled", "mixture", "distillation", "deliberation"])
def test_recipes_of_the_paper_need_neither_network_nor_weights(invoke: Invoke, name: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "paper" / f"{name}.yaml"
    shown = invoke("train", recipe, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "data sets: RecursiveMAS/" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if "data sets" not in line)
    plain = json.loads(invoke("train", recipe, "--dry-run", "--json").stdout)
    assert plain["stages"] == ["inner", "outer"]
    assert plain["data"]["outer"]["path"].startswith("RecursiveMAS/")


def test_the_outer_loop_says_what_it_did(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    told = invoke(*OUTER, "--set", "outer.trained=outer", "--set", "outer.patience=1", "--set", "outer.lr=0.03")
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "runs" / "test" / "system" / "system.json").read_text())["training"]["stages"][
        "outer"
    ]
    scores = found["validation"]
    assert f"validation from {scores['0']:.4f} to {max(scores.values()):.4f}" in told.stdout
    assert f"best after step {found['best_step']}" in told.stdout
    assert "not moved: planner\n" in told.stdout
    assert "note:" not in told.stderr
    before, after = links_of(BUNDLED / "ward"), links_of(tmp_path / "runs" / "test" / "system")
    expected = {name for name, distance in found["moved"].items() if distance > 0}
    assert differing(before, after) == expected
    assert expected <= {"planner->critic", "critic->solver", "solver->planner"}
    assert found["stopped"]
    assert f"stopped after step {found['steps']}: no better validation" in told.stdout
    # From links that nobody has aligned it is allowed, and said to be of little use.
    (tmp_path / "random.yaml").write_text(RECIPE)
    random = invoke("train", "random.yaml", "--stage", "outer", "--set", "output=runs/random")
    assert random.exit_code == 0, random.output
    assert "never aligned" in random.stderr


def test_links_are_trained_on_questions_of_the_users_own(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    rows = [
        {"question": f"A patient has cold hands and {number} goats.", "answer": "saltfever"} for number in range(30)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows[:20])
    write_jsonl(tmp_path / "validation.jsonl", rows[20:])
    write_jsonl(tmp_path / "test.jsonl", rows[5:6])
    files = ["--set", "data={outer: train.jsonl, validation: validation.jsonl, score: exact}"]
    result = invoke(*OUTER, *files, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["stages"]["outer"]
    assert report["questions"] == 20
    # Scored by exact match: the share of eight questions.
    assert all((8 * score).is_integer() for score in report["validation"].values())
    other = ["--set", "output=runs/other"]
    overlap = invoke(*OUTER, *files, *other, "--set", "data.test=test.jsonl")
    assert_refused(overlap, "1 of 1 test questions are train questions", "test-1", "5 goats")
    overlap = invoke(*OUTER, *files, *other, "--set", "data.validation=train.jsonl")
    assert_refused(overlap, "8 of 8 validation questions are train questions", "take them out")
    missing = invoke(*OUTER, *files, *other, "--set", "data.outer=missing.jsonl")
    assert_refused(missing, "there is no file missing.jsonl")
    posterior = invoke(*OUTER, *files, *other, "--set", "outer.distillation=0.5")
    assert_refused(posterior, "distillation needs a posterior", "train-1")
    assert not (tmp_path / "runs" / "other").exists()


def test_a_world_whose_roles_are_others_is_refused(invoke: Invoke, tmp_path: Path, tiny_models: dict) -> None:
    pattern = Pattern.load("sequential").renamed({"critic": "judge"})
    words = PromptSet.load("sequential").model_dump(exclude_none=True)
    words = yaml.safe_load(
        yaml.safe_dump(words).replace("latents:critic", "latents:judge").replace("critic:", "judge:")
    )
    agents = dict(zip(("planner", "judge", "solver"), tiny_models.values(), strict=True))
    RecursiveSystem.build(agents=agents, pattern=pattern, prompts=words).save_pretrained(tmp_path / "other")
    (tmp_path / "ward.yaml").write_text(RECIPE)
    refused = invoke("train", "ward.yaml", "--set", "system=other")
    assert_refused(refused, "the world 'ward' has text for the roles planner, critic, solver", "planner, judge, solver")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("trouble", ["diverged", "overflow"])
def test_a_run_that_fails_keeps_its_best_links(invoke: Invoke, tmp_path: Path, trouble: str) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    if trouble == "overflow":
        settings = ["outer.lr=1.0e+9", "outer.warmup_steps=0"]
    else:
        settings = ["outer.max_loss_ratio=1.000001", "outer.num_train_steps=80", "outer.lr=0.3", "outer.anchor=9"]
        settings += ["outer.warmup_steps=60", "outer.batch_size=1", "outer.validate_every=100", "outer.log_every=100"]
        settings += ["num_rounds=1", "num_latent_steps=1", "outer.num_validation=2"]
    failed = invoke(*OUTER, *[part for setting in settings for part in ("--set", setting)])
    words = ["has diverged: at step ", "Lower the learning rate"] if trouble == "diverged" else ["is not finite"]
    assert_refused(failed, *words, "written to runs/test/best")
    assert "after step 0, the best on validation" in failed.stderr
    assert not differing(links_of(BUNDLED / "ward"), links_of(tmp_path / "runs" / "test" / "best"))
    assert not (tmp_path / "runs" / "test" / "system").exists()
    kept = json.loads((tmp_path / "runs" / "test" / "best" / "system.json").read_text())["training"]["stages"]
    assert kept["failed"] in failed.stderr


def test_a_full_disk_at_the_end_is_one_clear_line(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recursivemas.checkpoint.save_file", full)
        assert_refused(invoke(*OUTER), "cannot write", "No space left on device")
    assert not (tmp_path / "runs" / "test" / "system").exists()
    # What was trained is there: the same command has only to save it.
    monkeypatch.setattr("recursivemas.training.outer.OuterLoop.losses", lambda *given: pytest.fail("trained again"))
    assert invoke(*OUTER).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["inner.lr=-1"], ["inner.lr"]),
        (["iner.lr=1"], ["unknown setting 'iner'", "'inner'"]),
        (["inner.lrr=1"], ["unknown setting 'inner.lrr'", "'inner.lr'"]),
        (["nonsense"], ["key=value"]),
        (["num_rounds=0"], ["num_rounds"]),
        (["system=wrad"], ["unknown system 'wrad'"]),
        (["links.design=res-2-layr"], ["unknown link design", "res-2-layer"]),
        (["links.start=old"], ["links.start", "'new' or 'given'"]),
        (["world.name=wrad"], ["unknown world 'wrad'", "'ward'"]),
        (["outer.num_train_steps=0"], ["outer.num_train_steps", "greater than or equal to 1"]),
        (["outer.lrr=1"], ["unknown setting 'outer.lrr'", "'outer.lr'"]),
        (["outer.round_weights=evry"], ["outer.round_weights", "'every' or 'last'"]),
        (["outer.round_weights=[1, 0]"], ["round_weights", "the last one more than 0"]),
        (["outer.round_weights=[1, 1]"], ["round_weights has 2 weights for 3 rounds"]),
        (["outer.curriculum=[{num_rounds: 1, num_train_steps: 4}]"], ["curriculum", "all 4 steps"]),
        (["outer.curriculum=[{rounds: 1}]"], ["outer.curriculum.0", "num_rounds"]),
        (["outer.lr_ratios.plannr=2"], ["lr_ratios: unknown link 'plannr'", "'planner'"]),
        (["outer.lr_ratios.planner=-2"], ["outer.lr_ratios.planner", "greater than or equal to 0"]),
        (["outer.distillation=2"], ["outer.distillation", "less than or equal to 1"]),
        (["num_latent_steps=0"], ["num_latent_steps of 1 or more"]),
        (["data={validation: train.jsonl}"], ["'data.outer' is missing"]),
        (["data={outer: train.jsonl, oter: x}"], ["unknown setting 'data.oter'", "'data.outer'"]),
        (["data={outer: {path: train.jsonl, splt: x}}"], ["unknown setting 'data.outer.splt'", "'data.outer.split'"]),
        (["data={outer: train.jsonl, on_long: cut}"], ["data.on_long", "'truncate'"]),
        (["data=train.jsnl"], ["train.jsnl", "a file of one's own is named with its ending"]),
    ],
)
def test_a_bad_setting_is_one_clear_line(invoke: Invoke, tmp_path: Path, changes: list[str], words: list[str]) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    settings = [part for change in changes for part in ("--set", change)]
    assert_refused(invoke("train", "ward.yaml", *settings), *words)
    # A mistake does not take the directory: mended, the recipe can go there.
    assert not (tmp_path / "runs").exists()


def test_an_unknown_stage_and_a_changed_recipe_are_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    assert_refused(invoke("train", "ward.yaml", "--stage", "iner"), "unknown stage 'iner'", "'inner'")
    assert invoke("train", "ward.yaml", "--stage", "inner").exit_code == 0
    assert_refused(invoke("train", "ward.yaml", "--set", "inner.lr=0.001"), "inner.lr", "0.001")
    changed = invoke("train", "ward.yaml", "--set", "outer.lr_ratios.inner=0.5")
    assert_refused(changed, "runs/test belongs to a run with outer.lr_ratios.inner = None, now it is 0.5", "output=")


# A process of its own: signals, full disks, exit codes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "recursivemas.cli.main", *map(str, arguments)]


STOPPED = {
    "train": (("train", "ward.yaml", "--stage", "inner"), "runs/test/metrics.jsonl"),
    "eval": (("eval", "SAVED", "--data", "mine.jsonl", "--out", "out", "--batch-size", "2"), "out/answers.jsonl"),
    "demo": (("demo", "-n", "2000", "--batch-size", "10"), "runs/demo/answers-ward.jsonl"),
    "world": (("world", "ward", "build", "--out", "world"), "world/data/turns-solver.jsonl"),
    "run": (("run", "SAVED", *["Why?"] * 3000, "--batch-size", "1", "--trace", "trace"), "trace/batch-00000.json"),
    "run --data": (("run", "SAVED", "--data", "mine.jsonl", "--out", "a.jsonl", "--batch-size", "2"), "a.jsonl.part"),
}


@pytest.mark.parametrize("verb", list(STOPPED))
def test_ctrl_c_ends_every_verb_in_one_line_and_keeps_what_is_done(tmp_path: Path, saved: Path, verb: str) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE.replace("num_train_steps: 12", "num_train_steps: 40000"))
    rows = [{"question": f"Why {number}?", "answer": "1"} for number in range(4000)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    arguments, sign_of_life = STOPPED[verb]
    process = subprocess.Popen(
        command(*[saved if argument == "SAVED" else argument for argument in arguments]),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeding_ctrl_c,
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / sign_of_life).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    last = complaint.strip().splitlines()[-1]
    assert last.startswith("recursivemas: interrupted")
    assert ("the same command goes on from there" in last) == (verb != "run")
    assert "Traceback" not in complaint
    assert (tmp_path / sign_of_life).stat().st_size > 0


def heeding_ctrl_c() -> None:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so does all it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def small_files_only() -> None:
    """As on a full disk: writing more than a kilobyte to a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.parametrize("verb", ["eval", "run", "run --data", "train"])
def test_a_full_disk_is_one_clear_line(tmp_path: Path, saved: Path, verb: str) -> None:
    rows = [{"question": f"Why {number}?", "answer": "1"} for number in range(20)]
    data = write_jsonl(tmp_path / "mine.jsonl", rows)
    (tmp_path / "ward.yaml").write_text(RECIPE)
    arguments = {
        "eval": ("eval", saved, "--data", data, "--out", "out", "--arms", "latent"),
        "run": ("run", saved, "Why?", "--trace", "trace"),
        "run --data": ("run", saved, "--data", data, "--out", "answers.jsonl"),
        "train": ("train", "ward.yaml"),
    }[verb]
    done = subprocess.run(
        command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=100, preexec_fn=small_files_only
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("recursivemas: cannot")


def started(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        text=True,
        start_new_session=True,
        preexec_fn=heeding_ctrl_c,
        **pipes,  # type: ignore[call-overload]
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("number", "steps"), [(signal.SIGKILL, 8), (signal.SIGINT, 5)])
def test_a_killed_run_goes_on_to_the_same_system(tmp_path: Path, number: int, steps: int) -> None:
    recipe = RECIPE.replace("num_train_steps: 4", "num_train_steps: 14").replace("log_every: 2", "log_every: 1")
    recipe = recipe.replace("validate_every: 2", "validate_every: 6, curriculum: [{num_rounds: 1, num_train_steps: 4}]")
    (tmp_path / "ward.yaml").write_text(recipe)
    whole = started(tmp_path, *OUTER, "--set", "output=runs/whole")
    complaint = whole.communicate(timeout=200)[1]
    assert whole.returncode == 0, complaint
    process = started(tmp_path, *OUTER)
    log = tmp_path / "runs" / "test" / "metrics.jsonl"
    sign = f'{{"stage": "outer", "step": {steps}, "loss"'
    deadline = time.monotonic() + 90
    while not (log.exists() and sign in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    again = started(tmp_path, *OUTER)
    complaint = again.communicate(timeout=200)[1]
    assert again.returncode == 0, complaint
    assert not differing(*(links_of(tmp_path / "runs" / run / "system") for run in ("whole", "test")))
    # The log of both is the same, too, but for time and memory.
    timing = {"steps_per_second", "seconds_left", "memory_mb"}
    logs = [
        [json.loads(line) for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "test")
    ]
    expected, found = ([{k: v for k, v in each.items() if k not in timing} for each in log] for log in logs)
    assert found == expected


# world and demo


def test_world_sample_prints_cases(invoke: Invoke) -> None:
    result = invoke("world", "ward", "sample", "-n", "2")
    assert len(result.stdout.strip().splitlines()) == 2
    cases = json.loads(invoke("world", "ward", "sample", "-n", "2", "--json").stdout)
    assert result.stdout.splitlines() == [case["question"] for case in cases]


def test_demo_shows_latents_beside_text_and_controls(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("demo", "-n", "40", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())
    assert json.loads(result.stdout)["ward"] == report
    assert report["n"] == 40
    assert list(report["optimum"]) == ["1", "2", "3"]
    arms = {(arm["arm"], arm["variant"], arm["rounds"]) for arm in report["arms"]}
    latent = {("latent", None, each) for each in (1, 2, 3)}
    text = {("text", variant, each) for variant in ("short", "graded") for each in (1, 2, 3)}
    controls = {("solo", None, 1), ("none", None, 3), ("shuffled", None, 3), ("random-link", None, 3)}
    assert arms == latent | text | controls
    accuracy = {(arm["arm"], arm["rounds"]): arm["accuracy"] for arm in report["arms"] if arm["arm"] != "text"}
    assert accuracy["latent", 3] > max(accuracy[name, 3] for name in ("none", "shuffled", "random-link")) + 0.2
    panel = json.loads((tmp_path / "runs" / "demo" / "panel.json").read_text())
    assert json.loads(result.stdout)["panel"] == panel
    latent = next(arm for arm in panel["arms"] if arm["arm"] == "latent")
    assert (
        latent["accuracy"] > max(arm["accuracy"] for arm in panel["arms"] if arm["arm"] in ("none", "shuffled")) + 0.3
    )
    page = (tmp_path / "runs" / "demo" / "report.html").read_text()
    assert "planner" in page
    assert "summarizer" in page
    assert "The numbers are in report.json and panel.json" in page


def test_demo_shows_one_system_alone(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("demo", "--system", "relay", "-n", "10").exit_code == 0
    assert json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())["system"] == "relay"
    assert_refused(invoke("demo", "--system", "wrad"), "did you mean 'ward'")
