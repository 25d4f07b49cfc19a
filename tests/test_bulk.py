"""Bulk: a file of questions answered into a file, stopped anywhere and gone on with to the same file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recursivemas import running
from recursivemas.bulk import Columns, answer_file
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError, OutputError
from recursivemas.system import RecursiveSystem

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=5, seed=3)
OPTIONS: dict[str, Any] = {"num_rounds": 1, "num_latent_steps": 2, "batch_size": 3, "sampling": SAMPLED}
Answer = Callable[..., bytes]


@pytest.fixture
def data(tmp_path: Path, questions: list[str]) -> Path:
    """Eleven questions of unequal length, two of them the same."""
    texts = [f"{number}. {question}" for number in range(2) for question in questions] + [f"0. {questions[0]}"]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": text, "key": f"k{n}"}) + "\n" for n, text in enumerate(texts)))
    return file


@pytest.fixture
def answer(system: RecursiveSystem, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Answers the file with a window of two batches; gives what is in the file of answers."""
    monkeypatch.setattr(running, "WINDOW", 2)

    def run(out: str = "answers.jsonl", **changes: Any) -> bytes:
        answer_file(system, data, tmp_path / out, **{**OPTIONS, **changes})
        return (tmp_path / out).read_bytes()

    return run


class StoppedError(Exception):
    """The power is off."""


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise StoppedError

    return progress


def test_answers_stand_in_the_order_of_the_questions_and_are_those_of_a_run(
    answer: Answer, system: RecursiveSystem, data: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    found = answer(progress=lambda done, total: told.append((done, total)))
    lines = [json.loads(line) for line in found.splitlines()]
    asked = [json.loads(line) for line in data.read_text().splitlines()]
    assert [line["question"] for line in lines] == [each["question"] for each in asked]
    assert [line["index"] for line in lines] == list(range(11))
    assert [line["id"] for line in lines] == [str(number) for number in range(1, 12)]
    results = system.run([each["question"] for each in asked], keys=[line["id"] for line in lines], **OPTIONS)
    assert [line["text"] for line in lines] == [result.text for result in results]
    # A question that comes twice is sampled twice.
    assert lines[0]["text"] != lines[10]["text"]
    for line, result in zip(lines, results, strict=True):
        assert line["finished"] == result.finished
        for count in ("prompt_tokens", "latent_steps", "generated_tokens", "positions"):
            assert line[count] == result.usage.total(count)
    assert told == [(done, 11) for done in range(12)]
    assert {file.name for file in tmp_path.iterdir()} == {"answers.jsonl", "questions.jsonl"}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 11])
