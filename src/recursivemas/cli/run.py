"""`recursivemas run`: ask a question of your own."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from recursivemas.cli.terminal import (
    AsJson,
    BatchSize,
    Compile,
    Device,
    Dtype,
    KeptInterrupt,
    LatentSteps,
    MaxNewTokens,
    Quantization,
    Residency,
    Seed,
    SystemArgument,
    Temperature,
    TopP,
    counting,
    err,
    print_json,
    reported,
)
from recursivemas.errors import InputError


@reported
def run(
    system: SystemArgument,
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION...", help="What to ask; - reads stdin, one question a line.")
    ] = None,
    *,
    channel: Annotated[
        list[str] | None,
        typer.Option(help="latent, text, both or none; for one edge: planner->critic=text (may be repeated)."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="n: how often the pattern is gone through.")] = None,
    latent_steps: LatentSteps = None,
    variant: Annotated[str | None, typer.Option(help="A wording of the system's prompts.")] = None,
    intervene: Annotated[
        str | None, typer.Option(help="shuffled or zero: what is done to messages on their way.")
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Answers sampled from the same latents; needs a temperature.")
    ] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text ends before this string (may be repeated).")] = None,
    tools: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What the answering role can call: python, search, both, or none. Default: the tools of its world.",
        ),
    ] = None,
    search_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --tools search: a folder of texts, in place of the web.")
    ] = None,
    tools_after: Annotated[
        str, typer.Option(help="last: tools in the answer alone; every: in every round, before the role sends.")
    ] = "last",
    max_tool_calls: Annotated[int, typer.Option(help="Calls of tools in one text.")] = 5,
    run_code_without_sandbox: Annotated[
        bool,
        typer.Option(
            "--run-code-without-sandbox", help="Run what a model writes with your own rights, if there is no sandbox."
        ),
    ] = False,
    on_long_question: Annotated[
        str | None,
        typer.Option(help="refuse a question that is too long for a context, or truncate it. Default: the system's."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Questions, one object a line, in any number.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.jsonl", help="With --data: the answers. A run that was stopped goes on."),
    ] = None,
    question_column: Annotated[str, typer.Option(help="With --data: the column of the question.")] = "question",
    id_column: Annotated[str | None, typer.Option(help="With --data: a column that names questions.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite/--no-overwrite", help="With --out: begin anew.")] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every message to DIR (JSON and safetensors).")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take the messages of a recorded run instead of questions.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="ROUND:SOURCE->TARGET", help="With --replay: the last message taken; the rest is anew."),
    ] = None,
    batch_size: BatchSize = 64,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(help="Positions that the longest context of a batch can take, times its questions. Default: any."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    residency: Residency = "all",
    quantization: Quantization = None,
    vllm: Annotated[
        str | None, typer.Option(metavar="URL", help="A vLLM server that writes the answers, if it writes the same.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a system your own question, and see what its agents pass on.

    A file of questions, in any number, is answered into another, and the same command goes on where it was stopped:
    recursivemas run ward --data questions.jsonl --out answers.jsonl

    [bold]Example:[/bold] recursivemas run ward "$(recursivemas world ward sample -n 1)" --rounds 3 --trace runs/trace
    """
    from recursivemas.decoding import SamplingParams
    from recursivemas.remote import VLLMServer
    from recursivemas.system import RecursiveSystem
    from recursivemas.trace import load_traces

    if replay is not None and any(
        each is not None for each in (questions, channel, rounds, latent_steps, variant, intervene)
    ):
        raise InputError("a replay takes its questions and settings from the trace; give none of your own")
    _check_file(data, output, questions, trace, replay)
    recorded = load_traces(replay) if replay is not None else []
    asked = [each.question for each in recorded] or ([] if data else _read_questions(questions))
    toolbox = _toolbox(tools, search_folder, max_tool_calls, run_code_without_sandbox)
    loaded = RecursiveSystem.from_pretrained(
        system,
        device=device,
        dtype=dtype,
        options={"*": {"quantization": quantization}} if quantization else None,
        compile=compile,
        residency=residency,
    )
    if tools is None:
        toolbox = _world_toolbox(loaded)
    elif toolbox is not None and not loaded.prompts.tells_of_tools(loaded.pattern.answers):
        err.print(f"[dim]the prompts of the {loaded.pattern.answers} do not say which tools there are[/dim]")
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        max_new_tokens=max_new_tokens or loaded.settings.max_new_tokens,
    )
    options: dict[str, Any] = {
        "num_rounds": rounds,
        "num_latent_steps": latent_steps,
        "channel": _channels(channel, loaded.settings.channel),
        "variant": variant,
        "sampling": sampling,
        "tools": toolbox,
        "tools_after": tools_after,
        "on_long_question": on_long_question,
        "batch_size": batch_size,
        "max_batch_tokens": max_batch_tokens,
    }
    if recorded:
        options |= _recorded_options(recorded, until)
    elif until is not None:
        raise InputError("--until says where a replay stops: give --replay DIR too")
    _tell_closed(loaded, options["channel"])
    if len(asked) == 1 and samples == 1 and not (as_json or trace or intervene or recorded or vllm):
        _stream(loaded, asked[0], options)
        return
    if not recorded:
        options["intervene"] = intervene
    options |= {"num_samples": samples, "writer": VLLMServer(vllm) if vllm else None}
    if data is not None and output is not None:
        columns = {"question": question_column, "id": id_column}
        _answer_file(loaded, data, output, columns, overwrite, options, as_json=as_json)
        return
    with counting("answering") as show:
        options |= {"trace": "full" if trace else "summary", "trace_dir": trace, "seed": seed}
        results = loaded.run(asked, **options, progress=show)
    if as_json:
        print_json([_record(question, result) for question, result in zip(asked, results, strict=True)])
        return
    for result in results:
        print(*(result.samples or (result.text,)), sep="\n")
    _tell_usage([result.usage for result in results])
    if trace is not None:
        err.print(f"trace written to {trace}")


