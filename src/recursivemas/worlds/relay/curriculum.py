"""What the relay's agents read and write: the turns of the loop, and the text they are pretrained on.

An agent's pretraining text holds what its owner knows and no more: its own facts, and names drawn at random wherever
another agent would have had to say where a hop leads (`ChainWorld.follow_alone`).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from recursivemas.training.data import RoleSample
from recursivemas.worlds.relay.chains import (
    MAX_HOPS,
    NAMES,
    NUM_ROUNDS,
    RELATIONS,
    ROLES,
    SENDER,
    VARIANTS,
    Chain,
    ChainWorld,
    Variant,
    answer,
    answer_text,
    note,
)

Style = Literal["short", "full", "name", "cut", "empty"]

NOTE_STYLES: dict[Style, float] = {"short": 0.44, "full": 0.38, "name": 0.03, "cut": 0.12, "empty": 0.03}
"""Share of each kind of note an agent finds in its slot. Whole notes are what the text protocols send; bare names,
notes cut short and empty slots make readers robust to whatever else a channel may bring."""

REPLIES = {
    "planner": {"short": 0.5, "full": 0.5},
    "critic": {"short": 0.5, "full": 0.5},
    "solver": {"short": 0.36, "full": 0.36, "final": 0.26, "solo": 0.02},
}
"""Share of each thing a role is asked to write."""

HOP_SHARES = (weights := np.arange(MAX_HOPS) + 3.0) / weights.sum()
"""Share of each length of chain in pretraining: the hops of long chains are the hardest to find, and few turns reach
them."""

NUM_TURNS = len(ROLES) * NUM_ROUNDS
"""Of a whole loop; the solver answers in the last."""

ROUND_SHARES = (0.29, 0.29, 0.29, 0.13)
"""Share of each round in pretraining: those that the longest chains take, and one more. Hops and rounds are drawn
independently, as they meet in a loop: a reader that never met some pair of them gets the ends of such chains wrong."""


def loop_turns(
    world: ChainWorld, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
) -> list[RoleSample]:
    """Turns of one role in the three-round loop, as the text protocol runs it."""
    chains = world.draw(rng, num_samples, split=split)
    rounds = rng.integers(NUM_ROUNDS, size=num_samples).tolist()
    return [
        _loop_turn(chain, world.follow(chain), len(ROLES) * round_ + ROLES.index(role), variant)
        for chain, round_ in zip(chains, rounds, strict=True)
    ]


def conversations(
    world: ChainWorld, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
) -> list[list[RoleSample]]:
    """All turns of the three-round loop."""
    chains = world.draw(rng, num_samples, split=split)
    return [[_loop_turn(chain, world.follow(chain), turn, variant) for turn in range(NUM_TURNS)] for chain in chains]


def _loop_turn(chain: Chain, names: list[int], turn: int, variant: Variant) -> RoleSample:
    """One turn of the loop (counted from 0), the chain leading along `names`."""
    round_, seat = divmod(turn, len(ROLES))
    return RoleSample(
        role=ROLES[seat],
        question=chain.question,
        target=answer(chain, names, turn) if turn == NUM_TURNS - 1 else note(chain, names, turn, variant),
        round=round_ + 1,
        num_rounds=NUM_ROUNDS,
        messages={SENDER[ROLES[seat]]: note(chain, names, turn - 1, variant) if turn else ""},
        variant=variant,
    )


def pretraining_turns(world: ChainWorld, rng: np.random.Generator, size: int, *, role: str) -> list[RoleSample]:
    """Turns from an agent's pretraining text: mixed rounds, notes and replies, foreign facts drawn at random."""
    chains = world.draw(rng, size, split="train", hop_shares=HOP_SHARES)
    replies = rng.choice(list(REPLIES[role]), p=list(REPLIES[role].values()), size=size).tolist()
    styles = rng.choice(list(NOTE_STYLES), p=list(NOTE_STYLES.values()), size=size).tolist()
    rounds = rng.choice(len(ROUND_SHARES), p=ROUND_SHARES, size=size).tolist()
    samples = []
    for chain, round_, style, reply in zip(chains, rounds, styles, replies, strict=True):
        names = world.follow_alone(rng, chain, role)
        turn = len(ROLES) * round_ + ROLES.index(role)
        if turn == 0 or reply == "solo" or style == "empty":
            # Nothing has been said: as far as anybody can tell, it is the first round.
            turn, received = ROLES.index(role), ""
        else:
            received = _received(rng, chain, names, turn - 1, style)
        is_answer = reply in ("final", "solo")
        samples.append(
            RoleSample(
                role=role,
                question=chain.question,
                target=answer(chain, names, turn) if is_answer else note(chain, names, turn, reply),
                round=round_ + 1,
                num_rounds=round_ + 1 + (not is_answer),
                messages={SENDER[role]: received},
                variant=None if is_answer else reply,
                solo=reply == "solo",
            )
        )
    return samples


def _received(rng: np.random.Generator, chain: Chain, names: Sequence[int], turn: int, style: Style) -> str:
    """The note of a turn: whole, only its name, or broken off somewhere after name and hop have been told."""
    if style == "short" or style == "full":
        return note(chain, list(names), turn, style)
    if style == "name":
        return answer(chain, list(names), turn).rstrip("." if rng.random() < 0.5 else "")
    if rng.random() < 0.5:
        return note(chain, list(names), turn, "short").rstrip(".")
    words = note(chain, list(names), turn, "full").split()
    least = words.index("is") + 2 if "is" in words else len(words)
    return " ".join(words[: rng.integers(least, len(words) + 1)]).rstrip(",.")


def drills(world: ChainWorld, rng: np.random.Generator, size: int, *, role: str) -> list[RoleSample]:
    """Textbook questions: one fact of a role, without a chain around it."""
    relations = rng.integers(len(RELATIONS[role]), size=size).tolist()
    names = rng.integers(len(NAMES), size=size).tolist()
    return [
        RoleSample(
            role=role,
            question=f"Who is the {RELATIONS[role][relation]} of {NAMES[name]}?",
            target=answer_text(NAMES[world.facts[role][relation, name]]),
            num_rounds=2,
            variant=VARIANTS[0],
        )
        for relation, name in zip(relations, names, strict=True)
    ]


def protocol_words() -> str:
    """Every word the prompts and protocols use beside those of `chains.vocabulary`, as one text."""
    return (
        "Start at: hop, Hop: the of is so go on from. The chain has ended at with. Who is the of? "
        "Note: Short note: Full note: Answer:"
    )
