"""What the desk's agents read and write: the turns of the loop, and the text they are pretrained on.

An agent's pretraining text holds what its owner knows and no more: words that it cannot read are those of another case
(`scramble`), so their meaning cannot be learnt. The record of a short note, and that of the search that hits, is a
*sample* from what the agent can know at that point - the one of the drawn case is exactly that - so a frozen agent is
calibrated. Searches that fail are in the text, but are not learnt from: they are drawn from the same belief, and what
is learnt is the search after them. So the first is as probable as the record is, and each further one as it is once
those before have failed. What a tool says is read, and never learnt.

From cases alone the tool-caller does not find out in any time that a search which has failed must not be made again:
that is a circuit of its own, for which there is a drill (`_short_lists`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from recursivemas.training.data import RoleSample
from recursivemas.worlds.causes import Floats, Ints
from recursivemas.worlds.desk.cases import (
    GRADE_VALUES,
    GRADES,
    NUM_NAMED,
    NUM_ROUNDS,
    NUM_SEARCHES,
    OPERATIONS,
    OWN,
    RECORDS,
    ROLES,
    SENDER,
    TASK,
    TURNING,
    TYPES,
    VARIANTS,
    WORDS,
    Cases,
    CaseWorld,
    Notes,
    Variant,
    case_text,
    graded_note,
    program_text,
    result_of,
    short_note,
)

Span = tuple[int, int]
Kind = Literal["note", "key", "work", "alone", "list", "solo"]

KINDS: dict[str, dict[Kind, float]] = {
    "reflector": {"note": 0.66, "key": 0.3, "solo": 0.04},
    "toolcaller": {"note": 0.2, "work": 0.42, "alone": 0.06, "list": 0.32},
}
"""Share of each kind of batch. `key` and `list` are drills; `work` is an answer with its calls, `alone` one without
a note, and `solo` the answer of a reflector by itself."""

LATER_SHARE = 0.65
"""Share of the reflector's notes that are of the second round, in which it has a clue to turn."""

MISSES = (0.35, 0.3, 0.2, 0.15)
"""Share of answers before which 0, 1, 2 searches fail, or all three: then the answer is `unknown`."""

NONE = "none"
"""What a search says that finds nothing."""
LAST_TURN = len(ROLES) * NUM_ROUNDS - 1


def scramble(world: CaseWorld, rng: np.random.Generator, cases: Cases, role: str) -> Ints:
    """The words as shown in a role's own pretraining text: all but those it can read are of other cases."""
    strangers = world.draw(rng, len(cases))
    return np.where(np.isin(np.arange(len(WORDS)), OWN[role]), cases.values, strangers.values)


# --- answers with their calls -----------------------------------------------------------------------------------------


def search_text(record: int, result: str) -> str:
    """A search and what it says."""
    return f"<search>{RECORDS[record]}</search><result>{result}</result>"


def answer_text(target: str) -> str:
    """How a transcript ends."""
    return f"answer {target}."


def work_text(record: int, content: int, operation: int, number: int) -> str:
    """The search that hits, the sum, and the answer."""
    result = str(result_of(content, operation, number))
    program = program_text(content, operation, number)
    found = search_text(record, str(content))
    return f"{found}<python>{program}</python><result>{result}</result> {answer_text(result)}"


