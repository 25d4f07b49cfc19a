"""Positions of a run, through the public face, are those of the closed formula: all patterns, latents and text."""

import pytest

from recursivemas.bench.playing import Load, expected_positions, of_length
from recursivemas.bench.subjects import numbered_questions, random_model, small_configuration
from recursivemas.models import LanguageModel
from recursivemas.patterns import BUNDLED, Pattern
from recursivemas.system import RecursiveSystem

LENGTH = 5
QUESTIONS = [*numbered_questions(1, 4), *numbered_questions(1, 11)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(small_configuration(64, 1), device="cpu")


@pytest.mark.parametrize("pattern", sorted(file.stem for file in BUNDLED.glob("*.yaml")))
@pytest.mark.parametrize("channel", ["latent", "text"])
@pytest.mark.parametrize("reuse_prefixes", [True, False])
def test_positions_of_a_run_are_those_of_the_closed_formula(
    model: LanguageModel, pattern: str, channel: str, reuse_prefixes: bool
) -> None:
    system = RecursiveSystem.build(pattern=pattern, agents=dict.fromkeys(Pattern.load(pattern).roles, model))
    load = Load(3, 4, channel, message_tokens=LENGTH, answer_tokens=LENGTH, reuse_prefixes=reuse_prefixes)
    results = system.run(
        QUESTIONS,
        num_rounds=3,
        num_latent_steps=4,
        channel=channel,
        sampling=of_length(LENGTH),
        reuse_prefixes=reuse_prefixes,
        trace="off",
    )
    for question, result in zip(QUESTIONS, results, strict=True):
        assert result.usage.positions == expected_positions(system, question, load)


def test_reading_beginnings_once_spares_positions_and_changes_no_answer(model: LanguageModel) -> None:
    system = RecursiveSystem.build(agents=dict.fromkeys(Pattern.load("sequential").roles, model))
    kept, anew = (
        system.run(QUESTIONS, num_rounds=3, num_latent_steps=4, sampling=of_length(LENGTH), reuse_prefixes=reuse)
        for reuse in (True, False)
    )
    for result, other in zip(kept, anew, strict=True):
        assert result.text == other.text
        assert result.usage.positions < 0.8 * other.usage.positions
