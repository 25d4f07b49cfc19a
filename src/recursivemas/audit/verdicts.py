"""From figures to words: what is wrong with a link, what is lost on an edge, and what to do about it.

Of a link by itself all faults are told. Of an edge the first cause in the chain that explains its loss comes first:

    sender writes its text -> (is sure of it) -> inner link rolls it out -> outer link carries it -> reader reads it

Every threshold is a constant with its reason. Knows figures; knows nothing of how they were measured.
"""

import math
from collections.abc import Collection

from recursivemas.audit.records import (
    EdgeFigures,
    HandOff,
    LinkFigures,
    Losses,
    MessageFigures,
    OutputFigures,
    Split,
    Verdict,
    WeightFigures,
)
from recursivemas.evaluation.figures import decimal

NOT_FINITE = "not finite"
SENDER = "sender writes the wrong text"
READER = "reader fails on gold text"
DEAF = "reader ignores its slot"
LOUD = "too loud"
QUIET = "too quiet"
COLLAPSED = "collapsed"
UNEVENLY_LOUD = "wrong scale in some dimensions"
UNTRAINED = "never trained"
FROZEN = "gains never moved"
OUTER_START = "outer link never trained"
INNER_START = "inner link never trained"
CUT = "text longer than the message"
DOUBT = "sender is unsure"
OUTER = "outer link loses (teacher-forced)"
INNER = "inner link drifts (rolled out)"
HEALTHY = "healthy"
UNTRIED = "no fault seen"

_SIZE = "size it: system.calibrate(TEXT) makes every link as loud as its reader is used to; then train the outer loop"
_TRAIN = "train it (recursivemas train), or let the edges it serves pass text (--channel EDGE=text)"
ADVICE = {
    NOT_FINITE: "go back to an earlier checkpoint, or train anew in float32",
    SENDER: "no link can mend this: give the sender another model or another prompt",
    READER: "no link can mend this: give the reader another model or another prompt",
    DEAF: "look at the reader's prompt: its answer does not depend on what it is sent",
    LOUD: _SIZE,
    QUIET: _SIZE,
    COLLAPSED: "train it anew from the alignment, with a lower learning rate or a larger anchor (outer.anchor)",
    UNEVENLY_LOUD: "train the alignment again, which fits every dimension to the reader's embeddings",
    UNTRAINED: _TRAIN,
    FROZEN: "train its parameters in float32, as recursivemas train does; in bfloat16 gains around 1 cannot move",
    OUTER_START: _TRAIN,
    INNER_START: _TRAIN,
    CUT: "take more latent steps (--latent-steps), or let the sender write less",
    DOUBT: "nothing, if answers are good: latents of an unsure sender say all that it thinks possible",
    OUTER: "train the alignment longer or on more turns, then the outer loop",
    INNER: "train the inner links longer or on more turns, then the outer loop",
    HEALTHY: "",
    UNTRIED: "",
}
"""All causes with what to do about them, in the order in which those of one edge are named (but see `judge`): what
agents do in words, what is plainly wrong with messages or links, and what is concluded from readers that do worse with
latents than with text."""

CAUSES = tuple(ADVICE)

NAMED = 0.1
"""A loss is named from this share of all questions on: one in ten, eight hand-offs in a row, leaves less than half."""

MIN_ROWS = 30
"""Shares of fewer questions have standard errors of .09 and more, as large as what is to be seen in them."""

LOUDEST = 4.0
"""Trained links were seen at .5 to 1.2 times their readers' embeddings, released ones at 50 to 80 times."""

QUIETEST = 0.1
"""Readers with a norm before every layer understand messages of a sixth of the usual loudness; near zero, rounding and
the norm's epsilon take over."""

LEAST_VARIETY = 0.05
"""Of 1 - cosine between messages of different questions, relative to that of the texts: trained links were seen at .14
and more, a link that returns a constant has 0."""

UNMOVED = 0.01
"""Relative change of a link's weights: rounding to bfloat16 on disk alone makes .002, the shortest training .05."""

DOUBTFUL = 0.5
"""Of what the text tells: so much may be missing from the latents of an unsure sender without a fault of its links. It
was .3 to .4 on links that lose nothing where the sender is sure, and 1 on links drawn anew."""

STRUCTURED = 4.0
"""Distance of a spectrum from that of random numbers, in units that do not depend on the shape: 2,000 drawn matrices of
8 to 1,024 rows had .4 to 2.6; the matrices of trained links mostly more than 10."""

