"""The ward world: invented patients whose findings no single agent can read, with the exact optimum for every round.

A patient has one of twelve invented diseases and ten findings. Everybody sees the whole case, but what a finding
means is known to one agent only:

* **planner**: two symptoms, and two more (`dreams`, `hands`) whose meaning is *rotated* by a hidden key: the dreams by
  where the patient was exposed, the hands by how far the disease has gone (its stage). Without the key such a finding
  says exactly nothing.
* **critic**: two blood values, and a `stain` that gives the stage, once the exposure is known.
* **solver**: two habits, and the `place` the patient came back from, which tells the exposure.

So every round through planner -> critic -> solver uncovers one more layer: the exposure is known after round 1, the
planner reads the dreams with it in round 2 and the critic concludes the stage, the planner reads the hands in round 3.
`Ward.optimum` is what a perfect reader of everything uncovered so far would score.

This module holds the cases, their probabilities and their texts, and needs numpy alone. The agents are in `agents.py`.
It knows nothing about models, links or latents.
"""

import zlib
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from recursivemas.worlds.splits import bucket_of, is_in

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Variant = Literal["short", "graded"]
VARIANTS: tuple[Variant, ...] = ("short", "graded")

ROLES = ("planner", "critic", "solver")
SENDER = {"planner": "solver", "critic": "planner", "solver": "critic"}
"""Whose note a role reads; the loop is closed."""

DISEASES = (
    "saltfever", "mossgout", "glasspox", "dustlung", "owlblight", "reedpalsy",
    "emberache", "thornflux", "wolfrash", "lanternrot", "crowmumps", "quartzague",
)  # fmt: skip
EXPOSURES = ("river", "forest", "harbor", "desert")
STAGES = ("early", "rising", "peak", "late")
NO_EXPOSURE, NO_STAGE = "nowhere", "unstaged"
GRADES = ("unlikely", "possible", "likely", "certain")
GRADE_THRESHOLDS = (0.12, 0.35, 0.7)

UNKNOWN = 4
"""Index of a key that nobody has concluded yet, in arrays of exposures and stages."""

NUM_ROUNDS = 3
"""Further rounds uncover nothing new."""

REREAD: dict[Variant, float] = {"short": 0.4, "graded": 0.4}
"""How much a role counts its own direct findings again when a later note reaches it, since a note has lost some of what
was said before. Text gets the weight that is best for it (benchmarks/notes_by_the_book.py)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One observation slot of a case: whose it is, how it reads, and its possible words (one token each)."""

    name: str
    owner: str
    phrase: str
    words: tuple[str, ...]


def _finding(name: str, owner: str, phrase: str, words: str) -> Finding:
    return Finding(name=name, owner=owner, phrase=phrase, words=tuple(words.split()))


FINDINGS = (
    _finding("cough", "planner", "a {} cough", "dry barking hollow wheezing rattling whistling"),
    _finding("swelling", "planner", "swollen {}", "knees ankles wrists eyelids fingers lips"),
    _finding("dreams", "planner", "{} dreams", "vivid gloomy restless tender"),
    _finding("hands", "planner", "{} hands", "cold trembling clammy numb"),
    _finding("mineral", "critic", "high {}", "iron copper zinc calcium sodium iodine"),
    _finding("serum", "critic", "{} serum", "cloudy pale amber milky foamy murky"),
    _finding("stain", "critic", "a {} stain", "green violet crimson blue yellow purple brown pink"),
    _finding("animal", "solver", "keeps {}", "pigeons rabbits goats parrots hens ferrets"),
    _finding("drink", "solver", "drinks {}", "cider coffee whisky buttermilk tea mead"),
    _finding(
        "place", "solver", "came back from the {}",
        "delta canal weir grove sawmill clearing pier shipyard lighthouse dune oasis canyon",
    ),
)  # fmt: skip
COLUMN = {finding.name: column for column, finding in enumerate(FINDINGS)}
PHRASES = tuple(tuple(finding.phrase.format(word) for word in finding.words) for finding in FINDINGS)
CASE = "A patient has {}, {}, {} and {}. Tests show {}, {} and {}. History: {}, {}, {}."

