"""What the sandbox costs: a program in it against the same program in a bare interpreter.

    python benchmarks/sandbox.py [-n 40]

Prints medians in milliseconds, with quartiles: a bare interpreter; the sandbox, which starts one for the program; the
sandbox with one that was started ahead; and programs eight at a time. Last, what is left of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recursivemas.sandbox import Limits, Sandbox

PROGRAM = "print(sum(range(1000)))"


def measure(act: Callable[[], object], n: int, *, pause: float = 0.0) -> list[float]:
    """Milliseconds of each of `n` times, after one that does not count; `pause` seconds before each."""
    act()
    seconds = []
    for _ in range(n):
        time.sleep(pause)
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return [1000 * each for each in seconds]


def summary(milliseconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    return {"median_ms": round(middle, 1), "lower_quartile_ms": round(low, 1), "upper_quartile_ms": round(high, 1)}


def open_now() -> dict[str, int]:
    return {
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
        "memory_mb": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 2**20,
        "children": len(
            subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True).stdout.split()
        )
        - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=40, help="programs of each kind")
    n = parser.parse_args().n
    bare = [os.path.realpath(sys.executable), "-I", "-S", "-c", PROGRAM]
    found: dict[str, object] = {"n": n, "user": "root" if os.geteuid() == 0 else "ordinary", "cpus": os.cpu_count()}
    found["bare"] = base = summary(measure(lambda: subprocess.run(bare, capture_output=True, check=True), n))
    with Sandbox(Limits(seconds=30.0)) as sandbox:
        found["sandbox"] = cold = summary(measure(lambda: sandbox.run(PROGRAM), n))
        before = open_now()
        begin = time.perf_counter()
        sandbox.run_many([PROGRAM] * 200, at_once=8)
        found["200_programs_eight_at_a_time_s"] = round(time.perf_counter() - begin, 2)
        found["before"], found["after"] = before, open_now()
    with Sandbox(Limits(seconds=30.0), spares=2) as sandbox:
        found["with_spares"] = warm = summary(measure(lambda: sandbox.run(PROGRAM), n, pause=0.15))
    found["sandbox_over_bare_ms"] = round(cold["median_ms"] - base["median_ms"], 1)
    found["with_spares_over_bare_ms"] = round(warm["median_ms"] - base["median_ms"], 1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
