"""The one loop: every pattern, every channel, inference and training alike.

In every round each role in turn *reads* its prompt, with the messages it was sent in the slots of that prompt, then
*emits* one message to those who read it; the answering role of the last round *speaks*, which is left to the caller:
to decode, to stream, or to take a loss from. Whether gradients flow is the caller's affair, too. Roles that stand side
by side and share a model think and write as one batch.

Knows agents, links, a pattern and prompts; knows nothing of batches, traces, answers or losses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recursivemas.agents import Agent, Message, PrefixStore, Reading
from recursivemas.channels import Channel, Emitted, Sender, emit
from recursivemas.context import PromptSpace
from recursivemas.decoding import Reply, SamplingParams, Writer
from recursivemas.errors import NumericsError
from recursivemas.interventions import Intervention
from recursivemas.links import RecursiveLink
from recursivemas.patterns import Edge, Pattern, Turn
from recursivemas.prompts import PromptSet, Segments
from recursivemas.tools import Toolbox, ToolSession
from recursivemas.trace import Meter

ROWS_TOGETHER = 64
"""Rows up to which roles that share a model are played as one batch. The fewer rows, the more it saves; with many, a
step is busy with one role, and the caches of several at once only take memory (benchmarks/parallel_roles.py)."""

TOOLS_AFTER = ("last", "every")
"""When tools are used: in the answer alone, as in the paper; or in every round. The answering role then writes in each,
with its tools, before it sends; that is its message in text, and what it thinks on from for one in latents."""

Sent = dict[tuple[str, int], Message]
"""Messages by edge and round."""


@dataclass(frozen=True)
class Plan:
    """All settings of one run."""

    num_rounds: int
    num_latent_steps: int
    channels: dict[str, Channel]
    sampling: SamplingParams
    variant: str | None = None
    instructions: str = ""
    intervene: Intervention = field(default_factory=Intervention)
    answer_rounds: tuple[int, ...] = ()
    latent_source: str = "rollout"
    """What latents are made of (see `LATENT_SOURCES`); another in training only."""
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of some roles the text that their latents are taken from, where these are (`targets`)."""
    judge: "Callable[[PlayedTurn], Tensor] | None" = None
    """Takes the loss of an answering turn, as a part of that turn."""
    recompute: bool = False
    """Whether the backward pass computes each turn again, instead of keeping all that it needs of all turns."""
    reuse_prefixes: bool = True
    """Whether a prompt up to its first slot is read once for all rounds, or in every turn: to compare the two."""
    tools: Toolbox | None = None
    """What the answering role can call while it writes."""
    writer: Writer | None = None
    """Who writes the answer, in place of the model that has read the prompt; then it is only composed here."""
    tools_after: str = "last"
    """In which rounds it does (see `TOOLS_AFTER`)."""

    def is_open(self, edge: Edge) -> bool:
        """Whether anything travels on an edge."""
        return self.channels[str(edge)].is_open(self.num_latent_steps)

    def is_known(self, edge: Edge, round: int) -> bool:
        """Whether a message is at hand, so that it need not be made."""
        return self.intervene.known(str(edge), round) is not None


@dataclass(frozen=True)
class PlayedTurn:
    """One turn of the loop, as it was played for a batch."""

    turn: Turn
    agent: Agent
    reading: Reading
    messages: dict[str, Message] = field(default_factory=dict)
    """What it sent, by edge, as it arrives: after interventions."""
    known: Sent = field(default_factory=dict)
    """What it read that nobody sent in this run: messages that were at hand, by edge and round."""
    loss: Tensor | None = None
    """Of an answering turn: what `Plan.judge` says of it."""
    replies: Sequence[Reply] = ()
    """What it wrote to send it, one for each question, if it wrote anything."""


@dataclass
class Batch:
    """Questions on their way through the loop: what was asked and how, and what has been read and sent so far."""

    questions: Sequence[str]
    keys: Sequence[str]
    plan: Plan
    meter: Meter
    prefixes: PrefixStore | None = None
    """Beginnings of prompts that have been read, where they are kept."""
    rendered: dict[tuple[str, str], list[Segments]] = field(default_factory=dict)
    sent: Sent = field(default_factory=dict)


