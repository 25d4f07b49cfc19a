"""What agents take on a device, by residency and by bits: weights, the peak of a run, moves, and seconds.

A sequential system of three random models of unequal size is saved, and loaded again in every way. Weights are counted
as they are held; the peak of allocated memory is measured where the device is a GPU, over loading and over a run. A way
that cannot be had here says why. Every way is loaded twice, in turns, and answers the same questions; seconds are the
smaller of the two. Run: python benchmarks/memory.py [--device cuda] [--size 256] [--layers 6] [--dtype bfloat16]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from parallel_roles import QUESTIONS, language_model
from transformers.utils.logging import disable_progress_bar

from recursivemas import RecursiveSystem, SamplingParams
from recursivemas.errors import RecursiveMASError

WAYS = list(product((None, "8bit", "4bit"), ("all", "one")))


def saved_system(directory: Path, size: int, layers: int) -> Path:
    """Three models: of this width, and of half and twice as many layers."""
    agents = {
        role: language_model(size, number, "cpu")
        for role, number in zip(("planner", "critic", "solver"), (layers, max(layers // 2, 1), 2 * layers), strict=True)
    }
    RecursiveSystem.build(agents=agents).save_pretrained(directory)
    return directory


def measured(place: Path, bits: str | None, residency: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load and run a system in one way."""
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    options = {"*": {"quantization": bits}} if bits else None
    try:
        system = RecursiveSystem.from_pretrained(
            place, device=args.device, dtype=args.dtype, options=options, residency=residency
        )
    except RecursiveMASError as error:
        return {"refused": str(error)}
    sizes = [model.network.get_memory_footprint() for model in system.models]
    found: dict[str, Any] = {"weights": sum(sizes), "on_device": max(sizes) if residency == "one" else sum(sizes)}
    if on_gpu:
        found["peak_of_loading"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    turns = system.models[0].turns
    before = turns.num_moves if turns is not None else 0
    began = time.perf_counter()
    system.run(
        QUESTIONS[: args.questions],
        num_rounds=args.rounds,
        num_latent_steps=16,
        sampling=SamplingParams(max_new_tokens=16),
        trace="off",
    )
    if on_gpu:
        torch.cuda.synchronize()
        found["peak_of_run"] = torch.cuda.max_memory_allocated()
    found["moves"] = turns.num_moves - before if turns is not None else 0
    return {**found, "seconds": time.perf_counter() - began}


def table(rows: dict[tuple[str | None, str], dict[str, Any]]) -> Iterator[str]:
    """One line for each way."""
    sizes = ["weights", "on_device", "peak_of_loading", "peak_of_run"]
    yield (
        f"{'bits':6} {'residency':10}" + "".join(f"{name.replace('_', ' '):>17}" for name in sizes) + "  moves  seconds"
    )
    for (bits, residency), row in rows.items():
        if "refused" in row:
            yield f"{bits or '-':6} {residency:10} {row['refused']}"
            continue
        held = "".join(f"{row[name] / 1e6:14.1f} MB" if name in row else f"{'-':>17}" for name in sizes)
        yield f"{bits or '-':6} {residency:10}{held}  {row['moves']:5}  {row['seconds']:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    disable_progress_bar()
    rows: dict[tuple[str | None, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = saved_system(Path(directory) / "system", args.size, args.layers)
        for way in WAYS * 2:
            row = measured(place, *way, args)
            if way in rows and "seconds" in row:
                row["seconds"] = min(row["seconds"], rows[way]["seconds"])
            rows[way] = row
    if args.json:
        print(json.dumps([{"bits": bits, "residency": held, **row} for (bits, held), row in rows.items()], indent=2))
    else:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
