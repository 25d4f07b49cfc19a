"""What looking at the outer loop costs (training/watch.py): steps of ward's recipe with and without, taking turns.

    python benchmarks/watching.py              minutes; processor time of one thread, ratios within one run

A stretch is as many steps as lie between two that are logged, so that it holds one at which everything is looked at.
The probe for an answer leak is made once in a training, and told apart.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from recursivemas import RecursiveSystem
from recursivemas.config import parse, read_yaml
from recursivemas.training.outer import OuterLoop
from recursivemas.training.recipe import Recipe
from recursivemas.training.watch import Watch
from recursivemas.worlds.material import material_of


def stretch(loop: OuterLoop, parameters: list[torch.nn.Parameter], first: int, number: int) -> float:
    """Processor seconds of some steps: their losses, gradients and figures."""
    started = time.process_time()
    for step in range(first, first + number):
        for part in loop.losses(step):
            part.backward()
        loop.observe(step)
        for parameter in parameters:
            parameter.grad = None
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/ward.yaml"))
    parser.add_argument("--repeats", type=int, default=5, help="stretches of each kind")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = parse(Recipe, read_yaml(given.recipe), where=str(given.recipe))
    system = RecursiveSystem.from_pretrained(recipe.system or "ward", dtype="float32", device="cpu")
    parameters = list(system.trainable_parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    questions = material_of(recipe, system.pattern).questions("train", recipe.outer.num_samples)
    loops = {
        "watched": OuterLoop(system, questions, recipe.outer, watch=Watch(system, dict(system.all_links))),
        "alone": OuterLoop(system, questions, recipe.outer),
    }
    started = time.process_time()
    loops["watched"].find_leak(questions[: recipe.outer.batch_size])
    probe = time.process_time() - started
    number = recipe.outer.log_every
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(given.repeats + 1):
        for name, loop in loops.items():
            # Never the very first step, at which the probe is made; the first stretch warms up.
            spent = stretch(loop, parameters, 10 * number * (repeat + 1), number)
            if repeat:
                seconds[name].append(spent / number)
    ratios = [watched / alone for watched, alone in zip(*seconds.values(), strict=True)]
    for name, values in seconds.items():
        print(f"{name:8} {1e3 * statistics.median(values):7.1f} ms a step")
    print(f"ratio    {statistics.median(ratios):7.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    print(f"probe    {probe:7.2f} s, once")


if __name__ == "__main__":
    main()
