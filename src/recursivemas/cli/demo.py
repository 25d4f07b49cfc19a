"""`recursivemas demo`: run the bundled systems against text and their controls; tables and a page."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recursivemas.cli.eval import watch, world_task
from recursivemas.cli.terminal import AsJson, Device, Dtype, Seed, err, out, print_json, reported
from recursivemas.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from recursivemas.evaluation.report import Chapter
    from recursivemas.evaluation.runner import EvalLog
    from recursivemas.evaluation.task import Sample
    from recursivemas.system import RecursiveSystem

SHOWN = ("ward", "panel")
"""What is shown unless a system is named, in this order."""

ARMS = ("latent", "text", "solo", "none", "shuffled", "random-link")

INTROS = {
    "ward": "A ward: a patient's case, in plain English, that three agents read. What a finding means is known only to "
    "the agent that owns it, and some findings mean something only in the light of what another agent has concluded; "
    "so each round uncovers one more layer, and the best possible accuracy of each round is known exactly. The agents "
    "are frozen language models of three architectures, with three vocabularies; only the links between them are "
    "trained. The case told below is the first in which every round uncovers something and little doubt is "
    "left in the end, whoever gets it right.",
    "panel": "A panel: something goes wrong in an orchard, from one of sixteen causes. Three specialists can each tell "
    "from four of twelve findings how probable every cause is, and hand that on to a summarizer, who knows how to "
    "combine what they say, but not what a finding means. A belief over sixteen causes does not fit into a sentence, "
    "so all hangs on how much of it gets through. One round uncovers everything: rounds are not expected to pay here.",
    "desk": "A desk: somebody asks for a sum about a record, and which of sixteen is meant can only be guessed. A "
    "reflector can tell from the clues how probable each record is, and what a word of the trade asks for; a "
    "tool-caller can tell from the file, knows its type, and calls the tools: three searches, in records that are "
    "drawn anew for each question, and Python for the sum. One clue means something under a type of file only, of "
    "which the reflector hears from the tool-caller: that is what the second round is for.",
}


@reported
def demo(
    *,
    system: Annotated[
        str | None,
        typer.Option(help=f"Show this bundled system alone. Default: {', '.join(SHOWN)}, one by one."),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Number of held-out cases.")] = 2000,
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the report goes.")] = Path("runs/demo"),
    batch_size: Annotated[int, typer.Option(min=1, help="Cases answered together.")] = 250,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Show what the bundled systems do: latents beside text and controls, on held-out cases, with one case told.

    Writes report.json (of the first system), one more of each other system, and report.html; stopped, the same command
    goes on where it was.

    [bold]Example:[/bold] recursivemas demo -n 500

    [bold]Example:[/bold] recursivemas demo --system relay
    """
    from recursivemas.checkpoint import bundled_systems
    from recursivemas.evaluation import report
    from recursivemas.system import RecursiveSystem

    if system is not None and system not in bundled_systems():
        raise ConfigError(unknown_name("bundled system", system, bundled_systems()))
    names: tuple[str, ...] = SHOWN if system is None else (system,)
    files = {name: f"{name}.json" if index else "report.json" for index, name in enumerate(names)}
    journals = {name: output / f"answers-{name}.jsonl" for name in names}
    if all((output / file).exists() for file in files.values()):
        # A demo that was shown to its end starts anew; one that was stopped goes on.
        for path in [*(output / file for file in files.values()), *journals.values()]:
            path.unlink(missing_ok=True)
    chapters: list[Chapter] = []
    for name, file in files.items():
        loaded = RecursiveSystem.from_pretrained(name, device=device, dtype=dtype)
        chapter = _show(loaded, name, file, n, journals[name], batch_size, seed, is_told=not as_json)
        report.write_json(chapter.log, output, file)
        chapters.append(chapter)
    report.write_html(chapters, output)
    if as_json:
        print_json({name: chapter.log.to_dict() for name, chapter in zip(names, chapters, strict=True)})
        return
    err.print(f"[dim]written to {output}: {', '.join(files.values())}, report.html[/dim]", highlight=False)


def _show(
    system: "RecursiveSystem", name: str, file: str, n: int, journal: Path, batch_size: int, seed: int, *, is_told: bool
) -> "Chapter":
    """Evaluate one system, and tell what came out unless all of it goes to stdout as JSON."""
    from recursivemas.evaluation import report, story
    from recursivemas.evaluation.runner import evaluate, plan_arms

    task = world_task(system, name, split="test", n=n, seed=seed)
    rounds = list(range(1, system.settings.num_rounds + 1))
    told = story.tell(
        system, _worth_telling(task.samples), rounds=max(rounds), scorer=task.scorer, toolbox=task.toolbox
    )
    if is_told:
        out.print(story.story_text(told))
    arms = plan_arms(ARMS, rounds, list(system.prompts.variants))
    log: EvalLog = watch(
        lambda show: evaluate(system, task, arms, batch_size=batch_size, seed=seed, journal=journal, progress=show),
        task,
    )
    if is_told:
        out.print(report.table(log))
        if log.pairs():
            out.print(report.comparison_table(log))
    return report.Chapter(log, told, f"recursivemas demo: {name}", INTROS.get(name, ""), file)


def _worth_telling(samples: "Sequence[Sample]") -> "Sample":
    """The first case in which every round that the world needs uncovers something and little doubt is left in the end.

    It is chosen by the case, never by how it was answered.
    """
    for sample in samples:
        values = list(sample.metadata.get("optimum", {}).values())
        if max(sample.metadata.get("posterior", {"": 0.0}).values()) > 0.9 and all(
            earlier < later for earlier, later in itertools.pairwise(values)
        ):
            return sample
    return samples[0]
