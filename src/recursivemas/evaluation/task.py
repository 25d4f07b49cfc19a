"""Task: questions with targets and a scorer. Samples come from a world, or from a file of the user's own.

Knows nothing of systems; a task is the same whoever answers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} as text: {error}") from None
    samples: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and len(samples) == limit:
            break
        samples.append(_parse(line, f"{file}, line {number}", number, question, target, id))
    if not samples:
        raise InputError(f"{file} holds no samples; expected one JSON object a line")
    repeated = len(samples) - len({sample.id for sample in samples})
    if repeated:
        raise InputError(f"{file}: {repeated} ids come more than once in the column '{id}'; ids must be unique")
    return samples


def _parse(line: str, where: str, number: int, question: str, target: str, id: str | None) -> Sample:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for column, option in ((question, "--question-column"), (target, "--target-column"), (id, "--id-column")):
        if column is not None and column not in row:
            raise InputError(f"{where}: {unknown_name('column', column, row)}; say which one it is with {option}")
    if not isinstance(row[question], str) or not row[question].strip():
        raise InputError(f"{where}: the question in column '{question}' is empty or not text")
    if row[target] is None or isinstance(row[target], (dict, list)):
        raise InputError(f"{where}: the target in column '{target}' must be text or a number")
    others = {name: value for name, value in row.items() if name not in (question, target)}
    return Sample(
        id=str(row[id]) if id else str(number), question=row[question], target=str(row[target]), metadata=others
    )
