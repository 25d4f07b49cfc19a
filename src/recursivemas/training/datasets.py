"""Data sets: rows of text from files, or from the Hugging Face hub, and which of their columns is what.

    data: mine.jsonl                                         # one set, for every stage

    data:
      outer: {path: openai/gsm8k, name: main, split: train}  # questions and answers
      inner: {planner: plans.jsonl, "*": others.parquet}     # what roles should write; by default from `outer`
      columns: {question: problem, critic: better_plan}      # where columns have other names

A column is looked for under the name of what it holds (`question`, `answer`, or a role), then under the names that it
has in the authors' released sets. JSON Lines, JSON and CSV need nothing; Parquet, directories and the hub need the
library `datasets` (pip install recursivemas[data]), which is imported when it is first needed.

Knows rows and columns; knows nothing of prompts, tokens, patterns or splits.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from recursivemas.config import Config
from recursivemas.errors import ConfigError, InputError, unknown_name

ALL = "*"
"""Among data sets by role: the one of all others."""
RELEASED = {
    "planner": ("plan",),
    "critic": ("refined_plan",),
    "math": ("hie_math_expert", "math_expert", "expert_math"),
    "code": ("hie_code_expert", "code_expert", "expert_code"),
    "science": ("hie_science_expert", "science_expert", "expert_science"),
    "summarizer": ("hie_summarizer", "summary"),
    "expert": ("distill_expert", "refined_plan", "expert_plan"),
    "learner": ("distill_learner",),
    "reflector": ("deliberation_reflector",),
    "toolcaller": ("deliberation_toolcaller",),
}
"""What each role of the paper's patterns writes, in the authors' released sets; the first column that there is."""
RELEASED_ANSWERS = {
    "summarizer": ("answer", "hie_summarizer", "summary"),
    "learner": ("distill_learner", "answer", "learner_answer"),
    "toolcaller": ("deliberation_toolcaller", "answer"),
}
"""What the answering role is given to answer in the released trainer's outer loop, where that is not `answer`."""
_DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")
_LARGEST_FIELD = 1 << 28


class Source(Config):
    """Where the rows of one data set are. A text in its place is its path."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .parquet), a directory of such files or of the library's own, or a hub's name."""
    name: str | None = None
    """Which of its configurations, if a set of the hub has several."""
    split: str = "train"
    """The split that is read, if it has any. Files of one's own have none."""
    revision: str | None = None
    """The commit of a set of the hub; the newest by default."""
    columns: dict[str, str] = Field(default_factory=dict)
    """As in `DataSets`, for this set alone."""

    @model_validator(mode="before")
    @classmethod
    def _accept_path(cls, given: Any) -> Any:
        return {"path": str(given)} if isinstance(given, (str, Path)) else given

    @property
    def is_local(self) -> bool:
        """Whether a file or a directory is meant, and not a name of the hub."""
        return Path(self.path).suffix in _DATA_FILES or Path(self.path).exists()

    def __str__(self) -> str:
        """As it is named in messages.

        >>> str(Source(path="openai/gsm8k", name="main"))
        'openai/gsm8k (main)'
        """
        return self.path if self.name is None else f"{self.path} ({self.name})"


