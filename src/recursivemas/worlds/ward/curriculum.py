"""What the ward's agents read and write: the turns of the loop, and the text they are pretrained on.

An agent's pretraining text holds what its owner knows and no more: its own findings belong to the patient, everybody
else's are those of some other patient (`scramble`), so their meaning cannot be learnt. The disease of a short note and
of the diagnosis is a *sample* from what the agent can know at that point - the true disease of the drawn patient is
exactly that - so a frozen agent is calibrated, and the state from which it writes the name carries the whole belief.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, SupportsIndex

import numpy as np

from recursivemas.training.data import RoleSample
from recursivemas.worlds.ward.cases import (
    COLUMN,
    FINDINGS,
    NUM_ROUNDS,
    PHRASES,
    ROLES,
    SENDER,
    UNKNOWN,
    VARIANTS,
    Cases,
    CaseWorld,
    Ints,
    Notes,
    Variant,
    answer_text,
    case_text,
    in_split,
    key_words,
    short_note,
    softmax,
    write_note,
)

Style = Literal["short", "graded", "name", "cut", "empty"]

NOTE_STYLES: dict[Style, float] = {"short": 0.45, "graded": 0.34, "name": 0.06, "cut": 0.06, "empty": 0.09}
"""Share of each kind of note an agent finds in its slot. Whole notes are what the text protocols send; bare names,
notes cut short and empty slots make readers robust to whatever else a channel may bring."""

REPLIES = {
    "planner": {"short": 0.5, "graded": 0.5},
    "critic": {"short": 0.5, "graded": 0.5},
    "solver": {"short": 0.22, "graded": 0.42, "final": 0.30, "solo": 0.06},
}
"""Share of each thing a role is asked to write. To list three diseases and none twice takes an agent longest to learn,
so the solver writes more graded notes than short ones."""

ROUND_SHARES = {"planner": (0.2, 0.4, 0.4), "critic": (0.5, 0.25, 0.25), "solver": (0.6, 0.2, 0.2)}
"""Share of each round in pretraining; a role sees more of the rounds in which it has something of its own to add."""

LAST_TURN = len(ROLES) * NUM_ROUNDS - 1
"""The turn in which the solver answers, counted from 0."""

OWN_COLUMNS = {role: np.array([finding.owner == role for finding in FINDINGS]) for role in ROLES}


def scramble(world: CaseWorld, rng: np.random.Generator, cases: Cases, role: str) -> Ints:
    """The findings as shown in a role's own pretraining text: all but its own are taken from other patients."""
    strangers = world.draw(rng, len(cases))
    return np.where(OWN_COLUMNS[role], cases.values, strangers.values)


def loop_turns(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
) -> list[RoleSample]:
    """Turns of one role in the three-round loop, as the text protocol runs it: full notes, and the case as it is."""
    cases = world.draw(rng, num_samples, split=split)
    notes = world.protocol(cases, variant)
    rounds = rng.integers(1, NUM_ROUNDS + 1, size=num_samples)
    samples = []
    for row, round_ in enumerate(rounds.tolist()):
        turn = len(ROLES) * (round_ - 1) + ROLES.index(role)
        if turn == LAST_TURN:
            target = answer_text(cases.disease[row])
        else:
            target = _reply(notes[turn], row, variant, cases.disease[row])
        samples.append(_loop_turn(cases, notes, row, turn, variant, target))
    return samples


def conversations(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
) -> list[list[RoleSample]]:
    """All turns of the three-round loop, by the book: the likeliest disease in every note and in the answer."""
    cases = world.draw(rng, num_samples, split=split)
    notes = world.protocol(cases, variant)
    loops = []
    for row in range(num_samples):
        targets = [note.text(row, variant) for note in notes[:LAST_TURN]]
        targets.append(answer_text(notes[LAST_TURN].top[row, 0]))
        loops.append([_loop_turn(cases, notes, row, turn, variant, text) for turn, text in enumerate(targets)])
    return loops


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


def _reply(note: Notes, row: int, variant: Variant, disease: SupportsIndex) -> str:
    """The note a role writes in its text: a graded one by the book, a short one with the disease sampled."""
    if variant == "graded":
        return note.graded(row)
    return short_note(disease, note.exposure[row], note.stage[row])


