"""Reports: what an evaluation found, as data, in the terminal and as a page; and one case told step by step.

    report.json        `write_json`: the numbers of `EvalLog.to_dict`, for programs
    report.html        `write_html`: one page that needs nothing from outside, for people
    terminal           `table` (also while the evaluation runs), `comparison_table`, `story_text`
    a story            `tell`: the system on one question, over latents, in text, and the answering agent alone

Every sentence of the page that holds a number is made from the numbers, whichever way they came out. The page's words
and looks are in bundled/report/report.html.j2. Knows logs, results and traces; knows nothing of worlds, of training,
or of how an answer came about. Matplotlib takes long to load and only the page needs it, so it is loaded there.
"""

import io
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recursivemas.checkpoint import library_version
from recursivemas.errors import OutputError
from recursivemas.evaluation.metrics import Mean, mean
from recursivemas.evaluation.runner import COUNTS, Answer, Arm, EvalLog
from recursivemas.evaluation.scorers import Score, Scorer, exact, posterior
from recursivemas.evaluation.task import Sample, Task
from recursivemas.system import RecursiveSystem, Result
from recursivemas.trace import TracedMessage

TEMPLATES = Path(__file__).parents[1] / "bundled" / "report"

PROTOCOLS = ("latent", "text", "both")
"""Arms in which agents really talk to each other; all others are controls."""

ACCURACY = {
    "posterior": (
        "the mean exact probability, given everything in the case, of the answer that was chosen: "
        "the same expectation as the share of right answers, with less noise"
    ),
    "exact": "the share of answers that equal the target",
    "numeric": "the share of answers whose last number equals the target",
}

ARM_NOTES = {
    "latent": "the agents hand each other latents",
    "text": "the same agents, prompts and rounds, handing each other text",
    "both": "each message is text, followed by latents",
    "solo": "the answering agent alone, with a prompt of its own",
    "none": "the answering agent with empty slots where messages would be",
    "zero": "messages of zeros",
    "shuffled": "each reader gets the messages of another question; their cost is not counted",
    "random-link": "the links are drawn anew, as loud as the trained ones",
}

NUM_PAGE_LATENTS, NUM_TERMINAL_LATENTS = 12, 4
"""Of a longer message the page folds the rest away, and the terminal leaves it out."""


# --- numbers as people read them --------------------------------------------------------------------------------------


def _decimal(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """`.665`, `−.031`, `1.000`; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{abs(value):.{digits}f}".removeprefix("0")
    if not text.strip(".0"):
        return text
    return ("−" if value < 0 else "+" if signed else "") + text


def _with_error(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """`.665 ± .011`; without the error where one question leaves none."""
    known = stderr is not None and not math.isnan(stderr)
    return _decimal(value, signed=signed) + (f" ± {_decimal(stderr)}" if known else "")


def _p_value(p_value: float | None) -> str:
    return "< .001" if p_value is not None and p_value < 0.001 else _decimal(p_value)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}%".replace("-", "−")


def _count(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _column(rows: Sequence["_Row"], name: str) -> list[str]:
    """The costs of all arms with as many decimals as they need, the same for all so that they line up."""
    values = [row.costs[name] for row in rows if row.n]
    if name == "milliseconds":
        least = min((value for value in values if value > 0), default=1.0)
        decimals = min(max(1 - math.floor(math.log10(least)), 0), 3)
    else:
        decimals = int(max(values, default=0) < 100 and any(abs(value - round(value)) >= 0.05 for value in values))
    return [f"{row.costs[name]:,.{decimals}f}" if row.n else "–" for row in rows]


def _number_word(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[number] if number < len(words) else str(number)


def _rounds(number: int) -> str:
    return f"{_number_word(number)} round{'' if number == 1 else 's'}"


# --- rows: an arm with its means --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """An arm with its means over the questions it has answered so far (`n` may be 0 while an evaluation runs)."""

    arm: Arm
    n: int
    accuracy: Mean
    costs: Mapping[str, float]
    """Per question: what the meter counts, and milliseconds."""
    cut: float
    unscorable: float


def _row(arm: Arm, answers: Sequence[Answer]) -> _Row:
    if not answers:
        return _Row(arm, 0, Mean(math.nan, math.nan, 0), {}, 0.0, 0.0)
    n = len(answers)
    costs = {name: sum(getattr(answer, name) for answer in answers) / n for name in COUNTS}
    costs["milliseconds"] = 1000 * sum(answer.seconds for answer in answers) / n
    cut = sum(not answer.finished for answer in answers) / n
    unscorable = sum(answer.read is None for answer in answers) / n
    return _Row(arm, n, mean([answer.score for answer in answers]), costs, cut, unscorable)


def _rows(answers: Mapping[Arm, Sequence[Answer]]) -> list[_Row]:
    """Rows of one arm and wording next to each other, by rounds; otherwise in the order of the evaluation."""
    labels = list(dict.fromkeys(arm.label for arm in answers))
    ordered = sorted(answers, key=lambda arm: (labels.index(arm.label), arm.rounds))
    return [_row(arm, answers[arm]) for arm in ordered]


def _by_label(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    return {label: list(group) for label, group in itertools.groupby(rows, key=lambda row: row.arm.label)}


def _group(row: _Row) -> str:
    """What stands together in a table: the rounds of one protocol, and all controls."""
    return row.arm.label if row.arm.name in PROTOCOLS else "controls"


def _what_accuracy_is(scorer: Scorer) -> str:
    name = getattr(scorer, "__name__", "score")
    return ACCURACY.get(name, f"the mean score by '{name}'")


# --- report.json ------------------------------------------------------------------------------------------------------


def write_json(log: EvalLog, directory: Path) -> Path:
    """Write `report.json`, complete or not at all. Raises `OutputError`."""
    return _write(directory / "report.json", json.dumps(log.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> Path:
    """Put a file in its place in one step, so that nobody ever reads half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as place:
            draft = Path(place) / file.name
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}; choose another directory") from None
    return file


