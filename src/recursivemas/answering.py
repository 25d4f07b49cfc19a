"""Answering: batches of questions are played through the loop, and what the answering role says comes back as results.

Around the one loop (recursion.py) stand here the settings of a run, the meter, traces, interventions that need other
questions, and questions that are cut to fit. Gradients are off.

Knows the parts of a system; knows nothing of files, of how questions come into batches, or of training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from recursivemas.agents import Message
from recursivemas.batches import check_whole
from recursivemas.channels import choose_channels
from recursivemas.checkpoint import library_version
from recursivemas.context import fit_question
from recursivemas.decoding import Reply, SamplingParams, Writer, make_reply, told_so_far
from recursivemas.errors import ConfigError, InputError, unknown_name
from recursivemas.interventions import INTERVENTIONS, Applied, Intervention, Replay, Zero
from recursivemas.models import LanguageModel
from recursivemas.parts import Parts
from recursivemas.patterns import Edge
from recursivemas.recording import record, record_calls
from recursivemas.recursion import TOOLS_AFTER, Plan, PlayedTurn, Recursion, Sent, count_reply, sampling_key
from recursivemas.tools import Tool, Toolbox, ToolLimits, as_toolbox
from recursivemas.trace import LEVELS, Meter, Trace, Usage

LONG_QUESTIONS = ("refuse", "truncate")

Tools = Sequence[Tool | str] | Tool | str | Toolbox
Intervene = Callable[[Message, str, int], Message]


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


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer, while it is being written."""

    text: str


