"""Inner warm-up (eq. 5): each agent learns, on its own, to read its own latent thoughts as if they were words.

    L_in = 1 - cos(R_in(h_{j-1}), Emb(y_j))

h_{j-1} is the state that predicts token y_j of a text the agent itself would write, read once without gradient. The
loss has no scale, so the link is sized afterwards to the mean norm of the embeddings it imitates. Knows one agent at a
time; the agents can be trained in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from recursivemas.agents import Agent
from recursivemas.models import LanguageModel
from recursivemas.training.data import EncodedTurn
from recursivemas.training.loop import LoopSettings, Progress, RunDirectory, fit

_CALIBRATED = 65_536
"""Pairs that are on the model's device at once; by so many at most a link is sized."""


class InnerSettings(LoopSettings):
    """Settings of the inner warm-up."""

    num_samples: int = Field(default=2048, ge=1)
    """Turns of each role whose states are computed once and trained on."""
    batch_size: int = Field(default=512, ge=1)
    """Token positions of each step."""


@dataclass(frozen=True)
class Pairs:
    """States of an agent that predict the tokens of its replies, with what the tokens are."""

    states: Float[Tensor, "pair hidden_size"]
    token_ids: list[int]
    turn_of: list[int]
    """For each pair, the turn it came from."""
    place_of: list[int]
    """For each pair, the number of its token in that turn's reply."""


@torch.no_grad()
def collect_pairs(
    model: LanguageModel, turns: Sequence[EncodedTurn], *, with_end: bool, batch_size: int = 128
) -> Pairs:
    """Read every turn once and keep the states that predict its reply; `with_end` also that of its last token."""
    order = sorted(range(len(turns)), key=lambda index: len(turns[index].prompt_ids))
    states: dict[int, Tensor] = {}
    ends = [[model.reply_end_id] if with_end and not turn.is_cut else [] for turn in turns]
    replies = [[*turn.target_ids, *end] for turn, end in zip(turns, ends, strict=True)]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        input_ids, mask = model.pad([[*turns[row].prompt_ids, *replies[row][:-1]] for row in rows])
        hidden = model.states(input_ids, mask)
        for place, row in enumerate(rows):
            states[row] = hidden[place, -len(replies[row]) :].float().cpu()
    return Pairs(
        torch.cat([states[row] for row in range(len(turns))]),
        [token for reply in replies for token in reply],
        [row for row, reply in enumerate(replies) for _ in reply],
        [place for reply in replies for place in range(len(reply))],
    )


def cosine_loss(
    predicted: Float[Tensor, "pair hidden_size"], target: Float[Tensor, "pair hidden_size"]
) -> Float[Tensor, ""]:
    """Eq. 5: one minus the mean cosine."""
    return (1 - functional.cosine_similarity(predicted, target, dim=-1)).mean()


def step_indices(step: int, seed: int, num_pairs: int, batch_size: int) -> Tensor:
    """Which pairs a step trains on: drawn from the seed and the number of the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(num_pairs, (batch_size,), generator=generator)


def train_inner(
    agent: Agent,
    turns: Sequence[EncodedTurn],
    settings: InnerSettings,
    *,
    seed: int = 0,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the inner link of one agent on its own turns; return the loss before and after."""
    model, link = agent.model, agent.inner_link
    pairs = collect_pairs(model, turns, with_end=True)
    # States stay in the memory of the host, and go to the model's device batch by batch.
    states, tokens = pairs.states, torch.tensor(pairs.token_ids)
    loud = states[:_CALIBRATED].to(model.device)
    norms = [model.embed(part).float().norm(dim=-1).cpu() for part in tokens.split(_CALIBRATED)]
    target_norm = torch.cat(norms).mean().item()
    link.calibrate(loud, target_norm)

    def loss_of(chosen: Tensor) -> Tensor:
        return cosine_loss(link(states[chosen].to(model.device)), model.embed(tokens[chosen]).float())

    @torch.no_grad()
    def loss_of_all() -> float:
        parts = torch.arange(len(tokens)).split(_CALIBRATED)
        return sum(loss_of(part).item() * len(part) for part in parts) / len(tokens)

    def loss_of_step(step: int) -> Tensor:
        return loss_of(step_indices(step, seed, len(tokens), settings.batch_size))

    before = loss_of_all()

    fit(f"inner-{agent.role}", dict(link.named_parameters()), loss_of_step, settings, run=run, progress=progress)
    if link.target_norm is None:
        link.calibrate(loud, target_norm)
    return {"pairs": float(len(tokens)), "loss_before": before, "loss_after": loss_of_all()}
