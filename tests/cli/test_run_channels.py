"""`recursivemas run` with a specialist who says nothing: it answers, and tells whose words are missing."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from recursivemas.cli.main import app
from recursivemas.worlds import load_world


@pytest.mark.parametrize(
    ("channel", "told"),
    [
        ("chemist->summarizer=none", "nothing is sent on chemist->summarizer: these slots stay empty"),
        ("none", ""),
        ("latent", ""),
    ],
)
def test_a_missing_specialist_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channel: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    question = load_world("panel").samples("test", 1, 0)[0].question
    result = CliRunner().invoke(app, ["run", "panel", question, "--channel", channel])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert ("nothing is sent" in result.stderr) == bool(told)
    assert told in result.stderr