def pretraining_turns(world: CaseWorld, rng: np.random.Generator, size: int, *, role: str) -> list[RoleSample]:
    """Turns from an agent's pretraining text: mixed rounds, notes and replies, foreign findings scrambled."""
    cases, shown = _readable_cases(world, rng, size, role)
    notes = {variant: world.protocol(cases, variant) for variant in VARIANTS}
    unknown = np.full(size, UNKNOWN)
    alone = write_note(
        softmax(world.direct_evidence(cases, role)), cases.exposure if role == "solver" else unknown, unknown
    )
    replies = rng.choice(list(REPLIES[role]), p=list(REPLIES[role].values()), size=size).tolist()
    styles = rng.choice(list(NOTE_STYLES), p=list(NOTE_STYLES.values()), size=size).tolist()
    rounds = (1 + rng.choice(NUM_ROUNDS, p=ROUND_SHARES[role], size=size)).tolist()
    samples = []
    for row, (round_, style, reply) in enumerate(zip(rounds, styles, replies, strict=True)):
        turn = len(ROLES) * (round_ - 1) + ROLES.index(role)
        if turn == 0 or reply == "solo" or style == "empty":
            received, answer = "", alone
            keys = int(answer.exposure[row]), UNKNOWN
        elif style in VARIANTS:
            received, answer = notes[style][turn - 1].text(row, style), notes[style][turn]
            keys = int(answer.exposure[row]), int(answer.stage[row])
        else:
            received, exposure = _broken_note(rng, notes, turn - 1, row, style)
            keys = _conclude(cases, row, role, exposure)
            reply = "short" if reply == "graded" else reply  # the protocol does not say what such notes are worth
        if reply in ("final", "solo"):
            target = answer_text(cases.disease[row])
        else:
            target = short_note(cases.disease[row], *keys) if reply == "short" else answer.graded(row)
        samples.append(
            RoleSample(
                role=role,
                question=case_text(shown[row]),
                target=target,
                round=round_,
                num_rounds=round_ + (reply not in ("final", "solo")),
                messages={SENDER[role]: received},
                variant=reply if reply in VARIANTS else None,
                solo=reply == "solo",
            )
        )
    return samples


def _readable_cases(world: CaseWorld, rng: np.random.Generator, size: int, role: str) -> tuple[Cases, Ints]:
    """Patients, and their case as shown to a role in pretraining; only shown cases of the training split are kept."""
    cases = world.draw(rng, int(size * 1.25) + 24)
    shown = scramble(world, rng, cases, role)
    kept = np.flatnonzero(in_split(shown, "train"))[:size]
    if len(kept) < size:
        return _readable_cases(world, rng, size, role)
    return cases[kept], shown[kept]


def _broken_note(
    rng: np.random.Generator, notes: Mapping[Variant, list[Notes]], turn: int, row: int, style: str
) -> tuple[str, int]:
    """A note of a turn that is only a name, or breaks off after some words; with it, the exposure if it is told."""
    short, graded = notes["short"][turn], notes["graded"][turn]
    if style == "name":
        return answer_text(short.top[row, 0]).rstrip("." if rng.random() < 0.5 else ""), UNKNOWN
    note = short if rng.random() < 0.5 else graded
    words = (short.short(row) if note is short else graded.graded(row)).split()
    num_words = 2 if note is short else int(rng.integers(1, len(words)))
    return " ".join(words[:num_words]), int(note.exposure[row]) if num_words == len(words) - 1 else UNKNOWN


def _conclude(cases: Cases, row: int, role: str, exposure: int) -> tuple[int, int]:
    """The keys a role passes on, having been told at most the exposure."""
    if role == "critic" and exposure != UNKNOWN:
        return exposure, int(cases.stage[row])
    return int(cases.exposure[row]) if role == "solver" else exposure, UNKNOWN


def drills(world: CaseWorld, rng: np.random.Generator, size: int) -> list[RoleSample]:
    """Textbook sentences of the planner: one rotated finding and its key, without a patient around them.

    From whole cases alone a small model does not find out that a word's meaning turns with the key.
    """
    samples = []
    kinds = rng.integers(2, size=size).tolist()
    words, exposures, stages = rng.integers(4, size=(3, size))
    for kind, word, exposure, stage in zip(kinds, words, exposures, stages, strict=True):
        if kind == 0:
            name, key, stage = "dreams", exposure, UNKNOWN
        else:
            name, key = "hands", stage
        belief = world.keyed_likelihood(name, int(key))[word]
        disease = int(rng.choice(len(belief), p=belief / belief.sum()))
        samples.append(
            RoleSample(
                role="planner",
                question=f"A patient has {PHRASES[COLUMN[name]][word]}.",
                target=short_note(disease, exposure, stage),
                round=2 if kind == 0 else 3,
                num_rounds=NUM_ROUNDS,
                messages={"solver": f"{key_words(exposure, stage)}."},
                variant="short",
            )
        )
    return samples


def protocol_words() -> str:
    """Every word the prompts and protocols use beside those of `cases.vocabulary`, as one text."""
    return f"{case_text(np.zeros(len(FINDINGS), dtype=int))} Note: Short note: Graded note: Diagnosis:"
