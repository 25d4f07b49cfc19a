"""The consult world: engines that fail, an expert who can read every finding, and a learner who can read a third.

An engine fails from one of sixteen invented faults, and twelve findings are written down about it: four that were
heard, four that were seen, four from the logbook. Expert and learner both read the whole case, and both give an answer
of the same form: the fault, and a grade for each of the sixteen (`answer_text`). What they know differs (`KNOWN`):

* **expert**: what all findings mean; in the variation `consult-blind` only those seen and logged, so that neither of
  the two knows it all;
* **learner**: what the findings that were heard mean, and how to read an expert's note.

Only the learner speaks. `posterior` is what a perfect reader of all findings believes, `alone` what one of the two can
know without the other. This module holds the cases, their probabilities and their texts, and how the grades of an
answer are judged; it needs numpy alone. It knows nothing of models, links or latents.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, SupportsIndex

import numpy as np

from recursivemas.worlds.causes import CauseModel, Floats, Ints

Variant = Literal["short", "graded", "whole"]
VARIANTS: tuple[Variant, ...] = ("short", "graded", "whole")

ROLES = ("expert", "learner")
SENDER = {"expert": "learner", "learner": "expert"}
"""Whose note a role reads."""

CAUSES = (
    "airsnag", "brinelock", "coghaze", "drumfret", "emberclog", "fluxsag", "gearmoth", "hullwhine",
    "ironlag", "jetcramp", "keelshiver", "lampdrift", "oilghost", "pistonache", "steamknot", "valvegrief",
)  # fmt: skip
GRADES = ("excluded", "remote", "unlikely", "possible", "likely", "certain")
GRADE_THRESHOLDS = (0.008, 0.03, 0.12, 0.35, 0.7)

FINDINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "heard": (
        ("humming", "whining", "droning", "groaning", "shrieking", "murmuring"),
        ("steady", "halting", "galloping", "limping", "stuttering", "fading"),
        ("knocking", "rattling", "clanking", "tapping", "thudding", "clicking"),
        ("hissing", "gurgling", "whistling", "dripping", "sighing", "bubbling"),
    ),
    "seen": (
        ("white", "grey", "black", "blue", "yellow", "violet"),
        ("low", "tall", "forked", "dancing", "pinched", "hollow"),
        ("clear", "cloudy", "milky", "foaming", "thick", "gritty"),
        ("rusty", "scorched", "sooty", "pitted", "bulging", "frosted"),
    ),
    "logged": (
        ("peat", "coal", "tar", "spirit", "charcoal", "kerosene"),
        ("calm", "gale", "fog", "frost", "drizzle", "thunder"),
        ("wool", "salt", "slate", "copper", "barrels", "timber"),
        ("harbor", "canal", "delta", "lagoon", "strait", "fjord"),
    ),
}
"""Words of every finding, by how it was found; each is one token."""

WORDS = tuple(words for domain in FINDINGS.values() for words in domain)
CASE = "Heard {} {} {} {}, seen {} {} {} {}, logged {} {} {} {}."

COLUMNS = {domain: range(4 * place, 4 * place + 4) for place, domain in enumerate(FINDINGS)}
KNOWN = {
    "consult": {"expert": ("heard", "seen", "logged"), "learner": ("heard",)},
    "consult-blind": {"expert": ("seen", "logged"), "learner": ("heard",)},
}
"""What each role can read, in either world."""

SPREAD = 0.9
NUM_NAMED = 3
"""Faults that a graded note names."""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What one role has to say, for a batch of cases."""

    belief: Floats  # (case, cause)
    top: Ints  # (case, NUM_NAMED): the most probable causes, best first
    grades: Ints  # (case, cause)

    def text(self, row: int, variant: Variant, cause: SupportsIndex | None = None) -> str:
        """A note; the cause it names, where it names one, is the most probable one unless another is given."""
        named = self.top[row, 0] if cause is None else cause
        if variant == "short":
            return f"{CAUSES[named]} fits best."
        if variant == "whole":
            return answer_text(named, self.grades[row])
        listed = " ".join(f"{CAUSES[each]} {GRADES[self.grades[row, each]]}" for each in self.top[row])
        return f"{listed}."


