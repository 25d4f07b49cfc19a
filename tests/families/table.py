"""The families: tiny random checkpoints of their real classes, with chat templates of the shapes that theirs have.

A row says what is particular about a family, so that tests know which faults can matter to it. Words and sizes are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.conftest import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5ForConditionalGeneration,
)

from recursivemas.models import LanguageModel

WINDOW = 16
WIDTHS = (48, 64)
SPECIAL_TOKENS = [
    "<|bos|>",
    "[INST]",
    "[/INST]",
    "<think>",
    "</think>",
    "<|user|>",
    "<|assistant|>",
    "<|turn|>",
    "<|end|>",
]

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    # A system text of its own where none is given (Qwen2.5, Coder).
    "default system": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # The reply is opened with a thought that is not closed; the system has no marks around it (DeepSeek-R1-Distill).
    "open thought": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'].split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    # A switch for thinking; off means an empty thought in the generation prompt (Qwen3).
    "enable_thinking": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # Every reply, past ones too, begins with an empty thought (Qwen3.5).
    "empty thought": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    # The date of today in a system text that is always there (Llama 3).
    "dated": "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start|>system<|mid|>Today: {{ date_string }}\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|im_end|>{% for m in messages %}<|start|>{{ m['role'] }}<|mid|>{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>{% endif %}",
    # No system role, which is said; strict alternation (Gemma 1 and 2, Mistral 1).
    "no system role": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}<|turn|>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}",
    # The system's text is put before the user's by the template itself (Gemma 3).
    "system in user": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}<|turn|>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ first if loop.first else '' }}"
    "{{ m['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}",
    # Strict alternation, no end mark but the end of the sequence, and nothing in the generation prompt (Mistral 1).
    "alternation": "{{ bos_token }}"
    + ALTERNATE
    + "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}<|eos|>{% endif %}{% endfor %}",
    # The system's text is passed over in silence.
    "deaf to the system": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|eos|>{% endif %}{% endfor %}",
    # Tags of its own, and an end of reply that is the end of the sequence (OLMo 2).
    "tagged": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|eos|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
DEAF = ("no system role", "alternation", "deaf to the system")
"""Templates that leave the merging of the system's text to whoever uses them."""


@dataclass(frozen=True)
class Family:
    """One row: how a checkpoint of it is made, and what is particular about it."""

    template: str
    make: Callable[[dict[str, Any], int], PreTrainedModel]
    """From sizes common to all, and a width, to a random network."""
    window: bool = False
    recurrent: bool = False
    scaled: bool = False

    @property
    def merges_system(self) -> bool:
        """Whether the template has no place for a system's text."""
        return self.template in DEAF


def text(model_type: str, **more: Any) -> Callable[[dict[str, Any], int], PreTrainedModel]:
    """A network of text alone."""

    def make(common: dict[str, Any], width: int) -> PreTrainedModel:
        settings = {**common, "initializer_range": 0.1, **of_width(width), **more}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))

    return make


def of_width(width: int) -> dict[str, Any]:
    return {"hidden_size": width, "head_dim": width // 4, "intermediate_size": 80}


def hybrid(width: int) -> dict[str, Any]:
    """Sizes of linear attention. Weights are small: random hybrids with large ones amplify rounding."""
    return {
        **of_width(width),
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 1],
        },
        "initializer_range": 0.02,
    }


def gemma(width: int) -> dict[str, Any]:
    """Sizes of a sliding window and of heads. Weights are smaller, for the reason given above."""
    return {
        **of_width(width),
        "query_pre_attn_scalar": width,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.02,
    }


def gemma3(common: dict[str, Any], width: int) -> PreTrainedModel:
    """The whole of a model that also sees, as its checkpoints are."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "gemma3", text_config={**common, **gemma(width)}, vision_config=vision, mm_tokens_per_image=4
    )
    config.update({name: common[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")})
    return Gemma3ForConditionalGeneration(config)


def qwen3_5(common: dict[str, Any], width: int) -> PreTrainedModel:
    """The whole of a model that also sees, with a text part of linear attention."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": width}
    config = AutoConfig.for_model("qwen3_5", text_config={**common, **hybrid(width)}, vision_config=vision)
    return Qwen3_5ForConditionalGeneration(config)


FAMILIES = {
    "qwen2": Family("default system", text("qwen2")),
    "qwen2-r1": Family("open thought", text("qwen2")),
    "qwen3": Family("enable_thinking", text("qwen3")),
    "qwen3_5": Family("empty thought", lambda c, w: text("qwen3_5_text", **hybrid(w))(c, w), recurrent=True),
    "qwen3_5-sees": Family("empty thought", qwen3_5, recurrent=True),
    "llama": Family(
        "dated",
        text(
            "llama",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "gemma3_text": Family(
        "no system role", lambda c, w: text("gemma3_text", **gemma(w))(c, w), window=True, scaled=True
    ),
    "gemma3-sees": Family("system in user", gemma3, window=True, scaled=True),
    "mistral": Family("deaf to the system", text("mistral", sliding_window=None)),
    "mistral-window": Family("alternation", text("mistral", sliding_window=WINDOW), window=True),
    "olmo2": Family("tagged", text("olmo2")),
}


def save_checkpoint(name: str, directory: Path, *, width: int = WIDTHS[0], seed: int = 0) -> Path:
    """A random checkpoint of a family, as a directory in the format of transformers."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer("qwen2", chat_template=TEMPLATES[family.template], special_tokens=SPECIAL_TOKENS)
    common = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = family.make(common, width)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load_family(name: str, directory: Path, *, width: int = WIDTHS[0], seed: int = 0, **options: Any) -> LanguageModel:
    """A random model of a family, by way of a checkpoint of it."""
    checkpoint = save_checkpoint(name, directory, width=width, seed=seed)
    return LanguageModel.from_pretrained(checkpoint, device="cpu", **options)
