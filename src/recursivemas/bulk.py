"""Bulk: a file of questions is answered into a file of answers, and goes on where it was stopped.

    answers.jsonl.part   what is done: a first line that says what run it belongs to, then answers as they come
    answers.jsonl        all answers, in the order of the questions; it appears when it is complete

A run that was stopped and started again gives the same file: batches are the same, and only those are answered of which
an answer is missing. Nothing is held of a question that is answered but its place in the file.

Knows systems from outside only.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import tee
from pathlib import Path
from typing import Any, Unpack

from recursivemas.answering import Result
from recursivemas.batches import check_question
from recursivemas.errors import ConfigError, InputError, OutputError
from recursivemas.evaluation.task import find_cell, find_question, read_rows
from recursivemas.journal import Journal
from recursivemas.planning import RunOptions, make_plan
from recursivemas.system import RecursiveSystem
from recursivemas.trace import COUNTS

Progress = Callable[[int, int], None]
"""Told how many questions are answered, of how many: first with those of earlier runs, then after every answer."""


@dataclass(frozen=True)
class Columns:
    """What the columns of a file of questions are called."""

    question: str = "question"
    id: str | None = None
    """Names the questions, in the answers and for sampling; by default the number of the line does."""


def answer_file(
    system: RecursiveSystem,
    questions: Path,
    answers: Path,
    *,
    columns: Columns | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[RunOptions],
) -> int:
    """Answer the questions of a JSON Lines file; returns how many there are. Options as in `RecursiveSystem.run`.

    One object a line is written: index, id, question and text, the samples if there are several, whether it finished,
    and what it cost in tokens, latent steps and positions. `overwrite` begins anew. Raises `InputError` with the line
    of a question that cannot be used, before any is answered, and `OutputError` if the answers are there already, or
    those that are there belong to another run.
    """
    columns = columns or Columns()
    _check_options(options)
    total, content = _read_through(questions, columns)
    identity = _identity(system, content, options)
    part = answers.with_name(f"{answers.name}.part")
    if overwrite:
        answers.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    if answers.exists():
        raise OutputError(f"{answers} exists already; choose another --out, or replace it with --overwrite")
    journal = Journal(part, identity, "a run")
    places = {int(record["index"]): place for place, record in journal.records()}
    if progress is not None:
        progress(len(places), total)
    texts, names = tee(_rows(questions, columns))
    chosen: RunOptions = {**options, "keys": (name for name, _ in names), "done": places, "trace": "off"}
    for result in system.stream((text for _, text in texts), **chosen):
        if isinstance(result, Result) and result.index not in places:
            places[result.index] = journal.append([_record(result)])
            if progress is not None:
                progress(len(places), total)
    _put_in_order(part, places, answers)
    return total


def _check_options(options: RunOptions) -> None:
    for name in ("keys", "done", "trace", "trace_dir"):
        if name in options:
            raise ConfigError(f"{name} cannot be given for a file of questions")
    if options.get("intervene") not in (None, "zero"):
        raise ConfigError(
            f"the answers to a file of questions cannot be had with the intervention {options['intervene']!r}, which "
            "needs all questions at once; use run, or leave it out"
        )


def _rows(file: Path, columns: Columns) -> Iterator[tuple[str, str]]:
    """The name and the text of every question. Raises `InputError`."""
    for number, row in read_rows(file):
        where = f"{file}, line {number}"
        text = find_question(row, where, columns.question)
        name = str(number if columns.id is None else find_cell(row, where, columns.id, "--id-column"))
        check_question(text, f"{where}: the question")
        check_question(name, f"{where}: the id")
        yield name, text


def _read_through(file: Path, columns: Columns) -> tuple[int, str]:
    """How many questions there are, and the hash of them all; so every line is checked before one is answered."""
    digest = hashlib.sha256()
    names: set[str] = set()
    total = 0
    for name, text in _rows(file, columns):
        digest.update(f"{name}\0{text}\0".encode())
        names.add(name)
        total += 1
    if not total:
        raise InputError(f"{file} holds no questions; expected one JSON object a line")
    if len(names) < total:
        repeated = total - len(names)
        raise InputError(f"{file}: {repeated} ids come more than once in the column '{columns.id}'; ids must be unique")
    return total, digest.hexdigest()


def _identity(system: RecursiveSystem, content: str, options: RunOptions) -> dict[str, Any]:
    """All that the answers depend on, and nothing that they do not: they are the same in batches of any size.

    A question that is too long ends a run; so whether it is cut instead may be decided when the run goes on.
    """
    plan = make_plan(system, {**options, "writer": None})  # which would be asked what it writes, here too
    digest = hashlib.sha256()
    system.hash_into(digest)
    return {
        "system": system.settings.name,
        "parts": digest.hexdigest(),
        "questions": content,
        "dtype": {role: str(agent.model.dtype).removeprefix("torch.") for role, agent in system.agents.items()},
        "channel": {edge: channel.name for edge, channel in plan.channels.items()},
        "num_rounds": plan.num_rounds,
        "num_latent_steps": plan.num_latent_steps,
        "variant": plan.variant,
        "instructions": plan.instructions,
        "sampling": asdict(plan.sampling),
        "num_samples": options.get("num_samples", 1),
        "intervene": options.get("intervene"),
        "tools": [] if plan.tools is None else [*plan.tools.tools, asdict(plan.tools.limits), plan.tools_after],
    }


def _record(result: Result) -> dict[str, Any]:
    """A line of the answers; nothing in it depends on the machine or on the batch."""
    return {
        "index": result.index,
        "id": result.trace.settings["key"],
        "question": result.trace.question,
        "text": result.text,
        **({"samples": result.samples} if result.samples else {}),
        "finished": result.finished,
        **({"cut_tokens": result.cut_tokens} if result.cut_tokens else {}),
        **{count: result.usage.total(count) for count in COUNTS},
    }


def _put_in_order(part: Path, places: dict[int, int], answers: Path) -> None:
    """Make the file of answers out of the lines that begin in these places of another, which is removed."""
    draft = answers.with_name(f"{answers.name}.draft")
    try:
        with part.open("rb") as source, draft.open("wb") as target:
            for index in sorted(places):
                source.seek(places[index])
                target.write(source.readline())
        os.replace(draft, answers)
        part.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {answers}: {error.strerror}; the answers are kept in {part}") from None
