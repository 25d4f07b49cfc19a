"""What a benchmark found: sections of rows, and goals with what was found for them.

Written as plain data (JSON) and as Markdown. Knows nothing of what is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recursivemas.bench.timing import Measured

Value = str | int | float | bool | Measured
Row = dict[str, Value]


@dataclass(frozen=True)
class Goal:
    """A bound, and what was found. Of measured values the median counts."""

    name: str
    found: float | Measured
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        value = self.found.median if isinstance(self.found, Measured) else self.found
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"

    def to_row(self) -> Row:
        """As a row of a table."""
        return {"goal": self.name, "bound": self.bound, "found": self.found, "kept": "yes" if self.holds else "NO"}


@dataclass(frozen=True)
class Section:
    """One table. Its columns are the keys of its rows."""

    name: str
    title: str
    rows: Sequence[Row]
    goals: Sequence[Goal] = field(default_factory=tuple)
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in order."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    @property
    def _counts(self) -> set[int]:
        """Numbers of repeats."""
        return {len(value.values) for row in self.rows for value in row.values() if isinstance(value, Measured)}

    def cells(self) -> list[list[str]]:
        """The rows in words; with numbers of repeats only where there are several."""
        say_count = len(self._counts) > 1
        return [[as_words(row.get(column, "–"), say_count=say_count) for column in self.columns] for row in self.rows]

    @property
    def caption(self) -> str:
        """What stands below the table: how the figures were taken, and the note."""
        several = "" if len(self._counts) > 1 else f" of {max(self._counts, default=0)} repeats"
        told = f"Medians{several}, in brackets their quartiles." if self._counts else ""
        return f"{told} {self.note}".strip()

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "rows": [{column: _plain(value) for column, value in row.items()} for row in self.rows],
            "goals": [
                {"goal": goal.name, "bound": goal.bound, "found": _plain(goal.found), "holds": goal.holds}
                for goal in self.goals
            ],
        }

    def to_markdown(self) -> str:
        """As a table, with its note below."""
        lines = [self.columns, ["---"] * len(self.columns), *self.cells()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.caption}" if self.caption else table


def merged(sections: Sequence[Section]) -> Section:
    """Sections of one kind, of several agents, as one."""
    rows = [row for section in sections for row in section.rows]
    return replace(sections[0], rows=rows, goals=[goal for section in sections for goal in section.goals])


def goals_section(sections: Sequence[Section]) -> Section:
    """The goals of all sections, as a section."""
    return Section("goals", "Goals", [goal.to_row() for section in sections for goal in section.goals])


def as_words(value: Value, *, say_count: bool = True) -> str:
    """A value as it stands in a table: of measured values the median, the quartiles and the number of repeats."""
    if isinstance(value, Measured):
        unit = f" {value.unit}" if value.unit else ""
        low, high = value.quartiles
        count = f", n = {len(value.values)}" if say_count else ""
        return f"{_short(value.median)}{unit} ({_short(low)}–{_short(high)}{count})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _short(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _short(value: float) -> str:
    """Three significant figures."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _plain(value: Value) -> Any:
    return value.to_plain() if isinstance(value, Measured) else value
