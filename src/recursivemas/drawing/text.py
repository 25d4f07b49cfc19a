"""A pattern drawn with lines of text, role by role from top to bottom.

    stage 1  ┌▶ math                 ─┐
             ├▶ code                 ─┤
             ├▶ science              ─┤
    stage 2  └┄ summarizer (answers) ◀┘

On the right runs what is read in the same round: a line for each reader, which all that it reads flow into. On the
left, dotted, what is read one round later: a line for each sender, which branches to its readers. Where two lines
cross (┼) they do not meet.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recursivemas.patterns import Pattern

_MIRROR = str.maketrans("┐┘┤◀", "┌└├▶")


@dataclass
class _Lane:
    """A line that runs beside the roles and joins some rows; in those of `arrows` it ends in an arrow."""

    rows: list[int] = field(default_factory=list)
    arrows: list[int] = field(default_factory=list)

    def join(self, row: int, *, arrow: bool) -> None:
        self.rows.append(row)
        self.arrows += [row] * arrow

    def meets(self, other: "_Lane") -> bool:
        """Whether both pass the same row."""
        return min(self.rows) <= max(other.rows) and min(other.rows) <= max(self.rows)

    @property
    def length(self) -> int:
        return max(self.rows) - min(self.rows)


def draw(
    pattern: Pattern, *, players: Mapping[str, str] | None = None, channels: Mapping[str, str] | None = None
) -> str:
    """The picture, and below it every edge with what it carries.

    `players` says for each role what plays it, `channels` for each edge what it carries; both may be left out.
    """
    names: dict[int, str] = {}
    by_reader: dict[str, _Lane] = defaultdict(_Lane)
    by_sender: dict[str, _Lane] = defaultdict(_Lane)
    row = 0
    for role in pattern.roles:
        names[row] = _name(role, pattern, players or {})
        # Every line that begins or ends here has a row of its own, or lines that cross would seem to meet.
        readers = [edge.target for edge in pattern.graph if edge.source == role and not pattern.is_feedback(edge)]
        senders = [edge.source for edge in pattern.sources(role) if pattern.is_feedback(edge)]
        reads = any(not pattern.is_feedback(edge) for edge in pattern.sources(role))
        feeds_back = any(edge.source == role and pattern.is_feedback(edge) for edge in pattern.graph)
        for offset, reader in enumerate([role] * reads + readers):
            by_reader[reader].join(row + offset, arrow=reader == role)
        for offset, sender in enumerate([*senders, *[role] * feeds_back]):
            by_sender[sender].join(row + offset, arrow=offset < len(senders))
        row += max(1, reads + len(readers), len(senders) + feeds_back)
    stages = {}
    first_rows = dict(zip(pattern.roles, names, strict=True))
    for number, stage in enumerate(pattern.stages, start=1):
        stages[first_rows[stage[0]]] = f"stage {number}"

    width, margin = max(map(len, names.values())), max(map(len, stages.values()))
    after = _lines(list(by_reader.values()), row, flat="─", upright="│")
    before = [line[::-1].translate(_MIRROR) for line in _lines(list(by_sender.values()), row, flat="┄", upright="┆")]
    picture = [
        f"{stages.get(each, ''):{margin}}  {before[each]} {names.get(each, ''):{width}} {after[each]}".rstrip()
        for each in range(row)
    ]
    heading = f"{pattern.name}: {pattern.description}" if pattern.description else pattern.name
    return "\n".join([heading, "", *picture, *_edges(pattern, channels or {})])


def _name(role: str, pattern: Pattern, players: Mapping[str, str]) -> str:
    notes = [*(["answers"] if role == pattern.answers else []), *([players[role]] if role in players else [])]
    return f"{role} ({', '.join(notes)})" if notes else role


def _edges(pattern: Pattern, channels: Mapping[str, str]) -> list[str]:
    width = max(map(len, map(str, pattern.graph)), default=0)
    lines = []
    for edge in pattern.graph:
        when = "one round later" if pattern.is_feedback(edge) else "in the same round"
        carried = f"   {channels[str(edge)]}" if str(edge) in channels else ""
        lines.append(f"  {edge!s:{width}}   read {when:17}{carried}".rstrip())
    return ["", *lines] if lines else []


def _lines(lanes: Sequence[_Lane], num_rows: int, *, flat: str, upright: str) -> list[str]:
    """What stands on the right of every row. On the way to its lane a line crosses those that are nearer."""
    places = _places(lanes)
    grid = [[" "] * max((2 * place + 2 for place in places), default=0) for _ in range(num_rows)]
    for lane, place in zip(lanes, places, strict=True):
        for row in range(min(lane.rows), max(lane.rows) + 1):
            grid[row][2 * place + 1] = upright
    for lane, place in zip(lanes, places, strict=True):
        for row in lane.rows:
            for column in range(2 * place + 1):
                grid[row][column] = "┼" if grid[row][column] == upright else flat
            corner = "┐" if row == min(lane.rows) else "┘" if row == max(lane.rows) else "┤"
            grid[row][2 * place + 1] = corner
        for row in lane.arrows:
            grid[row][0] = "◀"
    return ["".join(line) for line in grid]


def _places(lanes: Sequence[_Lane]) -> list[int]:
    """A place for each lane where it meets no other, 0 being next to the roles; the shorter, the nearer."""
    places: dict[int, int] = {}
    for index in sorted(range(len(lanes)), key=lambda index: lanes[index].length):
        taken = {place for other, place in places.items() if lanes[index].meets(lanes[other])}
        places[index] = min(set(range(len(lanes))) - taken)
    return [places[index] for index in range(len(lanes))]
