"""The relay world: chains of relations that no single agent can follow, with the exact optimum for every round.

A question names somebody to start at and a chain of relations, "Start at tamo: 1 mentor, 2 tutor, 3 baker, 4 rival."
Each hop takes one relation: from tamo to the mentor of tamo, from there to that one's tutor, and so on. Everybody sees
the whole question, but who is whose mentor is known to one agent only: the first hop belongs to the planner, the second
to the critic, the third to the solver, the fourth to the planner again. A relation is a permutation of the names, so
whoever does not know it learns nothing about where a hop leads.

So a round through planner -> critic -> solver carries a chain three hops further, and r rounds answer chains of up to
3 r hops; about longer ones no more can be known than that each name is as likely as any other.

This module holds the chains, the facts and their texts, and needs numpy alone. It knows nothing about models, links or
latents.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recursivemas.worlds.splits import bucket_of, is_in

Ints = NDArray[np.int64]
Variant = Literal["short", "full"]
VARIANTS: tuple[Variant, ...] = ("short", "full")

ROLES = ("planner", "critic", "solver")
SENDER = {"planner": "solver", "critic": "planner", "solver": "critic"}
"""Whose note a role reads; the loop is closed."""

NAMES = (
    "tamo", "bilo", "kesa", "ruvi", "dopa", "fenu", "gali", "misu", "novi", "pelu", "rasi", "sobe", "tuka", "vemi",
    "zaro", "belu", "dimo", "fovu", "gura", "kipo", "lami", "mabe", "nesu", "pogi", "reko", "siva", "tebu", "vona",
    "zimu", "laku", "kudo", "gefi",
)  # fmt: skip
RELATIONS = {
    "planner": ("mentor", "rival", "cousin", "patron"),
    "critic": ("tutor", "partner", "doctor", "landlord"),
    "solver": ("baker", "barber", "lawyer", "tailor"),
}

NO_HOP = 4
"""Index of a relation where a chain has no hop, in arrays of chains."""

MAX_HOPS = 9
NUM_ROUNDS = 3
"""They carry the longest chains to their ends."""
TURNS_PER_ROUND = len(ROLES)


@dataclass(frozen=True)
class Chain:
    """A question: where to start, and for every hop which of its owner's relations to take."""

    start: int
    relations: tuple[int, ...]

    @property
    def num_hops(self) -> int:
        return len(self.relations)

    def relation(self, hop: int) -> str:
        """The word for a hop, counted from 1."""
        return RELATIONS[owner(hop)][self.relations[hop - 1]]

    @property
    def question(self) -> str:
        """`Start at tamo: 1 mentor, 2 tutor.`"""
        hops = ", ".join(f"{hop} {self.relation(hop)}" for hop in range(1, self.num_hops + 1))
        return f"Start at {NAMES[self.start]}: {hops}."


def owner(hop: int) -> str:
    """Whose a hop is; hops are counted from 1."""
    return ROLES[(hop - 1) % len(ROLES)]


def split_of(starts: Ints, relations: Ints) -> Ints:
    """The bucket every chain belongs to (see `worlds/splits.py`), by all that it asks.

    `relations` is (chain, hop), with `NO_HOP` after the last hop of a chain.
    """
    code = starts.astype(np.uint64)
    for column in range(MAX_HOPS):
        code = code * np.uint64(NO_HOP + 1) + relations[:, column].astype(np.uint64)
    return bucket_of(code)


# --- texts ------------------------------------------------------------------------------------------------------------


def note(chain: Chain, names: list[int], turn: int, variant: Variant) -> str:
    """What the role of a turn (counted from 0) writes, if the chain leads along `names`.

    Turn t takes hop t + 1; when the chain is over, its last name is passed on. `tamo hop 2.` or `Hop 2: the tutor of
    bilo is tamo, so go on from tamo.`: in short notes the informative word comes first.
    """
    hop = min(turn + 1, chain.num_hops)
    name = NAMES[names[hop]]
    if variant == "short":
        return f"{name} hop {hop}."
    if turn >= chain.num_hops:
        return f"The chain has ended at hop {hop} with {name}."
    return f"Hop {hop}: the {chain.relation(hop)} of {NAMES[names[hop - 1]]} is {name}, so go on from {name}."


def answer(chain: Chain, names: list[int], turn: int) -> str:
    """What the solver answers in a turn: how far the chain has come by then."""
    return answer_text(NAMES[names[min(turn + 1, chain.num_hops)]])


def answer_text(name: str) -> str:
    return f"{name}."


def vocabulary() -> tuple[str, ...]:
    """Every word of the world that carries meaning; each is one token in every agent's tokenizer."""
    relations = [word for words in RELATIONS.values() for word in words]
    return (*NAMES, *relations, *(str(hop) for hop in range(1, MAX_HOPS + 1)))


# --- facts ------------------------------------------------------------------------------------------------------------


class ChainWorld:
    """One drawn world: who is whose mentor, tutor, baker, and so on.

    Seeds give different worlds of the same construction.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, zlib.crc32(b"relay")])
        self.seed = seed
        self.facts: dict[str, Ints] = {
            role: np.stack([rng.permutation(len(NAMES)) for _ in RELATIONS[role]]) for role in ROLES
        }
        """By role, (relation, name): where a hop from a name leads."""

    def draw(
        self,
        rng: np.random.Generator,
        num_chains: int,
        *,
        split: str | None = None,
        hop_shares: NDArray[np.float64] | None = None,
    ) -> list[Chain]:
        """Chains of 1 to 9 hops, all lengths equally often if no shares are given, of one split or (None) of all.

        There are only 32 x 4 chains of one hop, so short ones come again and again.
        """
        num_hops = 1 + rng.choice(MAX_HOPS, p=hop_shares, size=num_chains)
        starts = np.zeros(num_chains, dtype=np.int64)
        relations = np.full((num_chains, MAX_HOPS), NO_HOP)
        missing = np.arange(num_chains)
        while len(missing) > 0:
            starts[missing] = rng.integers(len(NAMES), size=len(missing))
            drawn = rng.integers(NO_HOP, size=(len(missing), MAX_HOPS))
            relations[missing] = np.where(np.arange(MAX_HOPS) < num_hops[missing, None], drawn, NO_HOP)
            if split is None:
                break
            missing = missing[~is_in(split_of(starts[missing], relations[missing]), split)]
        rows = zip(starts.tolist(), relations.tolist(), num_hops.tolist(), strict=True)
        return [Chain(start, tuple(row[:hops])) for start, row, hops in rows]

    def follow(self, chain: Chain) -> list[int]:
        """The names along a chain: its start, and where each hop leads."""
        names = [chain.start]
        for hop, relation in enumerate(chain.relations, start=1):
            names.append(int(self.facts[owner(hop)][relation, names[-1]]))
        return names

    def follow_alone(self, rng: np.random.Generator, chain: Chain, role: str) -> list[int]:
        """A chain as one role can imagine it: its own hops lead where they do, all others anywhere."""
        names = [chain.start, *rng.integers(len(NAMES), size=chain.num_hops).tolist()]
        for hop, relation in enumerate(chain.relations, start=1):
            if owner(hop) == role:
                names[hop] = int(self.facts[role][relation, names[hop - 1]])
        return names
