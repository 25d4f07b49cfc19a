"""What `recursivemas train` does beside links: the baselines (`--method`), and the cost of every method.

Knows the terminal and what training gives back; knows nothing of how anything is trained.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

from recursivemas.cli.terminal import err, out, print_json, progress_bar, provenance

if TYPE_CHECKING:
    from recursivemas.baselines import Trained
    from recursivemas.system import RecursiveSystem
    from recursivemas.training.cost import Cost, CostMeter
    from recursivemas.training.loop import RunDirectory
    from recursivemas.training.processes import Processes
    from recursivemas.training.recipe import Recipe


def train_by_method(
    method: str,
    recipe: "Recipe",
    stage: str | None,
    price_per_hour: float | None,
    *,
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a baseline by a recipe into OUTPUT/METHOD, and say what came out; or only what it would take."""
    from recursivemas.baselines import check_method, train_baseline
    from recursivemas.errors import ConfigError

    if stage is not None:
        raise ConfigError(f"--stage chooses among the stages of links; --method {method} has none, leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"--method {method} runs in one process, not in {os.environ['WORLD_SIZE']}; leave out torchrun"
        )
    if dry_run:
        _tell_estimate(method, recipe, as_json=as_json)
        return
    check_method(method, recipe)
    place = Path(recipe.output) / method
    meter = _meter(method, place, price_per_hour)
    run = _directory(method, recipe, place)
    with progress_bar() as bar:
        made = train_baseline(method, recipe, run=run, meter=meter, device=device, progress=shown_in(bar))
    made.system.training |= {
        **provenance(),
        "seed": recipe.seed,
        **({} if recipe.world is None else {"world": recipe.world.model_dump()}),
        "method": method,
        "recipe": recipe.model_dump(mode="json", exclude={"system", "output"}),
        "report": made.report,
        "cost": meter.cost.to_dict(),
    }
    made.system.save_pretrained(place / "system", dtype=recipe.save_dtype, overwrite=True)
    if as_json:
        print_json({"system": str(place / "system"), "report": made.report, "cost": meter.cost.to_dict()})
        return
    for line in _say(made):
        out.print(line, highlight=False, markup=False)
    out.print(cost_table([meter.cost]))
    out.print(f"system written to {place / 'system'}")
    task = "--data FILE.jsonl" if recipe.world is None else f"--task {recipe.world.name}"
    err.print(f"[dim]next: recursivemas eval {place / 'system'} {task}[/dim]", highlight=False)


def _directory(method: str, recipe: "Recipe", place: Path) -> "RunDirectory":
    """The directory of a baseline: it belongs to what this method is trained on, whatever the recipe says of others."""
    from recursivemas.training.loop import RunDirectory

    mine = {method} | ({"lora"} if method == "text" and recipe.method.text.adapters else set())
    settings = recipe.model_dump(mode="json", exclude={"trackers", "stages", "links", "alignment", "method"})
    of_method = {name: each for name, each in recipe.method.model_dump(mode="json").items() if name in mine}
    return RunDirectory(place, {**settings, "method": of_method}, trackers=recipe.trackers)


def _say(made: "Trained") -> Iterator[str]:
    """What was trained, in words."""
    report = made.report
    for name, each in (
        report.items() if "turns" not in report else {next(iter(made.trained_parameters)): report}.items()
    ):
        if "turns" in each:
            scores = each["validation"]
            judged = ""
            if scores:
                judged = f"; validation from {next(iter(scores.values())):.4f} to {max(scores.values()):.4f}"
            yield f"{name}: {each['turns']} turns, best after step {each['best_step']} of {each['steps']}{judged}"
        else:
            told = ", ".join(f"{wording} {score:.4f}" for wording, score in each.items())
            yield f"together, in text, on validation: {told}"


def _tell_estimate(method: str, recipe: "Recipe", *, as_json: bool) -> None:
    from recursivemas.baselines.estimate import estimate_method
    from recursivemas.cli.estimate_views import gigabytes

    found = estimate_method(method, recipe)
    if as_json:
        print_json(found.to_dict())
        return
    table = Table(title=f"--method {method} (estimated, on one device)", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("trained parameters", f"{found.trained_parameters:,}")
    table.add_row("of all parameters", f"{found.total_parameters:,} ({found.trained_share:.2%})")
    table.add_row("peak memory, GB", gigabytes(found.peak_memory_bytes))
    table.add_row("FLOPs of a step", f"{found.flops_per_step:.2e}")
    out.print(table)


# Cost


def links_meter(
    system: "RecursiveSystem", recipe: "Recipe", price_per_hour: float | None, processes: "Processes"
) -> "CostMeter":
    """A meter that counts what the agents and links of a system do."""
    place = Path(recipe.output) if processes.is_first else None
    meter = _meter("links", place, price_per_hour, processes.count)
    for model in {id(agent.model): agent.model for agent in system.agents.values()}.values():
        meter.count(model)
    for link in system.all_links.values():
        meter.count_link(link)
    return meter


def settle_links(meter: "CostMeter", system: "RecursiveSystem", processes: "Processes") -> None:
    """Note the sizes of a system's links and, of all processes, what they did."""
    meter.share(processes.gather(meter.cost))
    inner = sum(each.numel() for agent in system.agents.values() for each in agent.inner_link.parameters())
    outer = sum(each.numel() for link in system.links.values() for each in link.parameters())
    models = {id(agent.model): agent.model.num_parameters for agent in system.agents.values()}
    meter.settle({"inner": inner, "outer": outer}, inner + outer + sum(models.values()))


def _meter(method: str, place: Path | None, price_per_hour: float | None, num_processes: int = 1) -> "CostMeter":
    """A meter that keeps what it finds in a directory, and goes on where a run with a state there was left."""
    from recursivemas.training.cost import CostMeter

    is_begun = place is not None and any((place / "state").glob("*/manifest.json"))
    file = None if place is None else place / "cost.json"
    return CostMeter(method, file, resumes=is_begun, price_per_hour=price_per_hour, num_processes=num_processes)


def cost_table(costs: Sequence["Cost"]) -> Table:
    """What methods have cost, one a row."""
    table = Table(title="Cost of training", title_justify="left")
    table.add_column("method")
    for column in ("trained", "of all", "memory", "time", "positions", "FLOPs", "price"):
        table.add_column(column, justify="right")
    for cost in costs:
        positions = cost.positions_with_gradient + cost.positions_without_gradient
        table.add_row(
            cost.method,
            f"{cost.num_trained:,}",
            f"{cost.num_trained / cost.total_parameters:.2%}",
            f"{cost.peak_memory_bytes / 1e9:.2f} GB",
            f"{cost.seconds:,.0f} s",
            f"{positions:,}",
            f"{cost.flops:.1e}",
            "" if cost.price is None else f"{cost.price:.2f}",
        )
    if any(cost.device == "cpu" for cost in costs):
        table.caption = "memory: of the whole process, libraries included"
        table.caption_style = "dim"
    return table


def shown_in(bar: Progress) -> Callable[[str, int, int, dict[str, float]], None]:
    """A line of the progress bar for every stage, with its latest loss and validation."""
    tasks: dict[str, Any] = {}
    notes: dict[str, str] = {}
    scores: dict[str, str] = {}

    def show(name: str, done: int, total: int, figures: dict[str, float]) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=total, note="")
        if "loss" in figures:
            notes[name] = f"loss {figures['loss']:.4f}"
        if "validation" in figures:
            scores[name] = f"  validation {figures['validation']:.4f}"
        bar.update(tasks[name], completed=done, note=notes.get(name, "") + scores.get(name, ""))

    return show
