"""Usage, the one meter, and Trace, the record of what was passed on.

What is counted, for each question, by agent and round:

    prompt_tokens      text tokens of the prompts that were read, whether or not a cache spared reading some again
    latent_steps       latent thoughts; each is a forward pass of one position, like a token
    generated_tokens   tokens decoded as text, by whoever decoded them, end-of-reply tokens included
    retry_tokens       tokens decoded again because an answer could not be used
    tool_calls         calls of tools that were answered, errors and refusals included
    tool_tokens        tokens of their results, which are read and not generated
    positions          positions that went through a model; a position that is read again counts again, pads do not
    seconds            by phase: prefill, latent, link, decode; synchronised with the device

Questions run in batches: the seconds of a question are those of its batch divided by the size of the batch. In the
same way roles that share a model and act side by side share the seconds in which they think and write as one batch.

A trace of level `summary` holds norms and nearest tokens of every message; `full` holds the tensors too, so that the
run can be replayed from any message. Tensors that were written to disk are read back when they are asked for.

Knows roles and rounds as names and numbers; knows nothing of models or systems.
"""

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recursivemas.errors import CheckpointError, ConfigError, InputError, OutputError, unknown_name

PHASES = ("prefill", "latent", "link", "decode")
COUNTS = (
    "prompt_tokens",
    "latent_steps",
    "generated_tokens",
    "retry_tokens",
    "tool_calls",
    "tool_tokens",
    "positions",
)
LEVELS = ("off", "summary", "full")


@dataclass
class TurnUsage:
    """What one role used in one round, for one question."""

    round: int
    role: str
    prompt_tokens: int = 0
    latent_steps: int = 0
    generated_tokens: int = 0
    retry_tokens: int = 0
    tool_calls: int = 0
    tool_tokens: int = 0
    positions: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