# --- the terminal -----------------------------------------------------------------------------------------------------


def table(source: EvalLog | Mapping[Arm, Sequence[Answer]], task: Task | None = None) -> Table:
    """All arms with accuracy and costs per question, and the optimum.

    Takes a log, or the answers there are while an evaluation runs (then `task` tells the optimum and the scorer).
    """
    answers = source.answers if isinstance(source, EvalLog) else source
    task = source.task if isinstance(source, EvalLog) else task
    rows = _rows(answers)
    wanted = len(task.samples) if task is not None else max((row.n for row in rows), default=0)
    is_running = any(row.n < wanted for row in rows)
    counted = ["n"] if is_running else []
    view = _new_table("arm", "rounds", *counted, "accuracy", *(heading for _, heading in _TERMINAL_COSTS))
    columns = [_column(rows, name) for name, _ in _TERMINAL_COSTS]
    for number, row in enumerate(rows):
        cells = [str(row.arm.rounds), *([str(row.n)] if is_running else []), _score(row) if row.n else "–"]
        is_last = number + 1 == len(rows) or _group(rows[number + 1]) != _group(row)
        style = "bold" if row.arm.name == "latent" else ""
        view.add_row(Text(row.arm.label), *cells, *(each[number] for each in columns), style=style, end_section=is_last)
    for rounds, value in _optimum(task).items():
        view.add_row("optimum", str(rounds), *([""] if is_running else []), _decimal(value) + _NO_ERROR, style="italic")
    if task is not None:
        view.caption = Text(f"accuracy: {_what_accuracy_is(task.scorer)}")
    return view


_TERMINAL_COSTS = (
    ("generated_tokens", "generated\ntokens"),
    ("latent_steps", "latent\nsteps"),
    ("prompt_tokens", "prompt\ntokens"),
    ("milliseconds", "ms per\nquestion"),
)
_NO_ERROR = " " * len(" ± .000")


def _new_table(first: str, *others: str) -> Table:
    view = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left", caption_style="dim")
    view.add_column(first, no_wrap=True, vertical="bottom")
    for heading in others:
        view.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return view


def _optimum(task: Task | None) -> dict[int, float]:
    return dict(sorted((task.optimum or {}).items())) if task is not None else {}


def comparison_table(log: EvalLog) -> Table:
    """How the latent arm differs from the others on the same questions."""
    view = _new_table("compared", "rounds", "accuracy\ndifference", "p", "speed-up", "fewer\ntokens")
    for each in _comparisons(log):
        view.add_row(Text(f"{each['a']} − {each['b']}"), str(each["rounds"]), *_comparison_cells(each))
    view.caption = Text("paired t-tests on the same questions, not corrected for their number")
    return view


