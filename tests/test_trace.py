"""Traces: what they hold, on disk and off, and that a run can be replayed from any message."""

import json
from pathlib import Path

import pytest
import torch

from recursivemas.answering import Result
from recursivemas.errors import CheckpointError, ConfigError, InputError, OutputError
from recursivemas.interventions import Replay
from recursivemas.system import RecursiveSystem
from recursivemas.trace import Meter, Trace, TurnUsage, Usage, load_traces

HOPS = [
    (1, "planner", "critic"),
    (1, "critic", "solver"),
    (1, "solver", "planner"),
    (2, "planner", "critic"),
    (2, "critic", "solver"),
]


@pytest.fixture
def full(system: RecursiveSystem, questions: list[str]) -> list[Result]:
    return system.run(questions[:3], trace="full")


def hops(trace: Trace) -> list[tuple[int, str, str]]:
    return [(message.round, message.source, message.target) for message in trace.messages]


def test_a_full_trace_holds_every_message_in_order(system: RecursiveSystem, full: list[Result]) -> None:
    for result in full:
        assert hops(result.trace) == HOPS
        for round, source, target in HOPS:
            latents = result.trace.message(round=round, source=source, target=target)
            assert latents.shape == (4, system.agents[target].model.hidden_size)
        assert result.trace.answer == result.text


def test_norms_are_relative_to_the_readers_embeddings(system: RecursiveSystem, full: list[Result]) -> None:
    for message in full[0].trace.messages:
        table = system.agents[message.target].model.network.get_input_embeddings().weight
        expected = message.tensor().norm(dim=-1) / table.norm(dim=-1).mean()
        assert message.norms == pytest.approx(expected.tolist(), rel=1e-4)


def test_nearest_tokens_are_those_of_the_readers_table(system: RecursiveSystem, full: list[Result]) -> None:
    for result in full:
        message = result.trace.messages[1]
        model = system.agents["solver"].model
        table = model.network.get_input_embeddings().weight
        cosines = torch.nn.functional.cosine_similarity(message.tensor()[:, None], table[None], dim=-1)
        assert [row[0][1] for row in message.nearest] == pytest.approx(cosines.max(dim=1).values.tolist(), abs=1e-5)
        best = [model.decode([token]).strip() for token in cosines.argmax(dim=1).tolist()]
        assert all(row[0][0] == token for row, token in zip(message.nearest, best, strict=True) if token)


def test_true_means_full_and_false_means_off(system: RecursiveSystem, questions: list[str]) -> None:
    assert system.run(questions[0], trace=True).trace.level == "full"
    off = system.run(questions[0], trace=False).trace
    assert (off.level, off.messages) == ("off", [])


def test_a_summary_has_norms_and_no_tensors(system: RecursiveSystem, questions: list[str]) -> None:
    trace = system.run(questions[0]).trace
    assert hops(trace) == HOPS
    assert all(len(message.norms) == len(message.nearest) == 4 for message in trace.messages)
    with pytest.raises(InputError, match="run with trace='full'"):
        trace.message(round=1, source="planner", target="critic")


def test_a_message_that_was_not_sent_is_named_with_those_that_were(full: list[Result]) -> None:
    with pytest.raises(InputError, match=r"no message solver->planner in round 2 \(it has: round 1 planner->critic"):
        full[0].trace.message(round=2, source="solver", target="planner")


def test_a_text_trace_has_words_and_no_latents(system: RecursiveSystem, questions: list[str]) -> None:
    trace = system.run(questions[0], channel="text", trace="full").trace
    assert all(message.text and message.norms is None for message in trace.messages)
    with pytest.raises(InputError, match="holds no latents"):
        trace.message(*HOPS[0])


# On disk


def test_traces_on_disk_are_those_of_the_run(system: RecursiveSystem, questions: list[str], tmp_path: Path) -> None:
    questions = questions[:3]
    kept = system.run(questions, trace="full", channel="both", trace_dir=tmp_path / "trace", batch_size=2)
    fresh = system.run(questions, trace="full", channel="both", batch_size=2)
    read = load_traces(tmp_path / "trace")
    assert [trace.question for trace in read] == questions
    for result, again, trace in zip(kept, fresh, read, strict=True):
        assert trace.answer == again.text
        assert trace.settings["num_rounds"] == 2
        for one, other, third in zip(result.trace.messages, again.trace.messages, trace.messages, strict=True):
            # Read back only now, and bit by bit.
            assert callable(one.latents)
            assert torch.equal(one.tensor(), other.tensor())
            assert torch.equal(third.tensor(), other.tensor())
            assert third.text == other.text
            assert third.norms == other.norms
            assert [[tuple(pair) for pair in row] for row in third.nearest] == other.nearest


def test_tensors_are_read_when_asked_for(system: RecursiveSystem, questions: list[str], tmp_path: Path) -> None:
    system.run(questions[:1], trace="full", trace_dir=tmp_path)
    [trace] = load_traces(tmp_path)
    (tmp_path / "batch-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read 0/1/planner->critic"):
        trace.message(*HOPS[0])


