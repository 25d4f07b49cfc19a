"""`recursivemas demo`: run the bundled system against text and its controls; a table and a page."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recursivemas.cli.eval import watch, world_task
from recursivemas.cli.terminal import AsJson, Device, Dtype, Seed, err, out, print_json, reported

if TYPE_CHECKING:
    from recursivemas.evaluation.task import Sample

ARMS = ("latent", "text", "solo", "none", "shuffled", "random-link")

INTRO = (
    "A ward: a patient's case, in plain English, that three agents read. What a finding means is known only to the "
    "agent that owns it, and some findings mean something only in the light of what another agent has concluded; so "
    "each round uncovers one more layer, and the best possible accuracy of each round is known exactly. The agents "
    "are frozen language models of three architectures, with three vocabularies; only the links between them are "
    "trained. The case told below is the first in which every round uncovers something and little doubt is "
    "left in the end, whoever gets it right."
)


@reported
def demo(
    *,
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Number of held-out cases.")] = 2000,
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the report goes.")] = Path("runs/demo"),
    batch_size: Annotated[int, typer.Option(min=1, help="Cases answered together.")] = 250,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Show what the bundled system does: latents beside text and controls, on held-out cases, with one case told.

    Writes report.json and report.html; stopped, the same command goes on where it was.

    [bold]Example:[/bold] recursivemas demo -n 500
    """
    from recursivemas.evaluation import report, story
    from recursivemas.evaluation.runner import evaluate, plan_arms
    from recursivemas.system import RecursiveSystem

    system = RecursiveSystem.from_pretrained("ward", device=device, dtype=dtype)
    task = world_task(system, "ward", split="test", n=n, seed=seed)
    rounds = list(range(1, system.settings.num_rounds + 1))
    finished = output / "report.json"
    journal = output / "answers.jsonl"
    if finished.exists():
        # A demo that was shown to its end starts anew; one that was stopped goes on.
        finished.unlink()
        journal.unlink(missing_ok=True)
    told = story.tell(system, _worth_telling(task.samples), rounds=max(rounds))
    if not as_json:
        out.print(story.story_text(told))
    arms = plan_arms(ARMS, rounds, list(system.prompts.variants))
    log = watch(
        lambda show: evaluate(system, task, arms, batch_size=batch_size, seed=seed, journal=journal, progress=show),
        task,
    )
    report.write_html(log, told, output, title="recursivemas demo", intro=INTRO)
    report.write_json(log, output)
    if as_json:
        print_json(log.to_dict())
        return
    out.print(report.table(log))
    if log.pairs():
        out.print(report.comparison_table(log))
    err.print(f"[dim]written to {output}: report.json, report.html[/dim]", highlight=False)


def _worth_telling(samples: "Sequence[Sample]") -> "Sample":
    """The first case in which every round uncovers something and little doubt is left in the end.

    It is chosen by the case, never by how it was answered.
    """
    for sample in samples:
        values = list(sample.metadata["optimum"].values())
        if max(sample.metadata["posterior"].values()) > 0.9 and all(
            earlier < later for earlier, later in itertools.pairwise(values)
        ):
            return sample
    return samples[0]
