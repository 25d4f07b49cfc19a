"""One batch through the one loop, with texts of given lengths: what is timed, and how many positions it must take.

Texts do not end by themselves: a message has `message_tokens` tokens, an answer `answer_tokens`. Knows systems; knows
nothing of time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from recursivemas.channels import choose_channels
from recursivemas.decoding import SamplingParams
from recursivemas.patterns import Turn
from recursivemas.recursion import Plan, Recursion, count_reply, sampling_key
from recursivemas.system import RecursiveSystem
from recursivemas.trace import Meter, Usage


@dataclass(frozen=True)
class Load:
    """How a batch is played."""

    num_rounds: int = 1
    num_latent_steps: int = 16
    channel: str = "latent"
    message_tokens: int = 16
    """Tokens of a message in text."""
    answer_tokens: int = 8
    reuse_prefixes: bool = True

    def plan(self, system: RecursiveSystem) -> Plan:
        """All settings of the run."""
        return Plan(
            self.num_rounds,
            self.num_latent_steps,
            choose_channels(self.channel, [str(edge) for edge in system.pattern.graph]),
            of_length(self.message_tokens),
            system.settings.variant,
            reuse_prefixes=self.reuse_prefixes,
        )


def of_length(num_tokens: int) -> SamplingParams:
    """Greedy text of exactly so many tokens."""
    return SamplingParams(max_new_tokens=num_tokens, min_new_tokens=num_tokens)


@torch.no_grad()
def play(system: RecursiveSystem, questions: Sequence[str], load: Load) -> list[Usage]:
    """Answer a batch; what each question used."""
    plan = load.plan(system)
    recursion = recursion_of(system)
    meter = Meter(len(questions), system.agents[system.pattern.answers].model.device)
    for played in recursion.play(questions, questions, plan, meter):
        if played.turn.speaks:
            keys = [sampling_key(question, played.turn) for question in questions]
            with meter.phase(played.turn.round, played.turn.role, "decode"):
                replies = played.agent.speak(played.reading, of_length(load.answer_tokens), keys)
            count_reply(meter, played.turn, replies)
    return meter.usages()


def recursion_of(system: RecursiveSystem) -> Recursion:
    """The loop over the parts of a system."""
    return Recursion(
        system.agents,
        system.links,
        system.pattern,
        system.prompts,
        through_inner_link=system.settings.message == "inner+outer",
    )


def seconds_by_round(usages: Sequence[Usage]) -> dict[int, float]:
    """Seconds of the batch in each round."""
    found: dict[int, float] = {}
    for usage in usages:
        for turn in usage.turns:
            found[turn.round] = found.get(turn.round, 0.0) + sum(turn.seconds.values())
    return found


def expected_positions(system: RecursiveSystem, question: str, load: Load) -> int:
    """Positions that go through a model for one question, in closed form:

        sum of h over the heads that are read  +  sum over all turns of (t + s)  +  (m - 1) for each that thinks
        + (n - 1) for each that writes n tokens

    A head is a prompt up to its first slot: h tokens, read once for all turns of one model that begin with it, or anew
    in every turn. Behind it a prompt has t tokens of text, and messages of s latents or tokens. It is exact where a
    text is read as as many tokens as were written.
    """
    plan = load.plan(system)
    heads: dict[tuple[int, str | Turn], int] = {}
    total = 0
    for turn in system.pattern.schedule(plan.num_rounds, is_open=plan.is_open):
        model = system.agents[turn.role].model
        prompt = system.prompts.segments(
            turn.role,
            question,
            render_chat=model.render_chat,
            round=turn.round,
            is_last=turn.speaks or turn.round == plan.num_rounds,
            variant=plan.variant,
        )
        head = prompt[0] if isinstance(prompt[0], str) else ""
        heads[id(model), head if load.reuse_prefixes else turn] = len(model.encode(head))
        tail = "".join(segment for segment in prompt[bool(head) :] if isinstance(segment, str))
        total += len(model.encode(tail)) + sum(_sizes_of_messages(system, turn, load))
        sent = [plan.channels[str(edge)] for edge in turn.sends]
        thinks, writes = any(each.has_latents for each in sent), any(each.has_text for each in sent)
        total += thinks * max(load.num_latent_steps - 1, 0)
        total += writes * (load.message_tokens - 1) + turn.speaks * (load.answer_tokens - 1)
    return total + sum(heads.values())


def _sizes_of_messages(system: RecursiveSystem, turn: Turn, load: Load) -> Iterator[int]:
    """Positions that each message takes which is read in a turn."""
    plan = load.plan(system)
    for edge in system.pattern.sources(turn.role):
        channel = plan.channels[str(edge)]
        if system.pattern.message_round(edge, turn.round):
            yield load.num_latent_steps * channel.has_latents + load.message_tokens * channel.has_text
