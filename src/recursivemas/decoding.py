"""Text from the state in which a prompt or a latent thought has left a model.

What is sampled for a question depends on the seed and on the question alone (its key), never on what else is in the
batch. Text may be put into a reply while it is being written (`Interjector`: the results of tools): its row then leaves
the batch, the others go on, and it comes back when its text has come and been read, from the cache and in one piece.
Takes a LanguageModel and a cache; knows nothing of agents, rounds, links or tools.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recursivemas.cache import LatentCache
from recursivemas.errors import ConfigError
from recursivemas.models import LanguageModel
from recursivemas.trace import ToolCall


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How text is decoded. Temperature 0 takes the likeliest token and ignores `top_p`, `top_k` and `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Sample among the likeliest tokens that together hold this much probability."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    """End-of-reply tokens are not taken before a text has so many tokens; a stop string still ends it."""
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
            ("min_new_tokens", "a whole number, 0 or more", _is(Integral, self.min_new_tokens, at_least=0)),
            ("seed", "a whole number", _is(Integral, self.seed)),
            ("stop", "text that is not empty", all(isinstance(each, str) and each for each in self.stop)),
        ):
            if not fits:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        for name in ("top_k", "max_new_tokens", "min_new_tokens", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens ({self.max_new_tokens}); lower one "
                "or raise the other"
            )


@dataclass(frozen=True)
class Reply:
    """Decoded text of one question."""

    text: str
    token_ids: tuple[int, ...]
    """Its tokens, the end-of-reply token and the results of tools included."""
    finished: bool
    """Whether it ended by itself; otherwise it was cut at `max_new_tokens`."""
    calls: tuple[ToolCall, ...] = ()
    """Tools that were called, and what they said: where it stands among the tokens."""

    @property
    def num_generated(self) -> int:
        """Tokens that were generated; results of tools were only read."""
        return len(self.token_ids) - sum(call.num_tokens for call in self.calls)


@runtime_checkable
class Interjector(Protocol):
    """Puts text into replies while they are being written. Rows are those of the batch, counted from 0."""

    def calls(self, row: int) -> tuple[ToolCall, ...]:
        """What has been put into a row so far."""

    def forbidden(self, row: int, token_ids: Sequence[int]) -> list[int]:
        """Tokens that must not follow those of a row."""

    def takes_up(self, row: int, token_ids: Sequence[int], room: int) -> bool:
        """Whether a row with these tokens now waits for text, of at most `room` tokens."""

    def ready(self, *, wait: bool) -> list[tuple[int, list[int]]]:
        """Rows whose text has come, with its tokens. With `wait` at least one, where some row is waiting."""


@runtime_checkable
class Writer(Protocol):
    """Writes what follows prompts that are given as embeddings."""

    def check(self, model: LanguageModel) -> object:
        """Raise an error, now rather than after much work, unless it writes what this model would."""

    def write(
        self,
        model: LanguageModel,
        prompts: Sequence[Float[Tensor, "_ hidden_size"]],
        sampling: SamplingParams,
        keys: Sequence[str],
        room: Sequence[int] | None,
    ) -> list[Reply]:
        """The reply to each prompt, in the tokens of `model`; `keys` name them for sampling."""


@torch.no_grad()
def decode_steps(
    model: LanguageModel,
    cache: LatentCache,
    state: Float[Tensor, "batch hidden_size"],
    sampling: SamplingParams,
    keys: Sequence[str],
    room: Sequence[int] | None = None,
    tools: Interjector | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Decode token by token: each step yields (row, token) for every row that is not finished. The cache grows.

    Nothing is differentiated through text. `room` says how many tokens each row's context has left. Rows that have
    finished are dropped from the batch once they are half of it. Tokens that `tools` put in are yielded as well.
    """
    yield from _Writing(model, cache, state, sampling, keys, room, tools).steps()


