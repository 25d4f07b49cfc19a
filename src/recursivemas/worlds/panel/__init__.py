"""The panel: three specialists and a summarizer, in a world where a belief does not fit into a sentence (see
`cases.py`).

>>> panel = Panel(seed=0)
>>> sample = panel.samples("test", 1000, seed=1)[0]  # the case, the true cause, the exact posterior
>>> turns = panel.role_samples("train", 512, 0, role="botanist", variant="long")
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.evaluation.task import Sample
from recursivemas.training.data import RoleSample
from recursivemas.worlds.causes import Cases
from recursivemas.worlds.panel import curriculum
from recursivemas.worlds.panel.agents import AGENT_RECIPES
from recursivemas.worlds.panel.cases import (
    CAUSES,
    FINDINGS,
    ROLES,
    SPECIALISTS,
    SUMMARIZER,
    VARIANTS,
    CaseWorld,
    Variant,
    case_text,
    name_text,
    vocabulary,
)
from recursivemas.worlds.splits import first_distinct, with_spare
from recursivemas.worlds.tokenizers import build_tokenizer
from recursivemas.worlds.world import World

__all__ = ["CaseWorld", "Panel"]


class Panel(World):
    """One panel world: its orchards, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, another meaning.
    """

    name = "panel"
    roles: tuple[str, ...] = ROLES
    pattern = "mixture"
    role_names: Mapping[str, str] = MappingProxyType(
        dict(zip(("math", "code", "science", "summarizer"), ROLES, strict=True))
    )
    prompts = "panel"
    scorer = "posterior"
    variants = VARIANTS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, AGENT_RECIPES)
        # A short report is two tokens: a cause and a full stop.
        self.settings = {"num_rounds": 1, "num_latent_steps": 2, "max_new_tokens": 24}
        self.cases = CaseWorld(seed)

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Distinct cases of a split.

        The target is what ails the orchard. `metadata["posterior"]` is the exact belief given all findings;
        `metadata["optimum"]` the probability of being right, by that belief, for the best choice, and
        `metadata["alone"]` for what each specialist would choose by its own findings."""
        cases = self.distinct_cases(split, num_samples, seed)
        posterior = self.cases.posterior(cases.values)
        alone = {role: self.cases.belief_of(cases.values, role).argmax(axis=1) for role in SPECIALISTS}
        return [
            Sample(
                id=f"{self.name}-{self.seed}-{split}-{seed}-{row}",
                question=case_text(cases.values[row]),
                target=CAUSES[cases.cause[row]],
                metadata={
                    "posterior": dict(zip(CAUSES, posterior[row].tolist(), strict=True)),
                    "optimum": {1: float(posterior[row].max())},
                    "alone": {role: float(posterior[row, choice[row]]) for role, choice in alone.items()},
                },
            )
            for row in range(num_samples)
        ]

    def optimum(self, samples: list[Sample], num_rounds: int) -> float:
        """Mean probability, given all findings, of the best choice; one round is enough for it."""
        return float(np.mean([sample.metadata["optimum"][1] for sample in samples]))

    def answer_text(self, target: str) -> str:
        """What the summarizer writes for a cause."""
        return name_text(CAUSES.index(target))

    def _loop_turns(
        self, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
    ) -> list[RoleSample]:
        return curriculum.loop_turns(self.cases, rng, num_samples, split=split, role=role, variant=variant)

    def _conversations(
        self, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
    ) -> list[list[RoleSample]]:
        return curriculum.conversations(self.cases, rng, num_samples, split=split, variant=variant)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text; drills come in batches of their own, twice as large."""
        is_drill = rng.random() < self.agent_recipes[role].drill_share
        return curriculum.pretraining_turns(self.cases, rng, size * (1 + is_drill), role=role, is_drill=is_drill)

    def _build_tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        words = [*vocabulary(), *curriculum.protocol_words().split()]
        own = [word for finding in FINDINGS if finding.owner == role for word in finding.words]
        # The summarizer's own words are those that name causes.
        return build_tokenizer(self.agent_recipes[role], words, emphasis=CAUSES if role == SUMMARIZER else own)

    def distinct_cases(self, split: str, num_samples: int, seed: int) -> Cases:
        """The cases of `samples`, as arrays. Raises `ConfigError` for more than there are."""
        rng = self.rng("cases", split, "", seed)
        cases = self.cases.draw(rng, with_spare(num_samples), split=split)
        return cases[first_distinct(cases.values, num_samples)]
