"""How times are taken and told: in turns, repeat by repeat, with their spread."""

import json
import time
from collections.abc import Callable

import pytest
import torch

from recursivemas.bench.sections import Goal, Section, as_words, goals_section, merged
from recursivemas.bench.timing import Measured, ready, take_turns

CPU = torch.device("cpu")


def test_arms_take_turns_and_every_second_round_goes_backwards() -> None:
    called: list[str] = []
    told: list[str] = []
    arms = {name: ready(called.append, name) for name in "ab"}
    took = take_turns(arms, 3, CPU, told.append)
    assert "".join(called) == "ab" + "ba" + "ab" + "ba"
    assert called == told
    assert {name: len(each.values) for name, each in took.items()} == {"a": 3, "b": 3}


def test_only_what_is_named_is_warmed_up() -> None:
    called: list[str] = []
    take_turns({name: ready(called.append, name) for name in "ab"}, 1, CPU, warm_up=["b"])
    assert "".join(called) == "b" + "ba"


def test_making_ready_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    def slow_to_make() -> Callable[[], None]:
        spend(100.0)
        return lambda: spend(0.5)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert take_turns({"arm": slow_to_make}, 2, CPU)["arm"].values == (0.5, 0.5)


def test_ratios_are_taken_repeat_by_repeat() -> None:
    # The machine was twice as slow in the second repeat, which says nothing of the arms.
    slow, fast = Measured((2.0, 4.0, 2.0), "s"), Measured((1.0, 2.0, 1.0), "s")
    assert slow.over(fast) == Measured((2.0, 2.0, 2.0))
    assert slow.less(fast).milliseconds(2) == Measured((500.0, 1000.0, 500.0), "ms")
    assert fast.rate(8) == Measured((8.0, 4.0, 8.0))


def test_spread_is_the_quartiles_or_the_range_of_few_values() -> None:
    assert Measured((3.0, 1.0, 2.0)).quartiles == (1.0, 3.0)
    assert Measured((5.0, 1.0, 2.0, 3.0, 4.0)).quartiles == (2.0, 4.0)
    expected = {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3, "unit": "s", "values": [3.0, 1.0, 2.0]}
    assert Measured((3.0, 1.0, 2.0), "s").to_plain() == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Measured((1.0, 2.0, 3.0), "ms"), "2.00 ms ±50% (n = 3)"),
        (12345, "12,345"),
        (0.12345, "0.123"),
        (123.4, "123"),
        (4.2e-7, "4e-07"),
        (True, "yes"),
        ("text", "text"),
    ],
)
def test_values_in_words(value: object, words: str) -> None:
    assert as_words(value) == words


def test_goals_are_judged_by_the_median() -> None:
    goals = [
        Goal("kept", Measured((1.0, 1.05, 9.0)), at_most=1.1),
        Goal("missed", 1.2, at_most=1.1),
        Goal("enough", 5.0, at_least=5.0),
        Goal("too little", Measured((4.0,)), at_least=5.0),
    ]
    assert [goal.holds for goal in goals] == [True, False, True, False]
    section = goals_section([Section("a", "A", [], goals[:2]), Section("b", "B", [], goals[2:])])
    judged = Section("a", "A", [], goals)
    assert Section.from_plain(judged.to_plain()) == judged
    assert [row["kept"] for row in section.rows] == ["yes", "NO", "yes", "NO"]
    assert [row["bound"] for row in section.rows] == ["at most 1.1", "at most 1.1", "at least 5", "at least 5"]


def test_a_section_is_a_table() -> None:
    parts = [
        Section("x", "X", [{"agent": name, "ratio": Measured((1.0, 2.0, 3.0))}], note="Of something.") for name in "ab"
    ]
    section = merged(parts)
    assert section.to_markdown() == (
        "| agent | ratio |\n| --- | --- |\n| a | 2.00 ±50% |\n| b | 2.00 ±50% |\n\n"
        "Medians of 3 repeats; ± is half the distance between the quartiles. Of something."
    )
    assert Section.from_plain(json.loads(json.dumps(section.to_plain()))) == section
    mixed = Section("y", "Y", [{"few": Measured((1.0,)), "many": Measured((1.0, 1.0))}])
    assert mixed.cells() == [["1.00 (n = 1)", "1.00 ±0% (n = 2)"]]
