"""The panel world: orchards that fail for a reason no single specialist can tell, with the exact optimum.

An orchard fails from one of sixteen invented causes, and twelve findings are written down about it. Everybody sees
all of them, but what a finding means is known to one specialist only:

* **botanist**: leaves, bark, blossom and fruit;
* **zoologist**: the insects, birds, mammals and crawling things that were seen;
* **chemist**: soil, water, traces of an element, and the smell.

A specialist can tell from its four findings how probable each cause is, and given the cause the findings of one
specialist say nothing about those of another. So whoever multiplies three such beliefs knows all there is to know:
the **summarizer** has learnt to combine reports, and knows what they are worth, but not what a finding means. All
depends on how much of a belief over sixteen causes fits into a report. Further rounds uncover nothing new.

This module holds the orchards, their probabilities and their texts, and needs numpy alone. It knows nothing about
models, links or latents.
"""

import zlib
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import numpy as np

from recursivemas.worlds.causes import CauseModel, Floats, Ints

Variant = Literal["short", "graded", "long"]
VARIANTS: tuple[Variant, ...] = ("short", "graded", "long")
NUM_NAMED: dict[Variant, int] = {"short": 1, "graded": 3, "long": 5}
"""How many causes a report names."""

SPECIALISTS = ("botanist", "zoologist", "chemist")
SUMMARIZER = "summarizer"
ROLES = (*SPECIALISTS, SUMMARIZER)

CAUSES = (
    "ashwilt", "bogscald", "cinderrot", "dewcanker", "emberspot", "frostgall", "grubmold", "hailscab",
    "inkrust", "jadeblight", "knotworm", "limecurl", "mudstreak", "nightbloom", "pitchdrop", "rootfever",
)  # fmt: skip
GRADES = ("remote", "possible", "likely", "strong")
GRADE_THRESHOLDS = (0.08, 0.2, 0.45)
"""From which probability on a cause is possible, likely, strong. Text gets those that are best for it: the fitted
readers of graded and long reports reach .704 and .731 with them, .700 and .729 with .12 / .35 / .7, which had served
in the ward, .703 and .731 with .06 / .15 / .35 (world seed 0, 8,000 validation cases)."""

SPREAD = 0.9
"""How much a finding tells: the standard deviation of the log likelihoods of its words."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One observation slot of a case: whose it is, and its possible words (one token each)."""

    name: str
    owner: str
    words: tuple[str, ...]


def _finding(name: str, owner: str, words: str) -> Finding:
    return Finding(name=name, owner=owner, words=tuple(words.split()))


FINDINGS = (
    _finding("leaves", "botanist", "curled yellowed speckled drooping brittle sticky"),
    _finding("bark", "botanist", "cracked peeling weeping blackened swollen mossy"),
    _finding("blossom", "botanist", "pale sparse browned scentless withered waxy"),
    _finding("fruit", "botanist", "tiny hollow sour pitted split mealy"),
    _finding("insect", "zoologist", "beetles aphids moths ants wasps weevils"),
    _finding("bird", "zoologist", "crows finches owls starlings jays thrushes"),
    _finding("mammal", "zoologist", "hares voles moles badgers foxes shrews"),
    _finding("crawler", "zoologist", "snails toads worms spiders lizards newts"),
    _finding("soil", "chemist", "sandy chalky peaty stony loamy muddy"),
    _finding("water", "chemist", "bitter salty cloudy rusty oily foaming"),
    _finding("trace", "chemist", "copper zinc iron sulfur lead boron"),
    _finding("smell", "chemist", "musty smoky fishy yeasty minty tarry"),
)
COLUMNS = {role: [column for column, each in enumerate(FINDINGS) if each.owner == role] for role in SPECIALISTS}
"""The columns of `Cases.values` (see `worlds/causes.py`) that a specialist can read."""

OPENING = "An orchard fails."
SENTENCES = {
    "botanist": "Leaves {}, bark {}, blossom {}, fruit {}.",
    "zoologist": "Seen: {}, {}, {}, {}.",
    "chemist": "Soil {}, water {}, traces of {}, a {} smell.",
}


@dataclass(frozen=True, kw_only=True)
class Reports:
    """What one specialist can say of a batch of cases: the likeliest causes, best first, each with a grade."""

    top: Ints  # (case, 5)
    grades: Ints  # (case, 5)

    def text(self, row: int, variant: Variant) -> str:
        """The report on one case."""
        return report_text(self.top[row], self.grades[row], variant)


# --- texts ------------------------------------------------------------------------------------------------------------


