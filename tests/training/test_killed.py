"""A training run that is killed at any moment, and started again until it is done, ends with the same weights."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recursivemas.checkpoint import folder_sha256

NUM_RUNS, KILLS_EACH = 5, 6
# Saved at every step, so that many of the kills come in the middle of a save.
SETTINGS = {
    "inner": {"num_samples": 64, "num_train_steps": 25, "save_every": 1},
    "alignment": {"num_samples": 64, "num_train_steps": 25, "save_every": 1},
    "outer": {
        "num_train_steps": 12, "batch_size": 4, "num_samples": 64, "num_validation": 8, "validate_every": 4,
        "save_every": 1, "anchor_batch_size": 32,
    },
}  # fmt: skip


def command(output: Path) -> list[str]:
    changes = [f"{stage}.{key}={value}" for stage, keys in SETTINGS.items() for key, value in keys.items()]
    changed = [part for each in [f"output={output}", *changes] for part in ("--set", each)]
    return [sys.executable, "-m", "recursivemas.cli.main", "train", "recipes/ward.yaml", *changed]


def weights(output: Path) -> dict[str, str]:
    return {folder.name: folder_sha256(folder) for folder in sorted((output / "system" / "links").iterdir())}


def where(output: Path) -> str:
    """The stage that was being trained, and whether a save was cut short."""
    metrics = output / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    stage = json.loads(lines[-1])["stage"].split("-")[0] if lines else "nothing yet"
    return stage + (", while saving" if list((output / "state").glob("*.draft")) else "")


@pytest.mark.slow
def test_every_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), cwd=root, check=True, capture_output=True)
    length = time.monotonic() - started
    expected = weights(tmp_path / "whole")
    rng, moments = random.Random(0), []
    for number in range(NUM_RUNS):
        output = tmp_path / f"killed {number}"
        kills = 0
        while kills < KILLS_EACH:
            process = subprocess.Popen(
                command(output), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            try:
                # What is done already is not done again, so later starts are shorter.
                process.wait(timeout=rng.uniform(0.3, 1.0) * length * (1 if kills < 2 else 0.7))
                assert process.returncode == 0, process.stderr.read() if process.stderr else ""
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                moments.append(where(output))
                kills += 1
        subprocess.run(command(output), cwd=root, check=True, capture_output=True)
        assert weights(output) == expected, moments
    sys.stdout.write(
        f"{len(moments)} kills: {', '.join(f'{moments.count(each)} {each}' for each in sorted(set(moments)))}\n"
    )
    assert len(moments) >= 20
    assert {"inner", "alignment", "outer"} <= {each.split(",")[0] for each in moments}
