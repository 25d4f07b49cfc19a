"""Worlds: small laboratories that generate their own questions, texts and truths, with a known optimum.

A world is a class with a name, the roles that live in it, a pattern and prompts for them, and

    samples(split, num_samples, seed)              questions with targets, and what is known about them
    scorer                                         the name of the scorer of its answers
    optimum(samples, num_rounds)                   the best score any system can reach in that many rounds
    answer_text(target)                            what the answering role writes for a target
    role_samples(split, num_samples, seed, role=)  turns of a role, for the training of links
    conversations(split, num_samples, seed)        whole loops by the book, turn by turn
    pretraining_batch(role, rng, size)             the text its agent is pretrained on
    agent_recipes, tokenizer(role), pretrain(role) how its agents are made

Another seed is another world. A world knows nothing of links.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recursivemas.errors import ConfigError, unknown_name
from recursivemas.evaluation.task import Sample
from recursivemas.models import LanguageModel
from recursivemas.training.data import RoleSample
from recursivemas.training.loop import Progress, RunDirectory


@runtime_checkable
class World(Protocol):
    """What the rest of the package asks of a world."""

    name: str
    seed: int
    roles: tuple[str, ...]
    pattern: str
    prompts: str
    scorer: str
    """Name of a scorer (`evaluation/scorers.py`)."""
    settings: dict[str, Any]
    """Settings of a system of its agents (see `SystemSettings`)."""
    agent_recipes: dict[str, Any]

    def samples(self, split: str, num_samples: int, seed: int) -> list[Sample]:
        """Questions of a split, each with an id of its own."""

    def optimum(self, samples: list[Sample], num_rounds: int) -> float:
        """The best mean score that `num_rounds` rounds allow."""

    def answer_text(self, target: str) -> str:
        """What the answering role should write for the target of a sample."""

    def role_samples(
        self, split: str, num_samples: int, seed: int, *, role: str, variant: str = ...
    ) -> list[RoleSample]:
        """Turns of one role, as text."""

    def conversations(self, split: str, num_samples: int, seed: int, *, variant: str = ...) -> list[list[RoleSample]]:
        """For each of so many questions all turns of the whole loop, in order of play, as text by the book.

        What a turn writes (its target) is what the next one reads; the last one writes the best answer.
        """

    def pretraining_batch(self, role: str, rng: np.random.Generator, size: int) -> list[RoleSample]:
        """A batch of the text that the agent of a role is made of."""

    def tokenizer(self, role: str) -> Any:
        """The tokenizer of one agent, with its chat template."""

    def pretrain(
        self, role: str, *, run: RunDirectory | None = None, progress: Progress | None = None
    ) -> LanguageModel:
        """Make the agent of a role from nothing."""


def world_names() -> tuple[str, ...]:
    """Names of all worlds."""
    return ("ward", "relay")


def load_world(name: str, seed: int = 0) -> World:
    """The world of this name and seed. Raises `ConfigError` with the nearest name."""
    from recursivemas.worlds.relay import Relay
    from recursivemas.worlds.ward import Ward

    worlds: dict[str, Callable[[int], World]] = {"ward": Ward, "relay": Relay}
    if name not in world_names():
        raise ConfigError(unknown_name("world", name, world_names()))
    return worlds[name](seed)