class _Writing:
    """Rows that are being written: those in the batch, some of which may be done, and those that wait for text."""

    def __init__(
        self,
        model: LanguageModel,
        cache: LatentCache,
        state: Float[Tensor, "batch hidden_size"],
        sampling: SamplingParams,
        keys: Sequence[str],
        room: Sequence[int] | None,
        tools: Interjector | None,
        *,
        keep_ends: bool = False,
    ) -> None:
        self._model, self._sampling, self._tools = model, sampling, tools
        self._cache, self._state = model.with_room(cache), state
        self._room = list(room) if room is not None else None
        self._generators = [torch.Generator().manual_seed(seed_of(sampling.seed, key)) for key in keys]
        self._rows = list(range(len(keys)))
        self._active = set(self._rows)
        self._ends_of_text = torch.tensor(sorted(model.stop_token_ids))
        self._texts: list[list[int]] = [[] for _ in keys]
        self._num_generated = [0] * len(keys)
        self._waiting: dict[int, tuple[LatentCache, int]] = {}
        """Rows that have left the batch: their cache, and their last token, which has still to be read."""
        self._ends: dict[int, tuple[LatentCache, Tensor, int | None]] | None = {} if keep_ends else None

    def steps(self) -> Iterator[list[tuple[int, int]]]:
        """Decode to the end (see `decode_steps`)."""
        while self._active or self._waiting:
            if self._active:
                tokens = self._sample()
                taken = [(row, token) for row, token in zip(self._rows, tokens, strict=True) if row in self._active]
                self._take(taken)
                yield taken
                self._step(tokens)
            if self._waiting and self._tools is not None:
                come = self._tools.ready(wait=not self._active)
                self._resume(come)
                for row, token_ids in come:
                    yield [(row, token) for token in token_ids]

    def ends(self) -> tuple[LatentCache, Float[Tensor, "batch hidden_size"]]:
        """Where all rows have ended: what follows would be read from here. The end-of-reply token is not read."""
        assert self._ends is not None
        caches, states = [], []
        for row in range(len(self._texts)):
            cache, state, token = self._ends[row]
            if token is not None:
                state = self._model.step(cache, self._model.embed(torch.tensor([[token]])))[:, -1]
            caches.append(cache)
            states.append(state)
        return LatentCache.merge(caches), torch.cat(states)

    def _sample(self) -> list[int]:
        logits = self._model.logits(self._state)
        least = self._sampling.min_new_tokens
        too_short = [place for place, row in enumerate(self._rows) if self._num_generated[row] < least]
        if too_short:
            logits[torch.tensor(too_short).unsqueeze(1), self._ends_of_text] = -torch.inf
        if self._tools is not None:
            for place, row in enumerate(self._rows):
                if row in self._active and (forbidden := self._tools.forbidden(row, self._texts[row])):
                    logits[place, forbidden] = -torch.inf
        chosen: list[int] = _choose(logits, self._sampling, [self._generators[row] for row in self._rows]).tolist()
        return chosen

    def _take(self, taken: Sequence[tuple[int, int]]) -> None:
        """Put tokens to their rows; see which rows are done, and which wait now."""
        for row, token in taken:
            text = self._texts[row]
            text.append(token)
            self._num_generated[row] += 1
            if self._is_done(row):
                self._active.discard(row)
                if self._ends is not None:
                    ended = token in self._model.stop_token_ids
                    self._ends[row] = (*self._part(row), None if ended else token)
            elif self._tools is not None:
                room = self._left(row) - 1
                if self._tools.takes_up(row, text, room):
                    self._active.discard(row)
                    self._waiting[row] = self._part(row)[0], token

    def _is_done(self, row: int) -> bool:
        text = self._texts[row]
        if text[-1] in self._model.stop_token_ids or self._num_generated[row] >= self._sampling.max_new_tokens:
            return True
        begin = _after_calls(self._tools.calls(row)) if self._tools is not None else 0
        return self._left(row) <= 0 or _holds_stop(self._model, text, self._sampling, begin)

    def _left(self, row: int) -> int:
        """Tokens that the context of a row has left."""
        return (1 << 62) if self._room is None else self._room[row] - len(self._texts[row])

    def _part(self, row: int) -> tuple[LatentCache, Tensor]:
        """One row of the batch, before its last token is read."""
        place = torch.tensor([self._rows.index(row)], device=self._state.device)
        return self._cache.select(place), self._state[place]

    def _step(self, tokens: list[int]) -> None:
        """Read the last token of each row that goes on."""
        if not self._active:
            self._rows = []
            return
        gone = [row for row in self._rows if row not in self._active]
        # A row whose context is full must not be stepped on, even if nobody looks at it.
        must_go = any(row in self._waiting or self._left(row) <= 0 for row in gone)
        if must_go or 2 * len(self._active) <= len(self._rows):
            kept = [place for place, row in enumerate(self._rows) if row in self._active]
            left = self._cache.select(torch.tensor(kept, device=self._state.device))
            self._cache = self._model.with_room(left)
            self._rows, tokens = [self._rows[place] for place in kept], [tokens[place] for place in kept]
        inputs_embeds = self._model.embed(torch.tensor(tokens)).unsqueeze(1)
        self._state = self._model.step(self._cache, inputs_embeds)[:, -1]

    def _resume(self, come: Sequence[tuple[int, list[int]]]) -> None:
        """Read what has come for some rows, each text at once, and take them into the batch again.

        Texts of one length are read together, so that many short ones cost little more than one.
        """
        caches, states = ([self._cache.fork()], [self._state]) if self._rows else ([], [])
        for length in sorted({len(token_ids) for _, token_ids in come}):
            part = [(row, token_ids) for row, token_ids in come if len(token_ids) == length]
            waited = [self._waiting.pop(row) for row, _ in part]
            read = [[last, *token_ids] for (_, last), (_, token_ids) in zip(waited, part, strict=True)]
            cache = waited[0][0] if len(part) == 1 else LatentCache.merge([each for each, _ in waited])
            states.append(self._model.step(cache, self._model.embed(torch.tensor(read)))[:, -1])
            caches.append(cache)
            for row, token_ids in part:
                self._texts[row].extend(token_ids)
                self._rows.append(row)
                self._active.add(row)
        if come:
            cache = caches[0] if len(caches) == 1 else LatentCache.merge(caches)
            self._cache, self._state = self._model.with_room(cache), torch.cat(states)


