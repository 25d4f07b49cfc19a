"""FolderIndex: the text files of a folder, cut into passages, to be searched by their words (BM25).

The index is a file of SQLite, whose full-text search (FTS5) ranks by BM25 and comes with Python. It is built once, kept
in the user's cache, and brought up to date when files have changed: only those are read again. Hidden files are left
out, and so are files that are no text, are very large, cannot be read, or lie outside the folder behind a link.

Knows files and words; knows nothing of tools or models.
"""

import hashlib
import html
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from recursivemas.errors import InputError, OutputError

_KINDS = "txt md rst org tex html htm xml json jsonl csv tsv yaml yml toml ini log py"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
"""Endings of files that are read; a file without any is read, too."""
MAX_FILE_SIZE = 20 * 1024 * 1024
PASSAGE_CHARS = 600

_VERSION = 1
_PASSAGES_OF_FILE = 1 << 16
_SCHEMA = """
CREATE TABLE documents (id INTEGER PRIMARY KEY, path TEXT UNIQUE, changed INTEGER, size INTEGER);
CREATE VIRTUAL TABLE passages USING fts5(path, text, tokenize = 'porter unicode61 remove_diacritics 2');
"""


class Passage(NamedTuple):
    """A piece of a file that was found."""

    path: str
    text: str
    score: float
    """The higher, the better it fits."""


@dataclass(frozen=True)
class Update:
    """What has been found in a folder since it was last looked at."""

    num_documents: int
    num_read: int
    num_removed: int
    skipped: dict[str, int]
    """Files that were left out, by reason."""


