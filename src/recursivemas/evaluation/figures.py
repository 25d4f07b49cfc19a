"""Figures: the numbers of an evaluation as people read them, arm by arm, and drawings of them for a page.

    numbers     `decimal`, `with_error`, `percent`, `count`, `say_rounds`
    arms        `rows_of`: each arm with its means per question; `column`: what they cost, lined up
    drawings    `draw_accuracy`, `draw_cost` and their `legend`: SVG markup that can stand inside a page

A page gives the colours, as variables of its style sheet. Knows arms and answers; knows nothing of logs and tasks, of
the page around a drawing, or of how an answer came about. Matplotlib takes long to load, so it is loaded by who draws.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from recursivemas.evaluation.metrics import Mean, mean
from recursivemas.evaluation.runner import COUNTS, Answer, Arm

PROTOCOLS = ("latent", "text", "both")
"""Arms in which agents really talk to each other; all others are controls."""


# --- numbers as people read them --------------------------------------------------------------------------------------


def decimal(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """`.665`, `−.031`, `1.000`; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{abs(value):.{digits}f}".removeprefix("0")
    if not text.strip(".0"):
        return text
    return ("−" if value < 0 else "+" if signed else "") + text


def with_error(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """`.665 ± .011`; without the error where one question leaves none."""
    known = stderr is not None and not math.isnan(stderr)
    return decimal(value, signed=signed) + (f" ± {decimal(stderr)}" if known else "")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}%".replace("-", "−")


def count(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def say_rounds(number: int) -> str:
    """`one round`, `two rounds`."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return f"{words[number] if number < len(words) else number} round{'' if number == 1 else 's'}"


# --- rows: an arm with its means --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An arm with its means over the questions it has answered so far (`n` may be 0 while an evaluation runs)."""

    arm: Arm
    n: int
    accuracy: Mean
    costs: Mapping[str, float]
    """Per question: what the meter counts, and milliseconds."""
    cut: float
    unscorable: float
    measures: Mapping[str, float] = field(default_factory=dict)
    """Means of what the task measures beside the score."""


def _row(arm: Arm, answers: Sequence[Answer]) -> Row:
    if not answers:
        return Row(arm, 0, Mean(math.nan, math.nan, 0), {}, 0.0, 0.0)
    n = len(answers)
    costs = {name: sum(getattr(answer, name) for answer in answers) / n for name in COUNTS}
    costs["milliseconds"] = 1000 * sum(answer.seconds for answer in answers) / n
    cut = sum(not answer.finished for answer in answers) / n
    unscorable = sum(answer.read is None for answer in answers) / n
    measures = {name: sum(answer.measures[name] for answer in answers) / n for name in answers[0].measures}
    return Row(arm, n, mean([answer.score for answer in answers]), costs, cut, unscorable, measures)


def rows_of(answers: Mapping[Arm, Sequence[Answer]]) -> list[Row]:
    """Rows of one arm and wording next to each other, by rounds; otherwise in the order of the evaluation."""
    labels = list(dict.fromkeys(arm.label for arm in answers))
    ordered = sorted(answers, key=lambda arm: (labels.index(arm.label), arm.rounds))
    return [_row(arm, answers[arm]) for arm in ordered]


def _by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {label: list(group) for label, group in itertools.groupby(rows, key=lambda row: row.arm.label)}


def column(rows: Sequence[Row], name: str) -> list[str]:
    """The costs of all arms with as many decimals as they need, the same for all so that they line up."""
    values = [row.costs[name] for row in rows if row.n]
    if name == "milliseconds":
        least = min((value for value in values if value > 0), default=1.0)
        decimals = min(max(1 - math.floor(math.log10(least)), 0), 3)
    else:
        decimals = int(max(values, default=0) < 100 and any(abs(value - round(value)) >= 0.05 for value in values))
    return [f"{row.costs[name]:,.{decimals}f}" if row.n else "–" for row in rows]


def measured(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By name, what the task measures beside the score, one cell for each row; nothing for most tasks."""
    names = dict.fromkeys(name for row in rows for name in row.measures)
    return {name: [decimal(row.measures.get(name)) for row in rows] for name in names}


# --- drawings ---------------------------------------------------------------------------------------------------------

_MOST_LEVEL = 6
"""Controls whose names stand level, side by side."""

# Matplotlib draws in these stand-in colours; in the page they become variables of the style sheet, which knows about
# light, dark and paper.
_STAND_INS = {"ink": "#fa0000", "muted": "#fa0001", "line": "#fa0002", "paper": "#fa0003"}
_SERIES = tuple(f"#fa001{number}" for number in range(6))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH, _HEIGHT = 9.0, 4.0
_FONT_SIZE = 10.5

_STYLE: Any = {  # matplotlib's stubs want each key of a dictionary spelled out
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be searched
    "text.parse_math": False,  # a wording may be called "$x$"
    "font.size": _FONT_SIZE,
    "text.color": _STAND_INS["ink"],
    "axes.edgecolor": _STAND_INS["line"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.labelcolor": _STAND_INS["muted"],
    "grid.color": _STAND_INS["line"],
    "grid.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every protocol; latent always has the first."""
    labels = [label for label in _by_label(rows) if label.split("/")[0] in PROTOCOLS]
    labels.sort(key=lambda label: label != "latent")
    return {
        label: (_SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)])
        for index, label in enumerate(labels, start="latent" not in labels)
    }


