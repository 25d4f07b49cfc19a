"""Recording: what a turn that was played leaves in the traces of its questions.

Knows turns and traces; knows nothing of how a turn is played.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from recursivemas.agents import Agent, Message
from recursivemas.decoding import Reply
from recursivemas.patterns import Edge
from recursivemas.recursion import PlayedTurn
from recursivemas.trace import Trace, TracedMessage


def record(traces: Sequence[Trace], played: PlayedTurn, agents: Mapping[str, Agent]) -> None:
    """Put what arrived in this turn into the traces, and before it what was at hand and is read now."""
    if traces[0].level == "off":
        return
    record_calls(traces, played, played.replies)
    arrived = {(edge, played.turn.round): message for edge, message in played.messages.items()}
    for (edge, round), message in {**played.known, **arrived}.items():
        source, target = Edge.parse(edge)
        reader = agents[target].model
        size = 0 if message.latents is None else message.latents.shape[1]
        nearest: list[Any] = []
        norms: list[list[float]] = []
        if message.latents is not None and size:
            nearest = reader.nearest_tokens(message.latents.flatten(0, 1))
            norms = (message.latents.float().norm(dim=-1) / reader.mean_embedding_norm).tolist()
        for row, trace in enumerate(traces):
            trace.messages.append(
                TracedMessage(
                    round,
                    source,
                    target,
                    None if message.texts is None else message.texts[row],
                    norms[row] if size else None,
                    nearest[row * size : (row + 1) * size] if size else None,
                    _kept(message, row) if trace.level == "full" else None,
                )
            )


def record_calls(traces: Sequence[Trace], played: PlayedTurn, replies: Sequence[Reply]) -> None:
    """Put the tools that were called in some replies into the traces."""
    turn = played.turn
    for trace, reply in zip(traces, replies, strict=False):  # a role that wrote nothing has no replies
        if trace.level != "off":
            trace.calls += [replace(call, round=turn.round, role=turn.role) for call in reply.calls]


def _kept(message: Message, row: int) -> Tensor | None:
    return None if message.latents is None else message.latents[row].detach().cpu().clone()
