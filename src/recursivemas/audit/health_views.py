"""Diagnoses of links by themselves as people read them: tables and verdicts for the terminal, and a figure.

Knows diagnoses; knows nothing of how they were made.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from recursivemas.audit.records import LinkDiagnosis, LinkFigures
from recursivemas.audit.style import GREY, MUTED, SERIES, add_panel, draw_figure, new_table, say, tenths
from recursivemas.audit.verdicts import UNTRIED, looks_drawn
from recursivemas.evaluation.figures import decimal, percent

_MATRICES = ("w1", "w2", "w3")


def tables(diagnoses: Sequence[LinkDiagnosis]) -> Iterator[Table]:
    """One row a link: what it makes of words, and what its weights are like."""
    yield _output_table(diagnoses)
    yield _weight_table(diagnoses)


def _output_table(diagnoses: Sequence[LinkDiagnosis]) -> Table:
    view = new_table(
        "outputs\nof links", "\nloudness", "spread\nin, out (words)", "rank\nin, out", "uneven\ndimensions"
    )
    for each in diagnoses:
        output = each.figures.output
        inputs, outputs, words = output.inputs, output.outputs, output.words
        view.add_row(
            Text(_name(each.figures)),
            f"{_loudness(output.loudness)} ± {_loudness(output.loudness_spread)}",
            f"{decimal(inputs.spread, 2)}, {decimal(outputs.spread, 2)} ({decimal(words.spread, 2)})",
            f"{tenths(inputs.rank)}, {tenths(outputs.rank)}",
            f"{len(output.uneven)} of {each.figures.output_size}",
        )
    view.caption = Text(
        "loudness: norm over the reader's mean embedding norm, ± its spread, for random\n"
        "words. spread: 0 if all vectors lie on one line, near 1 if they point anywhere;\n"
        "of what goes in, of what comes out (of the reader's words). rank: directions in\n"
        "which they differ. uneven: far louder or quieter than the others, beside the\n"
        "reader's embeddings"
    )
    return view


def _loudness(value: float) -> str:
    return decimal(value, 2) if value < 10 else f"{value:.0f}"


def _weight_table(diagnoses: Sequence[LinkDiagnosis]) -> Table:
    view = new_table(
        "weights\nof links", "distance\nw1", "from new\nw2", "\nw3", "\nmoved", "not\nresidual",
        "gains\nall equal",
    )  # fmt: skip
    for each in diagnoses:
        figures = each.figures
        view.add_row(
            Text(_name(figures)),
            *(_distance(figures, matrix) for matrix in _MATRICES),
            "unknown" if figures.moved is None else decimal(figures.moved, 2),
            decimal(figures.learned_share, 2),
            _gains(figures),
        )
    view.caption = Text(
        "distance: of the singular values from those of a matrix that PyTorch has just\n"
        "drawn, over the norm of the latter (*: cannot be told from random numbers of\n"
        "its size). moved: change of the weights over the norm of the start, where that\n"
        "is known. not residual: norm of W2 gelu(W1 h) over that of the sum. gains: for\n"
        "each LayerNorm, the share that are the same number"
    )
    return view


def _name(figures: LinkFigures) -> str:
    return f"inner {figures.link}" if figures.kind == "inner" else figures.link


def _gains(figures: LinkFigures) -> str:
    return ", ".join(percent(gains.share) for gains in figures.gains.values()) or "–"


def _distance(figures: LinkFigures, matrix: str) -> str:
    weight = figures.weights.get(matrix)
    return "" if weight is None else f"{decimal(weight.distance, 2)}{'*' if looks_drawn(weight) else ''}"


def say_verdicts(diagnoses: Sequence[LinkDiagnosis]) -> Iterator[str]:
    """One line for every link at fault, and one for all others."""
    faulty = [each for each in diagnoses if each.verdicts[0].cause != UNTRIED]
    for each in faulty:
        yield f"{_name(each.figures)}: {say(each.verdicts)}"
    if len(faulty) < len(diagnoses):
        others = "the other " if faulty else ""
        yield f"{others}{len(diagnoses) - len(faulty)} links: {UNTRIED}, as far as can be seen of links by themselves"


def draw(diagnoses: Sequence[LinkDiagnosis]) -> str:
    """The spectra of every link beside those of a new one, one panel a link, as SVG."""
    columns = min(len(diagnoses), 3)
    rows = -(-len(diagnoses) // columns)
    size = (3.3 * columns, 2.6 * rows + 0.5)

    def paint(figure: Any) -> None:
        for number, each in enumerate(diagnoses):
            row, column = divmod(number, columns)
            width, height = 1 / columns, 2.6 / size[1]
            place = ((column + 0.16) * width, 1 - (row + 0.8) * height, 0.8 * width, 0.62 * height)
            _draw_spectra(add_panel(figure, place, _name(each.figures)), each.figures)
        # One legend for all, of what any link has.
        lines = {line.get_label(): line for axes in figure.axes for line in axes.lines if line.get_label()[0] != "_"}
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="lower left",
            ncols=len(lines),
            frameon=False,
            labelcolor=MUTED,
            fontsize=9,
        )

    return draw_figure(size, paint)


def _draw_spectra(axes: Any, figures: LinkFigures) -> None:
    """Singular values from the largest to the smallest, on a logarithmic scale."""
    least = min((each.drawn_spectrum[0] for each in figures.weights.values()), default=1.0) / 1000
    for matrix, weight in figures.weights.items():
        places = [place / max(len(weight.spectrum) - 1, 1) for place in range(len(weight.spectrum))]
        drawn = [max(value, least) for value in weight.drawn_spectrum]
        axes.plot(places, drawn, linewidth=4, color=GREY, alpha=0.5, label="new link")
        found = [max(value, least) if value == value else least for value in weight.spectrum]
        colour = SERIES[_MATRICES.index(matrix) % len(SERIES)] if matrix in _MATRICES else SERIES[-1]
        axes.plot(places, found, linewidth=1.6, color=colour, label=matrix)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xticks([0.05, 0.92], ["largest", "smallest"])
