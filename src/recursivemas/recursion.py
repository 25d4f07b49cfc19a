"""The one loop: every pattern, every channel, inference and training alike.

In every round each role in turn *reads* its prompt, with the messages it was sent in the slots of that prompt, then
*emits* one message to those who read it; the answering role of the last round *speaks*, which is left to the caller:
to decode, to stream, or to take a loss from. Whether gradients flow is the caller's affair, too.

Knows agents, links, a pattern and prompts; knows nothing of batches, traces, answers or losses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from recursivemas.agents import Agent, Message, PrefixStore, Reading
from recursivemas.channels import Channel, emit
from recursivemas.decoding import Reply, SamplingParams
from recursivemas.errors import NumericsError
from recursivemas.interventions import Intervention
from recursivemas.links import RecursiveLink
from recursivemas.patterns import Edge, Pattern, Turn
from recursivemas.prompts import PromptSet, Segments
from recursivemas.trace import Meter

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
    in_words: bool = False
    """Whether thoughts are teacher-forced (see `Agent.think`); in training only."""

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
        prefixes = PrefixStore()
        rendered: dict[tuple[str, str], list[Segments]] = {}
        sent: Sent = {}
        for turn in self.pattern.schedule(
            plan.num_rounds, answer_rounds=plan.answer_rounds, is_open=plan.is_open, is_known=plan.is_known
        ):
            agent = self.agents[turn.role]
            phase = partial(meter.phase, turn.round, turn.role)
            with phase("prefill"):
                prompts = self._prompts(turn, questions, plan, rendered)
                known = self._known(turn, plan)
                reading = agent.read(prompts, self._inbox(turn, {**sent, **known}), prefixes)
            meter.count(turn.round, turn.role, prompt_tokens=reading.prompt_tokens, positions=reading.positions)
            if turn.speaks:
                yield PlayedTurn(turn, agent, reading, known=known)
                continue
            edges = {str(edge): plan.channels[str(edge)] for edge in turn.sends}
            messages, replies = emit(
                agent,
                reading,
                edges,
                self.links,
                num_latent_steps=plan.num_latent_steps,
                sampling=plan.sampling,
                keys=[sampling_key(key, turn) for key in keys],
                through_inner_link=self._through_inner_link,
                in_words=plan.in_words,
                phase=phase,
            )
            if any(channel.has_latents for channel in edges.values()):
                meter.count(
                    turn.round,
                    turn.role,
                    latent_steps=plan.num_latent_steps,
                    positions=max(plan.num_latent_steps - 1, 0),
                )
            count_reply(meter, turn, replies)
            arrived = {}
            for edge in turn.sends:
                message = plan.intervene(messages[str(edge)], str(edge), turn.round)
                _check_finite(message, edge, turn.round, keys)
                sent[str(edge), turn.round] = arrived[str(edge)] = message
            yield PlayedTurn(turn, agent, reading, arrived, known)

    def _prompts(
        self, turn: Turn, questions: Sequence[str], plan: Plan, rendered: dict[tuple[str, str], list[Segments]]
    ) -> list[Segments]:
        """The prompt of a turn for every question; rendered once, where a later round has the same template."""
        is_last = turn.speaks or turn.round == plan.num_rounds
        key = turn.role, self.prompts.template(turn.role, round=turn.round, is_last=is_last)
        if key not in rendered:
            rendered[key] = [
                self.prompts.segments(
                    turn.role,
                    question,
                    render_chat=self.agents[turn.role].model.render_chat,
                    round=turn.round,
                    is_last=is_last,
                    variant=plan.variant,
                    instructions=plan.instructions,
                )
                for question in questions
            ]
        return rendered[key]

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


def sampling_key(key: str, turn: Turn) -> str:
    """Names what is sampled: of this question, by this role, in this round."""
    return f"{key}/{turn.role}/{turn.round}"


def count_reply(meter: Meter, turn: Turn, replies: Sequence[Reply]) -> None:
    """A decoded token is counted when it is chosen; all but the last are also read."""
    if replies:
        counts = [len(reply.token_ids) for reply in replies]
        meter.count(turn.round, turn.role, generated_tokens=counts, positions=[max(n - 1, 0) for n in counts])


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
