"""Pattern: who reads whom. A table, with no control flow and no words in it.

    name: sequential
    stages: [[planner], [critic], [solver]]      # within a round, from left to right
    edges: ["planner->critic", "critic->solver", "solver->planner"]
    answers: solver                              # speaks in the last round

Roles of one stage stand side by side: they act at the same time, and none of them sees what another sends in this
round. A reader that stands before its source, or beside it, reads last round's message (so `solver->planner` is
feedback); any other reader reads this round's. `schedule` turns the table into the list of turns that are needed for
an answer: an agent whose message nobody reads is not run.

`find_faults` says all that is wrong with a table at once. What has no meaning (a role that is not there) is refused
when it is loaded; what has one, though hardly the one that was meant (a role that nobody reads, two of one stage that
read each other), can still be loaded, because an experiment may want it so.

Knows roles and edges; knows nothing of words, tensors or models.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from recursivemas.config import Config, Fault, Place, bundled_or_file, parse, parse_document, read_document, some_of
from recursivemas.errors import PatternError, unknown_name

BUNDLED = Path(__file__).parent / "bundled" / "patterns"


class Edge(NamedTuple):
    """A hand-off from `source` to `target`; written `source->target`."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}->{self.target}"

    @classmethod
    def parse(cls, text: str) -> "Edge":
        """Read `source->target`. Raises `PatternError` for anything else."""
        source, arrow, target = (part.strip() for part in text.partition("->"))
        if not (source and arrow and target):
            raise PatternError(f"cannot read the edge '{text}': write it as source->target")
        return cls(source, target)


@dataclass(frozen=True)
class Turn:
    """One role's turn in one round: what it must send, or whether it speaks."""

    round: int
    role: str
    speaks: bool
    sends: tuple[Edge, ...] = ()


class Pattern(Config):
    """Roles in stages, the edges between them, and who answers (see the top of this file)."""

    name: str
    stages: tuple[tuple[str, ...], ...]
    edges: tuple[str, ...] = ()
    answers: str
    description: str = Field(default="")
    mutual: bool = Field(default=False)
    """Says that roles of one stage which read each other are meant to: each gets what the other sent a round ago."""

    @classmethod
    def load(cls, source: "str | Path | dict[str, Any] | Pattern") -> "Pattern":
        """A pattern from a bundled name, a YAML file, or plain data. Raises `ConfigError` or `PatternError`."""
        if isinstance(source, Pattern):
            return source
        if isinstance(source, dict):
            return parse(cls, source, where="pattern")
        return parse_document(cls, read_document(bundled_or_file(source, BUNDLED, "pattern")), find_faults)

    @field_validator("answers", mode="before")
    @classmethod
    def _check_answers(cls, answers: Any) -> Any:
        if isinstance(answers, (list, tuple)):
            raise ValueError("one role answers, and the others send it their messages; name one")
        return answers

    @model_validator(mode="after")
    def _check(self) -> "Pattern":
        fatal = [fault.message for fault in find_faults(self.model_dump()) if fault.is_fatal]
        if fatal:
            raise PatternError(f"pattern '{self.name}': {some_of(fatal)}")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, in the order in which they act."""
        return tuple(role for stage in self.stages for role in stage)

    @property
    def graph(self) -> tuple[Edge, ...]:
        """The edges as pairs of roles."""
        return tuple(Edge.parse(edge) for edge in self.edges)

    def renamed(self, names: dict[str, str]) -> "Pattern":
        """The same graph with other names for its roles."""
        for role in names:
            if role not in self.roles:
                raise PatternError(f"pattern '{self.name}': " + unknown_name("role", role, self.roles))

        def new(role: str) -> str:
            return names.get(role, role)

        return Pattern.load(
            {
                **self.model_dump(),
                "stages": [[new(role) for role in stage] for stage in self.stages],
                "edges": [str(Edge(new(edge.source), new(edge.target))) for edge in self.graph],
                "answers": new(self.answers),
            }
        )

    def alone(self, role: str | None = None) -> "Pattern":
        """The answering role, or another one, without the others. Raises `PatternError` for an unknown role."""
        chosen = self.answers if role is None else role
        if chosen not in self.roles:
            raise PatternError(f"pattern '{self.name}': " + unknown_name("role", chosen, self.roles))
        return Pattern(name=f"{self.name} (solo)", stages=((chosen,),), answers=chosen)

    def stage_of(self, role: str) -> int:
        """Index of the stage in which a role acts."""
        return next(index for index, stage in enumerate(self.stages) if role in stage)

    def is_feedback(self, edge: Edge) -> bool:
        """Whether the reader gets last round's message."""
        return self.stage_of(edge.target) <= self.stage_of(edge.source)

    def sources(self, role: str) -> tuple[Edge, ...]:
        """The edges on which a role reads."""
        return tuple(edge for edge in self.graph if edge.target == role)

    def message_round(self, edge: Edge, reading_round: int) -> int:
        """The round in which the message was sent that `edge.target` reads in `reading_round`; 0 if there is none."""
        return reading_round - self.is_feedback(edge)

    def schedule(
        self,
        num_rounds: int,
        *,
        answer_rounds: Iterable[int] = (),
        is_open: Callable[[Edge], bool] = lambda edge: True,
        is_known: Callable[[Edge, int], bool] = lambda edge, round: False,
    ) -> list[Turn]:
        """The turns needed for the answer of the last round (and of `answer_rounds`), in the order they happen.

        `is_open` says whether an edge carries anything; `is_known` whether the message an edge carried in a round is
        at hand already (a replay), so that it need not be made.
        """
        answering = {num_rounds, *answer_rounds}
        wanted: set[tuple[int, Edge]] = set()
        pending = [(round, self.answers) for round in answering]
        seen: set[tuple[int, str]] = set()
        while pending:
            round, role = pending.pop()
            if (round, role) in seen:
                continue
            seen.add((round, role))
            for edge in self.sources(role):
                sent = self.message_round(edge, round)
                if sent > 0 and is_open(edge) and not is_known(edge, sent):
                    wanted.add((sent, edge))
                    pending.append((sent, edge.source))
        turns = []
        for round in range(1, num_rounds + 1):
            for role in self.roles:
                if role == self.answers and round in answering:
                    turns.append(Turn(round, role, speaks=True))
                sends = tuple(edge for edge in self.graph if edge.source == role and (round, edge) in wanted)
                if sends:
                    turns.append(Turn(round, role, speaks=False, sends=sends))
        return turns