def _comparisons(log: EvalLog) -> list[dict[str, Any]]:
    """Comparisons with one arm next to each other, by rounds."""
    found: list[dict[str, Any]] = log.to_dict()["comparisons"]
    labels = list(dict.fromkeys(each["b"] for each in found))
    return sorted(found, key=lambda each: (labels.index(each["b"]), each["rounds"]))


def _comparison_cells(comparison: Mapping[str, Any]) -> list[str]:
    return [
        _with_error(comparison["accuracy_difference"], comparison["stderr"], signed=True),
        _p_value(comparison["p_value"]),
        _times(comparison["speedup"]),
        _percent(comparison["token_reduction"]),
    ]


# --- the numbers in words ---------------------------------------------------------------------------------------------


def headline(log: EvalLog) -> str:
    """What came out, as a paragraph of plain text made from the numbers."""
    rows = [row for row in _rows(log.answers) if row.n]
    subjects = [row for row in rows if row.arm.name == "latent"]
    if not subjects:
        best = max(rows, key=lambda row: row.accuracy.value)
        return f"The best of {len(rows)} arms is {_described(best)}."
    subject = subjects[-1]
    sentences = [
        _say_latent(subjects),
        *_say_text(log, subject, [row for row in rows if row.arm.name == "text"]),
        _say_controls(rows),
        _say_optimum(log.task, subject),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _described(row: _Row) -> str:
    return f"{row.arm.label} with {_score(row)} at {_rounds(row.arm.rounds)}"


def _score(row: _Row) -> str:
    return _with_error(row.accuracy.value, row.accuracy.stderr)


def _say_latent(subjects: list[_Row]) -> str:
    first, last = subjects[0], subjects[-1]
    start = f", from {_score(first)} at {_rounds(first.arm.rounds)}" if first is not last else ""
    return f"Latent hand-offs reach {_score(last)} at {_rounds(last.arm.rounds)}{start}."


def _say_text(log: EvalLog, subject: _Row, texts: list[_Row]) -> list[str]:
    """Against the text protocol that did best at the same number of rounds."""
    equals = [row for row in texts if row.arm.rounds == subject.arm.rounds]
    if not equals:
        return [f"The best text protocol is {_described(max(texts, key=_value))}."] if texts else []
    rival, best = max(equals, key=_value), max(texts, key=_value)
    compared = next(
        each
        for each in log.to_dict()["comparisons"]
        if (each["b"], each["rounds"]) == (rival.arm.label, subject.arm.rounds) and each["a"] == "latent"
    )
    which = "The best text protocol ({}) reaches" if len(equals) > 1 else "Text hand-offs ({}) reach"
    said = [f"{which.format(rival.arm.label)} {_score(rival)}: {_verdict(compared)}.", _say_cost(subject, rival)]
    if best.accuracy.value > rival.accuracy.value:
        said.insert(1, f"Text does better still with another number of rounds: {_described(best)}.")
    return said


def _value(row: _Row) -> float:
    return row.accuracy.value


def _verdict(comparison: Mapping[str, Any]) -> str:
    difference, stderr, p_value = (comparison[name] for name in ("accuracy_difference", "stderr", "p_value"))
    if stderr is None or p_value is None:
        return "one question does not tell which is better"
    if difference == 0 and stderr == 0:
        return "the same on every question"
    test = f"paired t-test, p {'' if p_value < 0.001 else '= '}{_p_value(p_value)}"
    if p_value >= 0.05:
        return f"the difference of {_with_error(difference, stderr, signed=True)} may be chance ({test})"
    side = "ahead" if difference > 0 else "behind"
    return f"latent is {side} by {_with_error(abs(difference), stderr)}, more than chance explains ({test})"


def _say_cost(subject: _Row, rival: _Row) -> str:
    ours, theirs = subject.costs, rival.costs
    saved = 1 - ours["generated_tokens"] / theirs["generated_tokens"] if theirs["generated_tokens"] else 0.0
    share = f" ({_percent(abs(saved))} {'fewer' if saved > 0 else 'more'})" if saved else ""
    our_time, their_time = _column([subject, rival], "milliseconds")
    ratio = theirs["milliseconds"] / max(ours["milliseconds"], 1e-12)
    pace = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / max(ratio, 1e-12):.2f} times as long"
    return (
        f"For an answer latent hand-offs generate {_count(ours['generated_tokens'])} tokens where {rival.arm.label} "
        f"generates {_count(theirs['generated_tokens'])}{share}, beside {_count(ours['latent_steps'])} latent steps, "
        f"and take {our_time} ms against {their_time} ms ({pace})."
    )


