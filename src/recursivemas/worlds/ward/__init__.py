"""The ward: a diagnostic world in which rounds pay, with its exact optimum (see `cases.py`).

>>> ward = Ward(seed=0)
>>> sample = ward.samples("test", 1000, seed=1)[0]  # the case, the true disease, the exact posterior
>>> turns = ward.role_samples("train", 512, 0, role="planner", variant="short")
"""

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.evaluation.task import Sample
from recursivemas.training.data import RoleSample
from recursivemas.worlds.splits import first_distinct, with_spare
from recursivemas.worlds.tokenizers import build_tokenizer
from recursivemas.worlds.ward import curriculum
from recursivemas.worlds.ward.agents import AGENT_RECIPES
from recursivemas.worlds.ward.cases import (
    DISEASES,
    FINDINGS,
    NUM_ROUNDS,
    ROLES,
    VARIANTS,
    Cases,
    CaseWorld,
    Variant,
    case_text,
    vocabulary,
)
from recursivemas.worlds.world import World

__all__ = ["CaseWorld", "Ward"]


class Ward(World):
    """One ward world: its cases, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, another meaning.
    """

    name = "ward"
    roles: tuple[str, ...] = ROLES
    pattern = "sequential"
    prompts = "ward"
    scorer = "posterior"
    variants = VARIANTS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, AGENT_RECIPES)
        # A short note is four tokens: a disease, the exposure, the stage, a full stop.
        self.settings = {"num_rounds": NUM_ROUNDS, "num_latent_steps": 3, "max_new_tokens": 24}
        self.cases = CaseWorld(seed)

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Distinct cases of a split.

        The target is the patient's disease. `metadata["posterior"]` is the exact belief given all findings, and
        `metadata["optimum"]` the probability of being right, by that belief, for the best choice after 1, 2, 3 rounds.
        """
        cases = self._distinct(split, num_samples, seed)
        posterior = self.cases.posterior(cases)
        rows = np.arange(num_samples)
        optimum = {r: posterior[rows, self.cases.posterior(cases, r).argmax(1)] for r in range(1, NUM_ROUNDS + 1)}
        return [
            Sample(
                id=f"{self.name}-{self.seed}-{split}-{seed}-{row}",
                question=case_text(cases.values[row]),
                target=DISEASES[cases.disease[row]],
                metadata={
                    "posterior": dict(zip(DISEASES, posterior[row].tolist(), strict=True)),
                    "optimum": {round_: float(p[row]) for round_, p in optimum.items()},
                },
            )
            for row in range(num_samples)
        ]

    def optimum(self, samples: list[Sample], num_rounds: int) -> float:
        """Mean probability, given all evidence, of the best choice that `num_rounds` rounds allow."""
        return float(np.mean([sample.metadata["optimum"][min(num_rounds, NUM_ROUNDS)] for sample in samples]))

    def answer_text(self, target: str) -> str:
        """What the solver writes for a diagnosis."""
        return f"{target}."

    def _loop_turns(
        self, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
    ) -> list[RoleSample]:
        return curriculum.loop_turns(self.cases, rng, num_samples, split=split, role=role, variant=variant)

    def _conversations(
        self, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
    ) -> list[list[RoleSample]]:
        return curriculum.conversations(self.cases, rng, num_samples, split=split, variant=variant)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text; the planner's drills come in batches of their own, twice as large."""
        if rng.random() < self.agent_recipes[role].drill_share:
            return curriculum.drills(self.cases, rng, 2 * size)
        return curriculum.pretraining_turns(self.cases, rng, size, role=role)

    def _build_tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        words = [*vocabulary(), *curriculum.protocol_words().split()]
        own = [word for f in FINDINGS if f.owner == role for word in f.words]
        return build_tokenizer(self.agent_recipes[role], words, emphasis=own)

    def _distinct(self, split: str, num_samples: int, seed: int) -> Cases:
        rng = self.rng("cases", split, "", seed)
        cases = self.cases.draw(rng, with_spare(num_samples), split=split)
        return cases[first_distinct(cases.values, num_samples)]
