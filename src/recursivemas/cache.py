"""LatentCache: what a frozen model keeps of what it has read, one row a question.

All differences between cache layers of the families live here: keys and values of every position (full attention), of
the last ones (sliding window), or a state of fixed size (linear attention). Caches are right-aligned: what a row has
read ends at the last position, and a shorter row begins with masked positions. So caches of different lengths merge by
padding on the left, which is exact; padding in the middle of a row is not (it is silently wrong where attention has a
sliding window or a recurrent state), and nothing here can produce it. A state of fixed size has no positions to pad:
rows that have read nothing have a state of zeros. The cache grows without changing what it held before, so a fork is
cheap, shares memory, and gradients flow through it; it is never cropped.

Knows the cache classes of transformers; knows nothing of roles, links or text.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from recursivemas.errors import ModelError


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of a linear attention layer: of its convolution, and of its recurrence.

    They are replaced and never written into, which transformers' own layer does: so a fork may share them, and
    gradients flow through them.
    """

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        # Tells the models not to take their kernels for single steps, which write into the state of the convolution.
        self.record_past = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Float[Tensor, "batch channel position"]:
        """Take the inputs of a convolution; returns them with as many earlier ones as it reaches back to."""
        size = self.conv_kernel_size[state_idx] or conv_kernel_size or conv_states.shape[-1]
        self.conv_kernel_size[state_idx] = size
        if self.has_previous_state[state_idx]:
            inputs = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        else:
            inputs = functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self.conv_states[state_idx] = inputs[..., -size:]
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Take the state in which the recurrence has ended."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def __copy__(self) -> "RecurrentLayer":
        copied = object.__new__(type(self))
        copied.__dict__ = {name: dict(v) if isinstance(v, dict) else v for name, v in vars(self).items()}
        return copied

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep some rows."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state[rows.to(state.device)]

    def merge(self, parts: Sequence["RecurrentLayer"], batch_sizes: Sequence[int]) -> None:
        """Become the rows of all parts; those that have read nothing have a state of zeros."""
        for index in range(self.number_of_states):
            for name in ("conv_states", "recurrent_states"):
                states = [getattr(part, name)[index] for part in parts]
                like = next((state for state in states if state is not None), None)
                if like is not None:
                    rows = zip(states, batch_sizes, strict=True)
                    filled = [like.new_zeros(n, *like.shape[1:]) if state is None else state for state, n in rows]
                    getattr(self, name)[index] = torch.cat(filled)
                    getattr(self, f"is_{name}_initialized")[index] = True
            self.has_previous_state[index] = any(part.has_previous_state[index] for part in parts)
            sizes = (part.conv_kernel_size[index] for part in parts)
            self.conv_kernel_size[index] = next((size for size in sizes if size is not None), None)


_LAYERS: dict[type, Callable[[Any], Any]] = {
    DynamicLayer: lambda layer: layer,
    DynamicSlidingWindowLayer: lambda layer: layer,
    LinearAttentionLayer: lambda layer: RecurrentLayer(layer.number_of_states),
}
"""The kinds of layers that can be forked and merged exactly, and what is taken for each."""


