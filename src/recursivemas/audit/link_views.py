"""Diagnoses of links as people read them: tables and verdicts for the terminal, and a figure.

Knows diagnoses; knows nothing of how they were made. Matplotlib takes long to load, so it is loaded by who draws.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from recursivemas.audit.records import SOURCES, EdgeDiagnosis, EdgeFigures, HandOff, Split, Verdict
from recursivemas.evaluation.figures import decimal
from recursivemas.evaluation.metrics import Mean

# --- the terminal -----------------------------------------------------------------------------------------------------


def tables(diagnoses: Sequence[EdgeDiagnosis]) -> Iterator[Table]:
    """One row an edge and round: what readers make of messages, what is lost, and what messages and links are like."""
    if any(each.figures.hand_off is not None for each in diagnoses):
        yield _success_table(diagnoses)
        yield _losses_table(diagnoses)
        yield _nats_table(diagnoses)
    yield _message_table(diagnoses)


def _success_table(diagnoses: Sequence[EdgeDiagnosis]) -> Table:
    view = _new_table(
        "reader right\nby its slot",
        "right/\nwrong",
        "\ntext",
        "\nwords",
        "teacher-\nforced",
        "rolled\nout",
        "\nnothing",
    )
    for each, hand_off in _hand_offs(diagnoses):
        success = {source: reception.success for source, reception in hand_off.received.items()}
        text, none = success["text"], success["none"]
        counts = "/".join("0" if mean is None else str(mean.n) for mean in (text.right, text.wrong))
        words = success["words"].all if "words" in success else None
        split = (_by_sender(success[source]) for source in ("teacher", "rollout"))
        _add_row(view, diagnoses, each, counts, _share(text.all), _share(words), *split, _share(none.all))
    n = max(each.figures.n for each in diagnoses)
    view.caption = Text(
        f"share of {n} questions; standard errors up to {decimal(0.5 / n**0.5)}. right/wrong: questions for\n"
        "which the sender, reading the right note, writes the right text; the same split\n"
        "in brackets. words: the text by the outer link alone"
    )
    return view


def _by_sender(split: Split) -> str:
    return f"{_share(split.all)} ({_share(split.right)}/{_share(split.wrong)})"


def _losses_table(diagnoses: Sequence[EdgeDiagnosis]) -> Table:
    view = _new_table(
        "\nlost to", "sender's\nwrong text", "the reader\nitself", "sender's\ndoubt", "outer\nlink", "inner\nlink"
    )
    for each in diagnoses:
        if each.losses is not None:
            lost = (each.losses.sender, each.losses.reader, each.losses.doubt, each.losses.outer, each.losses.inner)
            _add_row(view, diagnoses, each, *(decimal(share, 2) for share in lost))
    view.caption = Text(
        "share of all questions. Latents hold all that an unsure sender thinks possible,\n"
        "so what is lost to doubt need not be lost for the answer"
    )
    return view


def _nats_table(diagnoses: Sequence[EdgeDiagnosis]) -> Table:
    view = _new_table(
        "reader's nats per\ntoken by its slot", "\ntext", "\nwords", "teacher-\nforced", "rolled\nout", "\nnothing",
        "drift:\ncosine", "\ndistance",
    )  # fmt: skip
    for each, hand_off in _hand_offs(diagnoses):
        nats = (hand_off.received[source].loss.all if source in hand_off.received else None for source in SOURCES)
        drift = hand_off.drift
        _add_row(
            view, diagnoses, each, *(decimal(None if mean is None else mean.value, 2) for mean in nats),
            f"{_share(_clean(drift.mean_cosine))} {_share(_clean(drift.cosine[-1]))}",
            f"{_share(_clean(drift.mean_distance))} {_share(_clean(drift.distance[-1]))}",
        )  # fmt: skip
    view.caption = Text(
        "cross-entropy of the right text. drift: rolled-out against teacher-forced states\n"
        "where the sender is right; mean over all latent steps but the first (which is\n"
        "the same in both), and at the last"
    )
    return view


def _clean(split: Split) -> Mean | None:
    """Drift where the sender means the text by the book; over all questions, if it never does."""
    return split.right or split.all


def _message_table(diagnoses: Sequence[EdgeDiagnosis]) -> Table:
    view = _new_table(
        "messages\nand links", "\nloudness", "cosine\n(texts)", "rank\n(texts)", "moved\nouter, inner",
        "not residual\nouter, inner",
    )  # fmt: skip
    for each in diagnoses:
        message, outer, inner = each.figures.message, each.figures.outer, each.figures.inner
        _add_row(
            view, diagnoses, each,
            f"{decimal(message.loudness, 2)} ± {decimal(message.loudness_spread, 2)}",
            f"{decimal(message.cosine, 2)} ({decimal(message.words_cosine, 2)})",
            f"{_tenths(message.rank)} ({_tenths(message.words_rank)})",
            _moved(outer.moved, inner.moved),
            f"{decimal(outer.learned_share, 2)}, {decimal(inner.learned_share, 2)}",
        )  # fmt: skip
    tried = any(each.figures.hand_off is not None for each in diagnoses)
    made = "" if tried else "messages are made of a calibration text, each of its tokens a question.\n"
    view.caption = Text(
        f"{made}loudness: norm over the reader's mean embedding norm, ± its spread. cosine,\n"
        "rank: of messages of different questions (of the reader's embeddings of the\n"
        "texts). moved: change of the weights over the norm of the start. not residual:\n"
        "norm of W2 gelu(W1 h) over that of the sum"
    )
    return view


def _share(mean: Mean | None) -> str:
    return decimal(None if mean is None else mean.value, 2).replace("1.00", "1.0")


def _tenths(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _moved(outer: float | None, inner: float | None) -> str:
    return "unknown" if outer is None and inner is None else f"{decimal(outer, 2)}, {decimal(inner, 2)}"


def _hand_offs(diagnoses: Sequence[EdgeDiagnosis]) -> Iterator[tuple[EdgeDiagnosis, HandOff]]:
    for each in diagnoses:
        if each.figures.hand_off is not None:
            yield each, each.figures.hand_off


def _new_table(first: str, *others: str) -> Table:
    # Little padding: the widest table fits into the 80 columns that are there when the output is piped.
    view = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption_justify="left")
    view.caption_style = "dim"
    view.add_column(first, no_wrap=True, vertical="bottom")
    for heading in others:
        view.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return view


def _add_row(view: Table, diagnoses: Sequence[EdgeDiagnosis], each: EdgeDiagnosis, *cells: str) -> None:
    """A row of a table; rounds stand apart."""
    figures = each.figures
    following = next((b for a, b in itertools.pairwise(diagnoses) if a is each), each)
    is_last = following.figures.round != figures.round
    view.add_row(Text(f"{figures.edge} {figures.round or ''}"), *cells, end_section=is_last)


def say_verdicts(diagnoses: Sequence[EdgeDiagnosis]) -> Iterator[str]:
    """One line an edge and round: every cause with its reason. Rounds that say the same stand together."""
    by_edge: dict[str, list[EdgeDiagnosis]] = {}
    for each in diagnoses:
        by_edge.setdefault(each.figures.edge, []).append(each)
    for edge, several in by_edge.items():
        for verdicts, group in itertools.groupby(several, key=lambda each: each.verdicts):
            yield f"{edge}{_say_rounds([each.figures for each in group])}: {_say(verdicts)}"


def _say(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(f"{verdict.cause} – {verdict.reason}" for verdict in verdicts)


def _say_rounds(figures: Sequence[EdgeFigures]) -> str:
    rounds = [str(each.round) for each in figures if each.round is not None]
    return "" if not rounds else f", round{'s' * (len(rounds) > 1)} {', '.join(rounds)}"


# --- the figure -------------------------------------------------------------------------------------------------------

# The colours of the page of an evaluation (bundled/report), by daylight: a figure in a file has no page around it.
_INK, _MUTED, _LINE, _PAPER = "#1b1d20", "#6a6f76", "#e3e5e8", "#ffffff"
_SERIES = ("#0067a8", "#c45100", "#00805e", "#a8478a", "#8a6d00", "#5b5f66")
_COLOURS = {"text": _SERIES[1], "words": _SERIES[3], "teacher": _SERIES[2], "rollout": _SERIES[0], "none": "#b4b9c0"}
_CALLED = {
    "text": "text",
    "words": "words by the outer link",
    "teacher": "teacher-forced latents",
    "rollout": "rolled-out latents",
    "none": "nothing",
}
_FONT_SIZE = 10.5

_STYLE: Any = {  # matplotlib's stubs want each key of a dictionary spelled out
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "links",  # the same numbers make the same file
    "text.parse_math": False,  # a role may be called as it likes
    "font.family": "sans-serif",
    "font.size": _FONT_SIZE,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "figure.facecolor": _PAPER,
    "axes.facecolor": "none",
}


def draw(diagnoses: Sequence[EdgeDiagnosis]) -> str | None:
    """How often each reader is right by what its slot holds, and how far thoughts drift step by step, as SVG.

    None where nothing was tried.
    """
    tried = sorted(_hand_offs(diagnoses), key=lambda pair: _edges(diagnoses).index(pair[0].figures.edge))
    if not tried:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(4.5 + 0.75 * len(tried), 4.0))
        has_drift = len(tried[0][1].drift.distance) > 1
        width = 0.92 - (3.2 / figure.get_figwidth() if has_drift else 0.0)
        _draw_success(_panel(figure, 0.05, width, "reader right, by what its slot holds"), tried)
        if has_drift:
            right = 2.1 / figure.get_figwidth()
            _draw_drift(_panel(figure, 0.97 - right, right, "drift of rolled-out states"), tried)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _edges(diagnoses: Sequence[EdgeDiagnosis]) -> list[str]:
    return list(dict.fromkeys(each.figures.edge for each in diagnoses))


def _draw_success(axes: Any, tried: Sequence[tuple[EdgeDiagnosis, HandOff]]) -> None:
    """Bars, a group for each round, with the edge below its rounds."""
    sources = [source for source in SOURCES if source in tried[0][1].received]
    size = 0.8 / len(sources)
    for index, source in enumerate(sources):
        means = [hand_off.received[source].success.all for _, hand_off in tried]
        axes.bar(
            [place + size * (index - (len(sources) - 1) / 2) for place in range(len(tried))],
            [0.0 if mean is None else mean.value for mean in means],
            width=0.9 * size, color=_COLOURS[source], label=_CALLED[source],
        )  # fmt: skip
    axes.set_xticks(range(len(tried)), [str(each.figures.round) for each, _ in tried])
    axes.set_xlim(-0.6, len(tried) - 0.4)
    axes.set_ylim(0, 1.02)
    names = [each.figures.edge for each, _ in tried]
    for edge in dict.fromkeys(names):
        places = [place for place, name in enumerate(names) if name == edge]
        middle = (places[0] + places[-1]) / 2
        axes.annotate(
            edge, (middle, 0), xycoords=("data", "axes fraction"), xytext=(0, -34), textcoords="offset points",
            ha="center", color=_INK, annotation_clip=False,
        )  # fmt: skip
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.08), ncols=len(sources), frameon=False, handlelength=0.8,
        columnspacing=1.2, handletextpad=0.5, labelcolor=_MUTED, fontsize=9,
    )  # fmt: skip


def _draw_drift(axes: Any, tried: Sequence[tuple[EdgeDiagnosis, HandOff]]) -> None:
    """A line for each edge and round, later rounds fainter."""
    edges = list(dict.fromkeys(each.figures.edge for each, _ in tried))
    rounds = sorted({each.figures.round or 0 for each, _ in tried})
    for each, hand_off in tried:
        means = [_clean(split) for split in hand_off.drift.distance]
        steps = [step for step, mean in enumerate(means, start=1) if mean is not None]
        axes.plot(
            steps, [mean.value for mean in means if mean is not None], linewidth=1.8, marker="o", markersize=4,
            color=_SERIES[edges.index(each.figures.edge) % len(_SERIES)],
            alpha=1 - 0.6 * rounds.index(each.figures.round or 0) / len(rounds),
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), max(high, 0.5))
    axes.set_xlabel("latent step", color=_MUTED)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for place, edge in enumerate(edges):
        axes.annotate(
            edge, (0.02, 0.96 - 0.07 * place), xycoords="axes fraction", color=_SERIES[place % len(_SERIES)], va="top",
            fontsize=9,
        )  # fmt: skip


def _panel(figure: Any, left: float, width: float, heading: str) -> Any:
    """Axes with no more ink than needed: hairlines across, numbers, and a heading at the top left."""
    axes = figure.add_axes((left, 0.2, width, 0.6))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    axes.yaxis.set_major_formatter(lambda value, _: decimal(value, 2))
    axes.set_title(heading, loc="left", fontsize=_FONT_SIZE, color=_MUTED)
    return axes
