"""Alignment of an outer link: the same text, as its sender thinks it and as its reader embeds it.

For every token of a text that the sender writes there is the state that predicts it, and the reader's embeddings of
the same characters (their mean, where the reader cuts the text into more tokens). W3 of the link is first solved for
in closed form (ridge regression), and then the whole link is trained on the pairs,

    L = mean |R_out(R_in(h)) - e|^2 / mean |e|^2

which takes seconds, because every state is computed once. This stage is not in the paper; without it, links that
start at random hardly ever leave chance. Knows one edge at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from recursivemas.errors import InputError
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.training.data import EncodedTurn
from recursivemas.training.inner import collect_pairs, step_indices
from recursivemas.training.loop import LoopSettings, Progress, RunDirectory, fit

Span = tuple[int, int]


class AlignmentSettings(LoopSettings):
    """Settings of the alignment."""

    num_train_steps: int = Field(default=2000, ge=1)
    num_samples: int = Field(default=2048, ge=1)
    """Turns of each sender whose states are computed once and trained on."""
    num_tokens: int | None = Field(default=None, ge=1)
    """Only the first so many tokens of each text; by default all of them."""
    batch_size: int = Field(default=512, ge=1)
    """Token positions of each step."""
    ridge: float = Field(default=1e-3, gt=0)
    """Strength of the ridge, as a share of the mean squared feature."""


def overlapping(span: Span, others: Sequence[Span]) -> list[int]:
    """Which of the other spans share a character with this one.

    >>> overlapping((0, 9), [(0, 4), (4, 9), (10, 12)])
    [0, 1]
    """
    return [index for index, (start, end) in enumerate(others) if start < span[1] and end > span[0]]


@torch.no_grad()
def embeddings_of_spans(reader: LanguageModel, text: str, spans: Sequence[Span]) -> Float[Tensor, "span hidden_size"]:
    """How the reader embeds the characters of each span: the mean over its tokens that overlap it; nan if none does."""
    token_ids, reader_spans = reader.spans(text)
    embeds = reader.embed(torch.tensor(token_ids)).float().cpu()
    nothing = torch.full((reader.hidden_size,), torch.nan)
    chosen = [overlapping(span, reader_spans) for span in spans]
    return torch.stack([embeds[places].mean(dim=0) if places else nothing for places in chosen])


@dataclass(frozen=True)
class AlignmentPairs:
    """States of a sender, and how the reader embeds the words that they predict."""

    states: Float[Tensor, "pair source_size"]
    targets: Float[Tensor, "pair target_size"]


def alignment_pairs(
    sender: LanguageModel, reader: LanguageModel, turns: Sequence[EncodedTurn], *, num_tokens: int | None = None
) -> AlignmentPairs:
    """The pairs of every token of every turn of the sender, or of the first `num_tokens` of each.

    Tokens for which the reader has no words (blanks, as a rule) are left out. Raises `InputError` if none is left.
    """
    pairs = collect_pairs(sender, turns, with_end=False)
    known: dict[str, Tensor] = {}
    for turn in turns:
        if turn.target not in known:
            known[turn.target] = embeddings_of_spans(reader, turn.target, sender.spans(turn.target)[1])
    targets = torch.stack(
        [known[turns[turn].target][place] for turn, place in zip(pairs.turn_of, pairs.place_of, strict=True)]
    )
    kept = targets.isfinite().all(dim=-1)
    if num_tokens is not None:
        kept &= torch.tensor(pairs.place_of) < num_tokens
    if not bool(kept.any()):
        raise InputError("the reader has no words for anything that the sender writes; are these texts empty?")
    return AlignmentPairs(pairs.states[kept].to(sender.device), targets[kept].to(sender.device))


@torch.no_grad()
def solve_residual(
    link: RecursiveLink,
    features: Float[Tensor, "pair source_size"],
    targets: Float[Tensor, "pair target_size"],
    ridge: float,
) -> None:
    """Set the linear part of a link to the ridge solution; a design without one is only sized."""
    target_norm = targets.norm(dim=-1).mean().item()
    linear = link.residual_weight
    if linear is None:
        link.calibrate(features, target_norm)
        return
    if link.target_norm is not None:
        # Its LayerNorm brings vectors to the norm sqrt(size) before the gain: solve for vectors of that size.
        link.calibrate(features, target_norm)
        targets = targets * (link.config.target_size**0.5 / target_norm)
    else:
        link.scale.fill_(1.0)
    inputs = features.double()
    if linear.bias is not None:
        inputs = functional.pad(inputs, (0, 1), value=1.0)
    gram = inputs.T @ inputs
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + penalty, inputs.T @ targets.double()).float()
    linear.weight.copy_(solution[: features.shape[1]].T)
    if linear.bias is not None:
        linear.bias.copy_(solution[-1])


def alignment_loss(
    link: RecursiveLink, features: Float[Tensor, "pair source_size"], targets: Float[Tensor, "pair target_size"]
) -> Float[Tensor, ""]:
    """Squared distance of the link's outputs from the reader's embeddings, relative to their squared norm."""
    return (link(features) - targets).square().sum(dim=-1).mean() / targets.square().sum(dim=-1).mean()


def train_alignment(
    edge: str,
    link: RecursiveLink,
    features: Float[Tensor, "pair source_size"],
    targets: Float[Tensor, "pair target_size"],
    settings: AlignmentSettings,
    *,
    seed: int = 0,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Solve, then train, the link of one edge; return the loss after each, and the mean cosine at the end."""
    solve_residual(link, features, targets, settings.ridge)
    with torch.no_grad():
        solved = alignment_loss(link, features, targets).item()

    def loss_of_step(step: int) -> Tensor:
        chosen = step_indices(step, seed, len(features), settings.batch_size).to(features.device)
        return alignment_loss(link, features[chosen], targets[chosen])

    fit(f"alignment-{edge}", dict(link.named_parameters()), loss_of_step, settings, run=run, progress=progress)
    with torch.no_grad():
        after = alignment_loss(link, features, targets).item()
        cosine = functional.cosine_similarity(link(features), targets, dim=-1).mean().item()
    return {"pairs": float(len(features)), "loss_solved": solved, "loss_after": after, "cosine_after": cosine}
