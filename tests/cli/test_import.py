"""`recursivemas import` and `export` from outside: what is told, written, asked before code is run, and refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tests.families.table import save_checkpoint
from tests.release.clones import write_clone
from tests.release.theirs import Release, write_theirs
from typer.testing import CliRunner, Result

from recursivemas.cli.main import app
from recursivemas.system import RecursiveSystem

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in an empty directory."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments, **options: runner.invoke(app, [str(each) for each in arguments], **options)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Two agents and their links, as the authors would release them; not to be changed."""
    place = tmp_path_factory.mktemp("release")
    widths = {"expert": ("qwen3", 48), "learner": ("llama", 40)}
    models = {role: (save_checkpoint(*each[:1], place / role, width=each[1]), each[1]) for role, each in widths.items()}
    return write_theirs(place / "theirs", "distillation", models)


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 1, and exactly one line on stderr, that says these words."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def test_a_release_becomes_a_system_of_ours_and_goes_back(invoke: Invoke, release: Release, tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(release.prompts))
    result = invoke("import", release.place, "--out", "ours", "--prompts", "words.yaml", "--system-prompt", "Team.")
    assert result.exit_code == 0, result.output
    for word in ("distillation", "expert", "qwen3", "48", "learner->expert", "ln-res-2-layer", "10,736"):
        assert word in result.stdout
    assert "trained on the authors' words" not in result.stderr
    system = RecursiveSystem.from_pretrained(tmp_path / "ours", device="cpu")
    assert system.prompts.system == "Team."
    assert torch.equal(system.links["expert->learner"].w1.weight, release.weights["expert->learner"]["proj1.weight"])

    result = invoke("export", "ours", "--out", "back", "--link-dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "expert, learner, outer" in result.stdout
    assert "--prompts back/prompts.yaml" in result.stderr
    weights = torch.load(tmp_path / "back" / "outer" / "outer_el(math).pt", weights_only=True)
    expected = release.weights["expert->learner"]["proj1.weight"].bfloat16()
    assert torch.equal(weights["proj1.weight"], expected)


def test_it_is_told_that_the_words_are_ours(invoke: Invoke, release: Release) -> None:
    result = invoke("import", release.place, "--out", "ours", "--json", "--task", "code")
    assert result.exit_code == 0, result.output
    assert "trained on the authors' words" in result.stderr
    told = json.loads(result.stdout)
    assert told["agents"]["learner"]["hidden_size"] == 40
    assert told["links"]["expert->learner"] == {
        "design": "ln-res-2-layer",
        "parameters": 80 * 49 + 40 * 81 + 40 * 49 + 2 * 88,
    }


def test_the_code_of_a_clone_is_run_only_by_those_who_say_yes(
    invoke: Invoke, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it was run"
    start = 'SYSTEM_PROMPT = "You help."'
    write_clone(tmp_path / "clone", changes={start: f"{start}\nopen({str(mark)!r}, 'w').close()"})
    wanted = ("import", release.place, "--out", "ours", "--prompts-from", "clone")
    assert_refused(invoke(*wanted), "nobody to ask", "--yes", "prompts.py")

    monkeypatch.setattr("recursivemas.cli.import_._somebody_is_there", lambda: True)
    result = invoke(*wanted, input="n\n")
    assert result.exit_code == 1
    assert "will be run as a program, with all the rights that you have" in result.stderr
    assert not mark.exists()
    assert not (tmp_path / "ours").exists()

    result = invoke(*wanted, input="y\n")
    assert result.exit_code == 0, result.output
    assert mark.exists()
    assert "trained on the authors' words" not in result.stderr
    prompts = RecursiveSystem.from_pretrained(tmp_path / "ours", device="cpu").prompts
    assert "<<" not in str(prompts)
    assert prompts.slots("learner") == {"expert"}

    again = invoke("import", release.place, "--out", "more", "--prompts-from", "clone", "--yes")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "sequential_lite", "--out", "ours"], ["unknown released system", "'sequential_light'"]),
        (["import", "sequential_light", "--out", "ours"], ["Planner-Qwen3-1.7B", "HF_HUB_OFFLINE"]),
        (["import", "RELEASE", "--out", "ours", "--task", "maths"], ["unknown task 'maths'", "'math'"]),
        (["import", "RELEASE", "--out", "ours", "--pattern", "mixtur"], ["unknown pattern", "'mixture'"]),
        (["import", "RELEASE", "--out", "ours", "--pattern", "mixture"], ["does not fit this release"]),
        (["import", "RELEASE", "--out", "ours", "--prompts", "no.yaml"], ["no.yaml"]),
        (["import", "RELEASE", "--out", "ours", "--prompts", "sequential"], ["prompt set 'sequential'", "'expert'"]),
        (["import", "RELEASE", "--out", "ours", "--prompts", "a.yaml", "--prompts-from", "x"], ["choose one"]),
        (["import", "RELEASE", "--out", "ours", "--prompts-from", "nowhere"], ["nowhere", "prompts.py"]),
        (["import", "RELEASE", "--out", "ours", "--dtype", "float23"], ["unknown dtype", "float32"]),
        (["import", "RELEASE", "--out", "."], ["exists already"]),
        (
            ["export", "ward", "--out", "theirs"],
            ["link 'planner' cannot be written in the released layout", "scale", "ln-res-2-layer"],
        ),
        (["export", "wrad", "--out", "theirs"], ["unknown system 'wrad'", "'ward'"]),
    ],
)
def test_bad_input_is_one_clear_line(
    invoke: Invoke, release: Release, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(invoke(*[str(release.place) if each == "RELEASE" else each for each in arguments]), *words)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
