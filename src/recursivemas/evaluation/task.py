"""Task: questions with targets and a scorer. Samples come from a world, or from a file of the user's own.

Knows nothing of systems; a task is the same whoever answers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from recursivemas.errors import InputError, unknown_name
from recursivemas.evaluation.scorers import Scorer
from recursivemas.tools import Toolbox

Measure = Callable[[str, Mapping[str, Any]], float]
"""Takes the answer's text and the metadata of the sample."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its target."""

    id: str
    question: str
    target: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """What a scorer or a report may want to know besides (a world's exact posterior, for example)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Samples, how their answers are scored, and what the answering agent is told about the form of an answer."""

    name: str
    samples: Sequence[Sample]
    scorer: Scorer
    instructions: str = ""
    optimum: Mapping[int, float] | None = None
    """By rounds, the best score that any system can reach; None where it is not known."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """What is measured in each answer beside its score, by name; reports give the means."""
    group_by: str | None = None
    """A key of the samples' metadata by whose values accuracy is reported, too."""
    toolbox: Toolbox | None = None
    """What the answering role can call while it writes."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_by is not None:
            for sample in self.samples:
                if self.group_by not in sample.metadata:
                    raise InputError(
                        f"cannot group by '{self.group_by}': sample {sample.id} has "
                        f"{', '.join(sample.metadata) or 'no metadata'}"
                    )


def load_samples(
    file: Path, *, question: str = "question", target: str = "answer", id: str | None = None, limit: int | None = None
) -> list[Sample]:
    """Samples from a JSON Lines file, one object a line; `question`, `target` and `id` name its columns.

    Raises `InputError` with the line number for whatever cannot be used.
    """
    samples: list[Sample] = []
    for number, row in islice(read_rows(file), limit):
        samples.append(_sample(row, f"{file}, line {number}", number, question, target, id))
    if not samples:
        raise InputError(f"{file} holds no samples; expected one JSON object a line")
    repeated = len(samples) - len({sample.id for sample in samples})
    if repeated:
        raise InputError(f"{file}: {repeated} ids come more than once in the column '{id}'; ids must be unique")
    return samples


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, one by one, with their line numbers. Raises `InputError`."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, f"{file}, line {number}")
    except FileNotFoundError:
        raise InputError(f"there is no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} as text: {error}") from None


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def find_question(row: Mapping[str, Any], where: str, column: str) -> str:
    """The question of a row. Raises `InputError` if there is none."""
    found = find_cell(row, where, column, "--question-column")
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{where}: the question in column '{column}' is empty or not text")
    return found


def find_cell(row: Mapping[str, Any], where: str, column: str, option: str) -> Any:
    """What a row has in a column. Raises `InputError`, with the option that names the column, if it has none."""
    if column not in row:
        raise InputError(f"{where}: {unknown_name('column', column, row)}; say which one it is with {option}")
    return row[column]


def _sample(row: dict[str, Any], where: str, number: int, question: str, target: str, id: str | None) -> Sample:
    asked = find_question(row, where, question)
    answer = find_cell(row, where, target, "--target-column")
    name = str(number) if id is None else str(find_cell(row, where, id, "--id-column"))
    if answer is None or isinstance(answer, (dict, list)):
        raise InputError(f"{where}: the target in column '{target}' must be text or a number")
    others = {column: value for column, value in row.items() if column not in (question, target)}
    return Sample(id=name, question=asked, target=str(answer), metadata=others)
