"""What the backward pass holds: with turns that are computed again it hardly grows with the number of rounds."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.conftest import FEW_WORDS
from tests.training.test_outer import QUESTIONS, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recursivemas.training.outer import OuterLoop


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._let_go, size)
            self.held += size
            self.peak = max(self.peak, self.held)

    def _let_go(self, size: int) -> None:
        self.held -= size


@pytest.fixture
def step_peak(make_system: Callable) -> Callable[[int, bool], int]:
    system = make_system(prompts=FEW_WORDS, num_latent_steps=3)
    parameters = list(system.trainable_parameters().values())

    def measure(num_rounds: int, recompute: bool) -> int:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
        loop = OuterLoop(system, QUESTIONS, settings(num_rounds=num_rounds, recompute=recompute, batch_size=8))
        with Peak() as peak:
            for loss in loop.losses(0):
                loss.backward()
        return peak.peak

    return measure


def test_memory_hardly_grows_with_the_rounds(step_peak: Callable[[int, bool], int]) -> None:
    found = {(rounds, again): step_peak(rounds, again) for rounds in (1, 6) for again in (False, True)}
    sys.stdout.write("".join(f"rounds, recompute {key}: {value / 2**20:.2f} MiB\n" for key, value in found.items()))
    assert found[6, True] <= 1.5 * found[1, True]
    # The measure sees what it should: without, memory grows with them.
    assert found[6, False] > 3 * found[1, False]
