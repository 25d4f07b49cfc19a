"""`recursivemas import`: a system in the authors' released layout, made one of ours."""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from recursivemas.cli.terminal import AsJson, err, out, print_json, reported
from recursivemas.errors import InputError, OutputError

_DTYPE = "float32, bfloat16 or float16, for local agents that are copied. Default: auto, the precision they are in."


@reported
def import_(
    release: Annotated[
        str,
        typer.Argument(
            metavar="RELEASE",
            help="A directory in the released layout, or a style on the hub: sequential_light, sequential_scaled, "
            "mixture, distillation, deliberation.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where our system goes; a new directory.")],
    task: Annotated[str, typer.Option(help="math or code, where the release has links for each.")] = "math",
    pattern: Annotated[str | None, typer.Option(help="Name or YAML file. Default: found out from the release.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="The words: YAML, role to first, later, always, last, solo.")
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt of all roles.")] = None,
    prompts_from: Annotated[
        Path | None,
        typer.Option(metavar="CLONE", help="Take the words out of your clone of the authors' code; runs that code."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run the code of --prompts-from without asking.")] = False,
    dtype: Annotated[str, typer.Option(help=_DTYPE)] = "auto",
    as_json: AsJson = False,
) -> None:
    """Read a released system and write it in our format: safetensors, one manifest, links in float32.

    Agents from the hub are recorded by name and revision, local ones are copied. What has to be downloaded is said
    before. The links were trained on the authors' words: without --prompts or --prompts-from they get ours.

    [bold]Example:[/bold] recursivemas import sequential_light --out runs/light --prompts-from ../RecursiveMAS
    """
    if prompts is not None and prompts_from is not None:
        raise InputError("--prompts and --prompts-from both give the words; choose one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists already and is not empty; choose another place or remove it first")
    given: Any = prompts
    if prompts_from is not None:
        given = _prompts_of(prompts_from, release, task, pattern, yes)

    from recursivemas.release.reading import ReleaseWarning
    from recursivemas.system import RecursiveSystem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReleaseWarning)  # it is told below, for the command line
        system = RecursiveSystem.from_release(
            release, task, pattern=pattern, prompts=given, system_prompt=system_prompt, dtype=dtype, device="cpu"
        )
    system.save_pretrained(output)
    if as_json:
        print_json({"system": str(output), **_summary(system)})
    else:
        _show(_summary(system))
        out.print(f'system written to {output}: recursivemas run {output} "..."', highlight=False)
    if given is None:
        err.print(
            "[dim]The links were trained on the authors' words, and the prompts are ours: --prompts-from CLONE takes "
            "them from a clone of the authors' code, --prompts FILE from yours.[/dim]",
            highlight=False,
        )


def _prompts_of(clone: Path, release: str, task: str, pattern: str | None, yes: bool) -> Any:
    """The words in a clone, once the user has agreed that its code is run."""
    from recursivemas.release.clone import find_module, prompts_of_clone
    from recursivemas.release.reading import layout_of_release

    module = find_module(clone)
    layout, own = layout_of_release(release, task, pattern)
    if not yes:
        question = (
            f"To take the prompts out of it, {module} and whatever it imports will be run as a program, with all the "
            "rights that you have. Run it?"
        )
        if not _somebody_is_there():
            raise InputError(
                f"--prompts-from runs {module} as a program, with all your rights, and there is nobody to ask; give "
                "--yes if you trust that code"
            )
        if not typer.confirm(question, err=True):
            raise InputError(f"{module} was not run, and nothing was imported")
    return prompts_of_clone(module, layout, own, task)


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()


def _summary(system: Any) -> dict[str, Any]:
    """What was read, as plain data."""

    def link(each: Any) -> dict[str, Any]:
        return {"design": each.config.design, "parameters": sum(one.numel() for one in each.parameters())}

    return {
        "pattern": system.pattern.name,
        "prompts": system.prompts.name,
        "variants": list(system.prompts.variants),
        "agents": {
            role: {
                "model": agent.model.source or "local",
                "model_type": agent.model.config.model_type,
                "hidden_size": agent.model.hidden_size,
                "parameters": agent.model.num_parameters,
                "inner_link": link(agent.inner_link),
            }
            for role, agent in system.agents.items()
        },
        "links": {edge: link(each) for edge, each in system.links.items()},
    }


def _show(summary: dict[str, Any]) -> None:
    """The summary as a table of roles and one of links."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    roles = Table("role", "model", "type", box=SIMPLE_HEAD)
    roles.add_column("width", justify="right")
    roles.add_column("parameters", justify="right")
    for role, agent in summary["agents"].items():
        roles.add_row(role, agent["model"], agent["model_type"], str(agent["hidden_size"]), f"{agent['parameters']:,}")
    links = Table("link", "design", box=SIMPLE_HEAD)
    links.add_column("parameters", justify="right")
    inner = {role: agent["inner_link"] for role, agent in summary["agents"].items()}
    for name, each in {**inner, **summary["links"]}.items():
        links.add_row(name, each["design"], f"{each['parameters']:,}")
    out.print(f"{summary['pattern']}, prompts {summary['prompts']}", highlight=False)
    out.print(roles)
    out.print(links)