class DataSets(Config):
    """What a recipe is trained on (see the top of this file). A text in its place is the path of `outer`."""

    outer: Source
    """Questions with answers, for the outer loop; where no other set is named, all text."""
    inner: dict[str, Source] = Field(default_factory=dict)
    """By role (`*`: all others), what it should write, for the stages before; or one set for all roles."""
    validation: Source | None = None
    """Questions that choose the checkpoint. By default a tenth of `outer`, by a hash of the question; another tenth is
    then kept out of training altogether, for tests."""
    test: Source | None = None
    """Given only to make sure that none of its questions is in the others."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns, where they have others than `question`, `answer`, a role's, or those of the released sets."""
    score: Literal["likelihood", "exact", "numeric"] = "likelihood"
    """What chooses the checkpoint: how probable the system finds the words of the answers (the inverse of an answer's
    perplexity); or the share of answers it gets right, to the letter or as a number."""
    on_empty: Literal["refuse", "skip"] = "refuse"
    """Rows without a question, or without what a role should write: refused, or left out and counted."""
    on_long: Literal["refuse", "truncate", "skip"] = "refuse"
    """Rows that are too long: refused, cut at the end of what should be written, or left out; counted in any case.
    Prompts, with their slots, are never cut."""
    max_length: int | None = Field(default=None, ge=2)
    """Positions of a prompt with what follows it, if fewer than the context of its model."""

    @model_validator(mode="before")
    @classmethod
    def _accept_path(cls, given: Any) -> Any:
        return {"outer": str(given)} if isinstance(given, (str, Path)) else given

    @field_validator("inner", mode="before")
    @classmethod
    def _accept_one(cls, given: Any) -> Any:
        one = isinstance(given, (str, Path, Source)) or (isinstance(given, Mapping) and "path" in given)
        return {ALL: given} if one else given

    def for_role(self, role: str) -> Source:
        """The set with what a role should write."""
        return self.inner.get(role, self.inner.get(ALL, self.outer))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every set, once."""
        named = [*self.inner.values(), self.outer, self.validation, self.test]
        distinct: dict[str, Source] = {}
        for source in named:
            if source is not None:
                distinct.setdefault(source.model_dump_json(), source)
        return tuple(distinct.values())

    def check_roles(self, roles: Sequence[str]) -> None:
        """Refuse roles that a pattern does not have. Raises `ConfigError`."""
        for role in self.inner:
            if role not in (*roles, ALL):
                raise ConfigError("data.inner: " + unknown_name("role", role, [*roles, ALL]))
        known = ["question", "answer", *roles]
        for place, columns in [("data.columns", self.columns), *((str(each), each.columns) for each in self.sources)]:
            for what in columns:
                if what not in known:
                    raise ConfigError(f"{place}: " + unknown_name("content of a column", what, known))

    def check_sources(self) -> None:
        """Refuse files that are not there, and sets for which a library is missing, before anything is read.

        Raises `InputError` or `ConfigError`.
        """
        for source in self.sources:
            if Path(source.path).suffix in _DATA_FILES and not Path(source.path).exists():
                raise InputError(f"there is no file {source.path}")
            if not source.is_local or Path(source.path).is_dir() or Path(source.path).suffix == ".parquet":
                _library(source)

    def named(self, source: Source) -> dict[str, str]:
        """The columns that are named for a set."""
        return {**self.columns, **source.columns}

    def column(self, what: str, data: "DataSet", candidates: Sequence[str], advice: str | None = None) -> str:
        """The column of a set that holds something: the one that is named for it, else the first candidate there is.

        Raises `InputError` with the columns that there are.
        """
        given = self.named(data.source).get(what)
        for name in candidates if given is None else [given]:
            if name in data.columns:
                return name
        where = "" if given is None else f" (named by data.columns.{what})"
        say = advice or f"say which one holds the {what} with data.columns.{what}"
        raise InputError(f"{data.source}: {unknown_name('column', given or what, data.columns)}{where}; {say}")


@dataclass(frozen=True)
class Row:
    """One row of a data set."""

    number: int
    """Counted from 1; of a JSON Lines file the line."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """The rows of one data set."""

    source: Source
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    """Of any row."""

    def where(self, row: Row) -> str:
        """How a row is named in messages."""
        return f"{self.source}, {'line' if self.source.path.endswith('.jsonl') else 'row'} {row.number}"

    def text(self, row: Row, column: str, *, numbers: bool = False) -> str | None:
        """What stands in a column, or None if nothing does. Raises `InputError` if it is not text (nor a number)."""
        value = row.values.get(column)
        if value is None:
            return None
        if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            expected = "text or a number" if numbers else "text"
            raise InputError(
                f"{self.where(row)}: the column '{column}' is not {expected}, but {type(value).__name__}; write it as "
                "text"
            )
        return value if value.strip() else None

    def fingerprint(self) -> str:
        """A hash of all rows: the same data gives the same, on every machine."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()[:16]


@dataclass
class Counts:
    """What became of the samples of one kind (a role's turns, the questions of a split)."""

    used: int = 0
    empty: int = 0
    """Left out, because something that is needed is empty."""
    too_long: int = 0
    """Left out, because they are too long."""
    truncated: int = 0
    """Used, with the end of what should be written cut off."""
    cut_tokens: int = 0
    """Tokens that were cut off, in all."""

    def __str__(self) -> str:
        """In words.

        >>> print(Counts(used=8, empty=2, truncated=1, cut_tokens=30))
        8 used; left out: 2 with nothing in a column that is needed; cut: 1, by 30 tokens in all
        """
        left_out = [f"{self.empty} with nothing in a column that is needed"] if self.empty else []
        left_out += [f"{self.too_long} too long"] if self.too_long else []
        cut = [f"cut: {self.truncated}, by {self.cut_tokens} tokens in all"] if self.truncated else []
        return "; ".join([f"{self.used} used", *(["left out: " + ", ".join(left_out)] if left_out else []), *cut])


@dataclass(frozen=True)
class Limits:
    """What is done with samples that are too long: see `DataSets`."""

    on_long: Literal["refuse", "truncate", "skip"] = "refuse"
    max_length: int | None = None

    def room(self, context: int | None) -> int | None:
        """Positions there are for a prompt with what follows it; None if there is no end to them."""
        known = [each for each in (context, self.max_length) if each is not None]
        return min(known) if known else None


