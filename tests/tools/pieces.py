"""Random models whose few words are pieces of tags, so that what they sample is full of calls, whole and broken."""

import re
from typing import Any

import torch
from tests.families.table import hybrid
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from recursivemas.models import LanguageModel
from recursivemas.tools import FunctionTool

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PIECES = [
    "<add",
    ">",
    "</add",
    "<",
    "add>",
    "/add>",
    "<res",
    "ult>",
    "<result>",
    "</res",
    "sult",
    "</add>",
    "<add>",
    "1",
    "2",
    "+",
]
CHARACTERS = sorted(
    set("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>/+-_:;,.'()\n\t[]&\ufffd")
    - set("".join(p for p in PIECES if len(p) == 1))
)
CONFIGS: dict[str, dict[str, Any]] = {
    "full attention": {"model_type": "qwen3"},
    "sliding window": {"model_type": "mistral", "sliding_window": 8},
    "linear attention": {"model_type": "qwen3_5_text", **hybrid(32), "initializer_range": 0.1},
}


def make_pieces_model(kind: str = "full attention", *, seed: int = 0, **config: Any) -> LanguageModel:
    """A random model that samples pieces of tags; all other characters are there, too, so that it can read anything."""
    special = ["<|pad|>", "<|eos|>"]
    vocabulary = [
        (piece, 0.0 if piece in special else -float(2 if len(piece) > 1 else 3))
        for piece in [*special, *PIECES, *CHARACTERS]
    ]
    tokenizer = Tokenizer(tokenizer_models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")
    fast.chat_template = TEMPLATE
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        **CONFIGS[kind],
        **config,
    }
    model = LanguageModel.from_config(settings, fast, seed=seed, device="cpu")
    # What it can read is more than what it writes: pieces of tags, now and then the end.
    old = model.network.get_output_embeddings().weight.data
    head = torch.nn.Linear(old.shape[1], old.shape[0])
    head.weight.data, head.bias.data = 2 * old, torch.full((len(old),), -1e4)
    head.bias.data[1] = -1.5
    head.bias.data[2 : 2 + len(PIECES)] = 0
    for piece in ("<add>", "</add>", "1", "2", "+"):
        head.bias.data[2 + PIECES.index(piece)] = 1.5
    model.network.set_output_embeddings(head.requires_grad_(False))
    return model


def add(argument: str) -> str:
    """Adds the numbers in a text; one without any is an error."""
    numbers = re.findall(r"\d+", argument)
    if not numbers:
        raise ValueError("there is no number")
    return str(sum(map(int, numbers)))


ADD = FunctionTool("add", "numbers with plus signs between them; their sum comes back.", add)