class Answering:
    """Answers batches of questions with the parts of a system."""

    def __init__(self, parts: Parts, recursion: Recursion) -> None:
        self._parts = parts
        self._recursion = recursion

    def plan(
        self,
        num_rounds: int | None,
        num_latent_steps: int | None,
        channel: str | Mapping[str, str] | None,
        sampling: SamplingParams | None,
        variant: str | None,
        instructions: str | None = None,
    ) -> Plan:
        """All settings of a run; None takes that of the system. Raises `ConfigError`."""
        settings = self._parts.settings
        rounds = settings.num_rounds if num_rounds is None else num_rounds
        steps = settings.num_latent_steps if num_latent_steps is None else num_latent_steps
        check_whole("num_rounds", rounds, 1, 1000)
        check_whole("num_latent_steps", steps, 0, 100_000)
        variant = settings.variant if variant is None else variant
        self._parts.prompts.variant(variant)
        return Plan(
            int(rounds),
            int(steps),
            choose_channels(settings.channel if channel is None else channel, self._parts.edge_names),
            sampling or SamplingParams(max_new_tokens=settings.max_new_tokens),
            variant,
            instructions or "",
        )

    def answer(
        self, questions: list[str], keys: list[str], plan: Plan, level: str, num_samples: int = 1
    ) -> list[Result]:
        """Play one batch and speak, so many times from where the answering role has read."""
        meter = Meter(len(questions), self.model.device)
        traces = [self._new_trace(*pair, plan, level) for pair in zip(questions, keys, strict=True)]
        replies: list[Reply] = []
        with torch.no_grad():
            for played in self._recursion.play(questions, keys, plan, meter):
                record(traces, played, self._parts.agents)
                if played.turn.speaks:
                    with meter.phase(played.turn.round, played.turn.role, "decode"):
                        names = [sampling_key(key, played.turn, index) for key in keys for index in range(num_samples)]
                        reading = played.reading
                        asked = [question for question in questions for _ in range(num_samples)]
                        session = self._recursion.tool_session(played.turn, asked, plan)
                        if num_samples > 1:
                            rows = torch.arange(len(keys), device=reading.state.device)
                            reading = reading.select(rows.repeat_interleave(num_samples))
                        if plan.writer is not None:
                            replies = played.agent.have_written(reading, plan.sampling, names, plan.writer)
                        else:
                            replies = played.agent.speak(reading, plan.sampling, names, session)
                    count_reply(meter, played.turn, replies)
                    record_calls(traces, played, replies[::num_samples])
        results = []
        for row, (usage, trace) in enumerate(zip(meter.usages(), traces, strict=True)):
            first, *others = replies[row * num_samples : (row + 1) * num_samples]
            trace.answer = first.text
            samples = (first.text, *(each.text for each in others)) if others else ()
            results.append(Result(first.text, usage, trace, first.finished, samples))
        return results

    def tell(
        self, question: str, plan: Plan, on_long_question: str | None
    ) -> Iterator[PlayedTurn | TextDelta | Result]:
        """Answer one question, telling what happens: each turn, pieces of the answer, then the `Result`."""
        meter = Meter(1, self.model.device)
        trace = self._new_trace(question, question, plan, "summary")
        asked, [cut] = self.cut([question], plan, on_long_question)
        # Gradients are switched off around each step, not around the yields: the mode is the caller's in between.
        turns = self._recursion.play(asked, [question], plan, meter)
        while True:
            with torch.no_grad():
                played = next(turns, None)
                if played is None:
                    return
                record([trace], played, self._parts.agents)
            if not played.turn.speaks:
                yield played
                continue
            tokens: list[int] = []
            told = ""
            name = sampling_key(question, played.turn)
            session = self._recursion.tool_session(played.turn, asked, plan)
            steps = played.agent.speak_steps(played.reading, plan.sampling, [name], session)
            while True:
                with torch.no_grad(), meter.phase(played.turn.round, played.turn.role, "decode"):
                    taken = next(steps, None)
                if taken is None:
                    break
                tokens += [token for _, token in taken]
                calls = session.calls(0) if session is not None else ()
                text = told_so_far(make_reply(played.agent.model, tokens, plan.sampling, calls), plan.sampling)
                if len(text) > len(told):
                    yield TextDelta(text[len(told) :])
                    told = text
            reply = make_reply(
                played.agent.model, tokens, plan.sampling, session.calls(0) if session is not None else ()
            )
            if len(reply.text) > len(told):
                yield TextDelta(reply.text[len(told) :])
            count_reply(meter, played.turn, [reply])
            record_calls([trace], played, [reply])
            trace.answer = reply.text
            yield mark_cut(Result(reply.text, meter.usages()[0], trace, reply.finished), question, cut)

    def intervened(
        self,
        plan: Plan,
        intervene: str | Intervention | Intervene | None,
        questions: list[str],
        keys: list[str],
        seed: int,
    ) -> tuple[list[int], Callable[[list[int]], Plan]]:
        """The order in which questions are answered, and the plan for some of them, under an intervention."""
        order = list(range(len(questions)))
        if intervene is None:
            return order, lambda rows: plan
        if isinstance(intervene, Replay) and intervene.batch_sizes - {len(questions)}:
            recorded = max(intervene.batch_sizes)
            raise InputError(f"messages of {recorded} questions were recorded; give just these, not {len(questions)}")
        kind, _, sender = intervene.partition(":") if isinstance(intervene, str) else ("", "", "")
        if kind != "shuffled":
            applied = as_intervention(intervene)
            return order, lambda rows: replace(plan, intervene=applied.for_rows(rows))
        senders = dict.fromkeys(edge.source for edge in self._parts.pattern.graph)
        if sender and sender not in senders:
            raise ConfigError(f"{intervene}: {unknown_name('sender', sender, senders)}")
        if len(questions) < 2:
            raise InputError("shuffled hands each question the message of another one: give at least two questions")
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
        following = dict(zip(order, [*order[1:], order[0]], strict=True))

        def of_the_next(rows: list[int]) -> Plan:
            donors = [following[row] for row in rows]
            sent = self._messages([questions[row] for row in donors], [keys[row] for row in donors], plan)
            chosen = {place: each for place, each in sent.items() if sender in ("", Edge.parse(place[0]).source)}
            return replace(plan, intervene=Replay(chosen))

        return order, of_the_next

    def _messages(self, questions: list[str], keys: list[str], plan: Plan) -> Sent:
        """Every message of a batch; nobody speaks."""
        messages: Sent = {}
        meter = Meter(len(questions), self.model.device)
        with torch.no_grad():
            for played in self._recursion.play(questions, keys, plan, meter):
                messages.update({(edge, played.turn.round): message for edge, message in played.messages.items()})
        return messages

    def cut(self, questions: list[str], plan: Plan, on_long_question: str | None) -> tuple[list[str], list[int]]:
        """The questions as they are read, and how many tokens (of the role that answers) were cut off each."""
        wanted = self._parts.settings.on_long_question if on_long_question is None else on_long_question
        if wanted not in LONG_QUESTIONS:
            raise ConfigError(unknown_name("way with long questions", wanted, LONG_QUESTIONS))
        if wanted == "refuse":
            return questions, [0] * len(questions)
        prompts = self._recursion.prompt_spaces(plan)
        kept = [fit_question(question, prompts) for question in questions]
        lengths = [[len(ids) for ids in self.model.encode_batch(texts)] for texts in (questions, kept)]
        return kept, [before - after for before, after in zip(*lengths, strict=True)]

    @property
    def model(self) -> LanguageModel:
        """The model of the answering role."""
        return self._parts.agents[self._parts.pattern.answers].model

    def _new_trace(self, question: str, key: str, plan: Plan, level: str) -> Trace:
        settings = {
            "system": self._parts.settings.name,
            "pattern": self._parts.pattern.name,
            "channel": {edge: channel.name for edge, channel in plan.channels.items()},
            "num_rounds": plan.num_rounds,
            "num_latent_steps": plan.num_latent_steps,
            "variant": plan.variant,
            "instructions": plan.instructions,
            "sampling": plan.sampling.__dict__,
            "key": key,
            "intervention": type(plan.intervene).__name__,
            **({} if plan.tools is None else {"tools": list(plan.tools.tools), "tools_after": plan.tools_after}),
            "library_version": library_version(),
        }
        return Trace(level, question, settings)