def _check_file(
    data: Path | None, output: Path | None, questions: list[str] | None, trace: Path | None, replay: Path | None
) -> None:
    """Refuse what does not go together with a file of questions."""
    if data is None:
        if output is not None:
            raise InputError("--out is where the answers to a file of questions go: give --data FILE.jsonl too")
        return
    if output is None:
        raise InputError("say where the answers to --data go: --out FILE.jsonl")
    for name, given in (("questions", questions), ("--trace", trace), ("--replay", replay)):
        if given is not None:
            raise InputError(f"with --data the questions come from a file and no trace is kept: leave out {name}")


def _answer_file(
    system: Any,
    data: Path,
    output: Path,
    columns: dict[str, Any],
    overwrite: bool,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Answer a file of questions into another, and tell how far it has come."""
    from recursivemas.bulk import Columns, answer_file

    try:
        with counting("answering") as show:
            total = answer_file(
                system, data, output, columns=Columns(**columns), overwrite=overwrite, progress=show, **options
            )
    except KeyboardInterrupt:
        raise KeptInterrupt from None
    if as_json:
        print_json({"questions": total, "answers": str(output)})
    err.print(f"[dim]{total} answers written to {output}[/dim]", highlight=False)


def _toolbox(names: str | None, search_folder: Path | None, max_calls: int, without_sandbox: bool) -> Any:
    """The tools that were asked for by name."""
    from recursivemas.sandbox import Sandbox
    from recursivemas.tools import Toolbox, ToolLimits, make_tool

    several = [name.strip() for name in (names or "").split(",") if name.strip()]
    several = [] if several == ["none"] else several
    if search_folder is not None and "search" not in several:
        raise InputError("--search-folder is for the tool search: give --tools search too")
    if without_sandbox and "python" not in several:
        raise InputError("--run-code-without-sandbox is for the tool python: give --tools python too")
    if not several:
        return None
    sandbox = Sandbox(allow_unsafe=True) if without_sandbox else None
    made = [make_tool(name, search_folder=search_folder, sandbox=sandbox) for name in several]
    return Toolbox(made, ToolLimits(max_calls=max_calls))


def _world_toolbox(system: Any) -> Any:
    """The tools of the world that a system's agents are of, if it is of one that has some."""
    from recursivemas.worlds import load_world, world_names

    world = system.training.get("world") or {}
    return load_world(world["name"], world["seed"]).toolbox() if world.get("name") in world_names() else None


def _read_questions(questions: list[str] | None) -> list[str]:
    if questions == ["-"]:
        try:
            questions = [line for line in sys.stdin.read().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not text ({error.reason} at byte {error.start})") from None
    if not questions:
        raise InputError("no question was given; write it in quotes after the system, or - to read from stdin")
    for question in questions:
        if not question.isprintable() and "\x00" in question:
            raise InputError("the question is not text: it holds a zero byte")
    return questions


def _channels(given: list[str] | None, default: str | dict[str, str]) -> str | dict[str, str] | None:
    if not given:
        return None
    names = [each for each in given if "=" not in each]
    if len(names) > 1:
        raise InputError(f"--channel names two channels for all edges: {', '.join(names)}")
    chosen = {"*": default} if isinstance(default, str) else {**default}
    if names:
        chosen = {"*": names[0]}
    for each in given:
        if "=" in each:
            edge, _, name = each.rpartition("=")
            chosen[edge] = name
    return chosen


def _tell_closed(system: Any, channel: str | dict[str, str] | None) -> None:
    """Say whose words are missing where some edges are closed and others are not."""
    from recursivemas.channels import choose_channels

    edges = [str(edge) for edge in system.pattern.graph]
    chosen = choose_channels(system.settings.channel if channel is None else channel, edges)
    closed = [edge for edge in edges if chosen[edge].name == "none"]
    if closed and len(closed) < len(edges):
        err.print(f"[dim]nothing is sent on {', '.join(closed)}: these slots stay empty[/dim]", highlight=False)


def _recorded_options(recorded: list[Any], until: str | None) -> dict[str, Any]:
    """The settings of a recorded run, with its messages in place of the senders up to `until`."""
    from recursivemas.decoding import SamplingParams
    from recursivemas.interventions import Replay

    settings = recorded[0].settings
    last = None
    if until is not None:
        round, colon, edge = until.partition(":")
        source, arrow, target = edge.partition("->")
        if not (colon and arrow and round.isdigit()):
            raise InputError(f"cannot read --until '{until}': write it as ROUND:SOURCE->TARGET")
        last = (int(round), source.strip(), target.strip())
    return {
        "num_rounds": settings["num_rounds"],
        "num_latent_steps": settings["num_latent_steps"],
        "channel": settings["channel"],
        "variant": settings["variant"],
        "instructions": settings["instructions"],
        "sampling": SamplingParams(**{**settings["sampling"], "stop": tuple(settings["sampling"]["stop"])}),
        "intervene": Replay.from_traces(recorded, until=last),
    }


def _stream(system: Any, question: str, options: dict[str, Any]) -> None:
    """Tell each turn on stderr and write the answer to stdout as it comes."""
    from recursivemas.answering import TextDelta
    from recursivemas.recursion import PlayedTurn

    for event in system.stream(question, **options):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, PlayedTurn):
            for edge, message in event.messages.items():
                reader = system.agents[edge.rpartition(">")[2]].model
                what = _describe(message, reader)
                err.print(f"[dim]round {event.turn.round}  {edge}  {escape(what)}[/dim]", highlight=False)
        else:
            print()
            for call in event.trace.calls:
                what = f"{call.tool} {call.argument.strip()!r}: {call.result!r}"
                err.print(f"[dim]round {call.round}  {call.role}  {escape(what[:200])}[/dim]", highlight=False)
            _tell_usage([event.usage])


def _describe(message: Any, reader: Any) -> str:
    """What was passed on: the text, and for each latent the reader's nearest token."""
    parts = []
    if message.latents is not None:
        nearest = [tokens[0] for tokens in reader.nearest_tokens(message.latents[0], k=1)]
        near = " ".join(f"{token} {cosine:.2f}" for token, cosine in nearest)
        parts.append(f"{len(nearest)} latents, nearest tokens: {near}")
    if message.texts is not None:
        parts.append(repr(message.texts[0]))
    return "; ".join(parts)


def _tell_usage(usages: list[Any]) -> None:
    n = len(usages)
    mean = {
        name: sum(usage.total(name) for usage in usages) / n
        for name in ("generated_tokens", "latent_steps", "prompt_tokens")
    }
    seconds = sum(usage.seconds for usage in usages) / n
    each = " per question" if n > 1 else ""
    err.print(
        f"[dim]{mean['generated_tokens']:g} generated tokens, {mean['latent_steps']:g} latent steps, "
        f"{mean['prompt_tokens']:g} prompt tokens, {1000 * seconds:.1f} ms{each}[/dim]",
        highlight=False,
    )


def _record(question: str, result: Any) -> dict[str, Any]:
    messages = [
        {"round": each.round, "source": each.source, "target": each.target, "text": each.text, "nearest": each.nearest}
        for each in result.trace.messages
    ]
    return {
        "question": question,
        "text": result.text,
        **({"samples": result.samples} if result.samples else {}),
        "finished": result.finished,
        "usage": result.usage.to_dict(),
        "messages": messages,
        **({"calls": [asdict(call) for call in result.trace.calls]} if result.trace.calls else {}),
    }
