"""The command line from outside: what it prints, what it writes, and how it fails (one line, no traceback)."""

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
from typer.testing import CliRunner, Result

from recursivemas.cli.main import app
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
    for verb in ("demo", "run", "train", "eval", "world"):
        shown = invoke(verb, "--help").stdout
        assert "Example:" in shown
        assert f"recursivemas {verb}" in shown


def test_options_are_frozen() -> None:
    """A new option is a decision: it changes this list too."""
    found = {command.name: sorted(_options(command.callback)) for command in app.registered_commands}
    assert found == {
        "demo": ["as_json", "batch_size", "device", "dtype", "n", "output", "seed"],
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
                "stop",
                "trace",
                "replay",
                "until",
                "batch_size",
                "seed",
                "device",
                "dtype",
                "as_json",
            ]
        ),
        "train": ["as_json", "device", "recipe", "seed", "set_", "stage"],
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
                "question_column",
                "target_column",
                "id_column",
                "scorer",
                "instructions",
                "temperature",
                "top_p",
                "max_new_tokens",
                "batch_size",
                "output",
                "overwrite",
                "seed",
                "device",
                "dtype",
                "as_json",
            ]
        ),
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
        (["eval", "SAVED"], ["--task", "--data"]),
        (["eval", "SAVED", "--task", "wrad"], ["unknown world 'wrad'", "'ward'"]),
        (["eval", "SAVED", "--data", "missing.jsonl"], ["missing.jsonl"]),
        (["world", "wrad", "build"], ["unknown world", "'ward'"]),
        (["world", "ward", "biuld"], ["unknown action", "'build'"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
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
"""


def test_training_in_stages_equals_training_at_once(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    at_once = invoke("train", "ward.yaml", "--json")
    assert at_once.exit_code == 0, at_once.output
    assert set(json.loads(at_once.stdout)["stages"]) == {
        "inner planner",
        "inner critic",
        "inner solver",
        "alignment planner->critic",
        "alignment critic->solver",
        "alignment solver->planner",
    }
    for stage in ("inner", "alignment"):
        assert invoke("train", "ward.yaml", "--stage", stage, "--set", "output=runs/staged").exit_code == 0
    links = [
        RecursiveSystem.from_pretrained(tmp_path / "runs" / run / "system").all_links for run in ("test", "staged")
    ]
    for name, link in links[0].items():
        for tensor, value in link.state_dict().items():
            assert (value == links[1][name].state_dict()[tensor]).all(), f"{name}/{tensor}"


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
    ],
)
def test_a_bad_setting_is_one_clear_line(invoke: Invoke, tmp_path: Path, changes: list[str], words: list[str]) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    settings = [part for change in changes for part in ("--set", change)]
    assert_refused(invoke("train", "ward.yaml", *settings), *words)


def test_an_unknown_stage_and_a_changed_recipe_are_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ward.yaml").write_text(RECIPE)
    assert_refused(invoke("train", "ward.yaml", "--stage", "iner"), "unknown stage 'iner'", "'inner'")
    assert invoke("train", "ward.yaml", "--stage", "inner").exit_code == 0
    assert_refused(invoke("train", "ward.yaml", "--set", "inner.lr=0.001"), "inner.lr", "0.001")


# A process of its own: signals, full disks, exit codes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "recursivemas.cli.main", *map(str, arguments)]


STOPPED = {
    "train": (("train", "ward.yaml", "--stage", "inner"), "runs/test/metrics.jsonl"),
    "eval": (("eval", "SAVED", "--data", "mine.jsonl", "--out", "out", "--batch-size", "2"), "out/answers.jsonl"),
    "demo": (("demo", "-n", "2000", "--batch-size", "10"), "runs/demo/answers.jsonl"),
    "world": (("world", "ward", "build", "--out", "world"), "world/data/turns-solver.jsonl"),
    "run": (("run", "SAVED", *["Why?"] * 3000, "--batch-size", "1", "--trace", "trace"), "trace/batch-00000.json"),
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
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / sign_of_life).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert complaint.strip().splitlines()[-1].startswith("recursivemas: interrupted")
    assert "Traceback" not in complaint
    assert (tmp_path / sign_of_life).stat().st_size > 0


def small_files_only() -> None:
    """As on a full disk: writing more than a kilobyte to a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.parametrize("verb", ["eval", "run", "train"])
def test_a_full_disk_is_one_clear_line(tmp_path: Path, saved: Path, verb: str) -> None:
    rows = [{"question": f"Why {number}?", "answer": "1"} for number in range(20)]
    data = write_jsonl(tmp_path / "mine.jsonl", rows)
    (tmp_path / "ward.yaml").write_text(RECIPE)
    arguments = {
        "eval": ("eval", saved, "--data", data, "--out", "out", "--arms", "latent"),
        "run": ("run", saved, "Why?", "--trace", "trace"),
        "train": ("train", "ward.yaml"),
    }[verb]
    done = subprocess.run(
        command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=100, preexec_fn=small_files_only
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("recursivemas: cannot")


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
    assert json.loads(result.stdout) == report
    assert report["n"] == 40
    assert list(report["optimum"]) == ["1", "2", "3"]
    arms = {(arm["arm"], arm["variant"], arm["rounds"]) for arm in report["arms"]}
    latent = {("latent", None, each) for each in (1, 2, 3)}
    text = {("text", variant, each) for variant in ("short", "graded") for each in (1, 2, 3)}
    controls = {("solo", None, 1), ("none", None, 3), ("shuffled", None, 3), ("random-link", None, 3)}
    assert arms == latent | text | controls
    accuracy = {(arm["arm"], arm["rounds"]): arm["accuracy"] for arm in report["arms"] if arm["arm"] != "text"}
    assert accuracy["latent", 3] > max(accuracy[name, 3] for name in ("none", "shuffled", "random-link")) + 0.2
    page = (tmp_path / "runs" / "demo" / "report.html").read_text()
    assert "planner" in page
