"""Time, taken so that it can be compared.

Whatever is compared takes turns, after a warm-up, and every second round goes backwards: what slows
the machine down for a while slows down all. Ratios are taken round by round, and medians of these are better than the
times. On a GPU the device is waited for, before and after.

Knows devices; knows nothing of what is timed.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Act = Callable[[], Any]
Arm = Callable[[], Act]
"""Makes ready what is to be timed, which does not count, and gives it back."""


def ready(function: Callable[..., Any], *arguments: Any) -> Arm:
    """An arm that needs no making ready: a call of a function."""
    return lambda: partial(function, *arguments)


@dataclass(frozen=True)
class Measured:
    """What was measured, one value a repeat."""

    values: tuple[float, ...]
    unit: str = ""

    @property
    def median(self) -> float:
        """The middle of the values."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the values lie; of fewer than four values the least and the largest."""
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def times(self, factor: float | int, unit: str = "") -> "Measured":
        """Every value times a number."""
        return Measured(tuple(factor * each for each in self.values), unit)

    def milliseconds(self, parts: int = 1) -> "Measured":
        """Of seconds: each of so many equal parts, in milliseconds."""
        return self.times(1e3 / parts, "ms")

    def rate(self, amount: int) -> "Measured":
        """Of seconds: how much of something a second, if so much was done in them."""
        return Measured(tuple(amount / each for each in self.values))

    def over(self, other: "Measured") -> "Measured":
        """The ratio to another of the same repeats, repeat by repeat."""
        return Measured(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def less(self, other: "Measured") -> "Measured":
        """The difference to another of the same repeats, repeat by repeat."""
        return Measured(tuple(a - b for a, b in zip(self.values, other.values, strict=True)), self.unit)

    def to_plain(self) -> dict[str, Any]:
        """Median, quartiles and number of repeats, and the values themselves."""
        low, high = self.quartiles
        found = {"median": self.median, "low": low, "high": high, "n": len(self.values), "unit": self.unit}
        return {**found, "values": list(self.values)}


def take_turns(
    arms: Mapping[str, Arm],
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
    *,
    warm_up: Collection[str] | None = None,
) -> dict[str, Measured]:
    """Seconds that each arm takes. `progress` is told the name of every arm before its turn.

    The arms of `warm_up`, by default all, take a turn beforehand that does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name in list(arms)[:: -1 if repeat % 2 else 1]:
            if repeat == 0 and warm_up is not None and name not in warm_up:
                continue
            if progress is not None:
                progress(name)
            took = seconds_of(arms[name](), device)
            if repeat:
                seconds[name].append(took)
    return {name: Measured(tuple(values), "s") for name, values in seconds.items()}


def seconds_of(act: Act, device: torch.device) -> float:
    """Seconds by the clock until it is done, on the device too."""
    _wait_for(device)
    start = time.perf_counter()
    act()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
