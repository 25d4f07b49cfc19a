"""Samples from a file of the user's own."""

import json
from pathlib import Path

import pytest

from recursivemas.errors import InputError
from recursivemas.evaluation.task import load_samples


def write(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_samples_are_read_with_their_other_columns(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "Why?", "answer": 42, "source": "b"}, "", {"question": "How?", "answer": "so"})
    first, second = load_samples(file)
    assert (first.id, first.question, first.target, first.metadata) == ("1", "Why?", "42", {"source": "b"})
    assert (second.id, second.target) == ("3", "so")


def test_columns_can_be_named_and_samples_limited(tmp_path: Path) -> None:
    file = write(tmp_path, *({"q": f"Why {i}?", "a": i, "key": f"k{i}"} for i in range(5)))
    samples = load_samples(file, question="q", target="a", id="key", limit=3)
    assert [(sample.id, sample.target) for sample in samples] == [("k0", "0"), ("k1", "1"), ("k2", "2")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no samples"),
        (["", "  "], "holds no samples"),
        (['{"question": '], "line 1: not valid JSON"),
        (["[1]"], "line 1: expected a JSON object, found list"),
        ([{"question": "Why?", "answer": 1}, {"qestion": "Why?"}], "line 2: unknown column 'question': did you mean"),
        ([{"question": "Why?"}], "unknown column 'answer'.*--target-column"),
        ([{"question": " ", "answer": 1}], "line 1: the question in column 'question' is empty"),
        ([{"question": 5, "answer": 1}], "empty or not text"),
        ([{"question": "Why?", "answer": None}], "must be text or a number"),
        ([{"question": "Why?", "answer": [1]}], "must be text or a number"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_its_number(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_samples(write(tmp_path, *rows))


def test_ids_must_be_unique(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "answer": 1, "id": "x"}] * 3
    with pytest.raises(InputError, match="2 ids come more than once"):
        load_samples(write(tmp_path, *rows), id="id")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        load_samples(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        load_samples(tmp_path / "binary")
