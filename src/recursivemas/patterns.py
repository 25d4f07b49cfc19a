"""Pattern: who reads whom. A table, with no control flow and no words in it.

    name: sequential
    stages: [[planner], [critic], [solver]]      # within a round, from left to right
    edges: ["planner->critic", "critic->solver", "solver->planner"]
    answers: solver                              # speaks in the last round

A reader that stands before its source, or beside it, reads last round's message (so `solver->planner` is feedback);
any other reader reads this round's. `schedule` turns the table into the list of turns that are needed for an answer:
an agent whose message nobody reads is not run.

Knows roles and edges; knows nothing of words, tensors or models.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from recursivemas.config import Config, parse, read_yaml
from recursivemas.errors import ConfigError, PatternError, unknown_name

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

    @classmethod
    def load(cls, source: "str | Path | dict[str, Any] | Pattern") -> "Pattern":
        """A pattern from a bundled name, a YAML file, or plain data. Raises `ConfigError` or `PatternError`."""
        if isinstance(source, Pattern):
            return source
        if isinstance(source, dict):
            return parse(cls, source, where="pattern")
        path = Path(source) if Path(source).suffix in (".yaml", ".yml") else BUNDLED / f"{source}.yaml"
        if path.parent == BUNDLED and not path.is_file():
            raise ConfigError(unknown_name("pattern", str(source), [each.stem for each in BUNDLED.glob("*.yaml")]))
        return parse(cls, read_yaml(path), where=str(path))

    @model_validator(mode="after")
    def _check(self) -> "Pattern":
        for role in self.roles:
            if not re.fullmatch(r"[A-Za-z_]\w*", role):
                raise PatternError(
                    f"pattern '{self.name}': '{role}' cannot be a role; use letters, digits and underscores, like "
                    "tool_caller"
                )
        if len(set(self.roles)) != len(self.roles):
            raise PatternError(f"pattern '{self.name}' names a role twice in its stages: {', '.join(self.roles)}")
        for role in [self.answers, *(role for edge in self.graph for role in edge)]:
            if role not in self.roles:
                raise PatternError(f"pattern '{self.name}': " + unknown_name("role", role, self.roles))
        if len(set(self.graph)) != len(self.graph):
            raise PatternError(f"pattern '{self.name}' names an edge twice: {', '.join(self.edges)}")
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

    def alone(self) -> "Pattern":
        """The answering role without the others."""
        return Pattern(name=f"{self.name} (solo)", stages=((self.answers,),), answers=self.answers)

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