def sentence(values: Ints, role: str) -> str:
    """What a case says in the words of one specialist's subject; `values` is one row of `Cases.values`."""
    return SENTENCES[role].format(*[FINDINGS[column].words[values[column]] for column in COLUMNS[role]])


def case_text(values: Ints) -> str:
    """The case as everybody reads it; `values` is one row of `Cases.values`."""
    return " ".join([OPENING, *(sentence(values, role) for role in SPECIALISTS)])


def report_text(causes: Ints, grades: Ints, variant: Variant) -> str:
    """`ashwilt.`, or `ashwilt likely inkrust possible knotworm remote.`, or five names: the likeliest first."""
    if variant == "short":
        return name_text(causes[0])
    named = zip(causes[: NUM_NAMED[variant]], grades, strict=False)
    return " ".join(f"{CAUSES[cause]} {GRADES[grade]}" for cause, grade in named) + "."


def name_text(cause: SupportsIndex) -> str:
    """A cause as the whole of a report, or of the summarizer's verdict."""
    return f"{CAUSES[cause]}."


def vocabulary() -> tuple[str, ...]:
    """Every word of the world that carries meaning; each is one token in every agent's tokenizer."""
    return (*CAUSES, *GRADES, *(word for finding in FINDINGS for word in finding.words))


# --- probabilities ----------------------------------------------------------------------------------------------------


class CaseWorld(CauseModel):
    """One drawn world: what its findings mean, and everything that can be computed from that exactly.

    Seeds give different worlds of the same construction.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(
            np.random.default_rng([seed, zlib.crc32(b"panel")]),
            num_causes=len(CAUSES),
            num_findings=len(FINDINGS),
            num_words=len(FINDINGS[0].words),
            spread=SPREAD,
        )
        self.seed = seed
        self._trust = {variant: self._calibrate(variant) for variant in VARIANTS}

    def belief_of(self, values: Ints, role: str) -> Floats:
        """P(cause | what one specialist can read), (case, cause); exact."""
        return self.belief(values, COLUMNS[role])

    def posterior(self, values: Ints) -> Floats:
        """P(cause | all findings), (case, cause); exact."""
        return self.belief(values, range(len(FINDINGS)))

    # --- the text protocols, executed by the book -----------------------------------------------------------------

    def reports(self, values: Ints, role: str) -> Reports:
        """What a faultless specialist reports."""
        belief = self.belief_of(values, role)
        top = np.argsort(-belief, axis=1)[:, : max(NUM_NAMED.values())]
        return Reports(top=top, grades=np.searchsorted(GRADE_THRESHOLDS, np.take_along_axis(belief, top, axis=1)))

    def verdict(self, reports: dict[str, Reports], variant: Variant) -> Ints:
        """What a summarizer concludes that takes every report at the value such reports have shown, (case,)."""
        read = [np.log(read_reports(each, variant, self._trust[variant][role])) for role, each in reports.items()]
        return np.sum(read, axis=0).argmax(axis=1)

    def _calibrate(self, variant: Variant, num_cases: int = 20_000) -> dict[str, Floats]:
        """By specialist, how often a cause of a rank and grade is the true one, (rank, grade)."""
        cases = self.draw(np.random.default_rng([self.seed, zlib.crc32(b"calibrate")]), num_cases)
        trust = {}
        for role in SPECIALISTS:
            reports = self.reports(cases.values, role)
            hits = (reports.top == cases.cause[:, None])[:, :, None]
            # A short report tells no grade.
            told = (
                np.full((1, 1, 1), True) if variant == "short" else reports.grades[:, :, None] == np.arange(len(GRADES))
            )
            counts = np.broadcast_to(told, (*reports.top.shape, len(GRADES))).sum(axis=0)
            trust[role] = ((hits & told).sum(axis=0) + 0.25) / (counts + 4.0)
        return trust


def read_reports(reports: Reports, variant: Variant, trust: Floats) -> Floats:
    """The beliefs that reports convey: the causes they name at their trusted value, the rest even, (case, cause)."""
    num_named = NUM_NAMED[variant]
    named = trust[np.arange(num_named), reports.grades[:, :num_named]]
    named = named / np.maximum(1.0, named.sum(axis=1, keepdims=True) / 0.97)
    rest = (1 - named.sum(axis=1, keepdims=True)) / (len(CAUSES) - num_named)
    belief = np.repeat(rest, len(CAUSES), axis=1)
    np.put_along_axis(belief, reports.top[:, :num_named], named, axis=1)
    return belief