def test_a_summary_on_disk_can_be_read(system: RecursiveSystem, questions: list[str], tmp_path: Path) -> None:
    system.run(questions[:2], trace_dir=tmp_path)
    assert [hops(trace) for trace in load_traces(tmp_path)] == [HOPS, HOPS]


@pytest.mark.usefixtures("unchecked")
def test_a_directory_may_be_given_as_text(system: RecursiveSystem, tmp_path: Path) -> None:
    system.run("Why?", trace="full", trace_dir=str(tmp_path / "a" / "b"))
    assert len(load_traces(tmp_path / "a" / "b")) == 1


def test_a_directory_that_holds_a_trace_is_refused_and_untouched(
    system: RecursiveSystem, questions: list[str], tmp_path: Path
) -> None:
    system.run(questions[0], trace="full", trace_dir=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="exists already"):
        system.run(questions[1], trace="full", trace_dir=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_to_is_an_output_error(system: RecursiveSystem, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(OutputError, match="cannot write the trace"):
        system.run("Why?", trace="full", trace_dir=tmp_path / "file")


def test_a_directory_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trace in"):
        load_traces(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"traces": [{}]}',
        lambda text: text.replace('"question"', '"quest"'),
        lambda text: text.replace('"source"', '"sauce"'),
        lambda text: text.replace('"format_version": 1', '"format_version": 2'),
    ],
)
def test_a_damaged_record_is_refused(system: RecursiveSystem, tmp_path: Path, damage: object) -> None:
    system.run("Why?", trace="full", trace_dir=tmp_path)
    file = tmp_path / "batch-00000.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(CheckpointError, match=r"batch-00000\.json"):
        load_traces(tmp_path)


def test_truncated_tensors_are_refused(system: RecursiveSystem, tmp_path: Path) -> None:
    system.run("Why?", trace="full", trace_dir=tmp_path)
    file = tmp_path / "batch-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"batch-00000\.safetensors"):
        load_traces(tmp_path)[0].message(*HOPS[0])


# Replay


@pytest.mark.parametrize(("until", "channel"), [*((place, "latent") for place in range(len(HOPS))), (2, "both")])
def test_a_run_can_be_replayed_from_every_message(
    system: RecursiveSystem, questions: list[str], tmp_path: Path, until: int, channel: str
) -> None:
    original = system.run(questions[:2], trace="full", channel=channel, trace_dir=tmp_path)
    replay = Replay.from_traces(load_traces(tmp_path), until=HOPS[until])
    again = system.run(questions[:2], trace="full", channel=channel, intervene=replay)
    for result, expected in zip(again, original, strict=True):
        assert result.text == expected.text
        # The last message at hand is read; only what came after was computed, and it is the same.
        assert hops(result.trace) == HOPS[until:]
        for round, source, target in HOPS[until + 1 :]:
            latents = expected.trace.message(round, source, target)
            found = result.trace.message(round, source, target)
            assert (found - latents).norm() <= 1e-4 * latents.norm()


def test_a_text_run_can_be_replayed(system: RecursiveSystem, questions: list[str]) -> None:
    original = system.run(questions[:2], channel="text")
    replay = Replay.from_traces([result.trace for result in original], until=HOPS[2])
    again = system.run(questions[:2], channel="text", intervene=replay)
    assert [result.text for result in again] == [result.text for result in original]
    assert again[0].usage.generated_tokens < original[0].usage.generated_tokens


# The meter


def test_a_count_is_for_every_question_or_for_each() -> None:
    meter = Meter(2, torch.device("cpu"))
    meter.count(1, "planner", prompt_tokens=[3, 5], latent_steps=4)
    meter.count(1, "planner", prompt_tokens=1)
    meter.count(2, "solver", generated_tokens=[7, 0])
    first, second = meter.usages()
    assert (first.prompt_tokens, first.latent_steps, first.generated_tokens) == (4, 4, 7)
    assert (second.prompt_tokens, second.latent_steps, second.generated_tokens) == (6, 4, 0)
    assert [(turn.round, turn.role) for turn in first.turns] == [(1, "planner"), (2, "solver")]
    assert first.peak_memory_bytes > 0


def test_seconds_of_a_batch_are_shared_by_its_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 14.0, 20.0, 22.0, 30.0, 38.0])
    monkeypatch.setattr("recursivemas.trace.time.perf_counter", lambda: next(clock))
    meter = Meter(4, torch.device("cpu"))
    meter.count(1, "planner")
    meter.count(2, "planner")
    for round, phase in ((1, "latent"), (1, "latent"), (2, "decode")):
        with meter.phase(round, "planner", phase):
            pass
    for usage in meter.usages():
        assert usage.seconds_by_phase() == {"prefill": 0, "latent": 6 / 4, "link": 0, "decode": 8 / 4}
        assert usage.seconds == 14 / 4
        assert usage.turns[0].seconds["latent"] == 6 / 4


def test_an_unknown_count_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'positions'"):
        Usage([TurnUsage(1, "planner")]).total("position")


def test_usage_is_plain_data(system: RecursiveSystem) -> None:
    usage = system.run("Why?").usage
    data = json.loads(json.dumps(usage.to_dict()))
    assert data["generated_tokens"] == 12
    assert data["seconds"] == pytest.approx(usage.seconds)
    assert len(data["turns"]) == 6
