"""`recursivemas world`: generate a small world, and train the agents that live in it."""

from pathlib import Path
from typing import Annotated

import typer

from recursivemas.cli.terminal import AsJson, err, out, print_json, progress_bar, provenance, reported
from recursivemas.errors import ConfigError, unknown_name

ACTIONS = ("build", "sample")


@reported
def world(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ward, relay, panel, consult, consult-blind or desk.")],
    action: Annotated[str, typer.Argument(metavar="build|sample", help="Make it, or look at a few questions.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="build: where it goes. Default: runs/worlds/NAME.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="sample: how many.")] = 3,
    split: Annotated[str, typer.Option(help="sample: train, validation or test.")] = "test",
    workers: Annotated[int, typer.Option(min=1, help="build: agents trained at the same time.")] = 2,
    seed: Annotated[
        int, typer.Option(help="The world. Another seed is another world: same words, other meanings.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Build a world from its seed: texts, splits, and the agents trained on them.

    DIR/system is then a system with untrained links, for a recipe: recursivemas train recipes/ward.yaml --set
    system=DIR/system. Stopped at any time, the same command goes on where it was.

    [bold]Example:[/bold] recursivemas world ward build --out runs/worlds/ward

    [bold]Example:[/bold] recursivemas world ward sample -n 2
    """
    from recursivemas.worlds import load_world

    if action not in ACTIONS:
        raise ConfigError(unknown_name("action", action, ACTIONS))
    if split not in ("train", "validation", "test"):
        raise ConfigError(unknown_name("split", split, ("train", "validation", "test")))
    chosen = load_world(name, seed)
    if action == "sample":
        samples = chosen.samples(split, n, seed)
        if as_json:
            print_json([sample.__dict__ for sample in samples])
        for sample in [] if as_json else samples:
            print(sample.question)
            err.print(f"[dim]{sample.target}[/dim]", highlight=False)
        return
    from recursivemas.worlds.building import build

    place = output or Path("runs/worlds") / name
    with progress_bar() as bar:
        tasks = {}

        def show(role: str, done: int, total: int, figures: dict[str, float]) -> None:
            if role not in tasks:
                tasks[role] = bar.add_task(f"agent {role}", total=total, note="")
            bar.update(tasks[role], completed=done, note=f"loss {figures['loss']:.4f}")

        summary = build(chosen, place, workers=workers, provenance=provenance(), progress=show)
    if as_json:
        print_json(summary)
        return
    for role, figures in summary["agents"].items():
        out.print(f"{role}: {figures['parameters']:,} parameters, loss {figures['loss']:.4f}", highlight=False)
    out.print(f"world written to {place}: texts and splits in data/, agents with untrained links in system/")