class LatentCache:
    """What a batch has been read into, with the mask that says which positions are real.

    `attention_mask` has the shape (batch, position); ones are real positions.
    """

    def __init__(self, past_key_values: DynamicCache, attention_mask: Int[Tensor, "batch position"]) -> None:
        self.past_key_values = past_key_values
        self.attention_mask = attention_mask

    @property
    def attention_mask(self) -> Int[Tensor, "batch position"]:
        """Which positions are real."""
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: Int[Tensor, "batch position"]) -> None:
        self._attention_mask = mask
        self._is_padded: bool | None = None

    @property
    def is_padded(self) -> bool:
        """Whether some row begins with masked positions. It is looked up once: on a GPU that means to wait for it."""
        if self._is_padded is None:
            self._is_padded = not bool(self._attention_mask.all())
        return self._is_padded

    @classmethod
    def new(cls, config: PretrainedConfig, batch_size: int, device: torch.device) -> "LatentCache":
        """An empty cache for `batch_size` rows of a model with this (text) configuration.

        Raises `ModelError` for a model with cache layers that cannot be forked and merged exactly.
        """
        past_key_values = DynamicCache(config=config)
        for layer in past_key_values.layers:
            if type(layer) not in _LAYERS:
                raise ModelError(
                    f"the cache of a {config.model_type} model has a layer of the kind {type(layer).__name__}, which "
                    "this version cannot fork and merge exactly; choose a model with full, sliding-window or linear "
                    "attention"
                )
        past_key_values.layers = [_LAYERS[type(layer)](layer) for layer in past_key_values.layers]
        return cls(past_key_values, torch.zeros(batch_size, 0, dtype=torch.long, device=device))

    def __len__(self) -> int:
        """Positions held, the masked ones included."""
        return self.attention_mask.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.attention_mask.shape[0]

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer keeps a state of fixed size instead of what was at every position."""
        return any(isinstance(layer, RecurrentLayer) for layer in self.past_key_values.layers)

    @property
    def num_positions(self) -> Int[Tensor, " batch"]:
        """Real positions of each row."""
        return self.attention_mask.sum(dim=1)

    @property
    def num_bytes(self) -> int:
        """Memory of what it holds for all rows."""
        held: list[Tensor | None] = []
        for layer in self.past_key_values.layers:
            if isinstance(layer, RecurrentLayer):
                held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
            elif layer.is_initialized:
                held += [layer.keys, layer.values]
        return sum(each.numel() * each.element_size() for each in held if each is not None)

    def step(
        self,
        decoder: Callable[..., Any],
        inputs_embeds: Float[Tensor, "batch position hidden_size"],
        attention_mask: Int[Tensor, "batch position"] | None = None,
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Feed `inputs_embeds` to `decoder` (a model without its output head) and keep what it computed.

        A mask with zeros is only possible in a cache that is still empty, where the zeros stand on the left;
        anything else would be padding in the middle. Returns the last hidden states, after the final norm.
        """
        batch_size, length = inputs_embeds.shape[:2]
        is_padded = self.is_padded
        if attention_mask is None:
            attention_mask = self.attention_mask.new_ones(batch_size, length)
        elif not bool(attention_mask.all()):
            if len(self):
                raise ValueError(
                    "padding in the middle of a row: feed rows of equal length together and merge the caches"
                )
            is_padded = True
        start = len(self)
        mask = torch.cat([self.attention_mask, attention_mask], dim=1)
        self._attention_mask, self._is_padded = mask, is_padded
        if is_padded:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:].contiguous()
        else:
            positions = torch.arange(start, start + length, device=mask.device).unsqueeze(0)
        output = decoder(
            inputs_embeds=inputs_embeds,
            # Of a mask that hides nothing, a model would find that out at every step.
            attention_mask=mask if is_padded else None,
            position_ids=positions,
            past_key_values=self.past_key_values,
            use_cache=True,
        )
        return output.last_hidden_state

    def fork(self) -> "LatentCache":
        """A cache that goes on from here on its own. Memory is shared until one of the two grows."""
        return self._map(lambda layer: layer)

    def select(self, rows: Int[Tensor, " row"]) -> "LatentCache":
        """The cache of some rows, in the order given (a row may come several times)."""

        def pick(layer: Any) -> Any:
            if isinstance(layer, RecurrentLayer):
                layer.select(rows)
            elif layer.is_initialized:
                places = rows.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[places], layer.values[places]
            return layer

        selected = self._map(pick)
        selected.attention_mask = self.attention_mask[rows]
        return selected

    @classmethod
    def merge(cls, caches: Sequence["LatentCache"]) -> "LatentCache":
        """One batch out of several: rows in the order given, shorter caches padded (and masked) on the left."""
        if len(caches) == 1:
            return caches[0].fork()
        length = max(len(cache) for cache in caches)
        merged = caches[0].fork()
        merged.attention_mask = torch.cat(
            [functional.pad(cache.attention_mask, (length - len(cache), 0)) for cache in caches]
        )
        sizes = [cache.batch_size for cache in caches]
        for index, layer in enumerate(merged.past_key_values.layers):
            parts = [cache.past_key_values.layers[index] for cache in caches]
            if isinstance(layer, RecurrentLayer):
                layer.merge(parts, sizes)
                continue
            filled = [part for part in parts if part.is_initialized]
            if not filled:
                continue
            held = max(part.keys.shape[-2] for part in filled)
            if not layer.is_initialized:
                layer.lazy_initialization(filled[0].keys, filled[0].values)
            layer.keys = _padded_left([part.keys for part in parts], sizes, held)
            layer.values = _padded_left([part.values for part in parts], sizes, held)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
        return merged

    def _map(self, change: Callable[[Any], Any]) -> "LatentCache":
        past_key_values = copy.copy(self.past_key_values)
        past_key_values.layers = [change(copy.copy(layer)) for layer in self.past_key_values.layers]
        mapped = LatentCache(past_key_values, self.attention_mask)
        mapped._is_padded = self._is_padded
        return mapped


def _padded_left(
    tensors: Sequence[Tensor | None], batch_sizes: Sequence[int], length: int
) -> Float[Tensor, "batch head position head_size"]:
    """Keys (or values) of several caches in one batch, padded on the left; None holds no position yet."""
    like = next(tensor for tensor in tensors if tensor is not None)
    padded = []
    for tensor, rows in zip(tensors, batch_sizes, strict=True):
        held = like.new_zeros(rows, like.shape[1], 0, like.shape[3]) if tensor is None else tensor
        padded.append(functional.pad(held, (0, 0, length - held.shape[-2], 0)))
    return torch.cat(padded)
