"""Drawing as SVG: nothing lies upon something else, nothing leaves the page, and every line joins what it should."""

from itertools import combinations, pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursivemas.drawing.svg import LETTER, SMALL_LETTER, Box, Layout, Point, Route, draw, lay_out
from recursivemas.patterns import Pattern

NAMESPACE = "{http://www.w3.org/2000/svg}"
ROLES = ("ada", "bo", "cleo", "di", "eva", "finn", "gus", "hal", "ida", "joe", "kim", "lou")


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    number = draw(st.integers(1, len(ROLES)))
    roles = ROLES[:number]
    cuts = sorted(draw(st.sets(st.integers(1, number - 1)))) if number > 1 else []
    stages = [list(roles[i:j]) for i, j in zip([0, *cuts], [*cuts, number], strict=True)]
    edges = draw(st.sets(st.tuples(st.sampled_from(roles), st.sampled_from(roles)), max_size=20))
    table: dict[str, Any] = {"name": "drawn", "stages": stages, "answers": roles[-1]}
    return {**table, "edges": [f"{source}->{target}" for source, target in sorted(edges)]}


def overlap(first: Box, second: Box) -> bool:
    return (
        first.x < second.x + second.width
        and second.x < first.x + first.width
        and first.y < second.y + second.height
        and second.y < first.y + first.height
    )


def line_of(route: Route) -> list[Point]:
    """Points along the line of an edge; a swing is sampled."""
    if route.way != "across":
        return list(route.points)
    (x0, y0), (x1, y1), end = route.points
    middle = (x0 + x1) / 2
    bezier = []
    for step in range(21):
        t = step / 20
        weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
        x = sum(w * p for w, p in zip(weights, (x0, middle, middle, x1), strict=True))
        y = sum(w * p for w, p in zip(weights, (y0, y0, y1, y1), strict=True))
        bezier.append((x, y))
    return [*bezier, end]


def enters(start: Point, end: Point, box: Box) -> bool:
    """Whether a piece of a line passes through the inside of a box (its border does not count)."""
    left, right = sorted((start[0], end[0]))
    top, bottom = sorted((start[1], end[1]))
    return (
        left < box.x + box.width - 0.01
        and right > box.x + 0.01
        and top < box.y + box.height - 0.01
        and bottom > box.y + 0.01
    )


def assert_sound(layout: Layout, pattern: Pattern) -> None:
    for first, second in combinations(layout.boxes.values(), 2):
        assert not overlap(first, second), f"{first.role} lies upon {second.role}"
    for box in layout.boxes.values():
        assert 0 < box.x < box.x + box.width < layout.width
        assert 0 < box.y < box.y + box.height < layout.height
        assert LETTER * len(box.role) < box.width
    assert sorted(str(route.edge) for route in layout.routes) == sorted(pattern.edges)
    for route in layout.routes:
        source, target = layout.boxes[route.edge.source], layout.boxes[route.edge.target]
        assert route.points[0][0] == source.x + source.width
        assert source.y < route.points[0][1] < source.y + source.height
        assert route.points[-1][0] == target.x
        assert target.y < route.points[-1][1] < target.y + target.height
        assert (route.way == "under") == pattern.is_feedback(route.edge)
        for start, end in pairwise(line_of(route)):
            assert 0 < end[0] < layout.width
            assert 0 < end[1] < layout.height
            for box in layout.boxes.values():
                assert not enters(start, end, box), f"{route.edge} passes through {box.role}"
    # Lines may cross, but no two run along each other.
    around = [route for route in layout.routes if route.way != "across"]
    for number in (1, 2, 3):
        across = [
            round(route.points[number][number == 2] if number != 3 else route.points[3][0], 3) for route in around
        ]
        assert len(set(across)) == len(across)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables(), st.booleans())
def test_whatever_the_graph_nothing_lies_upon_something_else(table: dict[str, Any], told: bool) -> None:
    pattern = Pattern.load(table)
    channels = dict.fromkeys(pattern.edges, "latent") if told else None
    layout = lay_out(pattern, channels=channels)
    assert_sound(layout, pattern)
    read = ElementTree.fromstring(draw(pattern, channels=channels))
    places = []
    for text in read.iter(f"{NAMESPACE}text"):
        words = text.text or ""
        length = len(words) * (SMALL_LETTER if text.get("class") == "small" else LETTER)
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        left = x - {"start": 0, "middle": length / 2, "end": length}[text.attrib["text-anchor"]]
        assert left >= 0, words
        assert left + length <= layout.width, words
        assert 12 <= y <= layout.height - 4, words
        places.append((left, left + length, y))
    for (left, right, y), (other_left, other_right, other_y) in combinations(places, 2):
        assert abs(y - other_y) >= 11 or right <= other_left or other_right <= left


def test_the_picture_tells_roles_edges_players_and_channels() -> None:
    pattern = Pattern.load({**Pattern.load("mixture").model_dump(), "name": "a < b & c", "description": "<x>"})
    players = {role: f"{role} & co" for role in pattern.roles}
    channels = {**dict.fromkeys(pattern.edges, "latent"), "code->summarizer": "both"}
    read = ElementTree.fromstring(draw(pattern, players=players, channels=channels))
    words = [text.text for text in read.iter(f"{NAMESPACE}text")]
    for expected in ("a < b & c", *pattern.roles, *players.values(), "answers", "stage 1", "stage 2", "both"):
        assert words.count(expected) == 1, expected
    assert words.count("latent") == 5
    hints = [title.text for title in read.iter(f"{NAMESPACE}title")]
    assert "code->summarizer, both, read in the same round" in hints
    assert "summarizer->code, latent, read one round later" in hints
    dashed = [path for path in read.iter(f"{NAMESPACE}path") if "feedback" in path.get("class", "")]
    assert len(dashed) == 3 + 1  # and one in the legend


def test_the_feedback_of_a_mixture_is_nested_without_a_crossing() -> None:
    layout = lay_out(Pattern.load("mixture"))
    back = {route.edge.target: route.points for route in layout.routes if route.way == "under"}
    for outer, inner in pairwise([back[role] for role in ("math", "code", "science")]):
        assert outer[1][0] > inner[1][0]  # out, on the right
        assert outer[2][1] > inner[2][1]  # along, below
        assert outer[3][0] < inner[3][0]  # back in, on the left


@pytest.mark.parametrize("name", ["sequential", "mixture", "self-recursion"])
def test_what_the_checks_would_see_if_boxes_were_too_near(name: str) -> None:
    pattern = Pattern.load(name)
    layout = lay_out(pattern)
    for box in layout.boxes.values():
        box.x, box.y = 40.0, 80.0
    with pytest.raises(AssertionError):
        assert_sound(layout, pattern)
