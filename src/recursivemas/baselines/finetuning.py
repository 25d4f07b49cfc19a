"""Fine-tuning of one language model on turns: what it read, and what it should have written.

The same loop as for links: optimizer, schedule, validation, resume. Knows one model and its turns; knows nothing of
roles, systems, or where the turns come from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from recursivemas.errors import InputError
from recursivemas.models import LanguageModel
from recursivemas.training.data import EncodedTurn
from recursivemas.training.inner import step_indices
from recursivemas.training.loop import Fitted, Progress, RunDirectory, Validation, fit
from recursivemas.training.methods import FineTuning

_READ_TOGETHER = 64


def finetune(
    stage: str,
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    turns: Sequence[EncodedTurn],
    settings: FineTuning,
    *,
    score: Callable[[], float] | None = None,
    seed: int = 0,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train `parameters` of a model in place, by the cross-entropy of every token of its replies, their ends included.

    `score` judges the model as it is, the higher the better; the weights that did best are those at the end. Raises
    `InputError` without turns, and `NumericsError` as `fit` does.
    """
    if not turns:
        raise InputError(f"{stage}: there are no turns to train on")

    def losses(step: int) -> Iterator[Tensor]:
        chosen = [turns[row] for row in step_indices(step, seed, len(turns), settings.batch_size).tolist()]
        size = settings.micro_batch_size or len(chosen)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            yield summed_loss(model, part) / num_written(chosen)

    validation = None if score is None else Validation(score, settings.validate_every, settings.patience)
    return fit(stage, parameters, losses, settings, validation=validation, run=run, progress=progress)


@torch.no_grad()
def mean_loss(model: LanguageModel, turns: Sequence[EncodedTurn]) -> float:
    """Cross-entropy of the replies of some turns, mean over all their tokens."""
    total = 0.0
    for start in range(0, len(turns), _READ_TOGETHER):
        part = turns[start : start + _READ_TOGETHER]
        total += summed_loss(model, part).item()
    return total / num_written(turns)


def summed_loss(model: LanguageModel, turns: Sequence[EncodedTurn]) -> Float[Tensor, ""]:
    """Cross-entropy of the replies of some turns, summed over all their tokens.

    Turns are padded on the right, where a causal model does not look; logits are computed for replies alone.
    """
    replies = [_written(turn, model) for turn in turns]
    sequences = [[*turn.prompt_ids, *reply] for turn, reply in zip(turns, replies, strict=True)]
    longest = max(map(len, sequences))
    end = model.reply_end_id
    ids = torch.tensor([[*each, *[end] * (longest - len(each))] for each in sequences], device=model.device)
    is_reply = torch.zeros_like(ids, dtype=torch.bool)
    for row, (turn, sequence) in enumerate(zip(turns, sequences, strict=True)):
        is_reply[row, len(turn.prompt_ids) : len(sequence)] = True
        is_reply[row, [len(turn.prompt_ids) + place for place in turn.unjudged]] = False
    states = model.decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.logits(states[is_reply[:, 1:]]).float()
    return functional.cross_entropy(logits, ids[is_reply], reduction="sum")


def _written(turn: EncodedTurn, model: LanguageModel) -> list[int]:
    """What is learnt to be written: how a reply ends only where its end is there."""
    return turn.target_ids if turn.is_cut else [*turn.target_ids, model.reply_end_id]


def num_written(turns: Sequence[EncodedTurn]) -> int:
    """Tokens that are learnt to be written in some turns."""
    return sum(len(turn.target_ids) - len(turn.unjudged) + (not turn.is_cut) for turn in turns)
