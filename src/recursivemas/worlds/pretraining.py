"""How a tiny agent is made from nothing: its recipe, and the training on its own text.

Worlds bring the text and the tokenizers; what is common to all of them stands here. Knows nothing of links or systems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.training.data import EncodedTurn, RoleSample, encode_turns
from recursivemas.training.loop import LoopSettings, Progress, RunDirectory, fit


@dataclass(frozen=True, kw_only=True)
class ChatMarkers:
    """The special tokens of one agent's chat template; `end` closes a turn and is the end-of-sequence token."""

    user: str
    assistant: str
    end: str

    def template(self) -> str:
        """The chat template: user turns are opened by their marker, assistant turns also closed."""
        return (
            "{% for message in messages %}{% if message['role'] == 'assistant' %}"
            f"{self.assistant}{{{{ message['content'] }}}}{self.end}"
            f"{{% else %}}{self.user}{{{{ message['content'] }}}}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{self.assistant}{{% endif %}}"
        )


@dataclass(frozen=True, kw_only=True)
class AgentRecipe:
    """How one agent is made: what it is, and how it is pretrained."""

    config: dict[str, Any]
    """Model configuration without what the tokenizer decides (vocabulary size, special token ids)."""
    tokenizer: str
    """`word` (one token per word, the rest unknown) or `bpe`."""
    markers: ChatMarkers
    num_train_steps: int
    batch_size: int = 64
    lr: float = 4e-3
    warmup_steps: int = 100
    min_lr_ratio: float = 0.03
    """The learning rate falls along a cosine to this share of `lr`."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    drill_share: float = 0.0
    """Share of batches that are textbook drills; they are short, so such a batch holds twice as many."""
    seed: int = field(default=0)


def pretrain(
    role: str,
    recipe: AgentRecipe,
    tokenizer: PreTrainedTokenizerFast,
    prompts: PromptSet,
    batch_of_step: Callable[[int], list[RoleSample]],
    *,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Train an agent from random weights on its own text, and return it frozen.

    Every step: a batch of turns, each a prompt and what to write; cross-entropy of what is written (its end included),
    averaged over all its tokens.
    """
    model = LanguageModel.from_config(recipe.config, tokenizer, seed=recipe.seed)
    settings = LoopSettings(
        num_train_steps=recipe.num_train_steps,
        lr=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        min_lr_ratio=recipe.min_lr_ratio,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        max_grad_norm=recipe.max_grad_norm,
        log_every=20,
        save_every=200,
    )

    def loss_of_step(step: int) -> Tensor:
        return reply_loss(model, encode_turns(batch_of_step(step), model, prompts))

    parameters = dict(model.network.named_parameters())
    fit(f"pretraining-{role}", parameters, loss_of_step, settings, run=run, progress=progress)
    return model


def reply_loss(model: LanguageModel, turns: Sequence[EncodedTurn]) -> Tensor:
    """Cross-entropy of the replies, mean over all their tokens.

    Turns are padded on the right here: a causal model needs no mask then, and computes faster.
    """
    end = model.reply_end_id
    sequences = [[*turn.prompt_ids, *turn.target_ids, end] for turn in turns]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[end] * (longest - len(sequence))] for sequence in sequences], device=model.device)
    written = torch.zeros_like(ids, dtype=torch.bool)
    for row, (turn, sequence) in enumerate(zip(turns, sequences, strict=True)):
        written[row, len(turn.prompt_ids) : len(sequence)] = True
    states = model.decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return functional.cross_entropy(model.logits(states[written[:, 1:]]), ids[written])
