"""Journal: records on disk, one a line, behind a first line that says what work they belong to.

Records are written as they come. Work that was stopped goes on where it was: a last line that was cut by a kill is
dropped, and a journal of other work is refused, and left as it is.

Knows nothing of what is recorded.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recursivemas.errors import OutputError


class Journal:
    """A file of records that belong to one piece of work."""

    def __init__(self, file: Path, identity: Mapping[str, Any], kind: str) -> None:
        """Begin the file, or go on with it. `identity` is all that the records depend on, `kind` what it is for a user.

        Raises `OutputError` if the file cannot be written, is no journal, or belongs to other work.
        """
        self.file = file
        self._kind = kind
        self._first = json.dumps(identity).encode() + b"\n"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or self._is_only_begun():
                file.write_bytes(self._first)
            self._check()
            self._drop_broken_line()
        except OSError as error:
            raise OutputError(f"cannot write to {file}: {error.strerror}") from None

    def _is_only_begun(self) -> bool:
        """Whether it was stopped while the first line was written: there is nothing to take over."""
        with self.file.open("rb") as stream:
            found = stream.read(len(self._first))
        return len(found) < len(self._first) and self._first.startswith(found)

    def _check(self) -> None:
        with self.file.open("rb") as stream:
            first = self._parse(stream.readline())
        wanted = json.loads(self._first)
        if first != wanted:
            names = [name for name in {**wanted, **first} if first.get(name) != wanted.get(name)]
            raise OutputError(
                f"{self.file} belongs to {self._kind} with other settings ({', '.join(names)}); choose another place "
                "with --out, or remove it"
            )

    def _drop_broken_line(self) -> None:
        with self.file.open("rb+") as stream:
            end = stream.seek(0, os.SEEK_END)
            kept = end
            while kept:
                start = max(kept - (1 << 16), 0)
                stream.seek(start)
                newline = stream.read(kept - start).rfind(b"\n")
                if newline >= 0:
                    kept = start + newline + 1
                    break
                kept = start
            if kept < end:
                stream.truncate(kept)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every record, in the order in which they were written, with the place in the file where its line begins.

        Raises `OutputError` for a line that is no record.
        """
        with self.file.open("rb") as stream:
            place = len(stream.readline())
            for line in stream:
                yield place, self._parse(line)
                place += len(line)

    def append(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Write some records; returns the place in the file where the first begins."""
        lines = [json.dumps(record) + "\n" for record in records]
        try:
            with self.file.open("ab") as stream:
                place = stream.tell()
                stream.write("".join(lines).encode())
        except OSError as error:
            raise OutputError(f"cannot write to {self.file}: {error.strerror}; what was written is kept") from None
        return place

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise OutputError(f"{self.file} is not the record of {self._kind}; choose another place with --out")
        return record
