"""What training costs, by method: the links, and the baselines on the same data, in the form of the paper's table 5.

    python benchmarks/training_cost.py                  ward and relay: train, evaluate, write docs/results.md; hours
    python benchmarks/training_cost.py ward --methods lora,full      only some; stopped, it goes on where it was
    python benchmarks/training_cost.py --only search    learning rates of the baselines, on ward's validation
    python benchmarks/training_cost.py paper            the paper's configurations, by calculation; minutes
    python benchmarks/training_cost.py --only write     write the tables anew from what is there

Runs are made by the command that a reader would type, one after the other; it is printed, and kept in
runs/results/WORLD/methods/command.txt. Tables stand between markers in docs/results.md; the text around them is written
by hand. Accuracy is that of the test split (seed 0, n = 4,000), the checkpoint that of the best validation.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recursivemas.baselines.estimate import estimate_method
from recursivemas.config import parse, read_yaml
from recursivemas.training.estimate import team_of
from recursivemas.training.methods import METHODS
from recursivemas.training.recipe import Recipe

PLACE = Path("runs/results")
DOCUMENT = Path("docs/results.md")
WORLDS = ("ward", "relay")
PAPER = ("sequential_light", "sequential_scaled", "mixture", "distillation", "deliberation")
NUM_QUESTIONS = 4000
PRICE_PER_HOUR = 2.5
"""Assumed, for an hour of one device of FLOPS_PER_SECOND."""
FLOPS_PER_SECOND = 4e14
"""Assumed: sustained in bfloat16."""
SEARCHED = {"lora": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3), "text": (2e-4, 5e-4, 1.5e-3)}
"""Learning rates that are tried on the validation split; recipes hold the best."""
SEARCHED_IN = "ward"
"""The world in which they are; the rates for one agent are taken in the others, too."""
ARMS = {"links": "latent,none,shuffled", "text": "text,none", "untrained": "text,solo"}
"""What is asked of each method, with its controls; others stand alone."""


def place_of(world: str, method: str) -> Path:
    """Where a method is trained: a baseline goes below the directory of the links."""
    base = PLACE / world / "methods"
    return base if method == "links" else base / method


def commands(world: str, method: str) -> list[list[str]]:
    """What is to be typed for a method, in order; a command whose result is there is left out."""
    place, base = place_of(world, method), PLACE / world / "methods"
    found = []
    if method != "untrained" and not (place / "system").exists():
        chosen = [] if method == "links" else ["--method", method]
        found.append(["recursivemas", "train", f"recipes/{world}.yaml", *chosen, "--set", f"output={base}"])
    if not (place / "eval" / "report.json").exists():
        system = world if method == "untrained" else str(place / "system")
        asked = ["--task", world, "-n", str(NUM_QUESTIONS), "--batch-size", "250"]
        arms = ["--arms", ARMS.get(method, "solo"), "--rounds", "1" if method not in ARMS else "3"]
        found.append(["recursivemas", "eval", system, *asked, *arms, "--out", str(place / "eval")])
    return found


def type_in(command: list[str], world: str) -> None:
    """Run a command, and keep it beside its result."""
    line = shlex.join(command)
    print(line, flush=True)
    kept = PLACE / world / "methods" / "command.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as stream:
        stream.write(line + "\n")
    executable = Path(sys.executable).with_name(command[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(executable), *command[1:]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{line}\nfailed: {done.stderr.strip().splitlines()[-1:]}")


# --- learning rates ---------------------------------------------------------------------------------------------------


def place_of_rate(world: str, method: str, rate: float) -> Path:
    return PLACE / world / "rates" / f"{method} {rate:g}"


def search(world: str, methods: Sequence[str]) -> None:
    """Train every baseline with every rate, and print how each does on validation."""
    for method in methods:
        for rate in SEARCHED.get(method, ()):
            place = place_of_rate(world, method, rate)
            settings = [f"method.{method}.lr={rate:g}", f"output={place}"]
            if not (place / method / "system").exists():
                given = [part for each in settings for part in ("--set", each)]
                type_in(["recursivemas", "train", f"recipes/{world}.yaml", "--method", method, *given], world)
            print(f"{world} {method} lr {rate:g}: validation {validation_of(place / method):.4f}", flush=True)


def validation_of(place: Path) -> float:
    """The best score on validation: of the steps of one model, or of the wordings of a text system."""
    report = json.loads((place / "system" / "system.json").read_text())["training"]["report"]
    return max(report["validation"].values())


def rates_table(world: str) -> str:
    rows = []
    for method, rates in SEARCHED.items():
        for rate in rates:
            place = place_of_rate(world, method, rate) / method
            is_there = (place / "system" / "system.json").exists()
            rows.append([method, f"{rate:g}", f"{validation_of(place):.3f}".replace("0.", ".") if is_there else "–"])
    return table(["method", "learning rate", "validation"], rows)


# --- tables -----------------------------------------------------------------------------------------------------------


def score(arm: dict[str, Any]) -> str:
    return f"{arm['accuracy']:.3f} ± {arm['stderr']:.3f}".replace("0.", ".")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def world_table(world: str) -> str:
    """Every method that has been trained and evaluated in a world."""
    rows = []
    for method in ("untrained", *METHODS):
        report_file = place_of(world, method) / "eval" / "report.json"
        if not report_file.exists():
            rows.append([method, *["–"] * 8])
            continue
        report = json.loads(report_file.read_text())
        arms = {each["arm"] + (f"/{each['variant']}" if each["variant"] else ""): each for each in report["arms"]}
        controls = {name: arms.pop(name) for name in ("none", "shuffled") if name in arms}
        said = "; ".join(f"{name} {score(each)}" for name, each in controls.items())
        if method == "untrained":
            rows += [
                [f"untrained, {name}", *["0", "0 %", "", "", "", ""], score(each), said] for name, each in arms.items()
            ]
            continue
        cost = json.loads((place_of(world, method) / "cost.json").read_text())
        best = max(arms, key=lambda name: arms[name]["accuracy"])
        name = method if len(arms) == 1 else f"{method} ({best.removeprefix('text/')})"
        positions = cost["positions_with_gradient"] + cost["positions_without_gradient"]
        rows.append(
            [
                name,
                f"{cost['num_trained']:,}",
                f"{cost['trained_share']:.1%}".replace("%", " %"),
                f"{cost['peak_memory_bytes'] / 1e6:,.0f} MB",
                f"{cost['processor_seconds']:,.0f} s",
                f"{positions / 1e6:.1f} M",
                f"{cost['flops']:.1e}",
                score(arms[best]),
                said,
            ]
        )
    header = [
        "method",
        "trained",
        "of all",
        "peak memory",
        "processor time",
        "positions",
        "FLOPs",
        "accuracy",
        "controls",
    ]
    return table(header, rows)


def paper_table() -> str:
    """The paper's configurations, by calculation."""
    rows = []
    for name in PAPER:
        file = Path("recipes/paper") / f"{name}.yaml"
        recipe = parse(Recipe, read_yaml(file), where=str(file))
        team = team_of(recipe)
        for method in METHODS:
            found = estimate_method(method, recipe, team=team)
            price = 1000 * found.flops_per_question / FLOPS_PER_SECOND / 3600 * PRICE_PER_HOUR
            rows.append(
                [
                    name if method == METHODS[0] else "",
                    method,
                    f"{found.trained_parameters / 1e6:,.1f} M",
                    f"{100 * found.trained_share:.2f} %",
                    f"{found.peak_memory_bytes / 1e9:.1f} GB",
                    f"{found.flops_per_question:.1e}",
                    f"{price:.2f}",
                ]
            )
    header = ["system", "method", "trained", "of all", "peak memory", "FLOPs a question", "price of 1,000 questions"]
    return table(header, rows)


