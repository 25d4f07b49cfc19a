"""Interventions: what can be done to a message on its way, to find out what it does.

An intervention is called with every message that is sent, `intervene(message, edge, round)`, and returns what arrives;
a plain function serves. It may also know a message beforehand (`known`); then the sender is not run for it.

    zero       latents are zeros, text is empty: the slot is there, and says nothing
    shuffled   each reader gets what the next question, in a seeded order, sent on the same edge in the same round;
               shuffled:ROLE concerns only what that role sends
    replay     messages come from a trace

Knows messages, edges and rounds; knows nothing of systems. `shuffled` needs the messages of other questions, which
the system makes for it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from recursivemas.agents import Message
from recursivemas.errors import InputError
from recursivemas.trace import Trace

INTERVENTIONS = ("shuffled", "zero")


class Intervention:
    """Base of all interventions: changes nothing, knows nothing."""

    def __call__(self, message: Message, edge: str, round: int) -> Message:
        """What arrives in place of `message`."""
        return message

    def known(self, edge: str, round: int) -> Message | None:
        """The message of this edge and round, if it need not be made."""
        return None

    def for_rows(self, rows: Sequence[int]) -> "Intervention":
        """The same intervention for some questions of a run, which are answered as a batch of their own."""
        return self


class Applied(Intervention):
    """A plain function in the place of an intervention."""

    def __init__(self, function: Callable[[Message, str, int], Message]) -> None:
        self._function = function

    def __call__(self, message: Message, edge: str, round: int) -> Message:
        """Whatever the function returns."""
        return self._function(message, edge, round)


class Zero(Intervention):
    """Latents of zeros, empty text."""

    def __call__(self, message: Message, edge: str, round: int) -> Message:
        """The same form of message, with nothing in it."""
        return Message(
            None if message.latents is None else torch.zeros_like(message.latents),
            None if message.texts is None else ("",) * len(message.texts),
            message.lengths,
        )


class Replay(Intervention):
    """Messages that are at hand already, by edge and round."""

    def __init__(self, messages: Mapping[tuple[str, int], Message]) -> None:
        self.messages = dict(messages)
        self.batch_sizes = {each.batch_size for each in self.messages.values()}

    @classmethod
    def from_traces(cls, traces: Sequence[Trace], *, until: tuple[int, str, str] | None = None) -> "Replay":
        """Replay recorded runs up to and including the message `until` = (round, source, target); by default all.

        Everything after it is computed anew. Raises `InputError` if a trace lacks what is needed.
        """
        if not traces:
            raise InputError("there is no trace to replay")
        first = traces[0]
        count = len(first.messages)
        if until is not None:
            count = first.messages.index(first.find(*until)) + 1
        messages = {}
        for each in first.messages[:count]:
            key = each.round, each.source, each.target
            found = [trace.find(*key) for trace in traces]
            latents = [message.tensor() for message in found]
            texts = [message.text for message in found]
            if all(part is None for part in [*latents, *texts]):
                raise InputError("this trace holds no tensors to replay; record it with trace='full'")
            messages[f"{each.source}->{each.target}", each.round] = Message(
                None if latents[0] is None else torch.stack([part for part in latents if part is not None]),
                None if texts[0] is None else tuple(str(text) for text in texts),
            )
        return cls(messages)

    def known(self, edge: str, round: int) -> Message | None:
        """The recorded message."""
        return self.messages.get((edge, round))

    def for_rows(self, rows: Sequence[int]) -> "Replay":
        """The recorded messages of these questions."""
        return Replay({place: message.select(rows) for place, message in self.messages.items()})
