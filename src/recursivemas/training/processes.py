"""Several processes that train one system together, each on its share of every batch.

Every loss is a sum over samples with weights that are known beforehand, so the sum of the gradients of all processes is
what one process would have computed for the whole batch: nothing depends on how many there are, neither the schedule
nor the scale of the loss nor an uneven last share. Started with `torchrun`; alone, all of this does nothing. Knows
tensors and numbers; knows nothing of systems, losses or files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, distributed

from recursivemas.errors import NumericsError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes that train together; by default this one alone."""

    rank: int = 0
    """Which of them this one is; the first writes what is to be written."""
    count: int = 1

    @classmethod
    def joined(cls) -> "Processes":
        """All processes that this one was started with: those of `torchrun`, or this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this process takes of some items; shares differ by one item at most, and may be empty."""
        return items[self.rank :: self.count]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes. All of them must give theirs in the same order."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return sum(self.gather(value)) if self.count > 1 else value

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        return list(gather_object([value])) if self.count > 1 else [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all: else the others would wait for it for ever.

        Raises `NumericsError` everywhere if it was raised inside by one of them.
        """
        failure: NumericsError | None = None
        try:
            yield
        except NumericsError as error:
            failure = error
        said = [each for each in self.gather(None if failure is None else str(failure)) if each is not None]
        if failure is not None:
            raise failure
        if said:
            raise NumericsError(said[0])