@dataclass(frozen=True)
class Reader:
    """Reads data sets, each of them once."""

    settings: DataSets
    _read: dict[str, DataSet] = field(default_factory=dict)

    def read(self, source: Source) -> DataSet:
        """The rows of a set. Raises `InputError` or `ConfigError`."""
        key = source.model_dump_json()
        if key not in self._read:
            self._read[key] = read_data(source)
        return self._read[key]

    def question_column(self, data: DataSet) -> str:
        """Which column holds the questions."""
        return self.settings.column("question", data, ("question",))

    def answer_column(self, data: DataSet, role: str) -> str:
        """Which column holds what the answering role should answer."""
        return self.settings.column("answer", data, RELEASED_ANSWERS.get(role, ("answer",)))

    def role_column(self, data: DataSet, role: str, answers: str) -> str:
        """Which column holds what a role should write; the answering one writes the answer, if it has none."""
        names = (role, *RELEASED.get(role, ()))
        has_own = role in self.settings.named(data.source) or any(name in data.columns for name in names)
        if role == answers and not has_own:
            return self.answer_column(data, role)
        advice = (
            f"it holds what the {role} should write, on which the stages before the outer loop, and its anchor, are "
            f"trained. Say which one it is with data.columns.{role}, let a teacher write it (recursivemas data build), "
            "or train the outer loop alone (--stage outer --set outer.anchor=0)"
        )
        return self.settings.column(role, data, names, advice)

    def provenance(self) -> list[dict[str, Any]]:
        """Of every set that was read: what it is, how many rows, and their hash."""
        return [
            {**each.source.model_dump(exclude_none=True), "rows": len(each.rows), "fingerprint": each.fingerprint()}
            for each in self._read.values()
        ]


def counts_as_plain(counts: Mapping[str, Counts]) -> dict[str, dict[str, int]]:
    """Counts as plain data."""
    return {name: asdict(each) for name, each in counts.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_data(source: Source) -> DataSet:
    """All rows of a data set. Raises `InputError` if it cannot be read, `ConfigError` if it takes a library to."""
    path = Path(source.path)
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix in readers and not path.is_dir():
        try:
            rows = tuple(readers[path.suffix](path))
        except FileNotFoundError:
            raise InputError(f"there is no file {path}") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"cannot read {path}: {error}") from None
    else:
        rows = tuple(Row(number, values) for number, values in enumerate(_by_library(source), start=1))
    if not rows:
        raise InputError(f"{source} holds no rows")
    columns = dict.fromkeys(str(name) for row in rows for name in row.values)
    return DataSet(source, rows, tuple(columns))


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield Row(number, _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}"))


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object with such a list under `data`, as the released trainer takes it."""
    content = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects, alone or under the key 'data'; one a line is .jsonl")
    for number, each in enumerate(rows, start=1):
        yield Row(number, _object(each, f"{path}, row {number}"))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for number, values in enumerate(csv.DictReader(stream, strict=True), start=1):
            if None in values or None in values.values():
                raise InputError(f"{path}, row {number}: it has more or fewer fields than the header has names")
            yield Row(number, values)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _library(source: Source) -> Any:
    """The library of the hub's data sets."""
    try:
        import datasets
    except ImportError:
        what = "a Parquet file" if source.path.endswith(".parquet") else "a directory, or a data set of the hub,"
        raise ConfigError(
            f"{source}: {what} is read by the package datasets: pip install recursivemas[data]; .jsonl, .json and .csv "
            "need nothing"
        ) from None
    return datasets


def _by_library(source: Source) -> Iterable[dict[str, Any]]:
    """Rows of a Parquet file, a directory, or a set of the hub. No code that comes with a set is run."""
    library = _library(source)
    library.disable_progress_bars()
    path = Path(source.path)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            found = library.load_from_disk(str(path))
        elif path.is_dir() and (path / "dataset_dict.json").exists():
            splits = library.load_from_disk(str(path))
            if source.split not in splits:
                raise InputError(f"{source}: {unknown_name('split', source.split, splits)}")
            found = splits[source.split]
        elif path.suffix == ".parquet":
            found = library.Dataset.from_parquet(str(path), keep_in_memory=True)
        else:
            found = library.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except InputError:
        raise
    except Exception as error:  # the library raises whatever the trouble leads to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = (
            "" if source.is_local else "; a file of one's own is named with its ending (.jsonl, .json, .csv, .parquet)"
        )
        raise InputError(f"cannot read the data set {source}: {reason}{advice}") from None
    return iter(found)
