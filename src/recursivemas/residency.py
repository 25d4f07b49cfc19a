"""Turns: models that share a device of which only one has its weights there at a time; the others' wait on the CPU.

Weights are frozen, so nothing is ever brought back: a model that leaves forgets its copy on the device, and what waits
on the CPU is what was read from disk, once. A model comes when it is asked for something, which is as often as the one
that speaks changes.

Knows networks as tensors; knows nothing of what they compute.
"""

import torch
from torch import Tensor, nn

from recursivemas.errors import ConfigError, unknown_name

RESIDENCIES = ("all", "one")
"""Whose weights are on the device: those of all agents, or of one at a time."""


class Turns:
    """Networks that take turns on one device."""

    def __init__(self) -> None:
        """Without a network yet; the first says on which device."""
        self.num_moves = 0
        """How often a network has come to the device."""
        self._device: torch.device | None = None
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """Of every network its tensors, and what is in them while it waits."""
        self._present: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        assert self._device is not None
        return self._device

    def add(self, network: nn.Module, name: str) -> None:
        """Take in a network, which leaves the device that it is on. Raises `ConfigError` if that is another one."""
        tensors = list({id(each): each for each in (*network.parameters(), *network.buffers())}.values())
        devices = {each.device for each in tensors}
        where = self._device or next(iter(devices))
        if devices != {where} or where.type == "meta":
            raise ConfigError(
                f"agents with residency 'one' take turns on {self._device or 'one device'}, but the weights of "
                f"'{name}' are on {', '.join(sorted(map(str, devices)))}; give all of them the same device, and no "
                "device_map"
            )
        self._device = devices.pop()
        self._waiting[id(network)] = [(each, self._at_rest(each.data)) for each in tensors]
        self._leave(network)

    def call(self, network: nn.Module) -> None:
        """Have a network on the device, and no other."""
        if network is self._present:
            return
        if self._present is not None:
            self._leave(self._present)
            self._present = None
        try:
            for tensor, waiting in self._waiting[id(network)]:
                tensor.data = self._on_device(waiting)
        except RuntimeError:  # no memory: whoever makes batches tries a smaller one
            self._leave(network)
            raise
        self._present = network
        self.num_moves += 1

    def _leave(self, network: nn.Module) -> None:
        for tensor, waiting in self._waiting[id(network)]:
            tensor.data = waiting

    def _on_device(self, waiting: Tensor) -> Tensor:
        return waiting.to(self.device, non_blocking=True)

    def _at_rest(self, weights: Tensor) -> Tensor:
        """Weights as they wait: pinned for a GPU, which reads them several times as fast then."""
        waiting = weights.cpu()
        return waiting.pin_memory() if self.device.type == "cuda" else waiting


def turns_for(residency: str) -> Turns | None:
    """What agents loaded with this residency take turns by; None if all of them stay. Raises `ConfigError`."""
    if residency not in RESIDENCIES:
        raise ConfigError(unknown_name("residency", residency, RESIDENCIES))
    return Turns() if residency == "one" else None
