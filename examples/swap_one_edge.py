"""How a team with a text pipeline would begin: one hand-off becomes latent, the others stay text; before and after.

Run: python examples/swap_one_edge.py        (two minutes on one core; -n 400 for a quicker, coarser look)

The pipeline here is the ward's three agents, which have always written each other notes. The planner's note to the
critic is replaced by its latent thoughts, for which two small links are trained on notes that the planner has written
anyway: its inner link, and one for the edge. Nothing else changes, no agent and no prompt.
"""

import argparse
from pathlib import Path

from recursivemas import RecursiveSystem
from recursivemas.evaluation.metrics import mean, paired_difference
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.training.alignment import AlignmentSettings, alignment_pairs, train_alignment
from recursivemas.training.data import encode_turns
from recursivemas.training.inner import InnerSettings, train_inner
from recursivemas.worlds import load_world

EDGE, SENDER, READER = "planner->critic", "planner", "critic"

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("-n", type=int, default=1000, help="questions that both are measured on")
arguments.add_argument("--steps", type=int, default=1000, help="training steps of each of the two links")
arguments.add_argument("--samples", type=int, default=8192, help="notes of the planner that they are trained on")
arguments.add_argument("--out", type=Path, help="where the system with the new edge is saved")
given = arguments.parse_args()

# The pipeline: the same agents, handing each other short notes. Its links, if it had any, play no part.
shipped = RecursiveSystem.from_pretrained("ward")
agents = {role: agent.model for role, agent in shipped.agents.items()}
settings = shipped.settings.model_dump() | {"channel": "text", "variant": "short"}
pipeline = RecursiveSystem.build(agents=agents, pattern=shipped.pattern, prompts=shipped.prompts, **settings)

# What the planner has written in its work: prompts it read, and notes it sent.
world = load_world("ward")
turns = encode_turns(
    world.role_samples("train", given.samples, 0, role=SENDER, variant="short"), agents[SENDER], pipeline.prompts
)
train_inner(pipeline.agents[SENDER], turns, InnerSettings(num_train_steps=given.steps, lr=3e-3))
pairs = alignment_pairs(agents[SENDER], agents[READER], turns)
report = train_alignment(
    EDGE,
    pipeline.links[EDGE],
    pipeline.agents[SENDER].inner_link(pairs.states).detach(),
    pairs.targets,
    AlignmentSettings(num_train_steps=given.steps, lr=3e-3),
)
print(f"{EDGE}: cosine of a latent and the word it stands for, {report['cosine_after']:.3f}\n")

# Before and after, on the same questions; `both` hands on the note as well, a short gist that people can read.
samples = world.samples("test", given.n, 0)
scorer = SCORERS[world.scorer]
channels = {
    "all text": "text",
    f"{EDGE} latent": {EDGE: "latent", "*": "text"},
    f"{EDGE} both": {EDGE: "both", "*": "text"},
}
scores: dict[str, list[float]] = {}
for name, channel in channels.items():
    results = pipeline.run([each.question for each in samples], channel=channel, batch_size=250, trace="off")
    scores[name] = [
        scorer(result.text, sample.target, sample.metadata).value
        for result, sample in zip(results, samples, strict=True)
    ]
    accuracy, change = mean(scores[name]), paired_difference(scores[name], scores["all text"])
    tokens = sum(result.usage.total("generated_tokens") for result in results) / len(results)
    steps = sum(result.usage.total("latent_steps") for result in results) / len(results)
    seconds = sum(result.usage.seconds for result in results) / len(results)
    print(
        f"{name:26} {accuracy.value:.3f} ± {accuracy.stderr:.3f}   change {change.value:+.3f} ± {change.stderr:.3f}   "
        f"{tokens:4.1f} tokens, {steps:3.0f} latent steps, {1000 * seconds:.2f} ms"
    )

if given.out is not None:
    pipeline.settings = pipeline.settings.model_copy(update={"channel": channels[f"{EDGE} latent"]})
    pipeline.save_pretrained(given.out)
    print(f"\nwritten to {given.out}; its own channel is: {pipeline.settings.channel}")
