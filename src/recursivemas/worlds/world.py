"""World: what every small laboratory has, and what it must bring.

A world generates its own questions, texts and truths, with a known optimum. Its subclass brings a name, the roles that
live in it, a pattern and prompts for them, recipes for its agents, and the methods that are abstract here. Another seed
is another world: the same words, another meaning. A world knows nothing of links.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from recursivemas.errors import ConfigError, unknown_name
from recursivemas.evaluation.task import Measure, Sample
from recursivemas.models import LanguageModel
from recursivemas.tools import Toolbox
from recursivemas.training.data import RoleSample
from recursivemas.training.loop import Progress, RunDirectory
from recursivemas.worlds.pretraining import AgentRecipe, pretrain


class World(ABC):
    """One world of one seed."""

    name: str
    roles: tuple[str, ...]
    pattern: str
    role_names: Mapping[str, str] = MappingProxyType({})
    """What the pattern's roles are called here, where they are called otherwise."""
    prompts: str
    scorer: str
    """Name of a scorer (`evaluation/scorers.py`)."""
    measures: Mapping[str, Measure] = MappingProxyType({})
    """What else is worth measuring in an answer, by name."""
    variants: tuple[str, ...]
    """Kinds of notes: variants of the prompt set. The first is what links are trained on by default."""
    settings: Mapping[str, Any]
    """Settings of a system of its agents (see `SystemSettings`)."""

    def __init__(self, seed: int, agent_recipes: Mapping[str, AgentRecipe]) -> None:
        self.seed = seed
        self.agent_recipes: dict[str, AgentRecipe] = dict(agent_recipes)
        self.tokenizer = cache(self._build_tokenizer)
        """The tokenizer of the agent of a role, with its chat template."""

    @abstractmethod
    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Questions of a split, each with an id of its own, its target, and what is known about it."""

    @abstractmethod
    def optimum(self, samples: list[Sample], num_rounds: int) -> float:
        """The best mean score that any system can reach in so many rounds."""

    @abstractmethod
    def answer_text(self, target: str) -> str:
        """What the answering role should write for the target of a sample."""

    def answer_of(self, sample: Sample, target: str | None = None) -> str:
        """The whole of what it should write about a sample, if the target were another one, where that is given."""
        return self.answer_text(sample.target if target is None else target)

    def toolbox(self, *, allow_repeats: bool = True) -> Toolbox | None:
        """What the answering role can call while it writes, if the world has tools; every question has its own.

        `allow_repeats` says whether a call may be made again with the same text.
        """
        return None

    @abstractmethod
    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of the text that the agent of a role is made of: what its owner knows, and no more."""

    @abstractmethod
    def _loop_turns(
        self, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Any
    ) -> list[RoleSample]:
        """Turns of one role in the running loop."""

    @abstractmethod
    def _conversations(
        self, rng: np.random.Generator, num_samples: int, *, split: str, variant: Any
    ) -> list[list[RoleSample]]:
        """All turns of so many loops."""

    @abstractmethod
    def _build_tokenizer(self, role: str) -> PreTrainedTokenizerFast:
        """Make the tokenizer of one agent."""

    def role_samples(
        self, split: str, num_samples: int, seed: int, *, role: str, variant: str | None = None
    ) -> list[RoleSample]:
        """Turns of one role in the running loop, on which links are trained; `variant` is the kind of note.

        Raises `ConfigError` for an unknown split, role or variant.
        """
        if role not in self.roles:
            raise ConfigError(unknown_name("role", role, self.roles))
        rng = self.rng("turns", split, role, seed)
        return self._loop_turns(rng, num_samples, split=split, role=role, variant=self._variant(variant))

    def conversations(
        self, split: str, num_samples: int, seed: int, *, variant: str | None = None
    ) -> list[list[RoleSample]]:
        """For each of so many questions all turns of the whole loop, in order of play, as text by the book.

        What a turn writes (its target) is what the next one reads; the last one writes the best answer. Raises
        `ConfigError` for an unknown split or variant.
        """
        rng = self.rng("conversations", split, "", seed)
        return self._conversations(rng, num_samples, split=split, variant=self._variant(variant))

    def pretrain(
        self, role: str, *, run: RunDirectory | None = None, progress: Progress | None = None
    ) -> LanguageModel:
        """Make one agent by its recipe (minutes on a CPU); the same seeds make the same agent."""
        return pretrain(self, role, run=run, progress=progress)

    def rng(self, purpose: str, split: str, role: str, seed: int) -> np.random.Generator:
        """Random numbers of their own for every purpose, split and role."""
        return np.random.default_rng([self.seed, seed, zlib.crc32(f"{purpose} {split} {role}".encode())])

    def _variant(self, name: str | None) -> str:
        if name is None:
            return self.variants[0]
        if name not in self.variants:
            raise ConfigError(unknown_name("variant", name, self.variants))
        return name
