"""A system of random models on disk, with questions and what every role should write."""

import json
from pathlib import Path

import pytest
from tests.conftest import make_model

from recursivemas.system import RecursiveSystem

ROLES = {"planner": "qwen3", "critic": "llama", "solver": "qwen2"}
ANIMALS = ("fox", "dog", "critic")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where these are: `system`, and `rows.jsonl`."""
    place = tmp_path_factory.mktemp("baselines")
    models = {role: make_model(family, seed) for seed, (role, family) in enumerate(ROLES.items())}
    system = RecursiveSystem.build(agents=models, num_rounds=2, num_latent_steps=2, max_new_tokens=6)
    system.save_pretrained(place / "system")
    rows = [
        {
            "question": f"Who runs {number} miles?",
            "answer": f"The {ANIMALS[number % 3]}.",
            "planner": f"Look for the {ANIMALS[number % 3]}.",
            "critic": f"It is the {ANIMALS[number % 3]}.",
        }
        for number in range(60)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place
