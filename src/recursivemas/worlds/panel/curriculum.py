"""What the panel's agents read and write: the turns of the loop, and the text they are pretrained on.

A specialist's pretraining text holds what it knows and no more: its own findings belong to the orchard, everybody
else's are those of another (`scramble`), so their meaning cannot be learnt. The cause of a short report is a *sample*
from what the specialist can know - the true cause of the drawn orchard is exactly that - so a frozen specialist is
calibrated, and the state from which it writes the name carries its whole belief. In longer reports the names come by
the book.

The summarizer reads true reports on an orchard whose findings, as it is shown them, are those of another: it learns
what reports are worth and how they add up, and nothing about findings. A specialist that reads a verdict of the
summarizer repeats its own view; what it would add to it has been said before, and the verdicts in its text are drawn
at random.
"""

from typing import Literal

import numpy as np

from recursivemas.training.data import RoleSample
from recursivemas.worlds.causes import Cases, Ints
from recursivemas.worlds.panel.cases import (
    CAUSES,
    COLUMNS,
    OPENING,
    ROLES,
    SPECIALISTS,
    SUMMARIZER,
    VARIANTS,
    CaseWorld,
    Reports,
    Variant,
    case_text,
    name_text,
    sentence,
)

Style = Literal["short", "graded", "long", "name", "cut", "empty"]

REPORT_KINDS: dict[Style, float] = {"short": 0.27, "graded": 0.27, "long": 0.37, "name": 0.07, "empty": 0.02}
"""Share of each kind of report in what the summarizer reads. As a rule all three are of one kind."""

BROKEN: dict[Style, float] = {"name": 0.05, "cut": 0.05, "empty": 0.06, "short": 0.02, "graded": 0.02, "long": 0.02}
"""Share of reports that are not of that kind: bare names, reports cut short, empty slots and other kinds make the
summarizer robust to whatever else a channel may bring."""

REPLIES: dict[Variant, float] = {"short": 0.5, "graded": 0.15, "long": 0.35}
"""Share of each kind of report a specialist is asked for. A graded report is the beginning of a long one."""

SOLO_SHARE = 0.02
"""Share of the summarizer's turns in which it is asked alone."""

LATER_SHARE = 0.3
"""Share of a specialist's turns in which it has heard a verdict."""

NUM_ROUNDS = 2
"""Rounds of the loops that are shown: the second is like all further ones."""


def scramble(world: CaseWorld, rng: np.random.Generator, cases: Cases, role: str) -> Ints:
    """The findings as shown in a role's own pretraining text: all but its own are taken from other orchards."""
    shown = world.draw(rng, len(cases)).values
    if role != SUMMARIZER:
        shown[:, COLUMNS[role]] = cases.values[:, COLUMNS[role]]
    return shown


# --- the loop ---------------------------------------------------------------------------------------------------------


def loop_turns(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
) -> list[RoleSample]:
    """Turns of one role in a loop of two rounds, as the text protocol runs it: whole reports, and the case as it
    is."""
    cases = world.draw(rng, num_samples, split=split)
    reports = {each: world.reports(cases.values, each) for each in SPECIALISTS}
    verdicts = world.verdict(reports, variant)
    rounds = rng.integers(1, NUM_ROUNDS + 1, size=num_samples).tolist()
    samples = []
    for row, round_ in enumerate(rounds):
        true_cause = name_text(cases.cause[row])
        target = true_cause if role == SUMMARIZER or variant == "short" else reports[role].text(row, variant)
        samples.append(_loop_turn(cases, reports, verdicts, row, role, round_, variant, target))
    return samples


def conversations(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
) -> list[list[RoleSample]]:
    """All turns of the loop, by the book: the likeliest cause in every report and in the verdict."""
    cases = world.draw(rng, num_samples, split=split)
    reports = {role: world.reports(cases.values, role) for role in SPECIALISTS}
    verdicts = world.verdict(reports, variant)
    loops = []
    for row in range(num_samples):
        targets = {role: reports[role].text(row, variant) for role in SPECIALISTS}
        targets[SUMMARIZER] = name_text(verdicts[row])
        loops.append(
            [
                _loop_turn(cases, reports, verdicts, row, role, round_, variant, targets[role])
                for round_ in range(1, NUM_ROUNDS + 1)
                for role in ROLES
            ]
        )
    return loops


def _loop_turn(
    cases: Cases,
    reports: dict[str, Reports],
    verdicts: Ints,
    row: int,
    role: str,
    round_: int,
    variant: Variant,
    target: str,
) -> RoleSample:
    """One turn of the loop: the case as it is, what the role is sent, and what it writes."""
    if role == SUMMARIZER:
        messages = {each: reports[each].text(row, variant) for each in SPECIALISTS}
    else:
        messages = {SUMMARIZER: name_text(verdicts[row]) if round_ > 1 else ""}
    return RoleSample(
        role=role,
        question=case_text(cases.values[row]),
        target=target,
        round=round_,
        num_rounds=NUM_ROUNDS,
        messages=messages,
        variant=variant,
    )


