"""A language model that is small enough for an example: random weights, and a token for every byte.

It writes nonsense, but what happens between the agents is what happens between large ones. To use real models, give
their names instead: `agents={"expert": "Qwen/Qwen3-8B", ...}`.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from recursivemas import LanguageModel

logging.disable_progress_bar()
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


def tokenizer():
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=special[0], eos_token=special[3], extra_special_tokens=special[1:3]
    )
    fast.chat_template = CHAT
    return fast


def tiny_model(family="qwen3", hidden_size=32, seed=0):
    """A model of this architecture (qwen3, llama, qwen2, mistral, ...) on the CPU."""
    config = {
        "model_type": family,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
    }
    return LanguageModel.from_config(config, tokenizer(), seed=seed, device="cpu")