class Recursion:
    """The loop over the parts of a system."""

    def __init__(
        self,
        agents: Mapping[str, Agent],
        links: Mapping[str, RecursiveLink],
        pattern: Pattern,
        prompts: PromptSet,
        *,
        through_inner_link: bool,
    ) -> None:
        """`through_inner_link` says whether R_out(R_in(H)) travels, or R_out(H)."""
        self.agents = agents
        self.links = links
        self.pattern = pattern
        self.prompts = prompts
        self._through_inner_link = through_inner_link

    def play(self, questions: Sequence[str], keys: Sequence[str], plan: Plan, meter: Meter) -> Iterator[PlayedTurn]:
        """Play a batch, turn by turn. The answering turn is read, and left to the caller to speak or to score."""
        batch = Batch(questions, keys, plan, meter, PrefixStore() if plan.reuse_prefixes else None)
        schedule = self.pattern.schedule(
            plan.num_rounds, answer_rounds=plan.answer_rounds, is_open=plan.is_open, is_known=plan.is_known
        )
        for _, turns in groupby(schedule, key=lambda turn: turn.round):
            yield from self._play_round(list(turns), batch)

    def _play_round(self, turns: list[Turn], batch: Batch) -> Iterator[PlayedTurn]:
        """Play the turns of one round; those that can be played together come with the first of them."""
        most = max(1, ROWS_TOGETHER // len(batch.questions))
        played: dict[Turn, PlayedTurn] = {}
        for place, turn in enumerate(turns):
            if turn not in played:
                beside = [each for each in turns[place + 1 :] if self._is_beside(turn, each) and each not in played]
                played |= self._play_together([turn, *beside[: most - 1]], batch)
            yield played.pop(turn)

    def _is_beside(self, turn: Turn, other: Turn) -> bool:
        """Whether both send from one stage, where none hears the other in this round, and share a model."""
        in_one_stage = self.pattern.stage_of(turn.role) == self.pattern.stage_of(other.role)
        one_model = self.agents[turn.role].model is self.agents[other.role].model
        return in_one_stage and one_model and not (turn.speaks or other.speaks)

    def _play_together(self, turns: Sequence[Turn], batch: Batch) -> dict[Turn, PlayedTurn]:
        """Play turns of one round whose agents share a model. An answering turn comes alone, and is only read."""
        plan = batch.plan
        if plan.recompute:
            computed = checkpoint(self._compute, turns, batch, use_reentrant=False, preserve_rng_state=False)
        else:
            computed = self._compute(turns, batch)
        read, emitted = computed
        if turns[0].speaks:
            return read
        return {
            turn: replace(played, messages=self._send(turn, each, batch), replies=each.replies)
            for (turn, played), each in zip(read.items(), emitted, strict=True)
        }

    def _compute(self, turns: Sequence[Turn], batch: Batch) -> tuple[dict[Turn, PlayedTurn], list[Emitted]]:
        """What is read and emitted in some turns. It changes nothing that would make it come out otherwise again."""
        plan = batch.plan
        read = {turn: self._read(turn, batch) for turn in turns}
        if turns[0].speaks:
            judge = plan.judge
            return {turn: each if judge is None else replace(each, loss=judge(each)) for turn, each in read.items()}, []
        emitted = emit(
            [
                Sender(
                    turn.role,
                    played.agent,
                    played.reading,
                    {str(edge): plan.channels[str(edge)] for edge in turn.sends},
                    [sampling_key(key, turn) for key in batch.keys],
                    plan.targets.get(turn.role),
                    self.tool_session(turn, batch.questions, plan),
                )
                for turn, played in read.items()
            ],
            self.links,
            num_latent_steps=plan.num_latent_steps,
            sampling=plan.sampling,
            through_inner_link=self._through_inner_link,
            latent_source=plan.latent_source,
            phase=partial(batch.meter.phase, turns[0].round),
        )
        return read, emitted

    def _read(self, turn: Turn, batch: Batch) -> PlayedTurn:
        """What a role has read by the time it sends or speaks."""
        agent, meter = self.agents[turn.role], batch.meter
        with meter.phase(turn.round, turn.role, "prefill"):
            prompts = self._prompts(turn, batch)
            known = self._known(turn, batch.plan)
            inbox = self._inbox(turn, {**batch.sent, **known})
            if turn.speaks and batch.plan.writer is not None:
                reading = agent.compose(prompts, inbox)
            else:
                reading = agent.read(prompts, inbox, batch.prefixes)
        _check_reading(reading, turn, batch.keys)
        meter.count(turn.round, turn.role, prompt_tokens=reading.prompt_tokens, positions=reading.positions)
        return PlayedTurn(turn, agent, reading, known=known)

    def _send(self, turn: Turn, emitted: Emitted, batch: Batch) -> dict[str, Message]:
        """Count what a role has emitted, let it be intervened with, and hand it on as it arrives."""
        plan = batch.plan
        if any(plan.channels[str(edge)].has_latents for edge in turn.sends):
            steps = plan.num_latent_steps
            batch.meter.count(turn.round, turn.role, latent_steps=steps, positions=max(steps - 1, 0))
        count_reply(batch.meter, turn, emitted.replies)
        arrived = {}
        for edge in turn.sends:
            message = plan.intervene(emitted.messages[str(edge)], str(edge), turn.round)
            _check_finite(message, edge, turn.round, batch.keys)
            batch.sent[str(edge), turn.round] = arrived[str(edge)] = message
        return arrived

    def tool_session(self, turn: Turn, questions: Sequence[str], plan: Plan) -> ToolSession | None:
        """The tools that a role uses in a turn, one row a question; None if it has none then."""
        in_time = turn.speaks or plan.tools_after == "every"
        if plan.tools is None or turn.role != self.pattern.answers or not in_time:
            return None
        return plan.tools.session(self.agents[turn.role].model, questions)

    def _prompts(self, turn: Turn, batch: Batch) -> list[Segments]:
        """The prompt of a turn for every question; rendered once, where a later round has the same template."""
        plan = batch.plan
        is_last = turn.speaks or turn.round == plan.num_rounds
        key = turn.role, self.prompts.template(turn.role, round=turn.round, is_last=is_last)
        if key not in batch.rendered:
            batch.rendered[key] = [self._words(turn, plan, question) for question in batch.questions]
        return batch.rendered[key]

    def _words(self, turn: Turn, plan: Plan, question: str) -> Segments:
        """The prompt of a turn for one question."""
        return self.prompts.segments(
            turn.role,
            question,
            render_chat=self.agents[turn.role].model.render_chat,
            round=turn.round,
            is_last=turn.speaks or turn.round == plan.num_rounds,
            variant=plan.variant,
            instructions=plan.instructions,
            tools="" if plan.tools is None else plan.tools.text,
        )

    def prompt_spaces(self, plan: Plan) -> list[PromptSpace]:
        """Every prompt of a run, with the room its messages, thoughts and replies can take.

        A text is given twice its tokens: to a reader with another tokenizer it may be longer than to its writer.
        """
        thoughts, text = plan.num_latent_steps, plan.sampling.max_new_tokens
        spaces = []
        for turn in self.pattern.schedule(plan.num_rounds, is_open=plan.is_open, is_known=plan.is_known):
            read = {edge.source: plan.channels[str(edge)] for edge, round in self._read_by(turn) if round}
            sent = [plan.channels[str(edge)] for edge in turn.sends]
            thinks, writes = any(each.has_latents for each in sent), turn.speaks or any(each.has_text for each in sent)
            spaces.append(
                PromptSpace(
                    turn.role,
                    self.agents[turn.role].model,
                    partial(self._words, turn, plan),
                    {name: thoughts * each.has_latents + 2 * text * each.has_text for name, each in read.items()},
                    max(thoughts * thinks, text * writes),
                )
            )
        return spaces

    def _known(self, turn: Turn, plan: Plan) -> Sent:
        """Messages that a turn reads and that were at hand before the run."""
        places = [(str(edge), round) for edge, round in self._read_by(turn) if plan.is_open(edge)]
        found = {place: plan.intervene.known(*place) for place in places}
        return {place: message for place, message in found.items() if message is not None}

    def _inbox(self, turn: Turn, messages: Sent) -> dict[str, Message]:
        """What a role has been sent by the time of its turn, by sender."""
        read = {edge.source: messages.get((str(edge), round)) for edge, round in self._read_by(turn)}
        return {source: message for source, message in read.items() if message is not None}

    def _read_by(self, turn: Turn) -> list[tuple[Edge, int]]:
        """The edges that a turn reads, with the round in which their messages were sent."""
        edges = self.pattern.sources(turn.role)
        return [(edge, self.pattern.message_round(edge, turn.round)) for edge in edges]


def sampling_key(key: str, turn: Turn, index: int = 0) -> str:
    """Names what is sampled: of this question, by this role, in this round, for the first (0), second, ... time."""
    return f"{key}/{turn.role}/{turn.round}" + (f"/{index}" if index else "")


def count_reply(meter: Meter, turn: Turn, replies: Sequence[Reply]) -> None:
    """A decoded token is counted when it is chosen; all but the last are also read.

    There may be several replies to each question, one after the other.
    """
    if replies:
        counts = {
            "generated_tokens": [reply.num_generated for reply in replies],
            "positions": [max(len(reply.token_ids) - 1, 0) for reply in replies],
            "tool_calls": [len(reply.calls) for reply in replies],
            "tool_tokens": [len(reply.token_ids) - reply.num_generated for reply in replies],
        }
        sums = {name: torch.tensor(each).view(meter.batch_size, -1).sum(dim=1) for name, each in counts.items()}
        meter.count(turn.round, turn.role, **{name: each.tolist() for name, each in sums.items()})


def _check_reading(reading: Reading, turn: Turn, keys: Sequence[str]) -> None:
    wrong = ~reading.state.isfinite().all(dim=-1)
    if bool(wrong.any()):
        first = keys[int(wrong.nonzero()[0])]
        raise NumericsError(
            f"what the {turn.role} has read in round {turn.round} is not finite for {int(wrong.sum())} of {len(keys)} "
            f"questions; the first is '{first[:60]}'. Use float32, or bfloat16 in place of float16."
        )


def _check_finite(message: Message, edge: Edge, round: int, keys: Sequence[str]) -> None:
    if message.latents is None or bool(message.latents.isfinite().all()):
        return
    wrong = (~message.latents.isfinite()).any(dim=-1)
    row, step = wrong.nonzero()[0].tolist()
    rows = int(wrong.any(dim=1).sum())
    raise NumericsError(
        f"the message {edge} of round {round} is not finite for {rows} of {len(keys)} questions; the first is "
        f"'{keys[row][:60]}', at latent step {step + 1}. Train the links anew, or use float32."
    )
