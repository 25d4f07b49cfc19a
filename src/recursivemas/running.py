"""Runs: one question or a hundred thousand, batch by batch, with one set of options.

Questions are read some batches ahead, so that those of about one length are answered together (batches.py), and told
batch by batch: what is held does not grow with their number. What comes out of a question does not depend on its batch.

Knows how a batch is answered; knows nothing of files, or of how a system is made.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from recursivemas.answering import Answering, Asked, Event, Result, TextDelta
from recursivemas.batches import Batches, check_question
from recursivemas.errors import ConfigError, InputError
from recursivemas.interventions import Intervention
from recursivemas.planning import RunOptions, make_plan, trace_level, truncates
from recursivemas.trace import check_trace_dir, save_traces

BATCH_SIZE = 64
WINDOW = 16
"""Batches that are read ahead. More of them are more alike in length, and take longer to read."""


class Run:
    """Answers questions with one set of options."""

    def __init__(self, answering: Answering, options: RunOptions) -> None:
        """Raises `ConfigError` or `OutputError` for options that cannot be, before anything is computed."""
        self._answering = answering
        self._options = options
        self._plan = make_plan(answering.parts, options)
        self._level = trace_level(options.get("trace", "summary"))
        self._truncates = truncates(answering.parts, options.get("on_long_question"))
        self._num_samples = options.get("num_samples", 1)
        self._batch_size = options.get("batch_size", BATCH_SIZE)
        self._batches = Batches(self._batch_size, options.get("max_batch_tokens"), self._num_samples)
        if self._num_samples > 1 and self._plan.sampling.temperature == 0:
            raise ConfigError(f"{self._num_samples} answers at temperature 0 would all be the same; give a temperature")
        place = options.get("trace_dir")
        self._trace_dir = None if place is None else Path(place)
        self._num_saved = 0
        if self._trace_dir is not None:
            check_trace_dir(self._trace_dir, self._level)

    def answer(self, questions: Iterable[str], *, in_pieces: bool = False) -> Iterator[Event]:
        """Answer all questions: tells turns, with `in_pieces` what is being written, and the results of each batch.

        Raises `InputError` for a question that is no text or does not fit, and `NumericsError`.
        """
        for window in self._windows(questions):
            yield from self._answer_window(window, in_pieces=in_pieces)

    def _windows(self, questions: Iterable[str]) -> Iterator[list[Asked]]:
        """The questions by a few batches at a time; all at once where one is handed the messages of another."""
        intervene = self._options.get("intervene")
        at_once = isinstance(intervene, Intervention) or (isinstance(intervene, str) and intervene != "zero")
        rest, given = iter(questions), self._options.get("keys")
        keys = None if given is None else iter(_checked_keys(given, questions))
        taken = 0
        while some := list(islice(rest, None if at_once else WINDOW * self._batch_size)):
            for number, question in enumerate(some, start=taken + 1):
                check_question(question, f"question {number}")
            names = some if keys is None else list(islice(keys, len(some)))
            if len(names) < len(some):
                raise InputError(f"there are only {taken + len(names)} keys; give one for each question")
            places = range(taken, taken + len(some))
            yield [Asked(index, text, text, key) for index, text, key in zip(places, some, names, strict=True)]
            taken += len(some)
        if not taken:
            raise InputError("no question was given; give one as text, or a list of them")

    def _answer_window(self, window: Sequence[Asked], *, in_pieces: bool) -> Iterator[Event]:
        if self._truncates:
            window = self._answering.cut(window, self._plan)
        intervene = self._options.get("intervene")
        plan_of = self._answering.intervened(self._plan, intervene, window, self._options.get("seed", 0))
        sizes = self._answering.sizes(window, self._plan)
        told: dict[tuple[int, int], int] = {}
        done = self._options.get("done", ())

        def answer(rows: list[int], at_once: int) -> Iterator[Event]:
            batch = [window[row] for row in rows]
            if all(asked.index in done for asked in batch):
                return
            events = self._answering.answer(
                batch, plan_of(rows), self._level, self._num_samples, at_once, in_pieces=in_pieces
            )
            try:
                for event in _untold(events, told):
                    yield event if not isinstance(event, list) else self._with_traces_saved(event)
            except InputError as error:
                longest = window[max(rows, key=lambda row: sizes[row])]
                if longest.index == 0 and len(window) == 1:
                    raise
                raise InputError(f"{error} (question {_name(longest)} is the longest of its batch)") from None

        # Who can see the batches, as an intervention or in files, sees them in the order of the questions.
        in_order = self._trace_dir is not None or not (intervene is None or isinstance(intervene, str))
        yield from self._batches.answer(
            answer, sizes, in_order=in_order, too_large=lambda row: self._too_large(window[row], sizes[row])
        )

    def _with_traces_saved(self, results: list[Result]) -> list[Result]:
        if self._trace_dir is None:
            return results
        kept = save_traces(self._trace_dir, [result.trace for result in results], batch=self._num_saved)
        self._num_saved += 1
        return [replace(result, trace=trace) for result, trace in zip(results, kept, strict=True)]

    def _too_large(self, asked: Asked, size: int) -> InputError:
        """What is said of a question for which the memory does not suffice: what would fit, which is tried out."""
        most = self._plan.sampling.max_new_tokens
        length = most // 2
        while length and not self._fits(asked, length):
            length //= 2
        rest = asked.text[len(asked.text) // 2 :]
        while not length and len(rest) > 1 and not self._fits(replace(asked, text=rest), most):
            rest = rest[len(rest) // 2 :]
        if length:
            fitting = f"with max_new_tokens={length}, in place of {most}, it fits"
        elif len(rest) > 1:
            fitting = f"the last {len(rest)} of its {len(asked.text)} characters fit: shorten it"
        else:
            fitting = "nor does any part of it: lower num_latent_steps, or use a smaller dtype, quantized agents, or a "
            fitting += "device with more memory"
        return InputError(
            f"question {_name(asked)}, which takes up to {size} positions, does not fit into the memory of the device, "
            f"even alone; {fitting}"
        )

    def _fits(self, asked: Asked, max_new_tokens: int) -> bool:
        """Whether a question can be answered alone, with a reply that is no longer."""
        plan = replace(self._plan, sampling=replace(self._plan.sampling, max_new_tokens=max_new_tokens), tools=None)
        try:
            for _ in self._answering.answer([asked], plan, "off"):
                pass
        except torch.OutOfMemoryError:
            return False
        return True


def _name(asked: Asked) -> str:
    """Number and beginning of a question."""
    return f"{asked.index + 1} ('{' '.join(asked.question.split())[:40]}')"


def _checked_keys(keys: Iterable[str], questions: Iterable[str]) -> Iterable[str]:
    """The keys, which are as many as the questions where both can be counted."""
    if isinstance(keys, Sequence) and isinstance(questions, Sequence) and len(keys) != len(questions):
        raise InputError(f"{len(keys)} keys were given for {len(questions)} questions; give one for each")
    return keys


def _untold(events: Iterator[Event], told: dict[tuple[int, int], int]) -> Iterator[Event]:
    """The events without what was told by an attempt that did not fit; it is the same again."""
    seen: dict[tuple[int, int], int] = {}
    for event in events:
        if isinstance(event, TextDelta):
            place = event.index, event.sample
            start = seen.get(place, 0)
            seen[place] = start + len(event.text)
            text = event.text[max(told.get(place, 0) - start, 0) :]
            told[place] = max(told.get(place, 0), seen[place])
            if text:
                yield replace(event, text=text)
        else:
            yield event
