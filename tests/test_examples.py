"""The examples run as they stand, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

from recursivemas.system import RecursiveSystem

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options], capture_output=True, text=True, timeout=600, check=False
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


def test_mixture() -> None:
    printed = run("mixture.py")
    assert "stage 2  └┄ summarizer (answers) ◀┘" in printed
    assert "round 1  summarizer->code: (4, 48)" in printed
    written = re.search(
        r"tokens written in round 1: \{'math': 0, 'science': 0, 'code': (\d+), 'summarizer': 0\}", printed
    )
    assert written
    assert int(written[1]) > 0


def test_distillation() -> None:
    printed = run("distillation.py")
    assert "link expert->learner: 64 -> 32 dimensions" in printed
    assert "latent  the expert thinks 16 latent steps and writes 0 tokens" in printed
    assert re.search(r"text    the expert thinks 0 latent steps and writes [1-9]\d* tokens", printed)


def test_deliberation() -> None:
    printed = run("deliberation.py")
    assert "What your partner thinks: {latents:reflector}" in printed
    assert "3 rounds: 5 messages, 20 latent steps" in printed
    changed = re.search(r"second message is (\d+)% different", printed)
    assert changed
    assert int(changed[1]) > 0


def test_five_roles() -> None:
    printed = run("five_roles.py")
    assert "faults: none" in printed
    assert "stage 4  └┄ solver (answers) ◀──┘" in printed
    before, after = map(float, re.findall(r"(\d\.\d\d) (?:before|after)", printed))
    assert after < before
    assert "31 tensors of links were trained; not moved: none" in printed
    answer = re.search(r"answer '(.*)', after loading '(.*)'", printed)
    assert answer
    assert answer[1] == answer[2]


def test_the_five_roles_are_those_of_the_documentation() -> None:
    text = (EXAMPLES.parent / "docs" / "patterns.md").read_text(encoding="utf-8")
    for file in ("pattern.yaml", "prompts.yaml"):
        assert (EXAMPLES / "five_roles" / file).read_text(encoding="utf-8").strip() in text, file


def test_swap_one_edge(tmp_path: Path) -> None:
    """Fewer questions and steps than the example takes: the new link is used, and is of use."""
    printed = run(
        "swap_one_edge.py", "-n", "120", "--steps", "150", "--samples", "512", "--out", str(tmp_path / "swapped")
    )
    rows = re.findall(r"(all text|latent|both) +(\.\d+|\d\.\d+) ± .* ([\d.]+) tokens, +(\d+) latent steps", printed)
    assert [(name, float(tokens), int(steps)) for name, _, tokens, steps in rows] == [
        ("all text", 43.0, 0),
        ("latent", 28.0, 9),
        ("both", 43.0, 9),
    ]
    accuracy = {name: float(value) for name, value, _, _ in rows}
    assert accuracy["latent"] > 0.45  # where the planner is not heard, the pipeline stays below .35
    swapped = RecursiveSystem.from_pretrained(tmp_path / "swapped")
    assert swapped.settings.channel == {"planner->critic": "latent", "*": "text"}
