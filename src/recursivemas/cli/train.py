"""`recursivemas train`: train the links of a system by a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer
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


@reported
def train(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The recipe.")],
    *,
    stage: Annotated[str, typer.Option(help="all, or any of inner,alignment separated by commas.")] = "all",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting (may be repeated).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --set seed=N.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train the links of a system; its language models stay as they are, bit by bit.

    Stopped at any time (Ctrl-C, or killed), the same command goes on where it was. In the end OUTPUT/system is a
    system like any other: `recursivemas eval OUTPUT/system --task ward`.

    [bold]Example:[/bold] recursivemas train recipes/ward.yaml --stage inner,alignment --set output=runs/mine
    """
    from recursivemas.config import override, parse, read_yaml
    from recursivemas.system import RecursiveSystem
    from recursivemas.training.loop import RunDirectory
    from recursivemas.training.recipe import Recipe, fresh_links, parse_stages
    from recursivemas.training.recipe import train as train_links
    from recursivemas.worlds import load_world

    changes = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    settings = parse(Recipe, override(read_yaml(recipe), changes), where=str(recipe))
    stages = parse_stages(stage)
    world = load_world(settings.world.name, settings.world.seed)
    # Links are trained in float32, through agents in float32: half precision would be rounded away.
    base = RecursiveSystem.from_pretrained(settings.system, device=device, dtype="float32")
    run = RunDirectory(Path(settings.output), settings.model_dump(mode="json"))
    system = fresh_links(base, settings)
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int, figures: dict[str, float]) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, note="")
            bar.update(tasks[name], completed=done, note=f"loss {figures['loss']:.4f}")

        reports = train_links(
            system,
            settings,
            lambda role, number: world.role_samples("train", number, settings.seed, role=role),
            stages=stages,
            run=run,
            progress=show,
        )
    system.training = {
        **provenance(),
        "seed": settings.seed,
        "world": settings.world.model_dump(),
        "recipe": settings.model_dump(mode="json", exclude={"system", "output"}),
        "stages": reports,
        "base": base.training.get("base", base.training),
    }
    place = Path(settings.output) / "system"
    system.save_pretrained(place, dtype=settings.save_dtype, overwrite=True)
    if as_json:
        print_json({"system": str(place), "stages": reports})
        return
    out.print(_table(reports))
    out.print(f"system written to {place}")
    err.print(f"[dim]next: recursivemas eval {place} --task {settings.world.name}[/dim]", highlight=False)


def _table(reports: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Losses (eq. 5: one minus cosine; alignment: relative squared distance)", title_justify="left")
    for column in ("stage", "pairs", "before", "after"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, report in reports.items():
        before = report.get("loss_before", report.get("loss_solved", float("nan")))
        table.add_row(stage, f"{report['pairs']:.0f}", f"{before:.4f}", f"{report['loss_after']:.4f}")
    return table
