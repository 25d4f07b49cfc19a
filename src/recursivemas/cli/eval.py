"""`recursivemas eval`: let a system, the same agents in text, and the controls answer the same questions."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from recursivemas.cli.terminal import (
    AsJson,
    BatchSize,
    Compile,
    Device,
    Dtype,
    LatentSteps,
    MaxNewTokens,
    Quantization,
    Residency,
    Seed,
    SystemArgument,
    Temperature,
    TopP,
    err,
    numbers,
    out,
    print_json,
    reported,
)
from recursivemas.errors import ConfigError, InputError, OutputError, unknown_name

DEFAULT_ARMS = "latent,text,solo,none,shuffled,random-link"


@reported
def evaluate(
    system: SystemArgument,
    *,
    task: Annotated[
        str | None, typer.Option(help="A world's questions: ward, relay, panel, consult, consult-blind or desk.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Questions of your own.")] = None,
    arms: Annotated[
        str | None,
        typer.Option(help=f"Separated by commas; see below. Default: {DEFAULT_ARMS}, or those a baseline has."),
    ] = None,
    rounds: Annotated[str | None, typer.Option(help="Separated by commas. Default: 1 up to the system's own.")] = None,
    latent_steps: LatentSteps = None,
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Number of questions. Default: 2000, or the whole file.")
    ] = None,
    split: Annotated[str, typer.Option(help="With --task: train, validation or test.")] = "test",
    by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Also report accuracy by this key of the questions (relay: hops).")
    ] = None,
    question_column: Annotated[str, typer.Option(help="With --data: the column of the question.")] = "question",
    target_column: Annotated[str, typer.Option(help="With --data: the column of the answer.")] = "answer",
    id_column: Annotated[str | None, typer.Option(help="With --data: a column that names questions.")] = None,
    scorer: Annotated[str, typer.Option(help="With --data: exact or numeric.")] = "exact",
    instructions: Annotated[
        str, typer.Option(help="With --data: what the answering agent is told about the form.")
    ] = "",
    repeated_calls: Annotated[
        bool,
        typer.Option(
            "--repeated-calls/--no-repeated-calls", help="Whether a tool of the task may be called twice with one text."
        ),
    ] = True,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    output: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: runs/eval/SYSTEM-TASK. Answers are kept there."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite/--no-overwrite", help="Replace a finished report.")] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    residency: Residency = "all",
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Compare latent hand-offs with text and with controls, on the same questions and one meter.

    Arms: latent (the system), text (the same agents in text, once for each wording of the prompts), both, solo (the
    answering agent alone; solo:ROLE another one), none (empty slots), zero (zeros), shuffled (another question's
    messages; none:ROLE and shuffled:ROLE those of one sender), random-link, no-feedback (edges that lead back are
    closed), no-tools (tools are taken away), vote (as many votes of the answering agent alone as take the time of
    latent; vote:K), system:DIR (another system, as it is).
    Writes answers as they come: a run that was stopped goes on with the same command.

    [bold]Example:[/bold] recursivemas eval ward --task ward -n 2000 --arms latent,text,solo
    """
    from recursivemas.decoding import SamplingParams
    from recursivemas.evaluation import report, story
    from recursivemas.evaluation.runner import evaluate as run_arms
    from recursivemas.evaluation.runner import plan_arms
    from recursivemas.system import RecursiveSystem

    if (task is None) == (data is None):
        raise InputError("say what to answer: either --task NAME or --data FILE.jsonl")
    if n is not None and n < 1:
        raise ConfigError(f"-n must be 1 or more, got {n}")
    loaded = RecursiveSystem.from_pretrained(
        system,
        device=device,
        dtype=dtype,
        options={"*": {"quantization": quantization}} if quantization else None,
        compile=compile,
        residency=residency,
    )
    job = (
        world_task(loaded, task, split=split, n=2000 if n is None else n, seed=seed, allow_repeats=repeated_calls)
        if task is not None
        else file_task(data or Path(), question_column, target_column, id_column, scorer, instructions, n, seed)
    )
    job = dataclasses.replace(job, group_by=by)
    chosen = numbers(rounds, "--rounds") if rounds else list(range(1, loaded.settings.num_rounds + 1))
    name = "-".join(part for part in Path(system).parts if part not in ("/", ".", ".."))
    place = output or Path("runs/eval") / f"{name}-{job.name}"
    if (place / "report.json").exists():
        if not overwrite:
            raise OutputError(f"{place} holds a finished report; choose another --out, or replace it with --overwrite")
        (place / "answers.jsonl").unlink(missing_ok=True)
    log = watch(
        lambda show: run_arms(
            loaded,
            job,
            plan_arms(
                [name.strip() for name in (arms or _default_arms(loaded)).split(",")],
                chosen,
                list(loaded.prompts.variants),
            ),
            sampling=SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_new_tokens=max_new_tokens or loaded.settings.max_new_tokens,
            ),
            num_latent_steps=latent_steps,
            batch_size=batch_size,
            seed=seed,
            journal=place / "answers.jsonl",
            progress=show,
        ),
        job,
    )
    report.write_json(log, place)
    told = None
    if any(arm.name == "latent" for arm in log.answers):
        told = story.tell(
            loaded,
            job.samples[0],
            rounds=max(chosen),
            scorer=job.scorer,
            instructions=job.instructions,
            num_latent_steps=latent_steps,
            toolbox=job.toolbox,
        )
    report.write_html([report.Chapter(log, told, f"{log.system} on {job.name}")], place)
    if as_json:
        print_json(log.to_dict())
        return
    out.print(report.table(log))
    if log.pairs():
        out.print(report.comparison_table(log))
    if by is not None:
        out.print(report.group_table(log))
    err.print(f"[dim]written to {place}: report.json, report.html, answers.jsonl[/dim]", highlight=False)


