"""`recursivemas pattern`: find what is wrong with a pattern of one's own (`check`), and look at one (`show`)."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recursivemas.cli.terminal import AsJson, complain, err, out, print_json, reported
from recursivemas.errors import CheckpointError, ConfigError, unknown_name

if TYPE_CHECKING:
    from recursivemas.patterns import Pattern

app = typer.Typer(help="Check a pattern, with its prompts, or draw it.", no_args_is_help=True)


@app.command("check")
@reported
def check(
    pattern: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or the name of a bundled pattern.")],
    *,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="The prompts that go with it; or the name of a bundled set.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with a pattern, and with the prompts for it: file, line, what it is, what to do.

    Exit code 1 if anything is.

    [bold]Example:[/bold] recursivemas pattern check team.yaml --prompts words.yaml
    """
    from recursivemas import checking
    from recursivemas.patterns import Pattern

    findings = checking.check(pattern, prompts)
    if as_json:
        print_json({"pattern": pattern, "prompts": prompts, "faults": [asdict(each) for each in findings]})
    for finding in [] if as_json else findings:
        print(finding)
    if findings:
        complain(
            f"{len(findings)} fault{'s' * (len(findings) > 1)} in {' and '.join(filter(None, [pattern, prompts]))}"
        )
        raise typer.Exit(1)
    if not as_json:
        found = Pattern.load(pattern)
        size = f"{len(found.roles)} roles in {len(found.stages)} stages, {len(found.edges)} edges"
        with_prompts = " and the prompts fit" if prompts else "; with --prompts FILE its prompts are checked, too"
        out.print(f"the pattern '{found.name}' is sound: {size}{with_prompts}", highlight=False, markup=False)


@app.command("show")
@reported
def show(
    pattern: Annotated[
        str, typer.Argument(metavar="NAME|FILE|SYSTEM", help="A bundled pattern, a YAML file, or a saved system.")
    ],
    *,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture to an SVG file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw who reads whom, in this round or one round later, and who answers.

    Of a saved system it also says what plays each role, and what each edge carries.

    [bold]Example:[/bold] recursivemas pattern show mixture --svg mixture.svg
    """
    from recursivemas.drawing import svg as pictures
    from recursivemas.drawing import text

    found, players, channels = _find(pattern)
    if svg is not None:
        svg.write_text(pictures.draw(found, players=players, channels=channels), encoding="utf-8")
        err.print(f"[dim]written to {svg}[/dim]", highlight=False)
    if as_json:
        edges = [
            {
                "edge": str(edge),
                "source": edge.source,
                "target": edge.target,
                "feedback": found.is_feedback(edge),
                "channel": channels.get(str(edge)),
            }
            for edge in found.graph
        ]
        stages = [list(stage) for stage in found.stages]
        print_json({"name": found.name, "stages": stages, "edges": edges, "answers": found.answers, "agents": players})
        return
    print(text.draw(found, players=players, channels=channels))


def _find(given: str) -> "tuple[Pattern, dict[str, str], dict[str, str]]":
    """A pattern; and of a system what plays each of its roles, and what each edge carries."""
    from recursivemas.patterns import BUNDLED, Pattern

    bundled = [file.stem for file in BUNDLED.glob("*.yaml")]
    if given in bundled or Path(given).suffix in (".yaml", ".yml"):
        return Pattern.load(given), {}, {}
    from recursivemas.channels import choose_channels
    from recursivemas.checkpoint import bundled_systems, find_system, read_manifest

    try:
        manifest = read_manifest(find_system(given))
    except CheckpointError:
        if "/" in given or Path(given).exists():
            raise
        raise ConfigError(unknown_name("pattern or system", given, [*bundled, *bundled_systems()])) from None
    players = {
        role: f"{record.model_type}, {record.hidden_size} wide" if record.local else record.model
        for role, record in manifest.agents.items()
    }
    channels = choose_channels(manifest.settings.channel, [str(edge) for edge in manifest.pattern.graph])
    return manifest.pattern, players, {edge: channel.name for edge, channel in channels.items()}
