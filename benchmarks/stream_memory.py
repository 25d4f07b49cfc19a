"""What memory a stream of many questions takes: the peak over 20,000 questions, over that over 1,000.

Each stream has a process of its own, and questions that are made while it runs; traces are off. Prints one line for
each size, with the seconds of processing, and the ratio. Run: python benchmarks/stream_memory.py
"""

import argparse
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from recursivemas import RecursiveSystem, SamplingParams
from recursivemas.bench.subjects import random_model, small_configuration

WORDS = 900
"""Of the vocabulary of the random models, which write and read w0, w1, ..."""


def questions(number: int) -> Iterator[str]:
    """Questions of 4 to 60 words, no two alike."""
    rng = random.Random(0)
    for _ in range(number):
        yield " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(4, 60)))


def measure(number: int, width: int, batch_size: int) -> None:
    """Stream so many questions; print the most memory that the process ever held, and its seconds."""
    torch.set_num_threads(1)
    model = random_model(small_configuration(width, 2), device="cpu")
    system = RecursiveSystem.build(agents=dict.fromkeys(("planner", "critic", "solver"), model))
    options = {
        "num_rounds": 1,
        "num_latent_steps": 2,
        "sampling": SamplingParams(max_new_tokens=4),
        "trace": "off",
        "batch_size": batch_size,
    }
    start = time.process_time()
    answered = sum(1 for _ in system.stream(questions(number), **options))
    assert answered == number
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, time.process_time() - start)


def main() -> None:
    """Measure both sizes in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs=2, default=[1000, 20_000], help="questions of the two streams")
    parser.add_argument("--width", type=int, default=64, help="width of the model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.width, options.batch_size)
        return
    peaks = []
    for number in options.sizes:
        command = [sys.executable, __file__, "--measure", str(number), "--width", str(options.width)]
        command += ["--batch-size", str(options.batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, seconds = map(float, done.stdout.split())
        print(f"{number:7} questions: peak {peak / 2**20:7.1f} MiB, {seconds:6.1f} s of processing", flush=True)
        peaks.append(peak)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
