"""Networks and tokenizers from where they are kept: by a Hugging Face name, from a directory, or with random weights.

Any causal language model of transformers is loaded, by its public interface alone: no family is named here. Of a model
that also sees or hears, the text part is taken. Weights that are missing or belong nowhere are refused, no code of a
checkpoint is run and nothing is unpickled. Beside that: what can be asked for (device, precision, bits), and what the
configuration of a model says of its size. Knows nothing of what a network computes, nor of caches.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
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

from recursivemas.errors import ConfigError, ModelError, unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ATTENTION = ("eager", "sdpa", "flash_attention_2")
"""Implementations of attention that can be asked for. A name of the hub would be code that is downloaded and run."""
QUANTIZATIONS = ("8bit", "4bit")
"""Ways to hold the weights of a frozen model in fewer bits: int8 (LLM.int8) or 4-bit NormalFloat, by bitsandbytes."""
AGENT_OPTIONS = ("model", "revision", "dtype", "device", "attn_implementation", "device_map", "quantization")

_OTHER_PARTS = re.compile(
    r"(^|\.)(mtp|visual|vision_\w+|vision|image_\w+|audio_\w+|multi_modal_\w+|embed_vision|embed_audio)\."
)
"""Weights of a checkpoint that are no part of its language model: what sees and hears, and what guesses ahead."""


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


class Loaded(NamedTuple):
    """A network as its files describe it, and what it reads words with."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str | None
    """The commit of the Hugging Face hub that it is; None for a directory."""


def load_network(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: str | None = None,
) -> Loaded:
    """A causal language model, or the text part of one that also sees; see `LanguageModel.from_pretrained`.

    Raises `ModelError` if it cannot be found, needs remote code or unpickling, or has missing or unexpected weights;
    `ConfigError` for a setting that is unknown or cannot be had here.
    """
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
    is_placed = device_map is not None or getattr(network, "quantization_method", None) is not None
    found = None if Path(name).is_dir() else revision or getattr(network.config, "_commit_hash", None)
    return Loaded(text_part if is_placed else text_part.to(place), tokenizer, found)


def load_without_weights(name: str, *, revision: str | None = None) -> Loaded:
    """A network whose weights are nowhere, and the tokenizer. Raises `ModelError` if these cannot be had."""
    try:
        config = _read_config(name, revision).get_text_config()
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        return Loaded(network, _load_tokenizer(name, revision), revision)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"the tokenizer of '{name}' cannot be had: {_reason(error, name)}") from None


def random_network(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A network with random weights: `config` names its `model_type` and sizes, the vocabulary is the tokenizer's."""
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
    return network.to(place, torch.float32 if isinstance(precision, str) else precision)


def options_by_role(options: Mapping[str, Mapping[str, Any]], roles: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The options of every role: its own, over those for all (`*`). Raises `ConfigError` for unknown names."""
    known = list(roles)
    for role, chosen in options.items():
        if role not in (*known, "*"):
            raise ConfigError("options of agents: " + unknown_name("role", role, [*known, "*"]))
        for name in chosen:
            if name not in AGENT_OPTIONS or name == "model":
                raise ConfigError(f"agent '{role}': " + unknown_name("option", name, AGENT_OPTIONS[1:]))
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
