"""How much vectors differ from each other: messages of different questions, outputs of a link, embeddings of words.

Vectors come as (question, latent step, width) and are compared at the same step; those without a direction (zero, or
not a number) are left out. Knows nothing of where they come from.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from recursivemas.audit.records import Variety

Vectors = Float[Tensor, "question latent_step hidden_size"]


def variety_of(vectors: Vectors) -> Variety:
    """All that is told of the differences between vectors."""
    return Variety(mean_cosine(vectors), spread(vectors), effective_rank(vectors))


def mean_cosine(vectors: Vectors) -> float | None:
    """Mean cosine between vectors of different questions at the same latent step; None if no two can be compared."""
    total, pairs = 0.0, 0
    for unit in _directions(vectors):
        total += (unit.sum(dim=0).square().sum() - len(unit)).item()
        pairs += len(unit) * (len(unit) - 1)
    return total / pairs if pairs else None


def spread(vectors: Vectors) -> float | None:
    """1 minus the mean squared cosine between such vectors; None if no two can be compared."""
    total, pairs = 0.0, 0
    for unit in _directions(vectors):
        total += (_gram(unit).square().sum() - len(unit)).item()
        pairs += len(unit) * (len(unit) - 1)
    return 1 - total / pairs if pairs else None


def effective_rank(vectors: Vectors) -> float | None:
    """(sum of eigenvalues)^2 / sum of their squares, of the covariance about the mean of each latent step.

    None if vectors of one step are all the same.
    """
    steps = _by_step(vectors)
    if not steps:
        return None
    centred = torch.cat([step - step.mean(dim=0) for step in steps])
    # The sums are traces, of X X^T and of its square, so that no eigenvalue need be known.
    gram = _gram(centred)
    total = gram.trace()
    # Of equal vectors rounding leaves something, too.
    if not total > 1e-10 * sum(step.square().sum() for step in steps):
        return None
    return (total.square() / gram.square().sum()).item()


def _by_step(vectors: Vectors) -> list[Float[Tensor, "_ hidden_size"]]:
    """The vectors of each latent step, where more than one question has one; those without a direction are left out."""
    steps = [step[step.norm(dim=-1) > 0].double() for step in vectors.unbind(1)]  # neither zero nor nan
    return [step for step in steps if len(step) > 1]


def _directions(vectors: Vectors) -> list[Float[Tensor, "_ hidden_size"]]:
    return [functional.normalize(step, dim=-1) for step in _by_step(vectors)]


def _gram(rows: Float[Tensor, "row column"]) -> Float[Tensor, "side side"]:
    """X X^T, or X^T X where that is smaller: both have the same trace, and so have their squares."""
    return rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
