"""From the figures of an edge to words: what is lost on it, and the first cause in the chain that explains it.

    sender writes its text -> (is sure of it) -> inner link rolls it out -> outer link carries it -> reader reads it

Every threshold is a constant with its reason. Knows figures; knows nothing of how they were measured.
"""

import math

from recursivemas.audit.records import EdgeFigures, HandOff, Losses, MessageFigures, Split, Verdict
from recursivemas.evaluation.figures import decimal

NOT_FINITE = "not finite"
SENDER = "sender writes the wrong text"
READER = "reader fails on gold text"
DEAF = "reader ignores its slot"
LOUD = "too loud"
QUIET = "too quiet"
COLLAPSED = "collapsed"
OUTER_START = "outer link never trained"
INNER_START = "inner link never trained"
CUT = "text longer than the message"
DOUBT = "sender is unsure"
OUTER = "outer link loses (teacher-forced)"
INNER = "inner link drifts (rolled out)"
HEALTHY = "healthy"
UNTRIED = "no fault seen"

CAUSES = (
    NOT_FINITE, SENDER, READER, DEAF, LOUD, QUIET, COLLAPSED, OUTER_START, INNER_START, CUT, DOUBT, OUTER, INNER,
    HEALTHY, UNTRIED,
)  # fmt: skip
"""All of them, in the order in which those of one edge are named (but see `judge`): what agents do in words, what is
plainly wrong with messages or links, and what is concluded from readers that do worse with latents than with text."""

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

FAR = 0.5
"""Distance of rolled-out from teacher-forced states, in units of the latter's norm: trained inner links were seen at up
to .2, redrawn ones at .2 to .9, mostly above this."""


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


def judge(figures: EdgeFigures, losses: Losses | None) -> tuple[Verdict, ...]:
    """What the figures say. Causes stand in the order of the chain; those that cost less than half of what the dearest
    one costs stand behind the others."""
    if not math.isfinite(figures.message.loudness):
        return (Verdict(NOT_FINITE, "messages hold values that are not numbers, and a run would stop at them"),)
    found = _in_messages(figures, losses)
    if losses is not None and figures.hand_off is not None:
        found |= _in_hand_off(figures.hand_off, losses)
    if not found:
        return (_nothing_found(figures),)
    dearest = max(cost for cost, _ in found.values())
    order = sorted(found, key=lambda cause: (found[cause][0] < dearest / 2, CAUSES.index(cause)))
    return tuple(Verdict(cause, found[cause][1]) for cause in order)


def _nothing_found(figures: EdgeFigures) -> Verdict:
    if figures.hand_off is None:
        return Verdict(UNTRIED, "as far as can be seen without conversations by the book")
    text, rollout = (_value(figures.hand_off.received[source].success, "all") for source in ("text", "rollout"))
    return Verdict(HEALTHY, f"reader right for {decimal(rollout, 2)} with latents, {decimal(text, 2)} with text")


Found = dict[str, tuple[float, str]]
"""By cause, what it costs (a share of all questions) and the reason."""


def _in_messages(figures: EdgeFigures, losses: Losses | None) -> Found:
    """Faults that can be seen without a book. They cost what the link costs; if nothing yet, they are named as well."""
    found: Found = {}
    message = figures.message
    outer, inner = (max(losses.outer, NAMED), max(losses.inner, NAMED)) if losses is not None else (NAMED, NAMED)
    times = f"{message.loudness:.2g} times as loud as what the reader is used to"
    if message.loudness > LOUDEST:
        found[LOUD] = outer, times
    if message.loudness < QUIETEST:
        found[QUIET] = outer, times
    if _is_collapsed(message):
        cosines = f"{decimal(message.cosine)}, between the texts {decimal(message.words_cosine)}"
        found[COLLAPSED] = outer, f"cosine between messages of different questions {cosines}"
    for cause, cost, link in ((OUTER_START, outer, figures.outer), (INNER_START, inner, figures.inner)):
        if link.moved is not None and link.moved < UNMOVED:
            found[cause] = cost, f"its weights are those it was drawn with (changed by {decimal(link.moved)})"
    return found


def _is_collapsed(message: MessageFigures) -> bool:
    if message.cosine is None or message.words_cosine is None:
        return False
    return 1 - message.cosine < LEAST_VARIETY * (1 - message.words_cosine)


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
