"""`recursivemas pattern`: faults with their lines, and pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from recursivemas.cli.main import app
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

Invoke = Callable[..., Result]

WRONG = "name: x\nstages: [[a], [b]]\nedges:\n  - a->c\n  - b->\nanswers: b\n"
FINE = "name: x\nstages: [[a], [b]]\nedges: [a->b]\nanswers: b\n"


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in a directory with two patterns."""
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(WRONG)
    Path("fine.yaml").write_text(FINE)
    return lambda *arguments: CliRunner().invoke(app, ["pattern", *map(str, arguments)])


def test_faults_are_told_one_a_line_with_file_and_line(invoke: Invoke) -> None:
    result = invoke("check", "wrong.yaml")
    assert result.exit_code == 1
    assert [line.split(" ")[0] for line in result.stdout.splitlines()] == [
        "wrong.yaml:2:",
        "wrong.yaml:4:",
        "wrong.yaml:5:",
    ]
    assert result.stderr == "recursivemas: 3 faults in wrong.yaml\n"


def test_prompts_are_checked_beside_the_pattern(invoke: Invoke) -> None:
    Path("words.yaml").write_text("name: x\nroles:\n  a: {always: '{question}'}\n  b: {always: '{latents:c}'}\n")
    result = invoke("check", "fine.yaml", "--prompts", "words.yaml")
    assert result.exit_code == 1
    slot, unknown = result.stdout.splitlines()
    assert slot.startswith("words.yaml:4: b.always: there is no slot {latents:a}")
    assert unknown.startswith("words.yaml:4: b.always: unknown slot 'c'")


def test_what_is_sound_is_said_to_be(invoke: Invoke) -> None:
    result = invoke("check", "fine.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("the pattern 'x' is sound: 2 roles in 2 stages, 1 edge")
    assert "and the prompts fit" in invoke("check", "mixture", "--prompts", "mixture").stdout


def test_faults_as_json(invoke: Invoke) -> None:
    result = invoke("check", "wrong.yaml", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [(fault["file"], fault["line"]) for fault in found["faults"]] == [("wrong.yaml", line) for line in (2, 4, 5)]
    assert "did you mean" in found["faults"][1]["message"] or "unknown role 'c'" in found["faults"][1]["message"]
    sound = invoke("check", "fine.yaml", "--json")
    assert (sound.exit_code, json.loads(sound.stdout)["faults"]) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "none.yaml"), "there is no file none.yaml"),
        (("check", "mixtur"), "unknown pattern 'mixtur': did you mean 'mixture'"),
        (("check", "fine.yaml", "--prompts", "mixtur"), "unknown prompt set 'mixtur': did you mean 'mixture'"),
        (("show", "none.yaml"), "there is no file none.yaml"),
        (("show", "wrong.yaml"), "wrong.yaml:4: unknown role 'c'"),
        (("show", "wrd"), "unknown pattern or system 'wrd': did you mean 'ward'"),
        (("show", "."), "holds no system.json"),
        (("show", "mixture", "--svg", "none/x.svg"), "No such file or directory"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(invoke: Invoke, arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1


def test_a_pattern_is_drawn_by_name_and_from_a_file(invoke: Invoke) -> None:
    assert "stage 2  └┄ summarizer (answers) ◀┘" in invoke("show", "mixture").stdout
    result = invoke("show", "fine.yaml", "--svg", "fine.svg")
    assert "b (answers)" in result.stdout
    assert "written to fine.svg" in result.stderr
    assert ElementTree.parse("fine.svg").getroot().tag.endswith("svg")


def test_of_a_system_it_says_what_plays_a_role_and_what_an_edge_carries(
    invoke: Invoke, tiny_models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    agents = {"expert": tiny_models["llama"], "learner": tiny_models["qwen3"]}
    channel = {"learner->expert": "text", "*": "both"}
    system = RecursiveSystem.build(pattern="distillation", agents=agents, channel=channel)
    system.save_pretrained(tmp_path / "team")
    shown = invoke("show", "team", "--svg", "team.svg").stdout
    assert "expert (llama, 64 wide)" in shown
    assert "learner (answers, qwen3, 48 wide)" in shown
    assert "expert->learner   read in the same round   both" in shown
    assert "learner->expert   read one round later     text" in shown
    assert "qwen3, 48 wide" in Path("team.svg").read_text()
    told = json.loads(invoke("show", "team", "--json").stdout)
    assert told["agents"] == {"expert": "llama, 64 wide", "learner": "qwen3, 48 wide"}
    assert told["edges"][1] == {
        "edge": "learner->expert",
        "source": "learner",
        "target": "expert",
        "feedback": True,
        "channel": "text",
    }