BEYOND = 5.0
"""Standard errors by which the largest of uniform numbers may seem to exceed them, since their root mean square is an
estimate."""

OFF_NORMAL = 4.0
"""Standard errors for the fourth moment of normal numbers."""

FROZEN_SHARE = 0.9
"""Of the gains of a link's last LayerNorm, if they are the same number: released ones are exactly 1.000 from the fifth
to the 95th percentile. Those of its first one matter less, since the weights behind them can do the same."""

LEAST_SPREAD = 1 / 3
"""Of the spread of a link's outputs, relative to that of its inputs or of the reader's words, whichever is the smaller:
trained links were seen at .6 and more."""

UNEVEN = 10.0
UNEVEN_AT_ALL = 4.0
STANDS_OUT = 6.0
"""A dimension is uneven if it is 10 times off, or 4 times and by 6 standard deviations of all dimensions: trained links
were seen up to 7 times off, with deviations of 2 times, as embeddings of small worlds have a few large dimensions."""

QUIET_DIMENSIONS = 0.02
"""Share of dimensions that may be too quiet: many embedding tables have a few that are far larger than the others, and
readers do without them. One that is too loud drowns the others."""

FAR = 0.5
"""Distance of rolled-out from teacher-forced states, in units of the latter's norm: trained inner links were seen at up
to .2, redrawn ones at .2 to .9, mostly above this."""


# --- a link by itself -------------------------------------------------------------------------------------------------


def judge_link(figures: LinkFigures) -> tuple[Verdict, ...]:
    """All that is wrong with a link as far as can be seen of it alone, in the order of `ADVICE`."""
    output = figures.output
    if not math.isfinite(output.loudness) or not all(math.isfinite(each.scale) for each in figures.weights.values()):
        return (Verdict(NOT_FINITE, "its weights or outputs hold values that are not numbers"),)
    found = [
        *_wrong_loudness(output),
        *_wrong_variety(output),
        *_wrong_dimensions(output, of=figures.output_size),
        *_wrong_weights(figures),
    ]
    return tuple(found) or (Verdict(UNTRIED, "as far as can be seen of the link by itself"),)


def _wrong_loudness(output: OutputFigures | MessageFigures) -> list[Verdict]:
    times = f"{output.loudness:.2g} times as loud as what its reader is used to"
    if output.loudness > LOUDEST:
        return [Verdict(LOUD, times)]
    return [Verdict(QUIET, times)] if output.loudness < QUIETEST else []


def _wrong_variety(output: OutputFigures) -> list[Verdict]:
    known = [each.spread for each in (output.inputs, output.words) if each.spread is not None]
    if output.outputs.spread is None or not known or output.outputs.spread >= LEAST_SPREAD * min(known):
        return []
    cosines = (decimal(each.cosine, 2) for each in (output.outputs, output.inputs, output.words))
    spreads = (decimal(each.spread, 2) for each in (output.outputs, output.inputs, output.words))
    words = "different words come out alike: cosine {}, {} of what goes in, {} of the reader's words".format(*cosines)
    return [Verdict(COLLAPSED, "{} (spread {}, {}, {})".format(words, *spreads))]


def _wrong_dimensions(output: OutputFigures, *, of: int) -> list[Verdict]:
    loud = {place: ratio for place, ratio in output.uneven.items() if ratio > 1}
    quiet = {place: ratio for place, ratio in output.uneven.items() if ratio < 1}
    if not loud and len(quiet) < max(2, QUIET_DIMENSIONS * of):
        return []
    parts = []
    for which, far in (("loud", loud), ("quiet", quiet)):
        if far:
            furthest = max(far, key=lambda place: abs(math.log(far[place])))
            times = far[furthest] if which == "loud" else 1 / far[furthest]
            parts.append(f"{len(far)} too {which} (dimension {furthest} {times:.2g} times)")
    return [Verdict(UNEVENLY_LOUD, f"of {of} dimensions, {' and '.join(parts)} beside the others")]


def _wrong_weights(figures: LinkFigures) -> list[Verdict]:
    if figures.moved is not None and figures.moved < UNMOVED:
        return [Verdict(UNTRAINED, f"its weights are those it was drawn with (changed by {decimal(figures.moved)})")]
    if all(looks_drawn(weight) for weight in figures.weights.values()):
        spectra = "; ".join(
            f"{name} {_say_spectrum(each.spectrum)}, {_say_spectrum(each.drawn_spectrum)}"
            for name, each in figures.weights.items()
        )
        which = "largest/median/smallest singular value, and of a new link"
        return [Verdict(UNTRAINED, f"its weights cannot be told from random numbers ({which}: {spectra})")]
    last = figures.gains.get("target_norm")
    if last is None or last.share < FROZEN_SHARE:
        return []
    return [Verdict(FROZEN, f"{100 * last.share:.0f}% of the gains of its last LayerNorm are {last.value:.4g}")]


