"""Questions by the batch: what is accepted as a question, and how many are gone through, as many at a time as fit.

Questions that are about equally long are answered together, the longest first, so that what does not fit shows early.
A batch that the memory of the device has no room for is halved, and so are all after it that are as large.

Knows nothing of systems: how a batch is answered, and how large a question is, comes from outside.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch

from recursivemas.errors import ConfigError, InputError

Event = TypeVar("Event")
Answer = Callable[[list[int], int], Iterator[Event]]
"""Answers some rows, with so many samples of each at a time; yields whatever there is to tell."""


class Batches:
    """Rows in batches of at most `batch_size`, which together hold at most `max_batch_tokens` positions.

    What does not fit is remembered, from one list of rows to the next.
    """

    def __init__(self, batch_size: int, max_batch_tokens: int | None = None, num_samples: int = 1) -> None:
        """`num_samples` answers are sampled for each row; they are rows of their own while they are written."""
        check_whole("batch_size", batch_size, 1, 1_000_000)
        check_whole("num_samples", num_samples, 1, 1_000_000)
        if max_batch_tokens is not None:
            check_whole("max_batch_tokens", max_batch_tokens, 1, 1 << 40)
        self._batch_size = batch_size
        self._max_tokens = max_batch_tokens
        self._num_samples = num_samples

    def answer(
        self,
        answer: "Answer[Event]",
        sizes: Sequence[int],
        *,
        in_order: bool = False,
        too_large: Callable[[int], InputError],
    ) -> Iterator[Event]:
        """Answer all rows, batch by batch. `sizes` are the positions that each takes at most.

        With `in_order` rows are taken as they come, and not by length. Raises what `too_large` says of a row that does
        not fit alone.
        """
        waiting = self.cut(sizes, in_order=in_order)
        while waiting:
            rows = waiting.pop(0)
            longest = max(sizes[row] for row in rows)
            if self._takes(len(rows), longest):
                at_once = self._at_once(len(rows), longest)
                if (yield from _unless_too_large(answer(rows, at_once))):
                    continue
                torch.cuda.empty_cache()
                if len(rows) * at_once == 1:
                    raise too_large(rows[0])
                self._keep_below(len(rows), longest, at_once)
            middle = len(rows) // 2
            waiting[:0] = [half for half in (rows[:middle], rows[middle:]) if half]

    def cut(self, sizes: Sequence[int], *, in_order: bool = False) -> list[list[int]]:
        """The batches that rows of these sizes would make. The rows of each are in the order given."""
        rows = range(len(sizes))
        batches: list[list[int]] = []
        longest = 0
        for row in rows if in_order else sorted(rows, key=lambda row: -sizes[row]):
            longest = max(longest, sizes[row])
            if batches and len(batches[-1]) < self._batch_size and self._takes(len(batches[-1]) + 1, longest):
                batches[-1].append(row)
            else:
                batches.append([row])
                longest = sizes[row]
        return [sorted(batch) for batch in batches]

    def _takes(self, num_rows: int, longest: int) -> bool:
        """Whether so many rows may be tried together; one may always be, if need be sample by sample."""
        return self._max_tokens is None or num_rows == 1 or num_rows * self._num_samples * longest <= self._max_tokens

    def _at_once(self, num_rows: int, longest: int) -> int:
        """How many samples of each row may be tried together."""
        if self._max_tokens is None or num_rows > 1:
            return self._num_samples
        return min(self._num_samples, max(1, self._max_tokens // longest))

    def _keep_below(self, num_rows: int, longest: int, at_once: int) -> None:
        """Take no more together, from here on, than half of what has not fitted."""
        half = (num_rows + 1) // 2 * at_once if num_rows > 1 else (at_once + 1) // 2
        self._max_tokens = half * longest if self._max_tokens is None else min(half * longest, self._max_tokens)


def _unless_too_large(events: Iterator[Event]) -> Generator[Event, None, bool]:
    """Whether the memory of the device sufficed. (Only after this has returned, it is free.)"""
    try:
        yield from events
    except torch.OutOfMemoryError:
        return False
    return True


def as_questions(questions: Any) -> list[str]:
    """One question, or several, as a list. Raises `InputError` for what is not text, or empty."""
    if not isinstance(questions, str) and (
        isinstance(questions, (bytes, Mapping)) or not isinstance(questions, Iterable)
    ):
        raise InputError(f"expected a question as text, or a list of them; got {type(questions).__name__}")
    several = [questions] if isinstance(questions, str) else list(questions)
    if not several:
        raise InputError("no question was given; give one as text, or a list of them")
    for number, question in enumerate(several, start=1):
        check_question(question, f"question {number}" if len(several) > 1 else "the question")
    return several


def check_question(question: Any, where: str) -> None:
    """Raise `InputError` for a question that is not text, or empty; `where` says which it is."""
    if not isinstance(question, str):
        raise InputError(f"{where} is a {type(question).__name__}, expected text")
    if not question.strip():
        raise InputError(f"{where} is empty; write what is to be answered")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} is not valid text: it holds bytes that are not UTF-8") from None


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number from `least` to `most`."""
    kind: Any = type(value)
    if not issubclass(kind, Integral) or kind is bool or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
