"""What is found out about the links of a system, as data.

Every mean stands with its standard error and its n (`evaluation.metrics.Mean`). Knows nothing of how the numbers were
measured, of what they mean (see `verdicts.py`), or of how they are shown (see the views).
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from recursivemas.evaluation.metrics import Mean

SOURCES = ("text", "words", "teacher", "rollout", "none")
"""What a reader's slot holds: the text by the book; the sender's embeddings of that text, through the outer link alone;
the sender's latents while it is made to write it (teacher-forced); its latents as in a run (rolled out); nothing."""

SURE = 0.5
"""A sender is sure of a text that it gives at least this probability: then it is likelier than all others together."""


@dataclass(frozen=True)
class Split:
    """A mean over all questions, and over some of them; None where there are none."""

    all: Mean | None
    right: Mean | None
    """Where the sender, reading the note by the book, writes the text by the book."""
    wrong: Mean | None
    """Where it writes another."""
    sure: Mean | None
    """Where it is right, and sure of it (`SURE`). Only there must its latents say what the text says: those of an
    unsure sender hold everything that it thinks possible."""


@dataclass(frozen=True)
class Reception:
    """What a reader makes of one thing in its slot."""

    success: Split
    """Share of questions, 0 to 1, for which its greedy text is the one by the book."""
    loss: Split
    """Cross-entropy of that text, in nats per token (the end-of-reply token included)."""


@dataclass(frozen=True)
class Drift:
    """How far the rolled-out states H are from the teacher-forced ones, step by step.

    The first step is the same state in both. Steps after the end of the text are left out.
    """

    cosine: tuple[Split, ...]
    """Cosine at each latent step, -1 to 1."""
    distance: tuple[Split, ...]
    """Norm of the difference at each latent step, in units of the norm of the teacher-forced state."""
    mean_cosine: Split
    """Over all steps but the first."""
    mean_distance: Split


@dataclass(frozen=True)
class HandOff:
    """What arrives on an edge in one round."""

    sender: Mean
    """Share of questions, 0 to 1, for which the sender writes the text by the book, given the note by the book."""
    tokens: Mean
    """Tokens of that text in the sender's vocabulary; what stands behind the m-th is not in the message."""
    received: dict[str, Reception]
    """By what the reader's slot holds (`SOURCES`); no `words` where messages do not go through the inner link."""
    drift: Drift


@dataclass(frozen=True)
class Variety:
    """How much vectors of different questions (or places of a text) differ; None where no two can be compared."""

    cosine: float | None
    """Mean cosine between any two at the same latent step; 1: all say the same."""
    spread: float | None
    """1 minus the mean squared cosine: 0 if all lie on one line, be it to both sides; near 1 if they point anywhere."""
    rank: float | None
    """Directions in which they differ: the participation ratio of the eigenvalues of their covariance about the mean of
    each latent step, from 1 to their width; None if they do not differ."""


@dataclass(frozen=True)
class MessageFigures:
    """The messages themselves: m vectors for each question."""

    loudness: float
    """Mean norm, in units of the mean norm of the reader's embedding table."""
    loudness_spread: float
    """Standard deviation of the norms, in the same units."""
    messages: Variety
    words: Variety
    """Of the reader's embeddings of the texts by the book."""


@dataclass(frozen=True)
class WeightFigures:
    """One matrix of a link beside a matrix of numbers drawn at random (see `health.py` for the theory)."""

    shape: tuple[int, int]
    scale: float
    """Root mean square, in units of that of PyTorch's default initialisation."""
    spectrum: tuple[float, ...]
    """Singular values, the largest first; of more than 64, that many at even places, the first and last among them."""
    drawn_spectrum: tuple[float, ...]
    """The same of a matrix of this shape as PyTorch draws it."""
    distance: float
    """Norm of the difference of the two spectra (all values), in units of the norm of the second: it has moved at least
    so far from whatever it was drawn as, since no change moves a spectrum further than the matrix (Mirsky)."""
    structure: float
    """The same with the scale taken out, in units in which random numbers have 1 to 2, whatever the shape."""
    beyond_uniform: float
    """How far the largest number is beyond what uniform numbers of this root mean square reach, in standard errors."""
    off_normal: float
    """How far the fourth moment is from that of normal numbers, in standard errors."""


@dataclass(frozen=True)
class GainFigures:
    """The gains of one LayerNorm."""

    value: float
    """The most frequent one."""
    share: float
    """Share of all gains, 0 to 1, that are exactly that."""


@dataclass(frozen=True)
class OutputFigures:
    """What a link makes of the probe (words that nobody chose), beside what its reader is used to."""

    loudness: float
    loudness_spread: float
    """As for messages."""
    outputs: Variety
    inputs: Variety
    """Of what goes into the link."""
    words: Variety
    """Of the reader's own embeddings of some words."""
    uneven: dict[int, float]
    """Dimensions in which the link is far louder (above 1) or quieter than in most, both beside the root mean square of
    the reader's embeddings; with how many times."""


@dataclass(frozen=True)
class LinkFigures:
    """A link by itself: its weights, and what it makes of words that nobody chose."""

    link: str
    """An edge, or a role for its inner link."""
    kind: str
    """`inner` or `outer`."""
    parameters: int
    output_size: int
    """Width of what comes out: of the reader."""
    moved: float | None
    """Norm of the change of all its weights, in units of the norm of the start; None if the start is not known."""
    moved_by_tensor: dict[str, float | None] | None
    """The same for each tensor; None for one that started as zeros and has changed."""
    learned_share: float
    """Mean norm of the part that is not the residual, W2 gelu(W1 h), in units of the norm of their sum: 0 is the
    residual alone; a design without a residual has 1."""
    weights: dict[str, WeightFigures]
    """By matrix: w1, w2, w3."""
    gains: dict[str, GainFigures]
    """By LayerNorm: source_norm, target_norm; empty in a design without."""
    output: OutputFigures


@dataclass(frozen=True)
class EdgeFigures:
    """Everything measured on one edge in one round."""

    edge: str
    round: int
    """The round in which the message is sent."""
    n: int
    """Questions."""
    hand_off: HandOff
    message: MessageFigures


@dataclass(frozen=True)
class Losses:
    """What goes wrong in a hand-off and to whom it is laid, each as a share of all questions, 0 to 1."""

    sender: float
    """The sender writes another text."""
    reader: float
    """The reader does not write its text even when the right text is in its slot."""
    doubt: float
    """The sender is right, but unsure, and its latents say less to the reader than its text would."""
    outer: float
    """The outer link: neither words nor teacher-forced latents get through it."""
    inner: float
    """The inner link: words get through the outer link, or teacher-forced latents do, but not rolled-out latents."""


@dataclass(frozen=True)
class Verdict:
    """One cause why something does not arrive, or that all does."""

    cause: str
    """A name of `verdicts.ADVICE`."""
    reason: str
    """The numbers it was seen from, in words."""


@dataclass(frozen=True)
class LinkDiagnosis:
    """The figures of one link, and what they say."""

    figures: LinkFigures
    verdicts: tuple[Verdict, ...]
    """Never empty."""


@dataclass(frozen=True)
class EdgeDiagnosis:
    """The figures of one edge in one round, and what they say."""

    figures: EdgeFigures
    losses: Losses
    verdicts: tuple[Verdict, ...]
    """Never empty. The first is what explains the loss; the others may follow from it."""


def to_plain(value: Any) -> Any:
    """Records as plain data for JSON: what is not a number (nan, infinite) becomes None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mean):
        return {name: to_plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
