"""Several processes: the command line trains in them as in one, and goes on with another number of them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from recursivemas.cli.main import app
from recursivemas.errors import ConfigError, InputError
from recursivemas.system import RecursiveSystem
from recursivemas.training.outer import OuterLoop
from recursivemas.training.processes import Processes

# Five questions a step and seven to validate on: shares of two processes are uneven.
RECIPE = """
system: ward
world: {name: ward}
output: runs/one
num_rounds: 2
num_latent_steps: 2
max_new_tokens: 8
inner: {num_samples: 16, num_train_steps: 3, batch_size: 32}
alignment: {num_samples: 16, num_train_steps: 3, batch_size: 32}
outer: {num_samples: 32, num_train_steps: 4, save_every: 1, batch_size: 5, anchor_batch_size: 32, log_every: 1, num_validation: 7, validate_every: 2}
"""


def arguments(name: str, *more: str) -> list[str]:
    return ["train", "ward.yaml", "--set", f"output=runs/{name}", "--device", "cpu", "--json", *more]


OUTER = ("--stage", "outer", "--set", "links.start=given")


def alone(*words: str) -> Any:
    """A command in this process."""
    return CliRunner().invoke(app, list(words))


def in_two(place: Path, commands: Sequence[tuple[list[str], int | None, int]]) -> list[Any]:
    """Commands in two processes, and what they printed."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    script = [str(Path(__file__).with_name("cli_in_processes.py")), json.dumps(commands)]
    done = subprocess.run([*command, *script], env=environment, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


def records(place: Path, key: str) -> list[tuple[str, int, float]]:
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return [(each["stage"], each["step"], each[key]) for each in map(json.loads, lines) if key in each]


def weights_of(place: Path) -> dict[str, Tensor]:
    return {
        f"{name}/{tensor}": value
        for name, link in RecursiveSystem.from_pretrained(place / "system", device="cpu").all_links.items()
        for tensor, value in link.state_dict().items()
    }


def assert_alike(one: Path, other: Path) -> None:
    """The same records in the same order, with losses that differ by rounding at most; and so with the weights."""
    for key in ("loss", "lr", "validation", "grad_norm"):
        expected, found = records(one, key), records(other, key)
        assert [each[:2] for each in found] == [each[:2] for each in expected], key
        assert [each[2] for each in found] == pytest.approx([each[2] for each in expected], rel=1e-5, abs=1e-7), key
    expected_weights, found_weights = weights_of(one), weights_of(other)
    for name, weight in expected_weights.items():
        # Adam divides by the size of a gradient: where that is nearly nothing, rounding decides the direction.
        assert (found_weights[name] - weight).norm() <= 1e-3 * weight.norm(), name


def test_the_command_line_trains_in_two_processes_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ward.yaml").write_text(RECIPE)
    runs = tmp_path / "runs"
    assert alone(*arguments("one")).exit_code == 0
    assert alone(*arguments("one-outer", *OUTER)).exit_code == 0
    losses = OuterLoop.losses
    with monkeypatch.context() as patch:

        def stopping(self: OuterLoop, step: int) -> Any:
            if step == 2:
                raise KeyboardInterrupt
            return losses(self, step)

        patch.setattr(OuterLoop, "losses", stopping)
        assert alone(*arguments("then-two", *OUTER)).exit_code == 130
    printed = in_two(
        tmp_path,
        [
            (arguments("two"), None, 0),
            (arguments("then-two", *OUTER), None, 0),
            (arguments("then-one", *OUTER), 3, 130),
        ],
    )
    # What was stopped prints nothing, and of two processes one speaks.
    assert [each["system"] for each in printed] == ["runs/two/system", "runs/then-two/system"]
    assert not (runs / "then-one" / "system").exists()
    assert alone(*arguments("then-one", *OUTER)).exit_code == 0
    assert_alike(runs / "one", runs / "two")
    assert_alike(runs / "one-outer", runs / "then-two")
    assert_alike(runs / "one-outer", runs / "then-one")
    stages = json.loads((runs / "two" / "system" / "system.json").read_text())["training"]["stages"]
    assert set(stages) == set(json.loads((runs / "one" / "system" / "system.json").read_text())["training"]["stages"])


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Processes.joined("cuda:7") == Processes()
    assert Processes().from_first(lambda: 3) == 3
    tensor = torch.ones(2)
    Processes().hand_out([tensor])
    Processes().leave()
    assert tensor.tolist() == [1, 1]
    with pytest.raises(InputError, match="broken"), Processes().together():
        raise InputError("broken")


@pytest.mark.parametrize(
    ("device", "gpus", "rank", "words"),
    [("cuda:1", 2, 0, "several processes cannot all compute on 'cuda:1'"), (None, 2, 2, "more processes .* 2 GPUs")],
)
def test_processes_without_a_device_of_their_own_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str | None, gpus: int, rank: int, words: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=words):
        Processes.joined(device)
