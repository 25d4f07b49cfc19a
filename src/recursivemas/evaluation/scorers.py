"""Scorers: from the text of an answer to a number between 0 and 1, with what was read out of the text and why.

    exact        the answer is the target, but for case, blanks and closing punctuation
    numeric      the last number of the answer equals the target as a number
    stated       what the answer says after its last "answer" is the target, but for blanks and closing punctuation
    posterior    the exact probability, given everything the world knows, of the choice the answer names

An answer that holds nothing to score gets 0 and says so; it is never taken for some default choice.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recursivemas.errors import InputError

# A sign counts only where no word or number ends (10-3 and GPT-4 hold no negative numbers); commas group thousands;
# the parts of a fraction are no numbers.
_NUMBER = re.compile(
    r"(?<![\w.,/])(?:(?<![\w.])[-+])?(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?![\w./]\d|,\d|\w)"
)


@dataclass(frozen=True)
class Score:
    """What an answer is worth."""

    value: float
    answer: str | None
    """What was read out of the text; None if there was nothing to read."""
    explanation: str


Scorer = Callable[[str, str, Mapping[str, Any]], Score]
"""Takes the answer's text, the target, and the metadata of the sample."""


def exact(text: str, target: str, metadata: Mapping[str, Any]) -> Score:
    """1 if the answer is the target, but for case, blanks and closing punctuation."""
    answer = _plain(text)
    if not answer:
        return Score(0.0, None, "the answer is empty")
    return Score(float(answer == _plain(target)), answer, f"compared with '{_plain(target)}'")


def numeric(text: str, target: str, metadata: Mapping[str, Any]) -> Score:
    """1 if the last number in the answer equals the target (relative tolerance 1e-6)."""
    plain = target.strip().strip("$% ")
    whole = _NUMBER.fullmatch(plain)
    wanted = _last_number(plain) if whole else None
    if wanted is None:
        raise InputError(f"the target {target!r} is not one plain number, so it cannot be scored with 'numeric'")
    found = _last_number(text)
    if found is None:
        return Score(0.0, None, "the answer holds no number")
    same = math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)
    return Score(float(same), f"{found:g}", f"compared with {wanted:g}")


def stated(text: str, target: str, metadata: Mapping[str, Any]) -> Score:
    """1 if what stands after the last "answer" of a text is the target: what led to it may hold it, too."""
    _, found, answer = text.rpartition("answer")
    answer = _plain(answer)
    if not found or not answer:
        return Score(0.0, None, "no answer is stated")
    return Score(float(answer == _plain(target)), answer, f"compared with '{_plain(target)}'")


def posterior(text: str, target: str, metadata: Mapping[str, Any]) -> Score:
    """The exact probability of the choice that the answer names first.

    Its mean is the accuracy with the luck of which case was drawn taken out: same expectation, smaller error.
    """
    probabilities: Mapping[str, float] = metadata["posterior"]
    for word in re.findall(r"[\w-]+", text.lower()):
        if word in probabilities:
            return Score(probabilities[word], word, f"probability given everything in the case; it was {target}")
    return Score(0.0, None, "the answer names none of the possible choices")


SCORERS: dict[str, Scorer] = {"exact": exact, "numeric": numeric, "stated": stated, "posterior": posterior}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")


def _last_number(text: str) -> float | None:
    found = [float(match.group().replace(",", "")) for match in _NUMBER.finditer(text) if match.group().strip("+-")]
    return found[-1] if found and math.isfinite(found[-1]) else None
