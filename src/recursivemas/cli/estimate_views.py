"""What a recipe will take and what it will read, as tables and sentences for the terminal.

Knows estimates and previews; knows nothing of how they are made.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from recursivemas.training.datasets import Counts
from recursivemas.training.estimate import Estimate
from recursivemas.training.preview import NUM_SAMPLES, Preview, RenderedSample
from recursivemas.training.recipe import Recipe


def tables(found: Estimate) -> Iterator[Table]:
    """Agents, links and memory."""
    yield _models(found)
    yield _agents(found)
    yield _links(found)
    yield _memory(found)


def _models(found: Estimate) -> Table:
    table = _table("agents", ["model", "family"])
    for each in found.roles:
        table.add_row(each.role, each.model, each.sizes.model_type)
    return table


def _agents(found: Estimate) -> Table:
    table = _table("sizes", [], ["width", "layers", "vocabulary", "parameters", "prompt"])
    for each in found.roles:
        sizes = each.sizes
        parameters = f"{sizes.num_parameters:,}" if each.shares is None else f"those of {each.shares}"
        numbers = (sizes.hidden_size, sizes.num_layers, sizes.vocab_size)
        table.add_row(each.role, *(f"{number:,}" for number in numbers), parameters, f"{found.prompts[each.role]:,}")
    table.caption = (
        f"parameters: {found.agent_parameters:,} in all, frozen. prompt: tokens of the longest,\n"
        f"with {found.num_latent_steps} latents a slot, if a question has {found.lengths['question']} and a reply "
        f"{found.lengths['reply']}\n(--set lengths.question=..., lengths.reply=...)"
    )
    return table


def _links(found: Estimate) -> Table:
    table = _table("links", ["kind"], ["from", "to", "parameters", "outer loop"])
    for each in found.links:
        sizes = (f"{each.source_size:,}", f"{each.target_size:,}")
        trained = "trained" if each.is_trained else "as before"
        table.add_row(each.link, each.kind, *sizes, f"{each.parameters:,}", trained)
    inner, outer = found.link_parameters["inner"], found.link_parameters["outer"]
    table.caption = f"inner {inner:,}, outer {outer:,}: {found.trained_share:.2%} of all parameters"
    return table


def _memory(found: Estimate) -> Table:
    memory = found.memory
    table = _table("memory (estimated, on one device)", [], ["GB"])
    parts = {
        f"agents, {found.dtype}": memory.agents,
        "links, float32": memory.links,
        "stage inner: pairs, optimizer": memory.inner,
        "stage alignment: pairs, optimizer": memory.alignment,
        "stage outer: activations, prompts, logits": memory.outer,
        "stage outer: gradients, optimizer": memory.optimizer,
    }
    for name, size in parts.items():
        if size:
            table.add_row(name, gigabytes(size))
    table.add_section()
    table.add_row("peak", gigabytes(memory.peak))
    return table


def say(found: Estimate, recipe: Recipe) -> Iterator[str]:
    """What the tables leave open."""
    outer = recipe.outer
    rounds = f"{found.num_rounds} round{'s' * (found.num_rounds > 1)}"
    together = min(outer.micro_batch_size or outer.batch_size, outer.batch_size)
    at_once = f"{together} of {outer.batch_size} questions at a time"
    yield f"outer loop: {rounds}, {found.num_latent_steps} latent steps, {at_once}"
    if recipe.data is not None:
        yield f"data sets: {', '.join(map(str, recipe.data.sources))}"
    yield f"disk: {gigabytes(found.disk)} GB; to download: {gigabytes(found.download)} GB"
    for role in found.too_long:
        yield f"the prompt of the {role}, with its thoughts or a reply, is longer than its model reads"
    if not outer.recompute and found.memory.outer > found.memory.agents:
        yield "activations of all turns are kept: --set outer.recompute=true keeps those of one"
    if together > 1 and found.memory.outer > found.memory.agents:
        yield "fewer questions at a time (--set outer.micro_batch_size=1) take less memory, for the same result"


_BARS = " ▁▂▃▄▅▆▇█"


def lengths_table(found: Preview) -> Table:
    """How long the texts are, each with its histogram."""
    numbers = ["median", "95%", "max", "too long"]
    table = _table("tokens", ["role", "text"], numbers)
    table.add_column("histogram", no_wrap=True)
    last = max((bound for each in found.lengths for bound in each.histogram), default=0)
    for each in found.lengths:
        histogram = each.histogram
        # Rounded up: what there is of, however little, is seen.
        bars = "".join(_BARS[-(-8 * number // max(histogram.values()))] for number in histogram.values())
        quantiles = (f"{number:,}" for number in (each.quantile(0.5), each.quantile(0.95), max(each.lengths)))
        too_long = "" if each.room is None else f"{each.too_long:,} > {each.room:,}" if each.too_long else "none"
        table.add_row(each.stage, each.role, each.text, *quantiles, too_long, bars)
    table.caption = (
        f"of up to {NUM_SAMPLES:,} samples. histogram: one bar each for up to 16, 32, ... {last:,} tokens.\n"
        "outer: with latents in every slot. too long: more than the context, or data.max_length"
    )
    return table


def say_preview(found: Preview) -> Iterator[str]:
    """Numbers of questions, and what was left out."""
    if found.questions:
        yield "questions: " + ", ".join(f"{number:,} for {split}" for split, number in found.questions.items())
    for name, counts in found.left_out.items():
        yield f"{name}: {counts}"


def say_counts(report: Mapping[str, Any]) -> Iterator[str]:
    """Of a training's report on its data: what became of samples, where any were left out or cut."""
    for name, counts in report.get("samples", {}).items():
        if counts["empty"] or counts["too_long"] or counts["truncated"]:
            yield f"{name}: {Counts(**counts)}"


def sample_text(sample: RenderedSample) -> Text:
    """A sample as its model reads it: slots in brackets, what a loss is taken from between » and «."""
    latents = sum(piece.num_tokens for piece in sample.pieces if piece.kind == "latents")
    first = sample.num_tokens - sample.num_supervised
    supervised = f"supervised: {first + 1:,} to {sample.num_tokens:,}" if sample.num_supervised else "none supervised"
    text = Text()
    text.append(f"{sample.role}, stage {sample.stage}, round {sample.round}", style="bold")
    text.append(f": {sample.num_tokens:,} positions" + f", {latents:,} of them latents" * bool(latents))
    text.append(f"; {supervised}\n")
    for piece in sample.pieces:
        if piece.kind in ("message", "latents"):
            content = f"{piece.num_tokens} latents" if piece.kind == "latents" else piece.text
            text.append(f"[{piece.sender}: {content}]", style="cyan")
        elif piece.kind == "target":
            text.append(f"»{piece.text}", style="green")
        elif piece.kind == "end":
            text.append(f"{piece.text}«", style="green")
        else:
            text.append(piece.text)
    return text


def gigabytes(size: int) -> str:
    """Bytes as gigabytes (1e9), with about three digits that count."""
    value = size / 1e9
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return "<0.01" if 0 < value < 0.01 else f"{value:,.{digits}f}"


def _table(first: str, names: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption_justify="left")
    table.caption_style = "dim"
    for name in (first, *names):
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
