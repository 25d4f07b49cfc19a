"""Two tiny systems in the authors' released form, with every message as the authors' own inference code computed it.

Not an importer: the weights are put into our classes by hand here, to hold the loop itself against an outside reference.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recursivemas.agents import Agent
from recursivemas.decoding import SamplingParams
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden systems are not at {GOLDEN}")

KEYS = {
    "proj1": "w1",
    "proj2": "w2",
    "residual_proj": "w3",
    "pre_ln": "source_norm",
    "ln_source": "source_norm",
    "post_ln": "target_norm",
    "ln_target": "target_norm",
}

PATTERNS = {
    "sequential": Pattern.load("sequential"),
    "mixture": Pattern.load(
        {
            "name": "mixture",
            "stages": [["math", "code", "science"], ["summarizer"]],
            "edges": [f"{each}->summarizer" for each in ("math", "code", "science")]
            + [f"summarizer->{each}" for each in ("math", "code", "science")],
            "answers": "summarizer",
        }
    ),
}
OUTER = {
    "sequential": {"planner->critic": "outer_12", "critic->solver": "outer_23", "solver->planner": "outer_31"},
    "mixture": {
        "math->summarizer": "outer_1s",
        "code->summarizer": "outer_2s",
        "science->summarizer": "outer_3s",
        "summarizer->math": "outer_s1",
        "summarizer->code": "outer_s2",
        "summarizer->science": "outer_s3",
    },
}


def read_link(link: RecursiveLink, file: Path) -> RecursiveLink:
    weights = torch.load(file, weights_only=True)
    renamed = {f"{KEYS[name.split('.')[0]]}.{name.split('.')[1]}": tensor.float() for name, tensor in weights.items()}
    link.load_state_dict({**renamed, "scale": torch.ones(())})
    return link


def read_system(name: str, tmp_path: Path, expected: dict[str, Any]) -> RecursiveSystem:
    pattern, suffix = PATTERNS[name], "(math)" if name == "sequential" else ""
    agents = {}
    for role in pattern.roles:
        # An adapter_config.json beside the weights would be taken for one of peft's.
        shutil.copytree(GOLDEN / name / role, tmp_path / role, ignore=shutil.ignore_patterns("adapter*", "inner*"))
        model = LanguageModel.from_pretrained(tmp_path / role, dtype="float32", device="cpu")
        link = RecursiveLink.inner(model.hidden_size, design="ln-res-2-layer")
        agents[role] = Agent(role, model, read_link(link, GOLDEN / name / role / f"adapter{suffix}.pt"))
    links = {
        edge: read_link(
            RecursiveLink.outer(
                agents[edge.split("->")[0]].model.hidden_size,
                agents[edge.split("->")[1]].model.hidden_size,
                design="ln-res-2-layer",
            ),
            GOLDEN / name / "outer" / f"{file}{suffix}.pt",
        )
        for edge, file in OUTER[name].items()
    }
    prompts = PromptSet.load({"name": name, "system": expected["system_prompt"], "roles": expected["prompts"]})
    return RecursiveSystem(agents, links, pattern, prompts)


@pytest.mark.parametrize("name", ["sequential", "mixture"])
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "alone"])
def test_messages_and_answers_are_those_of_the_authors_code(name: str, together: bool, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    tensors = load_file(GOLDEN / name / "expected.safetensors")
    system = read_system(name, tmp_path, expected)
    options: dict[str, Any] = {
        "num_rounds": expected["rounds"],
        "num_latent_steps": expected["latent_steps"],
        "sampling": SamplingParams(temperature=0.0, max_new_tokens=expected["max_new_tokens"]),
        "trace": True,
    }
    questions = expected["questions"]
    results = system.run(questions, **options) if together else [system.run(each, **options) for each in questions]
    assert [result.text for result in results] == expected["answers"]
    assert tensors
    for key, messages in tensors.items():
        round, edge = key.removeprefix("round").split(".")
        source, target = edge.split("_to_")
        for result, message in zip(results, messages, strict=True):
            found = result.trace.message(round=int(round), source=source, target=target)
            assert (found - message).norm() <= 1e-4 * message.norm(), key
