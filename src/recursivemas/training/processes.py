"""Several processes that train one system together, each on its share of every batch.

Every loss is a sum over samples with weights that are known beforehand, so the sum of the gradients of all processes is
what one process would have computed for the whole batch: nothing depends on how many there are, neither the schedule
nor the scale of the loss nor an uneven last share. Started with `torchrun`; alone, all of this does nothing. The first
process writes, and reads what the run has kept: the others need not see its files. Knows tensors and numbers; knows
nothing of systems, losses or files.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed

from recursivemas.errors import ConfigError, RecursiveMASError

Item = TypeVar("Item")

_PATIENCE = timedelta(days=30)
"""How long the others wait for the first, which may train whole stages alone. If one dies, torchrun ends them all."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together; by default this one alone."""

    rank: int = 0
    """Which of them this one is; the first writes what is to be written."""
    count: int = 1

    device: str | None = None
    """Where this one computes, if it is one of several: on the GPU of its own, or the CPU."""

    @classmethod
    def joined(cls, device: str | None = None) -> "Processes":
        """All processes that this one was started with: those of `torchrun`, or this one alone.

        Several take a GPU each, by their rank on their machine, or all of them the CPU, if that is the `device` or
        there is no GPU. Raises `ConfigError` for any other device, and for more processes than GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        place = "cpu" if on_cpu else f"cuda:{_local_rank()}"
        if device not in (None, "auto", "cpu", "cuda"):
            raise ConfigError(
                f"several processes cannot all compute on '{device}': leave the device out, and each takes a GPU of "
                "its own, or say cpu"
            )
        if not on_cpu and _local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs; start as many "
                "(--nproc-per-node), or say --device cpu"
            )
        state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, place)

    def leave(self) -> None:
        """Part from the other processes, when all is done."""
        if self.count > 1:
            distributed.barrier()
            distributed.destroy_process_group()
            PartialState._reset_state()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this process takes of some items; shares differ by one item at most, and may be empty."""
        return items[self.rank :: self.count]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes. All of them must give theirs in the same order."""
        if self.count > 1 and tensors:
            # Links may be on other devices than the one this process talks on: they are where their agents are.
            flat = torch.cat([tensor.flatten().to(device=self.device) for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return sum(self.gather(value)) if self.count > 1 else value

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        return list(gather_object([value])) if self.count > 1 else [value]

    def from_first(self, make: Callable[[], Item]) -> Item:
        """What the first process makes, for all of them. What fails there fails everywhere."""
        if self.count == 1:
            return make()
        made: list[Any] = [None]
        with self.together():
            if self.is_first:
                made = [make()]
        broadcast_object_list(made)
        item: Item = made[0]
        return item

    def hand_out(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor, in place, by that of the first process."""
        values = self.from_first(lambda: [tensor.detach().cpu() for tensor in tensors])
        if not self.is_first:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all: else the others would wait for it for ever.

        Raises everywhere the error of this package that was raised inside by one of them.
        """
        failure: RecursiveMASError | None = None
        try:
            yield
        except RecursiveMASError as error:
            failure = error
        failures = [each for each in self.gather(failure) if each is not None]
        if failure is not None:
            raise failure
        if failures:
            raise failures[0]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
