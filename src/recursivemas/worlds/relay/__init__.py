"""The relay: a world of chains that grow with the rounds, with its exact optimum (see `chains.py`).

>>> relay = Relay(seed=0)
>>> sample = relay.samples("test", 1000, seed=1)[0]  # the question, the name at the end of its chain, its hops
>>> turns = relay.role_samples("train", 512, 0, role="planner", variant="short")
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
from recursivemas.worlds.relay import chains, curriculum
from recursivemas.worlds.relay.agents import AGENT_RECIPES
from recursivemas.worlds.relay.chains import NAMES, NUM_ROUNDS, RELATIONS, ROLES, VARIANTS, ChainWorld
from recursivemas.worlds.tokenizers import build_tokenizer

__all__ = ["ChainWorld", "Relay"]


class Relay:
    """One relay world: its chains, the turns of its agents, and the recipes that make these agents.

    Another seed is another world: the same words, other facts.
    """

    name = "relay"
    roles: tuple[str, ...] = ROLES
    pattern = "sequential"
    prompts = "relay"
    scorer = "exact"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        # A short note is four tokens: a name, the word "hop", its number, a full stop.
        self.settings = {"num_rounds": NUM_ROUNDS, "num_latent_steps": 4, "max_new_tokens": 24}
        self.chains = ChainWorld(seed)
        self.agent_recipes: dict[str, AgentRecipe] = dict(AGENT_RECIPES)
        self._tokenizers: dict[str, PreTrainedTokenizerFast] = {}

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Chains of a split, drawn independently (the few that have one or two hops come more than once).

        The target is the name at the end of the chain, `metadata["hops"]` its length, `metadata["rounds"]` the rounds
        that carry it so far.
        """
        drawn = self.chains.draw(self._rng("chains", split, "", seed), num_samples, split=split)
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
        return curriculum.loop_turns(self.chains, rng, num_samples, split=split, role=role, variant=variant)

    def conversations(
        self, split: str, num_samples: int, seed: int, *, variant: str = "short"
    ) -> list[list[RoleSample]]:
        """Whole loops, turn by turn, as faultless agents play them with notes of this kind.

        Raises `ConfigError` for an unknown split or variant.
        """
        if variant not in VARIANTS:
            raise ConfigError(unknown_name("variant", variant, VARIANTS))
        rng = self._rng("conversations", split, "", seed)
        return curriculum.conversations(self.chains, rng, num_samples, split=split, variant=variant)

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of an agent's own text; drills come in batches of their own, twice as large."""
        if rng.random() < self.agent_recipes[role].drill_share:
            return curriculum.drills(self.chains, rng, 2 * size, role=role)
        return curriculum.pretraining_turns(self.chains, rng, size, role=role)

    def pretrain(
        self, role: str, *, run: RunDirectory | None = None, progress: Progress | None = None
    ) -> LanguageModel:
        """Make one agent by its recipe (minutes on a CPU); the same seeds make the same agent."""
        return pretrain(self, role, run=run, progress=progress)

    def tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        """The tokenizer of one agent, with its chat template."""
        if role not in self._tokenizers:
            words = [*chains.vocabulary(), *curriculum.protocol_words().split()]
            self._tokenizers[role] = build_tokenizer(self.agent_recipes[role], words, emphasis=RELATIONS[role])
        return self._tokenizers[role]

    def _rng(self, purpose: str, split: str, role: str, seed: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, seed, zlib.crc32(f"{purpose} {split} {role}".encode())])