def equip(plan: Plan, tools: Tools | None, tools_after: str, tool_limits: ToolLimits | None) -> Plan:
    """The plan with the tools of a run."""
    if tools_after not in TOOLS_AFTER:
        raise ConfigError(unknown_name("time for tools", tools_after, TOOLS_AFTER))
    toolbox = as_toolbox(tools, tool_limits)
    return replace(plan, tools=toolbox, tools_after=tools_after) if toolbox.tools else plan


def hand_over(plan: Plan, writer: Writer | None, model: LanguageModel) -> Plan:
    """The plan with a writer of answers in place of the answering role's model. Raises `ConfigError`."""
    if writer is None:
        return plan
    if plan.tools is not None:
        raise ConfigError("tools are called while an answer is written here: give either tools or a writer")
    writer.check(model)
    return replace(plan, writer=writer)


def mark_cut(result: Result, question: str, cut_tokens: int) -> Result:
    """A result that says how much of its question was cut off."""
    if cut_tokens:
        result.trace.question = question
        result.trace.settings["cut_tokens"] = cut_tokens
    return replace(result, cut_tokens=cut_tokens)


def as_intervention(given: str | Intervention | Intervene | None) -> Intervention:
    """An intervention from its name, or from a plain function. Raises `ConfigError`."""
    if given is None:
        return Intervention()
    if isinstance(given, Intervention):
        return given
    if callable(given):
        return Applied(given)
    if given != "zero":
        raise ConfigError(unknown_name("intervention", given, INTERVENTIONS))
    return Zero()


def trace_level(trace: str | bool) -> str:
    """The name of a trace level; True is full, False off. Raises `ConfigError`."""
    level = ("off", "full")[trace] if isinstance(trace, bool) else trace
    if level not in LEVELS:
        raise ConfigError(unknown_name("trace level", level, LEVELS))
    return level
