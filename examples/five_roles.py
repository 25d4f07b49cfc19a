"""A pattern of one's own, with five roles: checked, drawn, run, trained for a few steps, saved and loaded.

The table is in five_roles/pattern.yaml, the words are in five_roles/prompts.yaml; docs/patterns.md explains both.
Run: python examples/five_roles.py
"""

import tempfile
from pathlib import Path

import torch
from tiny import tiny_model

from recursivemas import RecursiveSystem
from recursivemas.checking import check
from recursivemas.drawing import text
from recursivemas.training.data import Question
from recursivemas.training.outer import OuterSettings, train_outer

files = Path(__file__).parent / "five_roles"
pattern, prompts = files / "pattern.yaml", files / "prompts.yaml"

# The same as: recursivemas pattern check five_roles/pattern.yaml --prompts five_roles/prompts.yaml
print("faults:", [str(fault) for fault in check(pattern, prompts)] or "none")

# The planners share a model, so they think side by side in one batch; the other three are of other architectures.
planner = tiny_model("qwen3", seed=1)
system = RecursiveSystem.build(
    pattern=pattern,
    prompts=prompts,
    agents={
        "bold": planner,
        "careful": planner,
        "judge": tiny_model("llama", hidden_size=48, seed=2),
        "critic": tiny_model("qwen2", seed=3),
        "solver": tiny_model("mistral", hidden_size=40, seed=4),
    },
    num_rounds=2,
    num_latent_steps=3,
    max_new_tokens=8,
)
print(text.draw(system.pattern), "\n")


def loss_of(questions):
    """Eq. 6: the cross-entropy of the answers after the last round."""
    with torch.no_grad():
        *_, last = system.unroll([question.text for question in questions])
        return last.agent.loss(last.reading, [question.answer for question in questions]).mean().item()


questions = [
    Question(id=f"{a}-{b}", text=f"Is {a} more than {b}?", answer="yes" if a > b else "no")
    for a in range(2, 10)
    for b in range(2, 10)
]
train, held_out = questions[::2], questions[1::8]
before = loss_of(held_out)
settings = OuterSettings(num_train_steps=20, batch_size=4, warmup_steps=2, lr=0.03, anchor=0, round_weights="last")
fitted = train_outer(system, train, settings)
print(f"loss on held-out questions: {before:.2f} before, {loss_of(held_out):.2f} after {len(fitted.losses)} steps")
unmoved = [tensor for tensor, distance in fitted.movement.items() if distance == 0]
print(f"{len(fitted.movement)} tensors of links were trained; not moved: {unmoved or 'none'}")

with tempfile.TemporaryDirectory() as directory:
    system.save_pretrained(Path(directory) / "team")
    loaded = RecursiveSystem.from_pretrained(Path(directory) / "team", device="cpu")
answers = [each.run("Is 4 more than 9?").text for each in (system, loaded)]
print(f"answer {answers[0]!r}, after loading {answers[1]!r}")
assert answers[0] == answers[1]
