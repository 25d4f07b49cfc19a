"""Answering: batches of questions are played through the loop, and what the answering role says comes back as results.

Around the one loop (recursion.py) stand here the meter, traces, interventions that need other questions, questions that
are cut to fit, and the answer that is told while it is written. Gradients are off.

Knows the parts of a system and the plan of a run; knows nothing of files, of how questions come into batches, or of
training.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from recursivemas.checkpoint import library_version
from recursivemas.context import fit_question
from recursivemas.decoding import Reply, SamplingParams, make_reply, told_so_far
from recursivemas.errors import ConfigError, InputError, unknown_name
from recursivemas.interventions import Intervention, Replay
from recursivemas.models import LanguageModel
from recursivemas.parts import Parts
from recursivemas.patterns import Edge
from recursivemas.planning import Intervene, as_intervention
from recursivemas.recording import record, record_calls
from recursivemas.recursion import Plan, PlayedTurn, Recursion, Sent, count_reply, sampling_key
from recursivemas.tools import ToolSession
from recursivemas.trace import Meter, Trace, Usage


@dataclass(frozen=True)
class Result:
    """The answer to one question, what it cost, and what was passed on."""

    text: str
    usage: Usage
    trace: Trace
    finished: bool = True
    """Whether the answer ended by itself; otherwise it was cut at `max_new_tokens`."""
    samples: tuple[str, ...] = ()
    """Where several answers were sampled (`num_samples`): all of them, the first of which is `text`."""
    cut_tokens: int = 0
    """Tokens that were cut off the beginning of a question too long for a context, where that was asked for."""
    index: int = 0
    """The place of its question among those given, from 0."""


@dataclass(frozen=True)
class TextDelta:
    """A piece of an answer, while it is being written."""

    text: str
    index: int = 0
    """The place of its question among those given, from 0."""
    sample: int = 0
    """Which of several answers that are sampled for the question."""


@dataclass(frozen=True)
class Asked:
    """A question on its way through a run."""

    index: int
    """Its place among those given, from 0."""
    question: str
    text: str
    """What is read of it."""
    key: str
    """Names it for sampling."""
    cut_tokens: int = 0
    """Tokens (of the role that answers) that were cut off its beginning."""


Event = PlayedTurn | TextDelta | list[Result]
"""What there is to tell of a batch: turns, pieces of answers, and in the end all results."""


class Answering:
    """Answers batches of questions with the parts of a system."""

    def __init__(self, parts: Parts, recursion: Recursion) -> None:
        self.parts = parts
        self._recursion = recursion

    def answer(
        self,
        batch: Sequence[Asked],
        plan: Plan,
        level: str,
        num_samples: int = 1,
        samples_at_once: int = 1,
        *,
        in_pieces: bool = False,
    ) -> Iterator[Event]:
        """Play one batch, and speak so many times from where the answering role has read; tell each turn and result.

        With `in_pieces` the answers are told while they are written. Gradients are off around each step, not around the
        yields: the mode is the caller's in between.
        """
        texts, keys = [asked.text for asked in batch], [asked.key for asked in batch]
        meter = Meter(len(batch), self.model.device)
        traces = [self._new_trace(asked, plan, level) for asked in batch]
        turns = self._recursion.play(texts, keys, plan, meter)
        replies: list[list[Reply]] = [[] for _ in batch]
        while True:
            with torch.no_grad():
                played = next(turns, None)
                if played is None:
                    break
                record(traces, played, self.parts.agents)
            if not played.turn.speaks:
                yield played
                continue
            for first in range(0, num_samples, samples_at_once):
                samples = range(first, min(first + samples_at_once, num_samples))
                spoken = yield from self._speak(batch, played, plan, samples, meter, in_pieces=in_pieces)
                for row, said in enumerate(replies):
                    said += spoken[row * len(samples) : (row + 1) * len(samples)]
            record_calls(traces, played, [said[0] for said in replies])
        yield [
            _result(asked, usage, trace, said)
            for asked, usage, trace, said in zip(batch, meter.usages(), traces, replies, strict=True)
        ]

    def _speak(
        self, batch: Sequence[Asked], played: PlayedTurn, plan: Plan, samples: range, meter: Meter, *, in_pieces: bool
    ) -> Generator[TextDelta, None, list[Reply]]:
        """Some samples of the answer to each question, those of one question beside each other."""
        turn, reading = played.turn, played.reading
        rows = [(asked, sample) for asked in batch for sample in samples]
        names = [sampling_key(asked.key, turn, sample) for asked, sample in rows]
        with torch.no_grad(), meter.phase(turn.round, turn.role, "decode"):
            session = self._recursion.tool_session(turn, [asked.text for asked, _ in rows], plan)
            if len(samples) > 1:
                places = torch.arange(len(batch), device=reading.state.device)
                reading = reading.select(places.repeat_interleave(len(samples)))
            if plan.writer is not None:
                replies = played.agent.have_written(reading, plan.sampling, names, plan.writer)
            elif not in_pieces:
                replies = played.agent.speak(reading, plan.sampling, names, session)
        if in_pieces and plan.writer is not None:
            for (asked, sample), reply in zip(rows, replies, strict=True):
                yield TextDelta(reply.text, asked.index, sample)
        elif in_pieces:
            steps = played.agent.speak_steps(reading, plan.sampling, names, session)
            replies = yield from self._write(steps, rows, played, plan.sampling, session, meter)
        count_reply(meter, turn, replies)
        return replies

    def _write(
        self,
        steps: Iterator[list[tuple[int, int]]],
        rows: Sequence[tuple[Asked, int]],
        played: PlayedTurn,
        sampling: SamplingParams,
        session: ToolSession | None,
        meter: Meter,
    ) -> Generator[TextDelta, None, list[Reply]]:
        """Replies that come token by token, told as far as no further token can take them back."""
        tokens: list[list[int]] = [[] for _ in rows]
        told = [0] * len(rows)

        def reply(row: int) -> Reply:
            calls = session.calls(row) if session is not None else ()
            return make_reply(played.agent.model, tokens[row], sampling, calls)

        def untold(row: int, text: str) -> Iterator[TextDelta]:
            if len(text) > told[row]:
                asked, sample = rows[row]
                yield TextDelta(text[told[row] :], asked.index, sample)
                told[row] = len(text)

        while True:
            with torch.no_grad(), meter.phase(played.turn.round, played.turn.role, "decode"):
                taken = next(steps, None)
            if taken is None:
                break
            for row, token in taken:
                tokens[row].append(token)
            for row in dict(taken):
                yield from untold(row, told_so_far(reply(row), sampling))
        replies = [reply(row) for row in range(len(rows))]
        for row, each in enumerate(replies):
            yield from untold(row, each.text)
        return replies

    def intervened(
        self, plan: Plan, intervene: str | Intervention | Intervene | None, questions: Sequence[Asked], seed: int
    ) -> Callable[[Sequence[int]], Plan]:
        """The plan for some of these questions, under an intervention."""
        if intervene is None:
            return lambda rows: plan
        if isinstance(intervene, Replay) and intervene.batch_sizes - {len(questions)}:
            recorded = max(intervene.batch_sizes)
            raise InputError(f"messages of {recorded} questions were recorded; give just these, not {len(questions)}")
        kind, _, sender = intervene.partition(":") if isinstance(intervene, str) else ("", "", "")
        if kind != "shuffled":
            applied = as_intervention(intervene)
            return lambda rows: replace(plan, intervene=applied.for_rows(rows))
        senders = dict.fromkeys(edge.source for edge in self.parts.pattern.graph)
        if sender and sender not in senders:
            raise ConfigError(f"{intervene}: {unknown_name('sender', sender, senders)}")
        if len(questions) < 2:
            raise InputError("shuffled hands each question the message of another one: give at least two questions")
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
        following = dict(zip(order, [*order[1:], order[0]], strict=True))

        def of_the_next(rows: Sequence[int]) -> Plan:
            sent = self._messages([questions[following[row]] for row in rows], plan)
            chosen = {place: each for place, each in sent.items() if sender in ("", Edge.parse(place[0]).source)}
            return replace(plan, intervene=Replay(chosen))

        return of_the_next

    def _messages(self, batch: Sequence[Asked], plan: Plan) -> Sent:
        """Every message of a batch; nobody speaks."""
        messages: Sent = {}
        meter = Meter(len(batch), self.model.device)
        texts, keys = [asked.text for asked in batch], [asked.key for asked in batch]
        with torch.no_grad():
            for played in self._recursion.play(texts, keys, plan, meter):
                messages.update({(edge, played.turn.round): message for edge, message in played.messages.items()})
        return messages

    def cut(self, questions: Sequence[Asked], plan: Plan) -> list[Asked]:
        """The same questions, cut on their left where one is too long for a context."""
        prompts = self._recursion.prompt_spaces(plan)
        kept = [fit_question(asked.question, prompts) for asked in questions]
        before = self.model.encode_batch([asked.question for asked in questions])
        after = self.model.encode_batch(kept)
        return [
            replace(asked, text=text, cut_tokens=len(old) - len(new))
            for asked, text, old, new in zip(questions, kept, before, after, strict=True)
        ]

    def sizes(self, questions: Sequence[Asked], plan: Plan) -> list[int]:
        """Positions that each question can take in a context, its prompt, messages, thoughts and reply together."""
        beside: dict[int, tuple[LanguageModel, int]] = {}
        for prompt in self._recursion.prompt_spaces(plan):
            needed = max(prompt.needs("?"), beside.get(id(prompt.model), (prompt.model, 0))[1])
            beside[id(prompt.model)] = prompt.model, needed
        texts = [asked.text for asked in questions]
        lengths = [[needed + len(ids) for ids in model.encode_batch(texts)] for model, needed in beside.values()]
        return [max(each) for each in zip(*lengths, strict=True)]

    @property
    def model(self) -> LanguageModel:
        """The model of the answering role."""
        return self.parts.agents[self.parts.pattern.answers].model

    def _new_trace(self, asked: Asked, plan: Plan, level: str) -> Trace:
        settings = {
            "system": self.parts.settings.name,
            "pattern": self.parts.pattern.name,
            "channel": {edge: channel.name for edge, channel in plan.channels.items()},
            "num_rounds": plan.num_rounds,
            "num_latent_steps": plan.num_latent_steps,
            "variant": plan.variant,
            "instructions": plan.instructions,
            "sampling": plan.sampling.__dict__,
            "key": asked.key,
            "intervention": type(plan.intervene).__name__,
            **({} if plan.tools is None else {"tools": list(plan.tools.tools), "tools_after": plan.tools_after}),
            "library_version": library_version(),
        }
        return Trace(level, asked.question, settings)


def _result(asked: Asked, usage: Usage, trace: Trace, replies: Sequence[Reply]) -> Result:
    """What has come out of one question; `replies` are the answers sampled for it."""
    first = replies[0]
    trace.answer = first.text
    if asked.cut_tokens:
        trace.settings["cut_tokens"] = asked.cut_tokens
    samples = tuple(reply.text for reply in replies) if len(replies) > 1 else ()
    return Result(first.text, usage, trace, first.finished, samples, asked.cut_tokens, asked.index)