def write(names: Sequence[str]) -> None:
    """Put the tables between their markers."""
    text = DOCUMENT.read_text()
    for name in names:
        made = {f"{name} cost": paper_table() if name == "paper" else world_table(name)}
        if name == SEARCHED_IN:
            made[f"{name} rates"] = rates_table(name)
        for kind, lines in made.items():
            start, end = f"<!-- table: {kind} -->", "<!-- end -->"
            if start not in text:
                raise SystemExit(f"{DOCUMENT} has no marker {start}")
            head, tail = text.split(start)
            text = f"{head}{start}\n{lines}\n{end}{tail.split(end, 1)[1]}"
    DOCUMENT.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*WORLDS, "paper"], help="ward, relay, paper")
    parser.add_argument("--methods", default=",".join(("untrained", *METHODS)), help="separated by commas")
    parser.add_argument("--only", choices=["search", "run", "write"], help="do one of the steps")
    given = parser.parse_args()
    worlds = [name for name in given.names if name in WORLDS]
    if given.only == "search":
        search(SEARCHED_IN, given.methods.split(","))
    if given.only in (None, "run"):
        for world in worlds:
            for method in given.methods.split(","):
                for command in commands(world, method):
                    type_in(command, world)
    if given.only in (None, "write"):
        write(given.names)


if __name__ == "__main__":
    main()
