"""What training has cost: trained parameters, memory, time, positions, arithmetic, and a price.

    seconds       from the first stage to the last, validation included, loading and saving left out; beside them those
                  of processor time, which on a busy machine say more
    positions     read by language models, pads and what is computed again included; with gradient (the backward pass
                  went through them) and without
    flops         2 for each position and weight that is read with, 2 more if a gradient passes through it, and 2 more
                  if it is trained; attention's products and element-wise operations are left out. An estimate
    peak memory   on a GPU the most memory allocated; on a CPU the most the process ever held, libraries included; of
                  several processes that of the largest
    price         the user's rate for an hour of one device * hours * processes

What a run spent before it was killed is kept in its cost.json, and counted: also what was done twice. Knows models and
links from outside; knows no method.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recursivemas.errors import ConfigError, OutputError
from recursivemas.models import LanguageModel
from recursivemas.training.loop import Progress, write_atomically


@dataclass
class Cost:
    """What training by one method has cost so far."""

    method: str
    trained_parameters: dict[str, int] = field(default_factory=dict)
    """By kind of link, or by role."""
    total_parameters: int = 0
    """Of the whole system, as it runs afterwards."""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    positions_with_gradient: int = 0
    positions_without_gradient: int = 0
    flops: float = 0.0
    peak_memory_bytes: int = 0
    device: str = "cpu"
    num_processes: int = 1
    price_per_hour: float | None = None
    finished: bool = False

    @property
    def num_trained(self) -> int:
        """Trained parameters of all kinds."""
        return sum(self.trained_parameters.values())

    @property
    def price(self) -> float | None:
        """For the whole training, in the currency of the rate."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600 * self.num_processes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, what is derived included."""
        share = self.num_trained / self.total_parameters if self.total_parameters else None
        return {**asdict(self), "num_trained": self.num_trained, "trained_share": share, "price": self.price}


class CostMeter:
    """Collects the cost of a training while it runs."""

    def __init__(
        self,
        method: str,
        file: Path | None = None,
        *,
        resumes: bool = False,
        price_per_hour: float | None = None,
        num_processes: int = 1,
    ) -> None:
        """With a `file` the cost so far is kept there; one that `resumes` goes on from it. Raises `ConfigError`."""
        if price_per_hour is not None and not price_per_hour >= 0:
            raise ConfigError(f"a price per hour must be 0 or more, got {price_per_hour}")
        self.cost = Cost(method)
        self._file = file
        if resumes and file is not None and file.exists():
            self._take_over(file)
        self.cost.price_per_hour = price_per_hour
        self.cost.num_processes = num_processes
        self.cost.finished = False
        self._hooks: list[RemovableHandle] = []
        self._counted: set[int] = set()
        self._since: float | None = None
        self._processor_since = 0.0

    def count(self, model: LanguageModel) -> None:
        """Count what a language model reads from now on, once, however often this is said."""
        if id(model.decoder) in self._counted:
            return
        self._counted.add(id(model.decoder))
        self.cost.device = model.device.type
        table = model.network.get_input_embeddings().weight
        decoder = [weight for weight in model.decoder.parameters() if weight is not table]
        self._hooks.append(model.decoder.register_forward_hook(self._hook(decoder, reads=True)))
        head = model.network.get_output_embeddings()
        self._hooks.append(head.register_forward_hook(self._hook(list(head.parameters()))))

    def count_link(self, link: nn.Module) -> None:
        """Count the arithmetic of a link from now on."""
        self._hooks.append(link.register_forward_hook(self._hook(list(link.parameters()))))

    def watch(self, progress: Progress | None = None) -> Progress:
        """A `progress` that gives every stage its time, and keeps the cost so far."""

        def watched(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            self._lap(stage)
            self._write()
            if progress is not None:
                progress(stage, done, total, figures)

        return watched

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is done inside; afterwards nothing is counted any more."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._since, self._processor_since = time.perf_counter(), time.process_time()
        try:
            yield
            self.cost.finished = True
        finally:
            self._lap(None)
            self._since = None
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._write()

    def share(self, costs: Sequence[Cost]) -> None:
        """Take in what each of several processes has found, this one among them."""
        self.cost.positions_with_gradient = sum(each.positions_with_gradient for each in costs)
        self.cost.positions_without_gradient = sum(each.positions_without_gradient for each in costs)
        self.cost.flops = sum(each.flops for each in costs)
        self.cost.peak_memory_bytes = max(each.peak_memory_bytes for each in costs)

    def settle(self, trained: Mapping[str, int], total: int) -> Cost:
        """Note what was trained, and out of how much."""
        self.cost.trained_parameters = {name: number for name, number in trained.items() if number}
        self.cost.total_parameters = total
        self._write()
        return self.cost

    def _hook(self, weights: list[nn.Parameter], *, reads: bool = False) -> Any:
        size = sum(weight.numel() for weight in weights)

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            states: Tensor = output.last_hidden_state if reads else output
            positions = states.shape[:-1].numel()
            per_position = 2 * size
            if states.requires_grad:
                per_position += 2 * size + 2 * sum(each.numel() for each in weights if each.requires_grad)
            self.cost.flops += positions * per_position
            if reads and states.requires_grad:
                self.cost.positions_with_gradient += positions
            elif reads:
                self.cost.positions_without_gradient += positions

        return count

    def _lap(self, stage: str | None) -> None:
        """Give the time since the last lap to a stage."""
        if self._since is None:
            return
        now, processor_now = time.perf_counter(), time.process_time()
        self.cost.seconds += now - self._since
        self.cost.processor_seconds += processor_now - self._processor_since
        if stage is not None:
            stages = self.cost.seconds_by_stage
            stages[stage] = stages.get(stage, 0.0) + now - self._since
        self._since, self._processor_since = now, processor_now
        self.cost.peak_memory_bytes = max(self.cost.peak_memory_bytes, peak_memory(self.cost.device))

    def _write(self) -> None:
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._file, (json.dumps(self.cost.to_dict(), indent=2) + "\n").encode())
            except OSError as error:
                raise OutputError(f"cannot write {self._file}: {error.strerror}") from None

    def _take_over(self, file: Path) -> None:
        known = {name for name in Cost.__dataclass_fields__ if name != "method"}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            self.cost = Cost(self.cost.method, **{name: found[name] for name in known})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{file} cannot be read as the cost of a training ({error!r}); remove it") from None


def peak_memory(device: str) -> int:
    """Bytes: the most that was allocated on all GPUs of this process together, or that this process ever held."""
    if device == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
