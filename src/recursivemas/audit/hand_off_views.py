"""Diagnoses of hand-offs as people read them: tables and verdicts for the terminal, and a figure.

Knows diagnoses; knows nothing of how they were made.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from recursivemas.audit.records import SOURCES, EdgeDiagnosis, Split
from recursivemas.audit.style import GREY, INK, MUTED, SERIES, add_panel, draw_figure, new_table, say, tenths
from recursivemas.evaluation.figures import decimal
from recursivemas.evaluation.metrics import Mean

# --- the terminal -----------------------------------------------------------------------------------------------------


def tables(diagnoses: Sequence[EdgeDiagnosis]) -> Iterator[Table]:
    """One row an edge and round: what readers make of messages, what is lost, and what messages are like."""
    yield _success_table(diagnoses)
    yield _losses_table(diagnoses)
    yield _nats_table(diagnoses)
    yield _message_table(diagnoses)


def _success_table(diagnoses: Sequence[EdgeDiagnosis]) -> Table:
    view = new_table(
        "reader right\nby its slot",
        "right/\nwrong",
        "\ntext",
        "\nwords",
        "teacher-\nforced",
        "rolled\nout",
        "\nnothing",
    )
    for each in diagnoses:
        hand_off = each.figures.hand_off
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
    view = new_table(
        "\nlost to", "sender's\nwrong text", "the reader\nitself", "sender's\ndoubt", "outer\nlink", "inner\nlink"
    )
    for each in diagnoses:
        lost = (each.losses.sender, each.losses.reader, each.losses.doubt, each.losses.outer, each.losses.inner)
        _add_row(view, diagnoses, each, *(decimal(share, 2) for share in lost))
    view.caption = Text(
        "share of all questions. Latents hold all that an unsure sender thinks possible,\n"
        "so what is lost to doubt need not be lost for the answer"
    )
    return view


def _nats_table(diagnoses: Sequence[EdgeDiagnosis]) -> Table:
    view = new_table(
        "reader's nats per\ntoken by its slot", "\ntext", "\nwords", "teacher-\nforced", "rolled\nout", "\nnothing",
        "drift:\ncosine", "\ndistance",
    )  # fmt: skip
    for each in diagnoses:
        hand_off = each.figures.hand_off
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
    view = new_table("\nmessages", "\nloudness", "cosine\n(texts)", "rank\n(texts)")
    for each in diagnoses:
        figures = each.figures.message
        _add_row(
            view, diagnoses, each,
            f"{decimal(figures.loudness, 2)} ± {decimal(figures.loudness_spread, 2)}",
            f"{decimal(figures.messages.cosine, 2)} ({decimal(figures.words.cosine, 2)})",
            f"{tenths(figures.messages.rank)} ({tenths(figures.words.rank)})",
        )  # fmt: skip
    view.caption = Text(
        "loudness: norm over the reader's mean embedding norm, ± its spread. cosine,\n"
        "rank: of messages of different questions (of the reader's embeddings of the\n"
        "texts)"
    )
    return view


def _share(mean: Mean | None) -> str:
    return decimal(None if mean is None else mean.value, 2).replace("1.00", "1.0")


def _add_row(view: Table, diagnoses: Sequence[EdgeDiagnosis], each: EdgeDiagnosis, *cells: str) -> None:
    """A row of a table; rounds stand apart."""
    figures = each.figures
    following = next((b for a, b in itertools.pairwise(diagnoses) if a is each), each)
    is_last = following.figures.round != figures.round
    view.add_row(Text(f"{figures.edge} {figures.round}"), *cells, end_section=is_last)


def say_verdicts(diagnoses: Sequence[EdgeDiagnosis]) -> Iterator[str]:
    """One line an edge and round: every cause with its reason. Rounds that say the same stand together."""
    by_edge: dict[str, list[EdgeDiagnosis]] = {}
    for each in diagnoses:
        by_edge.setdefault(each.figures.edge, []).append(each)
    for edge, several in by_edge.items():
        for verdicts, group in itertools.groupby(several, key=lambda each: each.verdicts):
            rounds = [str(each.figures.round) for each in group]
            yield f"{edge}, round{'s' * (len(rounds) > 1)} {', '.join(rounds)}: {say(verdicts)}"


# --- the figure -------------------------------------------------------------------------------------------------------

_COLOURS = {"text": SERIES[1], "words": SERIES[3], "teacher": SERIES[2], "rollout": SERIES[0], "none": GREY}
_CALLED = {
    "text": "text",
    "words": "words by the outer link",
    "teacher": "teacher-forced latents",
    "rollout": "rolled-out latents",
    "none": "nothing",
}


def draw(diagnoses: Sequence[EdgeDiagnosis]) -> str:
    """How often each reader is right by what its slot holds, and how far thoughts drift step by step, as SVG."""
    edges = list(dict.fromkeys(each.figures.edge for each in diagnoses))
    ordered = sorted(diagnoses, key=lambda each: edges.index(each.figures.edge))

    def paint(figure: Any) -> None:
        has_drift = len(ordered[0].figures.hand_off.drift.distance) > 1
        width = 0.92 - (3.2 / figure.get_figwidth() if has_drift else 0.0)
        _draw_success(add_panel(figure, (0.05, 0.2, width, 0.6), "reader right, by what its slot holds"), ordered)
        if has_drift:
            right = 2.1 / figure.get_figwidth()
            _draw_drift(add_panel(figure, (0.97 - right, 0.2, right, 0.6), "drift of rolled-out states"), ordered)

    return draw_figure((4.5 + 0.75 * len(ordered), 4.0), paint)


def _draw_success(axes: Any, tried: Sequence[EdgeDiagnosis]) -> None:
    """Bars, a group for each round, with the edge below its rounds."""
    sources = [source for source in SOURCES if source in tried[0].figures.hand_off.received]
    size = 0.8 / len(sources)
    for index, source in enumerate(sources):
        means = [each.figures.hand_off.received[source].success.all for each in tried]
        axes.bar(
            [place + size * (index - (len(sources) - 1) / 2) for place in range(len(tried))],
            [0.0 if mean is None else mean.value for mean in means],
            width=0.9 * size, color=_COLOURS[source], label=_CALLED[source],
        )  # fmt: skip
    axes.set_xticks(range(len(tried)), [str(each.figures.round) for each in tried])
    axes.set_xlim(-0.6, len(tried) - 0.4)
    axes.set_ylim(0, 1.02)
    names = [each.figures.edge for each in tried]
    for edge in dict.fromkeys(names):
        places = [place for place, name in enumerate(names) if name == edge]
        middle = (places[0] + places[-1]) / 2
        axes.annotate(
            edge, (middle, 0), xycoords=("data", "axes fraction"), xytext=(0, -34), textcoords="offset points",
            ha="center", color=INK, annotation_clip=False,
        )  # fmt: skip
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.08), ncols=len(sources), frameon=False, handlelength=0.8,
        columnspacing=1.2, handletextpad=0.5, labelcolor=MUTED, fontsize=9,
    )  # fmt: skip


def _draw_drift(axes: Any, tried: Sequence[EdgeDiagnosis]) -> None:
    """A line for each edge and round, later rounds fainter."""
    edges = list(dict.fromkeys(each.figures.edge for each in tried))
    rounds = sorted({each.figures.round for each in tried})
    for each in tried:
        means = [_clean(split) for split in each.figures.hand_off.drift.distance]
        steps = [step for step, mean in enumerate(means, start=1) if mean is not None]
        axes.plot(
            steps, [mean.value for mean in means if mean is not None], linewidth=1.8, marker="o", markersize=4,
            color=SERIES[edges.index(each.figures.edge) % len(SERIES)],
            alpha=1 - 0.6 * rounds.index(each.figures.round) / len(rounds),
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), max(high, 0.5))
    axes.set_xlabel("latent step", color=MUTED)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for place, edge in enumerate(edges):
        axes.annotate(
            edge, (0.02, 0.96 - 0.07 * place), xycoords="axes fraction", color=SERIES[place % len(SERIES)], va="top",
            fontsize=9,
        )  # fmt: skip
