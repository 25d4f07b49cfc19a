"""Planning: from the options that a run is given, and the settings of its system, to what is done.

Knows the parts of a system; knows nothing of questions or batches.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

from recursivemas.agents import Message
from recursivemas.batches import check_whole
from recursivemas.channels import choose_channels
from recursivemas.decoding import SamplingParams, Writer
from recursivemas.errors import ConfigError, unknown_name
from recursivemas.interventions import INTERVENTIONS, Applied, Intervention, Zero
from recursivemas.parts import Parts
from recursivemas.recursion import TOOLS_AFTER, Plan
from recursivemas.tools import Tool, Toolbox, ToolLimits, as_toolbox
from recursivemas.trace import LEVELS

LONG_QUESTIONS = ("refuse", "truncate")

Value = TypeVar("Value")
Tools = Sequence[Tool | str] | Tool | str | Toolbox
Intervene = Callable[[Message, str, int], Message]


class RunOptions(TypedDict, total=False):
    """How questions are answered. What is left out, or None, is as the system's settings say, or as told here."""

    num_rounds: int | None
    num_latent_steps: int | None
    channel: str | Mapping[str, str] | None
    """One name for all edges, or one for each (`*` for all others)."""
    sampling: SamplingParams | None
    variant: str | None
    """A wording of the prompts."""
    instructions: str
    """What goes where the prompts say `{instructions}`."""
    keys: Iterable[str] | None
    """Names of the questions for sampling, one for each; by default their text."""
    num_samples: int
    """Answers sampled from the same latents, which are thought once; the first is what would be sampled alone. (1)"""
    tools: Tools | None
    """What the answering role can call while it writes (see tools/)."""
    tools_after: str
    """In which rounds: in its answer (last), or in `every` round. (last)"""
    tool_limits: ToolLimits | None
    writer: Writer | None
    """Writes the answers in place of the answering role's model: a vLLM server (see remote.py)."""
    intervene: str | Intervention | Intervene | None
    """shuffled, shuffled:ROLE, zero, or a function (see interventions.py)."""
    seed: int
    """Orders what is shuffled. (0)"""
    on_long_question: str | None
    """refuse a question that does not fit into a context, or truncate it on its left (see context.py)."""
    trace: str | bool
    """off, summary or full; True means full. (summary)"""
    trace_dir: Path | None
    """Where traces are written, batch by batch; their tensors are then read from there when asked for."""
    reuse_prefixes: bool
    """Whether a prompt up to its first slot is read once for all rounds, or in every turn, to compare. (True)"""
    done: Container[int]
    """Places (from 0) of questions that are answered already: a batch of nothing else is left out. ()"""
    batch_size: int
    """Questions answered together at most. (64)"""
    max_batch_tokens: int | None
    """Positions that the longest context of a batch takes at most, times its rows: it bounds the memory of the caches.
    A question that is longer is answered alone. By default there is no bound but the memory, by halving."""


def make_plan(parts: Parts, options: RunOptions) -> Plan:
    """What is done in a run; what the options leave out is as the settings of the system say. Raises `ConfigError`."""
    for name in options:
        if name not in RunOptions.__annotations__:
            raise ConfigError(unknown_name("option of a run", name, RunOptions.__annotations__))
    rounds = _given(options.get("num_rounds"), parts.settings.num_rounds)
    steps = _given(options.get("num_latent_steps"), parts.settings.num_latent_steps)
    check_whole("num_rounds", rounds, 1, 1000)
    check_whole("num_latent_steps", steps, 0, 100_000)
    variant = _given(options.get("variant"), parts.settings.variant)
    parts.prompts.variant(variant)
    tools_after = options.get("tools_after", "last")
    if tools_after not in TOOLS_AFTER:
        raise ConfigError(unknown_name("time for tools", tools_after, TOOLS_AFTER))
    toolbox = as_toolbox(options.get("tools"), options.get("tool_limits"))
    writer = options.get("writer")
    if writer is not None:
        if toolbox.tools:
            raise ConfigError("tools are called while an answer is written here: give either tools or a writer")
        writer.check(parts.agents[parts.pattern.answers].model)
    return Plan(
        int(rounds),
        int(steps),
        choose_channels(_given(options.get("channel"), parts.settings.channel), parts.edge_names),
        options.get("sampling") or SamplingParams(max_new_tokens=parts.settings.max_new_tokens),
        variant,
        options.get("instructions") or "",
        reuse_prefixes=options.get("reuse_prefixes", True),
        tools=toolbox if toolbox.tools else None,
        tools_after=tools_after,
        writer=writer,
    )


def _given(option: Value | None, setting: Value) -> Value:
    return setting if option is None else option


def truncates(parts: Parts, on_long_question: str | None) -> bool:
    """Whether a question that does not fit into a context is cut, and not refused. Raises `ConfigError`."""
    wanted = _given(on_long_question, parts.settings.on_long_question)
    if wanted not in LONG_QUESTIONS:
        raise ConfigError(unknown_name("way with long questions", wanted, LONG_QUESTIONS))
    return wanted == "truncate"


def as_intervention(given: str | Intervention | Intervene | None) -> Intervention:
    """An intervention from its name, or from a plain function. Raises `ConfigError`."""
    if given is None:
        return Intervention()
    if isinstance(given, Intervention):
        return given
    if callable(given):
        return Applied(given)
    if given != "zero":
        raise ConfigError(unknown_name("intervention", given, INTERVENTIONS))
    return Zero()


def trace_level(trace: str | bool) -> str:
    """The name of a trace level; True is full, False off. Raises `ConfigError`."""
    level = ("off", "full")[trace] if isinstance(trace, bool) else trace
    if level not in LEVELS:
        raise ConfigError(unknown_name("trace level", level, LEVELS))
    return level
