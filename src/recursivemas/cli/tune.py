"""`recursivemas tune`: find out how many rounds and latent steps a system should run with, on validation questions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from recursivemas.cli.eval import file_task, world_task
from recursivemas.cli.terminal import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Seed,
    SystemArgument,
    err,
    numbers,
    out,
    print_json,
    progress_bar,
    provenance,
    reported,
)
from recursivemas.errors import ConfigError, InputError

if TYPE_CHECKING:
    from recursivemas.evaluation.tuning import Tuning


@reported
def tune(
    system: SystemArgument,
    *,
    task: Annotated[str | None, typer.Option(help="A world, whose validation questions are answered.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Validation questions of your own; never those you test on."),
    ] = None,
    rounds: Annotated[str, typer.Option(help="Numbers of rounds to try, separated by commas.")] = "1,2,3",
    latent_steps: Annotated[
        str | None, typer.Option(help="Numbers of latent steps to try. Default: half, once and twice the system's own.")
    ] = None,
    max_ms: Annotated[float | None, typer.Option(help="Budget: milliseconds of a question in its batch.")] = None,
    max_tokens: Annotated[
        float | None, typer.Option(help="Budget: generated tokens and latent steps of a question together.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Number of questions. Default: 1000, or the file.")] = None,
    question_column: Annotated[str, typer.Option(help="With --data: the column of the question.")] = "question",
    target_column: Annotated[str, typer.Option(help="With --data: the column of the answer.")] = "answer",
    scorer: Annotated[str, typer.Option(help="With --data: exact or numeric.")] = "exact",
    instructions: Annotated[
        str, typer.Option(help="With --data: what the answering agent is told about the form.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write the tuned system there; by default its own file is changed."),
    ] = None,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write what was chosen, or only tell it.")] = True,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Choose rounds and latent steps on validation questions, under a budget of time or tokens.

    Prints every setting and the frontier: those that nothing cheaper equals. Takes the cheapest setting within the
    budget that is as good as the best one, but for one standard error, and writes it into the system's settings. The
    test split is never looked at. Stopped, the same command goes on.

    [bold]Example:[/bold] recursivemas tune runs/ward/system --task ward --rounds 1,2,3,4 --max-ms 2

    [bold]Example:[/bold] recursivemas tune ward --task ward --out runs/ward-tuned
    """
    from recursivemas.checkpoint import BUNDLED, find_system
    from recursivemas.evaluation.tuning import Budget
    from recursivemas.evaluation.tuning import tune as try_settings
    from recursivemas.system import RecursiveSystem

    if (task is None) == (data is None):
        raise InputError("say whose validation questions decide: either --task NAME or --data FILE.jsonl")
    if max_ms is not None and max_tokens is not None:
        raise ConfigError("one budget at a time: --max-ms or --max-tokens")
    if n is not None and n < 2:
        raise ConfigError(f"-n must be 2 or more, got {n}")
    place = find_system(system)
    if write and output is None and not (Path(system).is_dir() and place != BUNDLED / system):
        raise InputError(f"'{system}' is not a directory of yours, so nothing can be written into it; give --out DIR")
    budget = Budget("milliseconds", max_ms) if max_tokens is None else Budget("tokens", max_tokens)
    loaded = RecursiveSystem.from_pretrained(system, device=device, dtype=dtype)
    questions = (
        world_task(loaded, task, split="validation", n=1000 if n is None else n, seed=seed)
        if task is not None
        else file_task(data or Path(), question_column, target_column, None, scorer, instructions, n, seed)
    )
    own = loaded.settings.num_latent_steps
    tried = numbers(latent_steps, "--latent-steps") if latent_steps else sorted({max(own // 2, 1), own, 2 * own} - {0})
    journal = (output or Path("runs/tune") / loaded.settings.name).with_name(
        f"{(output or Path(loaded.settings.name)).name}-answers.jsonl"
    )
    with progress_bar() as bar:
        shown = bar.add_task("trying", total=None, note="")
        found = try_settings(
            loaded,
            questions,
            rounds=numbers(rounds, "--rounds"),
            latent_steps=tried,
            budget=budget,
            batch_size=batch_size,
            seed=seed,
            journal=journal,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )
    journal.unlink(missing_ok=True)
    written = _write(loaded, place, found, output, questions.name) if write else None
    if as_json:
        print_json({**found.to_dict(), "written": None if written is None else str(written)})
        return
    out.print(_table(found))
    chosen = found.chosen
    out.print(
        f"chosen: {chosen.name} ({chosen.accuracy.value:.3f} ± {chosen.accuracy.stderr:.3f}, n = {chosen.accuracy.n}, "
        f"{chosen.milliseconds:.2f} ms, {chosen.tokens:.0f} tokens and latent steps)",
        highlight=False,
    )
    if written is not None:
        err.print(f"[dim]written to {written}; judge it on other questions: recursivemas eval {written}[/dim]")


def _write(system: Any, place: Path, found: "Tuning", output: Path | None, task: str) -> Path:
    """The system with the chosen settings: a copy, or its own file changed."""
    from recursivemas.checkpoint import read_manifest, write_manifest

    chosen = {"num_rounds": found.chosen.num_rounds, "num_latent_steps": found.chosen.num_latent_steps}
    record = {**provenance(), "task": task, "split": "validation", **found.to_dict()}
    if output is not None:
        system.settings = system.settings.model_copy(update=chosen)
        system.training = {**system.training, "tuned": record}
        system.save_pretrained(output)
        return output
    manifest = read_manifest(place)
    settings = manifest.settings.model_copy(update=chosen)
    training = {**manifest.training, "tuned": record}
    write_manifest(place, manifest.model_copy(update={"settings": settings, "training": training}))
    return place


def _table(found: "Tuning") -> Table:
    table = Table(title="validation questions", title_justify="left")
    for column in ("rounds", "latent steps", "accuracy", "ms", "tokens + steps", "frontier"):
        table.add_column(column, justify="right")
    for point in found.points:
        mark = "chosen" if point is found.chosen else "•" if point in found.frontier else ""
        table.add_row(
            str(point.num_rounds),
            str(point.num_latent_steps),
            f"{point.accuracy.value:.3f} ± {point.accuracy.stderr:.3f}",
            f"{point.milliseconds:.2f}",
            f"{point.tokens:.0f}",
            Text(mark),
        )
    limit = "no budget" if found.budget.most is None else f"at most {found.budget.most:g} {found.budget.unit}"
    table.caption = Text(f"n = {found.chosen.accuracy.n}; {limit}; • nothing cheaper is as good")
    return table
