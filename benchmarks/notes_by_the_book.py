"""What faultless agents of the ward would reach in text, over how much they count their own findings again.

The weight the agents are pretrained with (`REREAD`) is chosen by this table, on training cases, so that text gets its
best protocol. Run: python benchmarks/notes_by_the_book.py
"""

import numpy as np

from recursivemas.worlds.ward import cases

NUM_CASES = 20_000
weights = cases.REREAD.copy()
print("weight    short: r = 1 / 2 / 3    graded: r = 1 / 2 / 3")
for weight in (0.0, 0.2, 0.4, 0.6, 0.8):
    cases.REREAD.update(short=weight, graded=weight)
    world = cases.CaseWorld(0)
    drawn = world.draw(np.random.default_rng(5), NUM_CASES, split="train")
    posterior = world.posterior(drawn)
    scores = []
    for variant in ("short", "graded"):
        notes = world.protocol(drawn, variant)
        last = [notes[turn].top[:, 0] for turn in (2, 5, 8)]  # the solver's choice at the end of each round
        scores.append(" / ".join(f"{posterior[np.arange(NUM_CASES), choice].mean():.3f}" for choice in last))
    print(f"{weight:.1f}       {scores[0]}     {scores[1]}")
print(f"mean exact posterior of the choice, {NUM_CASES:,} training cases, world seed 0")
print(f"the agents are made with {weights}")
