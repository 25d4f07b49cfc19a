"""Channel: how a message travels an edge. The prompts, the engine and the decoding are the same whichever is taken.

    latent   the sender thinks m latent steps, and the link of the edge maps them into the reader's embedding space
    text     the sender writes its message, which is put into the reader's slot as text (Recursive-TextMAS)
    both     latents, and then the text
    none     nothing: the slot stays empty

Knows a sender and its outgoing edges, as names; knows nothing of rounds, questions or who is asking.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from recursivemas.agents import Agent, Message, Reading
from recursivemas.decoding import Reply, SamplingParams
from recursivemas.errors import ConfigError, unknown_name
from recursivemas.links import RecursiveLink


class Channel(NamedTuple):
    """What an edge carries."""

    name: str
    has_latents: bool
    has_text: bool

    def is_open(self, num_latent_steps: int) -> bool:
        """Whether anything travels: latents of zero steps are nothing."""
        return self.has_text or (self.has_latents and num_latent_steps > 0)


CHANNELS = {
    channel.name: channel
    for channel in (
        Channel("latent", has_latents=True, has_text=False),
        Channel("text", has_latents=False, has_text=True),
        Channel("both", has_latents=True, has_text=True),
        Channel("none", has_latents=False, has_text=False),
    )
}


def choose_channels(channel: str | Mapping[str, str], edges: Sequence[str]) -> dict[str, Channel]:
    """The channel of every edge, from one name for all or a name for each. Raises `ConfigError`."""
    if isinstance(channel, str):
        if channel not in CHANNELS:
            raise ConfigError(unknown_name("channel", channel, CHANNELS))
        channel = dict.fromkeys(edges, channel)
    if not isinstance(channel, Mapping):
        raise ConfigError(f"a channel is a name, or a mapping of edges to names; got {channel!r}")
    for edge in channel:
        if edge not in edges:
            raise ConfigError(unknown_name("edge", edge, edges))
    for edge in edges:
        if edge not in channel:
            raise ConfigError(f"no channel was given for the edge '{edge}'; give one name for all edges, or all edges")
    for name in channel.values():
        if name not in CHANNELS:
            raise ConfigError(unknown_name("channel", name, CHANNELS))
    return {edge: CHANNELS[channel[edge]] for edge in edges}


Phase = Callable[[str], AbstractContextManager[None]]


def emit(
    agent: Agent,
    reading: Reading,
    edges: Mapping[str, Channel],
    links: Mapping[str, RecursiveLink],
    *,
    num_latent_steps: int,
    sampling: SamplingParams,
    keys: Sequence[str],
    through_inner_link: bool,
    in_words: bool,
    phase: Phase,
) -> tuple[dict[str, Message], list[Reply]]:
    """The message of a sender on each of its edges, from what it has read.

    It thinks once and writes once, whatever the number of its readers. A message in latents is R_out(R_in(H)), or the
    paper's R_out(H) if it does not go through the inner link. `in_words`: see `Agent.think`. Returns the messages, and
    what was written.
    """
    thoughts: Tensor | None = None
    replies: list[Reply] = []
    if num_latent_steps and any(channel.has_latents for channel in edges.values()):
        with phase("latent"):
            thoughts = agent.think(reading, num_latent_steps, in_words=in_words)
            if through_inner_link:
                thoughts = agent.inner_link(thoughts)
    if any(channel.has_text for channel in edges.values()):
        with phase("decode"):
            replies = agent.speak(reading, sampling, keys)
    messages = {}
    for edge, channel in edges.items():
        with phase("link"):
            messages[edge] = Message(
                links[edge](thoughts) if channel.has_latents and thoughts is not None else None,
                tuple(reply.text for reply in replies) if channel.has_text else None,
            )
    return messages, replies
