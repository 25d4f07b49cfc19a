"""Two tiny systems in the authors' released layout, with every message as the authors' own inference code computed it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recursivemas import RecursiveSystem, SamplingParams

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden systems are not at {GOLDEN}")

NAMES = ("sequential", "mixture")


def read(name: str) -> tuple[RecursiveSystem, dict[str, Any]]:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    system = RecursiveSystem.from_release(
        GOLDEN / name,
        pattern=expected["pattern"],
        task=expected["task"],
        prompts=expected["prompts"],
        system_prompt=expected["system_prompt"],
        dtype="float32",
        device="cpu",
    )
    return system, expected


def assert_as_computed_by_the_authors(
    system: RecursiveSystem, expected: dict[str, Any], name: str, *, together: bool
) -> None:
    options: dict[str, Any] = {
        "num_rounds": expected["rounds"],
        "num_latent_steps": expected["latent_steps"],
        "sampling": SamplingParams(temperature=0.0, max_new_tokens=expected["max_new_tokens"]),
        "trace": True,
    }
    questions = expected["questions"]
    results = system.run(questions, **options) if together else [system.run(each, **options) for each in questions]
    assert [result.text for result in results] == expected["answers"]
    tensors = load_file(GOLDEN / name / "expected.safetensors")
    assert tensors
    for key, messages in tensors.items():
        round, edge = key.removeprefix("round").split(".")
        source, target = edge.split("_to_")
        for result, message in zip(results, messages, strict=True):
            found = result.trace.message(round=int(round), source=source, target=target)
            assert (found - message).norm() <= 1e-4 * message.norm(), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "alone"])
def test_messages_and_answers_are_those_of_the_authors_code(name: str, together: bool) -> None:
    system, expected = read(name)
    assert_as_computed_by_the_authors(system, expected, name, together=together)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_same_in_our_own_format(name: str, tmp_path: Path) -> None:
    system, expected = read(name)
    system.save_pretrained(tmp_path / "ours")
    loaded = RecursiveSystem.from_pretrained(tmp_path / "ours", device="cpu")
    assert_as_computed_by_the_authors(loaded, expected, name, together=True)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_written_back_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    system, expected = read(name)
    system.save_release(tmp_path / "theirs", task=expected["task"])
    written = {str(file.relative_to(tmp_path / "theirs")): file for file in (tmp_path / "theirs").rglob("*")}
    links = [file for file in written if file.endswith(".pt")]
    assert links
    for file in links:
        one, other = (torch.load(root / file, weights_only=True) for root in (tmp_path / "theirs", GOLDEN / name))
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), f"{file} {key}"
    for role in system.agents:
        one, other = (load_file(root / role / "model.safetensors") for root in (tmp_path / "theirs", GOLDEN / name))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    # Nothing but what belongs to another task is left out.
    for file in (GOLDEN / name).rglob("*.*"):
        if "(code)" not in file.name and "expected" not in file.name:
            assert str(file.relative_to(GOLDEN / name)) in written
