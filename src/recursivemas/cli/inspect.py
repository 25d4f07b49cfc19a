"""`recursivemas inspect`: look inside a system. So far `links`: are its links healthy, and where is something lost?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from recursivemas.cli.terminal import (
    AsJson,
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
from recursivemas.errors import ConfigError, unknown_name

app = typer.Typer(help="Look inside a system: are its links healthy?", no_args_is_help=True)


@app.command("links")
@reported
def links(
    system: SystemArgument,
    *,
    samples: Annotated[int, typer.Option(help="Conversations by the book on which hand-offs are tried.")] = 200,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    rounds: Annotated[
        str | None, typer.Option(help="Rounds of sending, separated by commas. Default: all that the world has.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="The kind of note. Default: the system's.")] = None,
    world: Annotated[
        str | None, typer.Option(help="Whose conversations, a world. Default: the one the system was made for.")
    ] = None,
    world_seed: Annotated[
        int | None, typer.Option(help="Seed of the world. Default: as the system was made for.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write links.json and links.svg.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Find out whether the links of a system are healthy, and what to do about those that are not.

    Every link is looked at by itself: was it ever trained, did its gains move, how loud is it for its reader, in all
    and in each dimension, and do its outputs differ? Where the system's world is known, every hand-off is also tried on
    its own, by the book: the sender reads the right note, and the reader's slot holds in turn the right text, that text
    through the outer link, the sender's latents while it is made to write the text, its latents as in a run, and
    nothing.

    [bold]Example:[/bold] recursivemas inspect links ward --rounds 1,2 --out runs/links
    """
    from recursivemas.audit import hand_off_views, health_views
    from recursivemas.audit.hand_offs import diagnose_edges
    from recursivemas.audit.health import examine_links
    from recursivemas.audit.records import to_plain
    from recursivemas.audit.style import say_advice
    from recursivemas.checkpoint import library_version
    from recursivemas.system import RecursiveSystem

    if split not in ("train", "validation", "test"):
        raise ConfigError(unknown_name("split", split, ("train", "validation", "test")))
    if samples < 2:
        raise ConfigError(f"--samples must be 2 or more, got {samples}: messages of different questions are compared")
    chosen = numbers(rounds, "--rounds") if rounds else None
    loaded = RecursiveSystem.from_pretrained(system, device=device, dtype=dtype)
    place = _world_of(loaded, world, world_seed)
    variant = variant or loaded.settings.variant
    conversations: list[Any] = []
    if place is not None:
        # A world knows its own default.
        kind = {} if variant is None else {"variant": variant}
        conversations = place.conversations(split, samples, seed, **kind)
    with progress_bar() as bar:
        looked_at = bar.add_task("links", total=None, note="")
        health = examine_links(
            loaded, seed=seed, progress=lambda done, total: bar.update(looked_at, completed=done, total=total)
        )
        edges: list[Any] = []
        if conversations:
            tried = bar.add_task("conversations", total=len(conversations), note="")
            edges = diagnose_edges(
                loaded,
                conversations,
                health,
                rounds=chosen,
                progress=lambda done, total: bar.update(tried, completed=done),
            )
    settings = loaded.settings
    advice = list(say_advice([*health, *edges]))
    report: dict[str, Any] = {
        **provenance(),
        "library_version": library_version(),
        "system": settings.name,
        "num_latent_steps": settings.num_latent_steps,
        "message": settings.message,
        "world": None if place is None else {"name": place.name, "seed": place.seed},
        "split": None if place is None else split,
        "seed": seed,
        "variant": conversations[0][0].variant if conversations else variant,
        "n": len(conversations),
        "links": [to_plain(each) for each in health],
        "edges": [to_plain(each) for each in edges],
        "advice": advice,
    }
    if output is not None:
        figures = {"health.svg": health_views.draw(health)}
        _write(output, report, {**figures, "links.svg": hand_off_views.draw(edges)} if edges else figures)
    if as_json:
        print_json(report)
        return
    for table in [*health_views.tables(health), *(hand_off_views.tables(edges) if edges else [])]:
        out.print(table)
        out.print()
    for line in [*health_views.say_verdicts(health), *hand_off_views.say_verdicts(edges)]:
        out.print(line, highlight=False, markup=False)
    for line in advice:
        out.print(f"→ {line}", highlight=False, markup=False)
    if place is None:
        err.print(
            "[dim]the system does not say for which world it was made, so no hand-off was tried; --world NAME says it"
            "[/dim]"
        )


def _world_of(system: Any, name: str | None, seed: int | None) -> Any:
    """The world whose conversations a system can have: the one that is named, or else the one it was made for."""
    from recursivemas.worlds import load_world

    made_for = system.training.get("world", {})
    if name is None:
        if not made_for:
            return None
        name = str(made_for["name"])
    known = made_for.get("seed", 0) if made_for.get("name") == name else 0
    return load_world(name, known if seed is None else seed)


def _write(directory: Path, report: dict[str, Any], figures: dict[str, str]) -> None:
    from recursivemas.training.loop import write_atomically

    directory.mkdir(parents=True, exist_ok=True)
    content = {"links.json": json.dumps(report, indent=2, ensure_ascii=False) + "\n", **figures}
    for name, text in content.items():
        write_atomically(directory / name, text.encode())
    err.print(f"[dim]written to {directory}: {', '.join(content)}[/dim]", highlight=False)
