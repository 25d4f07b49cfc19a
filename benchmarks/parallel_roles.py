"""What it saves that roles of one stage who share a model think and write as one batch: ratios within one run.

A mixture of three specialists on one random model, against the same system with a copy of the weights for each of
them, which are played one after the other. Both give the same answers. On a CPU one thread is used, and its own
seconds are counted, so that other work does little harm. Run: python benchmarks/parallel_roles.py [--device cuda]
"""

import argparse
import statistics
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recursivemas import LanguageModel, RecursiveSystem, SamplingParams
from recursivemas.answering import Result
from recursivemas.trace import Meter

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
QUESTIONS = [
    f"A train leaves at {hour} o'clock and goes at {speed} miles an hour. How far has it come at {hour + 3}?"
    for hour in range(1, 9)
    for speed in (40, 55, 60, 75, 80, 95, 100, 120)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    plain = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<|pad|>", eos_token="<|end|>", extra_special_tokens=special[1:3]
    )
    fast.chat_template = TEMPLATE
    return fast


def language_model(size: int, layers: int, device: str | None) -> LanguageModel:
    """The same random weights at every call."""
    config = {
        "model_type": "qwen3",
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": size // 8,
        "max_position_embeddings": 4096,
    }
    return LanguageModel.from_config(config, tokenizer(), device=device)


def mixture(specialists: list[LanguageModel], summarizer: LanguageModel) -> RecursiveSystem:
    """Three specialists and a summarizer."""
    agents = dict(zip(("math", "code", "science"), specialists, strict=True))
    return RecursiveSystem.build(pattern="mixture", agents={**agents, "summarizer": summarizer}, num_rounds=2)


def seconds_of_specialists(results: list[Result], phases: tuple[str, ...]) -> float:
    """Seconds that the three have used, over all questions."""
    turns = [turn for result in results for turn in result.usage.turns if turn.role != "summarizer"]
    return sum(turn.seconds[phase] for turn in turns for phase in phases)


def main() -> None:
    """Print one line for every channel and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--latent-steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="length of a text message")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if str(options.device).startswith("cuda") else time.process_time
    if clock is time.process_time:
        Meter._now = lambda self: time.process_time()
    shared, *copies = (language_model(options.size, options.layers, options.device) for _ in range(4))
    arms = {"together": mixture([shared] * 3, shared), "one after the other": mixture(copies, shared)}
    print(
        "channel  batch   specialists' thinking and writing   their whole work   whole run   (ratio: after / together)"
    )
    for channel in ("latent", "text"):
        for batch_size in (1, 4, 16, 64):
            ratios: dict[str, list[float]] = {"thinking": [], "specialists": [], "run": []}
            for repeat in range(options.repeats + 1):
                took: dict[str, dict[str, float]] = {}
                texts = []
                for name, system in arms.items():
                    start = clock()
                    results = system.run(
                        QUESTIONS[:batch_size],
                        channel=channel,
                        num_latent_steps=options.latent_steps,
                        sampling=SamplingParams(max_new_tokens=options.tokens),
                        trace="off",
                        batch_size=batch_size,
                    )
                    took[name] = {
                        "run": clock() - start,
                        "thinking": seconds_of_specialists(results, ("latent", "decode")),
                        "specialists": seconds_of_specialists(results, ("prefill", "latent", "link", "decode")),
                    }
                    texts.append([result.text for result in results])
                assert texts[0] == texts[1], "the two systems disagree"
                for what, of_what in ratios.items() if repeat else ():  # the first is a warm-up
                    of_what.append(took["one after the other"][what] / took["together"][what])
            thinking, specialists, run = (statistics.median(each) for each in ratios.values())
            print(f"{channel:8} {batch_size:5}   {thinking:33.2f}   {specialists:16.2f}   {run:9.2f}", flush=True)


if __name__ == "__main__":
    main()