def transcript(cases: Cases, row: int, operation: int, misses: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
    """An answer of which some searches fail, and where the records stand that these are for: they are not judged."""
    text, spans = "", []
    for record in misses:
        begin = len(text) + len("<search>")
        spans.append((begin, begin + len(RECORDS[record])))
        text += search_text(record, NONE)
    if len(misses) == NUM_SEARCHES:
        return f"{text} {answer_text('unknown')}", tuple(spans)
    record, content, number = (int(each[row]) for each in (cases.record, cases.content, cases.number))
    return text + work_text(record, content, operation, number), tuple(spans)


def by_the_book(cases: Cases, row: int, operation: int, belief: Floats) -> str:
    """The answer of who always searches for the likeliest record."""
    order = np.argsort(-belief).tolist()[:NUM_SEARCHES]
    record = int(cases.record[row])
    return transcript(cases, row, operation, order[: order.index(record)] if record in order else order)[0]


# --- the loop ---------------------------------------------------------------------------------------------------------


def loop_turns(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, role: str, variant: Variant
) -> list[RoleSample]:
    """Turns of one role in the loop, as the text protocol runs it: full notes, and the case as it is."""
    cases = world.draw(rng, num_samples, split=split)
    notes = world.protocol(cases.values, variant)
    rounds = rng.integers(1, NUM_ROUNDS + 1, size=num_samples)
    samples = []
    for row, round_ in enumerate(rounds.tolist()):
        turn = len(ROLES) * (round_ - 1) + ROLES.index(role)
        if turn == LAST_TURN:
            record, content, number = (int(each[row]) for each in (cases.record, cases.content, cases.number))
            target = work_text(record, content, int(notes[turn].operation[row]), number)
        else:
            target = notes[turn].text(row, variant, cases.record[row])
        samples.append(_loop_turn(cases, notes, row, turn, variant, target))
    return samples


def conversations(
    world: CaseWorld, rng: np.random.Generator, num_samples: int, *, split: str, variant: Variant
) -> list[list[RoleSample]]:
    """All turns of the loop, by the book: the likeliest record in every note, and in every search."""
    cases = world.as_filed(world.draw(rng, num_samples, split=split))
    notes = world.protocol(cases.values, variant)
    loops = []
    for row in range(num_samples):
        targets = [note.text(row, variant) for note in notes[:LAST_TURN]]
        last = notes[LAST_TURN]
        targets.append(by_the_book(cases, row, int(last.operation[row]), last.belief[row]))
        loops.append([_loop_turn(cases, notes, row, turn, variant, text) for turn, text in enumerate(targets)])
    return loops


def _loop_turn(cases: Cases, notes: Sequence[Notes], row: int, turn: int, variant: Variant, target: str) -> RoleSample:
    """One turn of the loop: the case as it is, the note of the turn before, and what to write."""
    round_, seat = divmod(turn, len(ROLES))
    return RoleSample(
        role=ROLES[seat],
        question=case_text(cases.values[row], cases.number[row]),
        target=target,
        round=round_ + 1,
        num_rounds=NUM_ROUNDS,
        messages={SENDER[ROLES[seat]]: notes[turn - 1].text(row, variant) if turn else ""},
        variant=variant,
    )


# --- pretraining ------------------------------------------------------------------------------------------------------


def pretraining_turns(world: CaseWorld, rng: np.random.Generator, size: int, *, role: str) -> list[RoleSample]:
    """A batch of an agent's pretraining text. All its turns are of one kind."""
    kind = _choose(rng, KINDS[role])
    if kind == "list":
        return _short_lists(world, rng, size)
    if kind == "key":
        return _turned_clues(world, rng, 2 * size)
    cases, shown = _readable_cases(world, rng, size, role)
    if kind == "note":
        return _notes(world, rng, cases, shown, role)
    if kind == "solo":
        return _guesses(world, cases, shown)
    return _works(world, rng, cases, shown, is_alone=kind == "alone")


def _readable_cases(world: CaseWorld, rng: np.random.Generator, size: int, role: str) -> tuple[Cases, Ints]:
    """Cases, and how they are shown to a role in pretraining; only shown cases of the training split are kept."""
    cases = world.draw(rng, int(size * 1.25) + 24)
    shown = scramble(world, rng, cases, role)
    kept = np.flatnonzero(world.in_split(shown, "train"))[:size]
    if len(kept) < size:
        return _readable_cases(world, rng, size, role)
    return cases[kept], shown[kept]


def _notes(world: CaseWorld, rng: np.random.Generator, cases: Cases, shown: Ints, role: str) -> list[RoleSample]:
    """Notes to the other role, in any round in which there is something to say."""
    received, reply = (VARIANTS[place] for place in rng.integers(len(VARIANTS), size=2))
    turn = ROLES.index(role) if role == "toolcaller" else 2 * int(rng.random() < LATER_SHARE)
    notes = world.protocol(cases.values, received)
    samples = []
    for row in range(len(cases)):
        samples.append(
            RoleSample(
                role=role,
                question=case_text(shown[row], cases.number[row]),
                target=notes[turn].text(row, reply, cases.record[row]),
                round=1 + turn // len(ROLES),
                num_rounds=NUM_ROUNDS,
                messages={SENDER[role]: notes[turn - 1].text(row, received) if turn else ""},
                variant=reply,
            )
        )
    return samples


def _guesses(world: CaseWorld, cases: Cases, shown: Ints) -> list[RoleSample]:
    """The reflector's answer when it is asked alone: it knows what to do with a number, and not the number."""
    operation, _ = world.keys(cases.values)
    return [
        RoleSample(
            role="reflector",
            question=case_text(shown[row], cases.number[row]),
            target=answer_text(str(result_of(cases.content[row], operation[row], cases.number[row]))),
            solo=True,
        )
        for row in range(len(cases))
    ]


def _works(
    world: CaseWorld, rng: np.random.Generator, cases: Cases, shown: Ints, *, is_alone: bool
) -> list[RoleSample]:
    """Answers of the tool-caller, after either round, with notes of either kind or without any."""
    variant = VARIANTS[rng.integers(len(VARIANTS))]
    round_ = 1 if is_alone else int(rng.integers(1, NUM_ROUNDS + 1))
    notes = world.protocol(cases.values, variant)
    turn = len(ROLES) * round_ - 1
    belief = world.alone(cases.values, "toolcaller") if is_alone else notes[turn].belief
    samples = []
    for row in range(len(cases)):
        number = int(rng.choice(len(MISSES), p=MISSES))
        misses = _misses(rng, belief[row], int(cases.record[row]), number)
        text, unjudged = transcript(cases, row, int(notes[turn].operation[row]), misses)
        samples.append(
            RoleSample(
                role="toolcaller",
                question=case_text(shown[row], cases.number[row]),
                target=text,
                round=round_,
                num_rounds=round_,
                messages={"reflector": "" if is_alone else notes[turn - 1].text(row, variant)},
                unjudged=unjudged,
            )
        )
    return samples


def _misses(rng: np.random.Generator, belief: Floats, record: int, number: int) -> list[int]:
    """Searches that fail: drawn from a belief, none twice, and the record that is meant not among them."""
    weights = belief + 1e-4
    weights[record] = 0.0
    chosen: list[int] = rng.choice(len(weights), size=number, replace=False, p=weights / weights.sum()).tolist()
    return chosen


def _short_lists(world: CaseWorld, rng: np.random.Generator, size: int) -> list[RoleSample]:
    """Drill of the tool-caller: a list of three records, one of which is meant, and nothing else to go by.

    It is worked through: what has failed is not searched for again.
    """
    cases = world.draw(rng, size)
    operations, types = rng.integers(len(OPERATIONS), size=size), rng.integers(len(TYPES) + 1, size=size)
    samples = []
    for row in range(size):
        listed = rng.permutation(len(RECORDS))[:NUM_NAMED].tolist()
        grades = np.sort(rng.integers(len(GRADES), size=NUM_NAMED))[::-1]
        belief = np.full(len(RECORDS), 1e-9)
        belief[listed] = np.array(GRADE_VALUES)[grades]
        record = int(rng.choice(len(RECORDS), p=belief / belief.sum()))
        cases.record[row] = record
        weights = np.where(np.arange(len(RECORDS)) == record, 0.0, belief)
        number = int(rng.integers(NUM_NAMED))
        misses = rng.choice(len(RECORDS), size=number, replace=False, p=weights / weights.sum()).tolist()
        operation = int(operations[row])
        text, unjudged = transcript(cases, row, operation, misses)
        samples.append(
            RoleSample(
                role="toolcaller",
                question=f"Task with {cases.number[row]}.",
                target=text,
                messages={"reflector": graded_note(listed, grades.tolist(), operation, int(types[row]))},
                unjudged=unjudged,
            )
        )
    return samples


def _turned_clues(world: CaseWorld, rng: np.random.Generator, size: int) -> list[RoleSample]:
    """Drill of the reflector: the clue that turns and a type, without a case around them.

    From whole cases alone a small model does not find out that a word's meaning turns with the type, and from too few
    drills neither: it takes some 350 batches. They are short, so such a batch holds twice as many.
    """
    types, words, tasks = (
        rng.integers(most, size=size) for most in (len(TYPES), len(WORDS[TURNING]), len(WORDS[TASK]))
    )
    samples = []
    for type_, word, task in zip(types.tolist(), words.tolist(), tasks.tolist(), strict=True):
        likelihood = world.turning[type_, word]
        record = int(rng.choice(len(RECORDS), p=likelihood / likelihood.sum()))
        samples.append(
            RoleSample(
                role="reflector",
                question=f"Clues {WORDS[TURNING][word]}, task {WORDS[TASK][task]}.",
                target=short_note(record, int(world.operation_of[task]), type_),
                round=2,
                num_rounds=NUM_ROUNDS,
                messages={"toolcaller": f"{TYPES[type_]}."},
                variant="short",
            )
        )
    return samples


def _choose(rng: np.random.Generator, shares: Mapping[Any, float]) -> Any:
    """One of several things, by their shares."""
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def protocol_words() -> str:
    """Every word the prompts and protocols use beside those of `cases.vocabulary`, as one text."""
    case = case_text(np.zeros(len(WORDS), dtype=int), 10)
    signs = "0 1 2 3 4 5 6 7 8 9 + - *"
    return f"{case} Task with Note: Short note: Graded note: Work: Answer: answer unknown. none {signs}"
