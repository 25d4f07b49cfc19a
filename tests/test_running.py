"""Runs of many questions: batches by length, halving, streams, samples; what comes out is what comes out alone."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.families.reference import assert_same

from recursivemas import running
from recursivemas.answering import Result, TextDelta
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=6, seed=3)


@pytest.fixture
def many(questions: list[str]) -> list[str]:
    """Questions of very unequal length, more than one batch takes."""
    return [f"{number}. {question}" for number in range(3) for question in questions]


class Memory:
    """Simulates a device whose memory holds so many positions of a cache: rows times length."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.most = 0
        self.failures = 0

    def step(self, model: LanguageModel, cache: Any, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        held = embeds.shape[0] * (len(cache) + embeds.shape[1])
        if held > self.positions:
            self.failures += 1
            raise torch.OutOfMemoryError("simulated")
        self.most = max(self.most, held)
        return STEP(model, cache, embeds, mask)


STEP = LanguageModel.step


def limit_memory(monkeypatch: pytest.MonkeyPatch, positions: int) -> Memory:
    memory = Memory(positions)
    monkeypatch.setattr(LanguageModel, "step", lambda *given: memory.step(*given))
    return memory


# Batches by length


@pytest.mark.parametrize("channel", ["latent", "text"])
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"max_batch_tokens": 400}, {"max_batch_tokens": 1}])
def test_results_are_in_order_and_those_of_each_question_alone(
    system: RecursiveSystem, many: list[str], channel: str, options: dict[str, Any]
) -> None:
    found = system.run(many, channel=channel, trace="full", **options)
    assert [result.trace.question for result in found] == many
    assert [result.index for result in found] == list(range(len(many)))
    for question, result in zip(many[:5], found[:5], strict=True):
        assert_same(result, system.run(question, channel=channel, trace="full"))


