"""The parts of a saved system, and the manifest that explains them.

    system.json                  pattern, prompts, settings, and for every part what it is and a hash of its weights
    links/inner-planner/         config.json + model.safetensors, for the inner link of each role
    links/planner-to-critic/     the same for each edge
    agents/planner/              weights and tokenizer, where they are not to be had by name

A part that is missing, corrupt, or not the one that was saved is refused by name. Nothing is ever unpickled. This
file reads and writes parts; putting them together is the system's business.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recursivemas.channels import CHANNELS
from recursivemas.config import Config, parse
from recursivemas.errors import CheckpointError, ConfigError, ModelError, OutputError, PatternError, unknown_name
from recursivemas.links import LinkConfig, RecursiveLink
from recursivemas.loading import choose_dtype
from recursivemas.models import LanguageModel
from recursivemas.patterns import Edge, Pattern
from recursivemas.prompts import PromptSet

BUNDLED = Path(__file__).parent / "bundled" / "systems"
FORMAT_VERSION = 1
MANIFEST = "system.json"
SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Files that make up the parts of a system; any other (a README, say) may come and go."""


class SystemSettings(Config):
    """How a system runs unless told otherwise."""

    name: str = "system"
    num_rounds: int = Field(default=3, ge=1)
    """n: how often the pattern is gone through."""
    num_latent_steps: int = Field(default=16, ge=0)
    """m: latent thoughts of each turn."""
    channel: str | dict[str, str] = "latent"
    """One of latent, text, both and none; or one for each edge, and with `*` for all others."""
    message: Literal["inner+outer", "outer"] = "inner+outer"
    """What travels in latents: R_out(R_in(H)), as in the release, or R_out(H), as printed in the paper."""
    max_new_tokens: int = Field(default=512, ge=1)
    variant: str | None = None
    """The wording of the prompts, where the prompt set has several; by default its first."""
    on_long_question: Literal["refuse", "truncate"] = "refuse"
    """What is done with a question that is too long for a context: refuse it, or cut off its beginning, and say so."""

    @field_validator("channel")
    @classmethod
    def _check_channel(cls, channel: str | dict[str, str]) -> str | dict[str, str]:
        for name in [channel] if isinstance(channel, str) else channel.values():
            if name not in CHANNELS:
                raise ValueError(unknown_name("channel", name, CHANNELS))
        return channel


class AgentRecord(Config):
    """What is known of the model of one role."""

    model: str = Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
    """A Hugging Face name, or a directory below the manifest's."""
    local: bool
    model_type: str
    hidden_size: int
    vocab_size: int
    revision: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    """How a model that is to be had by name is held; the files of a local one say so themselves."""
    sha256: str | None = None
    """Hash of all files of a local model."""
    tokenizer_sha256: str
    chat_template_sha256: str


class LinkRecord(Config):
    """Where a link is, and the hash of its files."""

    folder: str
    sha256: str


class Manifest(Config):
    """The content of system.json."""

    format_version: int
    library_version: str
    settings: SystemSettings
    pattern: Pattern
    prompts: PromptSet
    agents: dict[str, AgentRecord]
    links: dict[str, LinkRecord]
    """By role for inner links, by edge for outer ones."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How the parts were made: command, seed, commit, data, metrics."""


@lru_cache(maxsize=1)
def library_version() -> str:
    """The installed version of this package."""
    return version("recursivemas")


def find_system(name_or_path: str | Path) -> Path:
    """The directory of a bundled system, a directory on disk, or a Hugging Face repository (downloaded).

    Raises `CheckpointError` with the nearest bundled name.
    """
    path = Path(name_or_path)
    if (path / MANIFEST).is_file():
        return path
    name = str(name_or_path)
    if (BUNDLED / name / MANIFEST).is_file():
        return BUNDLED / name
    if path.is_dir():
        raise CheckpointError(f"the directory {path} holds no {MANIFEST}, so it is not a saved system")
    if name.count("/") == 1 and not path.is_absolute() and not name.startswith("."):
        return _download(name)
    raise CheckpointError(
        unknown_name("system", name, bundled_systems()) + "; a directory, or a Hugging Face repository, serves as well"
    )


def bundled_systems() -> list[str]:
    """Names of the systems that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{MANIFEST}"))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot download the system '{name}': {reason}") from None


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a saved system. Raises `CheckpointError`."""
    file = directory / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format_version"] not in range(1, FORMAT_VERSION + 1):
            raise CheckpointError(
                f"{file} has format {content['format_version']}, this version reads 1 to {FORMAT_VERSION}; upgrade "
                "recursivemas"
            )
        return parse(Manifest, content, where=str(file))
    except (OSError, ValueError, KeyError, TypeError, ConfigError, PatternError) as error:
        raise CheckpointError(f"{file} cannot be read as the manifest of a system: {error}") from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write system.json."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    draft = directory / f"{MANIFEST}.draft"
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(directory / MANIFEST)


