"""Batches: every row is answered once, as many at a time as fit, and what did not fit is remembered."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recursivemas.batches import Batches
from recursivemas.errors import ConfigError, InputError

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(sizes=SIZES, batch_size=st.integers(1, 12), max_batch_tokens=st.none() | st.integers(1, 200))
def test_every_row_is_in_one_batch_that_keeps_the_limits(
    sizes: list[int], batch_size: int, max_batch_tokens: int | None
) -> None:
    for in_order in (False, True):
        batches = Batches(batch_size, max_batch_tokens).cut(sizes, in_order=in_order)
        assert sorted(row for rows in batches for row in rows) == list(range(len(sizes)))
        for rows in batches:
            assert rows == sorted(rows)
            assert len(rows) <= batch_size
            held = len(rows) * max(sizes[row] for row in rows)
            assert len(rows) == 1 or max_batch_tokens is None or held <= max_batch_tokens
        if in_order:
            assert [row for rows in batches for row in rows] == list(range(len(sizes)))
        else:
            # By length: no row of a later batch is longer than one of an earlier batch.
            for rows, later in pairwise(batches):
                assert min(sizes[row] for row in rows) >= max(sizes[row] for row in later)


class Device:
    """Answers rows with their numbers, unless they take more memory than there is."""

    def __init__(self, sizes: list[int], memory: int) -> None:
        self.sizes, self.memory = sizes, memory
        self.attempts: list[tuple[list[int], int, bool]] = []

    def answer(self, rows: list[int], at_once: int) -> Iterator[list[int]]:
        fits = len(rows) * at_once * max(self.sizes[row] for row in rows) <= self.memory
        self.attempts.append((rows, at_once, fits))
        if not fits:
            raise torch.OutOfMemoryError("simulated")
        yield rows


def too_large(row: int) -> InputError:
    return InputError(f"row {row} does not fit")


@given(sizes=SIZES, memory=st.integers(50, 400), num_samples=st.integers(1, 3))
def test_what_does_not_fit_is_halved_until_it_does(sizes: list[int], memory: int, num_samples: int) -> None:
    device = Device(sizes, memory)
    batches = Batches(16, num_samples=num_samples)
    answered = [row for rows in batches.answer(device.answer, sizes, too_large=too_large) for row in rows]
    assert sorted(answered) == list(range(len(sizes)))


def test_a_size_that_did_not_fit_is_not_tried_again() -> None:
    sizes = [10] * 256
    device = Device(sizes, memory=100)
    batches = Batches(64)
    for _ in range(2):
        assert sum(len(rows) for rows in batches.answer(device.answer, sizes, too_large=too_large)) == 256
    # 64, 32 and 16 rows are tried once each, in both lists together; 8 rows fit.
    assert [len(rows) for rows, _, fits in device.attempts if not fits] == [64, 32, 16]
    assert {len(rows) for rows, _, fits in device.attempts if fits} == {8}


def test_one_row_is_sampled_fewer_times_at_once_before_it_is_refused() -> None:
    device = Device([10, 10], memory=35)
    done = list(Batches(2, num_samples=16).answer(device.answer, [10, 10], too_large=too_large))
    assert done == [[0], [1]]
    assert [(len(rows), at_once) for rows, at_once, fits in device.attempts if fits] == [(1, 2), (1, 2)]


def test_a_row_that_does_not_fit_alone_is_refused_by_what_is_said_of_it() -> None:
    sizes = [10, 90, 10]
    device = Device(sizes, memory=50)
    with pytest.raises(InputError, match="row 1 does not fit"):
        list(Batches(1).answer(device.answer, sizes, too_large=too_large))


def test_other_errors_are_not_caught() -> None:
    def fail(rows: list[int], at_once: int) -> Iterator[int]:
        raise RuntimeError("something else")
        yield 0

    with pytest.raises(RuntimeError, match="something else"):
        list(Batches(2).answer(fail, [1, 1], too_large=too_large))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("limits", [(0, None, 1), (1, 0, 1), (1, 2.5, 1), (1, None, 0), (True, None, 1)])
def test_limits_that_cannot_be_are_refused(limits: tuple[int, int | None, int]) -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        Batches(*limits)
