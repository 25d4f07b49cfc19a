"""What the views of an audit share: how verdicts are said, and the look of tables and of SVG figures.

Knows verdicts; knows nothing of the figures behind them. Matplotlib takes long to load, so it is loaded by who draws.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from recursivemas.audit.records import EdgeDiagnosis, LinkDiagnosis, Verdict
from recursivemas.audit.verdicts import ADVICE
from recursivemas.evaluation.figures import decimal

# The colours of the page of an evaluation (bundled/report), by daylight: a figure in a file has no page around it.
INK, MUTED, LINE, PAPER = "#1b1d20", "#6a6f76", "#e3e5e8", "#ffffff"
SERIES = ("#0067a8", "#c45100", "#00805e", "#a8478a", "#8a6d00", "#5b5f66")
GREY = "#b4b9c0"
FONT_SIZE = 10.5

_STYLE: Any = {  # matplotlib's stubs want each key of a dictionary spelled out
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "links",  # the same numbers make the same file
    "text.parse_math": False,  # a role may be called as it likes
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
}


def say(verdicts: Sequence[Verdict]) -> str:
    """Every cause with its reason, in one line."""
    return "; ".join(f"{verdict.cause} – {verdict.reason}" for verdict in verdicts)


def say_advice(diagnoses: Sequence[LinkDiagnosis | EdgeDiagnosis]) -> Iterator[str]:
    """What to do about each cause that was found, one line a cause."""
    named = {verdict.cause for each in diagnoses for verdict in each.verdicts}
    for cause, advice in ADVICE.items():
        if cause in named and advice:
            yield f"{cause}: {advice}"


def tenths(value: float | None) -> str:
    """`2.3`; a dash for what is not known."""
    return "–" if value is None else f"{value:.1f}"


def new_table(first: str, *others: str) -> Table:
    """A table of one column of names and others of numbers, with little padding: the widest fits into 80 columns."""
    view = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption_justify="left")
    view.caption_style = "dim"
    view.add_column(first, no_wrap=True, vertical="bottom")
    for heading in others:
        view.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return view


def draw_figure(size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """An SVG of a figure of so many inches, painted by a function."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size)
        paint(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def add_panel(figure: Any, place: tuple[float, float, float, float], heading: str) -> Any:
    """Axes with no more ink than needed: hairlines across, numbers, and a heading at the top left.

    `place` is left, bottom, width and height, as shares of the figure.
    """
    axes = figure.add_axes(place)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    axes.yaxis.set_major_formatter(lambda value, _: decimal(value, 2))
    axes.set_title(heading, loc="left", fontsize=FONT_SIZE, color=MUTED)
    return axes
