"""Chorus: agents that share one model and act at the same time think, and write, as one batch.

Each has read a prompt of its own, and thinks through its own inner link; the model they share takes all their rows in
one step. What each thinks and writes is what it would alone.

Knows agents and what they have read; knows nothing of edges, rounds or patterns.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from recursivemas.agents import Agent, Reading
from recursivemas.cache import LatentCache
from recursivemas.decoding import Reply, SamplingParams


class Chorus:
    """Agents of one model, each with its reading of the same batch of questions."""

    def __init__(self, agents: Sequence[Agent], readings: Sequence[Reading]) -> None:
        self._agents = agents
        self._sizes = [len(reading.state) for reading in readings]
        self._reading, self._lead = readings[0], agents[0]
        if len(agents) > 1:
            self._reading = _merge(readings)
            # Complaints about a prompt that is too long name the agent that has it.
            longest = [int(reading.cache.num_positions.max()) for reading in readings]
            self._lead = agents[longest.index(max(longest))]

    def think(
        self, num_latent_steps: int, *, in_words: bool = False
    ) -> list[Float[Tensor, "batch latent_step hidden_size"]]:
        """What each of them thinks (see `Agent.think`), in their order."""
        inner_link = self._inner_links if len(self._agents) > 1 else None
        thoughts = self._lead.think(self._reading, num_latent_steps, in_words=in_words, inner_link=inner_link)
        return list(thoughts.split(self._sizes))

    def speak(self, sampling: SamplingParams, keys: Sequence[Sequence[str]]) -> list[list[Reply]]:
        """What each of them writes (see `Agent.speak`), in their order; `keys` has the names of the rows of each."""
        replies = iter(self._lead.speak(self._reading, sampling, [key for each in keys for key in each]))
        return [[next(replies) for _ in range(size)] for size in self._sizes]

    def _inner_links(self, states: Float[Tensor, "row hidden_size"]) -> Float[Tensor, "row hidden_size"]:
        """Every row through the inner link of its agent."""
        parts = zip(self._agents, states.split(self._sizes), strict=True)
        return torch.cat([agent.inner_link(part) for agent, part in parts])


def _merge(readings: Sequence[Reading]) -> Reading:
    """Several readings as one; shorter caches are padded on the left."""
    return Reading(
        LatentCache.merge([reading.cache for reading in readings]),
        torch.cat([reading.state for reading in readings]),
        [count for reading in readings for count in reading.prompt_tokens],
        [count for reading in readings for count in reading.positions],
    )
