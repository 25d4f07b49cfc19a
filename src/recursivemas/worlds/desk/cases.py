"""The desk world: sums about records that are on file, of which a clerk knows the drawer and another the name.

Somebody comes to a desk with a few clues and a task. Exactly one of sixteen records is meant, and what stands in it, a
number, is drawn anew for every question: nobody can know it without a search. The task is a number and a word of the
trade for what is to be done with both. Reflector and tool-caller both read the whole question. What they know differs:

* **reflector**: what two of the clues say about the record, and the words of the trade (plus, minus, times). The third
  clue *turns*: it says something under a type of file only, and of types the reflector knows nothing;
* **toolcaller**: what two words about the file say about the record, the type of file that its binding means, and how
  tools are called.

So the reflector's first note has its two clues, the tool-caller's note adds the file and its type, and only then, in
the second round, does the third clue count: `belief` is exact for either round. A search says what stands in a record
if it is the one that is meant, and `none` otherwise; there are three, and then an answer is a guess. `within` is what
they are worth at best. This module holds cases, probabilities and texts; it needs numpy alone. It knows nothing of
models, links or latents.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from recursivemas.worlds.causes import Floats, Ints
from recursivemas.worlds.splits import bucket_of, is_in

Variant = Literal["short", "graded"]
VARIANTS: tuple[Variant, ...] = ("short", "graded")

ROLES = ("reflector", "toolcaller")
SENDER = {"reflector": "toolcaller", "toolcaller": "reflector"}
"""Whose note a role reads."""
NUM_ROUNDS = 2
NUM_SEARCHES = 3

RECORDS = (
    "alderby", "brackwell", "corrin", "dunmere", "elsworth", "farrowby", "gilpin", "harkness",
    "ivering", "jessop", "kelmar", "lorimer", "marwood", "netherby", "oakhurst", "pemberly",
)  # fmt: skip
OPERATIONS = ("plus", "minus", "times")
SYMBOLS = ("+", "-", "*")
TYPES = ("charter", "ledger", "register", "roster")
UNTYPED = len(TYPES)
"""Stands in the place of a type that is not known."""
GRADES = ("unlikely", "possible", "likely", "certain")
GRADE_THRESHOLDS = (0.12, 0.35, 0.7)
GRADE_VALUES = (0.06, 0.2, 0.5, 0.85)
"""What the protocols take a grade for."""
NAMED = 0.5
"""What they take the one record for that a short note names."""
NUM_NAMED = 3
"""Records that a graded note names."""

WORDS: tuple[tuple[str, ...], ...] = (
    ("crimson", "ivory", "indigo", "umber", "saffron", "teal"),
    ("braided", "knotted", "coiled", "plaited", "twisted", "frayed"),
    ("lantern", "anchor", "compass", "hourglass"),
    ("folded", "rolled", "tied", "pinned", "sewn", "loose"),
    ("inky", "faded", "smudged", "pencilled", "typed", "stamped"),
    ("brass", "pewter", "nickel", "zinc", "bronze", "silver", "iron", "steel", "leather", "linen", "velvet", "canvas"),
    ("reckon", "fettle", "garner", "quillet", "trindle", "swaddle", "burnish", "collate", "whittle", "ravel", "muster",
     "temper"),
)  # fmt: skip
"""Words of every column of a case: three clues, two words about the file and its binding, and the task."""
CLUES, TURNING, FILE, BINDING, TASK = [0, 1], 2, [3, 4], 5, 6
OWN = {"reflector": [*CLUES, TURNING, TASK], "toolcaller": [*FILE, BINDING]}
"""The columns that each role can read."""

QUESTION = "Clues {} {} {}, file {} {} {}, task {} with {}."
_QUESTION = re.compile(r"\s*Clues (\w+) (\w+) (\w+), file (\w+) (\w+) (\w+), task (\w+) with (\d\d)\.\s*")
NUMBERS = (10, 100)
"""Numbers of tasks and records, from and below."""

CLUE_SPREAD, FILE_SPREAD, TURNING_SPREAD = 1.1, 0.7, 3.0
"""How much a word tells: the standard deviation of its log likelihoods."""


@dataclass(frozen=True, kw_only=True)
class Cases:
    """A batch of cases as arrays: words by their place in `WORDS`, numbers, and the hidden truth."""

    values: Ints  # (case, column)
    number: Ints  # (case,): of the task
    record: Ints  # (case,): the one that is meant
    content: Ints  # (case,): the number in it

    def __len__(self) -> int:
        return len(self.record)

    def __getitem__(self, chosen: Ints | slice | NDArray[np.bool_]) -> "Cases":
        return Cases(
            values=self.values[chosen],
            number=self.number[chosen],
            record=self.record[chosen],
            content=self.content[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What one role has to say, for a batch of cases."""

    belief: Floats  # (case, record)
    top: Ints  # (case, NUM_NAMED): the most probable records, best first
    grades: Ints  # (case, NUM_NAMED)
    operation: Ints  # (case,)
    type: Ints  # (case,)

    def text(self, row: int, variant: Variant, record: SupportsIndex | None = None) -> str:
        """A note; the record that a short one names is the most probable one unless another is given."""
        keys = int(self.operation[row]), int(self.type[row])
        if variant == "short":
            return short_note(self.top[row, 0] if record is None else record, *keys)
        return graded_note(self.top[row].tolist(), self.grades[row].tolist(), *keys)


