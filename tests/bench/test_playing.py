"""Positions: what the meter counts is what the closed formula says, whatever is played."""

from collections.abc import Callable

import pytest
from tests.conftest import FEW_WORDS

from recursivemas.bench.playing import Load, expected_positions, play, seconds_by_round
from recursivemas.bench.subjects import chain, numbered_questions, random_model, small_configuration
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

LOADS = [
    Load(1, 4),
    Load(3, 4, reuse_prefixes=False),
    Load(3, 1, answer_tokens=1),
    Load(2, 0),
    Load(2, 3, "text", message_tokens=5),
    Load(3, 3, "text", message_tokens=1, reuse_prefixes=False),
    Load(2, 3, "both", message_tokens=6),
    Load(2, 3, "none"),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(small_configuration(64, 1), device="cpu")


def mixture(model: LanguageModel) -> RecursiveSystem:
    """Roles that stand side by side and share a model; two of them begin alike."""
    roles = ("math", "code", "science")
    words = {role: {"always": f"{{question}} {{latents:summarizer}} {role}"} for role in roles[:2]}
    prompts = {
        "name": "alike",
        "roles": {
            **words,
            "science": {"first": "science {question}", "later": "{latents:summarizer} {question}"},
            "summarizer": {"always": "{question} {latents:math} then {latents:code} {latents:science}"},
        },
    }
    return RecursiveSystem.build(
        pattern="mixture", prompts=prompts, agents=dict.fromkeys((*roles, "summarizer"), model)
    )


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("shape", ["one agent", "two", "five", "mixture"])
def test_positions_are_those_of_the_closed_formula(model: LanguageModel, shape: str, load: Load) -> None:
    sizes = {"one agent": 1, "two": 2, "five": 5}
    system = mixture(model) if shape == "mixture" else chain([model] * sizes[shape], after=3)
    short, long = numbered_questions(1, 4), numbered_questions(1, 9)
    usages = play(system, [*short, *long], load)
    for question, usage in zip((*short, *long), usages, strict=True):
        assert usage.positions == expected_positions(system, question, load)


@pytest.mark.parametrize("reuse_prefixes", [True, False])
def test_latent_positions_of_any_system(
    make_system: Callable[..., RecursiveSystem], questions: list[str], reuse_prefixes: bool
) -> None:
    for system in (make_system(), make_system(prompts=FEW_WORDS)):
        load = Load(3, 4, reuse_prefixes=reuse_prefixes)
        for question, usage in zip(questions, play(system, questions, load), strict=True):
            assert usage.positions == expected_positions(system, question, load)


def test_texts_have_the_length_they_are_given(model: LanguageModel) -> None:
    system = chain([model] * 3, after=2)
    [usage] = play(system, numbered_questions(1, 5), Load(2, 4, "text", message_tokens=7, answer_tokens=3))
    assert [turn.generated_tokens for turn in usage.turns] == [7] * 5 + [3]
    [usage] = play(system, numbered_questions(1, 5), Load(2, 4, "latent", message_tokens=7, answer_tokens=3))
    assert [turn.generated_tokens for turn in usage.turns] == [0] * 5 + [3]
    assert [turn.latent_steps for turn in usage.turns] == [4] * 5 + [0]


def test_played_as_a_run_is(system: RecursiveSystem, questions: list[str]) -> None:
    load = Load(2, 4, answer_tokens=12)
    expected = system.run(questions, num_rounds=2, num_latent_steps=4, trace="off")
    for usage, result in zip(play(system, questions, load), expected, strict=True):
        assert [turn.positions for turn in usage.turns[:-1]] == [turn.positions for turn in result.usage.turns[:-1]]
        assert usage.prompt_tokens == result.usage.prompt_tokens


def test_seconds_by_round_are_those_of_all_turns(system: RecursiveSystem, questions: list[str]) -> None:
    usages = play(system, questions, Load(3, 2))
    seconds = seconds_by_round(usages)
    assert sorted(seconds) == [1, 2, 3]
    assert sum(seconds.values()) == pytest.approx(sum(usage.seconds for usage in usages))
