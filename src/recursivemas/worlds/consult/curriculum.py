"""What the expert and the learner read and write: the turns of the loop, and the text they are pretrained on.

An agent's pretraining text holds what its owner knows and no more: findings that it cannot read are those of another
case (`scramble`), so their meaning cannot be learnt. The cause that is named in a short note, and first in an answer,
is a *sample* of what can be known at that point - the true cause of the drawn case is exactly that - so a frozen agent
is calibrated, and the state from which it names the cause carries the whole belief. Notes that are read were written by
the book: they name the likeliest cause.

The learner has met notes of every kind, whole and broken off: what a frozen reader has never met, no link can teach it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from recursivemas.training.data import RoleSample
from recursivemas.worlds.causes import Cases, Floats, Ints
from recursivemas.worlds.consult.cases import (
    FINDINGS,
    ROLES,
    SENDER,
    VARIANTS,
    CaseWorld,
    Notes,
    Variant,
    answer_text,
    case_text,
    write_notes,
)

Style = Literal["short", "graded", "whole", "name", "cut", "empty"]
Reply = Literal["short", "graded", "whole", "final", "solo"]

NOTE_STYLES: dict[str, dict[Style, float]] = {
    "expert": {"empty": 0.7, "short": 0.12, "graded": 0.1, "whole": 0.08},
    "learner": {"empty": 0.14, "short": 0.22, "graded": 0.22, "whole": 0.16, "name": 0.1, "cut": 0.16},
}
"""Share of each kind of note that a role finds in its slot. `name` is a name and nothing else, with or without a full
stop; `cut` is a note that breaks off."""

REPLIES: dict[str, dict[Reply, float]] = {
    "expert": {"short": 0.3, "graded": 0.2, "whole": 0.15, "solo": 0.35},
    "learner": {"short": 0.12, "graded": 0.1, "whole": 0.06, "final": 0.62, "solo": 0.1},
}
"""Share of each thing that a role is asked to write."""

INFORMED = {"expert": 0.5, "learner": 0.2}
"""Share of notes that a role finds in its slot whose writer had already heard of the other one's findings. All that a
learner says in the running loop is such; that an expert's says so from the second round on."""

NUM_ROUNDS = 2
"""Rounds of the turns that links are trained on: the expert hears of the learner from the second one on."""


def scramble(world: CaseWorld, rng: np.random.Generator, cases: Cases, role: str) -> Ints:
    """The findings as shown in a role's own pretraining text: all but those it can read are of other cases."""
    strangers = world.draw(rng, len(cases))
    return np.where(np.isin(np.arange(cases.values.shape[1]), world.known[role]), cases.values, strangers.values)


def pretraining_turns(world: CaseWorld, rng: np.random.Generator, size: int, *, role: str) -> list[RoleSample]:
    """A batch of an agent's pretraining text. All its turns are of one kind, so they are equally long."""
    cases, shown = _readable_cases(world, rng, size, role)
    reply, style = _choose(rng, REPLIES[role]), _choose(rng, NOTE_STYLES[role])
    has_heard = reply != "solo" and style != "empty"
    received = _received(world, rng, cases, role, style) if has_heard else [""] * size
    belief = world.posterior(cases.values) if has_heard else world.alone(cases.values, role)
    notes = write_notes(belief)
    samples = []
    for row in range(size):
        if reply in VARIANTS:
            target = notes.text(row, reply, cases.cause[row])
        else:
            target = answer_text(cases.cause[row], notes.grades[row])
        samples.append(
            RoleSample(
                role=role,
                question=case_text(shown[row]),
                target=target,
                num_rounds=1 if reply in ("final", "solo") else 2,
                messages={SENDER[role]: received[row]},
                variant=reply if reply in VARIANTS else None,
                solo=reply == "solo",
            )
        )
    return samples