def _default_arms(system: Any) -> str:
    """What is worth asking of a system: one agent can but answer, and one made for text has no links worth hearing."""
    if not system.links:
        return "solo"
    return "text,solo,none" if system.settings.channel == "text" else DEFAULT_ARMS


def watch(run: Any, task: Any) -> Any:
    """Show a table that fills while the arms answer, on stderr; return the log."""
    from rich.console import Group
    from rich.live import Live

    from recursivemas.evaluation import report

    with Live(console=err, refresh_per_second=4, transient=True) as live:

        def show(done: int, total: int, answers: Any) -> None:
            if err.is_terminal:
                live.update(Group(report.table(answers, task), f"[dim]{done} of {total} batches[/dim]"))

        return run(show)


def world_task(system: Any, name: str, *, split: str, n: int, seed: int, allow_repeats: bool = True) -> Any:
    """Questions of a world: of the one whose agents the system is made of, if it is."""
    from recursivemas.evaluation.scorers import SCORERS
    from recursivemas.evaluation.task import Task
    from recursivemas.worlds import load_world

    if split not in ("train", "validation", "test"):
        raise ConfigError(unknown_name("split", split, ("train", "validation", "test")))
    made_for = system.training.get("world", {})
    world = load_world(name, made_for.get("seed", 0) if made_for.get("name") == name else 0)
    samples = world.samples(split, n, seed)
    rounds = range(1, system.settings.num_rounds + 1)
    return Task(
        name=name,
        samples=samples,
        scorer=SCORERS[world.scorer],
        optimum={each: world.optimum(samples, each) for each in rounds},
        measures=world.measures,
        toolbox=world.toolbox(allow_repeats=allow_repeats),
        seed=seed,
    )


def file_task(
    file: Path,
    question: str,
    target: str,
    id: str | None,
    scorer: str,
    instructions: str,
    limit: int | None,
    seed: int,
) -> Any:
    from recursivemas.evaluation.scorers import SCORERS
    from recursivemas.evaluation.task import Task, load_samples

    if scorer not in ("exact", "numeric"):
        raise ConfigError(unknown_name("scorer", scorer, ("exact", "numeric")))
    samples = load_samples(file, question=question, target=target, id=id, limit=limit)
    for sample in samples:
        # A target that cannot be scored is found now, not after an hour.
        SCORERS[scorer](sample.target, sample.target, sample.metadata)
    return Task(name=file.stem, samples=samples, scorer=SCORERS[scorer], instructions=instructions, seed=seed)
