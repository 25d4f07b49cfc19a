"""What an answer costs in consult: floating-point operations and seconds, of the expert alone and of every other way.

    python benchmarks/consult_cost.py                           the shipped system; minutes
    python benchmarks/consult_cost.py --out FILE.json           write the figures, too

Operations are counted by torch's `FlopCounterMode` while a batch is answered, with attention as torch computes it on a
CPU, which that counter does not know. Seconds are those of this process on one thread, so that other work does little
harm; the ways take turns, and ratios are taken within each turn. Every way writes answers of the same form.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from recursivemas.answering import Result
from recursivemas.evaluation.metrics import mean
from recursivemas.system import RecursiveSystem
from recursivemas.worlds import load_world

BATCHES = (1, 32, 250)
NUM_ANSWERED = {1: 24, 32: 128, 250: 500}
"""Questions that are answered in a turn, by the size of a batch."""


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of one call of attention: queries with keys, and weights with values."""
    batch, heads, rows, size = query
    return 2 * batch * heads * rows * key[-2] * (size + value[-1])


ATTENTION: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}

Way = Callable[[Sequence[str], int], list[Result]]
"""Answers questions, in batches of a size."""


def ways(system: RecursiveSystem) -> dict[str, Way]:
    """Every way to an answer, by the name that the evaluation gives it."""
    players: dict[str, tuple[RecursiveSystem, dict[str, str]]] = {
        "solo:expert": (system.solo("expert"), {}),
        "solo": (system.solo(), {}),
        "latent": (system, {"channel": "latent"}),
        **{f"text/{each}": (system, {"channel": "text", "variant": each}) for each in system.prompts.variants},
    }

    def way(player: RecursiveSystem, options: dict[str, str]) -> Way:
        return lambda asked, size: player.run(list(asked), batch_size=size, trace="off", num_rounds=1, **options)

    return {name: way(*each) for name, each in players.items()}


def flops(way: Way, asked: Sequence[str], size: int) -> float:
    """Operations of an answer, in millions."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        way(asked[:size], size)
    return counter.get_total_flops() / size / 1e6


def seconds(way: Way, asked: Sequence[str], size: int) -> float:
    """Processor seconds of an answer."""
    start = time.process_time()
    way(asked, size)
    return (time.process_time() - start) / len(asked)


def measure(system: RecursiveSystem, asked: Sequence[str], size: int, repeats: int) -> list[dict[str, Any]]:
    """What every way costs with batches of one size."""
    found = ways(system)
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeats + 1):
        for name, way in found.items():
            spent = seconds(way, asked, size)
            if turn:  # first calls are slow for reasons of their own
                times[name].append(spent)
    counted = {name: flops(way, asked, size) for name, way in found.items()}
    rows = []
    for name in found:
        tokens = [float(each.usage.generated_tokens) for each in found[name](asked, size)]
        share = mean([ours / theirs for ours, theirs in zip(times[name], times["solo:expert"], strict=True)])
        rows.append(
            {
                "batch_size": size,
                "arm": name,
                "mflop": counted[name],
                "flop_share": counted[name] / counted["solo:expert"],
                "milliseconds": 1000 * statistics.median(times[name]),
                "time_share": share.value,
                "time_share_stderr": share.stderr,
                "generated_tokens": mean(tokens).value,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="consult", help="a system of the consult world")
    parser.add_argument("--repeats", type=int, default=6, help="turns that count")
    parser.add_argument("--out", type=Path, help="where the figures are written as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    system = RecursiveSystem.from_pretrained(given.system, device="cpu", dtype="float32")
    samples = load_world("consult").samples("test", max(NUM_ANSWERED.values()), 0)
    rows = []
    print(f"{'batch':>5}  {'':<12} {'MFLOP':>8} {'share':>6} {'ms':>8} {'share':>14} {'tokens':>7}")
    for size in BATCHES:
        for row in measure(system, [each.question for each in samples[: NUM_ANSWERED[size]]], size, given.repeats):
            rows.append(row)
            share = f"{row['time_share']:.3f} ± {row['time_share_stderr']:.3f}"
            print(
                f"{size:>5}  {row['arm']:<12} {row['mflop']:>8.1f} {row['flop_share']:>6.3f} "
                f"{row['milliseconds']:>8.2f} {share:>14} {row['generated_tokens']:>7.1f}"
            )
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