def draw_accuracy(rows: Sequence[Row], optimum: Mapping[int, float]) -> Markup:
    """Accuracy over rounds, with the optimum; controls in a panel of their own, since rounds mean little to them."""
    from matplotlib import rc_context

    controls = [row for row in rows if row.arm.name not in PROTOCOLS]
    styles = _styles(rows)
    series = {label: group for label, group in _by_label(rows).items() if label in styles}
    share = 0.082 * min(len(controls), _MOST_LEVEL)
    with rc_context(_STYLE):
        figure = _new_figure()
        main = _panel(figure, 0.05, 0.78 - share, "accuracy") if series or optimum else None
        if controls:
            side = _panel(figure, 0.99 - share, share, "controls", sharey=main)
            _plot_controls(side, controls)
        if main is not None:
            _plot_rounds(main, series, styles, optimum)
        return _inline(figure, "accuracy over rounds")


def _plot_rounds(
    axes: Any,
    series: Mapping[str, Sequence[Row]],
    styles: Mapping[str, tuple[str, str]],
    optimum: Mapping[int, float],
) -> None:
    ends = []
    for index, (label, group) in enumerate(series.items()):
        colour, marker = styles[label]
        shift = 0.04 * (index - (len(series) - 1) / 2)  # error bars stand side by side
        axes.errorbar(
            [row.arm.rounds + shift for row in group],
            [row.accuracy.value for row in group],
            yerr=[0.0 if math.isnan(row.accuracy.stderr) else row.accuracy.stderr for row in group],
            color=colour, marker=marker, markersize=6, linewidth=2.2 if label == "latent" else 1.5, elinewidth=1.2,
        )  # fmt: skip
        ends.append((group[-1].accuracy.value, label, colour))
    if optimum:
        colour = _STAND_INS["muted"]
        marker = "_" if len(optimum) == 1 else ""
        axes.plot(list(optimum), list(optimum.values()), "--", color=colour, linewidth=1.3, marker=marker)
        ends.append((list(optimum.values())[-1], "optimum", colour))
    rounds = sorted({row.arm.rounds for group in series.values() for row in group} | set(optimum))
    axes.set_xticks(rounds, [str(number) for number in rounds])
    axes.set_xlim(rounds[0] - 0.25, rounds[-1] + 0.15)
    axes.set_xlabel("rounds", color=_STAND_INS["muted"])
    _keep_to_scores(axes)
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name each line at its right end; names that would overlap are moved apart."""
    low, high = axes.get_ylim()
    heights = _spread([height for height, _, _ in ends], gap=0.06 * (high - low))
    for height, (_, label, colour) in zip(heights, ends, strict=True):
        shown = label if len(label) <= 18 else label[:17] + "…"
        place = (1.02, (height - low) / (high - low))
        axes.annotate(shown, place, xycoords="axes fraction", color=colour, va="center", annotation_clip=False)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """The same heights in the same order, but at least `gap` apart; what is crowded moves apart around its middle."""
    clusters: list[list[int]] = []
    centres: list[float] = []
    for index in sorted(range(len(heights)), key=lambda each: heights[each]):
        clusters.append([index])
        centres.append(heights[index])
        while len(clusters) > 1 and centres[-1] - centres[-2] < gap * (len(clusters[-1]) + len(clusters[-2])) / 2:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
            centres[-2:] = [sum(heights[each] for each in clusters[-1]) / len(clusters[-1])]
    placed = {
        index: centre + gap * (place - (len(cluster) - 1) / 2)
        for cluster, centre in zip(clusters, centres, strict=True)
        for place, index in enumerate(cluster)
    }
    return [placed[index] for index in range(len(heights))]


def _plot_controls(axes: Any, controls: Sequence[Row]) -> None:
    for place, row in enumerate(controls):
        error = 0.0 if math.isnan(row.accuracy.stderr) else row.accuracy.stderr
        axes.errorbar(
            [place], [row.accuracy.value], yerr=[error],
            color=_STAND_INS["muted"], marker="_", markersize=22, markeredgewidth=2.2, elinewidth=1.2,
        )  # fmt: skip
    axes.set_xlim(-0.6, len(controls) - 0.4)
    if len(controls) <= _MOST_LEVEL:
        axes.set_xticks(range(len(controls)), [row.arm.name.replace("-", "-\n") for row in controls])
        return
    # Too many to stand side by side: their names are written upwards, where their marks leave room.
    axes.set_xticks([])
    middle = sum(axes.get_ylim()) / 2
    for place, row in enumerate(controls):
        height, side = (0.98, "top") if row.accuracy.value < middle else (0.02, "bottom")
        axes.annotate(
            row.arm.name, (place, height), xycoords=axes.get_xaxis_transform(),
            rotation=90, ha="center", va=side, color=_STAND_INS["muted"],
        )  # fmt: skip


def draw_cost(rows: Sequence[Row]) -> Markup:
    """Accuracy against what it costs: up and to the left is better. Each point carries its number of rounds."""
    from matplotlib import rc_context

    styles = _styles(rows)
    shown = {label: group for label, group in _by_label(rows).items() if label in styles or label == "solo"}
    if not shown:
        return Markup("")  # nothing but controls was asked
    with rc_context(_STYLE):
        figure = _new_figure()
        left = _panel(figure, 0.05, 0.43, "accuracy")
        right = _panel(figure, 0.56, 0.43, "", sharey=left)
        for axes, name in ((left, "generated_tokens"), (right, "milliseconds")):
            for label, group in shown.items():
                costs = [row.costs[name] for row in group]
                _plot_cost(axes, costs, group, styles.get(label, (_STAND_INS["muted"], "o"))[0])
            axes.set_xlabel(f"{name.replace('_', ' ')} per question", color=_STAND_INS["muted"])
            axes.set_xlim(0, 1.08 * axes.dataLim.x1 or 1)
        left.margins(y=0.12)
        _keep_to_scores(left)
        return _inline(figure, "accuracy against generated tokens and milliseconds")


def _plot_cost(axes: Any, costs: Sequence[float], group: Sequence[Row], colour: str) -> None:
    scores = [row.accuracy.value for row in group]
    axes.plot(costs, scores, color=colour, linewidth=1.5, marker="o", markersize=12.5, clip_on=False)
    for cost, score, row in zip(costs, scores, group, strict=True):
        number = "" if row.arm.name == "solo" else str(row.arm.rounds)
        axes.annotate(
            number, (cost, score), ha="center", va="center_baseline", fontsize=8.5, color=_STAND_INS["paper"],
            annotation_clip=False,
        )  # fmt: skip


def _new_figure() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, _HEIGHT))


def _panel(figure: Any, left: float, width: float, heading: str, sharey: Any = None) -> Any:
    """Axes with no more ink than needed: hairlines across, numbers, and a heading at the top left."""
    axes = figure.add_axes((left, 0.14, width, 0.76), sharey=sharey)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelleft=sharey is None)
    axes.yaxis.set_major_formatter(lambda value, _: decimal(value, 2))
    axes.set_title(heading, loc="left", fontsize=_FONT_SIZE, color=_STAND_INS["muted"])
    return axes


def _keep_to_scores(axes: Any) -> None:
    """Room for a difference of .2 at least, and none below 0 and above 1, where no score can be."""
    low, high = axes.get_ylim()
    missing = max(0.2 - (high - low), 0.0)
    axes.set_ylim(max(low - missing / 2, -0.02), min(high + missing / 2, 1.02))


def _inline(figure: Any, name: str) -> Markup:
    """A figure as SVG that can stand inside a page: no prolog, no ids or styles that another figure would share."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", maxsplit=1)
    box = re.search(r'viewBox="[^"]*"', head)
    rest = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", rest).replace("xlink:href", "href")
    rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
    for variable, colour in {**_STAND_INS, **{f"series-{i}": each for i, each in enumerate(_SERIES)}}.items():
        rest = rest.replace(colour, f"var(--{variable})")
    return Markup(f"<svg {box.group() if box else ''} role='img' aria-label='{name}'>{rest}")


def legend(rows: Sequence[Row]) -> dict[str, str]:
    """The style-sheet variable of every line in the figure of costs."""
    colours = {label: f"series-{_SERIES.index(colour)}" for label, (colour, _) in _styles(rows).items()}
    return colours | ({"solo": "muted"} if any(row.arm.name == "solo" for row in rows) else {})
