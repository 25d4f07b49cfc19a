"""Questions by the batch: what is accepted as a question, and how a long list of them is gone through.

Knows nothing of systems: how a batch is answered comes as a function.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, TypeVar

import torch

from recursivemas.errors import ConfigError, InputError

Answer = TypeVar("Answer")


def in_batches(
    answer: Callable[[list[int]], list[Answer]], order: list[int], batch_size: int
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Answer rows batch by batch: yields the rows of each batch, and their answers.

    A batch that does not fit into the memory of a GPU is halved. Raises `InputError` if one row alone does not fit.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    while batches:
        rows = batches.pop(0)
        done = _unless_too_large(answer, rows)
        if done is None:
            torch.cuda.empty_cache()
            batches[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            yield rows, done


def _unless_too_large(answer: Callable[[list[int]], list[Answer]], rows: list[int]) -> list[Answer] | None:
    """The answers, or None if the memory of the GPU did not suffice. (Only after this has returned, it is free.)"""
    try:
        return answer(rows)
    except torch.cuda.OutOfMemoryError:
        if len(rows) > 1:
            return None
        raise InputError(
            "one question alone does not fit into the memory of the device; lower max_new_tokens or the number of "
            "latent steps, or use a smaller dtype"
        ) from None


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
        where = f"question {number}" if len(several) > 1 else "the question"
        if not isinstance(question, str):
            raise InputError(f"{where} is a {type(question).__name__}, expected text")
        if not question.strip():
            raise InputError(f"{where} is empty; write what is to be answered")
        try:
            question.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} is not valid text: it holds bytes that are not UTF-8") from None
    return several


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number from `least` to `most`."""
    kind: Any = type(value)
    if not issubclass(kind, Integral) or kind is bool or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
