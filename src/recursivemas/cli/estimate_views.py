"""What a recipe will take, as tables and sentences for the terminal.

Knows estimates; knows nothing of how they are made.
"""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from recursivemas.training.estimate import Estimate
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
        inner = recipe.data.inner
        sets = [inner] if isinstance(inner, str) else list(inner.values())
        yield f"data sets: {', '.join(dict.fromkeys([*sets, recipe.data.outer]))}"
    yield f"disk: {gigabytes(found.disk)} GB; to download: {gigabytes(found.download)} GB"
    for role in found.too_long:
        yield f"the prompt of the {role}, with its thoughts or a reply, is longer than its model reads"
    if not outer.recompute and found.memory.outer > found.memory.agents:
        yield "activations of all turns are kept: --set outer.recompute=true keeps those of one"
    if together > 1 and found.memory.outer > found.memory.agents:
        yield "fewer questions at a time (--set outer.micro_batch_size=1) take less memory, for the same result"


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