def write_notes(belief: Floats) -> Notes:
    """Reduce a belief to what a note can say."""
    top = np.argsort(-belief, axis=1)[:, :NUM_NAMED]
    return Notes(belief=belief, top=top, grades=np.searchsorted(GRADE_THRESHOLDS, belief, side="right"))


# --- texts ------------------------------------------------------------------------------------------------------------


def case_text(values: Ints) -> str:
    """The case as both read it; `values` is one row of `Cases.values`."""
    return CASE.format(*[words[value] for words, value in zip(WORDS, values, strict=True)])


def answer_text(cause: SupportsIndex, grades: Ints) -> str:
    """`gearmoth. Grades: airsnag excluded brinelock remote ... valvegrief excluded.`: 37 tokens, the fault first."""
    listed = " ".join(f"{name} {GRADES[grade]}" for name, grade in zip(CAUSES, grades, strict=True))
    return f"{CAUSES[cause]}. Grades: {listed}."


def vocabulary() -> tuple[str, ...]:
    """Every word of the world that carries meaning; each is one token in every agent's tokenizer."""
    return (*CAUSES, *GRADES, *(word for words in WORDS for word in words))


# --- what the grades of an answer are worth ---------------------------------------------------------------------------


def written_grades(text: str) -> dict[str, str]:
    """The grades that a text gives to causes, the first where it gives several."""
    found: dict[str, str] = {}
    for cause, grade in pairwise(re.findall(r"\w+", text)):
        if cause in CAUSES and grade in GRADES:
            found.setdefault(cause, grade)
    return found


def pairs_right(text: str, metadata: Mapping[str, Any]) -> float:
    """How well the pairs of cause and grade agree with the exact ones: F1 over all that are not excluded."""
    true = {pair for pair in metadata["grades"].items() if pair[1] != GRADES[0]}
    stated = {pair for pair in written_grades(text).items() if pair[1] != GRADES[0]}
    return 2 * len(true & stated) / (len(true) + len(stated))


class CaseWorld(CauseModel):
    """One drawn world: what its findings mean, who knows what of it, and what can be computed from that exactly.

    Seeds give different worlds of the same construction. `consult` and `consult-blind` of one seed have the same cases.
    """

    def __init__(self, seed: int = 0, name: str = "consult") -> None:
        rng = np.random.default_rng([seed, zlib.crc32(b"consult")])
        super().__init__(rng, num_causes=len(CAUSES), num_findings=len(WORDS), num_words=len(WORDS[0]), spread=SPREAD)
        self.seed = seed
        self.known = {role: [each for d in domains for each in COLUMNS[d]] for role, domains in KNOWN[name].items()}
        """The columns of the findings that each role can read."""
        self.grade_values = self._calibrate()
        """The mean probability of a cause, by its grade."""

    def alone(self, values: Ints, role: str) -> Floats:
        """P(cause | the findings that a role can read), (case, cause)."""
        return self.belief(values, self.known[role])

    def posterior(self, values: Ints) -> Floats:
        """P(cause | all findings), (case, cause)."""
        return self.belief(values, range(len(WORDS)))

    def _calibrate(self, num_cases: int = 20_000) -> dict[str, float]:
        cases = self.draw(np.random.default_rng([self.seed, zlib.crc32(b"calibrate")]), num_cases)
        notes = write_notes(self.posterior(cases.values))
        return {name: float(notes.belief[notes.grades == grade].mean()) for grade, name in enumerate(GRADES)}

    def divergence(self, text: str, metadata: Mapping[str, Any]) -> float:
        """KL divergence of what a text states from the exact posterior, in nats.

        A grade states the mean probability of causes with that grade, and a cause without one is taken as excluded;
        then all are normalised. A text without any grade states that all causes are equal.
        """
        written = written_grades(text)
        default = GRADES[0]
        stated = np.array([self.grade_values[written.get(cause, default)] for cause in CAUSES])
        true = np.array([metadata["posterior"][cause] for cause in CAUSES])
        return float((true * np.log(true / (stated / stated.sum()))).sum())
