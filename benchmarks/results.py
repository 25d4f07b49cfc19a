"""Trains and evaluates everything that docs/results.md reports, and writes its tables and figures.

    python benchmarks/results.py                   all of it, on two cores: hours; stopped, it goes on where it was
    python benchmarks/results.py ward relay        only what concerns some worlds
    python benchmarks/results.py panel --only write    write the tables of a world anew from what is there
    python benchmarks/results.py --only time       speed, one evaluation after the other; let nothing else run

Every run is made by the command that a reader would type; it is printed, and kept beside its result in
runs/results/NAME/command.txt. A run is an *aligned* system (inner links and alignment, shared by all runs with the same
links) and an outer loop that starts from it. Tables stand between markers in docs/results.md; the text around them is
written by hand.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from recursivemas.evaluation.metrics import mean, paired_difference
from recursivemas.worlds.panel.cases import SPECIALISTS

PLACE = Path("runs/results")
DOCUMENT = Path("docs/results.md")
FIGURES = Path("docs/figures")
NUM_QUESTIONS = 4000
EVERY_ARM = "latent,text,solo,none,zero,shuffled,random-link,no-feedback"
LINK_ARMS = "latent,zero,shuffled,no-feedback"
PANEL_OF_A_ROLE = ",".join(f"{kind}:{role}" for kind in ("shuffled", "none") for role in SPECIALISTS)
PANEL_LINK_ARMS = f"latent,zero,shuffled,{PANEL_OF_A_ROLE}"
PANEL_ALONE = ",".join(f"solo:{role}" for role in SPECIALISTS)
PANEL_ARMS = f"latent,text,{PANEL_ALONE},none,zero,shuffled,{PANEL_OF_A_ROLE},random-link"
SPEED_PLACES = {"ward": "speed", "panel": "speed panel"}
"""Worlds whose speed is measured, and where below the results."""
CONSULT_ARMS = "latent,text,solo,solo:expert,none,zero,shuffled,random-link"
CONSULT_LINK_ARMS = "latent,zero,shuffled"
CONSULT_STEPS = ((1, "short"), (2, "short"), (4, "short"), (7, "graded"))
"""Latent steps that are compared in consult, with the text whose first tokens links are aligned on."""
DESK_ARMS = "latent,text,solo,solo:reflector,none,zero,shuffled,random-link,no-feedback,no-tools"
DESK_LINK_ARMS = "latent,zero,shuffled"
DESIGNS = ("1-layer", "res-1-layer", "2-layer", "res-2-layer", "ln-res-2-layer")
UNSTOPPED = ("outer.max_loss_ratio=null",)


@dataclass(frozen=True)
class Run:
    """One trained system and how it is evaluated."""

    world: str
    name: str
    links: tuple[str, ...] = ()
    """Settings that the stages inner and alignment see as well."""
    outer: tuple[str, ...] = ()
    """Settings of the outer loop alone."""
    stage: str = "all"
    """`aligned`: there is no outer loop. `shipped`: the bundled system is evaluated, which the recipe has made."""
    of: str = ""
    """The run whose trained system is evaluated, if it is another's."""
    arms: str = "latent"
    rounds: str = "1,2,3"
    options: tuple[str, ...] = ()
    """Further options of the evaluation."""

    @property
    def place(self) -> Path:
        return PLACE / self.world / self.name

    @property
    def aligned(self) -> Path:
        """Where the links stand before the outer loop; runs that differ in the outer loop only share it."""
        return PLACE / self.world / ("aligned" + "".join(f" {each}" for each in self.links)).replace("/", "-")

    def commands(self) -> list[list[str]]:
        """What is to be typed, in order; a command whose result is there is left out."""
        recipe = ["recursivemas", "train", f"recipes/{self.world}.yaml"]
        aligned, trained = self.aligned / "system", PLACE / self.world / (self.of or self.name) / "system"
        found = []
        if self.stage == "shipped":
            aligned = trained = Path(self.world)
        elif not aligned.exists():
            settings = [*self.links, f"output={self.aligned}", "save_dtype=float32"]
            found.append([*recipe, "--stage", "inner,alignment", *_set(settings)])
        if self.stage == "aligned":
            trained = aligned
        elif self.stage == "all" and not trained.exists():
            links = [each for each in self.links if not each.startswith("system=")]
            settings = [*links, *self.outer, f"system={aligned}", "links.start=given", f"output={self.place}"]
            found.append([*recipe, "--stage", "outer", *_set(settings)])
        if not (self.place / "eval" / "report.json").exists():
            grouped = ["--by", "hops"] if self.world == "relay" else []
            asked = ["--task", self.world, "-n", str(NUM_QUESTIONS), "--batch-size", "250", *grouped]
            chosen = ["--arms", self.arms, "--rounds", self.rounds, *self.options, "--out", f"{self.place}/eval"]
            found.append(["recursivemas", "eval", str(trained), *asked, *chosen])
        return found


def _set(settings: Sequence[str]) -> list[str]:
    return [part for each in settings for part in ("--set", each)]


def _design(name: str) -> tuple[str, ...]:
    return (f"links.design={name}",) if name != "res-2-layer" else ()


def _steps(m: int, variant: str) -> tuple[str, ...]:
    """Settings for m latent steps, aligned on the first m tokens of a kind of text."""
    return f"num_latent_steps={m}", f"alignment.num_tokens={m}", f"variant={variant}"


def _anew(world: str) -> tuple[str, ...]:
    """Settings for another world, with agents of its own."""
    return "world.seed=1", f"system=runs/worlds/{world}-1/system"


