"""Drawing with lines of text: whoever follows the lines finds just the edges there are."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from recursivemas.drawing.text import draw
from recursivemas.patterns import Pattern

UP, DOWN, LEFT, RIGHT = (-1, 0), (1, 0), (0, -1), (0, 1)
ARMS = {
    **dict.fromkeys("─┄", (LEFT, RIGHT)),
    **dict.fromkeys("│┆", (UP, DOWN)),
    "┐": (LEFT, DOWN),
    "┘": (LEFT, UP),
    "┤": (LEFT, UP, DOWN),
    "◀": (RIGHT,),
    "┌": (RIGHT, DOWN),
    "└": (RIGHT, UP),
    "├": (RIGHT, UP, DOWN),
    "▶": (LEFT,),
    "┼": (LEFT, RIGHT, UP, DOWN),
}
Cell = tuple[int, int]


def follow(lines: list[str], start: Cell, heading: Cell) -> set[Cell]:
    """The arrowheads that a line leads to; two lines that cross do not meet."""
    arrows: set[Cell] = set()
    seen: set[tuple[Cell, Cell]] = set()
    pending = [(start, heading)]
    while pending:
        (row, column), (down, right) = pending.pop()
        if ((row, column), (down, right)) in seen:
            continue
        seen.add(((row, column), (down, right)))
        symbol = lines[row][column]
        assert (-down, -right) in ARMS[symbol], f"a line ends in the air at {row, column}: {symbol}"
        if symbol in "◀▶":
            arrows.add((row, column))
        onward = [(down, right)] if symbol == "┼" else [arm for arm in ARMS[symbol] if arm != (-down, -right)]
        if symbol in "◀▶":
            continue
        for step in onward:
            place = row + step[0], column + step[1]
            # Where a line meets the roles it ends: it is another sender's.
            if lines[place[0]][place[1]] == " " and step in (LEFT, RIGHT):
                continue
            pending.append((place, step))
    return arrows


def edges_in(picture: str, pattern: Pattern) -> set[str]:
    """The edges that the picture shows."""
    lines = picture.split("\n\n")[1].split("\n")
    width = max(map(len, lines)) + 2
    lines = [f"{line:{width}}" for line in lines]
    rows = {role: next(row for row, line in enumerate(lines) if f" {role} " in line) for role in pattern.roles}
    name = lines[0].index(f" {pattern.roles[0]} ") + 1
    longest = max(len(role) + len(" (answers)") * (role == pattern.answers) for role in pattern.roles)
    owners = [
        max((role for role in rows if rows[role] <= row), key=lambda role: rows[role]) for row in range(len(lines))
    ]
    found = set()
    for row, line in enumerate(lines):
        for column, heading in ((name + longest + 1, RIGHT), (name - 2, LEFT)):
            if line[column] in "─┄┐┌└":
                for arrow in follow(lines, (row, column), heading):
                    found.add(f"{owners[row]}->{owners[arrow[0]]}")
    return found


def test_a_mixture() -> None:
    picture = draw(Pattern.load("mixture"), channels=dict.fromkeys(Pattern.load("mixture").edges, "text"))
    assert picture.split("\n\n")[1] == (
        "stage 1  ┌▶ math                 ─┐\n"
        "         ├▶ code                 ─┤\n"
        "         ├▶ science              ─┤\n"
        "stage 2  └┄ summarizer (answers) ◀┘"
    )
    assert picture.startswith("mixture: Three specialists")
    assert "math->summarizer      read in the same round   text" in picture
    assert "summarizer->math      read one round later     text" in picture


def test_an_agent_that_reads_itself_and_one_that_reads_nobody() -> None:
    assert edges_in(draw(Pattern.load("self-recursion")), Pattern.load("self-recursion")) == {"thinker->thinker"}
    assert draw(Pattern.load("sequential").alone()) == "sequential (solo)\n\nstage 1   solver (answers)"


def test_what_plays_a_role_stands_beside_it() -> None:
    picture = draw(Pattern.load("distillation"), players={"expert": "llama, 64 wide", "learner": "qwen3, 32 wide"})
    assert "expert (llama, 64 wide)" in picture
    assert "learner (answers, qwen3, 32 wide)" in picture


ROLES = ("ada", "bo", "cleo", "di", "eva", "finn")


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    order = draw(st.permutations(ROLES))
    cuts = sorted(draw(st.sets(st.integers(1, len(ROLES) - 1))))
    stages = [list(order[i:j]) for i, j in zip([0, *cuts], [*cuts, len(ROLES)], strict=True)]
    edges = draw(st.sets(st.tuples(st.sampled_from(ROLES), st.sampled_from(ROLES)), max_size=14))
    table: dict[str, Any] = {"name": "drawn", "stages": stages, "answers": draw(st.sampled_from(ROLES))}
    return {**table, "edges": [f"{source}->{target}" for source, target in sorted(edges)]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables())
def test_whatever_the_graph_its_edges_can_be_read_off_the_picture(table: dict[str, Any]) -> None:
    pattern = Pattern.load(table)
    picture = draw(pattern)
    assert edges_in(picture, pattern) == set(pattern.edges), picture