# --- pretraining ------------------------------------------------------------------------------------------------------


def pretraining_turns(
    world: CaseWorld, rng: np.random.Generator, size: int, *, role: str, is_drill: bool
) -> list[RoleSample]:
    """Turns from an agent's pretraining text. In a drill the case is told without what the role cannot read
    anyway."""
    cases, shown = _readable_cases(world, rng, size, role)
    if role == SUMMARIZER:
        questions = [OPENING if is_drill else case_text(values) for values in shown]
        return _summarizer_turns(world, rng, cases, questions)
    questions = [sentence(values, role) if is_drill else case_text(values) for values in shown]
    return _specialist_turns(world, rng, cases, questions, role)


def _readable_cases(world: CaseWorld, rng: np.random.Generator, size: int, role: str) -> tuple[Cases, Ints]:
    """Orchards, and their case as shown to a role in pretraining; only shown cases of the training split are kept."""
    cases = world.draw(rng, int(size * 1.25) + 24)
    shown = scramble(world, rng, cases, role)
    kept = np.flatnonzero(world.in_split(shown, "train"))[:size]
    if len(kept) < size:
        return _readable_cases(world, rng, size, role)
    return cases[kept], shown[kept]


def _specialist_turns(
    world: CaseWorld, rng: np.random.Generator, cases: Cases, questions: list[str], role: str
) -> list[RoleSample]:
    reports = world.reports(cases.values, role)
    replies: list[Variant] = rng.choice(list(REPLIES), p=list(REPLIES.values()), size=len(cases)).tolist()
    is_later = (rng.random(len(cases)) < LATER_SHARE).tolist()
    verdicts = rng.integers(len(CAUSES), size=len(cases)).tolist()
    styles = rng.choice(["whole", "name", "empty"], p=[0.8, 0.1, 0.1], size=len(cases)).tolist()
    return [
        RoleSample(
            role=role,
            question=questions[row],
            target=name_text(cases.cause[row]) if reply == "short" else reports.text(row, reply),
            round=2 if is_later[row] else 1,
            num_rounds=3,
            messages={SUMMARIZER: _heard(verdicts[row], styles[row])},
            variant=reply,
        )
        for row, reply in enumerate(replies)
    ]


def _heard(cause: int, style: str) -> str:
    """A verdict as a specialist finds it: whole, without its full stop, or missing."""
    return {"whole": name_text(cause), "name": CAUSES[cause], "empty": ""}[style]


def _summarizer_turns(
    world: CaseWorld, rng: np.random.Generator, cases: Cases, questions: list[str]
) -> list[RoleSample]:
    reports = {role: world.reports(cases.values, role) for role in SPECIALISTS}
    kinds = rng.choice(list(REPORT_KINDS), p=list(REPORT_KINDS.values()), size=len(cases)).tolist()
    options = ["whole", *BROKEN]
    shares = [1 - sum(BROKEN.values()), *BROKEN.values()]
    styles = rng.choice(options, p=shares, size=(len(cases), len(SPECIALISTS))).tolist()
    is_solo = (rng.random(len(cases)) < SOLO_SHARE).tolist()
    return [
        RoleSample(
            role=SUMMARIZER,
            question=questions[row],
            target=name_text(cases.cause[row]) if not is_solo[row] else name_text(rng.integers(len(CAUSES))),
            messages={
                role: _received(rng, reports[role], row, kind if style == "whole" else style)
                for role, style in zip(SPECIALISTS, styles[row], strict=True)
            },
            solo=is_solo[row],
        )
        for row, kind in enumerate(kinds)
    ]


def _received(rng: np.random.Generator, reports: Reports, row: int, style: Style) -> str:
    """A report as the summarizer finds it: whole, only its first name, broken off after some words, or missing."""
    if style == "empty":
        return ""
    if style == "name":
        return reports.text(row, "short").rstrip(".")
    if style == "cut":
        words = reports.text(row, "long").split()
        return " ".join(words[: rng.integers(2, len(words))])
    return reports.text(row, style)


def protocol_words() -> str:
    """Every word the prompts and protocols use beside those of `cases.vocabulary`, as one text."""
    case = case_text(np.zeros(sum(map(len, COLUMNS.values())), dtype=int))
    reports = " ".join(f"{name.capitalize()} report:" for name in VARIANTS)
    return f"{case} Botanist: Zoologist: Chemist: Verdict: {reports}"
