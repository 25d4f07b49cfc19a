"""LanguageModel: one frozen causal language model, with its tokenizer and chat template.

Any causal language model of transformers serves, by its public interface alone: no family is named here. What a family
does differently is found out by looking: whether its template has a system role, whether its states are exact when
they are read with padding, whether its output head is all that stands between its states and its logits. Of a model
that also sees or hears, the text part is taken. Several agents may share one LanguageModel, and then share its weights.
Together with cache.py this is the only place in the core that imports model classes of transformers. Knows nothing of
roles, links or rounds.
"""

import copy
import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import find_adapter_config_file

from recursivemas.cache import LatentCache
from recursivemas.errors import ConfigError, InputError, ModelError, unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ATTENTION = ("eager", "sdpa", "flash_attention_2")
"""Implementations of attention that can be asked for. A name of the hub would be code that is downloaded and run."""
QUANTIZATIONS = ("8bit", "4bit")
"""Ways to hold the weights of a frozen model in fewer bits: int8 (LLM.int8) or 4-bit NormalFloat, by bitsandbytes."""
_AGENT_OPTIONS = ("model", "revision", "dtype", "device", "attn_implementation", "device_map", "quantization")
_EMBEDDING_CHUNK = 16384

_OTHER_PARTS = re.compile(
    r"(^|\.)(mtp|visual|vision_\w+|vision|image_\w+|audio_\w+|multi_modal_\w+|embed_vision|embed_audio)\."
)
"""Weights of a checkpoint that are no part of its language model: what sees and hears, and what guesses ahead."""

_DATE = "26 Jul 2024"
"""Llama 3's template writes the date of today, so that a question would be read differently tomorrow. This is the date
that the template itself writes where it knows of no clock."""


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; by default a CUDA GPU if there is one, else the CPU. Raises `ConfigError`."""
    if device is None or str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the device '{device}' cannot be used ({reason}); try cpu, cuda or cuda:0") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """The precision asked for; by default float32 on a CPU and the checkpoint's own elsewhere. Raises `ConfigError`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", str(dtype), [*DTYPES, "auto"]))
    return DTYPES[dtype]