def test_a_run_that_was_stopped_goes_on_to_the_same_file(
    answer: Answer, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, ...]] = []
    play = running.Answering.answer

    def watched(self: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        batches.append(tuple(asked.index for asked in batch))
        return play(self, batch, *rest, **options)

    monkeypatch.setattr(running.Answering, "answer", watched)
    whole = answer("whole.jsonl")
    in_whole = batches.copy()
    with pytest.raises(StoppedError):
        answer(progress=stop_after(count))
    assert not (tmp_path / "answers.jsonl").exists()
    kept = (tmp_path / "answers.jsonl.part").read_bytes()
    assert kept.count(b"\n") == 1 + count
    batches.clear()
    told: list[int] = []
    assert answer(progress=lambda done, total: told.append(done)) == whole
    assert told[0] == count
    # The same batches, but for those that are done.
    done = {json.loads(line)["index"] for line in kept.splitlines()[1:]}
    assert batches == [batch for batch in in_whole if not done.issuperset(batch)]


def test_a_file_that_was_cut_in_the_middle_of_a_line_goes_on(answer: Answer, tmp_path: Path) -> None:
    whole = answer("whole.jsonl")
    part = tmp_path / "answers.jsonl.part"
    with pytest.raises(StoppedError):
        answer(progress=stop_after(8))
    content = part.read_bytes()
    for share in (0.02, 0.4, 0.7, 0.97):
        part.write_bytes(content[: int(len(content) * share)])
        assert answer() == whole
        (tmp_path / "answers.jsonl").unlink()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_rounds": 2}, "num_rounds"),
        ({"num_latent_steps": 3}, "num_latent_steps"),
        ({"channel": "text"}, "channel"),
        ({"sampling": SamplingParams(max_new_tokens=5, seed=3)}, "sampling"),
        ({"num_samples": 2}, "num_samples"),
        ({"instructions": "Be brief."}, "instructions"),
        ({"intervene": "zero"}, "intervene"),
        ({"columns": Columns(id="key")}, "questions"),
    ],
)
def test_changed_settings_are_refused_and_nothing_is_lost(
    answer: Answer, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(StoppedError):
        answer(progress=stop_after(4))
    before = (tmp_path / "answers.jsonl.part").read_bytes()
    with pytest.raises(OutputError, match=rf"belongs to a run with other settings \({named}\)"):
        answer(**changes)
    assert (tmp_path / "answers.jsonl.part").read_bytes() == before


def test_other_questions_and_another_system_are_refused(
    answer: Answer, system: RecursiveSystem, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        answer(progress=stop_after(4))
    with pytest.raises(OutputError, match=r"other settings \(parts\)"):
        answer_file(system.with_random_links(9), data, tmp_path / "answers.jsonl", **OPTIONS)
    data.write_text(data.read_text() + '{"question": "One more?"}\n')
    with pytest.raises(OutputError, match=r"other settings \(questions\)"):
        answer()


def test_what_answers_do_not_depend_on_may_change(answer: Answer) -> None:
    whole = answer("whole.jsonl")
    with pytest.raises(StoppedError):
        answer(progress=stop_after(4))
    assert answer(batch_size=5, max_batch_tokens=300) == whole


def test_answers_that_are_there_are_replaced_only_if_that_is_asked_for(answer: Answer, tmp_path: Path) -> None:
    whole = answer()
    with pytest.raises(OutputError, match="exists already; choose another --out, or replace it with --overwrite"):
        answer()
    with pytest.raises(OutputError, match="exists already"):
        answer(num_rounds=2)
    assert answer(overwrite=True) == whole
    with pytest.raises(StoppedError):
        answer("other.jsonl", progress=stop_after(4))
    # Begun anew, too.
    assert answer("other.jsonl", num_rounds=2, overwrite=True) != whole


def test_columns_can_be_named(answer: Answer, data: Path) -> None:
    data.write_text(data.read_text().replace('"question"', '"q"'))
    lines = answer(columns=Columns(question="q", id="key"), num_samples=2).splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"k{number}" for number in range(11)]
    assert all(len(json.loads(line)["samples"]) == 2 for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ('{"question": "Why?"}\n{"question": ', "line 2: not valid JSON"),
        ('{"question": "Why?"}\n\n{"qestion": "Why?"}', "line 3: unknown column 'question': did you mean 'qestion'"),
        ('{"question": "Why?"}\n{"question": " "}', "line 2: the question in column 'question' is empty"),
        ('{"question": "\\ud800"}', "line 1: the question is not valid text"),
        ('{"question": "Why?", "key": "a"}\n{"question": "So?", "key": "a"}', "1 ids come more than once"),
        ('{"question": "Why?", "key": "\\ud800"}', "line 1: the id is not valid text"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_before_any_is_answered(
    answer: Answer, data: Path, tmp_path: Path, content: str, message: str
) -> None:
    data.write_text(content)
    with pytest.raises(InputError, match=message):
        answer(columns=Columns(id="key" if "key" in content else None))
    assert [file.name for file in tmp_path.iterdir()] == ["questions.jsonl"]


def test_options_that_make_no_sense_for_a_file_are_refused(answer: Answer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="intervention 'shuffled', which needs all questions at once"):
        answer(intervene="shuffled")
    with pytest.raises(ConfigError, match="trace_dir cannot be given for a file of questions"):
        answer(trace_dir=tmp_path)


def test_a_question_that_is_too_long_is_named_and_may_be_cut_when_the_run_goes_on(
    answer: Answer, data: Path, tmp_path: Path
) -> None:
    rows = data.read_text().splitlines(keepends=True)
    rows[8] = json.dumps({"question": "why so " * 2000}) + "\n"
    data.write_text("".join(rows))
    with pytest.raises(InputError, match=r"reads at most 1024.*\(question 9 \('why so why so"):
        answer()
    assert (tmp_path / "answers.jsonl.part").read_bytes().count(b"\n") == 1 + 6
    lines = [json.loads(line) for line in answer(on_long_question="truncate").splitlines()]
    assert [line["index"] for line in lines if "cut_tokens" in line] == [8]
