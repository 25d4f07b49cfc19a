"""How a tiny agent is made from nothing: its recipe, and the training on its own text.

A world brings the text and the tokenizers; what is common to all worlds stands here. Knows nothing of links or systems.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.training.data import EncodedTurn, encode_turns
from recursivemas.training.loop import LoopSettings, Progress, RunDirectory, fit

if TYPE_CHECKING:
    from recursivemas.worlds.world import World


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


def small_config(model_type: str, hidden_size: int, num_hidden_layers: int = 2) -> dict[str, Any]:
    """A model configuration of the size these worlds need."""
    num_heads = 4
    config = {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }
    return config | ({"head_dim": hidden_size // num_heads} if model_type == "qwen3" else {})


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
    least_exact: float | None = None
    """Where texts leave nothing to chance: an agent that writes a smaller share of its turns in the loop (training
    split) word for word is drawn again from other initial weights, and the best of three stays."""
    seed: int = field(default=0)


def pretrain(
    world: "World", role: str, *, run: RunDirectory | None = None, progress: Progress | None = None
) -> LanguageModel:
    """Train the agent of a role from random weights on its own text, and return it frozen.

    Every step: a batch of turns, each a prompt and what to write; cross-entropy of what is written (its end included),
    averaged over all its tokens. The seeds of the recipe and of the world decide weights and text.
    """
    recipe = world.agent_recipes[role]
    prompts = PromptSet.load(world.prompts)
    model = LanguageModel.from_config(recipe.config, world.tokenizer(role), seed=recipe.seed + world.seed)
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
        rng = np.random.default_rng([recipe.seed, world.seed, world.roles.index(role), step])
        batch = world.pretraining_batch(role, rng, recipe.batch_size)
        return reply_loss(model, encode_turns(batch, model, prompts))

    parameters = dict(model.network.named_parameters())
    fit(f"pretraining-{role}", parameters, loss_of_step, settings, run=run, progress=progress)
    return model


def reply_loss(model: LanguageModel, turns: Sequence[EncodedTurn]) -> Tensor:
    """Cross-entropy of the replies, mean over all their tokens.

    Turns are padded on the right here: a causal model needs no mask then, and computes faster.
    """
    logits, tokens = _judge(model, turns)
    return functional.cross_entropy(logits, tokens)


@torch.no_grad()
def exact_share(world: "World", role: str, model: LanguageModel, num_samples: int = 200) -> float:
    """Share of its turns in the loop (training split, so many of each kind of note) that an agent writes word for word.

    Decoding greedily writes a text if, and only if, each of its tokens is the most probable one after those before it.
    """
    prompts = PromptSet.load(world.prompts)
    right = []
    for variant in world.variants:
        turns = encode_turns(world.role_samples("train", num_samples, 0, role=role, variant=variant), model, prompts)
        logits, tokens = _judge(model, turns)
        lengths = [len(turn.target_ids) + 1 - len(turn.unjudged) for turn in turns]
        parts = (logits.argmax(dim=-1) == tokens).split(lengths)
        right += [bool(part.all()) for part in parts]
    return sum(right) / len(right)


def _judge(
    model: LanguageModel, turns: Sequence[EncodedTurn]
) -> tuple[Float[Tensor, "token vocab_size"], Int[Tensor, " token"]]:
    """Logits of every token of every reply (its end included) that is judged, given those before it, and the tokens."""
    end = model.reply_end_id
    sequences = [[*turn.prompt_ids, *turn.target_ids, end] for turn in turns]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[end] * (longest - len(sequence))] for sequence in sequences], device=model.device)
    written = torch.zeros_like(ids, dtype=torch.bool)
    for row, (turn, sequence) in enumerate(zip(turns, sequences, strict=True)):
        written[row, len(turn.prompt_ids) : len(sequence)] = True
        written[row, [len(turn.prompt_ids) + place for place in turn.unjudged]] = False
    states = model.decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return model.logits(states[written[:, 1:]]), ids[written]