@pytest.mark.parametrize("channel", ["latent", "text", "both", "none"])
def test_a_budget_of_tokens_bounds_what_caches_hold(
    system: RecursiveSystem, many: list[str], channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = limit_memory(monkeypatch, 1 << 40)
    results = system.run(many, channel=channel, max_batch_tokens=600)
    assert memory.most <= 600
    assert len({result.usage.batch_size for result in results}) > 1


def test_questions_of_one_length_are_answered_together(
    system: RecursiveSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = ["Why so?"] * 3, ["A fox runs for two hours at four miles an hour, and rests, and rests again."] * 3
    mixed = [question for pair in zip(short, long, strict=True) for question in pair]
    batches: list[set[str]] = []
    answer = running.Answering.answer

    def watched(self: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        batches.append({asked.text for asked in batch})
        return answer(self, batch, *rest, **options)

    monkeypatch.setattr(running.Answering, "answer", watched)
    system.run(mixed, batch_size=3)
    assert batches == [set(long), set(short)]
    batches.clear()
    # Who intervenes by a function sees the batches: they are in the order of the questions.
    system.run(mixed, batch_size=3, intervene=lambda message, edge, round: message)
    assert batches == [{*long, *short}] * 2


def test_an_unknown_option_is_told_with_the_nearest_name(system: RecursiveSystem) -> None:
    with pytest.raises(ConfigError, match="unknown option of a run 'num_round': did you mean 'num_rounds'"):
        system.run("Why?", num_round=2)


# Memory that does not suffice


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_what_does_not_fit_into_memory_is_halved_and_comes_out_the_same(
    system: RecursiveSystem, many: list[str], channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = system.run(many, channel=channel, trace="full")
    memory = limit_memory(monkeypatch, 700)
    told: list[tuple[int, int]] = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    found = system.run(many, channel=channel, trace="full", progress=progress)
    assert memory.failures
    assert len({result.usage.batch_size for result in found}) > 1
    for result, other in zip(found, expected, strict=True):
        assert_same(result, other)
    assert told[-1] == (len(many), len(many))
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_shuffled_messages_are_the_same_where_batches_are_halved(
    system: RecursiveSystem, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = system.run(many, intervene="shuffled", trace="full")
    memory = limit_memory(monkeypatch, 700)
    for result, other in zip(system.run(many, intervene="shuffled", trace="full"), expected, strict=True):
        assert_same(result, other)
    assert memory.failures


def test_pieces_of_answers_are_told_once_where_batches_are_halved(
    system: RecursiveSystem, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {result.index: result.text for result in system.run(many, channel="none")}
    memory = limit_memory(monkeypatch, 1 << 40)
    list(system.stream(many, channel="none", sampling=SamplingParams(max_new_tokens=1)))
    # The prompts fit, and the answers do not: they have been told in part when a batch is given up.
    memory.positions = memory.most + 3 * len(many)
    texts: dict[int, str] = defaultdict(str)
    for event in system.stream(iter(many), tokens=True, channel="none"):
        if isinstance(event, TextDelta):
            texts[event.index] += event.text
    assert memory.failures
    assert texts == expected


def test_a_question_that_does_not_fit_alone_is_told_what_would(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = limit_memory(monkeypatch, 1 << 40)
    few, many = SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=32)
    system.run(questions[1], channel="none", sampling=few)
    memory.positions = memory.most
    with pytest.raises(
        InputError,
        match=r"question 2 \('A fox runs for two hours at four miles a'\), which takes up to \d+ positions, does "
        r"not fit into the memory of the device, even alone; with max_new_tokens=8, in place of 32, it fits",
    ):
        system.run(questions[:2], channel="none", sampling=many)
    memory.positions = memory.most - 25
    with pytest.raises(InputError, match=r"the last \d+ of its \d+ characters fit: shorten it") as told:
        system.run(questions[1], channel="none", sampling=few)
    kept = int(str(told.value).partition("the last ")[2].split()[0])
    assert system.run(questions[1][-kept:], channel="none", sampling=few).text
    memory.positions = 10
    with pytest.raises(InputError, match="nor does any part of it: lower num_latent_steps, or use a smaller dtype"):
        system.run(questions[1])


# Streams of many questions


def test_a_stream_of_many_tells_the_results_of_a_run(system: RecursiveSystem, many: list[str]) -> None:
    expected = system.run(many, batch_size=4)
    for given in (many, iter(many), tuple(many)):
        found = list(system.stream(given, batch_size=4))
        assert all(isinstance(result, Result) for result in found)
        assert sorted(result.index for result in found) == list(range(len(many)))
        for result in found:
            assert result.text == expected[result.index].text
            assert result.trace.question == many[result.index]


def test_a_stream_reads_some_batches_ahead_and_no_more(system: RecursiveSystem) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"What is {read}?"

    stream = system.stream(endless(), batch_size=2, num_rounds=1, num_latent_steps=1, trace="off")
    first = next(stream)
    assert isinstance(first, Result)
    assert read == 2 * running.WINDOW
    for _ in range(2 * running.WINDOW):
        next(stream)
    assert read == 4 * running.WINDOW


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_stream_of_many_tells_pieces_of_every_answer(
    system: RecursiveSystem, questions: list[str], num_samples: int
) -> None:
    texts: dict[tuple[int, int], str] = defaultdict(str)
    results: dict[int, Result] = {}
    events = system.stream(questions, tokens=True, batch_size=2, sampling=SAMPLED, num_samples=num_samples)
    for event in events:
        if isinstance(event, TextDelta):
            assert event.index not in results
            texts[event.index, event.sample] += event.text
        else:
            assert isinstance(event, Result)
            results[event.index] = event
    for result in system.run(questions, sampling=SAMPLED, num_samples=num_samples):
        for sample, text in enumerate(result.samples or (result.text,)):
            assert texts[result.index, sample] == text
        assert results[result.index].samples == result.samples
        for count in ("generated_tokens", "positions", "latent_steps"):
            assert results[result.index].usage.total(count) == result.usage.total(count)


def test_questions_of_an_iterator_are_checked_as_they_come(system: RecursiveSystem) -> None:
    stream = system.stream(iter(["Why?", "Where?", " "]), batch_size=1)
    with pytest.raises(InputError, match="question 3 is empty"):
        list(stream)
    with pytest.raises(InputError, match="no question was given"):
        list(system.stream(iter([])))
    with pytest.raises(InputError, match="question 2 is empty"):
        system.stream(["Why?", ""])
    with pytest.raises(InputError, match="there are only 1 keys"):
        list(system.stream(iter(["Why?", "Where?"]), keys=["a"]))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_question_cannot_be_streamed(system: RecursiveSystem) -> None:
    with pytest.raises(InputError, match="got int"):
        system.stream(5)


# Several answers


def test_more_answers_think_no_more(system: RecursiveSystem, questions: list[str]) -> None:
    """By the meter: k answers cost the latents, prompts and readings of one, and the tokens of k."""
    one = system.run(questions, sampling=SAMPLED)
    for num_samples in (2, 7):
        for result, single in zip(system.run(questions, sampling=SAMPLED, num_samples=num_samples), one, strict=True):
            usage, other = result.usage, single.usage
            assert len(result.samples) == num_samples
            assert (usage.latent_steps, usage.prompt_tokens) == (other.latent_steps, other.prompt_tokens)
            # Every token but the last of each answer is read as well.
            read = usage.generated_tokens - num_samples, other.generated_tokens - 1
            assert usage.positions - read[0] == other.positions - read[1]


def test_answers_are_the_same_however_many_fit_at_once(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = system.run(questions[:2], sampling=SAMPLED, num_samples=6)
    spoken: list[int] = []
    speak = running.Answering._speak

    def counted(self: Any, batch: Any, played: Any, plan: Any, samples: range, *rest: Any, **options: Any) -> Any:
        spoken.append(len(batch) * len(samples))
        return speak(self, batch, played, plan, samples, *rest, **options)

    monkeypatch.setattr(running.Answering, "_speak", counted)
    found = system.run(questions[:2], sampling=SAMPLED, num_samples=6, max_batch_tokens=300)
    assert max(spoken) < 6
    for result, other in zip(found, expected, strict=True):
        assert result.samples == other.samples
        assert result.usage.generated_tokens == other.usage.generated_tokens
        assert result.usage.latent_steps == other.usage.latent_steps
