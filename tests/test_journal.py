"""Journal: records that survive a kill, and files that are left alone because they are something else."""

from pathlib import Path

import pytest

from recursivemas.errors import OutputError
from recursivemas.journal import Journal

IDENTITY = {"system": "tiny", "seed": 3, "stop": ["a"]}
RECORDS = [{"n": number, "text": "é\n" * number} for number in range(5)]


def write(file: Path) -> Journal:
    journal = Journal(file, IDENTITY, "a run")
    for record in RECORDS:
        journal.append([record])
    return journal


def test_records_are_found_again_in_their_places(tmp_path: Path) -> None:
    file = tmp_path / "below" / "journal.jsonl"
    places = [write(file).append([{"n": 5}, {"n": 6}])]
    found = list(Journal(file, IDENTITY, "a run").records())
    assert [record for _, record in found] == [*RECORDS, {"n": 5}, {"n": 6}]
    assert found[5][0] == places[0]
    lines = file.read_bytes()
    assert all(lines[place - 1 : place + 6] == b'\n{"n": ' for place, _ in found)


def test_a_journal_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    write(file)
    whole = file.read_bytes()
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        journal = Journal(file, IDENTITY, "a run")
        kept = [record for _, record in journal.records()]
        assert kept == RECORDS[: len(kept)]
        # What is complete is kept, and nothing else.
        assert len(kept) == max(whole[:length].count(b"\n") - 1, 0)
        journal.append(RECORDS[len(kept) :])
        assert file.read_bytes() == whole


def test_a_long_broken_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    write(file)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"text": "' + b"x" * 200_000)
    Journal(file, IDENTITY, "a run")
    assert file.read_bytes() == whole


def test_other_settings_are_refused_by_name_and_the_file_is_untouched(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    write(file)
    before = file.read_bytes()
    with pytest.raises(OutputError, match=r"belongs to a run with other settings \(seed, more\); choose another"):
        Journal(file, {**IDENTITY, "seed": 4, "more": 1}, "a run")
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"years of work", b"years\nof\nwork\n", b"\xff\xfe\n", b"[1]\n", b"{}"])
def test_a_file_that_is_no_journal_is_refused_and_untouched(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "thesis.txt"
    file.write_bytes(content)
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        Journal(file, IDENTITY, "a run")
    assert file.read_bytes() == content


def test_a_line_that_is_no_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    journal = write(file)
    file.write_bytes(file.read_bytes() + b"[1]\n")
    with pytest.raises(OutputError, match="is not the record of a run"):
        list(journal.records())


def test_a_place_that_cannot_be_written_to_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Journal(tmp_path / "file" / "journal.jsonl", IDENTITY, "a run")
