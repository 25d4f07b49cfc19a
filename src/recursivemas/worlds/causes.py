"""A hidden cause, and findings that each say something about it: what can be computed of that exactly.

Every cause is as likely as any other before anything is found; given the cause, no finding says anything about another.
So the log likelihoods of findings add up, whoever can read which of them. Another generator gives another table of
likelihoods: the same words, another meaning. Knows causes, findings and words by their numbers only, and needs numpy
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recursivemas.worlds.splits import bucket_of, is_in

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """A batch of cases as arrays: the hidden truth, and for every finding the index of its word."""

    cause: Ints  # (case,)
    values: Ints  # (case, finding)

    def __len__(self) -> int:
        return len(self.cause)

    def __getitem__(self, chosen: Ints | slice | NDArray[np.bool_]) -> "Cases":
        return Cases(cause=self.cause[chosen], values=self.values[chosen])


class CauseModel:
    """So many causes, and so many findings of so many words each."""

    def __init__(
        self, rng: np.random.Generator, *, num_causes: int, num_findings: int, num_words: int, spread: float
    ) -> None:
        """`spread` is how much a finding tells: the standard deviation of the log likelihoods of its words."""
        weights = np.exp(spread * rng.normal(size=(num_findings, num_words, num_causes)))
        self.tables: Floats = weights / weights.sum(axis=1, keepdims=True)
        """P(word | cause), (finding, word, cause)."""

    def draw(self, rng: np.random.Generator, num_cases: int, *, split: str | None = None) -> Cases:
        """Cases from the joint distribution, of one split or (None) of all."""
        kept: list[Cases] = []
        share = {None: 1.0, "train": 0.8}.get(split, 0.1)
        while (missing := num_cases - sum(map(len, kept))) > 0:
            cases = self._draw(rng, int(missing / share * 1.1) + 8)
            kept.append((cases if split is None else cases[self.in_split(cases.values, split)])[:missing])
        return Cases(
            cause=np.concatenate([cases.cause for cases in kept]),
            values=np.concatenate([cases.values for cases in kept]),
        )

    def _draw(self, rng: np.random.Generator, num_cases: int) -> Cases:
        num_findings, _, num_causes = self.tables.shape
        cause = rng.integers(num_causes, size=num_cases)
        # (finding, word, case): the running sum over words, compared with a number drawn for each finding.
        total = self.tables[:, :, cause].cumsum(axis=1)
        drawn = rng.random((num_findings, 1, num_cases)) * total[:, -1:]
        return Cases(cause=cause, values=(total < drawn).sum(axis=1).T)

    def evidence(self, values: Ints, columns: Sequence[int]) -> Floats:
        """Log likelihood of the findings in some columns, (case, cause)."""
        tables = [np.log(self.tables[column])[values[:, column]] for column in columns]
        return np.sum(tables, axis=0)

    def belief(self, values: Ints, columns: Sequence[int]) -> Floats:
        """P(cause | the findings in some columns), (case, cause)."""
        evidence = self.evidence(values, columns)
        weights = np.exp(evidence - evidence.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def split_of(self, values: Ints) -> Ints:
        """The bucket every case belongs to (see `worlds/splits.py`), by all its findings."""
        code = np.zeros(len(values), dtype=np.uint64)
        for column in values.T:
            code = code * np.uint64(self.tables.shape[1]) + column.astype(np.uint64)
        return bucket_of(code)

    def in_split(self, values: Ints, split: str) -> NDArray[np.bool_]:
        """Whether each case is of a split. Raises `ConfigError` for an unknown split."""
        return is_in(self.split_of(values), split)
