"""Channel: how a message travels an edge. The prompts, the engine and the decoding are the same whichever is taken.

    latent   the sender thinks m latent steps, and the link of the edge maps them into the reader's embedding space
    text     the sender writes its message, which is put into the reader's slot as text (Recursive-TextMAS)
    both     latents, and then the text
    none     nothing: the slot stays empty

Knows senders and their outgoing edges, as names; knows nothing of rounds, questions or who is asking.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from recursivemas.agents import Agent, Message, Reading
from recursivemas.chorus import Chorus
from recursivemas.decoding import Interjector, Reply, SamplingParams
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

REST = "*"
"""In a mapping of edges to channels: all edges that it does not name."""


def choose_channels(channel: str | Mapping[str, str], edges: Sequence[str]) -> dict[str, Channel]:
    """The channel of every edge, from one name for all, or a name for each; `*` names that of the edges left.

    Raises `ConfigError` for a name that is not known, and for an edge without a channel.
    """
    if isinstance(channel, str):
        if channel not in CHANNELS:
            raise ConfigError(unknown_name("channel", channel, CHANNELS))
        channel = dict.fromkeys(edges, channel)
    if not isinstance(channel, Mapping):
        raise ConfigError(f"a channel is a name, or a mapping of edges to names; got {channel!r}")
    for edge, name in channel.items():
        if edge not in (*edges, REST):
            raise ConfigError(unknown_name("edge", edge, [*edges, REST]))
        if name not in CHANNELS:
            raise ConfigError(unknown_name("channel", name, CHANNELS))
    for edge in edges:
        if edge not in channel and REST not in channel:
            raise ConfigError(
                f"no channel was given for the edge '{edge}'; name one for every edge, or with '{REST}' for all others"
            )
    return {edge: CHANNELS[channel.get(edge) or channel[REST]] for edge in edges}


LATENT_SOURCES = ("rollout", "teacher", "targets")
"""What latents are made of: thoughts that are rolled out, as in every run; or in training the states from which an
agent would write its own text (`teacher`), or those at the words of a text that it is given (`targets`), else its own.
"""

Phase = Callable[[Sequence[str], str], AbstractContextManager[None]]
"""Times a phase of the work of some roles."""


class Sender(NamedTuple):
    """A role that is to send, with what it has read, the channel of every edge it sends on, and names of its rows."""

    role: str
    agent: Agent
    reading: Reading
    edges: Mapping[str, Channel]
    keys: Sequence[str]
    targets: Sequence[str] | None = None
    """What it should write, where thoughts are taken from that (see `LATENT_SOURCES`)."""
    tools: Interjector | None = None
    """Tools that it uses before it sends: it writes with them, and that is its text, and what it thinks on from."""

    @property
    def thinks(self) -> bool:
        """Whether some edge wants latents of it."""
        return any(channel.has_latents for channel in self.edges.values())

    @property
    def writes(self) -> bool:
        """Whether some edge wants text of it."""
        return any(channel.has_text for channel in self.edges.values())


class Emitted(NamedTuple):
    """What a sender sends on each of its edges, and what it wrote for that."""

    messages: dict[str, Message]
    replies: list[Reply]


def emit(
    senders: Sequence[Sender],
    links: Mapping[str, RecursiveLink],
    *,
    num_latent_steps: int,
    sampling: SamplingParams,
    through_inner_link: bool,
    latent_source: str = "rollout",
    phase: Phase,
) -> list[Emitted]:
    """The messages of senders that share one model, from what they have read; they think, and write, as one batch.

    A sender thinks once and writes once, whatever the number of its readers. A message in latents is R_out(R_in(H)), or
    the paper's R_out(H) if it does not go through the inner link.
    """
    thoughts: dict[str, Tensor] = {}
    lengths: dict[str, tuple[int, ...]] = {}
    replies: dict[str, list[Reply]] = {}
    senders = [_with_tools(sender, sampling, replies, phase) for sender in senders]
    thinking = [sender for sender in senders if sender.thinks and num_latent_steps]
    if thinking:
        with phase([sender.role for sender in thinking], "latent"):
            if latent_source == "targets":
                along = [each.agent.think_along(each.reading, num_latent_steps, each.targets) for each in thinking]
                found = [states for states, _ in along]
                lengths = {sender.role: many for sender, (_, many) in zip(thinking, along, strict=True)}
            else:
                found = _chorus(thinking).think(num_latent_steps, in_words=latent_source == "teacher")
            for sender, states in zip(thinking, found, strict=True):
                thoughts[sender.role] = sender.agent.inner_link(states) if through_inner_link else states
    writing = [sender for sender in senders if sender.writes and sender.role not in replies]
    if writing:
        with phase([sender.role for sender in writing], "decode"):
            written = _chorus(writing).speak(sampling, [sender.keys for sender in writing])
        replies.update(zip((sender.role for sender in writing), written, strict=True))
    emitted = []
    for sender in senders:
        said, thought = replies.get(sender.role, []), thoughts.get(sender.role)
        messages = {}
        for edge, channel in sender.edges.items():
            with phase([sender.role], "link"):
                messages[edge] = Message(
                    links[edge](thought) if channel.has_latents and thought is not None else None,
                    tuple(reply.text for reply in said) if channel.has_text else None,
                    lengths.get(sender.role) if channel.has_latents else None,
                )
        emitted.append(Emitted(messages, said))
    return emitted


def _with_tools(sender: Sender, sampling: SamplingParams, replies: dict[str, list[Reply]], phase: Phase) -> Sender:
    """A sender that has used its tools, if it has any: what it has read ends with what it wrote with them."""
    if sender.tools is None:
        return sender
    with phase([sender.role], "decode"):
        said, reading = sender.agent.speak_on(sender.reading, sampling, sender.keys, sender.tools)
    replies[sender.role] = said
    return sender._replace(reading=reading)


def _chorus(senders: Sequence[Sender]) -> Chorus:
    return Chorus([sender.agent for sender in senders], [sender.reading for sender in senders])