@dataclass
class Table:
    """The graph in a pattern's plain data, as far as it can be read, with what was wrong on the way."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of every role its stage, and its place in it."""
    edges: dict[Edge, Place] = field(default_factory=dict)
    """Edges between known roles; of a name that is nearly right it is clear who was meant."""
    answers: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Table":
        """Read whatever has the right form."""
        table = cls()
        for stage, roles in enumerate(_items(content.get("stages"))):
            table._read_stage(stage, roles)
        if not table.places:
            table.faults.append(Fault(("stages",), "no role acts; name at least the one that answers"))
        for index, edge in enumerate(_items(content.get("edges"))):
            if isinstance(edge, str):
                table._read_edge(edge, ("edges", index))
        answers = content.get("answers")
        named = [answers] if isinstance(answers, str) else _items(answers)
        known = [table._known(role, ("answers",)) for role in named if isinstance(role, str)]
        table.answers = tuple(role for role in known if role)
        return table

    def sources(self, role: str) -> list[Edge]:
        """The edges on which a role reads."""
        return [edge for edge in self.edges if edge.target == role]

    def readers(self, role: str) -> list[str]:
        """Who reads a role, other than itself."""
        return [edge.target for edge in self.edges if edge.source == role and edge.target != role]

    def stage_of(self, role: str) -> int:
        """Index of the stage in which a role acts."""
        return self.places[role][0]

    def heard(self) -> set[str]:
        """Roles whose messages reach an answer, be it by way of others."""
        heard = set(self.answers)
        while more := {edge.source for edge in self.edges if edge.target in heard} - heard:
            heard |= more
        return heard

    def _read_stage(self, stage: int, roles: Any) -> None:
        roles = [roles] if isinstance(roles, str) else _items(roles)
        if not roles:
            self.faults.append(Fault(("stages", stage), "a stage without a role; name who acts, or take it out"))
        for index, role in enumerate(roles):
            if not isinstance(role, str):
                continue
            place = ("stages", stage, index)
            if not re.fullmatch(r"[A-Za-z_]\w*", role):
                advice = "use letters, digits and underscores, like tool_caller"
                self.faults.append(Fault(place, f"'{role}' cannot be a role; {advice}"))
            if role in self.places:
                advice = "a role acts once a round: give the second another name"
                self.faults.append(Fault(place, f"'stages' names a role twice: '{role}'; {advice}"))
            self.places.setdefault(role, (stage, index))

    def _read_edge(self, text: str, place: Place) -> None:
        try:
            given = Edge.parse(text)
        except PatternError as error:
            self.faults.append(Fault(place, str(error)))
            return
        source, target = (self._known(role, place) for role in given)
        if source is None or target is None:
            return
        edge = Edge(source, target)
        if edge == given and edge in self.edges:
            self.faults.append(Fault(place, f"'edges' names an edge twice: {edge}; take one out"))
        self.edges.setdefault(edge, place)

    def _known(self, role: str, place: Place) -> str | None:
        """The role, or if there is none of this name (which is a fault) the one that was probably meant."""
        if role in self.places:
            return role
        self.faults.append(Fault(place, unknown_name("role", role, self.places)))
        return next(iter(difflib.get_close_matches(role, self.places, n=1, cutoff=0.5)), None)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def find_faults(content: Mapping[str, Any]) -> list[Fault]:
    """All that is wrong with the graph in a pattern's plain data; what has not even the right form is passed over."""
    table = Table.read(content)
    return [*table.faults, *_unheard(table), *([] if content.get("mutual") is True else _mutual(table))]


def _unheard(table: Table) -> list[Fault]:
    """Roles that might as well not be there: nobody reads them, or nobody of whom the answering role hears."""
    heard = table.heard()
    faults = []
    for role, place in table.places.items():
        if role in table.answers or (role in heard and table.readers(role)):
            continue
        if not table.readers(role):
            itself = " but itself" if Edge(role, role) in table.edges else ""
            wrong = f"nobody{itself} reads what the role '{role}' sends, and it does not answer"
        elif table.answers:
            wrong = f"what the role '{role}' sends never reaches the role that answers, '{table.answers[0]}'"
        else:
            continue
        reader = table.answers[0] if table.answers else "READER"
        advice = f'add an edge, like "{role}->{reader}", or take the role out'
        faults.append(Fault(("stages", *place), f"{wrong}; {advice}", is_fatal=False))
    return faults


def _mutual(table: Table) -> list[Fault]:
    """Pairs of one stage that read each other."""
    faults = []
    seen: set[Edge] = set()
    for edge, place in table.edges.items():
        source, target = edge
        if Edge(target, source) in seen and table.stage_of(source) == table.stage_of(target):
            wrong = f"'{target}' and '{source}' stand in one stage and read each other, but they act at the same time"
            advice = (
                "put one of them into a stage after the other; or, if each is meant to read what the other sent in the "
                "round before, say `mutual: true`"
            )
            faults.append(Fault(place, f"{wrong}; {advice}", is_fatal=False))
        seen.add(edge)
    return faults