class FolderIndex:
    """An index of a folder. Safe to use from several threads, and from several processes."""

    def __init__(self, folder: str | Path, *, file: str | Path | None = None, refresh_seconds: float = 5.0) -> None:
        """Build the index, or bring up to date the one that is there.

        `file` is where it is kept, by default in the user's cache; where that cannot be written to it is kept in
        memory. A search looks for changes if the last look was `refresh_seconds` ago. Raises `InputError` if the folder
        is missing, cannot be read, or holds no text; `OutputError` if `file` cannot be written.
        """
        self.folder = Path(folder).expanduser().absolute()
        self.refresh_seconds = refresh_seconds
        self._lock = threading.Lock()
        self._check_folder()
        self.file = Path(file) if file is not None else _default_file(self.folder)
        self._database = self._open(must_be_kept=file is not None)
        self.last_update = self.update()
        if not self.last_update.num_documents:
            why = (
                ", ".join(f"{count} {reason}" for reason, count in self.last_update.skipped.items()) or "no file at all"
            )
            raise InputError(
                f"the folder {self.folder} holds no text to search ({why}); text is what ends in "
                f"{', '.join(sorted(SUFFIXES))}"
            )

    def _check_folder(self) -> None:
        try:
            with os.scandir(self.folder):
                pass
        except OSError as error:
            raise InputError(f"the folder to search, {self.folder}, cannot be read: {error.strerror}") from None

    def _open(self, *, must_be_kept: bool) -> sqlite3.Connection:
        for _ in range(2):
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                return _connect(str(self.file))
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError) and must_be_kept:
                    raise OutputError(f"the index cannot be kept in {self.file}: {error}") from None
                # Another version's, or damaged: it is only a copy of what is in the folder.
                self.file.unlink(missing_ok=True)
            except OSError as error:
                if must_be_kept:
                    raise OutputError(f"the index cannot be kept in {self.file}: {error.strerror}") from None
                break
        return _connect(":memory:")

    def update(self) -> Update:
        """Read the files that are new or have changed, and forget those that are gone."""
        with self._lock:
            return self._update()

    def _update(self) -> Update:
        self._check_folder()
        database, skipped = self._database, Counter[str]()
        present = dict(self._files(skipped))
        num_read = 0
        with database:
            database.execute("BEGIN IMMEDIATE")
            rows = database.execute("SELECT path, id, changed, size FROM documents")
            known = {path: (number, changed, size) for path, number, changed, size in rows}
            gone = [known[path][0] for path in known.keys() - present.keys()]
            for number in gone:
                self._forget(number)
            for path, stamp in present.items():
                if path in known and known[path][1:] == stamp:
                    continue
                text, reason = _read_text(self.folder / path)
                if path in known:
                    self._forget(known[path][0])
                if text is None:
                    skipped[reason] += 1
                    continue
                self._add(path, stamp, text)
                num_read += 1
            [num_documents] = database.execute("SELECT count(*) FROM documents").fetchone()
        self._looked = time.monotonic()
        return Update(num_documents, num_read, len(gone), dict(skipped))

    def _files(self, skipped: Counter[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Paths below the folder that may hold text, each with when it was changed and how long it is."""

        def unreadable(error: OSError) -> None:
            skipped["unreadable"] += 1

        root = os.path.realpath(self.folder)
        for place, folders, names in os.walk(self.folder, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = os.path.join(place, name)
                if name.startswith(".") or Path(name).suffix.lower() not in {*SUFFIXES, ""}:
                    skipped["hidden or of another kind"] += 1
                    continue
                try:
                    found = os.stat(path)
                    outside = os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep)
                except OSError:
                    skipped["unreadable"] += 1
                    continue
                if outside or not os.path.isfile(path):
                    skipped["links to elsewhere, or no files"] += 1
                elif found.st_size > MAX_FILE_SIZE:
                    skipped["too large"] += 1
                else:
                    yield (
                        os.fsencode(os.path.relpath(path, self.folder)).decode("utf-8", "replace"),
                        (
                            found.st_mtime_ns,
                            found.st_size,
                        ),
                    )

    def _add(self, path: str, stamp: tuple[int, int], text: str) -> None:
        added = self._database.execute("INSERT INTO documents (path, changed, size) VALUES (?, ?, ?)", (path, *stamp))
        first = (added.lastrowid or 0) * _PASSAGES_OF_FILE
        numbered = enumerate(islice(_passages(text), _PASSAGES_OF_FILE))
        passages = ((first + number, path, passage) for number, passage in numbered)
        self._database.executemany("INSERT INTO passages (rowid, path, text) VALUES (?, ?, ?)", passages)

    def _forget(self, number: int) -> None:
        first = number * _PASSAGES_OF_FILE
        self._database.execute(
            "DELETE FROM passages WHERE rowid >= ? AND rowid < ?", (first, first + _PASSAGES_OF_FILE)
        )
        self._database.execute("DELETE FROM documents WHERE id = ?", (number,))

    def search(self, query: str, most: int = 4) -> list[Passage]:
        """The passages that fit a query best, at most so many. A word need not be there for the others to count."""
        words = dict.fromkeys(re.findall(r"\w+", query.replace("_", " ").casefold()))
        with self._lock:
            if time.monotonic() - self._looked >= self.refresh_seconds:
                self._update()
            if not words:
                return []
            rows = self._database.execute(
                "SELECT path, text, bm25(passages) FROM passages WHERE passages MATCH ? "
                "ORDER BY bm25(passages), rowid LIMIT ?",
                (" OR ".join(f'"{word}"' for word in list(words)[:64]), most),
            ).fetchall()
        return [Passage(path, text, -score) for path, text, score in rows]

    def close(self) -> None:
        """Close the file of the index."""
        with self._lock:
            self._database.close()


def _connect(place: str) -> sqlite3.Connection:
    database = sqlite3.connect(place, timeout=60.0, isolation_level=None, check_same_thread=False)
    try:
        if place != ":memory:":
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
        [version] = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"format {version}")
        if version == 0:
            database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        database.execute("SELECT count(*) FROM documents")
        database.execute("SELECT rowid FROM passages LIMIT 1").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    return database


def _default_file(folder: Path) -> Path:
    """In the user's cache, a file for each folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    name = hashlib.blake2b(os.fsencode(folder), digest_size=12).hexdigest()
    return cache / "recursivemas" / "search" / f"{name}.sqlite"


def _read_text(path: Path) -> tuple[str | None, str]:
    """A file's text; or None, and why."""
    try:
        with closing(open(path, "rb")) as file:
            content = file.read(MAX_FILE_SIZE + 1)
    except OSError:
        return None, "unreadable"
    if b"\0" in content[:8192]:
        return None, "no text"
    text = content.decode("utf-8", "replace")
    if path.suffix.lower() in (".html", ".htm", ".xml"):
        text = re.sub(r"(?is)<(script|style)\b.*?</\1\s*>|<!--.*?-->", " ", text)
        text = html.unescape(re.sub(r"<[^<>]*>", " ", text))
    return text, ""


def _passages(text: str) -> Iterator[str]:
    """Pieces of a text, cut where paragraphs, lines or words end; blanks are drawn together."""
    held = ""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if held and len(held) + 1 + len(words) > PASSAGE_CHARS:
            yield held
            held = ""
        held = f"{held} {words}".strip() if words else held
        while len(held) > PASSAGE_CHARS:
            cut = held.rfind(" ", PASSAGE_CHARS // 2, PASSAGE_CHARS)
            cut = PASSAGE_CHARS if cut < 0 else cut
            yield held[:cut]
            held = held[cut:].strip()
    if held:
        yield held
