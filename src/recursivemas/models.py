"""LanguageModel: one frozen causal language model, with its tokenizer and chat template.

Any causal language model of transformers serves, by its public interface alone: no family is named here. What a family
does differently is found out by looking: whether its template has a system role, whether its states are exact when
they are read with padding, whether its output head is all that stands between its states and its logits. Several agents
may share one LanguageModel, and then share its weights. How it is read from files is told in loading.py. Knows nothing
of roles, links or rounds.
"""

import copy
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recursivemas.cache import LatentCache
from recursivemas.errors import ConfigError, InputError, ModelError, unknown_name
from recursivemas.loading import (
    AGENT_OPTIONS,
    QUANTIZATIONS,
    choose_dtype,
    load_network,
    load_without_weights,
    random_network,
)
from recursivemas.residency import Turns
from recursivemas.static import Backend, CompiledSteps, StaticCache, warn_uncompiled

_EMBEDDING_CHUNK = 16384

_DATE = "26 Jul 2024"
"""Llama 3's template writes the date of today, so that a question would be read differently tomorrow. This is the date
that the template itself writes where it knows of no clock."""


class LanguageModel:
    """A frozen causal language model that reads embeddings, keeps a cache, and can be asked for logits.

    Its latents are the states that leave its final norm: what its own output head reads.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Take over a network and its tokenizer, freeze the network and check that it can serve.

        `source` and `revision` say where the weights came from, if that is a place others can get them from too.
        Raises `ModelError` if the model has no chat template, reads backwards, or does not compute its logits from its
        last states.
        """
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source
        self.revision = revision
        self.config = network.config.get_text_config()
        self._compiled: CompiledSteps | None = None
        self.turns: Turns | None = None
        self._check()

    # Making and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        quantization: str | None = None,
    ) -> "LanguageModel":
        """Load a model by its Hugging Face name or from a directory.

        `attn_implementation` is one of `ATTENTION`, by default transformers' choice. `device_map`, in place of
        `device`, spreads a large model over several devices (see transformers; needs accelerate). `quantization` is one
        of `QUANTIZATIONS` (needs bitsandbytes): its states are then a few percent off (8bit) or more (4bit), and with
        8bit may depend on the batch; gradients flow through it as through any frozen model. Of a model that also
        sees, the text part is kept. An adapter_config.json that is not peft's, as stands beside the authors' weights,
        is no concern of the model's.

        Raises `ModelError` if it cannot be found, cannot serve, needs remote code (never run) or unpickling (never
        done), or has missing or unexpected weights (a silently random layer is worse than none); `ConfigError` for a
        setting that is unknown or cannot be had here.
        """
        loaded = load_network(
            str(name_or_path),
            revision=revision,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            device_map=device_map,
            quantization=quantization,
        )
        source = None if Path(name_or_path).is_dir() else str(name_or_path)
        return cls(loaded.network, loaded.tokenizer, source=source, revision=loaded.revision)

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "LanguageModel":
        """A model with random weights: `config` names its `model_type` and sizes, the vocabulary is the tokenizer's."""
        return cls(random_network(config, tokenizer, seed=seed, dtype=dtype, device=device), tokenizer)

    @classmethod
    def without_weights(cls, name_or_path: str | Path, *, revision: str | None = None) -> "LanguageModel":
        """What concerns text alone: tokenizer, chat template, length of the context. It cannot compute anything.

        Raises `ModelError` if these cannot be had.
        """
        loaded = load_without_weights(str(name_or_path), revision=revision)
        model = cls.__new__(cls)
        model._compiled = model.turns = None
        model.network, model.tokenizer, model.config = loaded.network, loaded.tokenizer, loaded.network.config
        model.source, model.revision = None if Path(name_or_path).is_dir() else str(name_or_path), revision
        model._check_text(model.source or model.config.model_type)
        return model

    def save_pretrained(self, directory: Path, *, dtype: str | None = None) -> None:
        """Write weights (in another precision if asked) and tokenizer in the format of transformers."""
        network = self.network
        if dtype is not None and not self.is_quantized:  # what is in fewer bits is written in these
            network = copy.deepcopy(network).to(choose_dtype(dtype, self.device))
        network.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _check(self) -> None:
        name = self.source or self.config.model_type
        self._check_text(name)
        with torch.no_grad():
            self._check_states(name)
            if self.new_cache(1).is_recurrent:
                self._check_recurrence(name)
        if self.is_quantized:
            self._check_gradients(name)

    def _check_text(self, name: str) -> None:
        """It must be known how to address the model, and how its replies end."""
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"'{name}' has no chat template, so it is not known how to address it; take its chat (instruct) "
                "version, or set `chat_template` in its tokenizer_config.json"
            )
        if not self.stop_token_ids:
            raise ModelError(f"'{name}' names no end-of-sequence token, so its replies would never end")

    def _check_states(self, name: str) -> None:
        """Nothing may look ahead, and the output head must be all that stands between the states and the logits."""
        first = min(self.stop_token_ids)
        probe = torch.tensor([[first, first], [first, (first + 1) % self.vocab_size]], device=self.device)
        states = self.states(probe)
        if not states.isfinite().all():
            raise ModelError(
                f"the states of '{name}' are not finite in {str(self.dtype).removeprefix('torch.')}; load it in "
                "bfloat16 or float32, or mend its weights"
            )
        ahead = (states[0, 0] - states[1, 0]).float().norm() / states[0, 0].float().norm()
        if not ahead <= 1e-2:
            raise ModelError(
                f"'{name}' looks at the words that follow, as encoders do, so it cannot write; choose a causal "
                "language model"
            )
        expected = self.network(input_ids=probe, use_cache=False).logits
        if not torch.allclose(expected.to(self.device).float(), self.logits(states).float(), rtol=1e-2, atol=1e-2):
            raise ModelError(
                f"'{name}' changes its logits after its output head (a soft cap or a scale), which is not supported"
            )

    def _check_recurrence(self, name: str) -> None:
        """A state of fixed size must not take in padding, and a step must not write into what a fork has of it.

        Whether it does is up to each family's own code, so it is tried out.
        """
        ids = torch.arange(1, 5, device=self.device) * (self.vocab_size // 6)
        embeds = self.embed(ids.unsqueeze(0))
        expected = self.states_of_embeds(embeds)[0, -1].float()
        cache = self.new_cache(1)
        mask = torch.tensor([[0, 0, 1, 1]], device=self.device)
        self.step(cache, torch.cat([embeds[:, 2:], embeds[:, :2]], dim=1), mask)
        self.step(cache.fork(), embeds[:, :1])
        self.step(cache, embeds[:, 2:3])
        found = self.step(cache, embeds[:, 3:])[0, -1].float()
        tolerance = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        if not (found - expected).norm() <= tolerance * expected.norm():
            raise ModelError(
                f"the recurrent states of '{name}' take in padding, or are written into after a fork, so its answers "
                "would depend on the batch; choose another model"
            )

    def _check_gradients(self, name: str) -> None:
        """What comes back through weights in fewer bits must belong to what went in: <W'(Wx), x> = <Wx, Wx>.

        On some devices bitsandbytes computes forward right and backward wrong, and says nothing.
        """
        kinds = ("Linear8bitLt", "Linear4bit")
        layer: Any = next((each for each in self.decoder.modules() if type(each).__name__ in kinds), None)
        if layer is None:
            return
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(4, layer.in_features, generator=generator).to(layer.weight.device, self.dtype)
        states.requires_grad_(True)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = layer(states) - (0 if layer.bias is None else layer.bias)
            back: tuple[Tensor | None, ...] = (None,)
            if mapped.requires_grad:
                back = torch.autograd.grad(mapped, states, mapped.detach(), allow_unused=True)
        expected = float(mapped.detach().double().square().sum())
        found = 0.0 if back[0] is None else float((back[0].double() * states.detach().double()).sum())
        if not abs(found - expected) <= 0.05 * expected:
            raise ModelError(
                f"gradients through the quantised weights of '{name}' are wrong on the device '{self.device}' "
                f"({found / expected:.3g} times what they should be), a fault of bitsandbytes there; take another "
                "device, dtype or quantization, or none"
            )

    # What it is

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are held in fewer bits than it computes in."""
        return getattr(self.network, "quantization_method", None) is not None

    @property
    def quantization(self) -> str | None:
        """One of `QUANTIZATIONS`, if its weights are held so."""
        chosen = getattr(self.network.config, "quantization_config", None) if self.is_quantized else None
        found = {"8bit": getattr(chosen, "load_in_8bit", False), "4bit": getattr(chosen, "load_in_4bit", False)}
        return next((name for name in QUANTIZATIONS if found[name]), None)

    @property
    def decoder(self) -> torch.nn.Module:
        """The network without its output head."""
        return self.network.get_decoder()

    @property
    def hidden_size(self) -> int:
        """Width of its last hidden states and of its input embeddings."""
        return self.network.get_input_embeddings().weight.shape[-1]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.network.get_input_embeddings().weight.shape[0]

    def take_turns(self, turns: Turns) -> None:
        """Wait on the CPU from here on, whenever another model of `turns` is asked for something.

        Raises `ConfigError` for weights that cannot be moved about.
        """
        name = self.source or self.config.model_type
        if self.is_quantized:
            raise ConfigError(
                f"'{name}' is held in fewer bits ({self.quantization}), by code that keeps its weights where they are; "
                "choose either residency 'one' or a quantization"
            )
        turns.add(self.network, name)
        self.turns = turns

    def _come(self) -> None:
        if self.turns is not None:
            self.turns.call(self.network)

    @property
    def device(self) -> torch.device:
        """Where it computes: where its input embeddings are, or take turns."""
        if self.turns is not None:
            return self.turns.device
        table = self.network.get_input_embeddings()
        if table.weight.is_meta and hasattr(table, "_hf_hook"):  # offloaded by accelerate, which brings it when called
            return torch.device(table._hf_hook.execution_device)
        return table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision it computes in."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest context it was made for, if its configuration says so.

        Where positions beyond a length are turned by other angles (longrope), that length: beyond it, one long row
        would change what all others in its batch have read.
        """
        longest: int | None = getattr(self.config, "max_position_embeddings", None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            if each.get("rope_type") == "longrope":
                longest = each.get("original_max_position_embeddings") or self.config.original_max_position_embeddings
        return longest

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end its reply: those its files name, and the one its chat template puts after a reply."""
        named: set[int] = set()
        for ids in (self.network.generation_config.eos_token_id, self.config.eos_token_id, self.tokenizer.eos_token_id):
            if ids is not None:
                named.update(ids if isinstance(ids, list) else [ids])
        ending = self._reply_ending()
        return frozenset(named if ending is None else {*named, ending})

    @cached_property
    def reply_end_id(self) -> int:
        """The token its chat template puts after a reply, else its end-of-sequence token."""
        ending = self._reply_ending()
        return min(self.stop_token_ids) if ending is None else ending

    @cached_property
    def reply_closing_ids(self) -> list[int]:
        """All tokens its chat template puts after a reply: `reply_end_id`, and a line break behind it, say."""
        return [self.reply_end_id] if self._reply_ending() is None else self._after_reply()

    def _after_reply(self) -> list[int]:
        mark = "reply"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        rendered = self._render(messages, add_generation_prompt=False)
        return self.encode(rendered.rpartition(mark)[2])

    def _reply_ending(self) -> int | None:
        after = self._after_reply()
        if not after:
            return None
        added = self.tokenizer.added_tokens_decoder.get(after[0])
        is_special = after[0] in self.tokenizer.all_special_ids or (added is not None and added.special)
        return after[0] if is_special else None

    @property
    def num_parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def fingerprint(self) -> str:
        """A hash of all weights, bit by bit: equal before and after training, or something is not frozen."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # Text

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Messages through the chat template, as one string that ends where the reply begins.

        Where the template has no system role, the system's text opens the first message of the user.
        """
        return self._render(messages, add_generation_prompt=True)

    @cached_property
    def _has_system_role(self) -> bool:
        mark = "the words of the system"
        conversation = [{"role": "system", "content": mark}, {"role": "user", "content": "question"}]
        try:
            return mark in self._apply_template(conversation, add_generation_prompt=True)
        except ModelError:
            return False

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if messages[0]["role"] == "system" and not self._has_system_role:
            system, user, *others = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
        return self._apply_template(messages, add_generation_prompt=add_generation_prompt)

    def _apply_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                date_string=_DATE,
            )
        except Exception as error:  # jinja and the template's own raise_exception; their classes vary
            name = self.source or self.config.model_type
            raise ModelError(f"the chat template of '{name}' cannot render a conversation: {error}") from None
        return str(rendered)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, with no token added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many pieces at once; equal pieces are tokenised once."""
        distinct = [text for text in dict.fromkeys(texts) if text]
        ids = self.tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
        known = {"": [], **dict(zip(distinct, ids, strict=True))}
        return [known[text] for text in texts]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a piece of text, and the characters [start, end) that each token covers.

        Blanks around the words of a token are left out; a token of nothing but blanks covers these.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = []
        for start, end in encoded["offset_mapping"]:
            piece = text[start:end]
            first = start + len(piece) - len(piece.lstrip())
            spans.append((first, first + len(piece.strip())) if piece.strip() else (start, end))
        return list(encoded["input_ids"]), spans

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    # Tensors

    def embed(self, token_ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden_size"]:
        """Input embeddings, scaled as the model itself scales them."""
        self._come()
        return self._look_up(token_ids)

    def _look_up(self, token_ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden_size"]:
        """Input embeddings from wherever the table is now, on the device where it computes."""
        table = self.network.get_input_embeddings()
        embeds: Tensor = table(token_ids.to(self.device if table.weight.is_meta else table.weight.device))
        return embeds.to(self.device)

    def new_cache(self, batch_size: int) -> LatentCache:
        """An empty cache for this model."""
        return LatentCache.new(self.config, batch_size, self.device)

    def compile(self, enabled: bool = True, *, backend: Backend = "inductor") -> None:
        """Read single positions in compiled steps from here on, wherever no gradient is asked for (see static.py).

        Or no longer do so. A model that cannot be compiled runs as before, and a `CompileWarning` says why: at once, or
        at its first step.
        """
        self._compiled = None
        if not enabled:
            return
        name = self.source or self.config.model_type
        reason = self._why_not_compiled()
        if reason is None:
            self._compiled = CompiledSteps(name, self.config, self.decoder, backend=backend)
        else:
            warn_uncompiled(name, reason)

    def _why_not_compiled(self) -> str | None:
        if self.new_cache(1).is_recurrent:
            return "it has linear attention, whose state is replaced at every step"
        if self.is_quantized:
            return f"its weights are held in fewer bits ({self.quantization}), by code that is not compiled"
        if self.turns is not None:
            return "its weights take turns on the device (residency 'one'), and a compiled step has them in one place"
        devices = {each.device for each in self.network.parameters()}
        if len(devices) > 1 or torch.device("meta") in devices:
            return "it is spread over several devices, or offloaded from one (device_map)"
        if "flash" in str(self.config._attn_implementation):
            return "flash attention leaves out masked positions, whose number changes; choose attn_implementation sdpa"
        return None

    @property
    def is_compiled(self) -> bool:
        """Whether single positions are read in compiled steps."""
        return self._compiled is not None and not self._compiled.is_given_up

    def with_room(self, cache: LatentCache, num_positions: int = 1) -> LatentCache | StaticCache:
        """The cache to read single positions into, so many or more: the same, unless steps are compiled.

        Then `cache` is left as it is.
        """
        if self._compiled is None or not self.is_compiled or torch.is_grad_enabled() or not len(cache):
            return cache
        return StaticCache(self._compiled, cache, num_positions)

    def step(
        self,
        cache: LatentCache | StaticCache,
        inputs_embeds: Float[Tensor, "batch position hidden_size"],
        attention_mask: Int[Tensor, "batch position"] | None = None,
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Read on from a cache (which grows) and return the last hidden states; no logits are computed."""
        if self.turns is not None and inputs_embeds.requires_grad:
            raise ConfigError("no link is trained through agents that take turns on a device; take residency 'all'")
        self._come()
        return cache.step(self.decoder, inputs_embeds, attention_mask).to(self.device)

    def states(
        self, input_ids: Int[Tensor, "batch position"], attention_mask: Int[Tensor, "batch position"] | None = None
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Last hidden states of left-padded token sequences, read without a cache."""
        self._come()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state.to(self.device)

    def states_of_embeds(
        self, inputs_embeds: Float[Tensor, "batch position hidden_size"]
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Last hidden states of embeddings read without a cache or padding: the slow way that fast ways must equal."""
        self._come()
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(inputs_embeds.shape[:2])
        output = self.decoder(inputs_embeds=inputs_embeds, position_ids=positions, use_cache=False)
        return output.last_hidden_state.to(self.device)

    def logits(self, states: Float[Tensor, "*batch hidden_size"]) -> Float[Tensor, "*batch vocab_size"]:
        """Scores of the next token, from last hidden states."""
        self._come()
        scores: Tensor = self.network.get_output_embeddings()(states)
        return scores.to(self.device)

    def pad(self, sequences: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch n"], Int[Tensor, "batch n"]]:
        """Token sequences padded on the left into one tensor, and the mask of real positions."""
        length = max(len(sequence) for sequence in sequences)
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.reply_end_id
        ids = [[filler] * (length - len(sequence)) + list(sequence) for sequence in sequences]
        mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    @torch.no_grad()
    def embedding_norm(self, token_ids: Iterable[int]) -> float:
        """Mean norm of the input embeddings of these tokens: how loud what this model reads is."""
        return float(self._look_up(torch.tensor(list(token_ids))).float().norm(dim=-1).mean())

    @cached_property
    def mean_embedding_norm(self) -> float:
        """Mean norm of the whole embedding table."""
        return sum(self.embedding_norm(ids.tolist()) * len(ids) for ids in self._table_chunks()) / self.vocab_size

    def _table_chunks(self) -> tuple[Int[Tensor, " chunk"], ...]:
        return torch.arange(self.vocab_size).split(_EMBEDDING_CHUNK)

    @torch.no_grad()
    def nearest_tokens(self, vectors: Float[Tensor, "vector hidden_size"], k: int = 3) -> list[list[tuple[str, float]]]:
        """For each vector the k tokens with the nearest input embeddings, and their cosines: a hint, not a reading."""
        unit = functional.normalize(vectors.to(self.device).float(), dim=-1)
        values = unit.new_zeros(len(unit), 0)
        indices = torch.zeros(len(unit), 0, dtype=torch.long, device=unit.device)
        # Chunk by chunk, and never more than the best so far: a real vocabulary times many latents is gigabytes.
        for ids in self._table_chunks():
            cosines = unit @ functional.normalize(self._look_up(ids).float(), dim=-1).T
            best = cosines.topk(min(k, len(ids)), dim=1)
            values = torch.cat([values, best.values], dim=1)
            indices = torch.cat([indices, ids[0].item() + best.indices], dim=1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            values, indices = values[:, :k], indices.gather(1, order)[:, :k]
        tokens = [[self._token_text(index) for index in row] for row in indices.tolist()]
        return [list(zip(*pair, strict=True)) for pair in zip(tokens, values.tolist(), strict=True)]

    def _token_text(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id])).strip() or str(self.tokenizer.convert_ids_to_tokens(token_id))

    def check_length(self, num_positions: int, what: str) -> None:
        """Raise `InputError` if the context is too short for this many positions."""
        if self.max_positions is not None and num_positions > self.max_positions:
            raise InputError(
                f"{what} needs {num_positions} positions, but the model reads at most {self.max_positions}; "
                "shorten the question, or lower the number of latent steps or new tokens"
            )


def load_models(
    agents: Mapping[str, str | Path | LanguageModel | Mapping[str, Any]],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    turns: Turns | None = None,
) -> dict[str, LanguageModel]:
    """A model for each role: as it is given, by its name, or by a mapping of options with its name under `model`.

    Options are those of `LanguageModel.from_pretrained`; `dtype` and `device` hold where they say nothing else. Roles
    with the same name and options share one copy. With `turns` each leaves the device before the next is read. Raises
    `ConfigError` or `ModelError`.
    """
    loaded: dict[str, LanguageModel] = {}
    models: dict[str, LanguageModel] = {}
    for role, given in agents.items():
        if isinstance(given, LanguageModel):
            models[role] = given
            if turns is not None and given.turns is not turns:
                given.take_turns(turns)
            continue
        options = dict(given) if isinstance(given, Mapping) else {"model": given}
        for name in options:
            if name not in AGENT_OPTIONS:
                raise ConfigError(f"agent '{role}': " + unknown_name("option", name, AGENT_OPTIONS))
        if "model" not in options:
            raise ConfigError(f"agent '{role}': `model` is missing; give its Hugging Face name or its directory")
        options = {"dtype": dtype, **({} if options.get("device_map") else {"device": device}), **options}
        key = repr(sorted((name, str(value)) for name, value in options.items()))
        if key not in loaded:
            loaded[key] = LanguageModel.from_pretrained(options.pop("model"), **options)
            if turns is not None:
                loaded[key].take_turns(turns)
        models[role] = loaded[key]
    return models
