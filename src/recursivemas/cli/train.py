"""`recursivemas train`: train the links of a system by a recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from recursivemas.cli.terminal import (
    AsJson,
    Device,
    err,
    out,
    print_json,
    progress_bar,
    provenance,
    reported,
)

if TYPE_CHECKING:
    from recursivemas.training.recipe import Recipe


@reported
def train(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The recipe.")],
    *,
    stage: Annotated[
        str | None,
        typer.Option(help="all, or any of inner,alignment,outer separated by commas. Default: the recipe's."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting (may be repeated).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --set seed=N.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it would take: sizes, parameters, memory. Loads no weights."),
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train the links of a system; its language models stay as they are, bit by bit.

    Stopped at any time (Ctrl-C, or killed), the same command goes on where it was. In the end OUTPUT/system is a
    system like any other: `recursivemas eval OUTPUT/system --task ward`.

    [bold]Example:[/bold] recursivemas train recipes/ward.yaml --set output=runs/mine --set outer.lr=5e-4

    [bold]Example:[/bold] recursivemas train recipes/paper/sequential_light.yaml --dry-run
    """
    from recursivemas.config import override, parse, read_yaml
    from recursivemas.errors import NumericsError
    from recursivemas.training.loop import RunDirectory
    from recursivemas.training.recipe import Recipe, base_system, check_recipe, parse_stages, starting_system
    from recursivemas.training.recipe import train as train_links
    from recursivemas.worlds.material import check_material, material_of

    changes = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    settings = parse(Recipe, override(read_yaml(recipe), changes), where=str(recipe))
    stages = parse_stages(",".join(settings.stages) if stage is None else stage)
    if dry_run:
        _tell_estimate(settings, stages, as_json=as_json)
        return
    check_material(settings)
    base = base_system(settings, device=device)
    material = material_of(settings, base.pattern)
    system = starting_system(base, settings)
    check_recipe(system, settings, material, stages)
    run = RunDirectory(Path(settings.output), settings.model_dump(mode="json"), tensorboard=True)
    if "outer" in stages and settings.links.start == "new" and not ("alignment" in stages or run.has("alignment")):
        err.print(
            "[yellow]note:[/yellow] the outer loop starts from links that were never aligned; random links hardly ever "
            "leave chance (--stage all, or --set links.start=given for those of the system)"
        )

    def save(place: Path, reports: dict[str, Any]) -> None:
        system.training = {
            **provenance(),
            "seed": settings.seed,
            **({} if settings.world is None else {"world": settings.world.model_dump()}),
            "recipe": settings.model_dump(mode="json", exclude={"system", "output"}),
            "stages": reports,
            # Where its links were drawn anew, only the agents come from the base.
            "base": base.training if settings.links.start == "given" else base.training.get("base", base.training),
        }
        system.save_pretrained(place, dtype=settings.save_dtype, overwrite=True)

    try:
        with progress_bar() as bar:
            reports = train_links(system, settings, material, stages=stages, run=run, progress=_shown_in(bar))
    except NumericsError as error:
        # The links are the best that were met: they are kept, though the run has failed.
        best = Path(settings.output) / "best"
        save(best, {"failed": str(error)})
        raise NumericsError(f"{error} They were written to {best}") from None
    place = Path(settings.output) / "system"
    save(place, reports)
    if as_json:
        print_json({"system": str(place), "stages": reports})
        return
    out.print(_table(reports))
    if "outer" in reports:
        _tell_outer(reports["outer"])
    out.print(f"system written to {place}")
    task = f"--data {settings.questions.validation}" if settings.questions is not None else ""
    if settings.world is not None:
        task = f"--task {settings.world.name}"
    err.print(f"[dim]next: recursivemas eval {place} {task}[/dim]", highlight=False)


def _tell_estimate(recipe: "Recipe", stages: Sequence[str], *, as_json: bool) -> None:
    """What the recipe takes, as tables or as JSON."""
    from recursivemas.cli.estimate_views import say, tables
    from recursivemas.training.estimate import estimate

    found = estimate(recipe, stages=stages)
    if as_json:
        data = None if recipe.data is None else recipe.data.model_dump()
        print_json({"stages": list(stages), "data": data, **found.to_plain()})
        return
    for table in tables(found):
        out.print(table)
        out.print()
    for line in say(found, recipe):
        out.print(line, highlight=False, markup=False)


def _shown_in(bar: Progress) -> Callable[[str, int, int, dict[str, float]], None]:
    """A line of the progress bar for every stage, with its latest loss and validation."""
    tasks: dict[str, Any] = {}
    notes: dict[str, str] = {}
    scores: dict[str, str] = {}

    def show(name: str, done: int, total: int, figures: dict[str, float]) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=total, note="")
        if "loss" in figures:
            notes[name] = f"loss {figures['loss']:.4f}"
        if "validation" in figures:
            scores[name] = f"  validation {figures['validation']:.4f}"
        bar.update(tasks[name], completed=done, note=notes.get(name, "") + scores.get(name, ""))

    return show


def _table(reports: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Losses (eq. 5: one minus cosine; alignment: relative squared distance)", title_justify="left")
    for column in ("stage", "pairs", "before", "after"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, report in reports.items():
        if stage != "outer":
            before = report.get("loss_before", report.get("loss_solved", float("nan")))
            table.add_row(stage, f"{report['pairs']:.0f}", f"{before:.4f}", f"{report['loss_after']:.4f}")
    return table


def _tell_outer(report: dict[str, Any]) -> None:
    """What the outer loop did, in words."""
    scores: dict[str, float] = report["validation"]
    if scores:
        first, best = next(iter(scores.values())), max(scores.values())
        out.print(f"outer loop: validation from {first:.4f} to {best:.4f}, best after step {report['best_step']}")
    if report["stopped"]:
        out.print(f"stopped after step {report['steps']}: {report['stopped']}")
    moved = ", ".join(f"{name} {distance:.3f}" for name, distance in report["moved"].items())
    out.print(f"moved, relative to the link's own norm: {moved}")
    still = [name for name, distance in report["moved"].items() if distance == 0]
    for name in [*still, *(each for each in report["unmoved_tensors"] if each.split("/")[0] not in still)]:
        out.print(f"[yellow]not moved:[/yellow] {name}")
