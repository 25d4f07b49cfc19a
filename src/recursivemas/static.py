"""A cache in buffers that stay where they are, so that reading one more position is always the same compiled step.

A `LatentCache` grows by making new tensors, so that nothing is ever overwritten; each step then is hundreds of small
launches, which on a GPU take longer than what they launch. A `StaticCache` is filled from one after the prompt has been
read, goes on for single positions in buffers of fixed sizes (powers of two, rows and positions alike, the rest masked),
and hands a LatentCache back when one is wanted. Steps are compiled by torch.compile, once for every size; on a GPU they
are replayed as CUDA graphs.

Nobody has to trust that: the first steps in every buffer are read the ordinary way too. What cannot be compiled, or
comes out otherwise, is read the ordinary way from then on, and a `CompileWarning` says why.

Knows caches and the call of a decoder; knows nothing of links, text or tokens.
"""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import StaticLayer

from recursivemas.cache import LatentCache

_SHORTEST = 128
"""Positions of the smallest buffers: fewer would mean more sizes, and each is compiled."""
_TRIALS = 3
"""Steps in new buffers that are compared. Of CUDA graphs the first runs as it is, the second is recorded, the third
replayed."""
_MOST_SIZES = 256
"""Versions of a compiled step that are kept at once: one for each size of buffers, of each model."""


Backend = str | Callable[..., Any]
"""A backend of torch.compile, by its name or as a function."""


class CompileWarning(UserWarning):
    """What was to be compiled is not, and runs the ordinary way."""


class _Layer(StaticLayer):  # type: ignore[misc]
    """Keys and values of one layer. A sliding window is a matter of the mask: all positions are kept.

    All layers have one counter, a tensor, and no number that a compiled step would be made for. (Shapes are not checked
    in here, as that could not be compiled.)
    """

    def __init__(self, like: Any, batch_size: int, length: int, position: Int[Tensor, " one"]) -> None:
        super().__init__(max_cache_len=length)
        self.is_sliding = bool(like.is_sliding)
        self.keys, self.values = (
            like_it.new_zeros(batch_size, like_it.shape[1], length, like_it.shape[3])
            for like_it in (like.keys, like.values)
        )
        self.position = position
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put one position in its place; returns all places: (batch, head, position, head_size)."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Tensor:
        """Positions before this one, as a tensor of one number."""
        return self.position

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """How many places there are, and the first of them."""
        return self.keys.shape[2], 0


class _Buffers:
    """Places for so many rows of so many positions, in a row of steps that are always the same."""

    def __init__(self, like: LatentCache, inputs_embeds: Tensor, batch_size: int, length: int) -> None:
        device = inputs_embeds.device
        self.inputs_embeds = inputs_embeds.new_zeros(batch_size, 1, inputs_embeds.shape[-1])
        self.attention_mask = torch.zeros(batch_size, length, dtype=torch.bool, device=device)
        self.position_ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        layers = [_Layer(layer, batch_size, length, self.position) for layer in like.past_key_values.layers]
        self.past_key_values = DynamicCache()
        self.past_key_values.layers = layers
        self.trials_left = _TRIALS
        fixed = [self.inputs_embeds, self.attention_mask, self.position_ids, self.position]
        for tensor in (*fixed, *(each for layer in layers for each in (layer.keys, layer.values))):
            torch._dynamo.mark_static_address(tensor)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and positions."""
        rows, positions = self.attention_mask.shape
        return rows, positions

    def fill(self, cache: LatentCache) -> None:
        """Take over what a cache holds."""
        rows, length = cache.batch_size, len(cache)
        self.attention_mask.zero_()
        self.attention_mask[:rows, :length] = cache.attention_mask.bool()
        self.position.fill_(length)
        self.position_ids.zero_()
        self.position_ids[:rows, 0] = cache.num_positions
        for layer, known in zip(self.past_key_values.layers, cache.past_key_values.layers, strict=True):
            held = known.keys.shape[2]  # a sliding window has only the last ones; the mask hides what was before
            layer.keys[:rows, :, length - held : length] = known.keys
            layer.values[:rows, :, length - held : length] = known.values


def _read_one(decoder: Callable[..., Any], buffers: _Buffers) -> Tensor:
    """Read one position of every row: all that is compiled. Returns the last hidden states, (row, 1, hidden_size)."""
    buffers.attention_mask.index_fill_(1, buffers.position, True)
    output = decoder(
        inputs_embeds=buffers.inputs_embeds,
        attention_mask=buffers.attention_mask,
        position_ids=buffers.position_ids,
        past_key_values=buffers.past_key_values,
        use_cache=True,
    )
    buffers.position.add_(1)
    buffers.position_ids.add_(1)
    return output.last_hidden_state


class CompiledSteps:
    """The compiled step of one model, and the buffers it works in."""

    def __init__(self, name: str, config: PretrainedConfig, decoder: torch.nn.Module, *, backend: Backend) -> None:
        """`name` is what warnings call the model."""
        self.config = config
        self.is_given_up = False
        self._name = name
        self._decoder = decoder
        on_gpu = next(decoder.parameters()).device.type == "cuda"
        mode = "reduce-overhead" if on_gpu and backend == "inductor" else None
        self._read: Callable[..., Tensor] = torch.compile(_read_one, backend=backend, mode=mode, dynamic=False)
        self._free: dict[tuple[int, int], list[_Buffers]] = defaultdict(list)

    def take(self, like: LatentCache, inputs_embeds: Tensor, num_positions: int) -> _Buffers:
        """Buffers that nobody else is using, filled, with room for so many positions more."""
        length = max(_SHORTEST, _power_of_two(len(like) + num_positions))
        size = _power_of_two(like.batch_size), length
        buffers = self._free[size].pop() if self._free[size] else _Buffers(like, inputs_embeds, *size)
        buffers.fill(like)
        return buffers

    def give_back(self, buffers: _Buffers) -> None:
        """Let others use buffers."""
        self._free[buffers.size].append(buffers)

    def read(self, buffers: _Buffers) -> Float[Tensor, "row position hidden_size"]:
        """Read one position, with what stands in `buffers.inputs_embeds`."""
        if buffers.trials_left:
            with torch._dynamo.config.patch(recompile_limit=_MOST_SIZES):
                return self._read(self._decoder, buffers)
        torch.compiler.cudagraph_mark_step_begin()
        return self._read(self._decoder, buffers)

    def give_up(self, reason: str) -> None:
        """Compile nothing from here on, and say why."""
        self.is_given_up = True
        self._free.clear()
        warn_uncompiled(self._name, reason)


def warn_uncompiled(name: str, reason: str) -> None:
    """Say that a model's steps are not compiled, and why."""
    warnings.warn(f"'{name}' is not compiled, and runs as without compile=True: {reason}", CompileWarning, stacklevel=2)


