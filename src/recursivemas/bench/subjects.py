"""What is measured: models with random weights, chains of agents on them, and questions of a given length.

A random model has the words w0, w1, ... and never ends its text by itself, so a text of n tokens is one of n words, and
is read as n tokens again. What weights hold does not change what a step costs. Knows nothing of time.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from recursivemas.checkpoint import BUNDLED
from recursivemas.errors import ConfigError, unknown_name
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.worlds import load_world, world_names
from recursivemas.worlds.tokenizers import numbered_words

CONFIGS = BUNDLED.parent / "configs"
"""Configurations of real models that come with this package."""
NAMES = ("planner", "critic", "solver", "judge", "editor")
NUM_SPECIAL = 2
VOCAB_SIZE = 1000
HEAD_SIZE = 32
LEAST_HEAD_SIZE = 16

Config = dict[str, Any]


def configuration(name: str) -> Config:
    """The configuration of a random model: WIDTHxLAYERS, or the name of a model whose configuration is bundled.

    Raises `ConfigError`.
    """
    sizes = re.fullmatch(r"(\d+)x(\d+)", name)
    if sizes:
        return small_configuration(int(sizes[1]), int(sizes[2]))
    file = CONFIGS / f"{name.replace('/', '__')}.json"
    if not file.is_file():
        known = [each.stem.replace("__", "/") for each in sorted(CONFIGS.glob("*.json"))]
        raise ConfigError(f"{unknown_name('configuration', name, known)}; or give WIDTHxLAYERS, like 256x6")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def small_configuration(hidden_size: int, num_layers: int) -> Config:
    """A Qwen3 of this width and depth, with half as many heads for keys as for queries. Raises `ConfigError`."""
    if hidden_size < 2 * HEAD_SIZE or hidden_size % (2 * HEAD_SIZE) or num_layers < 1:
        raise ConfigError(
            f"a random model of width {hidden_size} and {num_layers} layers was asked for; the width must be a "
            f"multiple of {2 * HEAD_SIZE}, and there must be a layer, like 256x6"
        )
    return {
        "model_type": "qwen3",
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
        "num_key_value_heads": hidden_size // HEAD_SIZE // 2,
        "head_dim": HEAD_SIZE,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 16384,
    }


def scaled(config: Mapping[str, Any], scale: int) -> Config:
    """The same model so many times narrower and shallower, with a vocabulary and a window as many times smaller.

    It keeps its shares: of heads for keys, of the feed-forward part. It has two layers at least, and one of each kind.
    """
    if scale == 1:
        return dict(config)
    found = dict(config)
    for name in ("hidden_size", "intermediate_size", "vocab_size", "sliding_window"):
        if found.get(name):
            found[name] = max(config[name] // scale, 8)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fewer = _common_power(scale, heads, key_heads)
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    found |= {"num_attention_heads": heads // fewer, "num_key_value_heads": key_heads // fewer}
    found["head_dim"] = max(head_size * fewer // scale, LEAST_HEAD_SIZE)
    linear = [name for name in ("linear_num_key_heads", "linear_num_value_heads") if name in config]
    for name in linear:
        found[name] = config[name] // _common_power(scale, *(config[each] for each in linear))
    found["num_hidden_layers"] = max(round(config["num_hidden_layers"] / scale), 2)
    kinds = KINDS.get(config["model_type"])
    if kinds:
        found["layer_types"] = [kinds[layer % len(kinds)] for layer in range(found["num_hidden_layers"])]
    return found


KINDS = {
    "gemma3_text": ("sliding_attention", "full_attention"),
    "qwen3_5_text": ("linear_attention", "full_attention"),
}
"""Of families with several kinds of layers: which a shallow one has, in turns."""


def _common_power(most: int, *numbers: int) -> int:
    """The largest power of two, up to `most`, that divides all numbers."""
    power = 1
    while 2 * power <= most and all(number % (2 * power) == 0 for number in numbers):
        power *= 2
    return power


def random_model(
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LanguageModel:
    """A model of this configuration with random weights; its special tokens are never the likeliest."""
    tokenizer = numbered_words(config["vocab_size"])
    model = LanguageModel.from_config(dict(config), tokenizer, seed=seed, device=device, dtype=dtype)
    with torch.no_grad():
        model.network.get_output_embeddings().weight[:NUM_SPECIAL] = 0.0
    return model


def chain(
    models: Sequence[LanguageModel], *, after: int, num_rounds: int = 1, num_latent_steps: int = 16
) -> RecursiveSystem:
    """Agents in a row, the last of whom answers and sends back to the first; each has a slot in its prompt.

    Before its slot a prompt has the name of its reader, one word, and the question; behind it `after` words.
    """
    roles = NAMES[: len(models)]
    edges = [f"{source}->{target}" for source, target in [*pairwise(roles), (roles[-1], roles[0])]]
    sources = {target: source for source, _, target in (edge.partition("->") for edge in edges)}
    behind = " ".join(f"w{number}" for number in range(after))
    return RecursiveSystem.build(
        agents=dict(zip(roles, models, strict=True)),
        pattern={"name": "chain", "stages": [[role] for role in roles], "edges": edges, "answers": roles[-1]},
        prompts={
            "name": "chain",
            "roles": {role: {"always": f"{role} {{question}} {{latents:{sources[role]}}} {behind}"} for role in roles},
        },
        num_rounds=num_rounds,
        num_latent_steps=num_latent_steps,
        name=f"chain of {len(roles)}",
    )


def numbered_questions(num_questions: int, num_words: int, seed: int = 0) -> list[str]:
    """Questions of so many words, which every random model knows."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 50, (num_questions, num_words), generator=generator)
    return [" ".join(f"w{number}" for number in row) for row in words.tolist()]


def questions_for(system: RecursiveSystem, num_questions: int, seed: int = 0) -> list[str]:
    """Questions that a system can read: those of its world, if it has one, else some plain ones."""
    if system.settings.name in world_names():
        samples = load_world(system.settings.name).samples("test", num_questions, seed)
        return [sample.question for sample in samples]
    return [
        f"A train leaves at {1 + number % 12} o'clock, goes at {40 + 5 * (number % 17)} miles an hour, and stops for "
        f"{5 + number % 11} minutes on its way. How far has it come {2 + number % 5} hours later, and what is left "
        f"of a journey of {500 + number} miles?"
        for number in range(num_questions)
    ]


def parse_names(text: str, known: Sequence[str], what: str) -> list[str]:
    """Names separated by commas. Raises `ConfigError` for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name(what, name, known))
    return names
