"""`recursivemas train`: train the links of a system by a recipe."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from recursivemas.cli.methods import cost_table, links_meter, settle_links, shown_in, train_by_method
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
    from recursivemas.training.cost import Cost
    from recursivemas.training.loop import RunDirectory
    from recursivemas.training.processes import Processes
    from recursivemas.training.recipe import Recipe
    from recursivemas.training.watch import Finding


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
    method: Annotated[
        str, typer.Option(help="links, or a baseline on the same data: lora, full, text, generalist.")
    ] = "links",
    price_per_hour: Annotated[
        float | None, typer.Option(help="What an hour of a device costs you, for a price in cost.json.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train the links of a system; its language models stay as they are, bit by bit.

    Stopped at any time (Ctrl-C, or killed), the same command goes on where it was, with as many processes as there are
    then. In the end OUTPUT/system is a system like any other: `recursivemas eval OUTPUT/system --task ward`. What it
    has cost is in OUTPUT/cost.json. A baseline (--method) goes to OUTPUT/METHOD.

    [bold]Example:[/bold] recursivemas train recipes/ward.yaml --set output=runs/mine --set outer.lr=5e-4

    [bold]Example:[/bold] recursivemas train recipes/paper/sequential_light.yaml --dry-run

    [bold]Several GPUs:[/bold] torchrun --nproc-per-node 4 -m recursivemas train recipes/ward.yaml
    """
    from recursivemas.config import override, parse, read_yaml
    from recursivemas.training.processes import Processes
    from recursivemas.training.recipe import Recipe, parse_stages

    changes = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    settings = parse(Recipe, override(read_yaml(recipe), changes), where=str(recipe))
    stages = parse_stages(",".join(settings.stages) if stage is None else stage)
    if method != "links":
        train_by_method(method, settings, stage, price_per_hour, device=device, dry_run=dry_run, as_json=as_json)
        return
    if dry_run:
        from recursivemas.cli import dry_run as planned

        planned.tell(settings, stages, as_json=as_json)
        return
    processes = Processes.joined(device)
    # The first alone tells anything, and writes.
    out.quiet = err.quiet = not processes.is_first
    place, reports, cost = _train(settings, stages, processes.device or device, processes, price_per_hour)
    if processes.is_first:
        _tell(settings, place, reports, cost, as_json=as_json)
    processes.leave()


def _train(
    recipe: "Recipe", stages: Sequence[str], device: str | None, processes: "Processes", price_per_hour: float | None
) -> tuple[Path, dict[str, Any], "Cost"]:
    """Train the links of a system by a recipe, and write it; return where it is, what each stage reports, the cost."""
    from recursivemas.errors import NumericsError
    from recursivemas.training.recipe import base_system, check_recipe, starting_system
    from recursivemas.training.recipe import train as train_links
    from recursivemas.worlds.material import check_material, material_of

    with processes.together():
        check_material(recipe)
        base = base_system(recipe, device=device)
        material = material_of(recipe, base.pattern)
        system = starting_system(base, recipe)
        check_recipe(system, recipe, material, stages)
        meter = links_meter(system, recipe, price_per_hour, processes)
        run = _directory(recipe, stages, processes)

    def save(place: Path, reports: dict[str, Any]) -> None:
        system.training = {
            **provenance(),
            "seed": recipe.seed,
            **({} if recipe.world is None else {"world": recipe.world.model_dump()}),
            "recipe": recipe.model_dump(mode="json", exclude={"system", "output"}),
            "stages": reports,
            "cost": meter.cost.to_dict(),
            # Where its links were drawn anew, only the agents come from the base.
            "base": base.training if recipe.links.start == "given" else base.training.get("base", base.training),
        }
        system.save_pretrained(place, dtype=recipe.save_dtype, overwrite=True)

    try:
        with progress_bar(is_shown=processes.is_first) as bar, meter.running():
            shown = meter.watch(shown_in(bar))
            reports = train_links(
                system, recipe, material, stages=stages, run=run, progress=shown, warn=_warn, processes=processes
            )
    except NumericsError as error:
        # The links are the best that were met: they are kept, though the run has failed.
        best = Path(recipe.output) / "best"
        processes.from_first(partial(save, best, {"failed": str(error)}))
        raise NumericsError(f"{error} They were written to {best}") from None
    settle_links(meter, system, processes)
    place = Path(recipe.output) / "system"
    processes.from_first(partial(save, place, reports))
    return place, reports, meter.cost