class StaticCache:
    """What a batch has been read into, for single positions that are read in compiled steps.

    In place of a `LatentCache`, as far as it has to be: `step`, `select` and `fork`, which hand a LatentCache back.
    """

    def __init__(self, steps: CompiledSteps, cache: LatentCache, num_positions: int = 1) -> None:
        """Go on from what `cache` holds, with room for `num_positions` at first; it gets more when it is full."""
        self._steps = steps
        self._num_positions = num_positions
        self._buffers: _Buffers | None = None
        self._giving_back: weakref.finalize[..., Any] | None = None
        self._source: LatentCache | None = cache
        """The same the ordinary way, as long as that is needed: before the first step, while steps are compared, and
        for good where they cannot be compiled."""
        self._batch_size, self._length = cache.batch_size, len(cache)

    def step(
        self,
        decoder: Callable[..., Any],
        inputs_embeds: Float[Tensor, "batch one hidden_size"],
        attention_mask: Int[Tensor, "batch one"] | None = None,
    ) -> Float[Tensor, "batch one hidden_size"]:
        """Read one position of every row. Returns the last hidden states, after the final norm."""
        if attention_mask is not None or inputs_embeds.shape[1] != 1:
            raise ValueError("a compiled step reads one position of every row: read more from a LatentCache")
        if self._steps.is_given_up:
            return self._ordinary().step(decoder, inputs_embeds)
        buffers = self._with_room(inputs_embeds)
        if buffers.trials_left:
            return self._compared(buffers, decoder, inputs_embeds)
        self._source = None
        return self._read(buffers, inputs_embeds)

    def select(self, rows: Int[Tensor, " row"]) -> LatentCache:
        """The cache of some rows, in the order given (a row may come several times)."""
        if self._source is not None:
            return self._source.select(rows)
        assert self._buffers is not None
        cache = LatentCache.new(self._steps.config, len(rows), rows.device)
        cache.attention_mask = self._buffers.attention_mask[rows, : self._length].long()
        for layer, held in zip(cache.past_key_values.layers, self._buffers.past_key_values.layers, strict=True):
            first = max(self._length - layer.sliding_window + 1, 0) if layer.is_sliding else 0
            layer.lazy_initialization(held.keys, held.values)
            layer.keys, layer.values = (each[rows, :, first : self._length] for each in (held.keys, held.values))
            if layer.is_sliding:
                layer.cumulative_length = self._length
        return cache

    def fork(self) -> LatentCache:
        """A cache that goes on from here on its own."""
        if self._source is not None:
            return self._source.fork()
        assert self._buffers is not None
        return self.select(torch.arange(self._batch_size, device=self._buffers.position.device))

    def _with_room(self, inputs_embeds: Tensor) -> _Buffers:
        """The buffers, with room for another position: larger ones, where they are full."""
        if self._buffers is None or self._length == self._buffers.size[1]:
            buffers = self._steps.take(self.fork(), inputs_embeds, self._num_positions)
            if buffers.trials_left:
                self._source = self.fork()
            self._let_go()
            self._buffers, self._num_positions = buffers, 1
            self._giving_back = weakref.finalize(self, self._steps.give_back, buffers)
            self._giving_back.atexit = False
        return self._buffers

    def _let_go(self) -> None:
        if self._giving_back is not None:
            self._giving_back()
        self._buffers = self._giving_back = None

    def _read(self, buffers: _Buffers, inputs_embeds: Tensor) -> Tensor:
        buffers.inputs_embeds[: self._batch_size].copy_(inputs_embeds)
        states = self._steps.read(buffers)[: self._batch_size].clone()  # the next step is written over them
        self._length += 1
        return states

    def _compared(self, buffers: _Buffers, decoder: Callable[..., Any], inputs_embeds: Tensor) -> Tensor:
        """Read one position both ways. Where the compiled one fails, or differs, there are no others."""
        expected = self._ordinary().step(decoder, inputs_embeds)
        reason = ""
        try:
            found = self._read(buffers, inputs_embeds)
            apart = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
            tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
            if not bool((apart <= tolerance).all()):
                reason = f"its compiled step gives other states ({float(apart.max()):.2g} of their norm apart)"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, of a backend or of the model's own code: the classes vary
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if reason:
            self._let_go()
            self._steps.give_up(reason)
            return expected
        buffers.trials_left -= 1
        return found

    def _ordinary(self) -> LatentCache:
        if self._source is None:
            self._source = self.fork()
        return self._source


def _power_of_two(number: int) -> int:
    """The first power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
