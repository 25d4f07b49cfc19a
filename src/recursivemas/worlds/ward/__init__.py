"""The ward: a diagnostic world in which rounds pay, with its exact optimum (see `cases.py`).

>>> ward = Ward(seed=0)
>>> sample = ward.samples("test", 1000, seed=1)[0]  # the case, the true disease, the exact posterior
>>> turns = ward.role_samples("train", 512, 0, role="planner", variant="short")
"""

import zlib

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.errors import ConfigError, unknown_name
from recursivemas.evaluation.task import Sample
from recursivemas.models import LanguageModel
from recursivemas.training.data import RoleSample
from recursivemas.training.loop import Progress, RunDirectory
from recursivemas.worlds.pretraining import AgentRecipe, pretrain
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
    case_text,
    vocabulary,
)

__all__ = ["CaseWorld", "Ward"]


class Ward:
    """One ward world: its cases, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, another meaning.
    """

    name = "ward"
    roles: tuple[str, ...] = ROLES
    pattern = "sequential"
    prompts = "ward"
    scorer = "posterior"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        # A short note is four tokens: a disease, the exposure, the stage, a full stop.
        self.settings = {"num_rounds": NUM_ROUNDS, "num_latent_steps": 3, "max_new_tokens": 24}
        self.cases = CaseWorld(seed)
        self.agent_recipes: dict[str, AgentRecipe] = dict(AGENT_RECIPES)
        self._tokenizers: dict[str, PreTrainedTokenizerFast] = {}

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

    def role_samples(
        self, split: str, num_samples: int, seed: int, *, role: str, variant: str = "short"
    ) -> list[RoleSample]:
        """Turns of one role in the running loop, on which links are trained; `variant` is the kind of note.

        Raises `ConfigError` for an unknown split, role or variant.
        """
        if role not in ROLES:
            raise ConfigError(unknown_name("role", role, ROLES))
        if variant not in VARIANTS:
            raise ConfigError(unknown_name("variant", variant, VARIANTS))
        rng = self._rng("turns", split, role, seed)
        return curriculum.loop_turns(self.cases, rng, num_samples, split=split, role=role, variant=variant)

    def conversations(
        self, split: str, num_samples: int, seed: int, *, variant: str = "short"
    ) -> list[list[RoleSample]]:
        """Whole loops, turn by turn, as faultless agents would play them with notes of this kind.

        Raises `ConfigError` for an unknown split or variant.
        """
        if variant not in VARIANTS:
            raise ConfigError(unknown_name("variant", variant, VARIANTS))
        rng = self._rng("conversations", split, "", seed)
        return curriculum.conversations(self.cases, rng, num_samples, split=split, variant=variant)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text; the planner's drills come in batches of their own, twice as large."""
        if rng.random() < self.agent_recipes[role].drill_share:
            return curriculum.drills(self.cases, rng, 2 * size)
        return curriculum.pretraining_turns(self.cases, rng, size, role=role)

    def pretrain(
        self, role: str, *, run: RunDirectory | None = None, progress: Progress | None = None
    ) -> LanguageModel:
        """Make one agent by its recipe (minutes on a CPU); the same seeds make the same agent."""
        return pretrain(self, role, run=run, progress=progress)

    def tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        """The tokenizer of one agent, with its chat template."""
        if role not in self._tokenizers:
            recipe = self.agent_recipes[role]
            words = [*vocabulary(), *curriculum.protocol_words().split()]
            own = [word for f in FINDINGS if f.owner == role for word in f.words]
            self._tokenizers[role] = build_tokenizer(recipe, words, emphasis=own)
        return self._tokenizers[role]

    def _distinct(self, split: str, num_samples: int, seed: int) -> Cases:
        rng = self._rng("cases", split, "", seed)
        cases = self.cases.draw(rng, num_samples + num_samples // 50 + 8, split=split)
        _, first = np.unique(cases.values, axis=0, return_index=True)
        if len(first) < num_samples:
            raise ConfigError(
                f"only {len(first)} distinct cases were found where {num_samples} were asked for; ask for fewer"
            )
        return cases[np.sort(first)[:num_samples]]

    def _rng(self, purpose: str, split: str, role: str, seed: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, seed, zlib.crc32(f"{purpose} {split} {role}".encode())])
