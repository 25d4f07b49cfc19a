"""`recursivemas export`: one of our systems, written in the authors' released layout."""

from pathlib import Path
from typing import Annotated

import typer

from recursivemas.cli.terminal import AsJson, SystemArgument, err, out, print_json, reported


@reported
def export(
    system: SystemArgument,
    *,
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where it goes; a new directory.")],
    task: Annotated[
        str, typer.Option(help="The task that the links are for, where the layout has links for each: math or code.")
    ] = "math",
    link_dtype: Annotated[
        str, typer.Option(help="Precision of the links on disk: float32, or bfloat16 as the authors'.")
    ] = "float32",
    dtype: Annotated[str | None, typer.Option(help="Precision of the agents on disk. Default: float32.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a system in the authors' released layout: a directory for each role, one for the outer links.

    Agents are written whole, as that layout wants it. A pattern or a link that it has no form for is refused with the
    reason. The layout has no place for prompts; they go into DIR/prompts.yaml.

    [bold]Example:[/bold] recursivemas export runs/light --out runs/light-released --link-dtype bfloat16
    """
    from recursivemas.system import RecursiveSystem

    loaded = RecursiveSystem.from_pretrained(system, device="cpu", dtype=dtype)
    loaded.save_release(output, task=task, dtype=link_dtype)
    written = sorted(each.name for each in output.iterdir() if each.is_dir())
    if as_json:
        print_json({"release": str(output), "pattern": loaded.pattern.name, "folders": written})
        return
    out.print(f"written to {output}: {', '.join(written)}", highlight=False)
    err.print(
        f"[dim]the prompts are in {output / 'prompts.yaml'}: recursivemas import {output} --prompts "
        f"{output / 'prompts.yaml'} --out DIR[/dim]",
        highlight=False,
    )
