"""`recursivemas bench`: what a latent step, a round, a hand-off in text cost, beside the least that they could.

Knows the terminal and what a benchmark gives back; knows nothing of how anything is measured.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status
from rich.table import Table
from rich.text import Text

from recursivemas.cli.terminal import (
    AsJson,
    BatchSize,
    Compile,
    Device,
    Dtype,
    Seed,
    err,
    out,
    print_json,
    provenance,
    reported,
)
from recursivemas.errors import ConfigError, InputError, OutputError, unknown_name

if TYPE_CHECKING:
    from recursivemas.bench.sections import Section
    from recursivemas.bench.suite import Effort

REPLAYS = ("table2",)


@reported
def bench(
    system: Annotated[
        str | None,
        typer.Argument(
            metavar="[SYSTEM]", help="A bundled system (ward), a directory, or a repository; with --replay: which one."
        ),
    ] = None,
    *,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxLAYERS", help="In place of a system: random weights, 256x6, or a model's name (see below)."
        ),
    ] = None,
    replay: Annotated[
        str | None, typer.Option(metavar="table2", help="Replay the paper's table 2 with random weights.")
    ] = None,
    scale: Annotated[
        int, typer.Option(help="With --replay: models so many times narrower and shallower, lengths so many shorter.")
    ] = 16,
    benchmarks: Annotated[
        str | None, typer.Option(help="With --replay: columns of the table, separated by commas. Default: all six.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Sections, separated by commas: latent-step, generate, uncached, rounds, ...")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Of each single step (default 9, whole runs a third); with --replay: of each run."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few repeats, to see that it works.")] = False,
    compile: Compile = False,
    batch_size: BatchSize = 8,
    output: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write the result there, as JSON.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure what things cost, each beside what it is to be compared with, in turns and within one run.

    Sections: latent-step (beside a bare forward of the body), generate (prefill, decoding and link beside
    transformers' generate), uncached (beside thinking without a cache), rounds, latent-steps, agents, batch (whole
    runs in latents and in text), prefixes (kept or read anew, for both), memory, floor (beside the time that reading
    the weights takes; by default on a GPU alone). --random takes the bundled configurations of the paper's models,
    too, like Qwen/Qwen3-1.7B. --replay takes sequential_light or sequential_scaled as its system, or both.

    [bold]Example:[/bold] recursivemas bench ward

    [bold]Example:[/bold] recursivemas bench --random 256x6 --out runs/bench.json

    [bold]Example:[/bold] recursivemas bench --replay table2 --scale 16
    """
    from recursivemas.bench.machine import describe_machine, in_words
    from recursivemas.bench.sections import goals_section
    from recursivemas.bench.suite import Effort
    from recursivemas.loading import choose_device

    _check(system, random, replay, scale, only, benchmarks, repeats, batch_size)
    if output is not None and output.is_dir():
        raise OutputError(f"{output} is a directory; give the name of a file")
    machine = describe_machine(choose_device(device))
    with _telling() as tell:
        if replay is not None:
            chosen = {"seed": seed, "device": device, "dtype": dtype, "compiled": compile}
            columns = benchmarks.split(",") if benchmarks else None
            sections = _replay(system, columns, scale, batch_size, repeats, quick, tell, chosen)
        else:
            effort = Effort(repeats or (3 if quick else 9), quick, compile)
            sections = _measure(system, random, only, effort, tell, (seed, device, dtype))
    goals = goals_section(sections)
    found = {
        **provenance(),
        "machine": machine,
        "subject": system or random or replay,
        "sections": [section.to_plain() for section in sections],
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
        return
    for section in [*sections, *([goals] if goals.rows else [])]:
        out.print(_table(section))
        out.print()
    out.print(in_words(machine), highlight=False, markup=False)


def _check(
    system: str | None,
    random: str | None,
    replay: str | None,
    scale: int,
    only: str | None,
    benchmarks: str | None,
    repeats: int | None,
    batch_size: int,
) -> None:
    """Refuse what does not go together, before anything is made."""
    if replay is not None and replay not in REPLAYS:
        raise ConfigError(unknown_name("table to replay", replay, REPLAYS))
    if replay is not None and (random is not None or only is not None):
        raise InputError("--replay makes its own models and sections: leave --random and --only out")
    if replay is None and benchmarks is not None:
        raise InputError("--benchmarks are columns of the paper's table; give --replay table2 as well")
    if replay is None and (system is None) == (random is None):
        raise InputError("say what is to be measured: a system, like ward, or --random 256x6, or --replay table2")
    for name, value in (("--scale", scale), ("--repeats", repeats), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")


def _replay(
    system: str | None,
    columns: Sequence[str] | None,
    scale: int,
    batch_size: int,
    repeats: int | None,
    quick: bool,
    tell: Any,
    chosen: dict[str, Any],
) -> list["Section"]:
    from recursivemas.bench.replay import replay
    from recursivemas.bench.table2 import BENCHMARKS, SYSTEMS

    if system is not None and system not in SYSTEMS:
        raise ConfigError(unknown_name("system of table 2", system, SYSTEMS))
    for name in columns or ():
        if name not in BENCHMARKS:
            raise ConfigError(unknown_name("column of table 2", name, BENCHMARKS))
    return replay(
        [system] if system is not None else SYSTEMS,
        columns or BENCHMARKS[: 1 if quick else None],
        scale=scale,
        batch_size=batch_size,
        repeats=repeats or (1 if quick else 3),
        progress=tell,
        **chosen,
    )


def _measure(
    name: str | None,
    random: str | None,
    only: str | None,
    effort: "Effort",
    tell: Any,
    chosen: tuple[int, str | None, str | None],
) -> list["Section"]:
    from recursivemas.bench.subjects import configuration, parse_names
    from recursivemas.bench.suite import SECTIONS, Subject, Suite, sections_for
    from recursivemas.loading import choose_device
    from recursivemas.system import RecursiveSystem

    seed, device, dtype = chosen
    names = parse_names(only, SECTIONS, "section") if only else sections_for(choose_device(device))
    if random is not None:
        subject = Subject.random(configuration(random), seed, device, dtype)
    else:
        subject = Subject.of(RecursiveSystem.from_pretrained(name or "", device=device, dtype=dtype), seed)
    return list(Suite(subject, effort, tell).measure(names))


@contextmanager
def _telling() -> Iterator[Any]:
    """What is being measured, on stderr: in one line that changes, where that is a terminal."""
    if not err.is_terminal:
        yield None
        return
    with Status("measuring", console=err) as status:
        yield lambda what: status.update(what)


def _table(section: "Section") -> Table:
    table = Table(title=section.title, title_justify="left", caption=Text(section.caption), caption_justify="left")
    numeric = {
        column for column in section.columns if not all(isinstance(row.get(column, ""), str) for row in section.rows)
    }
    for column in section.columns:
        table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    for cells in section.cells():
        table.add_row(*map(Text, cells))
    return table