# --- texts ------------------------------------------------------------------------------------------------------------


def case_text(values: Ints, number: SupportsIndex) -> str:
    """The question as both read it; `values` is one row of `Cases.values`."""
    return QUESTION.format(*[words[value] for words, value in zip(WORDS, values, strict=True)], int(number))


def key_words(operation: int, type_: int) -> str:
    """What a note ends with: the operation, and the type of file if it is known."""
    return f"{OPERATIONS[operation]} {[*TYPES, 'untyped'][type_]}."


def short_note(record: SupportsIndex, operation: int, type_: int) -> str:
    """`corrin times ledger.`: four tokens."""
    return f"{RECORDS[record]} {key_words(operation, type_)}"


def graded_note(records: Sequence[int], grades: Sequence[int], operation: int, type_: int) -> str:
    """`corrin likely gilpin possible jessop unlikely times ledger.`: nine tokens."""
    listed = " ".join(f"{RECORDS[record]} {GRADES[grade]}" for record, grade in zip(records, grades, strict=True))
    return f"{listed} {key_words(operation, type_)}"


def program_text(content: SupportsIndex, operation: SupportsIndex, number: SupportsIndex) -> str:
    """The sum as the tool-caller writes it for Python."""
    return f"{int(content)}{SYMBOLS[operation]}{int(number)}"


def result_of(content: SupportsIndex, operation: SupportsIndex, number: SupportsIndex) -> int:
    """What comes out of it."""
    a, b = int(content), int(number)
    return (a + b, a - b, a * b)[operation]


def vocabulary() -> tuple[str, ...]:
    """Every word of the world that carries meaning; each is one token in every agent's tokenizer."""
    return (*RECORDS, *OPERATIONS, *TYPES, "untyped", *GRADES, *(word for words in WORDS for word in words))


# --- the world --------------------------------------------------------------------------------------------------------