def _phase(num_rounds: int, num_train_steps: int) -> str:
    return f"{{num_rounds: {num_rounds}, num_train_steps: {num_train_steps}}}"


RUNS = [
    *(
        run
        for world in ("ward", "relay")
        for run in (
            Run(world, "seed 0", arms=EVERY_ARM),
            # Text, and whatever else does not know the links, answers as it does beside seed 0.
            Run(world, "seed 1", ("seed=1",), arms=LINK_ARMS),
            Run(world, "seed 2", ("seed=2",), arms=LINK_ARMS),
        )
    ),
    *(Run(world, "aligned only", stage="aligned") for world in ("ward", "relay")),
    *(
        Run(world, "drawn anew", ("world.seed=1", f"system=runs/worlds/{world}-1/system"), arms=EVERY_ARM)
        for world in ("ward", "relay")
    ),
    *(
        # The trainer would stop one of them as diverged, and keep the weights it started from.
        Run(world, f"design {name}", _design(name), UNSTOPPED if (world, name) == ("relay", "res-1-layer") else ())
        for world in ("ward", "relay")
        for name in DESIGNS
        if _design(name)
    ),
    *(
        Run(world, f"design {name}, aligned only", _design(name), stage="aligned")
        for world in ("ward", "relay")
        for name in DESIGNS
        if _design(name)
    ),
    *(Run("ward", f"{m} steps", (f"num_latent_steps={m}", f"alignment.num_tokens={m}")) for m in (1, 2, 4)),
    # At the recipe's 1e-3 its validation falls from the start.
    Run("ward", "9 steps, graded", ("num_latent_steps=9", "variant=graded"), ("outer.lr=3e-4",)),
    *(
        Run("ward", f"trained on {n}", outer=(f"outer.num_rounds={n}",), rounds="1,2,3,4")
        for n in (1, 2, 4)
    ),
    Run("ward", "trained on 3", of="seed 0", rounds="1,2,3,4"),
    Run("ward", "message outer", ("message=outer",)),
    Run("ward", "outer links alone", outer=("outer.trained=outer",)),
    Run("ward", "teacher", outer=("outer.latent_source=teacher",)),
    Run("ward", "every round", outer=("outer.anchor=0",)),
    Run("ward", "last round, anchor", outer=("outer.round_weights=last",)),
    Run("ward", "last round", outer=("outer.round_weights=last", "outer.anchor=0")),
    Run("ward", "distillation", outer=("outer.distillation=1",)),
    Run("ward", "curriculum", outer=(f"outer.curriculum=[{_phase(1, 100)}, {_phase(2, 100)}]",)),
    Run("relay", "last round", outer=("outer.round_weights=last",)),
    Run("panel", "seed 0", arms=PANEL_ARMS),
    # That rounds do not pay is shown with the first seed; the claims are about one.
    Run("panel", "seed 1", ("seed=1",), arms=PANEL_LINK_ARMS, rounds="1"),
    Run("panel", "seed 2", ("seed=2",), arms=PANEL_LINK_ARMS, rounds="1"),
    Run("panel", "drawn anew", _anew("panel"), arms=PANEL_ARMS, rounds="1"),
    Run("panel", "aligned only", stage="aligned", rounds="1"),
    *(Run("panel", f"design {name}", _design(name), rounds="1") for name in DESIGNS if _design(name)),
    *(
        Run("panel", f"design {name}, aligned only", _design(name), stage="aligned", rounds="1")
        for name in DESIGNS
        if _design(name)
    ),
    Run("panel", "1 steps", _steps(1, "short"), rounds="1"),
    Run("panel", "4 steps", _steps(4, "graded"), rounds="1"),
    Run("panel", "8 steps", _steps(8, "long"), rounds="1"),
    Run("panel", "trained on 2", outer=("outer.num_rounds=2", "outer.lr_ratios={}")),
    Run("panel", "trained on 3", outer=("outer.num_rounds=3", "outer.lr_ratios={}")),
    Run("panel", "one answer", outer=("outer.distillation=0",), rounds="1"),
    Run("panel", "outer links alone", outer=("outer.trained=outer",), rounds="1"),
    *(
        run
        for world in ("consult", "consult-blind")
        for run in (
            Run(world, "seed 0", arms=CONSULT_ARMS, rounds="1,2"),
            Run(world, "seed 1", ("seed=1",), arms=CONSULT_LINK_ARMS, rounds="1"),
            Run(world, "seed 2", ("seed=2",), arms=CONSULT_LINK_ARMS, rounds="1"),
            Run(world, "drawn anew", _anew(world), arms=CONSULT_ARMS, rounds="1"),
            Run(world, "aligned only", stage="aligned", rounds="1"),
        )
    ),
    *(Run("consult", f"design {name}", _design(name), rounds="1") for name in DESIGNS if _design(name)),
    *(
        Run("consult", f"design {name}, aligned only", _design(name), stage="aligned", rounds="1")
        for name in DESIGNS
        if _design(name)
    ),
    *(
        run
        for m, variant in CONSULT_STEPS
        for run in (
            Run("consult", f"{m} steps, {variant}", _steps(m, variant), rounds="1"),
            Run("consult", f"{m} steps, {variant}, aligned only", _steps(m, variant), stage="aligned", rounds="1"),
        )
    ),
    Run("consult", "trained on 2", outer=("outer.num_rounds=2",), rounds="1,2"),
    Run("consult", "outer links alone", outer=("outer.trained=outer",), rounds="1"),
    Run("desk", "seed 0", stage="shipped", arms=DESK_ARMS, rounds="1,2"),
    Run("desk", "seed 1", ("seed=1",), arms=DESK_LINK_ARMS, rounds="1,2"),
    Run("desk", "seed 2", ("seed=2",), arms=DESK_LINK_ARMS, rounds="1,2"),
    Run("desk", "drawn anew", _anew("desk"), arms=DESK_ARMS, rounds="1,2"),
    Run(
        "desk",
        "no call twice",
        stage="shipped",
        arms="latent,text,solo",
        rounds="1,2",
        options=("--no-repeated-calls",),
    ),
    Run("desk", "aligned only", stage="aligned", rounds="1,2"),
]  # fmt: skip


