"""A training run that is killed at any moment, and started again until it is done, ends with the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def killed(place: Path, num_kills: int, kills_each: int, seed: int) -> dict[str, Any]:
    """What became of runs that were killed so often each, and so often in all; see killed_runs.py."""
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(place), str(num_kills), str(kills_each), str(seed)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    moments = found["moments"]
    counted = ", ".join(f"{moments.count(each)} {each}" for each in sorted(set(moments)))
    sys.stdout.write(f"{len(moments)} kills in {len(found['same'])} runs: {counted}\n")
    return found


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    found = killed(tmp_path, 3, 3, seed=0)
    assert all(found["same"]), found
    assert found["moments"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_killed_at_thirty_moments_end_with_the_same_weights(tmp_path: Path) -> None:
    found = killed(tmp_path, 30, 5, seed=1)
    assert all(found["same"]), found
    assert len(found["moments"]) == 30
    assert {"inner", "alignment", "outer"} <= {each.split(",")[0] for each in found["moments"]}
