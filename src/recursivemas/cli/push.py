"""`recursivemas push`: put a saved system on the Hugging Face hub, with a model card."""

from pathlib import Path
from typing import Annotated

import typer

from recursivemas.cli.terminal import AsJson, SystemArgument, out, print_json, reported


@reported
def push(
    system: SystemArgument,
    *,
    to: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository; it is made if it does not exist.")],
    results: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="An evaluation to tell of on the card (may be repeated).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is for you alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a saved system on the Hugging Face hub, in one commit, with a card that says what it is.

    Agents that come from the hub are named, others go along with their weights. The card is made of the system's own
    record and of what `recursivemas eval` has found; a README.md that was changed by hand goes as it is.

    [bold]Example:[/bold] recursivemas push runs/ward/system --to me/ward --results runs/eval/ward
    """
    from recursivemas.checkpoint import find_system
    from recursivemas.publishing import push as push_system
    from recursivemas.publishing import read_report

    reports = [read_report(place) for place in results or []]
    address = push_system(find_system(system), to, private=private, reports=reports)
    if as_json:
        print_json({"address": address})
        return
    out.print(f"pushed to {address}", highlight=False)