def looks_drawn(weight: WeightFigures) -> bool:
    """Whether a matrix cannot be told from independent numbers, uniform or normal, of whatever size; or is zero."""
    if not weight.scale:
        return True
    is_random = weight.structure <= STRUCTURED
    return is_random and (weight.beyond_uniform <= BEYOND or abs(weight.off_normal) <= OFF_NORMAL)


def _say_spectrum(values: tuple[float, ...]) -> str:
    return f"{values[0]:.2f}/{values[len(values) // 2]:.2f}/{values[-1]:.3f}"


# --- losses -----------------------------------------------------------------------------------------------------------


def lay_losses(hand_off: HandOff) -> Losses:
    """Lay what is lost in a hand-off to sender, reader or links.

    What is lost on questions whose sender is right and sure is the links'. What is lost beyond that on questions whose
    sender is unsure is laid to its doubt, and on those for which it writes another text, to the sender.
    """
    outer, inner = _link_losses(hand_off)
    n = hand_off.sender.n
    text, rollout = hand_off.received["text"].success, hand_off.received["rollout"].success
    n_wrong, wrong = _lost(text, rollout, "wrong")
    n_right, right = _lost(text, rollout, "right")
    n_sure, sure = _lost(text, rollout, "sure")
    n_unsure = n_right - n_sure
    unsure = (n_right * right - n_sure * sure) / n_unsure if n_unsure else 0.0
    # Where the reader fails on the right text, too, nobody can see what the sender's text would have cost.
    unseen = 0.0 if text.wrong is None else 1 - text.wrong.value
    return Losses(
        sender=n_wrong / n * max(wrong - outer - inner, unseen),
        reader=1 - _value(text, "all"),
        doubt=n_unsure / n * max(unsure - outer - inner, 0.0),
        outer=outer,
        inner=inner,
    )


def _link_losses(hand_off: HandOff) -> tuple[float, float]:
    """What the outer and the inner link lose: by success where enough senders are sure, else by cross-entropy.

    An outer link that carries words, or teacher-forced latents, has done its part: the better of the two counts.
    """
    received = hand_off.received
    through = [received[source] for source in ("words", "teacher") if source in received]
    sure = received["text"].success.sure
    if sure is not None and sure.n >= MIN_ROWS:
        text, rollout = (_value(received[source].success, "sure") for source in ("text", "rollout"))
        best = min(max(_value(each.success, "sure") for each in through), text)
        return text - best, max(best - rollout, 0.0)
    right = received["text"].loss.right
    group = "right" if right is not None and right.n >= MIN_ROWS else "all"
    text, rollout, none = (_value(received[source].loss, group) for source in ("text", "rollout", "none"))
    best = max(min(_value(each.loss, group) for each in through), text)
    if none <= text:
        return 0.0, 0.0  # the slot tells the reader nothing, so that nothing can be lost
    # In nats, as shares of what the text tells; then as shares of the questions that it decides.
    outer = min((best - text) / (none - text), 1.0)
    inner = max(min((rollout - text) / (none - text), 1.0) - outer, 0.0)
    if outer + inner < DOUBTFUL:
        return 0.0, 0.0
    decided = max(_value(received["text"].success, "all") - _value(received["none"].success, "all"), 0.0)
    return outer * decided, inner * decided


def _lost(text: Split, rollout: Split, group: str) -> tuple[int, float]:
    """Of some questions: how many they are, and how much less often the reader is right with latents than with text."""
    mean = getattr(text, group)
    return (0, 0.0) if mean is None else (mean.n, mean.value - _value(rollout, group))