def _say_controls(rows: list[_Row]) -> str:
    phrases = {
        "solo": "the answering agent alone gets {}",
        "none": "empty slots give {}",
        "zero": "messages of zeros give {}",
        "shuffled": "messages of another question give {}",
        "random-link": "links drawn anew give {}",
    }
    found = [phrases[row.arm.name].format(_score(row)) for row in rows if row.arm.name in phrases]
    return f"Controls: {'; '.join(found)}." if found else ""


def _say_optimum(task: Task, subject: _Row) -> str:
    best = _optimum(task).get(subject.arm.rounds)
    if best is None:
        return ""
    number = _rounds(subject.arm.rounds)
    return f"A perfect reader of all that {number} can uncover would get {_decimal(best)}."


# --- figures ----------------------------------------------------------------------------------------------------------

# Matplotlib draws in these stand-in colours; in the page they become variables of the style sheet, which knows about
# light, dark and paper.
_STAND_INS = {"ink": "#fa0000", "muted": "#fa0001", "line": "#fa0002", "paper": "#fa0003"}
_SERIES = tuple(f"#fa001{number}" for number in range(6))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH, _HEIGHT = 9.0, 4.0
_FONT_SIZE = 10.5


def _figure_style() -> Any:  # a dictionary; matplotlib's stubs want each of its keys spelled out
    return {
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


def _styles(rows: Sequence[_Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every protocol; latent always has the first."""
    labels = [label for label in _by_label(rows) if label.split("/")[0] in PROTOCOLS]
    labels.sort(key=lambda label: label != "latent")
    return {
        label: (_SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)])
        for index, label in enumerate(labels, start="latent" not in labels)
    }


def _draw_accuracy(rows: Sequence[_Row], optimum: Mapping[int, float]) -> Markup:
    """Accuracy over rounds, with the optimum; controls in a panel of their own, since rounds mean little to them."""
    from matplotlib import rc_context

    controls = [row for row in rows if row.arm.name not in PROTOCOLS]
    styles = _styles(rows)
    series = {label: group for label, group in _by_label(rows).items() if label in styles}
    share = 0.082 * len(controls)
    with rc_context(_figure_style()):
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
    series: Mapping[str, Sequence[_Row]],
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


def _plot_controls(axes: Any, controls: Sequence[_Row]) -> None:
    for place, row in enumerate(controls):
        error = 0.0 if math.isnan(row.accuracy.stderr) else row.accuracy.stderr
        axes.errorbar(
            [place], [row.accuracy.value], yerr=[error],
            color=_STAND_INS["muted"], marker="_", markersize=22, markeredgewidth=2.2, elinewidth=1.2,
        )  # fmt: skip
    axes.set_xticks(range(len(controls)), [row.arm.name.replace("-", "-\n") for row in controls])
    axes.set_xlim(-0.6, len(controls) - 0.4)


def _draw_cost(rows: Sequence[_Row]) -> Markup:
    """Accuracy against what it costs: up and to the left is better. Each point carries its number of rounds."""
    from matplotlib import rc_context

    styles = _styles(rows)
    shown = {label: group for label, group in _by_label(rows).items() if label in styles or label == "solo"}
    with rc_context(_figure_style()):
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


def _plot_cost(axes: Any, costs: Sequence[float], group: Sequence[_Row], colour: str) -> None:
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
    axes.yaxis.set_major_formatter(lambda value, _: _decimal(value, 2))
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


# --- a story ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """One question, answered over latents and, to compare, in text and by the answering agent alone."""

    question: str
    target: str
    optimum_note: str
    """What is known about the best possible answer; empty where nothing is."""
    latent: Result
    text: Result | None = None
    solo: Result | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    """By channel: latent, text, solo."""

    @property
    def results(self) -> dict[str, Result]:
        """The results there are, by channel."""
        found = {"latent": self.latent, "text": self.text, "solo": self.solo}
        return {name: result for name, result in found.items() if result is not None}

    @property
    def wording(self) -> str:
        """The label of the text channel, as in the tables: `text/graded`."""
        variant = self.text.trace.settings.get("variant") if self.text is not None else None
        return "text" if variant is None else f"text/{variant}"

    def passages(self) -> dict[int, list[tuple[TracedMessage, str | None]]]:
        """By round, every latent message with what its sender wrote at this point on the text channel."""
        written = self.text.trace.messages if self.text is not None else []
        texts = {(each.round, each.source, each.target): each.text for each in written}
        rounds: dict[int, list[tuple[TracedMessage, str | None]]] = {}
        for message in self.latent.trace.messages:
            text = texts.get((message.round, message.source, message.target))
            rounds.setdefault(message.round, []).append((message, text))
        return rounds


def tell(
    system: RecursiveSystem,
    sample: Sample,
    *,
    rounds: int,
    variant: str | None = None,
    scorer: Scorer | None = None,
    instructions: str = "",
    num_latent_steps: int | None = None,
) -> Story:
    """Run a system on one question, over latents, in text (in the wording `variant`) and solo, and keep the traces.

    Solo is left out where the prompts have no words for it. `scorer` and `instructions` are those of the task; without
    a scorer, answers are scored by the exact posterior where the sample has one, otherwise compared with the target.
    """
    known = isinstance(sample.metadata.get("posterior"), Mapping)
    score = scorer or (posterior if known else exact)

    def answer(player: RecursiveSystem, channel: str, wording: str | None = None) -> Result:
        result: Result = player.run(
            sample.question,
            num_rounds=rounds,
            num_latent_steps=num_latent_steps,
            channel=channel,
            variant=wording,
            instructions=instructions,
            keys=[sample.id],
            trace="summary",
        )
        return result

    results = {"latent": answer(system, "latent"), "text": answer(system, "text", variant)}
    if system.prompts.roles[system.pattern.answers].solo is not None:
        results["solo"] = answer(system.solo(), "latent")
    scores = {name: score(result.text, sample.target, sample.metadata) for name, result in results.items()}
    return Story(sample.question, sample.target, _optimum_note(sample, rounds), **results, scores=scores)


def _optimum_note(sample: Sample, num_rounds: int) -> str:
    """What the sample's metadata says about the best possible answer."""
    probabilities, optimum = (sample.metadata.get(name) for name in ("posterior", "optimum"))
    notes = []
    if isinstance(probabilities, Mapping):
        likeliest = sorted(probabilities.items(), key=lambda pair: -pair[1])[:3]
        listed = ", ".join(f"{answer} {_decimal(probability, 2)}" for answer, probability in likeliest)
        notes.append(f"Probabilities given everything in the case: {listed}.")
    if isinstance(optimum, Mapping):
        reached = {int(rounds): value for rounds, value in optimum.items() if int(rounds) <= num_rounds}
        listed = ", ".join(f"{_decimal(value, 2)} after {_rounds(rounds)}" for rounds, value in sorted(reached.items()))
        notes.append(f"The best choice that the findings uncovered so far allow is right with probability {listed}.")
    return " ".join(notes)


def story_text(story: Story) -> RenderableType:
    """A story for the terminal: for each message the token nearest to each latent, with its cosine, and the text."""
    messages = [message for message, _ in itertools.chain.from_iterable(story.passages().values())]
    num_latents = min(max((len(each.nearest or []) for each in messages), default=0), NUM_TERMINAL_LATENTS)
    view = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("round", "passed on", *(f"latent {number + 1}" for number in range(num_latents))):
        view.add_column(heading, no_wrap=True)
    if story.text is not None:
        view.add_column(Text(f"the same agent on {story.wording}"), style="italic", min_width=24)
    for number, passages in story.passages().items():
        for index, (message, text) in enumerate(passages):
            cells = [Text(str(number) if index == 0 else ""), Text(f"{message.source} → {message.target}")]
            cells += _nearest_cells(message, num_latents)
            cells += [Text(text or "–")] if story.text is not None else []
            view.add_row(*cells, end_section=index + 1 == len(passages))
    longest = max((len(each.nearest or []) for each in messages), default=0)
    shown = f"The first {num_latents} of {longest} latents: " if longest > num_latents else ""
    hint = (
        f"{shown}{'t' if shown else 'T'}he nearest token with its cosine; a hint, not a reading. {story.optimum_note}"
    )
    return Group(Text(story.question), Text(), view, Text(), _answers(story), Text(), Text(hint.strip(), style="dim"))


def _nearest_cells(message: TracedMessage, num_latents: int) -> list[Text]:
    nearest = [tokens[0] for tokens in (message.nearest or [])[:num_latents]]
    cells = [Text(token).append(f" {_decimal(cosine, 2)}", style="dim") for token, cosine in nearest]
    return cells + [Text("–")] * (num_latents - len(cells))


def _answers(story: Story) -> Table:
    view = _new_table("channel", "answer", "score", "generated tokens", "latent steps")
    for name, result in story.results.items():
        score = _decimal(story.scores[name].value) if name in story.scores else "–"
        counts = str(result.usage.generated_tokens), str(result.usage.latent_steps)
        view.add_row(Text(story.wording if name == "text" else name), Text(result.text), score, *counts)
    view.columns[1].justify, view.columns[1].no_wrap = "left", False
    view.add_row("target", Text(story.target), style="italic")
    return view


# --- report.html ------------------------------------------------------------------------------------------------------


def write_html(log: EvalLog, story: Story | None, directory: Path, *, title: str, intro: str = "") -> Path:
    """Write `report.html`: the numbers in words, tables and figures, how to read them, and the story if there is one.

    The page needs nothing from outside, and everything that is not ours is escaped. Raises `OutputError`.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decimal": _decimal}
    rows = [row for row in _rows(log.answers) if row.n]
    page = environment.get_template("report.html.j2").render(
        title=title,
        intro=[part for part in intro.split("\n\n") if part.strip()],
        version=library_version(),
        headline=headline(log),
        log=log,
        num_questions=max(row.n for row in rows),
        settings=_settings(log),
        accuracy=_what_accuracy_is(log.task.scorer),
        groups=[list(group) for _, group in itertools.groupby(enumerate(rows), key=lambda pair: _group(pair[1]))],
        columns=_html_columns(rows),
        optimum=_optimum(log.task),
        has_cut=any(row.cut or row.unscorable for row in rows),
        comparisons=_comparison_groups(log),
        arm_notes={row.arm.name: ARM_NOTES[row.arm.name] for row in rows},
        legend=_legend(rows),
        accuracy_figure=_draw_accuracy(rows, _optimum(log.task)),
        cost_figure=_draw_cost(rows),
        story=story,
        num_shown=NUM_PAGE_LATENTS,
    )
    return _write(directory / "report.html", page)


def _html_columns(rows: Sequence[_Row]) -> dict[str, list[str]]:
    """Costs by heading, one cell for each row; what went wrong has columns only if something did."""
    names = ("generated_tokens", "latent_steps", "prompt_tokens", "positions", "milliseconds")
    columns = {{"milliseconds": "ms"}.get(name, name.replace("_", " ")): _column(rows, name) for name in names}
    if any(row.cut for row in rows):
        columns["cut off"] = [_percent(row.cut) for row in rows]
    if any(row.unscorable for row in rows):
        columns["not scorable"] = [_percent(row.unscorable) for row in rows]
    return columns


def _comparison_groups(log: EvalLog) -> list[list[tuple[dict[str, Any], list[str]]]]:
    """Comparisons with their cells; those with one protocol together, and those with all controls."""
    pairs = [(each, _comparison_cells(each)) for each in _comparisons(log)]

    def group(pair: tuple[dict[str, Any], list[str]]) -> str:
        label: str = pair[0]["b"]
        return label if label.split("/")[0] in PROTOCOLS else "controls"

    return [list(members) for _, members in itertools.groupby(pairs, key=group)]


def _legend(rows: Sequence[_Row]) -> dict[str, str]:
    """The style-sheet variable of every line in the figure of costs."""
    legend = {label: f"series-{_SERIES.index(colour)}" for label, (colour, _) in _styles(rows).items()}
    return legend | ({"solo": "muted"} if any(row.arm.name == "solo" for row in rows) else {})


def _settings(log: EvalLog) -> dict[str, str]:
    """The settings of a run, in the words of the page."""
    settings = {**log.settings, "sampling": log.settings.get("sampling") or "greedy"}
    if isinstance(settings["sampling"], Mapping):
        settings["sampling"] = ", ".join(f"{name} {value}" for name, value in settings["sampling"].items())
    names = {"num_latent_steps": "latent steps per turn"}
    return {names.get(name, name.replace("_", " ")): str(value) for name, value in settings.items()}
