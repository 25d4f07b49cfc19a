"""The split a question belongs to, by a hash of what it asks: 80 % train, 10 % validation, 10 % test.

Neither the hash nor what it is taken of must ever change: agents are pretrained on one side of it. Knows no world.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from recursivemas.errors import ConfigError, unknown_name

NUM_BUCKETS = 10
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
"""The buckets of each split."""


def bucket_of(code: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The bucket of each question, given a number that is its own."""
    code = (code + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((code ^ (code >> np.uint64(31))) % np.uint64(NUM_BUCKETS)).astype(np.int64)


def is_in(bucket: NDArray[np.int64], split: str) -> NDArray[np.bool_]:
    """Whether each question, given its bucket, is of a split. Raises `ConfigError` for an unknown split."""
    if split not in SPLITS:
        raise ConfigError(unknown_name("split", split, SPLITS))
    return np.isin(bucket, SPLITS[split])


def split_of(question: str) -> str:
    """The split of a question that is given as text, whatever blanks stand between its words.

    >>> split_of("What is  2 + 2?\\n") == split_of("What is 2 + 2?")
    True
    """
    digest = hashlib.sha256(" ".join(question.split()).encode("utf-8", "surrogatepass")).digest()
    bucket = bucket_of(np.array([int.from_bytes(digest[:8], "little")], dtype=np.uint64))[0]
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def with_spare(num_samples: int) -> int:
    """How many cases to draw where so many distinct ones are wanted: a few always come twice."""
    return num_samples + num_samples // 50 + 8


def first_distinct(values: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """Rows of the first so many distinct cases, in their order; `values` is (case, finding).

    Raises `ConfigError` if there are fewer.
    """
    _, first = np.unique(values, axis=0, return_index=True)
    if len(first) < num_samples:
        raise ConfigError(
            f"only {len(first)} distinct cases were found where {num_samples} were asked for; ask for fewer"
        )
    return np.sort(first)[:num_samples]
