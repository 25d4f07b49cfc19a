"""The relay: a world of chains that grow with the rounds, with its exact optimum (see `chains.py`).

>>> relay = Relay(seed=0)
>>> sample = relay.samples("test", 1000, seed=1)[0]  # the question, the name at the end of its chain, its hops
>>> turns = relay.role_samples("train", 512, 0, role="planner", variant="short")
"""

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.evaluation.task import Sample
from recursivemas.training.data import RoleSample
from recursivemas.worlds.relay import chains, curriculum
from recursivemas.worlds.relay.agents import AGENT_RECIPES
from recursivemas.worlds.relay.chains import NAMES, NUM_ROUNDS, RELATIONS, ROLES, VARIANTS, ChainWorld, Variant
from recursivemas.worlds.tokenizers import build_tokenizer
from recursivemas.worlds.world import World

__all__ = ["ChainWorld", "Relay"]


class Relay(World):
    """One relay world: its chains, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, other facts.
    """

    name = "relay"
    roles: tuple[str, ...] = ROLES
    pattern = "sequential"
    prompts = "relay"
    scorer = "exact"
    variants = VARIANTS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, AGENT_RECIPES)
        # A short note is four tokens: a name, the word "hop", its number, a full stop.
        self.settings = {"num_rounds": NUM_ROUNDS, "num_latent_steps": 4, "max_new_tokens": 24}
        self.chains = ChainWorld(seed)

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Chains of a split, drawn independently (the few that have one or two hops come more than once).

        The target is the name at the end of the chain, `metadata["hops"]` its length, `metadata["rounds"]` the rounds
        that carry it so far.
        """
        drawn = self.chains.draw(self.rng("chains", split, "", seed), num_samples, split=split)
        return [
            Sample(
                id=f"{self.name}-{self.seed}-{split}-{seed}-{row}",
                question=chain.question,
                target=NAMES[self.chains.follow(chain)[-1]],
                metadata={"hops": chain.num_hops, "rounds": -(-chain.num_hops // len(ROLES))},
            )
            for row, chain in enumerate(drawn)
        ]

    def optimum(self, samples: list[Sample], num_rounds: int) -> float:
        """The share of chains that end within the hops of so many rounds; about the others one can but guess."""
        reach = len(ROLES) * num_rounds
        return float(np.mean([1.0 if sample.metadata["hops"] <= reach else 1 / len(NAMES) for sample in samples]))

    def answer_text(self, target: str) -> str:
        """What the solver writes for the name at the end of a chain."""
        return chains.answer_text(target)

    def _loop_turns(
        self, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
    ) -> list[RoleSample]:
        return curriculum.loop_turns(self.chains, rng, num_samples, split=split, role=role, variant=variant)

    def _conversations(
        self, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
    ) -> list[list[RoleSample]]:
        return curriculum.conversations(self.chains, rng, num_samples, split=split, variant=variant)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text; drills come in batches of their own, twice as large."""
        if rng.random() < self.agent_recipes[role].drill_share:
            return curriculum.drills(self.chains, rng, 2 * size, role=role)
        return curriculum.pretraining_turns(self.chains, rng, size, role=role)

    def _build_tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        words = [*chains.vocabulary(), *curriculum.protocol_words().split()]
        return build_tokenizer(self.agent_recipes[role], words, emphasis=RELATIONS[role])