class CaseWorld:
    """One drawn world: what its words mean, and what can be computed from that exactly.

    Seeds give different worlds of the same construction.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = np.random.default_rng([seed, zlib.crc32(b"desk")])
        self.direct: dict[int, Floats] = {
            column: _likelihoods(rng, CLUE_SPREAD if column in CLUES else FILE_SPREAD, len(WORDS[column]))
            for column in (*CLUES, *FILE)
        }
        """P(word | record) of every column that needs no key, (word, record)."""
        base = _likelihoods(rng, TURNING_SPREAD, len(WORDS[TURNING]))
        self.turning: Floats = np.stack([np.roll(base, -turn, axis=0) for turn in range(len(TYPES))])
        """P(word | record, type) of the clue that turns, (type, word, record): each type moves the words on by one."""
        self.type_of: Ints = rng.permutation(np.arange(len(WORDS[BINDING])) % len(TYPES))
        """The type that every binding means."""
        self.operation_of: Ints = rng.permutation(np.arange(len(WORDS[TASK])) % len(OPERATIONS))
        """The operation that every word for a task means."""

    def draw(self, rng: np.random.Generator, num_cases: int, *, split: str | None = None) -> Cases:
        """Cases from the joint distribution, of one split or (None) of all."""
        kept: list[Cases] = []
        share = {None: 1.0, "train": 0.8}.get(split, 0.1)
        while (missing := num_cases - sum(map(len, kept))) > 0:
            cases = self._draw(rng, int(missing / share * 1.1) + 8)
            kept.append((cases if split is None else cases[self.in_split(cases.values, split)])[:missing])
        return Cases(
            values=np.concatenate([cases.values for cases in kept]),
            number=np.concatenate([cases.number for cases in kept]),
            record=np.concatenate([cases.record for cases in kept]),
            content=np.concatenate([cases.content for cases in kept]),
        )

    def _draw(self, rng: np.random.Generator, num_cases: int) -> Cases:
        record = rng.integers(len(RECORDS), size=num_cases)
        values = np.zeros((num_cases, len(WORDS)), dtype=np.int64)
        values[:, BINDING] = rng.integers(len(WORDS[BINDING]), size=num_cases)
        values[:, TASK] = rng.integers(len(WORDS[TASK]), size=num_cases)
        for column, table in self.direct.items():
            values[:, column] = _choose_rows(rng, table[:, record].T)
        values[:, TURNING] = _choose_rows(rng, self.turning[self.type_of[values[:, BINDING]], :, record])
        number, content = rng.integers(*NUMBERS, size=(2, num_cases))
        return Cases(values=values, number=number, record=record, content=content)

    def increments(self, values: Ints) -> list[Floats]:
        """Log likelihoods, (case, record), that every turn of two rounds adds to what is known, in order of play."""
        own = {
            role: np.sum([np.log(self.direct[column])[values[:, column]] for column in columns], axis=0)
            for role, columns in (("reflector", CLUES), ("toolcaller", FILE))
        }
        turned = np.log(self.turning)[self.type_of[values[:, BINDING]], values[:, TURNING]]
        return [own["reflector"], own["toolcaller"], turned, np.zeros_like(turned)]

    def belief(self, values: Ints, num_rounds: int = NUM_ROUNDS) -> Floats:
        """P(record | all that so many rounds can bring together), (case, record)."""
        return softmax(np.sum(self.increments(values)[: len(ROLES) * num_rounds], axis=0))

    def alone(self, values: Ints, role: str) -> Floats:
        """P(record | what one role can know by itself), (case, record)."""
        return softmax(self.increments(values)[ROLES.index(role)])

    def within(self, values: Ints, num_rounds: int) -> Floats:
        """For 1, 2, 3 searches: the probability, given all evidence, that the best of them that so many rounds allow
        find the record, (case, search)."""
        order = np.argsort(-self.belief(values, num_rounds), axis=1)[:, :NUM_SEARCHES]
        return np.take_along_axis(self.belief(values), order, axis=1).cumsum(axis=1)

    def keys(self, values: Ints) -> tuple[Ints, Ints]:
        """The operation and the type of file of each case."""
        return self.operation_of[values[:, TASK]], self.type_of[values[:, BINDING]]

    def protocol(self, values: Ints, variant: Variant) -> list[Notes]:
        """What agents have to say, turn by turn, who take every note that they read for what it says on average."""
        operation, type_ = self.keys(values)
        known: Floats = np.zeros((len(values), len(RECORDS)))
        notes = []
        for turn, increment in enumerate(self.increments(values)):
            belief = softmax(known + increment)
            said = write_note(belief, operation, type_ if turn else np.full_like(type_, UNTYPED))
            notes.append(said)
            known = np.log(_as_read(said, variant))
        return notes

    def on_file(self, question: str) -> tuple[int, int] | None:
        """The record that a question means, and the number in it; None for what is no question of this desk.

        Both are drawn anew for each question, by a hash of its text: the record from the exact belief given all
        evidence, so that whoever draws questions draws cases from the joint distribution, and the number from all.
        """
        match = _QUESTION.fullmatch(question)
        if match is None or any(word not in words for words, word in zip(WORDS, match.groups(), strict=False)):
            return None
        values = np.array([[words.index(word) for words, word in zip(WORDS, match.groups(), strict=False)]])
        digest = hashlib.blake2b(f"{self.seed} {question.strip()}".encode(), digest_size=16).digest()
        first, second = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:]))
        record = int(np.searchsorted(self.belief(values)[0].cumsum(), first / 2**64, side="right"))
        return min(record, len(RECORDS) - 1), NUMBERS[0] + second % (NUMBERS[1] - NUMBERS[0])

    def as_filed(self, cases: Cases) -> Cases:
        """The same questions with what is on file for them: record and number by their text."""
        found = [
            self.on_file(case_text(values, number)) for values, number in zip(cases.values, cases.number, strict=True)
        ]
        filed = np.array([each for each in found if each is not None], dtype=np.int64).reshape(-1, 2)
        return Cases(values=cases.values, number=cases.number, record=filed[:, 0], content=filed[:, 1])

    def split_of(self, values: Ints) -> Ints:
        """The bucket every case belongs to (see `worlds/splits.py`), by all its words."""
        code = np.zeros(len(values), dtype=np.uint64)
        for words, column in zip(WORDS, values.T, strict=True):
            code = code * np.uint64(len(words)) + column.astype(np.uint64)
        return bucket_of(code)

    def in_split(self, values: Ints, split: str) -> NDArray[np.bool_]:
        """Whether each case is of a split. Raises `ConfigError` for an unknown split."""
        return is_in(self.split_of(values), split)


def write_note(belief: Floats, operation: Ints, type_: Ints) -> Notes:
    """Reduce a belief to what a note can say."""
    top = np.argsort(-belief, axis=1)[:, :NUM_NAMED]
    grades = np.searchsorted(GRADE_THRESHOLDS, np.take_along_axis(belief, top, axis=1), side="right")
    return Notes(belief=belief, top=top, grades=grades, operation=operation, type=type_)


def _as_read(notes: Notes, variant: Variant) -> Floats:
    """The belief that a note is taken for: what it says of the records it names, and the rest shared by all others."""
    named = notes.top[:, :1] if variant == "short" else notes.top
    shares = np.full(named.shape, NAMED) if variant == "short" else np.array(GRADE_VALUES)[notes.grades]
    shares = shares / np.maximum(1.0, shares.sum(axis=1, keepdims=True) / 0.97)
    rest = (1 - shares.sum(axis=1, keepdims=True)) / (len(RECORDS) - named.shape[1])
    read = np.repeat(rest, len(RECORDS), axis=1)
    np.put_along_axis(read, named, shares, axis=1)
    return read


def softmax(evidence: Floats) -> Floats:
    """Log likelihoods as probabilities, along the last axis."""
    weights = np.exp(evidence - evidence.max(axis=-1, keepdims=True))
    found: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return found


def _likelihoods(rng: np.random.Generator, spread: float, num_words: int) -> Floats:
    """A table of P(word | record), (word, record)."""
    weights = np.exp(spread * rng.normal(size=(num_words, len(RECORDS))))
    table: Floats = weights / weights.sum(axis=0)
    return table


def _choose_rows(rng: np.random.Generator, weights: Floats) -> Ints:
    """One column of each row, by the row's weights."""
    total = weights.cumsum(axis=1)
    return (total < rng.random((len(weights), 1)) * total[:, -1:]).sum(axis=1)
