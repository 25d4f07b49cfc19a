"""Run by test_killed.py: trains a system, kills it at random moments, and starts it again until it is done.

Everything is imported once, and every start is a fork of this process: so a start costs what training costs. Prints, as
JSON, at which moments runs were killed, and whether each of them ended with the weights of the one that was not.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tests.conftest import CORPUS  # noqa: F401  (switches the hub off)

from recursivemas.checkpoint import folder_sha256
from recursivemas.cli.main import app

# Saved at every step, so that many of the kills come in the middle of a save.
RECIPE = """
system: ward
world: {name: ward}
output: OUTPUT
num_rounds: 2
num_latent_steps: 2
max_new_tokens: 6
trackers: []
inner: {num_samples: 32, num_train_steps: 4, batch_size: 64, save_every: 1, log_every: 1}
alignment: {num_samples: 32, num_train_steps: 4, batch_size: 64, save_every: 1, log_every: 1}
outer: {num_train_steps: 6, batch_size: 4, num_samples: 64, num_validation: 8, validate_every: 3, save_every: 1, anchor_batch_size: 32, log_every: 1}
"""


def start(place: Path) -> int:
    """A process that trains; the number of it."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    code = 1
    try:
        app(["train", str(place.with_suffix(".yaml")), "--device", "cpu"], standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> bool:
    """Whether a process ends well in so many seconds; else it is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0, "training failed"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def weights(place: Path) -> dict[str, str]:
    return {folder.name: folder_sha256(folder) for folder in sorted((place / "system" / "links").iterdir())}


def moment(place: Path) -> str:
    """The stage that was being trained, and whether a save was cut short."""
    if list(place.glob(".system-*")):
        return "the system, while saving"
    states = {file.parent: json.loads(file.read_text()) for file in place.glob("state/*/manifest.json")}
    folders = sorted(place.glob("state/*"), key=lambda each: each.stat().st_mtime)
    if not folders:
        return "before the first save"
    known = {"manifest.json", *(each["file"] for each in states.get(folders[-1], {"files": {}})["files"].values())}
    is_cut = {file.name for file in folders[-1].iterdir()} - known
    return folders[-1].name.split("-")[0] + (", while saving" if is_cut else "")


def main(place: Path, num_kills: int, kills_each: int, seed: int) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    train(place / "whole")
    length = time.monotonic() - started
    expected, rng, moments, same = weights(place / "whole"), random.Random(seed), [], []
    while len(moments) < num_kills and len(same) < num_kills:
        run, kills = place / f"killed-{len(same)}", 0
        write_recipe(run)
        # What is done already is not done again, but the models are loaded each time.
        while kills < kills_each and len(moments) < num_kills:
            if ended(start(run), length * rng.uniform(0.1, 0.8)):
                # The machine has become faster since; so are the kills.
                length *= 0.8
                break
            moments.append(moment(run))
            kills += 1
        if not (run / "system").exists():
            train(run)
        same.append(weights(run) == expected)
    sys.stdout.write(json.dumps({"moments": moments, "same": same}))


def write_recipe(run: Path) -> None:
    run.with_suffix(".yaml").write_text(RECIPE.replace("OUTPUT", str(run)))


def train(run: Path) -> None:
    """A run to its end."""
    write_recipe(run)
    assert ended(start(run), 600), "training takes too long"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
