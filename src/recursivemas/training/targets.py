"""What roles should write, written by a teacher for a set of questions and answers: `recursivemas data build`.

    source: questions.jsonl              # question and answer
    output: train.jsonl                  # the same rows, with a column for each role
    pattern: sequential
    teacher: {model: big-model, url: "https://host/v1", prices: {prompt: 0.5, completion: 1.5}}

Every role is asked in the words of the prompt set, in the order in which the roles act, with what the roles before it
have written in its slots: as in the first round of a text system. Every reply goes to a file of its own, beside the
output (train.replies.jsonl), as soon as it is there, under a hash of what was asked: whatever happens, nothing is
asked, and paid, twice. The output is put together from it, with the rows that are complete.

Knows questions, prompts and replies; knows nothing of how a teacher writes.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pydantic import Field

from recursivemas.config import Config
from recursivemas.errors import ConfigError, InputError, OutputError, unknown_name
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.training.datasets import DataSet, DataSets, Reader, Row, Source
from recursivemas.training.loop import write_atomically
from recursivemas.training.teacher import Conversation, Failure, Request, Teacher, TeacherSettings, Written

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Told the role, replies there are, replies in all, and the cost so far."""

_ANSWER = (
    "\n\nFor you alone: the right answer is given below. Write as one who has yet to find it, and do not give it "
    "away.\n"
)


class BuildSettings(Config):
    """The content of a file for `recursivemas data build` (YAML)."""

    source: Source
    """Questions and answers: a file, a directory, or a data set of the hub."""
    output: Path
    """The JSON Lines file that is written."""
    teacher: TeacherSettings
    pattern: str = "sequential"
    """Whose roles are written for: a bundled pattern, or a YAML file."""
    prompts: str | None = None
    """In which words; by default the bundled prompt set of the pattern's name."""
    variant: str | None = None
    roles: tuple[str, ...] = ()
    """By default those that do not answer, and for which the source has no column yet."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of the source that have other names: see data sets."""
    sees_answer: bool = False
    """Whether the teacher is told the answer, and not to give it away. It may do so nevertheless."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many rows."""
    budget: float | None = Field(default=None, gt=0)
    """No request is begun when so much has been spent, in all runs, in the currency of the prices."""


@dataclass
class Spent:
    """Tokens of replies, and what they cost."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Replies whose writer did not say how many tokens they took: their cost is not known."""
    cost: float = 0.0

    def add(self, reply: Written, settings: TeacherSettings) -> None:
        """Count a reply."""
        self.replies += 1
        self.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None
        prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        prices = settings.prices
        self.cost += (prompt * prices.prompt + completion * prices.completion) / 1e6


