"""Figures: names of lines stand where they can be read."""

import itertools

import pytest

from recursivemas.evaluation.figures import _spread


@pytest.mark.parametrize("heights", [[], [0.5], [0.5, 0.5, 0.5], [0.1, 0.9, 0.11, 0.12], [0.3, 0.2, 0.1]])
def test_names_of_lines_never_overlap(heights: list[float]) -> None:
    placed = _spread(heights, 0.05)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    assert all(placed[b] - placed[a] >= 0.05 - 1e-9 for a, b in itertools.pairwise(order))
    assert sum(placed) == pytest.approx(sum(heights))


def test_names_of_lines_that_have_room_stay() -> None:
    assert _spread([0.9, 0.1, 0.12], 0.05) == pytest.approx([0.9, 0.085, 0.135])
