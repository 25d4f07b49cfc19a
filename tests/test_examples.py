"""The examples run as they stand, and show what they say."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart() -> None:
    printed = run("quickstart.py")
    assert "cost: 3 generated tokens, 24 latent steps" in printed
    assert "planner->critic, round 1: a tensor of shape (3, 80)" in printed
    assert "solver alone:" in printed


def test_two_agents_by_hand() -> None:
    lines = run("two_agents_by_hand.py").splitlines()
    scores = {line[7:]: float(line[:5]) for line in lines if line[0] in "01"}
    alone, text, *broken, fitted = scores.values()
    assert len(broken) == 3
    assert text > alone
    assert fitted > max(broken)
