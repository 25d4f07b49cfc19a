"""LanguageModel: one frozen causal language model, with its tokenizer and chat template.

Any causal language model of transformers serves, by its public interface alone: no family is named here. Several
agents may share one LanguageModel, and then share its weights. Together with cache.py this is the only place in the
core that imports model classes of transformers. Knows nothing of roles, links or rounds.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from recursivemas.cache import LatentCache
from recursivemas.errors import ConfigError, InputError, ModelError, unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_EMBEDDING_CHUNK = 16384


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
        Raises `ModelError` if the model has no chat template, or does not compute its logits from its last states.
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
    ) -> "LanguageModel":
        """Load a model by its Hugging Face name or from a directory.

        Raises `ModelError` if it cannot be found, needs remote code (never run), or has missing or unexpected weights
        (a silently random layer is worse than none).
        """
        name = str(name_or_path)
        place = choose_device(device)
        try:
            network, info = AutoModelForCausalLM.from_pretrained(
                name,
                revision=revision,
                dtype=choose_dtype(dtype, place),
                attn_implementation=attn_implementation,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = _load_tokenizer(name, revision)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"cannot load the language model '{name}': {reason}") from None
        wanted = ("missing_keys", "mismatched_keys", "unexpected_keys")
        problems = {key: sorted(map(str, info[key])) for key in wanted if info.get(key)}
        if problems:
            raise ModelError(f"the weights of '{name}' do not fit its configuration: {json.dumps(problems)[:300]}")
        local = Path(name).is_dir()
        found = revision or getattr(network.config, "_commit_hash", None)
        return cls(network.to(place), tokenizer, source=None if local else name, revision=None if local else found)

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

    def save_pretrained(self, directory: Path, *, dtype: str | None = None) -> None:
        """Write weights (in another precision if asked) and tokenizer in the format of transformers."""
        network = self.network
        if dtype is not None:
            network = copy.deepcopy(network).to(choose_dtype(dtype, self.device))
        network.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _check(self) -> None:
        name = self.source or self.config.model_type
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"'{name}' has no chat template, so it is not known how to address it; take its chat (instruct) "
                "version, or set `chat_template` in its tokenizer_config.json"
            )
        if not self.stop_token_ids:
            raise ModelError(f"'{name}' names no end-of-sequence token, so its replies would never end")
        self.new_cache(1)
        probe = torch.tensor([[min(self.stop_token_ids)] * 2], device=self.device)
        with torch.no_grad():
            expected = self.network(input_ids=probe, use_cache=False).logits[0]
            computed = self.logits(self.states(probe)[0])
        if not torch.allclose(expected.float(), computed.float(), rtol=1e-2, atol=1e-2):
            raise ModelError(
                f"'{name}' changes its logits after its output head (a soft cap or a scale), which is not supported"
            )

    # What it is

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
        """The longest context it was made for, if its configuration says so."""
        return getattr(self.config, "max_position_embeddings", None)

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

    def _reply_ending(self) -> int | None:
        mark = "reply"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        rendered = self._render(messages, add_generation_prompt=False)
        after = self.encode(rendered.rpartition(mark)[2])
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
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # Text

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Messages through the chat template, as one string that ends where the reply begins."""
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
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
        return cache.step(self.decoder, inputs_embeds, attention_mask)

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
        return output.last_hidden_state

    def states_of_embeds(
        self, inputs_embeds: Float[Tensor, "batch position hidden_size"]
    ) -> Float[Tensor, "batch position hidden_size"]:
        """Last hidden states of embeddings read without a cache or padding: the slow way that fast ways must equal."""
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(inputs_embeds.shape[:2])
        return self.decoder(inputs_embeds=inputs_embeds, position_ids=positions, use_cache=False).last_hidden_state

    def logits(self, states: Float[Tensor, "*batch hidden_size"]) -> Float[Tensor, "*batch vocab_size"]:
        """Scores of the next token, from last hidden states."""
        scores: Tensor = self.network.get_output_embeddings()(states)
        return scores

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