@dataclass(frozen=True)
class ModelSizes:
    """What the configuration of a model says of its size; no weights are needed."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_parameters: int
    """Weights of its language model, tied ones counted once."""
    max_positions: int | None
    """The longest context, if the configuration says so."""
    intermediate_size: int
    """Width of the feed-forward part of a layer."""
    query_size: int
    """Width of all attention heads together."""
    key_size: int
    """Width of all keys at one position, and as much of all values: what a cache holds of it in each layer."""
    num_recurrent_layers: int
    """Layers with linear attention, whose cache is a state of fixed size."""
    recurrent_width: int
    """Width of the queries, keys and values of such a layer at one position."""
    recurrent_size: int
    """Numbers in the state of such a layer."""
    body_parameters: int
    """Weights but for the embedding table and the output head: those that every position is multiplied with."""
    linear_widths: int
    """Inputs and outputs of all linear layers but the output head: the parameters of adapters of rank one."""

    @classmethod
    def of(cls, name_or_path: str | Path, shipped: Path) -> "ModelSizes":
        """Sizes of a model in a directory, or of one by its Hugging Face name.

        Of a name, `shipped` is looked into first: a folder of configurations, `ORGANISATION__NAME.json`. Then, what
        the Hugging Face hub or its cache holds. Raises `ModelError` if there is none, or transformers does not know it.
        """
        name = str(name_or_path)
        file = shipped / f"{name.replace('/', '__')}.json"
        try:
            if file.is_file() and not Path(name).is_dir():
                config = AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
            else:
                config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"no configuration of the language model '{name}' is known: {reason}") from None
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kinds = getattr(config, "layer_types", None) or []
        key_heads, key_width, value_heads, value_width = (
            getattr(config, f"linear_{each}", 0)
            for each in ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim")
        )
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            num_parameters=sum(parameter.numel() for parameter in network.parameters()),
            max_positions=getattr(config, "max_position_embeddings", None),
            intermediate_size=config.intermediate_size,
            query_size=heads * head_size,
            key_size=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            num_recurrent_layers=sum(kind == "linear_attention" for kind in kinds),
            recurrent_width=2 * key_heads * key_width + value_heads * value_width,
            recurrent_size=value_heads * key_width * value_width,
            body_parameters=sum(
                each.numel()
                for each in network.parameters()
                if each is not network.get_input_embeddings().weight
                and each is not network.get_output_embeddings().weight
            ),
            linear_widths=sum(
                each.in_features + each.out_features
                for each in network.modules()
                if isinstance(each, torch.nn.Linear) and each is not network.get_output_embeddings()
            ),
        )


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
        name = str(name_or_path)
        place = choose_device(device)
        _check_options(attn_implementation, device, device_map)
        precision = choose_dtype(dtype, place)
        quantized = _quantized(quantization, precision, place, device_map)
        try:
            config = _read_config(name, revision)
            knows_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
            kind = AutoModelForCausalLM if knows_causal else AutoModelForImageTextToText
            with _without_adapter(name, revision) as (folder, adapter_kwargs):
                network, info = kind.from_pretrained(
                    folder,
                    revision=revision,
                    dtype=precision,
                    attn_implementation=attn_implementation,
                    **({"device_map": device_map} | quantized),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    adapter_kwargs=adapter_kwargs,
                )
            tokenizer = _load_tokenizer(name, revision)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the language model '{name}': {_reason(error, name)}") from None
        text_part = _text_part(network)
        _check_weights(name, network, text_part, info)
        local = Path(name).is_dir()
        found = revision or getattr(network.config, "_commit_hash", None)
        is_placed = device_map is not None or getattr(network, "quantization_method", None) is not None
        placed = text_part if is_placed else text_part.to(place)
        return cls(placed, tokenizer, source=None if local else name, revision=None if local else found)

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
        place = choose_device(device)
        settings = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            **config,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        precision = choose_dtype(dtype, place)
        return cls(network.to(place, torch.float32 if isinstance(precision, str) else precision), tokenizer)

    @classmethod
    def without_weights(cls, name_or_path: str | Path, *, revision: str | None = None) -> "LanguageModel":
        """What concerns text alone: tokenizer, chat template, length of the context. It cannot compute anything.

        Raises `ModelError` if these cannot be had.
        """
        name = str(name_or_path)
        try:
            config = _read_config(name, revision).get_text_config()
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(config)
            tokenizer = _load_tokenizer(name, revision)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise ModelError(f"the tokenizer of '{name}' cannot be had: {_reason(error, name)}") from None
        model = cls.__new__(cls)
        model.network, model.tokenizer, model.config = network, tokenizer, config
        model.source, model.revision = None if Path(name).is_dir() else name, revision
        model._check_text(model.source or config.model_type)
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

    @property
    def device(self) -> torch.device:
        """Where its input embeddings are."""
        return self.network.get_input_embeddings().weight.device

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
        embeds: Tensor = self.network.get_input_embeddings()(token_ids.to(self.device))
        return embeds

    def new_cache(self, batch_size: int) -> LatentCache:
        """An empty cache for this model."""
        return LatentCache.new(self.config, batch_size, self.device)

    def step(
        self,
        cache: LatentCache,
        inputs_embeds: Float[Tensor, "batch position hidden_size"],
        attention_mask: Int[Tensor, "batch position"] | None = None,
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Read on from a cache (which grows) and return the last hidden states; no logits are computed."""
        return cache.step(self.decoder, inputs_embeds, attention_mask).to(self.device)

    def states(
        self, input_ids: Int[Tensor, "batch position"], attention_mask: Int[Tensor, "batch position"] | None = None
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Last hidden states of left-padded token sequences, read without a cache."""
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
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(inputs_embeds.shape[:2])
        output = self.decoder(inputs_embeds=inputs_embeds, position_ids=positions, use_cache=False)
        return output.last_hidden_state.to(self.device)

    def logits(self, states: Float[Tensor, "*batch hidden_size"]) -> Float[Tensor, "*batch vocab_size"]:
        """Scores of the next token, from last hidden states."""
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
        return float(self.embed(torch.tensor(list(token_ids))).float().norm(dim=-1).mean())

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
            cosines = unit @ functional.normalize(self.embed(ids).float(), dim=-1).T
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
) -> dict[str, LanguageModel]:
    """A model for each role: as it is given, by its name, or by a mapping of options with its name under `model`.

    Options are those of `LanguageModel.from_pretrained`; `dtype` and `device` hold where they say nothing else. Roles
    with the same name and options share one copy. Raises `ConfigError` or `ModelError`.
    """
    loaded: dict[str, LanguageModel] = {}
    models: dict[str, LanguageModel] = {}
    for role, given in agents.items():
        if isinstance(given, LanguageModel):
            models[role] = given
            continue
        options = dict(given) if isinstance(given, Mapping) else {"model": given}
        for name in options:
            if name not in _AGENT_OPTIONS:
                raise ConfigError(f"agent '{role}': " + unknown_name("option", name, _AGENT_OPTIONS))
        if "model" not in options:
            raise ConfigError(f"agent '{role}': `model` is missing; give its Hugging Face name or its directory")
        options = {"dtype": dtype, **({} if options.get("device_map") else {"device": device}), **options}
        key = repr(sorted((name, str(value)) for name, value in options.items()))
        if key not in loaded:
            loaded[key] = LanguageModel.from_pretrained(options.pop("model"), **options)
        models[role] = loaded[key]
    return models


def options_by_role(options: Mapping[str, Mapping[str, Any]], roles: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The options of every role: its own, over those for all (`*`). Raises `ConfigError` for unknown names."""
    known = list(roles)
    for role, chosen in options.items():
        if role not in (*known, "*"):
            raise ConfigError("options of agents: " + unknown_name("role", role, [*known, "*"]))
        for name in chosen:
            if name not in _AGENT_OPTIONS or name == "model":
                raise ConfigError(f"agent '{role}': " + unknown_name("option", name, _AGENT_OPTIONS[1:]))
    found = {role: {**options.get("*", {}), **options.get(role, {})} for role in known}
    # A model is on one device, or spread over several: what is said of its own holds over what is said of all.
    for chosen in found.values():
        if chosen.get("device_map"):
            chosen["device"] = None
    return found


def _check_options(
    attn_implementation: str | None, device: str | torch.device | None, device_map: str | Mapping[str, Any] | None
) -> None:
    if attn_implementation is not None and attn_implementation not in ATTENTION:
        raise ConfigError(unknown_name("attention implementation", attn_implementation, ATTENTION))
    if device_map is None:
        return
    if device is not None:
        raise ConfigError(f"give a device ('{device}') or a device_map, not both")
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("a device_map needs the package accelerate: pip install accelerate, or give one device")


def _quantized(
    quantization: str | None,
    precision: torch.dtype | str,
    place: torch.device,
    device_map: str | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What transformers is told to hold weights in fewer bits. Raises `ConfigError` where that cannot be had."""
    if quantization is None:
        return {}
    if quantization not in QUANTIZATIONS:
        raise ConfigError(unknown_name("quantization", quantization, QUANTIZATIONS))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization '{quantization}' needs the package bitsandbytes: pip install 'recursivemas[quant]', or "
            "leave `quantization` out"
        )
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every layer and call that it rounds
    known = {*bitsandbytes.supported_torch_devices}
    if device_map is None and place.type not in known:
        raise ConfigError(
            f"quantization '{quantization}' cannot be had on the device '{place}': bitsandbytes knows "
            f"{', '.join(sorted(known))}; take one of these, or leave `quantization` out"
        )
    computed = torch.bfloat16 if isinstance(precision, str) else precision
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if quantization == "8bit"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computed}
    )
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": device_map or {"": place}}


def _read_config(name: str, revision: str | None) -> PretrainedConfig:
    """The configuration of a model that can serve, as far as that can be told from it. Raises `ModelError`."""
    raw, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except ValueError:
        if raw.get("auto_map"):
            raise ModelError(
                f"'{name}' needs code of its own (auto_map in its config.json), which is never run; choose a model "
                "that transformers knows by itself"
            ) from None
        raise
    kind = f"'{name}' is a {config.model_type} model"
    if config.is_encoder_decoder:
        raise ModelError(
            f"{kind}, with an encoder and a decoder; choose a causal language model, which has only the latter"
        )
    # Only families that can be either say of themselves which they are; others may have it in old files.
    if getattr(type(config), "is_decoder", None) is False and not config.is_decoder:
        raise ModelError(f"{kind}, an encoder, which cannot write; choose a causal language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"{kind}, of which transformers has no causal language model; choose another model")
    return config


@contextmanager
def _without_adapter(name: str, revision: str | None) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Where to load from, and with which `adapter_kwargs`, so that an adapter_config.json is not taken for peft's.

    The authors' release has a file of this name beside the weights of every agent. Raises `ModelError` for peft's own.
    """
    found = find_adapter_config_file(name, revision=revision)
    if found is None:
        yield name, None
        return
    declared = json.loads(Path(found).read_text(encoding="utf-8"))
    if "peft_type" in declared:
        raise ModelError(
            f"'{name}' holds an adapter of peft ({declared['peft_type']}); merge it into the weights (peft's "
            "merge_and_unload) and load what comes out"
        )
    nowhere = {"subfolder": "no-adapter"}
    if find_adapter_config_file(name, revision=revision, **nowhere) is None:
        yield name, nowhere
        return
    # Some versions of transformers look into a directory itself, whatever they are told: they get one of links.
    with TemporaryDirectory() as view:
        for file in Path(name).resolve().iterdir():
            if file.name != Path(found).name:
                (Path(view) / file.name).symlink_to(file)
        yield view, None


def _reason(error: Exception, name: str) -> str:
    """Why a model could not be loaded, in one line, with what to do if its weights are pickled."""
    pickled = sorted(each.name for each in Path(name).glob("pytorch_model*.bin")) if Path(name).is_dir() else []
    if isinstance(error, OSError) and (pickled or "with `safetensors`" in str(error)):
        files = pickled[0] if pickled else "pytorch_model.bin"
        return (
            f"its weights are pickled ({files}), and reading them could run code; take a revision with safetensors, or "
            "convert them once, where you trust them, by AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return " ".join(str(error).split())[:300]


def _text_part(network: PreTrainedModel) -> PreTrainedModel:
    """The language model in a model that also sees or hears: its own class, around the same weights.

    A model of nothing but text, or one whose text part transformers has no class for, is returned as it is.
    """
    config = network.config.get_text_config()
    if config is network.config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return network
    with torch.device("meta"):
        text_part = AutoModelForCausalLM.from_config(config)
    decoder = text_part.get_decoder()
    if decoder is not text_part.base_model or type(decoder) is not type(network.get_decoder()):
        return network
    # Its own set_decoder would only replace the decoder's decoder, which is nothing.
    setattr(text_part, text_part.base_model_prefix, network.get_decoder())
    text_part.set_output_embeddings(network.get_output_embeddings())
    text_part.generation_config = network.generation_config
    return text_part


def _check_weights(name: str, network: PreTrainedModel, text_part: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise `ModelError` for weights of the text part that are missing, and for weights that belong nowhere."""
    kept = {id(weight) for weight in text_part.state_dict(keep_vars=True).values()}
    others = {key for key, weight in network.state_dict(keep_vars=True).items() if id(weight) not in kept}
    problems = {
        "missing": [key for key in map(str, info["missing_keys"]) if key not in others],
        "of another shape": [str(key) for key in info["mismatched_keys"]],
        "unexpected": [key for key in map(str, info["unexpected_keys"]) if not _OTHER_PARTS.search(key)],
    }
    told = [f"{len(keys)} {kind} ({_several(sorted(keys))})" for kind, keys in problems.items() if keys]
    if told:
        raise ModelError(f"the weights of '{name}' do not fit its configuration: {'; '.join(told)}")


def _several(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer as its files describe it.

    A directory that declares a plain fast tokenizer is loaded as one: AutoTokenizer would go by the model type next to
    it and, for some, silently rebuild a different pre-tokenizer.
    """
    declaration = Path(name) / "tokenizer_config.json"
    if declaration.is_file():
        declared = json.loads(declaration.read_text(encoding="utf-8")).get("tokenizer_class")
        if declared in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(name)
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
