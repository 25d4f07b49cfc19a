"""`recursivemas tune`: what it prints, what it writes and where, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from recursivemas.cli.main import app
from recursivemas.system import RecursiveSystem

Invoke = Callable[..., Result]
DIALS = ("--rounds", "1,2", "--latent-steps", "1,3", "-n", "20")


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_it_writes_a_tuned_copy_of_a_bundled_system(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("ward", "--task", "ward", *DIALS, "--out", "tuned")
    assert result.exit_code == 0, result.stderr
    assert "chosen:" in result.stdout
    tuned = RecursiveSystem.from_pretrained(tmp_path / "tuned")
    record = tuned.training["tuned"]
    assert (tuned.settings.num_rounds, tuned.settings.num_latent_steps) == (
        record["chosen"]["num_rounds"],
        record["chosen"]["num_latent_steps"],
    )
    assert record["split"] == "validation"
    assert len(record["points"]) == 4
    assert not list(tmp_path.glob("*-answers.jsonl"))


def test_it_changes_a_directory_of_yours(invoke: Invoke, tmp_path: Path) -> None:
    RecursiveSystem.from_pretrained("ward").save_pretrained(tmp_path / "mine")
    before = {file: file.read_bytes() for file in (tmp_path / "mine").rglob("*") if file.is_file()}
    told = json.loads(invoke("mine", "--task", "ward", *DIALS, "--no-write", "--json").stdout)
    assert told["written"] is None
    assert all(file.read_bytes() == content for file, content in before.items())
    told = json.loads(invoke("mine", "--task", "ward", *DIALS, "--json", "--max-tokens", "8").stdout)
    # With one round of one step an answer takes three tokens and two latent steps; two rounds take eight and more.
    assert told["chosen"]["num_rounds"] == 1
    changed = {file.name for file, content in before.items() if file.read_bytes() != content}
    assert changed == {"system.json"}
    assert RecursiveSystem.from_pretrained(tmp_path / "mine").settings.num_rounds == 1


def test_it_takes_questions_of_your_own(invoke: Invoke, tmp_path: Path) -> None:
    rows = [{"question": f"Case {number}?", "answer": "x"} for number in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("ward", "--data", "mine.jsonl", "--rounds", "1", "--latent-steps", "1", "--no-write", "--json")
    assert json.loads(result.stdout)["chosen"]["n"] == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ward",), "either --task NAME or --data"),
        (("ward", "--task", "ward"), "give --out DIR"),
        (("ward", "--task", "wrad", "--no-write"), "did you mean 'ward'"),
        (("ward", "--task", "ward", "--no-write", "--max-ms", "0"), "more than 0 milliseconds"),
        (("ward", "--task", "ward", "--no-write", "--max-tokens", "-2"), "more than 0 tokens"),
        (("ward", "--task", "ward", "--no-write", "--max-ms", "1", "--max-tokens", "1"), "one budget"),
        (("ward", "--task", "ward", "--no-write", "--rounds", "one"), "--rounds 'one'"),
        (("ward", "--task", "ward", "--no-write", "-n", "1"), "2 or more"),
    ],
)
def test_bad_input_is_one_line(invoke: Invoke, arguments: tuple[str, ...], complaint: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
