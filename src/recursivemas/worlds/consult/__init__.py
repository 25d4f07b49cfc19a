"""Consult: an expert who knows everything and a learner who answers, with the exact optimum (see `cases.py`).

>>> consult = Consult(seed=0)
>>> sample = consult.samples("test", 1000, seed=1)[0]  # the case, the true fault, the exact posterior and its grades
>>> turns = consult.role_samples("train", 512, 0, role="expert", variant="short")
"""

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.evaluation.task import Sample
from recursivemas.training.data import RoleSample
from recursivemas.worlds.causes import Cases
from recursivemas.worlds.consult import curriculum
from recursivemas.worlds.consult.agents import AGENT_RECIPES
from recursivemas.worlds.consult.cases import (
    CAUSES,
    GRADES,
    ROLES,
    VARIANTS,
    CaseWorld,
    Variant,
    answer_text,
    case_text,
    pairs_right,
    vocabulary,
    write_notes,
)
from recursivemas.worlds.splits import first_distinct, with_spare
from recursivemas.worlds.tokenizers import build_tokenizer
from recursivemas.worlds.world import World

__all__ = ["CaseWorld", "Consult", "ConsultBlind"]


class Consult(World):
    """One consult world: its cases, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, another meaning.
    """

    name = "consult"
    roles: tuple[str, ...] = ROLES
    pattern = "distillation"
    prompts = "consult"
    scorer = "posterior"
    variants = VARIANTS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, AGENT_RECIPES)
        # An answer is 38 tokens with its end; one round uncovers all there is.
        self.settings = {"num_rounds": 1, "num_latent_steps": 4, "max_new_tokens": 48}
        self.cases = CaseWorld(seed, self.name)
        self.measures = {"pairs": pairs_right, "divergence": self.cases.divergence}

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Distinct cases of a split.

        The target is the true fault. In `metadata`: `posterior` is the exact belief given all findings, `grades` what
        an exact answer says of each fault, `optimum` by rounds (there is nothing to gain after the first) the
        probability of being right for the best choice, and `alone` the same for the best choice of one role by itself.
        """
        cases = self._distinct(split, num_samples, seed)
        notes = write_notes(self.cases.posterior(cases.values))
        rows = np.arange(num_samples)
        chosen = {role: self.cases.alone(cases.values, role).argmax(axis=1) for role in ROLES}
        return [
            Sample(
                id=f"{self.name}-{self.seed}-{split}-{seed}-{row}",
                question=case_text(cases.values[row]),
                target=CAUSES[cases.cause[row]],
                metadata={
                    "posterior": dict(zip(CAUSES, notes.belief[row].tolist(), strict=True)),
                    "grades": {cause: GRADES[grade] for cause, grade in zip(CAUSES, notes.grades[row], strict=True)},
                    "optimum": {1: float(notes.belief[row].max())},
                    "alone": {role: float(notes.belief[row, causes[row]]) for role, causes in chosen.items()},
                },
            )
            for row in rows.tolist()
        ]

    def optimum(self, samples: list[Sample], num_rounds: int) -> float:
        """Mean probability, given all findings, of the best choice; one round is enough for it."""
        return float(np.mean([sample.metadata["optimum"][1] for sample in samples]))

    def answer_text(self, target: str) -> str:
        """The shortest answer that names a fault; the whole answer to a sample is `answer_of`."""
        return f"{target}."

    def answer_of(self, sample: Sample, target: str | None = None) -> str:
        """What the learner should write: the true fault (or another one), and the exact grade of each."""
        grades = np.array([GRADES.index(sample.metadata["grades"][cause]) for cause in CAUSES])
        return answer_text(CAUSES.index(sample.target if target is None else target), grades)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text."""
        return curriculum.pretraining_turns(self.cases, rng, size, role=role)

    def _loop_turns(
        self, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
    ) -> list[RoleSample]:
        return curriculum.loop_turns(self.cases, rng, num_samples, split=split, role=role, variant=variant)

    def _conversations(
        self, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
    ) -> list[list[RoleSample]]:
        return curriculum.conversations(self.cases, rng, num_samples, split=split, variant=variant)

    def _build_tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.agent_recipes[role], [*vocabulary(), *curriculum.protocol_words().split()])

    def _distinct(self, split: str, num_samples: int, seed: int) -> Cases:
        cases = self.cases.draw(self.rng("cases", split, "", seed), with_spare(num_samples), split=split)
        return cases[first_distinct(cases.values, num_samples)]


class ConsultBlind(Consult):
    """The same cases with an expert who cannot read what was heard: only together do the two know it all."""

    name = "consult-blind"
