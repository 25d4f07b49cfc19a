"""Text from the state in which a prompt or a latent thought has left a model.

What is sampled for a question depends on the seed and on the question alone (its key), never on what else is in the
batch. Takes a LanguageModel and a cache; knows nothing of agents, rounds or links.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recursivemas.cache import LatentCache
from recursivemas.errors import ConfigError
from recursivemas.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How text is decoded. Temperature 0 takes the likeliest token and ignores `top_p`, `top_k` and `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Sample among the likeliest tokens that together hold this much probability."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Text ends before the first of these strings; it always ends at the model's own end-of-reply tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        given: Any = self.stop
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(given))
        for name, expected, fits in (
            ("temperature", "a number, 0 or more", _is(Real, self.temperature, at_least=0)),
            ("top_p", "a number above 0 and at most 1", _is(Real, self.top_p) and 0 < self.top_p <= 1),
            ("top_k", "a whole number, 1 or more", self.top_k is None or _is(Integral, self.top_k, at_least=1)),
            ("max_new_tokens", "a whole number, 1 or more", _is(Integral, self.max_new_tokens, at_least=1)),
            ("seed", "a whole number", _is(Integral, self.seed)),
            ("stop", "text that is not empty", all(isinstance(each, str) and each for each in self.stop)),
        ):
            if not fits:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        for name in ("top_k", "max_new_tokens", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))


@dataclass(frozen=True)
class Reply:
    """Decoded text of one question."""

    text: str
    token_ids: tuple[int, ...]
    """Generated tokens, the end-of-reply token included."""
    finished: bool
    """Whether it ended by itself; otherwise it was cut at `max_new_tokens`."""


@torch.no_grad()
def decode_steps(
    model: LanguageModel,
    cache: LatentCache,
    state: Float[Tensor, "batch hidden_size"],
    sampling: SamplingParams,
    keys: Sequence[str],
    room: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Decode token by token: each step yields (row, token) for every row that is not finished. The cache grows.

    Nothing is differentiated through text. `room` says how many tokens each row's context has left. Rows that have
    finished are dropped from the batch once they are half of it.
    """
    limits = [min(sampling.max_new_tokens, left) for left in room or [sampling.max_new_tokens] * len(keys)]
    generators = [torch.Generator().manual_seed(_seed_of(sampling.seed, key)) for key in keys]
    stop_ids = model.stop_token_ids
    rows = list(range(len(keys)))
    texts: list[list[int]] = [[] for _ in keys]
    active = set(rows)
    while True:
        logits = model.logits(state)
        tokens = _choose(logits, sampling, [generators[row] for row in rows]).tolist()
        taken = [(row, token) for row, token in zip(rows, tokens, strict=True) if row in active]
        for row, token in taken:
            texts[row].append(token)
            if token in stop_ids or len(texts[row]) >= limits[row] or _holds_stop(model, texts[row], sampling):
                active.discard(row)
        yield taken
        if not active:
            return
        # A row whose context is full must not be stepped on, even if nobody looks at it.
        is_full = any(len(texts[row]) >= limits[row] for row in rows if row not in active)
        if is_full or 2 * len(active) <= len(rows):
            kept = torch.tensor([i for i, row in enumerate(rows) if row in active], device=state.device)
            cache = cache.select(kept)
            tokens = [tokens[i] for i in kept.tolist()]
            rows = [row for row in rows if row in active]
        inputs_embeds = model.embed(torch.tensor(tokens)).unsqueeze(1)
        state = model.step(cache, inputs_embeds)[:, -1]


def decode(
    model: LanguageModel,
    cache: LatentCache,
    state: Float[Tensor, "batch hidden_size"],
    sampling: SamplingParams,
    keys: Sequence[str],
    room: Sequence[int] | None = None,
) -> list[Reply]:
    """Decode the reply of every row to its end. `keys` name the rows for sampling. The cache grows."""
    tokens: list[list[int]] = [[] for _ in keys]
    for taken in decode_steps(model, cache, state, sampling, keys, room):
        for row, token in taken:
            tokens[row].append(token)
    return [make_reply(model, token_ids, sampling) for token_ids in tokens]


def make_reply(model: LanguageModel, token_ids: Sequence[int], sampling: SamplingParams) -> Reply:
    """The reply that these generated tokens are."""
    ended = bool(token_ids) and token_ids[-1] in model.stop_token_ids
    text = model.decode(token_ids[:-1] if ended else token_ids)
    position = _stop_position(text, sampling)
    return Reply(text if position is None else text[:position], tuple(token_ids), ended or position is not None)


def told_so_far(reply: Reply, sampling: SamplingParams) -> str:
    """The part of an unfinished reply that no further token can take back: no half letter, no half stop string."""
    text = reply.text.rstrip("\ufffd")
    longest = max((len(stop) for stop in sampling.stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in sampling.stop):
            return text[:-length]
    return text


def _holds_stop(model: LanguageModel, token_ids: Sequence[int], sampling: SamplingParams) -> bool:
    return bool(sampling.stop) and _stop_position(model.decode(token_ids), sampling) is not None


def _is(kind: Any, value: Any, *, at_least: int | None = None) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (at_least is None or value >= at_least)


def _stop_position(text: str, sampling: SamplingParams) -> int | None:
    found = [position for stop in sampling.stop if (position := text.find(stop)) >= 0]
    return min(found, default=None)


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=7).digest(), "big")


def _choose(
    logits: Float[Tensor, "batch vocab_size"], sampling: SamplingParams, generators: Sequence[torch.Generator]
) -> Int[Tensor, " batch"]:
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Differences from the largest first: a tiny temperature then means the likeliest token, not an overflow.
    distances = logits.float() - logits.float().max(dim=-1, keepdim=True).values
    ranked = (distances / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    probabilities = ranked.values
    if sampling.top_k is not None:
        probabilities[:, sampling.top_k :] = 0
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(logits.device)
    # One number in [0, 1) per row picks a place in its cumulative distribution: independent of the batch.
    place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True)
    place = place.clamp(max=cumulative.shape[-1] - 1)
    return ranked.indices.gather(1, place).squeeze(1)
