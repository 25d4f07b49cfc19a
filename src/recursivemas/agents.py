"""Agent: a frozen language model in a role. It reads a prompt with messages in it, thinks in latents, speaks text.

An agent knows its model, its role and its inner link; it knows nothing of other agents, rounds or patterns.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from recursivemas.cache import LatentCache
from recursivemas.decoding import Interjector, Reply, SamplingParams, Writer, decode, decode_on, decode_steps
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.prompts import Segments, Slot
from recursivemas.rollout import Link, latent_rollout


@dataclass(frozen=True)
class Message:
    """What reaches one reader on one edge, for a batch: latents in the reader's embedding space, text, both, or none.

    In the reader's slot the latents come before the text.
    """

    latents: Float[Tensor, "batch latent_step hidden_size"] | None = None
    texts: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    """How many latents of each row are read, where rows have not equally many; by default all of them."""

    def select(self, rows: Sequence[int]) -> "Message":
        """The message of some rows, in the order given."""
        latents = None if self.latents is None else self.latents[list(rows)]
        texts = None if self.texts is None else tuple(self.texts[row] for row in rows)
        lengths = None if self.lengths is None else tuple(self.lengths[row] for row in rows)
        return Message(latents, texts, lengths)

    @property
    def batch_size(self) -> int:
        """Rows of the batch it was sent in."""
        return len(self.texts) if self.texts is not None else 0 if self.latents is None else len(self.latents)


@dataclass(frozen=True)
class Reading:
    """A batch of prompts that an agent has read: it can think or speak from here."""

    cache: LatentCache
    state: Float[Tensor, "batch hidden_size"]
    """Last hidden state at the last position of each prompt."""
    prompt_tokens: list[int]
    """Text tokens of each prompt, those read earlier (as a common prefix) included."""
    positions: list[int]
    """Positions that had to be read now, for each prompt."""
    inputs_embeds: list[Float[Tensor, "_ hidden_size"]] | None = None
    """Where a prompt is only composed, for others to read: the whole of each. Then the cache is empty."""

    def select(self, rows: Int[Tensor, " row"]) -> "Reading":
        """The reading of some rows, in the order given."""
        chosen = rows.tolist()
        return Reading(
            self.cache.select(rows),
            self.state[rows],
            [self.prompt_tokens[row] for row in chosen],
            [self.positions[row] for row in chosen],
            None if self.inputs_embeds is None else [self.inputs_embeds[row] for row in chosen],
        )


@dataclass
class PrefixStore:
    """Prompts up to their first slot, each read once for a batch and reused in every round."""

    _readings: dict[tuple[int, tuple[str, ...]], Reading] = field(default_factory=dict)

    def get(self, model: LanguageModel, prefixes: tuple[str, ...]) -> Reading:
        """The reading of these prefixes by this model; it is made, without gradient, when first asked for."""
        key = id(model), prefixes
        if key not in self._readings:
            ids = model.encode_batch(prefixes)
            model.check_length(max(len(each) for each in ids), "the prompt")
            input_ids, attention_mask = model.pad(ids)
            cache = model.new_cache(len(prefixes))
            with torch.no_grad():
                states = model.step(cache, model.embed(input_ids), attention_mask)
            lengths = [len(each) for each in ids]
            self._readings[key] = Reading(cache, states[:, -1], lengths, lengths)
            return self._readings[key]
        known = self._readings[key]
        return Reading(known.cache, known.state, known.prompt_tokens, [0] * len(prefixes))


Piece = list[int] | Float[Tensor, "_ hidden_size"]


class Agent:
    """A `LanguageModel` in a role, with the inner link it thinks through."""

    def __init__(self, role: str, model: LanguageModel, inner_link: RecursiveLink) -> None:
        self.role = role
        self.model = model
        self.inner_link = inner_link

    def read(
        self, prompts: Sequence[Segments], inbox: Mapping[str, Message], prefixes: PrefixStore | None = None
    ) -> Reading:
        """Read one prompt for each row, with the messages of `inbox` (by sender) in their slots.

        The text before the first slot is read once (see `PrefixStore`). What follows is composed for each row; rows of
        unequal length are read in steps that none of them is shorter than, so no row is ever padded in its middle.
        """
        heads, tails = zip(*(_cut(prompt) for prompt in prompts), strict=True)
        pieces = self._fill(tails, inbox)
        if all(heads):
            reading = (prefixes or PrefixStore()).get(self.model, heads)
        else:
            reading = self._nothing_read(len(prompts))
            pieces = [
                [ids, *row] if ids else row for ids, row in zip(self.model.encode_batch(heads), pieces, strict=True)
            ]
        return self._read_on(reading, pieces)

    def compose(self, prompts: Sequence[Segments], inbox: Mapping[str, Message]) -> Reading:
        """The same prompts for others to read: their embeddings (`Reading.inputs_embeds`), of which nothing is read."""
        heads, tails = zip(*(_cut(prompt) for prompt in prompts), strict=True)
        ids = self.model.encode_batch(heads)
        rows = [[head, *pieces] if head else pieces for head, pieces in zip(ids, self._fill(tails, inbox), strict=True)]
        embeds = [self._embed(row) for row in rows]
        lengths = [len(each) for each in embeds]
        self.model.check_length(max(lengths) + 1, f"the prompt of the {self.role}, with a reply,")
        nothing = self._nothing_read(len(rows))
        in_text = [sum(len(piece) for piece in row if isinstance(piece, list)) for row in rows]
        return Reading(nothing.cache, nothing.state, in_text, lengths, embeds)

    def think(
        self, reading: Reading, num_latent_steps: int, *, in_words: bool = False, inner_link: Link | None = None
    ) -> Float[Tensor, "batch latent_step hidden_size"]:
        """Latent thoughts that follow a reading (eq. 1): the last hidden states H, before any link.

        With `in_words` every thought is first made into the most probable word: the states are those from which the
        agent writes its text (teacher forcing with its own words). `inner_link` takes the place of the agent's own,
        where it reads rows for others, too (see `Chorus`).
        """
        longest = int(reading.cache.num_positions.max())
        self.model.check_length(longest + num_latent_steps, f"the prompt of the {self.role}, with its thoughts,")
        step = self._as_word if in_words else inner_link or self.inner_link
        return latent_rollout(self.model, reading.cache.fork(), reading.state, step, num_latent_steps)

    def _as_word(self, states: Float[Tensor, "batch hidden_size"]) -> Float[Tensor, "batch hidden_size"]:
        return self.model.embed(self.model.logits(states).argmax(dim=-1))

    def think_along(
        self, reading: Reading, num_latent_steps: int, texts: Sequence[str] | None = None
    ) -> tuple[Float[Tensor, "batch latent_step hidden_size"], tuple[int, ...]]:
        """Thoughts taken from a text that follows a reading (training only), and how many there are of each row.

        They are the last hidden states *at* the first tokens of each row's text, as the chat template closes it: the
        state that predicts its first token is not among them, and a text shorter than `num_latent_steps` gives fewer.
        Without `texts` each row's is what the agent would itself write.
        """
        if texts is None:
            with torch.no_grad():
                replies = self.speak(
                    reading, SamplingParams(max_new_tokens=num_latent_steps), [""] * len(reading.state)
                )
            ends, closing = self.model.stop_token_ids, self.model.reply_closing_ids
            written = [list(reply.token_ids) for reply in replies]
            rows = [[*ids[:-1], *closing] if ids[-1] in ends else ids for ids in written]
        else:
            rows = self._as_rendered(texts)
        rows = [ids[:num_latent_steps] for ids in rows]
        lengths = tuple(len(ids) for ids in rows)
        longest = int(reading.cache.num_positions.max())
        self.model.check_length(longest + max(lengths), f"the prompt of the {self.role}, with its text,")
        # What stands after a row's own tokens is read too, but no state before it can know that.
        padded = torch.tensor([ids + ids[-1:] * (max(lengths) - len(ids)) for ids in rows])
        return self.model.step(reading.cache.fork(), self.model.embed(padded)), lengths

    def _as_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of replies, with all that the chat template puts after each."""
        return [[*ids, *self.model.reply_closing_ids] for ids in self.model.encode_batch(texts)]

    def speak(
        self, reading: Reading, sampling: SamplingParams, keys: Sequence[str], tools: Interjector | None = None
    ) -> list[Reply]:
        """Text that follows a reading. `keys` name the rows for sampling; `tools` may be called in it."""
        room = self._room(reading)
        return decode(self.model, reading.cache.fork(), reading.state, sampling, keys, room, tools)

    def have_written(
        self, reading: Reading, sampling: SamplingParams, keys: Sequence[str], writer: Writer
    ) -> list[Reply]:
        """The same by `writer`, after prompts that were only composed."""
        prompts = reading.inputs_embeds
        assert prompts is not None
        longest = self.model.max_positions
        room = None if longest is None else [longest - len(prompt) for prompt in prompts]
        return writer.write(self.model, prompts, sampling, keys, room)

    def speak_steps(
        self, reading: Reading, sampling: SamplingParams, keys: Sequence[str], tools: Interjector | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """The same token by token: (row, token id) of every row that goes on."""
        room = self._room(reading)
        return decode_steps(self.model, reading.cache.fork(), reading.state, sampling, keys, room, tools)

    def speak_on(
        self, reading: Reading, sampling: SamplingParams, keys: Sequence[str], tools: Interjector | None = None
    ) -> tuple[list[Reply], Reading]:
        """The same, and the reading that ends with it: what the agent has written, and tools have told it, included.

        Of that nothing is read anew.
        """
        start = reading.cache.fork()
        replies, cache, state = decode_on(self.model, start, reading.state, sampling, keys, self._room(reading), tools)
        return replies, Reading(cache, state, reading.prompt_tokens, reading.positions)

    def loss(
        self,
        reading: Reading,
        texts: Sequence[str],
        *,
        as_rendered: bool = False,
        is_cut: Sequence[bool] = (),
        unjudged: Sequence[Collection[int]] = (),
    ) -> Float[Tensor, " batch"]:
        """Cross-entropy of each row's reply, mean over its tokens (the end-of-reply token included); eq. 6.

        `as_rendered` counts all that the chat template puts after a reply, where otherwise its first token ends it.
        Nothing is counted after a reply that `is_cut`, of which the end is missing, nor the tokens of each reply, by
        their place, that are `unjudged`.
        """
        targets = [[*ids, self.model.reply_end_id] for ids in self.model.encode_batch(texts)]
        targets = self._as_rendered(texts) if as_rendered else targets
        if any(is_cut):
            bare = self.model.encode_batch(texts)
            targets = [bare[row] if cut else targets[row] for row, cut in enumerate(is_cut)]
        # Rows are read together only if equally long, because padding would have to stand after the prompt.
        losses: dict[int, Tensor] = {}
        for rows in _group([len(target) for target in targets]).values():
            part = reading.select(torch.tensor(rows, device=reading.state.device))
            labels = torch.tensor([targets[row] for row in rows], device=reading.state.device)
            states = part.state.unsqueeze(1)
            if labels.shape[1] > 1:
                following = self.model.step(part.cache, self.model.embed(labels[:, :-1]))
                states = torch.cat([states, following], dim=1)
            logits = self.model.logits(states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            if any(unjudged):
                places = range(labels.shape[1])
                counts = [[float(place not in unjudged[row]) for place in places] for row in rows]
                weights = torch.tensor(counts, device=each.device, dtype=each.dtype)
                each = (each * weights).sum(dim=1) / weights.sum(dim=1)
            else:
                each = each.mean(dim=1)
            losses.update(zip(rows, each, strict=True))
        return torch.stack([losses[row] for row in range(len(texts))])

    def _fill(self, tails: Sequence[Segments], inbox: Mapping[str, Message]) -> list[list[Piece]]:
        """Token ids and latents of what follows the first slot, for each row; empty pieces are left out."""
        texts = [segment for tail in tails for segment in tail if isinstance(segment, str)]
        for message in inbox.values():
            texts += message.texts or ()
        ids = dict(zip(texts, self.model.encode_batch(texts), strict=True))
        rows: list[list[Piece]] = []
        for row, tail in enumerate(tails):
            pieces: list[Piece] = []
            for segment in tail:
                if isinstance(segment, str):
                    pieces.append(ids[segment])
                elif segment.role in inbox:
                    message = inbox[segment.role]
                    if message.latents is not None:
                        latents = message.latents[row]
                        latents = latents if message.lengths is None else latents[: message.lengths[row]]
                        pieces.append(latents.to(self.model.device, self.model.dtype))
                    if message.texts is not None:
                        pieces.append(ids[message.texts[row]])
            rows.append([piece for piece in pieces if len(piece)])
        return rows

    def _room(self, reading: Reading) -> list[int] | None:
        """Tokens that each row's context has left; a reply that fills it is cut, and says so (`Reply.finished`)."""
        if self.model.max_positions is None:
            return None
        used = reading.cache.num_positions
        self.model.check_length(int(used.max()) + 1, f"the prompt of the {self.role}, with a reply,")
        return (self.model.max_positions - used).tolist()

    def _nothing_read(self, batch_size: int) -> Reading:
        state = torch.zeros(batch_size, self.model.hidden_size, device=self.model.device, dtype=self.model.dtype)
        return Reading(self.model.new_cache(batch_size), state, [0] * batch_size, [0] * batch_size)

    def _read_on(self, reading: Reading, rows: list[list[Piece]]) -> Reading:
        """Read each row's pieces after what has been read; rows of one form together, then merged."""
        known = reading.cache.num_positions.tolist()
        longest = max(old + sum(len(piece) for piece in row) for old, row in zip(known, rows, strict=True))
        self.model.check_length(longest, f"the prompt of the {self.role}")
        forms = {tuple((isinstance(piece, list), len(piece)) for piece in row) for row in rows}
        if len(forms) > 1:
            cache, state = self._read_ragged(reading, [self._embed(row) for row in rows])
        else:
            cache, state = self._read_even(reading, rows)
        lengths = [[len(piece) for piece in row] for row in rows]
        in_text = [sum(len(piece) for piece in row if isinstance(piece, list)) for row in rows]
        return Reading(
            cache,
            state,
            [known + new for known, new in zip(reading.prompt_tokens, in_text, strict=True)],
            [known + sum(new) for known, new in zip(reading.positions, lengths, strict=True)],
        )

    def _read_even(self, reading: Reading, rows: list[list[Piece]]) -> tuple[LatentCache, Tensor]:
        """Read rows whose pieces are of one form, all at once."""
        cache = reading.cache.fork()
        if not rows[0]:
            return cache, reading.state
        columns = []
        for column in zip(*rows, strict=True):
            if isinstance(column[0], list):
                columns.append(self.model.embed(torch.tensor(column)))
            else:
                columns.append(torch.stack(column))  # one form: all of them are latents
        return cache, self.model.step(cache, torch.cat(columns, dim=1))[:, -1]

    def _read_ragged(self, reading: Reading, rows: list[Tensor]) -> tuple[LatentCache, Tensor]:
        """Read rows of unequal length, in powers of two: a row of 13 positions is read in steps of 8, 4 and 1.

        Every step takes the rows that have it in their length, and merges them with the others. So the number of steps
        grows with the logarithm of the longest row, whatever the number of different lengths.
        """
        cache, state = reading.cache.fork(), reading.state
        done = [0] * len(rows)
        for size in (2**power for power in reversed(range(max(map(len, rows)).bit_length()))):
            taking = [index for index, row in enumerate(rows) if len(row) & size]
            if not taking:
                continue
            waiting = [index for index, row in enumerate(rows) if not len(row) & size]
            inputs_embeds = torch.stack([rows[index][done[index] : done[index] + size] for index in taking])
            part = cache.select(torch.tensor(taking, device=state.device))
            states = self.model.step(part, inputs_embeds)[:, -1]
            for index in taking:
                done[index] += size
            if waiting:
                places = torch.tensor(waiting, device=state.device)
                order = torch.tensor([*taking, *waiting], device=state.device).argsort()
                cache = LatentCache.merge([part, cache.select(places)]).select(order)
                state = torch.cat([states, state[places]])[order]
            else:
                cache, state = part, states
        return cache, state

    def _embed(self, row: list[Piece]) -> Float[Tensor, "position hidden_size"]:
        parts = [self.model.embed(torch.tensor(piece)) if isinstance(piece, list) else piece for piece in row]
        empty = torch.zeros(0, self.model.hidden_size, device=self.model.device, dtype=self.model.dtype)
        return torch.cat([empty, *parts])


def _cut(prompt: Segments) -> tuple[str, Segments]:
    """The text before the first slot, and the rest."""
    if prompt and not isinstance(prompt[0], Slot):
        return prompt[0], prompt[1:]
    return "", prompt


def _group(forms: Sequence[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, form in enumerate(forms):
        groups[form].append(row)
    return dict(groups)