def _value(split: Split, group: str) -> float:
    mean = getattr(split, group)
    return math.nan if mean is None else float(mean.value)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judge(figures: EdgeFigures, losses: Losses, untrained: Collection[str] = ()) -> tuple[Verdict, ...]:
    """What the figures say. Causes stand in the order of the chain; those that cost less than half of what the dearest
    one costs stand behind the others. `untrained` says which links were never trained: `outer`, `inner`, or both."""
    if not math.isfinite(figures.message.loudness):
        return (Verdict(NOT_FINITE, "messages hold values that are not numbers, and a run would stop at them"),)
    found = _in_messages(figures.message, losses, untrained) | _in_hand_off(figures.hand_off, losses)
    if not found:
        text, rollout = (_value(figures.hand_off.received[source].success, "all") for source in ("text", "rollout"))
        return (Verdict(HEALTHY, f"reader right for {decimal(rollout, 2)} with latents, {decimal(text, 2)} with text"),)
    dearest = max(cost for cost, _ in found.values())
    order = sorted(found, key=lambda cause: (found[cause][0] < dearest / 2, CAUSES.index(cause)))
    return tuple(Verdict(cause, found[cause][1]) for cause in order)


Found = dict[str, tuple[float, str]]
"""By cause, what it costs (a share of all questions) and the reason."""


def _in_messages(message: MessageFigures, losses: Losses, untrained: Collection[str]) -> Found:
    """Faults that can be seen without a book. They cost what the link costs; if nothing yet, they are named as well."""
    outer, inner = max(losses.outer, NAMED), max(losses.inner, NAMED)
    found: Found = {verdict.cause: (outer, verdict.reason) for verdict in _wrong_loudness(message)}
    if _is_collapsed(message):
        cosines = f"{decimal(message.messages.cosine)}, between the texts {decimal(message.words.cosine)}"
        found[COLLAPSED] = outer, f"cosine between messages of different questions {cosines}"
    for cause, cost, link in ((OUTER_START, outer, "outer"), (INNER_START, inner, "inner")):
        if link in untrained:
            found[cause] = cost, "its weights are, or look like, those it was drawn with"
    return found


def _is_collapsed(message: MessageFigures) -> bool:
    if message.messages.cosine is None or message.words.cosine is None:
        return False
    return 1 - message.messages.cosine < LEAST_VARIETY * (1 - message.words.cosine)


def _in_hand_off(hand_off: HandOff, losses: Losses) -> Found:
    """Faults that the book shows."""
    success = {source: reception.success for source, reception in hand_off.received.items()}
    n, sure = hand_off.sender.n, success["text"].sure
    n_sure = 0 if sure is None else sure.n
    group, where = ("sure", ", where the sender is sure") if n_sure >= MIN_ROWS else ("all", "")
    rates = {source: decimal(_value(split, group), 2) for source, split in success.items()}
    words = f", {rates['words']} with words by the outer link" if "words" in rates else ""
    length = len(hand_off.drift.cosine)
    far = _value(hand_off.drift.mean_distance, "right" if hand_off.drift.mean_distance.right else "all")
    every: Found = {
        SENDER: (losses.sender, f"its own text is right for {decimal(hand_off.sender.value, 2)} of {n} questions"),
        READER: (losses.reader, f"right for {decimal(_value(success['text'], 'all'), 2)} with the text in its slot"),
        DOUBT: (losses.doubt, f"right and sure of its text for {n_sure} of {n} questions"),
        OUTER: (
            losses.outer,
            f"reader right for {rates['text']} with text{words}, {rates['teacher']} with teacher-forced latents{where}",
        ),
        INNER: (
            losses.inner,
            f"reader right for {rates['rollout']} with rolled-out latents{where}; "
            f"distance from teacher-forced states {decimal(far, 2)} of their norm",
        ),
    }
    found = {cause: each for cause, each in every.items() if each[0] >= NAMED}
    missing = _value(success["text"], "all") - _value(success["rollout"], "all")
    if missing >= 2 * NAMED and not found.keys() - {READER}:
        # Many small losses make a large one: the largest of them is named.
        largest = max(every.keys() - {READER}, key=lambda cause: every[cause][0])
        found[largest] = every[largest]
    if far > FAR:
        found[INNER] = every[INNER]
    # Links learn to spare a full stop; more than one token is missed.
    if OUTER in found and hand_off.tokens.value > length + 1:
        found[CUT] = losses.outer, f"{hand_off.tokens.value:.1f} tokens in {length} latents"
    if _is_deaf(hand_off):
        found[DEAF] = 0.0, "with nothing in its slot it writes its text as well as with the note"
    return found


def _is_deaf(hand_off: HandOff) -> bool:
    """Whether the text in the slot changes next to nothing, neither in what is written nor in its probability."""
    text, none = hand_off.received["text"], hand_off.received["none"]
    gained = _value(text.success, "all") - _value(none.success, "all")
    told = 1 - _value(text.loss, "all") / _value(none.loss, "all")
    return gained < NAMED / 2 and told < NAMED / 2
