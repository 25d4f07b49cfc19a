"""Pattern: who reads whom, when, and which turns are needed for an answer."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursivemas.errors import ConfigError, PatternError
from recursivemas.patterns import BUNDLED, Edge, Pattern, Turn

SEQUENTIAL = Pattern.load("sequential")
# Two experts side by side, a summariser that reads both and tells them what it made of it.
MIXTURE = Pattern.load(
    {
        "name": "mixture",
        "stages": [["a", "b"], ["s"]],
        "edges": ["a->s", "b->s", "s->a", "s->b", "a->b"],
        "answers": "s",
    }
)


def spelled(turns: list[Turn]) -> list[str]:
    return [f"{turn.round} {turn.role}" + (" speaks" if turn.speaks else "") for turn in turns]


def test_a_reader_before_or_beside_its_source_reads_last_rounds_message() -> None:
    feedback = {str(edge): MIXTURE.is_feedback(edge) for edge in MIXTURE.graph}
    assert feedback == {"a->s": False, "b->s": False, "s->a": True, "s->b": True, "a->b": True}
    assert MIXTURE.message_round(Edge("a", "s"), 3) == 3
    assert MIXTURE.message_round(Edge("a", "b"), 3) == 2
    assert MIXTURE.message_round(Edge("a", "b"), 1) == 0


def test_the_turns_of_a_sequential_pattern() -> None:
    assert spelled(SEQUENTIAL.schedule(2)) == [
        "1 planner",
        "1 critic",
        "1 solver",
        "2 planner",
        "2 critic",
        "2 solver speaks",
    ]
    sends = [str(edge) for turn in SEQUENTIAL.schedule(2) for edge in turn.sends]
    # The feedback of the last round is read by nobody.
    assert sends == ["planner->critic", "critic->solver", "solver->planner", "planner->critic", "critic->solver"]


def test_a_sender_sends_only_to_those_who_will_read() -> None:
    turns = MIXTURE.schedule(2)
    assert spelled(turns) == ["1 a", "1 b", "1 s", "2 a", "2 b", "2 s speaks"]
    assert [str(edge) for edge in turns[0].sends] == ["a->s", "a->b"]
    assert [str(edge) for edge in turns[3].sends] == ["a->s"]


def test_a_closed_edge_makes_its_sender_needless() -> None:
    only_b = SEQUENTIAL.schedule(3, is_open=lambda edge: edge.source == "critic")
    assert spelled(only_b) == ["3 critic", "3 solver speaks"]
    assert spelled(SEQUENTIAL.schedule(3, is_open=lambda edge: False)) == ["3 solver speaks"]


def test_a_known_message_need_not_be_made() -> None:
    known = {("solver->planner", 1)}
    turns = SEQUENTIAL.schedule(2, is_known=lambda edge, round: (str(edge), round) in known)
    assert spelled(turns) == ["2 planner", "2 critic", "2 solver speaks"]


def test_answers_in_earlier_rounds_are_extra_turns() -> None:
    assert spelled(SEQUENTIAL.schedule(2, answer_rounds=[1])) == [
        "1 planner",
        "1 critic",
        "1 solver speaks",
        "1 solver",
        "2 planner",
        "2 critic",
        "2 solver speaks",
    ]


def test_one_agent_may_read_itself() -> None:
    pattern = Pattern.load({"name": "self", "stages": [["a"]], "edges": ["a->a"], "answers": "a"})
    assert spelled(pattern.schedule(3)) == ["1 a", "2 a", "3 a speaks"]


def test_alone_only_the_answering_role_is_left() -> None:
    alone = SEQUENTIAL.alone()
    assert (alone.roles, alone.graph, alone.answers) == (("solver",), (), "solver")
    assert spelled(alone.schedule(3)) == ["3 solver speaks"]


def test_renaming_keeps_the_graph() -> None:
    renamed = SEQUENTIAL.renamed({"planner": "doctor", "solver": "nurse"})
    assert renamed.roles == ("doctor", "critic", "nurse")
    assert renamed.edges == ("doctor->critic", "critic->nurse", "nurse->doctor")
    assert renamed.answers == "nurse"
    with pytest.raises(PatternError, match="unknown role 'planer': did you mean 'planner'"):
        SEQUENTIAL.renamed({"planer": "x"})
    with pytest.raises(PatternError, match="twice"):
        SEQUENTIAL.renamed({"planner": "solver"})


ROLES = ("a", "b", "c", "d")


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    order = draw(st.permutations(ROLES))
    cuts = sorted(draw(st.sets(st.integers(1, 3))))
    stages = [list(order[i:j]) for i, j in zip([0, *cuts], [*cuts, 4], strict=True)]
    edges = draw(st.sets(st.tuples(st.sampled_from(ROLES), st.sampled_from(ROLES))))
    return {
        "name": "drawn",
        "stages": stages,
        "edges": [f"{source}->{target}" for source, target in sorted(edges)],
        "answers": draw(st.sampled_from(ROLES)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables(), st.integers(1, 4))
def test_whatever_the_graph_messages_are_made_before_they_are_read_and_only_if_read(
    table: dict[str, Any], num_rounds: int
) -> None:
    pattern = Pattern.load(table)
    turns = pattern.schedule(num_rounds)
    made: set[tuple[int, Edge]] = set()
    read: set[tuple[int, Edge]] = set()
    for turn in turns:
        for edge in pattern.sources(turn.role):
            round = pattern.message_round(edge, turn.round)
            if round > 0:
                assert (round, edge) in made
                read.add((round, edge))
        made |= {(turn.round, edge) for edge in turn.sends}
    assert made == read
    assert [turn for turn in turns if turn.speaks] == [Turn(num_rounds, pattern.answers, speaks=True)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"answers": "solvr"}, PatternError, "unknown role 'solvr': did you mean 'solver'"),
        ({"edges": ["planner->critik"]}, PatternError, "unknown role 'critik': did you mean 'critic'"),
        ({"edges": ["planner critic"]}, PatternError, "write it as source->target"),
        ({"edges": ["planner->"]}, PatternError, "write it as source->target"),
        ({"edges": ["planner->critic", "planner -> critic"]}, PatternError, "names an edge twice"),
        ({"stages": [["planner"], ["planner", "critic", "solver"]]}, PatternError, "names a role twice"),
        ({"stages": []}, PatternError, "unknown role"),
        ({"stages": ["planner"]}, ConfigError, "stages"),
        ({"steges": []}, ConfigError, "did you mean 'stages'"),
        ({"answers": ""}, PatternError, "unknown role"),
        ({"stages": [["planner"], ["critic"], ["solver"], ["a->b"]]}, PatternError, "a->b"),
        ({"stages": [["planner"], ["critic"], ["solver"], ["../x"]]}, PatternError, "../x"),
    ],
)
def test_a_pattern_that_does_not_hold_together_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Pattern.load({**SEQUENTIAL.model_dump(), **change})


def test_bundled_patterns_are_loaded_by_name() -> None:
    for file in BUNDLED.glob("*.yaml"):
        assert Pattern.load(file.stem).name == file.stem
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        Pattern.load("sequentail")