class Shop:
    """Makes runs, several at a time; what two runs share is made once."""

    def __init__(self) -> None:
        self._locks: dict[Path, Lock] = {}
        self._lock = Lock()

    def make(self, run: Run) -> None:
        with self._lock:
            own = self._locks.setdefault(run.aligned, Lock())
        with own:  # one run at a time aligns; the others find it done
            if run.stage != "shipped" and not (run.aligned / "system").exists():
                _type(run.commands()[0], run.aligned)
        while commands := run.commands():
            _type(commands[0], run.place)


def _type(command: list[str], place: Path) -> None:
    line = shlex.join(command)
    print(line, flush=True)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "command.txt").open("a") as stream:
        stream.write(line + "\n")
    executable = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(executable), *command[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{line}\nfailed: {done.stderr.strip().splitlines()[-1:]}")


# --- what came out ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The report of a run, and its answers for paired comparisons."""

    run: Run

    def __post_init__(self) -> None:
        self.report: dict[str, Any] = json.loads((self.run.place / "eval" / "report.json").read_text())
        self.scores: dict[str, dict[str, float]] = {}
        self._read_scores(self.run.place)
        if self.run.arms in (LINK_ARMS, PANEL_LINK_ARMS, CONSULT_LINK_ARMS, DESK_LINK_ARMS):
            known = set(self.labels())
            first = json.loads((PLACE / self.run.world / "seed 0" / "eval" / "report.json").read_text())
            self.report["arms"] += [arm for arm in first["arms"] if _label(arm) not in known]
            self._read_scores(PLACE / self.run.world / "seed 0")

    def _read_scores(self, place: Path) -> None:
        for line in (place / "eval" / "answers.jsonl").read_text().splitlines()[1:]:
            answer = json.loads(line)
            if answer["id"] not in self.scores.get(answer["arm"], {}):
                self.scores.setdefault(answer["arm"], {})[answer["id"]] = answer["score"]

    def arm(self, label: str, rounds: int) -> dict[str, Any]:
        arms = self.report["arms"]
        return next(each for each in arms if (_label(each), each["rounds"]) == (label, rounds))

    def labels(self) -> list[str]:
        return list(
            dict.fromkeys(arm["arm"] + (f"/{arm['variant']}" if arm["variant"] else "") for arm in self.report["arms"])
        )

    def difference(self, a: str, b: str) -> Any:
        ids = sorted(self.scores[a])
        return paired_difference([self.scores[a][each] for each in ids], [self.scores[b][each] for each in ids])

    def has(self, label: str, rounds: int) -> bool:
        return f"{label} r={rounds}" in self.scores


def outcome(world: str, name: str) -> Outcome | None:
    """What came out of a run; None if it has not been made."""
    run = next(each for each in RUNS if (each.world, each.name) == (world, name))
    return Outcome(run) if (run.place / "eval" / "report.json").exists() else None


def _label(arm: dict[str, Any]) -> str:
    return arm["arm"] if arm["variant"] is None else f"{arm['arm']}/{arm['variant']}"


def score(value: float, stderr: float | None = None) -> str:
    text = f"{value:.3f}".replace("0.", ".", 1)
    return text if stderr is None else f"{text} ± {f'{stderr:.3f}'.replace('0.', '.', 1)}"


def signed(difference: Any) -> str:
    return f"{difference.value:+.3f} ± {difference.stderr:.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_rounds(found: Outcome | None, rounds: Sequence[int] = (1, 2, 3), label: str = "latent") -> list[str]:
    if found is None:
        return ["–"] * len(rounds)
    arms = [found.arm(label, each) for each in rounds]
    return [score(arm["accuracy"], arm["stderr"]) for arm in arms]


# --- tables -----------------------------------------------------------------------------------------------------------


def main_table(world: str) -> str:
    """Every arm of the shipped system."""
    found = outcome(world, "seed 0")
    if found is None:
        return "not made yet"
    rows = []
    for label in found.labels():
        arms = [found.arm(label, each) if found.has(label, each) else None for each in (1, 2, 3)]
        cells = ["" if arm is None else score(arm["accuracy"], arm["stderr"]) for arm in arms]
        last = next(arm for arm in reversed(arms) if arm is not None)
        rows.append([label, *cells, f"{last['generated_tokens']:.1f}", f"{last['latent_steps_total']:.0f}"])
    # Where one round is enough, that is all there is to reach.
    best = found.report["optimum"]
    optimum = [score(best.get(str(each), best["1"])) for each in (1, 2, 3)]
    rows.append(["*optimum*", *optimum, "", ""])
    return table(["arm", "r = 1", "r = 2", "r = 3", "generated tokens", "latent steps"], rows)


def seeds_table(world: str) -> str:
    """The claims, for every link seed and for another world with other agents."""
    rows = []
    for name in ("seed 0", "seed 1", "seed 2", "drawn anew"):
        found = outcome(world, name)
        if found is None:
            rows.append([name, *["–"] * 9])
            continue
        texts = [label for label in found.labels() if label.startswith("text")]
        best = max(texts, key=lambda label: found.arm(label, 3)["accuracy"])
        against = found.difference("latent r=3", f"{best} r=3")
        rises = [found.difference(f"latent r={b}", f"latent r={a}") for a, b in ((1, 2), (2, 3))]
        optimum = {int(rounds): value for rounds, value in found.report["optimum"].items()}
        way = (found.arm("latent", 3)["accuracy"] - optimum[1]) / (optimum[3] - optimum[1])
        solo = found.arm("solo", 1)["accuracy"]
        worst = max(found.arm(each, 3)["accuracy"] - solo for each in ("none", "zero", "shuffled"))
        cut = [found.arm("no-feedback", each)["accuracy"] - found.arm("latent", 1)["accuracy"] for each in (2, 3)]
        rows.append(
            [
                name,
                *[score(found.arm("latent", each)["accuracy"]) for each in (1, 2, 3)],
                " / ".join(map(signed, rises)),
                f"{score(found.arm(best, 3)['accuracy'])} ({best.removeprefix('text/')})",
                f"{signed(against)}, p {'< .001' if against.p_value < 0.001 else f'= {against.p_value:.3f}'}",
                f"{100 * way:.0f} %",
                f"{worst:+.3f}",
                f"{max(cut):+.3f}",
            ]
        )
    header = ["", "r = 1", "r = 2", "r = 3", "gain of round 2 / 3", "best text, r = 3", "latent − best text"]
    return table([*header, "of the way", "controls − solo", "no feedback − r = 1"], rows)


def ceilings_of(name: str) -> dict[str, float] | None:
    """What can be known on the questions of a run of panel (benchmarks/panel_ceilings.py); None if not computed yet."""
    file = PLACE / "panel" / ("ceilings-1.json" if name == "drawn anew" else "ceilings-0.json")
    found: dict[str, float] | None = json.loads(file.read_text()) if file.exists() else None
    return found


def panel_claims_table() -> str:
    """panel: the claims, for every link seed and for another world with other agents."""
    rows = []
    for name in ("seed 0", "seed 1", "seed 2", "drawn anew"):
        found, known = outcome("panel", name), ceilings_of(name)
        if found is None or known is None:
            rows.append([name, *["–"] * 9])
            continue
        latent = found.arm("latent", 1)
        texts = [label for label in found.labels() if label.startswith("text")]
        best = max(texts, key=lambda label: found.arm(label, 1)["accuracy"])
        against = found.difference("latent r=1", f"{best} r=1")
        alone = max(known[f"{role} alone"] for role in SPECIALISTS)
        gained = (latent["accuracy"] - alone) / (known["optimum"] - alone)
        tokens = latent["generated_tokens"] / found.arm(best, 1)["generated_tokens"]
        rounds = 3 if name == "seed 0" else 1  # controls are run with the most rounds of a run
        cut = {
            kind: [found.arm(f"{kind}:{role}", rounds)["accuracy"] for role in SPECIALISTS]
            for kind in ("shuffled", "none")
        }
        rows.append(
            [
                name,
                score(latent["accuracy"], latent["stderr"]),
                score(known["optimum"]),
                score(alone),
                f"{100 * gained:.0f} %",
                f"{score(found.arm(best, 1)['accuracy'])} ({best.removeprefix('text/')})",
                f"{signed(against)}, p {'< .001' if against.p_value < 0.001 else f'= {against.p_value:.3f}'}",
                f"{100 * tokens:.0f} %",
                " / ".join(score(value) for value in cut["shuffled"]),
                " / ".join(score(value) for value in cut["none"]),
            ]
        )
    header = ["", "latent", "optimum", "best specialist alone", "of the gain", "best text", "latent − best text"]
    return table([*header, "its tokens", "one shuffled", "one missing"], rows)


def panel_ceilings_table() -> str:
    """panel: what each protocol of text could give at best, and what the agents make of it."""
    rows = []
    known = {name: ceilings_of(name) for name in ("seed 0", "drawn anew")}
    found = {name: outcome("panel", name) for name in known}
    for variant in ("short", "graded", "long"):
        cells = []
        for name in known:
            ceiling, run = known[name], found[name]
            cells.append("–" if ceiling is None else score(ceiling[f"fitted reader of {variant}"]))
            cells.append("–" if run is None else score(run.arm(f"text/{variant}", 1)["accuracy"]))
        rows.append([f"text, {variant} reports", *cells])
    for label, reader in (("agents' own beliefs, multiplied", "agents' own beliefs"), ("all findings", "optimum")):
        cells = []
        for name in known:
            ceiling, run = known[name], found[name]
            cells.append("–" if ceiling is None else score(ceiling[reader]))
            is_latent = reader == "agents' own beliefs" and run is not None
            cells.append(score(run.arm("latent", 1)["accuracy"]) if is_latent and run is not None else "")
        rows.append([label, *cells])
    return table(["", "best reader", "agents", "drawn anew: best reader", "agents"], rows)


def panel_designs_table() -> str:
    rows = []
    for design in DESIGNS:
        is_default = design == "res-2-layer"
        before = outcome("panel", "aligned only" if is_default else f"design {design}, aligned only")
        after = outcome("panel", "seed 0" if is_default else f"design {design}")
        rows.append([design, *by_rounds(before, (1,)), *by_rounds(after, (1,))])
    return table(["design", "aligned", "trained"], rows)


def hops_table(name: str = "seed 0") -> str:
    """relay: accuracy by the number of hops, and within the hops that r rounds allow."""
    found = outcome("relay", name)
    if found is None:
        return "not made yet"
    rows = []
    for label in ("latent", "text/short", "text/full"):
        for rounds in (1, 2, 3):
            groups = found.report["groups"]
            own = [each for each in groups if (_label(each), each["rounds"]) == (label, rounds)]
            within = [each for each in own if each["hops"] <= 3 * rounds]
            share = sum(each["accuracy"] * each["n"] for each in within) / sum(each["n"] for each in within)
            rows.append([label, str(rounds), *[score(each["accuracy"])[:4] for each in own], score(share)])
    return table(["arm", "rounds", *[f"{hops}" for hops in range(1, 10)], "within reach"], rows)


def compare_table(world: str, rows: Sequence[tuple[str, str]], rounds: Sequence[int] = (1, 2, 3)) -> str:
    header = ["", *[f"r = {each}" for each in rounds]]
    return table(header, [[label, *by_rounds(outcome(world, name), rounds)] for label, name in rows])


def designs_table(world: str) -> str:
    rows = []
    for design in DESIGNS:
        is_default = design == "res-2-layer"
        before = outcome(world, "aligned only" if is_default else f"design {design}, aligned only")
        after = outcome(world, "seed 0" if is_default else f"design {design}")
        rows.append([design, *by_rounds(before), *by_rounds(after)])
    return table(["design", *[f"aligned, r = {r}" for r in (1, 2, 3)], *[f"trained, r = {r}" for r in (1, 2, 3)]], rows)


def grid_table(world: str) -> str:
    found = {n: outcome(world, f"trained on {n}") for n in (1, 2, 3, 4)}
    if None in found.values():
        return "not made yet"
    draw_grid(world, {n: each for n, each in found.items() if each is not None})
    rows = [[f"trained on {n}", *by_rounds(each, (1, 2, 3, 4))] for n, each in found.items()]
    caption = f"\n\n![training rounds against inference rounds in {world}](figures/rounds-{world}.svg)"
    return table(["", *[f"run with {each}" for each in (1, 2, 3, 4)]], rows) + caption


def gradients_table(world: str) -> str:
    """Median gradient of a sample at each message, at the end of training, by what is supervised."""
    kinds = {
        "every round, anchor": "seed 0", "every round": "every round",
        "last round, anchor": "last round, anchor", "last round": "last round",
    }  # fmt: skip
    curves = {label: _gradients(world, name) for label, name in kinds.items() if outcome(world, name) is not None}
    if not curves:
        return "not made yet"
    draw_gradients(world, curves)
    places = list(next(iter(curves.values())))
    rows = []
    for label, curve in curves.items():
        cells = [f"{sorted(values)[len(values) // 2]:.1e}" for values in (curve[place][-10:] for place in places)]
        rows.append([label, *cells, *by_rounds(outcome(world, kinds[label]))])
    header = ["supervised", *[f"{edge}, r = {r}" for edge, r in places], *[f"accuracy, r = {r}" for r in (1, 2, 3)]]
    return table(header, rows) + f"\n\n![gradients at messages in {world}](figures/gradients-{world}.svg)"


def _gradients(world: str, name: str) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for line in (PLACE / world / name / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            match = re.fullmatch(r"gradient/message/(.+)/round (\d)/median", key)
            if match:
                found.setdefault((match[1], int(match[2])), []).append(value)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def movement_table(world: str) -> str:
    """How far every link went in the outer loop, relative to its own norm."""
    rows = []
    for name in ("seed 0", "seed 1", "seed 2"):
        place = PLACE / world / name / "system" / "system.json"
        if place.exists():
            moved = json.loads(place.read_text())["training"]["stages"]["outer"]["moved"]
            rows.append([name, *[f"{value:.3f}" for value in moved.values()]])
            header = ["", *moved]
    return table(header, rows) if rows else "not made yet"


def speed_table(world: str = "ward", texts: Sequence[str] = ("short", "graded"), most: int = 3) -> str:
    """Time of an answer at r = 1, 2, 3, over several evaluations made one after the other."""
    found = [json.loads(each.read_text()) for each in sorted((PLACE / SPEED_PLACES[world]).glob("*/report.json"))]
    if not found:
        return "not made yet"
    rows = []
    for size in sorted({report["settings"]["batch_size"] for report in found}):
        reports = [report for report in found if report["settings"]["batch_size"] == size]
        for variant in texts:
            cells = []
            for rounds in range(1, most + 1):
                ratios, ours, theirs = [], [], []
                for report in reports:
                    arms = {(a["arm"], a["variant"], a["rounds"]): a["seconds_per_question"] for a in report["arms"]}
                    ours.append(1e3 * arms["latent", None, rounds])
                    theirs.append(1e3 * arms["text", variant, rounds])
                    ratios.append(theirs[-1] / ours[-1])
                middle = mean(ratios)
                spread = f" ± {middle.stderr:.2f}" if middle.n > 1 else ""
                times = f"{mean(theirs).value:.2f} / {mean(ours).value:.2f} ms"
                cells.append(f"{middle.value:.2f}{spread} ({times})")
            rows.append([str(size), f"text/{variant}", *cells])
    rounds_heard = [f"r = {each}" for each in range(1, most + 1)]
    return table(["batch", "latent is so many times as fast as", *rounds_heard], rows)


def consult_table(world: str) -> str:
    """Every arm of consult at r = 1, with what is measured in its answers, and its accuracy at r = 2."""
    found = outcome(world, "seed 0")
    if found is None:
        return "not made yet"
    learner, expert = (found.arm(label, 1)["accuracy"] for label in ("solo", "solo:expert"))
    rows = []
    for label in found.labels():
        rounds = [each for each in (1, 2) if found.has(label, each)]
        first = found.arm(label, rounds[0])
        cells = [score(found.arm(label, each)["accuracy"], found.arm(label, each)["stderr"]) for each in rounds]
        share = f"{100 * (first['accuracy'] - learner) / (expert - learner):.0f} %"
        measures = [f"{first['measures'][name]['mean']:.2f}".removeprefix("0") for name in ("pairs", "divergence")]
        costs = [f"{first['generated_tokens']:.1f}", f"{first['latent_steps_total']:.0f}"]
        rows.append([label, cells[0], share, *measures, *costs, *([*cells[1:], ""][:1])])
    rows.append(["*optimum*", score(found.report["optimum"]["1"]), "", "1.00", "", "", "", ""])
    header = ["arm", "accuracy", "of the gap", "pairs right", "KL", "generated tokens", "latent steps", "r = 2"]
    return table(header, rows)


def consult_seeds_table(world: str) -> str:
    """The claims, for every link seed and for another world with other agents."""
    rows = []
    for name in ("seed 0", "seed 1", "seed 2", "drawn anew"):
        found = outcome(world, name)
        if found is None:
            rows.append([name, *["–"] * 8])
            continue
        ours, learner, expert = (found.arm(each, 1)["accuracy"] for each in ("latent", "solo", "solo:expert"))
        against = [found.difference("latent r=1", f"text/{each} r=1") for each in ("short", "graded", "whole")]
        lower = f"{against[1].value - 1.96 * against[1].stderr:+.3f}"
        controls = ("none", "zero", "shuffled")
        worst = max(arm["accuracy"] for arm in found.report["arms"] if arm["arm"] in controls)
        share = f"{100 * (ours - learner) / (expert - learner):.0f} %"
        p_value = "< .001" if against[0].p_value < 0.001 else f"= {against[0].p_value:.3f}"
        differences = [f"{signed(against[0])}, p {p_value}", f"{signed(against[1])} (from {lower})", signed(against[2])]
        rows.append([name, *map(score, (learner, expert, ours)), share, *differences, f"{worst - learner:+.3f}"])
    text = [f"latent − {each}" for each in ("short", "graded", "whole")]
    return table(["", "learner", "expert", "latent", "of the gap", *text, "controls − learner"], rows)


def consult_measures(found: Outcome | None) -> list[str]:
    """Accuracy, pairs and KL of the latent arm at r = 1."""
    if found is None:
        return ["–"] * 3
    arm = found.arm("latent", 1)
    measures = [f"{arm['measures'][name]['mean']:.2f}".removeprefix("0") for name in ("pairs", "divergence")]
    return [score(arm["accuracy"], arm["stderr"]), *measures]


def consult_designs_table() -> str:
    rows = []
    for design in DESIGNS:
        is_default = design == "res-2-layer"
        before = outcome("consult", "aligned only" if is_default else f"design {design}, aligned only")
        after = outcome("consult", "seed 0" if is_default else f"design {design}")
        rows.append([design, *consult_measures(before), *consult_measures(after)])
    names = ("accuracy", "pairs right", "KL")
    return table(["design", *[f"aligned: {each}" for each in names], *[f"trained: {each}" for each in names]], rows)


def consult_steps_table() -> str:
    rows = []
    for m, variant in CONSULT_STEPS:
        before, after = (outcome("consult", f"{m} steps, {variant}{end}") for end in (", aligned only", ""))
        rows.append([f"m = {m}, {variant}", *consult_measures(before), *consult_measures(after)])
    names = ("accuracy", "pairs right", "KL")
    return table(["", *[f"aligned: {each}" for each in names], *[f"trained: {each}" for each in names]], rows)


def consult_cost_table() -> str:
    """Operations and time of an answer (benchmarks/consult_cost.py)."""
    file = PLACE / "consult" / "cost.json"
    if not file.exists():
        return "not made yet"
    rows = [
        [
            str(each["batch_size"]),
            each["arm"],
            f"{each['mflop']:.1f}",
            f"{each['flop_share']:.2f}",
            f"{each['milliseconds']:.2f}",
            f"{each['time_share']:.2f} ± {each['time_share_stderr']:.2f}",
            f"{each['generated_tokens']:.0f}",
        ]
        for each in json.loads(file.read_text())
    ]
    header = ["batch", "", "MFLOP", "of the expert's", "ms", "of the expert's", "generated tokens"]
    return table(header, rows)


def desk_cells(arm: dict[str, Any]) -> list[str]:
    """The rank of the search that hits, and the calls of an arm per question."""
    measured = {name: each["mean"] for name, each in arm["measures"].items()}
    found = " / ".join(score(measured[f"found within {most}"]) for most in (1, 2, 3))
    names = ("searches", "wrong searches", "repeated searches", "programs", "wrong programs")
    return [found, *[f"{measured[name]:.2f}" for name in names]]


DESK_CELLS = ("found by search 1 / 2 / 3", "searches", "wrong", "repeated", "programs", "wrong")


def desk_table() -> str:
    """Every arm of the shipped system, with its calls in the last round that it has."""
    found = outcome("desk", "seed 0")
    if found is None:
        return "not made yet"
    rows = []
    for label in found.labels():
        arms = [found.arm(label, each) if found.has(label, each) else None for each in (1, 2)]
        cells = ["" if arm is None else score(arm["accuracy"], arm["stderr"]) for arm in arms]
        last = next(arm for arm in reversed(arms) if arm is not None)
        costs = [f"{last['generated_tokens']:.1f}", f"{last['latent_steps_total']:.0f}"]
        rows.append([label, *cells, *desk_cells(last), *costs])
    best = found.report["optimum"]
    rows.append(["*optimum*", *[score(best[str(each)]) for each in (1, 2)], *[""] * (len(DESK_CELLS) + 2)])
    return table(["arm", "r = 1", "r = 2", *DESK_CELLS, "generated tokens", "latent steps"], rows)


def desk_seeds_table() -> str:
    """The claims, for every link seed and for another world with other agents."""
    rows = []
    for name in ("seed 0", "seed 1", "seed 2", "drawn anew"):
        found = outcome("desk", name)
        if found is None:
            rows.append([name, *["–"] * 8])
            continue
        ours = found.arm("latent", 2)
        texts = [label for label in found.labels() if label.startswith("text")]
        best = max(texts, key=lambda label: found.arm(label, 2)["accuracy"])
        against = found.difference("latent r=2", f"{best} r=2")
        alone = [(label, 1) for label in ("solo", "solo:reflector")]
        without = [score(found.arm(*each)["accuracy"]) for each in (*alone, ("no-tools", 2))]
        tokens = ours["generated_tokens"] / found.arm(best, 2)["generated_tokens"]
        rows.append(
            [
                name,
                *[score(found.arm("latent", each)["accuracy"], found.arm("latent", each)["stderr"]) for each in (1, 2)],
                signed(found.difference("latent r=2", "latent r=1")),
                score(found.report["optimum"]["2"]),
                f"{score(found.arm(best, 2)['accuracy'])} ({best.removeprefix('text/')})",
                f"{signed(against)}, p {'< .001' if against.p_value < 0.001 else f'= {against.p_value:.3f}'}",
                f"{100 * tokens:.0f} %",
                " / ".join(without),
            ]
        )
    header = ["", "r = 1", "r = 2", "gain of round 2", "optimum", "best text", "latent − best text", "its tokens"]
    return table([*header, "tool-caller / reflector alone / no tools"], rows)


def desk_repeats_table() -> str:
    """Calls and accuracy where a tool may be called twice with one text, and where it may not."""
    rows = []
    for heading, name in (("as it is", "seed 0"), ("no call twice", "no call twice")):
        found = outcome("desk", name)
        if found is None:
            continue
        for label in ("latent", "text/short", "text/graded", "solo"):
            for rounds in (1, 2):
                if found.has(label, rounds):
                    arm = found.arm(label, rounds)
                    accuracy = score(arm["accuracy"], arm["stderr"])
                    rows.append([heading, label, str(rounds), accuracy, *desk_cells(arm)])
    return table(["", "arm", "rounds", "accuracy", *DESK_CELLS], rows) if rows else "not made yet"


TABLES: dict[str, Callable[[], str]] = {
    "consult": lambda: consult_table("consult"),
    "consult seeds": lambda: consult_seeds_table("consult"),
    "consult cost": consult_cost_table,
    "consult-blind": lambda: consult_table("consult-blind"),
    "consult-blind seeds": lambda: consult_seeds_table("consult-blind"),
    "consult designs": consult_designs_table,
    "consult steps": consult_steps_table,
    "desk": desk_table,
    "desk seeds": desk_seeds_table,
    "desk repeats": desk_repeats_table,
    "ward": lambda: main_table("ward"),
    "ward seeds": lambda: seeds_table("ward"),
    "relay": lambda: main_table("relay"),
    "relay seeds": lambda: seeds_table("relay"),
    "relay hops": hops_table,
    "relay hops drawn anew": lambda: hops_table("drawn anew"),
    "speed": speed_table,
    "ward movement": lambda: movement_table("ward"),
    "relay movement": lambda: movement_table("relay"),
    "ward designs": lambda: designs_table("ward"),
    "relay designs": lambda: designs_table("relay"),
    "ward steps": lambda: compare_table(
        "ward",
        [
            ("m = 1", "1 steps"),
            ("m = 2", "2 steps"),
            ("m = 3", "seed 0"),
            ("m = 4", "4 steps"),
            ("m = 9, on graded notes", "9 steps, graded"),
        ],
    ),
    "ward rounds": lambda: grid_table("ward"),
    "ward variants": lambda: compare_table("ward", VARIANTS_OF["ward"]),
    "relay variants": lambda: compare_table("relay", VARIANTS_OF["relay"]),
    "ward gradients": lambda: gradients_table("ward"),
    "panel": lambda: main_table("panel"),
    "panel claims": panel_claims_table,
    "panel ceilings": panel_ceilings_table,
    "panel rounds": lambda: compare_table(
        "panel",
        [("trained on 1", "seed 0"), ("trained on 2", "trained on 2"), ("trained on 3", "trained on 3")],
    ),
    "panel designs": panel_designs_table,
    "panel steps": lambda: compare_table(
        "panel",
        [
            ("m = 1, on short reports", "1 steps"),
            ("m = 2, on short reports", "seed 0"),
            ("m = 4, on graded reports", "4 steps"),
            ("m = 8, on long reports", "8 steps"),
        ],
        (1,),
    ),
    "panel speed": lambda: speed_table("panel", ("short", "graded", "long"), 1),
    "panel variants": lambda: compare_table("panel", VARIANTS_OF["panel"], (1,)),
}

VARIANTS_OF = {
    "ward": [
        ("aligned only", "aligned only"),
        ("as shipped: R_out(R_in(H)), inner and outer links, roll-out", "seed 0"),
        ("message R_out(H)", "message outer"),
        ("outer links alone", "outer links alone"),
        ("teacher-forced latents in training", "teacher"),
        ("distilled from the exact posterior", "distillation"),
        ("curriculum of 1, 2, then 3 rounds", "curriculum"),
    ],
    "relay": [
        ("aligned only", "aligned only"),
        ("as shipped", "seed 0"),
        ("the last round's answer alone", "last round"),
    ],
    "panel": [
        ("aligned only", "aligned only"),
        ("as shipped", "seed 0"),
        ("trained on one answer, not on the exact posterior", "one answer"),
        ("outer links alone", "outer links alone"),
    ],
}


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_grid(world: str, found: dict[int, Outcome]) -> None:
    values = [[each.arm("latent", rounds)["accuracy"] for rounds in (1, 2, 3, 4)] for each in found.values()]
    figure, axes = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
    image = axes.imshow(values, cmap="viridis", origin="lower")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = "black" if value > (min(map(min, values)) + max(map(max, values))) / 2 else "white"
            axes.text(column, row, score(value), ha="center", va="center", color=shade)
    axes.set_xticks(range(4), ["1", "2", "3", "4"])
    axes.set_yticks(range(4), ["1", "2", "3", "4"])
    axes.set_xlabel("rounds run with")
    axes.set_ylabel("rounds trained on")
    axes.set_title(f"{world}: accuracy, n = {NUM_QUESTIONS:,}")
    figure.colorbar(image)
    _save(figure, f"rounds-{world}")


def draw_gradients(world: str, curves: dict[str, dict[tuple[str, int], list[float]]]) -> None:
    figure, panels = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.2), sharey=True, layout="constrained")
    colours = {1: "tab:blue", 2: "tab:orange", 3: "tab:green"}
    for axes, (label, curve) in zip(panels if len(curves) > 1 else [panels], curves.items(), strict=True):
        for (edge, round), values in curve.items():
            axes.plot(
                [10 * (1 + step) for step in range(len(values))],
                values,
                color=colours[round],
                alpha=0.7,
                lw=1,
                label=f"{edge}, round {round}",
            )
        axes.set_yscale("log")
        axes.set_title(label)
        axes.set_xlabel("step")
    axes.legend(fontsize=6)
    (panels[0] if len(curves) > 1 else panels).set_ylabel("median gradient of a sample at a message")
    _save(figure, f"gradients-{world}")


