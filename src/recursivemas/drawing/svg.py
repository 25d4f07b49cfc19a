"""A pattern drawn as SVG: stages in columns, from left to right.

What is read in the same round swings from one column to the next, or passes above those between; what is read one
round later goes back below all boxes, dashed. `lay_out` says where everything is, `draw` writes it down; the colours
can be read on a light and on a dark page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from recursivemas.patterns import Edge, Pattern

LETTER, SMALL_LETTER = 8.6, 6.8
"""Widths of a letter in the two sizes of type: more than usual fonts take on the average, so that text fits."""
MARGIN, HEAD, FOOT = 20.0, 74.0, 44.0
BOX_HEIGHT, BOX_GAP = 44.0, 22.0
PORT, TRACK, LANE = 18.0, 12.0, 15.0
"""Distances between lines: where they meet a box, where they run up or down, and where they run along."""
SWING, ARROW, RADIUS = 46.0, 14.0, 7.0

READ_NOW, READ_LATER = "read in the same round", "read one round later"
LEGEND = 2 * MARGIN + 120.0 + SMALL_LETTER * len(READ_NOW + READ_LATER)
"""Width of the line at the foot that says which line is which."""

Point = tuple[float, float]


@dataclass
class Box:
    """A role, with what plays it and whether it answers; edges come in on the left and go out on the right."""

    role: str
    stage: int
    notes: tuple[str, ...]
    incoming: list[Edge]
    outgoing: list[Edge]
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0

    @property
    def height(self) -> float:
        """High enough for its lines of text and its ports."""
        ports = max(len(self.incoming), len(self.outgoing))
        return max(BOX_HEIGHT, PORT * (ports + 1), 30.0 + 14.0 * len(self.notes))

    def entry(self, edge: Edge) -> Point:
        """Where an edge comes in."""
        return self.x, self.y + self.height * (self.incoming.index(edge) + 1) / (len(self.incoming) + 1)

    def exit(self, edge: Edge) -> Point:
        """Where an edge goes out."""
        return self.x + self.width, self.y + self.height * (self.outgoing.index(edge) + 1) / (len(self.outgoing) + 1)


@dataclass(frozen=True)
class Route:
    """The line of an edge: its corners, to be rounded, or for a swing its beginning, end of the swing, and end."""

    edge: Edge
    points: tuple[Point, ...]
    way: str
    """across, over or under; what goes under is feedback."""
    label: str = ""


@dataclass
class Layout:
    """Where everything is."""

    boxes: dict[str, Box]
    routes: list[Route] = field(default_factory=list)
    stages: list[Point] = field(default_factory=list)
    """Where the names of the stages stand."""
    width: float = 0.0
    height: float = 0.0


@dataclass(frozen=True)
class _Ways:
    """The edges of a pattern by the way they take."""

    across: tuple[Edge, ...]
    """Into the next column."""
    over: tuple[Edge, ...]
    """Above the columns between; shorter ways first, which run nearer to the boxes."""
    under: tuple[Edge, ...]
    """Back, or to a role of the same column."""

    @classmethod
    def of(cls, pattern: Pattern) -> "_Ways":
        hops = {edge: pattern.stage_of(edge.target) - pattern.stage_of(edge.source) for edge in pattern.graph}
        # Of ways that are equally long that of the last port is the nearest: so ways of one sender do not cross.
        order = list(hops)
        by_length = sorted(hops, key=lambda edge: (abs(hops[edge]), -order.index(edge)))
        return cls(
            tuple(edge for edge in pattern.graph if hops[edge] == 1),
            tuple(edge for edge in by_length if hops[edge] > 1),
            tuple(edge for edge in by_length if hops[edge] < 1),
        )


def lay_out(
    pattern: Pattern, *, players: Mapping[str, str] | None = None, channels: Mapping[str, str] | None = None
) -> Layout:
    """Place the boxes, and lead every edge past those that it does not join (see the top of this file)."""
    ways, told = _Ways.of(pattern), channels or {}
    boxes = {role: _box(role, pattern, ways, players or {}) for role in pattern.roles}
    columns = [[boxes[role] for role in stage] for stage in pattern.stages]
    top = HEAD + LANE * len(ways.over)
    bottom = top + max(_height(column) for column in columns)
    for column in columns:
        y = (top + bottom - _height(column)) / 2
        for box in column:
            box.y = y
            y += box.height + BOX_GAP
    room = ARROW + max((SMALL_LETTER * len(name) for name in told.values()), default=0.0)
    tracks, right = _place_columns(columns, ways, boxes, room)

    routes = []
    for edge in ways.across:
        start, end = boxes[edge.source].exit(edge), boxes[edge.target].entry(edge)
        routes.append(Route(edge, (start, (end[0] - room, end[1]), end), "across", told.get(str(edge), "")))
    for way, edges, level, step in (
        ("over", ways.over, top - BOX_GAP, -LANE),
        ("under", ways.under, bottom + BOX_GAP, LANE),
    ):
        for place, edge in enumerate(edges):
            start, end = boxes[edge.source].exit(edge), boxes[edge.target].entry(edge)
            out, back, along = tracks["out", edge], tracks["in", edge], level + step * place
            corners = (start, (out, start[1]), (out, along), (back, along), (back, end[1]), end)
            routes.append(Route(edge, corners, way, told.get(str(edge), "")))
    stages = [(column[0].x + column[0].width / 2, HEAD - 24.0) for column in columns]
    width = max(right + MARGIN, 2 * MARGIN + LETTER * len(pattern.name), LEGEND)
    return Layout(boxes, routes, stages, width, bottom + BOX_GAP + LANE * len(ways.under) + FOOT)


def _box(role: str, pattern: Pattern, ways: _Ways, players: Mapping[str, str]) -> Box:
    """What passes above meets a box on top, what passes below at its foot, the outermost way first."""
    in_order = [*ways.over, *ways.across, *ways.under[::-1]]
    notes = (*([players[role]] if role in players else []), *(["answers"] if role == pattern.answers else []))
    width = max([84.0, LETTER * len(role) + 28, *(SMALL_LETTER * len(note) + 20 for note in notes)])
    incoming = [edge for edge in in_order if edge.target == role]
    outgoing = [edge for edge in in_order if edge.source == role]
    return Box(role, pattern.stage_of(role), notes, incoming, outgoing, width=width)


def _height(column: Sequence[Box]) -> float:
    return sum(box.height for box in column) + BOX_GAP * (len(column) - 1)


def _place_columns(
    columns: Sequence[Sequence[Box]], ways: _Ways, boxes: Mapping[str, Box], room: float
) -> tuple[dict[tuple[str, Edge], float], float]:
    """From left to right: the tracks of what leaves a column, room to swing, the tracks of what comes into the next.

    Returns where each edge runs up or down, out of one box and into the other, and where all this ends.
    """
    tracks: dict[tuple[str, Edge], float] = {}
    x = MARGIN

    def turning(edges: Sequence[Edge], stage: int, end: str, sign: int) -> list[Edge]:
        """Those that meet a column, by the height of their ports: whose way is the longer turns further out."""
        ports = {}
        for edge in edges:
            box = boxes[edge.target if end == "in" else edge.source]
            if box.stage == stage:
                ports[edge] = sign * (box.entry(edge) if end == "in" else box.exit(edge))[1]
        return sorted(ports, key=lambda edge: ports[edge])

    for stage, column in enumerate(columns):
        for edge in (*turning(ways.over, stage, "in", -1), *turning(ways.under, stage, "in", 1)):
            tracks["in", edge] = x
            x += TRACK
        x += room
        width = max(box.width for box in column)
        for box in column:
            box.x, box.width = x, width
        x += width
        for edge in (*turning(ways.over, stage, "out", 1), *turning(ways.under, stage, "out", -1)):
            x += TRACK
            tracks["out", edge] = x
        x += SWING if stage < len(columns) - 1 else 0.0
    return tracks, x


STYLE = """
text { font-family: system-ui, sans-serif; font-size: 14px; fill: #767676 }
.small { font-size: 11px }
.box { fill: #8881; stroke: #888; stroke-width: 1.2 }
.answers { stroke: #2a7f9e; stroke-width: 2.4 }
.edge { fill: none; stroke: #767676; stroke-width: 1.4; marker-end: url(#arrow) }
.feedback { stroke: #b3672b; stroke-dasharray: 5 4; marker-end: url(#back) }
"""


def draw(
    pattern: Pattern, *, players: Mapping[str, str] | None = None, channels: Mapping[str, str] | None = None
) -> str:
    """The picture as the text of an SVG file.

    `players` says for each role what plays it, `channels` for each edge what it carries; both may be left out.
    """
    layout = lay_out(pattern, players=players, channels=channels)
    size = (
        f'width="{layout.width:.0f}" height="{layout.height:.0f}" viewBox="0 0 {layout.width:.0f} {layout.height:.0f}"'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(pattern.name)}</title>",
        f"<desc>{escape(pattern.description)}</desc>",
        f"<style>{STYLE}</style>",
        f"<defs>{_arrow('arrow', '#767676')}{_arrow('back', '#b3672b')}</defs>",
        _text(MARGIN, 28.0, pattern.name),
        *(_text(x, y, f"stage {n}", "small", "middle") for n, (x, y) in enumerate(layout.stages, start=1)),
        *(_draw_route(route) for route in layout.routes),
        *(_draw_box(box, is_answering=box.role == pattern.answers) for box in layout.boxes.values()),
        *_legend(layout),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrow(name: str, colour: str) -> str:
    shape = f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/>'
    return f'<marker id="{name}" markerWidth="8" markerHeight="8" refX="7.5" refY="4" orient="auto">{shape}</marker>'


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def _draw_box(box: Box, *, is_answering: bool) -> str:
    kind = "box answers" if is_answering else "box"
    place = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    centre = box.x + box.width / 2
    first = box.y + box.height / 2 + 5 - 7 * len(box.notes)
    notes = (_text(centre, first + 15 + 14 * line, note, "small", "middle") for line, note in enumerate(box.notes))
    return "\n".join([f'<rect class="{kind}" {place} rx="8"/>', _text(centre, first, box.role, "", "middle"), *notes])


def _draw_route(route: Route) -> str:
    is_feedback = route.way == "under"
    hint = [str(route.edge), *([route.label] if route.label else []), READ_LATER if is_feedback else READ_NOW]
    path = _swing(route.points) if route.way == "across" else _bends(route.points)
    kind = "edge feedback" if is_feedback else "edge"
    line = f'<path class="{kind}" d="{path}"><title>{escape(", ".join(hint))}</title></path>'
    if not route.label:
        return line
    x, y = route.points[-1]
    return f"{line}\n{_text(x - ARROW + 2, y - 4, route.label, 'small', 'end')}"


def _swing(points: Sequence[Point]) -> str:
    (x0, y0), (x1, y1), (x2, y2) = points
    middle = (x0 + x1) / 2
    return f"M{x0:.1f} {y0:.1f} C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}"


def _bends(points: Sequence[Point]) -> str:
    """From point to point, with round corners."""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        (x0, y0), (x1, y1) = (_towards(corner, other) for other in (before, after))
        path += f" L{x0:.1f} {y0:.1f} Q{corner[0]:.1f} {corner[1]:.1f} {x1:.1f} {y1:.1f}"
    return path + f" L{points[-1][0]:.1f} {points[-1][1]:.1f}"


def _towards(corner: Point, other: Point) -> Point:
    """A little way from a corner towards another point."""
    distance = abs(other[0] - corner[0]) + abs(other[1] - corner[1])  # one of the two is zero
    share = min(RADIUS / distance, 0.5) if distance else 0.0
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])


def _legend(layout: Layout) -> list[str]:
    """What the two kinds of line say, at the foot."""
    x, y = MARGIN, layout.height - 16.0
    parts = []
    for kind, words in (("edge", READ_NOW), ("edge feedback", READ_LATER)):
        if any((route.way == "under") == (kind != "edge") for route in layout.routes):
            parts.append(f'<path class="{kind}" d="M{x:.1f} {y - 4:.1f} h34"/>')
            parts.append(_text(x + 42, y, words, "small"))
            x += 60 + SMALL_LETTER * len(words)
    return parts