def _readable_cases(world: CaseWorld, rng: np.random.Generator, size: int, role: str) -> tuple[Cases, Ints]:
    """Cases, and how they are shown to a role in pretraining; only shown cases of the training split are kept."""
    cases = world.draw(rng, int(size * 1.25) + 24)
    shown = scramble(world, rng, cases, role)
    kept = np.flatnonzero(world.in_split(shown, "train"))[:size]
    if len(kept) < size:
        return _readable_cases(world, rng, size, role)
    return cases[kept], shown[kept]


def _choose(rng: np.random.Generator, shares: Mapping[Any, float]) -> Any:
    """One of several things, by their shares."""
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def _received(world: CaseWorld, rng: np.random.Generator, cases: Cases, role: str, style: Any) -> list[str]:
    """Notes in the slot of a role, of one style."""
    is_informed = rng.random() < INFORMED[role]
    writer = world.posterior(cases.values) if is_informed else world.alone(cases.values, SENDER[role])
    notes = write_notes(writer)
    rows = range(len(cases))
    if style in VARIANTS:
        return [notes.text(row, style) for row in rows]
    kind: Variant = "short" if style == "name" else VARIANTS[rng.integers(len(VARIANTS))]
    words = {"short": 3, "graded": 6, "whole": 34}[kind]
    length = 1 if style == "name" else int(rng.integers(1, words))
    stop = "." if style == "name" and rng.random() < 0.5 else ""
    return [" ".join(notes.text(row, kind).split()[:length]) + stop for row in rows]


def loop_turns(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
) -> list[RoleSample]:
    """Turns of one role in two rounds, as the text protocol runs it: full notes, and the case as it is."""
    cases = world.draw(rng, num_samples, split=split)
    notes = protocol(world, cases.values)
    rounds = rng.integers(1, NUM_ROUNDS + 1, size=num_samples)
    samples = []
    for row, round_ in enumerate(rounds.tolist()):
        turn = len(ROLES) * (round_ - 1) + ROLES.index(role)
        if turn == len(notes) - 1:
            target = answer_text(cases.cause[row], notes[turn].grades[row])
        else:
            target = notes[turn].text(row, variant, cases.cause[row])
        samples.append(_loop_turn(cases, notes, row, turn, variant, target))
    return samples


def conversations(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
) -> list[list[RoleSample]]:
    """All turns of two rounds, by the book: the likeliest cause in every note and in the answer."""
    cases = world.draw(rng, num_samples, split=split)
    notes = protocol(world, cases.values)
    loops = []
    for row in range(num_samples):
        targets = [each.text(row, variant) for each in notes[:-1]]
        targets.append(answer_text(notes[-1].top[row, 0], notes[-1].grades[row]))
        loops.append([_loop_turn(cases, notes, row, turn, variant, text) for turn, text in enumerate(targets)])
    return loops


def protocol(world: CaseWorld, values: Ints) -> list[Notes]:
    """What faultless agents have to say, turn by turn, if nothing were lost between them: after the first turn, all."""
    first: Floats = world.alone(values, ROLES[0])
    return [write_notes(first), *[write_notes(world.posterior(values))] * (len(ROLES) * NUM_ROUNDS - 1)]


def _loop_turn(cases: Cases, notes: Sequence[Notes], row: int, turn: int, variant: Variant, target: str) -> RoleSample:
    """One turn of the loop: the case as it is, the note of the turn before, and what to write."""
    round_, seat = divmod(turn, len(ROLES))
    return RoleSample(
        role=ROLES[seat],
        question=case_text(cases.values[row]),
        target=target,
        round=round_ + 1,
        num_rounds=NUM_ROUNDS,
        messages={SENDER[ROLES[seat]]: notes[turn - 1].text(row, variant) if turn else ""},
        variant=variant,
    )


def protocol_words() -> str:
    """Every word the prompts and protocols use beside those of `cases.vocabulary`, as one text."""
    case = case_text(np.zeros(sum(map(len, FINDINGS.values())), dtype=np.int64))
    return f"{case} Note: Short note: Graded note: Whole note: Answer: fits best. Grades:"