def _save(figure: Any, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = name  # the same figure is the same file
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def write(worlds: Sequence[str]) -> None:
    """Put the tables of some worlds between their markers."""
    text = DOCUMENT.read_text()
    for name, make in TABLES.items():
        if _world_of(name) not in worlds:
            continue
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        if start not in text:
            raise SystemExit(f"{DOCUMENT} has no marker {start}")
        head, tail = text.split(start)
        text = f"{head}{start}\n{make()}\n{end}{tail.split(end, 1)[1]}"
    DOCUMENT.write_text(text)


def _world_of(table_name: str) -> str:
    """The world a table is about; the table `speed` is of ward."""
    return "ward" if table_name == "speed" else table_name.split()[0]


def compute_ceilings() -> None:
    """What can be known in panel, for both sets of agents that are there."""
    for number, system in enumerate(("panel", "runs/worlds/panel-1/system")):
        file = PLACE / "panel" / f"ceilings-{number}.json"
        if not file.exists() and (number == 0 or Path(system).exists()):
            _type(["python", "benchmarks/panel_ceilings.py", "--system", system, "--out", str(file)], PLACE / "panel")


def take_time(worlds: Sequence[str]) -> None:
    """Speed on a quiet machine: the arms take turns batch by batch within each evaluation."""
    for size in (1, 16, 64, 250):
        for repeat in (1, 2):
            for world, folder in SPEED_PLACES.items():
                if world not in worlds:
                    continue
                place = PLACE / folder / f"batch {size}, {repeat}"
                count = {1: 40, 16: 400}.get(size, 1000)
                if not (place / "report.json").exists():
                    command = ["recursivemas", "eval", world, "--task", world, "-n", str(count), "--seed", str(repeat)]
                    _type([*command, "--arms", "latent,text", "--batch-size", str(size), "--out", str(place)], place)
    file = PLACE / "consult" / "cost.json"
    if "consult" in worlds and not file.exists():
        _type(["python", "benchmarks/consult_cost.py", "--out", str(file)], PLACE / "consult")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["ward", "relay", "panel", "consult", "consult-blind", "desk"]
    parser.add_argument("worlds", nargs="*", default=everything, help=", ".join(everything))
    parser.add_argument("--only", choices=["run", "time", "write"], help="do one of the three steps")
    parser.add_argument("--match", default="", help="only runs whose name contains this")
    parser.add_argument("--workers", type=int, default=2, help="runs made at the same time")
    given = parser.parse_args()
    if given.only in (None, "run"):
        shop = Shop()
        chosen = [run for run in RUNS if run.world in given.worlds and given.match in run.name]
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(shop.make, chosen))
        if "panel" in given.worlds:
            compute_ceilings()
    if given.only in (None, "time"):
        take_time(given.worlds)
    if given.only in (None, "write"):
        write(given.worlds)


if __name__ == "__main__":
    main()
