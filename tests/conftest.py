"""Tiny models of three architectures with tokenizers of their own, and systems made of them. Nothing is downloaded."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)

from collections.abc import Callable, Iterator, Sequence

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

torch.set_num_threads(1)

CORPUS = [
    "A planner writes a plan and a critic improves it before the solver answers the question.",
    "What is seventeen plus twenty-five? It is forty-two, and two times twenty-one is the same.",
    "The quick brown fox jumps over the lazy dog near the river bank at dawn.",
] * 4

CHAT_TEMPLATES = {
    "qwen3": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama": "{% for m in messages %}<|start|>{{ m['role'] }}<|mid|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>{% endif %}",
    "qwen2": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
}

# In a long prompt of a random model a message is hardly heard; here it is.
FEW_WORDS = {
    "name": "few-words",
    "roles": {
        "planner": {"first": "{question}", "later": "{question} {latents:solver}"},
        "critic": {"always": "{question} {latents:planner}"},
        "solver": {"always": "{question} {latents:critic}", "last": "{question} {latents:critic} So:"},
    },
}

SIZES = {
    "qwen3": {"hidden_size": 48, "head_dim": 12, "vocab_size": 300},
    "llama": {"hidden_size": 64, "vocab_size": 330},
    "qwen2": {"hidden_size": 56, "vocab_size": 360},
}


def make_tokenizer(
    family: str, *, chat_template: str | None = None, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's toy chat template, or another with special tokens of its own.

    Like many real ones it begins whatever it is given with <|bos|>, if that is one of them, unless told not to.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|mid|>", *special_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES[family]["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    roles = {"pad_token": "<|pad|>", "eos_token": "<|eos|>"}
    if "<|bos|>" in special:
        roles["bos_token"] = "<|bos|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=special[2:], **roles)
    fast.chat_template = chat_template or CHAT_TEMPLATES[family]
    return fast


def make_model(family: str, seed: int = 0, **config: object) -> LanguageModel:
    """A random tiny model whose greedy text is varied enough to tell one state from another."""
    settings = {
        "model_type": family,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        **{name: value for name, value in SIZES.get(family, SIZES["qwen2"]).items() if name != "vocab_size"},
        **config,
    }
    tokenizer = make_tokenizer(family if family in CHAT_TEMPLATES else "qwen2")
    return LanguageModel.from_config(settings, tokenizer, seed=seed, device="cpu")


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, LanguageModel]:
    """One random model of each architecture, by family."""
    return {family: make_model(family, seed) for seed, family in enumerate(SIZES)}


@pytest.fixture
def make_system(tiny_models: dict[str, LanguageModel]) -> Callable[..., RecursiveSystem]:
    """Builds a sequential system of three random models; keywords go to `RecursiveSystem.build`."""

    def make(**options: object) -> RecursiveSystem:
        settings: dict[str, object] = {
            "agents": {
                "planner": tiny_models["qwen3"],
                "critic": tiny_models["llama"],
                "solver": tiny_models["qwen2"],
            },
            "num_rounds": 2,
            "num_latent_steps": 4,
            "max_new_tokens": 12,
            **options,
        }
        return RecursiveSystem.build(**settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def system(make_system: Callable[..., RecursiveSystem]) -> RecursiveSystem:
    """A sequential system of three random models."""
    return make_system()


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Questions of very unequal length."""
    return [
        "What is 2 + 2?",
        "A fox runs for two hours at four miles an hour, rests, and then runs half as far again. How far did it run?",
        "Why?",
        "The planner and the critic disagree about the plan, and the solver has to answer before dawn. Who is right?",
        "Name the river.",
    ]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches the checks of types off: what a user gets who gives a wrong one, as nothing is checked outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many cases of the exactness matrix were run, and over which families."""
    place = "tests/families/test_matrix.py::"
    outcomes = {name: terminalreporter.stats.get(name, []) for name in ("passed", "failed")}
    cases = {name: [each.nodeid for each in reports if place in each.nodeid] for name, reports in outcomes.items()}
    ids = [nodeid.partition("[")[2].rstrip("]") for nodeids in cases.values() for nodeid in nodeids]
    if ids:
        from tests.families.table import FAMILIES

        known = sorted([*FAMILIES, "mixed"], key=len, reverse=True)
        rows = {next((name for name in known if name in each), "") for each in ids} - {""}
        failed = f", {len(cases['failed'])} failed" if cases["failed"] else ""
        terminalreporter.write_line(f"exactness matrix: {len(ids)} cases over {len(rows)} families{failed}")