@dataclass
class Usage:
    """What one question used: counts and seconds (see the top of this file), in total or by turn."""

    turns: list[TurnUsage]
    batch_size: int = 1
    """Questions that were answered together; the seconds are those of the batch divided by it."""
    peak_memory_bytes: int = 0
    """On a GPU the most memory allocated during the batch; on a CPU the most the process ever held."""

    def total(self, count: str) -> int:
        """The sum of a count over all turns."""
        if count not in COUNTS:
            raise ConfigError(unknown_name("count", count, COUNTS))
        return sum(getattr(turn, count) for turn in self.turns)

    @property
    def prompt_tokens(self) -> int:
        """Text tokens of all prompts."""
        return self.total("prompt_tokens")

    @property
    def latent_steps(self) -> int:
        """Latent thoughts of all agents."""
        return self.total("latent_steps")

    @property
    def generated_tokens(self) -> int:
        """Tokens decoded as text by all agents."""
        return self.total("generated_tokens")

    @property
    def positions(self) -> int:
        """Positions that went through a model."""
        return self.total("positions")

    @property
    def seconds(self) -> float:
        """Seconds in all phases."""
        return sum(sum(turn.seconds.values()) for turn in self.turns)

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of each phase, over all turns."""
        return {phase: sum(turn.seconds[phase] for turn in self.turns) for phase in PHASES}

    def to_dict(self) -> dict[str, Any]:
        """Totals and turns as plain data."""
        totals = {count: self.total(count) for count in COUNTS}
        return {**totals, "seconds": self.seconds, "seconds_by_phase": self.seconds_by_phase(), **asdict(self)}


class Meter:
    """Collects the usage of a batch while it runs."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self._device = device
        self._counts: dict[tuple[int, str], dict[str, list[int]]] = {}
        self._seconds: dict[tuple[int, str], dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def count(self, round: int, role: str, **counts: Sequence[int] | int) -> None:
        """Add counts to a turn; a number stands for every question, a list has one for each."""
        turn = self._counts.setdefault((round, role), {name: [0] * self.batch_size for name in COUNTS})
        for name, value in counts.items():
            values = [value] * self.batch_size if isinstance(value, int) else value
            turn[name] = [old + new for old, new in zip(turn[name], values, strict=True)]

    @contextmanager
    def phase(self, round: int, roles: str | Sequence[str], phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase of a turn; roles that worked as one batch have equal shares in it."""
        several = [roles] if isinstance(roles, str) else roles
        start = self._now()
        try:
            yield
        finally:
            seconds = self._now() - start
            for role in several:
                self._seconds[round, role][phase] += seconds / len(several)

    def usages(self) -> list[Usage]:
        """The usage of every question of the batch."""
        memory = self._peak_memory()
        return [
            Usage(
                [
                    TurnUsage(
                        round,
                        role,
                        **{name: values[row] for name, values in counts.items()},
                        seconds={
                            phase: seconds / self.batch_size for phase, seconds in self._seconds[round, role].items()
                        },
                    )
                    for (round, role), counts in self._counts.items()
                ],
                self.batch_size,
                memory,
            )
            for row in range(self.batch_size)
        ]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class TracedMessage:
    """One message, as it reached one reader."""

    round: int
    source: str
    target: str
    text: str | None = None
    """What was written, on a text channel."""
    norms: list[float] | None = None
    """Norm of each latent over the mean norm of the reader's token embeddings: 1.0 is as loud as a word."""
    nearest: list[list[tuple[str, float]]] | None = None
    """For each latent the reader's tokens with the nearest embeddings, with their cosines. A hint, not a reading."""
    latents: Tensor | Callable[[], Tensor] | None = field(default=None, repr=False)

    def tensor(self) -> Tensor | None:
        """The latents, shape (latent step, hidden size of the reader), or None."""
        if callable(self.latents) and not isinstance(self.latents, Tensor):
            return self.latents()
        return self.latents


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, as it stands in a text that was written with tools."""

    tool: str
    argument: str
    """What stood between its tags."""
    result: str
    """What was read in answer, without the tags around it."""
    position: int
    """Tokens of the text before the result, the call included."""
    num_tokens: int
    """Tokens of the result, the tags around it included."""
    seconds: float = 0.0
    """By the clock, from when the tool began."""
    error: str | None = None
    """Why there is no result: the tool failed, or was not called; the text is told so too."""
    round: int = 0
    role: str = ""


@dataclass
class Trace:
    """What happened to one question: settings, every message in order, the answer."""

    level: str
    question: str
    settings: dict[str, Any]
    messages: list[TracedMessage] = field(default_factory=list)
    answer: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    """Every call of a tool, in order."""

    def find(self, round: int, source: str, target: str) -> TracedMessage:
        """The message of one edge and round. Raises `InputError` if the run had none."""
        for message in self.messages:
            if (message.round, message.source, message.target) == (round, source, target):
                return message
        known = ", ".join(f"round {each.round} {each.source}->{each.target}" for each in self.messages) or "none"
        raise InputError(f"the trace has no message {source}->{target} in round {round} (it has: {known})")

    def message(self, round: int, source: str, target: str) -> Tensor:
        """Latents of one message, shape (latent step, hidden size of the reader). Needs a trace of level `full`."""
        latents = self.find(round, source, target).tensor()
        if latents is None:
            raise InputError(
                f"the trace holds no latents for {source}->{target} in round {round}; run with trace='full' and a "
                "channel that carries latents"
            )
        return latents

    def __repr__(self) -> str:
        shown = {name: self.settings[name] for name in ("channel", "num_rounds", "num_latent_steps")}
        return f"Trace(level={self.level!r}, messages={len(self.messages)}, {shown})"


def check_trace_dir(directory: Path, level: str) -> None:
    """Refuse, before anything is computed, a directory that holds a trace, or a level with nothing to write."""
    if level == "off":
        raise ConfigError("a directory for the trace was given, but the trace is off; ask for summary or full")
    if any(directory.glob("batch-*.json")):
        raise OutputError(f"{directory} holds a trace, which exists already; give another directory")


def save_traces(directory: Path, traces: Sequence[Trace], *, batch: int = 0) -> list[Trace]:
    """Write a batch of traces as one JSON file and one safetensors file; return them with their tensors on disk.

    Raises `OutputError` if the files cannot be written, or are there already.
    """
    names = directory / f"batch-{batch:05d}.json", directory / f"batch-{batch:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    records = []
    for index, trace in enumerate(traces):
        record = {**trace.__dict__, "messages": [], "calls": [asdict(call) for call in trace.calls]}
        for message in trace.messages:
            latents = message.tensor()
            key = f"{index}/{message.round}/{message.source}->{message.target}"
            if latents is not None:
                tensors[key] = latents.detach().cpu().contiguous().clone()
            entry = {name: value for name, value in message.__dict__.items() if name != "latents"}
            record["messages"].append({**entry, "tensor": key if latents is not None else None})
        records.append(record)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if names[0].exists():
            raise OutputError(f"{names[0]} exists already; give another directory for the trace")
        save_file(tensors, names[1])
        draft = names[0].with_suffix(".draft")
        draft.write_text(json.dumps({"format_version": 1, "traces": records}, indent=1), encoding="utf-8")
        draft.replace(names[0])
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the trace to {directory}: {error}") from None
    return _read_batch(names[0])


def load_traces(directory: Path) -> list[Trace]:
    """All traces of a directory, in order; tensors are read when asked for. Raises `CheckpointError`."""
    files = sorted(Path(directory).glob("batch-*.json"))
    if not files:
        raise CheckpointError(f"there is no trace in {directory} (expected batch-*.json, as written by --trace)")
    return [trace for file in files for trace in _read_batch(file)]


def _read_batch(file: Path) -> list[Trace]:
    def read(key: str) -> Tensor:
        try:
            with safe_open(file.with_suffix(".safetensors"), framework="pt") as tensors:
                return tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {key} from {file.with_suffix('.safetensors')}: {error}") from None

    def reader(key: str | None) -> Callable[[], Tensor] | None:
        return None if key is None else lambda: read(key)

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format_version"] != 1:
            raise CheckpointError(f"{file} has format {content['format_version']}, this version reads 1")
        records = content["traces"]
        traces = []
        for record in records:
            messages = [_read_message(entry, reader(entry.pop("tensor"))) for entry in record.pop("messages")]
            calls = [ToolCall(**entry) for entry in record.pop("calls", [])]
            traces.append(Trace(**record, messages=messages, calls=calls))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a trace that this version can read: {error!r}") from None
    return traces


def _read_message(entry: dict[str, Any], latents: Callable[[], Tensor] | None) -> TracedMessage:
    """A message as it was written; JSON knows no tuples."""
    if entry["nearest"] is not None:
        entry["nearest"] = [[(token, cosine) for token, cosine in each] for each in entry["nearest"]]
    return TracedMessage(**entry, latents=latents)