def link_folder(name: str) -> str:
    """Where the link of a role or edge is kept, relative to the manifest."""
    if "->" not in name:
        return f"links/inner-{name}"
    edge = Edge.parse(name)
    return f"links/{edge.source}-to-{edge.target}"


def write_link(folder: Path, link: RecursiveLink, *, dtype: str | None = None) -> str:
    """Write one link; return the hash of its files. `dtype` is the precision on disk (default: its own)."""
    folder.mkdir(parents=True, exist_ok=True)
    precision = choose_dtype(dtype or str(link.w1.weight.dtype).removeprefix("torch."), link.w1.weight.device)
    weights = {name: tensor.to(precision).cpu().contiguous() for name, tensor in link.state_dict().items()}
    weights["scale"] = link.scale.cpu()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(link.to_dict(), indent=2) + "\n", encoding="utf-8")
    return folder_sha256(folder)


def read_link(folder: Path, expected_sha256: str | None = None) -> RecursiveLink:
    """Read one link in float32. Raises `CheckpointError` if it is missing, corrupt, or not the one that was saved."""
    verify_sha256(folder, expected_sha256)
    try:
        config = LinkConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read as a link's configuration: {error}") from None
    weights = folder / "model.safetensors"
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in RecursiveLink(config).state_dict().items()}
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} is missing or corrupt ({error}); restore it from where it came") from None
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = different[0]
        raise CheckpointError(
            f"{weights} does not fit its config.json: {name} has the shape {found.get(name)}, expected "
            f"{expected.get(name)}"
        )
    link = RecursiveLink(config)
    link.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return link.requires_grad_(False).eval()


def folder_sha256(folder: Path) -> str:
    """Hash of the files of a part, names and contents. Raises `CheckpointError` if one cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in sorted(each for each in folder.rglob("*") if each.suffix in SUFFIXES):
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def verify_sha256(folder: Path, expected: str | None) -> None:
    """Refuse a folder that is not, bit by bit, the one that was saved."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; restore it, or save the system again")
    if expected is not None and folder_sha256(folder) != expected:
        raise CheckpointError(
            f"{folder} is not what was saved with this system (its hash differs): a file in it is corrupt, truncated, "
            "or was swapped with another; restore it, or save the system again"
        )


def inside(directory: Path, relative: str) -> Path:
    """A folder below a directory. Raises `CheckpointError` for one that is elsewhere."""
    place = directory / relative
    if not place.resolve().is_relative_to(directory.resolve()):
        raise CheckpointError(f"{directory}/{MANIFEST} names {relative}, which is outside the directory of the system")
    return place


def describe_tokenizer(model: LanguageModel) -> dict[str, str]:
    """Hashes of a model's vocabulary and chat template."""
    vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items()), ensure_ascii=False)
    return {
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest(),
    }


def describe_agent(directory: Path, model: LanguageModel, place: str) -> AgentRecord:
    """The record of a model that was saved at `place` below `directory`, or is to be had under that name."""
    local = model.source is None
    return AgentRecord(
        model=place,
        local=local,
        model_type=model.config.model_type,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        revision=model.revision,
        quantization=None if local else model.quantization,
        sha256=folder_sha256(directory / place) if local else None,
        **describe_tokenizer(model),
    )


def load_agent_model(directory: Path, role: str, record: AgentRecord, **options: Any) -> LanguageModel:
    """The model of a saved agent. Raises `CheckpointError` unless it is the one the links were made for."""
    try:
        if record.local:
            place = inside(directory, record.model)
            verify_sha256(place, record.sha256)
            model = LanguageModel.from_pretrained(place, **options)
        else:
            options = {"quantization": record.quantization, **options}
            model = LanguageModel.from_pretrained(record.model, revision=record.revision, **options)
    except ModelError as error:
        raise CheckpointError(f"the agent of the {role} cannot be loaded: {error}") from None
    found = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size, **describe_tokenizer(model)}
    for name, value in found.items():
        if value != getattr(record, name):
            raise CheckpointError(
                f"the model '{record.model}' of the {role} is not the one this system was made with: its {name} is "
                f"{value}, expected {getattr(record, name)}"
            )
    return model


@contextmanager
def atomic_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory that appears under its name only once it is complete.

    Raises `OutputError` if something stands there already (and may not be replaced), or on a full disk.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and not overwrite and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} exists already and is not empty; choose another place or remove it first")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {directory}: {error.strerror}") from None
    try:
        draft.chmod(0o755)
        yield draft
        _swap(draft, directory)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {directory}: {error}; what was there is untouched") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, directory: Path) -> None:
    """Put a finished directory in its place; what was there goes last, and comes back if the place cannot be taken."""
    if not directory.exists():
        draft.rename(directory)
        return
    old = draft.with_name(draft.name + "-old")
    directory.rename(old)
    try:
        draft.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