_OF_THIS_PLACE: dict[str, Any] = {
    "trackers": True,
    "method": True,
    "agent_options": {"__all__": {"device", "device_map"}},
}


def _warn(finding: "Finding") -> None:
    """Say what seems wrong while it is trained."""
    err.print(Text.assemble(("warning: ", "yellow"), f"step {finding.step}: {finding}"))


def _directory(recipe: "Recipe", stages: Sequence[str], processes: "Processes") -> "RunDirectory":
    """The directory of the run, with a note on what it lacks."""
    from recursivemas.training.loop import RunDirectory

    run = RunDirectory(
        Path(recipe.output),
        # Where a run is watched, and on which devices it computes, may change.
        recipe.model_dump(mode="json", exclude=_OF_THIS_PLACE),
        trackers=recipe.trackers,
        is_first=processes.is_first,
    )
    is_aligned = "alignment" in stages or run.has("alignment")
    if "outer" in stages and recipe.links.start == "new" and not is_aligned:
        err.print(
            "[yellow]note:[/yellow] the outer loop starts from links that were never aligned; random links hardly ever "
            "leave chance (--stage all, or --set links.start=given for those of the system)"
        )
    return run


def _tell(recipe: "Recipe", place: Path, reports: dict[str, Any], cost: "Cost", *, as_json: bool) -> None:
    """What training did, what it has cost, and what to do next."""
    from recursivemas.cli.estimate_views import say_counts

    if as_json:
        print_json({"system": str(place), "stages": reports, "cost": cost.to_dict()})
        return
    out.print(_table(reports))
    if "outer" in reports:
        _tell_outer(reports["outer"])
    for line in say_counts(reports.get("data", {})):
        out.print(line, highlight=False, markup=False)
    out.print(cost_table([cost]))
    out.print(f"system written to {place}")
    held_out = None if recipe.data is None else recipe.data.test or recipe.data.validation
    task = "--data FILE.jsonl" if held_out is None else f"--data {held_out.path}"
    if recipe.world is not None:
        task = f"--task {recipe.world.name}"
    err.print(f"[dim]next: recursivemas eval {place} {task}[/dim]", highlight=False)


def _table(reports: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Losses (eq. 5: one minus cosine; alignment: relative squared distance)", title_justify="left")
    for column in ("stage", "pairs", "before", "after"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, report in reports.items():
        if "pairs" in report:
            before = report.get("loss_before", report.get("loss_solved", float("nan")))
            table.add_row(stage, f"{report['pairs']:.0f}", f"{before:.4f}", f"{report['loss_after']:.4f}")
    return table


def _tell_outer(report: dict[str, Any]) -> None:
    """What the outer loop did, in words."""
    scores: dict[str, float] = report["validation"]
    if scores:
        first, best = next(iter(scores.values())), max(scores.values())
        out.print(f"outer loop: validation from {first:.4f} to {best:.4f}, best after step {report['best_step']}")
    if report["warnings"]:
        out.print(f"[yellow]{len(report['warnings'])} warning(s)[/yellow], which are in metrics.jsonl, too")
    if report["stopped"]:
        out.print(f"stopped after step {report['steps']}: {report['stopped']}")
    moved = ", ".join(f"{name} {distance:.3f}" for name, distance in report["moved"].items())
    out.print(f"moved, relative to the link's own norm: {moved}")
    still = [name for name, distance in report["moved"].items() if distance == 0]
    for name in [*still, *(each for each in report["unmoved_tensors"] if each.split("/")[0] not in still)]:
        out.print(f"[yellow]not moved:[/yellow] {name}")
