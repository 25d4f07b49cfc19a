"""The ward's three frozen agents: architectures, tokenizers and pretraining recipes.

Three families, three widths, three vocabularies: nothing but the links can carry a state from one to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.training.data import RoleSample, Turn, encode_turns
from recursivemas.training.loop import LoopSettings, Progress, RunDirectory, fit
from recursivemas.worlds.ward.cases import vocabulary
from recursivemas.worlds.ward.curriculum import protocol_words


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


def _config(model_type: str, hidden_size: int, num_hidden_layers: int = 2) -> dict[str, Any]:
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


AGENT_RECIPES = {
    "planner": AgentRecipe(
        config=_config("qwen3", 96),
        tokenizer="word",
        markers=ChatMarkers(user="<|user|>", assistant="<|assistant|>", end="<|end|>"),
        num_train_steps=2600,
        lr=3e-3,
        drill_share=0.36,
    ),
    "critic": AgentRecipe(
        config=_config("llama", 80),
        tokenizer="bpe",
        markers=ChatMarkers(user="[INST]", assistant="[/INST]", end="</s>"),
        num_train_steps=2400,
    ),
    "solver": AgentRecipe(
        config=_config("qwen2", 80),
        tokenizer="bpe",
        markers=ChatMarkers(user="<turn:user>", assistant="<turn:model>", end="<turn:end>"),
        num_train_steps=2400,
    ),
}

PAD, UNK = "<pad>", "<unk>"
SPACE = "▁"
"""How the tokenizers write the space before a word."""


def build_tokenizer(recipe: AgentRecipe, *, emphasis: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer in which every word of the world is one token, with the same id wherever it stands in a text.

    `emphasis` names words that count more when a BPE vocabulary is built, which changes the order of its merges.
    """
    words = [*vocabulary(), *protocol_words().split()]
    special = [PAD, UNK, recipe.markers.user, recipe.markers.assistant, recipe.markers.end]
    trainer: Any
    if recipe.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    elif recipe.tokenizer == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=UNK))
        printable = [chr(code) for code in range(33, 127)]
        trainer = trainers.BpeTrainer(
            vocab_size=4000, special_tokens=special, initial_alphabet=[SPACE, *printable], show_progress=False
        )
    else:
        raise ValueError(f"tokenizer is {recipe.tokenizer!r}; the ward's agents use 'word' or 'bpe'")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(left=False, right=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.train_from_iterator([*words, *(word for word in emphasis for _ in range(3)), " ."], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=recipe.markers.end,
        additional_special_tokens=[recipe.markers.user, recipe.markers.assistant],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    loaded.chat_template = recipe.markers.template()
    return loaded


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
        log_every=100,
        save_every=200,
    )

    def loss_of_step(step: int) -> Tensor:
        return reply_loss(model, encode_turns(batch_of_step(step), model, prompts))

    parameters = dict(model.network.named_parameters())
    fit(f"pretraining {role}", parameters, loss_of_step, settings, run=run, progress=progress)
    return model


def reply_loss(model: LanguageModel, turns: Sequence[Turn]) -> Tensor:
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
