"""What a benchmark found: sections of rows, and goals with what was found for them.

Written as plain data (JSON) and as Markdown. Knows nothing of what is measured.
"""

from collections.abc import Mapping, Sequence
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
        if not self._counts or max(self._counts) == 1:
            return f"{'n = 1. ' if self._counts else ''}{self.note}".strip()
        several = "" if len(self._counts) > 1 else f" of {max(self._counts)} repeats"
        return f"Medians{several}; ± is half the distance between the quartiles. {self.note}".strip()

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "rows": [{column: _plain(value) for column, value in row.items()} for row in self.rows],
            "goals": [
                {
                    "name": goal.name,
                    "found": _plain(goal.found),
                    "at_most": goal.at_most,
                    "at_least": goal.at_least,
                    "holds": goal.holds,
                }
                for goal in self.goals
            ],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Section":
        """A section as it was before it was written as plain data."""
        rows = [{column: _from_plain(value) for column, value in row.items()} for row in plain["rows"]]
        goals = [
            Goal(each["name"], _from_plain(each["found"]), each["at_most"], each["at_least"]) for each in plain["goals"]
        ]
        return cls(plain["name"], plain["title"], rows, goals, plain["note"])

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
    """A value as it stands in a table: of measured values the median and its spread, and the number of repeats.

    The spread is half the distance between the quartiles, in per cent of the median.
    """
    if isinstance(value, Measured):
        unit = f" {value.unit}" if value.unit else ""
        low, high = value.quartiles
        spread = f" ±{50 * (high - low) / abs(value.median):.0f}%" if len(value.values) > 1 and value.median else ""
        count = f" (n = {len(value.values)})" if say_count else ""
        return f"{_short(value.median)}{unit}{spread}{count}"
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


def _from_plain(value: Any) -> Any:
    return Measured(tuple(value["values"]), value["unit"]) if isinstance(value, Mapping) else value
