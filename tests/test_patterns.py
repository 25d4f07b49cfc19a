"""Pattern: who reads whom, when, and which turns are needed for an answer."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recursivemas.errors import ConfigError, PatternError
from recursivemas.patterns import BUNDLED, Edge, Pattern, Turn, find_faults

SEQUENTIAL = Pattern.load("sequential")
# Two experts side by side, one of which reads the other; a summariser that reads both and tells them what it made of it.
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
        ({"stages": [["planner"], [], ["critic"], ["solver"]]}, PatternError, "a stage without a role"),
        ({"answers": ["solver", "critic"]}, ConfigError, "one role answers"),
        ({"mutual": "perhaps"}, ConfigError, "mutual"),
    ],
)
def test_a_pattern_that_does_not_hold_together_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Pattern.load({**SEQUENTIAL.model_dump(), **change})


def complaints(**change: Any) -> list[str]:
    return [fault.message for fault in find_faults({**SEQUENTIAL.model_dump(), **change})]


def test_several_complaints_come_in_one_line() -> None:
    with pytest.raises(PatternError, match=r"'planner'; .*; unknown role 'critik': did you mean 'critic'") as caught:
        Pattern.load(
            {
                **SEQUENTIAL.model_dump(),
                "stages": [["planner", "planner"], ["critic"], ["solver"]],
                "edges": ["planner->critik"],
            }
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A role that nobody reads, or nobody but itself; one that is read, but not by anybody of whom the solver hears.
        ({"edges": ["planner->critic", "planner->solver"]}, "nobody reads what the role 'critic' sends"),
        (
            {"edges": ["planner->solver", "planner->critic", "critic->critic"]},
            "nobody but itself reads what the role 'critic'",
        ),
        (
            {
                "stages": [["planner", "deaf"], ["critic"], ["solver"], ["mute"]],
                "edges": [*SEQUENTIAL.edges, "deaf->mute", "mute->deaf"],
            },
            "what the role 'deaf' sends never reaches the role that answers, 'solver'",
        ),
        (
            {
                "stages": [["planner", "critic"], ["solver"]],
                "edges": ["planner->critic", "critic->planner", "critic->solver"],
            },
            "'planner' and 'critic' stand in one stage and read each other",
        ),
    ],
)
def test_what_would_run_but_not_as_it_looks_is_told_and_can_be_loaded(change: dict[str, Any], message: str) -> None:
    assert any(message in complaint for complaint in complaints(**change)), complaints(**change)
    Pattern.load({**SEQUENTIAL.model_dump(), **change})


def test_who_means_it_may_let_two_of_a_stage_read_each_other() -> None:
    change = {
        "stages": [["planner", "critic"], ["solver"]],
        "edges": ["planner->critic", "critic->planner", "critic->solver", "planner->solver"],
    }
    assert len(complaints(**change)) == 1
    assert complaints(**change, mutual=True) == []
    # One of them may read the other: it is plain that this takes a round.
    assert complaints(**{**change, "edges": change["edges"][1:]}) == []


def test_a_sound_pattern_has_no_faults() -> None:
    assert complaints() == []
    # Messages that take several rounds to reach the answer do reach it.
    stages = [["solver"], ["critic"], ["planner"]]
    assert complaints(stages=stages, edges=["planner->critic", "critic->solver", "solver->solver"]) == []
    alone = {"name": "x", "stages": [["a"]], "answers": "a"}
    assert find_faults(alone) == find_faults({**alone, "edges": ["a->a"]}) == []


def test_one_wrong_name_does_not_cause_a_row_of_complaints() -> None:
    [complaint] = complaints(edges=["planner->critic", "critic->sovler", "solver->planner"])
    assert "unknown role 'sovler': did you mean 'solver'" in complaint
    [complaint] = complaints(answers="slover")
    assert "unknown role 'slover': did you mean 'solver'" in complaint


@pytest.mark.parametrize(
    "content", [{}, {"stages": 5, "edges": "x", "answers": {}}, {"stages": [5, [5]], "edges": [5, None]}]
)
def test_data_of_any_form_can_be_looked_at(content: dict[str, Any]) -> None:
    assert [fault.message for fault in find_faults(content)][-1].startswith(("no role acts", "a stage without"))


def test_a_file_is_refused_with_the_lines_of_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nstages: [[a], [b]]\nedges:\n  - a->b\n  - b->c\nanswers: d\n")
    with pytest.raises(PatternError, match=rf"^{file}:5: unknown role 'c'.*; {file}:6: unknown role 'd'"):
        Pattern.load(file)
    file.write_text("name: mine\nstages: [[a], [b]]\nedgs: []\nanswers: b\nanswers: a\n")
    with pytest.raises(
        ConfigError, match=rf"{file}:5: 'answers' is given twice, first in line 4.*; {file}:3: unknown setting"
    ):
        Pattern.load(file)


ROLES_OF = {
    "sequential": ("planner", "critic", "solver"),
    "mixture": ("math", "code", "science", "summarizer"),
    "distillation": ("expert", "learner"),
    "deliberation": ("reflector", "toolcaller"),
    "self-recursion": ("thinker",),
}


def test_the_papers_patterns_are_bundled_and_one_agent_alone() -> None:
    assert {file.stem for file in BUNDLED.glob("*.yaml")} == set(ROLES_OF)
    for name, roles in ROLES_OF.items():
        pattern = Pattern.load(name)
        assert pattern.roles == roles
        assert pattern.answers == roles[-1]
        # Whoever answers is heard by those who begin: that is what makes it a recursion.
        back = {edge.target for edge in pattern.graph if edge.source == pattern.answers}
        assert back == set(pattern.stages[0])


def test_the_specialists_of_a_mixture_stand_side_by_side() -> None:
    pattern = Pattern.load("mixture")
    assert pattern.stages == (("math", "code", "science"), ("summarizer",))
    assert len(pattern.graph) == 6
    assert spelled(pattern.schedule(2)) == [
        "1 math",
        "1 code",
        "1 science",
        "1 summarizer",
        "2 math",
        "2 code",
        "2 science",
        "2 summarizer speaks",
    ]


def test_bundled_patterns_are_loaded_by_name() -> None:
    for file in BUNDLED.glob("*.yaml"):
        assert Pattern.load(file.stem).name == file.stem
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        Pattern.load("sequentail")