def decode(
    model: LanguageModel,
    cache: LatentCache,
    state: Float[Tensor, "batch hidden_size"],
    sampling: SamplingParams,
    keys: Sequence[str],
    room: Sequence[int] | None = None,
    tools: Interjector | None = None,
) -> list[Reply]:
    """Decode the reply of every row to its end. `keys` name the rows for sampling. The cache grows."""
    tokens: list[list[int]] = [[] for _ in keys]
    for taken in decode_steps(model, cache, state, sampling, keys, room, tools):
        for row, token in taken:
            tokens[row].append(token)
    return _make_replies(model, tokens, sampling, tools)


@torch.no_grad()
def decode_on(
    model: LanguageModel,
    cache: LatentCache,
    state: Float[Tensor, "batch hidden_size"],
    sampling: SamplingParams,
    keys: Sequence[str],
    room: Sequence[int] | None = None,
    tools: Interjector | None = None,
) -> tuple[list[Reply], LatentCache, Float[Tensor, "batch hidden_size"]]:
    """Decode the replies, and where they end: the cache that holds them, and the states at their last words.

    A token that ends a reply is not read, so that its author can think on.
    """
    writing = _Writing(model, cache, state, sampling, keys, room, tools, keep_ends=True)
    tokens: list[list[int]] = [[] for _ in keys]
    for taken in writing.steps():
        for row, token in taken:
            tokens[row].append(token)
    return _make_replies(model, tokens, sampling, tools), *writing.ends()


def _make_replies(
    model: LanguageModel, tokens: Sequence[Sequence[int]], sampling: SamplingParams, tools: Interjector | None
) -> list[Reply]:
    calls = [tools.calls(row) if tools is not None else () for row in range(len(tokens))]
    return [make_reply(model, ids, sampling, said) for ids, said in zip(tokens, calls, strict=True)]


def make_reply(
    model: LanguageModel, token_ids: Sequence[int], sampling: SamplingParams, calls: Sequence[ToolCall] = ()
) -> Reply:
    """The reply that these tokens are, with the tools that were called in it."""
    ended = bool(token_ids) and token_ids[-1] in model.stop_token_ids
    words = token_ids[:-1] if ended else token_ids
    text = model.decode(words)
    position = _stop_position(text, sampling, len(model.decode(words[: _after_calls(calls)])))
    return Reply(
        text if position is None else text[:position], tuple(token_ids), ended or position is not None, tuple(calls)
    )


def told_so_far(reply: Reply, sampling: SamplingParams) -> str:
    """The part of an unfinished reply that no further token can take back: no half letter, no half stop string."""
    text = reply.text.rstrip("\ufffd")
    longest = max((len(stop) for stop in sampling.stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in sampling.stop):
            return text[:-length]
    return text


def _holds_stop(model: LanguageModel, token_ids: Sequence[int], sampling: SamplingParams, begin: int) -> bool:
    """Whether a stop string stands in what was written from the token `begin` on."""
    return bool(sampling.stop) and _stop_position(model.decode(token_ids[begin:]), sampling) is not None


def _after_calls(calls: Sequence[ToolCall]) -> int:
    """The first token after the last text that was put in."""
    return calls[-1].position + calls[-1].num_tokens if calls else 0


def _is(kind: Any, value: Any, *, at_least: int | None = None) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (at_least is None or value >= at_least)


def _stop_position(text: str, sampling: SamplingParams, begin: int = 0) -> int | None:
    found = [position for stop in sampling.stop if (position := text.find(stop, begin)) >= 0]
    return min(found, default=None)


def seed_of(seed: int, key: str) -> int:
    """What the generator of a question is seeded with."""
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
