"""`recursivemas data`: make data to train on. `build` lets a teacher write what each role should."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from recursivemas.cli.terminal import AsJson, Device, complain, err, out, print_json, progress_bar, reported

if TYPE_CHECKING:
    from recursivemas.training.targets import Build, Report

app = typer.Typer(help="Make data to train on.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Make data to train on."""


@app.command("build")
@reported
def build(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Questions, teacher, output.")],
    *,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting (may be repeated).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many requests it takes, and show one of each role.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="The same as --set teacher.seed=N.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Let a teacher write what each role should, for questions with answers, in the words of the prompt set.

    The teacher is a model that is loaded, or one behind an OpenAI-compatible endpoint, whose key is taken from the
    environment. Every reply is kept as soon as it is there: stopped or failed, the same command goes on where it was,
    and nothing is paid twice. Exit code 1 as long as a row is not complete.

    [bold]Example:[/bold] recursivemas data build build.yaml --dry-run

    [bold]Example:[/bold] recursivemas data build build.yaml --set budget=5
    """
    from recursivemas.config import override, parse, read_yaml
    from recursivemas.training.targets import Build, BuildSettings, build_targets
    from recursivemas.training.teacher import teacher_of

    changes = [*(set_ or []), *([f"teacher.seed={seed}"] if seed is not None else [])]
    settings = parse(BuildSettings, override(read_yaml(config), changes), where=str(config))
    planned = Build.of(settings)
    if dry_run:
        _tell_plan(planned, as_json=as_json)
        return
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def show(role: str, done: int, total: int, figures: dict[str, float]) -> None:
            if role not in tasks:
                tasks[role] = bar.add_task(role, total=total, note="")
            bar.update(tasks[role], completed=done, note=f"cost {figures['cost']:.4g}")

        report = build_targets(planned, lambda: teacher_of(settings.teacher, device=device), show)
    if as_json:
        print_json({"output": str(settings.output), **report.to_plain()})
    else:
        _tell(report, settings.output)
    if report.complete < report.rows:
        complain(_why(report))
        raise typer.Exit(1)


def _tell_plan(planned: "Build", *, as_json: bool) -> None:
    """How much is to be asked, and the first request of each role."""
    planned.start()
    row = planned.rows[0]
    # What a role before has yet to write is shown as the place where it will stand.
    told = {role: planned.texts[0].get(role, f"[what the {role} writes]") for role in planned.pattern.roles}
    shown = {role: list(planned.conversation(role, row, told)) for role in planned.roles}
    if as_json:
        print_json({"rows": len(planned.rows), "requests": len(planned.rows) * len(planned.roles), "first": shown})
        return
    number = len(planned.rows) * len(planned.roles)
    out.print(f"{number:,} requests: {len(planned.rows):,} rows, for {', '.join(planned.roles)}", highlight=False)
    for role, conversation in shown.items():
        out.print(f"\n[bold]{role}[/bold]", highlight=False)
        for message in conversation:
            out.print(f"{message['role']}: {message['content']}", highlight=False, markup=False)


def _tell(report: "Report", output: Path) -> None:
    """What was written, and what it took."""
    table = Table(title="Replies", title_justify="left")
    for column in ("role", "asked now", "from before", "failed", "cut", "empty"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, counts in report.by_role.items():
        table.add_row(role, *(f"{number:,}" for number in counts.values()))
    out.print(table)
    for name, spent in (("now", report.now), ("in all", report.in_all)):
        at_least = "at least " if spent.uncounted else ""
        tokens = f"{spent.prompt_tokens:,} prompt and {spent.completion_tokens:,} completion tokens"
        out.print(
            f"{name}: {spent.replies:,} replies, {at_least}{tokens}, cost {at_least}{spent.cost:.4g}", highlight=False
        )
    out.print(f"{report.complete:,} of {report.rows:,} rows are complete, in {output}", highlight=False)
    if report.complete == report.rows:
        err.print(f"[dim]next: recursivemas train CONFIG.yaml --set data={output} --dry-run[/dim]", highlight=False)


def _why(report: "Report") -> str:
    """Why rows are missing, and what to do."""
    left = f"{report.rows - report.complete} of {report.rows} rows are not complete"
    if report.stopped is not None or report.failures:
        reasons = [*([report.stopped] if report.stopped else []), *report.failures[:1]]
        return f"{left}: {'; '.join(reasons)}; the same command asks for the rest"
    number = {what: sum(counts[what] for counts in report.by_role.values()) for what in ("cut", "empty")}
    return (
        f"{left}: {number['cut']} replies were cut at max_new_tokens, {number['empty']} are empty; raise "
        "teacher.max_new_tokens, or change how the teacher writes"
    )