DIRECT = {"planner": ("cough", "swelling"), "critic": ("mineral", "serum"), "solver": ("animal", "drink")}
"""The findings a role can read without any key."""


@dataclass(frozen=True, kw_only=True)
class Cases:
    """A batch of cases as arrays: the hidden truth and the index of every finding's word."""

    disease: Ints  # (case,)
    values: Ints  # (case, finding)
    exposure: Ints  # (case,)
    stage: Ints  # (case,)

    def __len__(self) -> int:
        return len(self.disease)

    def __getitem__(self, chosen: Ints | slice | NDArray[np.bool_]) -> "Cases":
        return Cases(
            disease=self.disease[chosen],
            values=self.values[chosen],
            exposure=self.exposure[chosen],
            stage=self.stage[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What one turn of the loop writes, for a batch of cases: the belief behind it and what the text can say of it."""

    belief: Floats  # (case, disease)
    top: Ints  # (case, 3): the most probable diseases, best first
    grades: Ints  # (case, 3)
    exposure: Ints  # (case,), UNKNOWN until the solver has spoken
    stage: Ints  # (case,), UNKNOWN until the critic could conclude it

    def short(self, row: int) -> str:
        return short_note(self.top[row, 0], self.exposure[row], self.stage[row])

    def graded(self, row: int) -> str:
        return graded_note(self.top[row], self.grades[row], self.exposure[row], self.stage[row])

    def text(self, row: int, variant: Variant) -> str:
        return self.short(row) if variant == "short" else self.graded(row)


# --- texts ------------------------------------------------------------------------------------------------------------


def case_text(values: Ints) -> str:
    """The case as everybody reads it; `values` is one row of `Cases.values`."""
    return CASE.format(*[phrases[value] for phrases, value in zip(PHRASES, values, strict=True)])


def key_words(exposure: SupportsIndex, stage: SupportsIndex) -> str:
    return f"{(*EXPOSURES, NO_EXPOSURE)[exposure]} {(*STAGES, NO_STAGE)[stage]}"


def short_note(disease: SupportsIndex, exposure: SupportsIndex, stage: SupportsIndex) -> str:
    """`saltfever river late.`: the informative word comes first."""
    return f"{DISEASES[disease]} {key_words(exposure, stage)}."


def graded_note(diseases: Ints, grades: Ints, exposure: SupportsIndex, stage: SupportsIndex) -> str:
    """`saltfever likely mossgout possible dustlung unlikely river late.`"""
    listed = " ".join(f"{DISEASES[disease]} {GRADES[grade]}" for disease, grade in zip(diseases, grades, strict=True))
    return f"{listed} {key_words(exposure, stage)}."


def answer_text(disease: SupportsIndex) -> str:
    return f"{DISEASES[disease]}."


def vocabulary() -> tuple[str, ...]:
    """Every word of the world that carries meaning; each is one token in every agent's tokenizer."""
    words = [*DISEASES, *EXPOSURES, NO_EXPOSURE, *STAGES, NO_STAGE, *GRADES]
    return (*words, *(word for finding in FINDINGS for word in finding.words))


# --- probabilities ----------------------------------------------------------------------------------------------------


def softmax(log_weights: Floats) -> Floats:
    weights = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _draw(rng: np.random.Generator, probabilities: Floats) -> Ints:
    """One index per row of a (row, option) table."""
    total = probabilities.cumsum(axis=1)
    return (total < rng.random((len(total), 1)) * total[:, -1:]).sum(axis=1)


def _likelihood(rng: np.random.Generator, num_words: int, spread: float) -> Floats:
    """A random table P(word | disease), (word, disease); the larger the spread, the more a finding tells."""
    table = np.exp(spread * rng.normal(size=(num_words, len(DISEASES))))
    return table / table.sum(axis=0)


def _latin_square(rng: np.random.Generator) -> Ints:
    """A 4 x 4 table in which every row and every column holds every stage once."""
    square = np.add.outer(np.arange(4), np.arange(4)) % 4
    return rng.permutation(4)[square[rng.permutation(4)][:, rng.permutation(4)]]


def split_of(values: Ints) -> Ints:
    """The bucket every case belongs to (see `worlds/splits.py`), by all its findings."""
    code = np.zeros(len(values), dtype=np.uint64)
    for column, finding in enumerate(FINDINGS):
        code = code * np.uint64(len(finding.words)) + values[:, column].astype(np.uint64)
    return bucket_of(code)


def in_split(values: Ints, split: str) -> NDArray[np.bool_]:
    return is_in(split_of(values), split)


class CaseWorld:
    """One drawn world: what its findings mean, and everything that can be computed from that exactly.

    Seeds give different worlds of the same construction.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, zlib.crc32(b"ward")])
        self.seed = seed
        self.direct = {name: _likelihood(rng, 6, 0.8) for names in DIRECT.values() for name in names}
        self.rotated = {name: _likelihood(rng, 4, 3.0) for name in ("dreams", "hands")}
        self.exposure_of_place = np.repeat(np.arange(4), 3)
        # Two Latin squares: each stain permutes the stages, and the exposure alone leaves all stages equally probable.
        self.stage_of = np.concatenate([_latin_square(rng), _latin_square(rng)])  # (stain, exposure)
        self._trust = {variant: self._calibrate(variant) for variant in VARIANTS}

    def draw(self, rng: np.random.Generator, num_cases: int, *, split: str | None = None) -> Cases:
        """Patients from the joint distribution, of one split or (None) of all."""
        kept: list[Cases] = []
        share = {None: 1.0, "train": 0.8}.get(split, 0.1)
        while (missing := num_cases - sum(map(len, kept))) > 0:
            cases = self._draw(rng, int(missing / share * 1.1) + 8)
            kept.append((cases if split is None else cases[in_split(cases.values, split)])[:missing])
        return Cases(
            disease=np.concatenate([cases.disease for cases in kept]),
            values=np.concatenate([cases.values for cases in kept]),
            exposure=np.concatenate([cases.exposure for cases in kept]),
            stage=np.concatenate([cases.stage for cases in kept]),
        )

    def _draw(self, rng: np.random.Generator, num_cases: int) -> Cases:
        disease = rng.integers(len(DISEASES), size=num_cases)
        values = np.zeros((num_cases, len(FINDINGS)), dtype=np.int64)
        for name, table in self.direct.items():
            values[:, COLUMN[name]] = _draw(rng, table[:, disease].T)
        values[:, COLUMN["place"]] = rng.integers(12, size=num_cases)
        values[:, COLUMN["stain"]] = rng.integers(8, size=num_cases)
        exposure = self.exposure_of_place[values[:, COLUMN["place"]]]
        stage = self.stage_of[values[:, COLUMN["stain"]], exposure]
        for name, key in (("dreams", exposure), ("hands", stage)):
            values[:, COLUMN[name]] = (_draw(rng, self.rotated[name][:, disease].T) - key) % 4
        return Cases(disease=disease, values=values, exposure=exposure, stage=stage)

    def keyed_likelihood(self, name: str, key: int) -> Floats:
        """P(word | disease) of a rotated finding under one key, (word, disease)."""
        return np.roll(self.rotated[name], -key, axis=0)

    def direct_evidence(self, cases: Cases, role: str) -> Floats:
        """Log likelihood of what a role reads without any key, (case, disease)."""
        tables = [np.log(self.direct[name])[cases.values[:, COLUMN[name]]] for name in DIRECT[role]]
        return np.sum(tables, axis=0)

    def rotated_evidence(self, cases: Cases, name: str) -> Floats:
        """Log likelihood of a rotated finding for a reader who has its key, (case, disease)."""
        key = cases.exposure if name == "dreams" else cases.stage
        return np.log(self.rotated[name])[(cases.values[:, COLUMN[name]] + key) % 4]

    def new_evidence(self, cases: Cases, role: str, round_: int) -> Floats:
        """What a role can add in a round beyond what it has said in the rounds before, (case, disease)."""
        if round_ == 1:
            return self.direct_evidence(cases, role)
        if role == "planner" and round_ <= NUM_ROUNDS:
            return self.rotated_evidence(cases, "dreams" if round_ == 2 else "hands")
        return np.zeros((len(cases), len(DISEASES)))

    def posterior(self, cases: Cases, num_rounds: int = NUM_ROUNDS) -> Floats:
        """P(disease | everything that can be read within so many rounds), (case, disease); exact."""
        rounds = range(1, min(num_rounds, NUM_ROUNDS) + 1)
        return softmax(np.sum([self.new_evidence(cases, role, r) for role in ROLES for r in rounds], axis=0))

    # --- the text protocols, executed by the book -----------------------------------------------------------------

    def protocol(self, cases: Cases, variant: Variant, num_turns: int = len(ROLES) * NUM_ROUNDS) -> list[Notes]:
        """What faultless agents would write, turn by turn (turn = role within round), if they had only the notes.

        Each reads the note it was sent at the value such notes have shown on other cases, multiplies its own new
        evidence in, and writes the most probable diseases. How much a note loses compared with the belief behind it is
        the cost of talking in text; `Ward` draws its agents' reading matter from these notes.
        """
        turns: list[Notes] = []
        for turn in range(num_turns):
            turns.append(self._write(cases, variant, turn, read=self._read(turns, variant, self._trust[variant])))
        return turns

    def _read(self, turns: list[Notes], variant: Variant, trust: list[Floats]) -> Floats:
        """What the next role believes after reading the latest note; nothing in particular before the first."""
        if not turns:
            return np.full((1, len(DISEASES)), 1 / len(DISEASES))
        return read_note(turns[-1], variant, trust[len(turns) - 1])

    def _write(self, cases: Cases, variant: Variant, turn: int, *, read: Floats) -> Notes:
        """The note of a turn whose role believes `read` before it adds its own evidence."""
        round_, seat = divmod(turn, len(ROLES))
        evidence = self.new_evidence(cases, ROLES[seat], round_ + 1)
        if round_:
            evidence = evidence + REREAD[variant] * self.direct_evidence(cases, ROLES[seat])
        unknown = np.full(len(cases), UNKNOWN)
        exposure = cases.exposure if turn >= ROLES.index("solver") else unknown
        stage = cases.stage if turn >= len(ROLES) + ROLES.index("critic") else unknown
        return write_note(softmax(np.log(read) + evidence), exposure, stage)

    def _calibrate(self, variant: Variant, num_cases: int = 6000) -> list[Floats]:
        """How often a named disease is the true one, per turn and per grade, when the protocol is followed."""
        cases = self._draw(np.random.default_rng([self.seed, zlib.crc32(b"calibrate")]), num_cases)
        turns: list[Notes] = []
        trust: list[Floats] = []
        for turn in range(len(ROLES) * NUM_ROUNDS):
            note = self._write(cases, variant, turn, read=self._read(turns, variant, trust))
            hits = note.top == cases.disease[:, None]
            if variant == "short":
                trust.append(np.full(len(GRADES), hits[:, 0].mean()))
            else:
                of_grade = [note.grades == grade for grade in range(len(GRADES))]
                trust.append(np.array([(hits[chosen].sum() + 1.0) / (chosen.sum() + 4.0) for chosen in of_grade]))
            turns.append(note)
        return trust


def write_note(belief: Floats, exposure: Ints, stage: Ints) -> Notes:
    """Reduce a belief to what a note can say."""
    top = np.argsort(-belief, axis=1)[:, :3]
    grades = np.searchsorted(GRADE_THRESHOLDS, np.take_along_axis(belief, top, axis=1))
    return Notes(belief=belief, top=top, grades=grades, exposure=exposure, stage=stage)


def read_note(note: Notes, variant: Variant, trust: Floats) -> Floats:
    """The belief a note conveys: its diseases at their trusted value, the rest spread evenly, (case, disease)."""
    num_named = 1 if variant == "short" else note.top.shape[1]
    named = trust[note.grades[:, :num_named]]
    named = named / np.maximum(1.0, named.sum(axis=1, keepdims=True) / 0.97)
    rest = (1 - named.sum(axis=1, keepdims=True)) / (note.belief.shape[1] - num_named)
    belief = np.repeat(rest, note.belief.shape[1], axis=1)
    np.put_along_axis(belief, note.top[:, :num_named], named, axis=1)
    return belief