@dataclass
class Report:
    """What a build did."""

    rows: int
    complete: int = 0
    """Rows with a text for every role: those in the output."""
    by_role: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each role: replies asked for now, known from before, failed (left for later), cut (longer than
    max_new_tokens), and empty."""
    now: Spent = field(default_factory=Spent)
    in_all: Spent = field(default_factory=Spent)
    """In this run and all before."""
    stopped: str | None = None
    """Why it ended before its end."""
    failures: list[str] = field(default_factory=list)
    """The first reasons of those that failed."""

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Replies:
    """All replies there are, in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Written] = {}
        self._stream: TextIO | None = None

    @contextmanager
    def opened(self) -> Iterator["Replies"]:
        """Read what there is, and keep the file for this process alone. Raises `OutputError`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", encoding="utf-8") as self._stream:
                try:
                    fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(f"another process is writing {self.path}; wait for it, or end it") from None
                self._read()
                yield self
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _read(self) -> None:
        assert self._stream is not None
        self._stream.seek(0)
        content = self._stream.read()
        lines = content.split("\n")
        # A process that was killed while it wrote leaves a last line without an end: what it holds is lost.
        if lines[-1]:
            self._stream.write("\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line) if line.strip() else None
                if record is not None:
                    told = {name: record[name] for name in ("text", "finished", "prompt_tokens", "completion_tokens")}
                    self._known[record["key"]] = Written(**told)
            except (ValueError, KeyError, TypeError):
                if not _is_torn(line):
                    raise InputError(f"{self.path}, line {number} is not a reply; was this file changed?") from None

    def get(self, request: Request) -> Written | None:
        """The reply to a request, if there is one."""
        return self._known.get(request.key)

    def add(self, request: Request, role: str, reply: Written) -> None:
        """Keep a reply, on disk at once."""
        assert self._stream is not None
        self._known[request.key] = reply
        self._stream.write(json.dumps({"key": request.key, "role": role, **asdict(reply)}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def spent(self, settings: TeacherSettings) -> Spent:
        """What all of them took."""
        spent = Spent()
        for reply in self._known.values():
            spent.add(reply, settings)
        return spent


def _is_torn(line: str) -> bool:
    """Whether a line was begun as a reply, and never ended."""
    return line.startswith('{"key": "') and not line.endswith("}")


@dataclass
class Build:
    """Rows on their way from questions to what every role should write."""

    settings: BuildSettings
    data: DataSet
    rows: tuple[Row, ...]
    pattern: Pattern
    prompts: PromptSet
    roles: tuple[str, ...]
    columns: dict[str, str]
    """Of the source: `question`, `answer`, and the roles whose text it has."""
    texts: list[dict[str, str]] = field(default_factory=list)
    """Of every row what roles should write, as far as it is known."""

    @classmethod
    def of(cls, settings: BuildSettings) -> "Build":
        """Read the source and see what there is to write. Raises `InputError`, `ConfigError` or `PatternError`."""
        pattern = Pattern.load(settings.pattern)
        prompts = PromptSet.load(settings.prompts or pattern.name)
        prompts.variant(settings.variant)
        for role in settings.roles:
            if role not in pattern.roles:
                raise ConfigError("roles: " + unknown_name("role", role, pattern.roles))
        known = DataSets(outer=settings.source, columns=settings.columns)
        known.check_roles(pattern.roles)
        known.check_sources()
        reader = Reader(known)
        data = reader.read(settings.source)
        columns = {"question": reader.question_column(data), "answer": reader.answer_column(data, pattern.answers)}
        for role in pattern.roles:
            try:
                columns[role] = reader.role_column(data, role, pattern.answers)
            except InputError:  # then it is to be written
                continue
        others = tuple(role for role in pattern.roles if role != pattern.answers and role not in columns)
        roles = tuple(role for role in pattern.roles if role in settings.roles) or others
        build = cls(settings, data, data.rows[: settings.limit], pattern, prompts, roles, columns)
        build._check()
        return build

    def _check(self) -> None:
        """Raise `ConfigError` or `InputError` if there is nothing to write, or something that it takes is missing."""
        source = self.settings.source
        if not self.roles:
            raise ConfigError(
                f"{source} has a column for every role already; name those that are to be written (roles)"
            )
        for role in self.roles:
            if role in self.data.columns:
                raise ConfigError(f"{source} has a column '{role}' already; leave that role out of `roles`")
            for sender in self._heard(role):
                if sender not in (*self.roles, *self.columns):
                    raise ConfigError(f"the {role} reads the {sender}, of whom nothing is known; add it to `roles`")
        for row in self.rows:
            for what in ("question", "answer"):
                if self.data.text(row, self.columns[what], numbers=what == "answer") is None:
                    raise InputError(f"{self.data.where(row)}: the column '{self.columns[what]}' is empty; mend it")

    def _heard(self, role: str) -> list[str]:
        """Whose text stands in the prompt of a role, in the first round."""
        return [edge.source for edge in self.pattern.sources(role) if self.pattern.message_round(edge, 1) > 0]

    def start(self) -> None:
        """Take what the source has."""
        self.texts = []
        for row in self.rows:
            known = {role: self.columns[role] for role in self.pattern.roles if role in self.columns}
            found = {role: self.data.text(row, column, numbers=True) for role, column in known.items()}
            self.texts.append({role: text for role, text in found.items() if text and role not in self.roles})

    def requests(self, role: str) -> dict[int, Request]:
        """What is asked for a role, by the place of the row; rows in which something is missing are left out."""
        heard = self._heard(role)
        return {
            place: Request(self.conversation(role, row, self.texts[place]), self.settings.teacher)
            for place, row in enumerate(self.rows)
            if all(sender in self.texts[place] for sender in heard)
        }

    def conversation(self, role: str, row: Row, messages: Mapping[str, str]) -> Conversation:
        """What a teacher is asked in the place of a role."""
        chat: list[dict[str, str]] = []

        def render(given: list[dict[str, str]]) -> str:
            chat[:] = given
            return given[-1]["content"]

        question = self.data.text(row, self.columns["question"]) or ""
        segments = self.prompts.segments(role, question, render_chat=render, variant=self.settings.variant)
        heard = {sender: messages[sender] for sender in self._heard(role)}
        words = "".join(each if isinstance(each, str) else heard.get(each.role, "") for each in segments)
        if self.settings.sees_answer:
            words += _ANSWER + (self.data.text(row, self.columns["answer"], numbers=True) or "")
        return (*chat[:-1], {"role": "user", "content": words})

    def lines(self) -> list[str]:
        """The rows that are complete, as they are written."""
        return [
            json.dumps({**row.values, **{role: texts[role] for role in self.roles}}, ensure_ascii=False)
            for row, texts in zip(self.rows, self.texts, strict=True)
            if all(role in texts for role in self.roles)
        ]


def replies_file(output: Path) -> Path:
    """Where the replies are that an output is made of."""
    return output.with_name(f"{output.stem}.replies.jsonl")


def build_targets(build: Build, teacher: Callable[[], Teacher], progress: Progress | None = None) -> Report:
    """Let a teacher write what is missing, and write the output.

    `teacher` is called if there is something to be written. Raises `OutputError`, or what a teacher raises; what was
    written till then is kept.
    """
    settings, output = build.settings, build.settings.output
    replies = Replies(replies_file(output))
    if output.exists() and not replies.path.exists():
        raise OutputError(f"{output} exists, and was not made by this command; give another output")
    report = Report(rows=len(build.rows))
    build.start()
    with replies.opened():
        report.in_all = replies.spent(settings.teacher)
        writer = _Writer(build, replies, report, teacher, progress)
        try:
            for role in build.roles:
                writer.write(role)
        finally:
            lines = build.lines()
            report.complete = len(lines)
            try:
                write_atomically(output, "".join(line + "\n" for line in lines).encode())
            except OSError as error:
                raise OutputError(f"cannot write {output}: {error.strerror or error}") from None
    return report


@dataclass
class _Writer:
    """Writes one role after the other."""

    build: Build
    replies: Replies
    report: Report
    teacher: Callable[[], Teacher]
    progress: Progress | None
    _loaded: list[Teacher] = field(default_factory=list)
    _failed_in_a_row: int = 0

    def write(self, role: str) -> None:
        """Ask for all that is not known of a role, and take what there is then."""
        requests = self.build.requests(role)
        missing = {each.key: each for each in requests.values() if self.replies.get(each) is None}
        counts = {"asked": 0, "from_before": len(requests) - len(missing), "failed": 0, "cut": 0, "empty": 0}
        self.report.by_role[role] = counts
        try:
            if missing and self._may_go_on():
                self._ask(role, list(missing.values()), counts)
        finally:
            for place, request in requests.items():
                reply = self.replies.get(request)
                if reply is None:
                    continue
                counts["cut"] += not reply.finished
                counts["empty"] += reply.finished and not reply.text
                if reply.finished and reply.text:
                    self.build.texts[place][role] = reply.text

    def _ask(self, role: str, missing: Sequence[Request], counts: dict[str, int]) -> None:
        if not self._loaded:
            self._loaded.append(self.teacher())
        total = len(missing) + counts["from_before"]

        def record(request: Request, reply: Written | Failure) -> bool:
            if isinstance(reply, Failure):
                counts["failed"] += 1
                self._failed_in_a_row += 1
                if len(self.report.failures) < 3:
                    self.report.failures.append(f"{role}: {reply.reason}")
                return self._may_go_on()
            self.replies.add(request, role, reply)
            counts["asked"] += 1
            self._failed_in_a_row = 0
            self.report.now.add(reply, self.build.settings.teacher)
            self.report.in_all.add(reply, self.build.settings.teacher)
            if self.progress is not None:
                done = counts["asked"] + counts["from_before"]
                self.progress(role, done, total, {"cost": self.report.in_all.cost})
            return self._may_go_on()

        self._loaded[0].write(missing, record)

    def _may_go_on(self) -> bool:
        """Whether anything more may be asked; else the report says why not."""
        settings = self.build.settings
        if self.report.stopped is not None:
            return False
        if settings.budget is not None and self.report.in_all.cost >= settings.budget:
            self.report.stopped = f"the budget of {settings.budget:g} is spent ({self.report.in_all.cost:.4g})"
        if self._failed_in_a_row >= max(2 * settings.teacher.concurrency, 4):
            self.report.stopped = f"{self._failed_in_a_row} requests in a row have failed"
        return self.report.stopped is None
