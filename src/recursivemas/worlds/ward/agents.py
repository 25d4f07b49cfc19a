"""The ward's three frozen agents: architectures, tokenizers and pretraining recipes.

Three families, three widths, three vocabularies: nothing but the links can carry a state from one to the next.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recursivemas.worlds.pretraining import AgentRecipe, ChatMarkers
from recursivemas.worlds.ward.cases import vocabulary
from recursivemas.worlds.ward.curriculum import protocol_words


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
        num_train_steps=2800,
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
