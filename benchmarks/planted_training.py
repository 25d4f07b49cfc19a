"""Does the outer loop say what goes wrong in it, and nothing when nothing does?

    python benchmarks/planted_training.py                    everything that is not in runs/planted/ yet, and the tables
    python benchmarks/planted_training.py --runs 5           five more runs, then the tables of what there is
    python benchmarks/planted_training.py --only "frozen link"      the runs of one fault; calibration, healthy: those

Short trainings of the shipped agents from aligned links (batch 16, 30 steps): five healthy ones, each with settings of
its own, give the range of every figure that `recursivemas.training.watch` has a limit for; five others, with other
batches and other links, must not be accused; and each fault is planted into three, at another link or edge each time,
and must be found by name: in the log of the training, or, for a wrong scale in some dimensions, by `inspect links`.
Gradients are clipped sample by sample in all but one of the healthy settings. Everything follows from the seeds.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recursivemas import RecursiveSystem
from recursivemas.agents import Message
from recursivemas.audit.health import examine_links
from recursivemas.audit.verdicts import UNEVENLY_LOUD
from recursivemas.errors import NumericsError
from recursivemas.links import RecursiveLink
from recursivemas.patterns import Edge
from recursivemas.recursion import PlayedTurn
from recursivemas.training import watch
from recursivemas.training.alignment import AlignmentPairs, alignment_pairs
from recursivemas.training.data import Question, encode_turns
from recursivemas.training.loop import RunDirectory
from recursivemas.training.outer import OuterSettings, train_outer
from recursivemas.worlds import load_world

PLACE = Path("runs/planted")
RESULTS = Path("runs/results")
"""Where `python benchmarks/results.py` leaves aligned links, which are taken if they are there."""
NUM_STEPS = 30
COMMON = {
    "num_train_steps": NUM_STEPS,
    "batch_size": 16,
    "warmup_steps": 5,
    "log_every": 5,
    "clip_messages": 1.0,
    "num_validation": 2,
}
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ward", {}),
    ("relay", {}),
    ("ward", {"round_weights": "last", "anchor": 0.0}),
    ("relay", {"clip_messages": None, "lr": 3e-4}),
    ("ward", {"latent_source": "targets", "trained": "outer"}),
)
"""World and settings of the healthy runs: the recipe's, and what one is likely to change."""


class Case(NamedTuple):
    """One training."""

    name: str
    group: str
    world: str
    seed: int
    settings: Mapping[str, Any] = {}
    place: str = ""
    """The link, edge or round that the fault is planted at."""
    link_seed: int = 0
    """Drew the links that were aligned, from which it starts."""


class Seen(NamedTuple):
    """What was said about a training."""

    told: list[tuple[str, str, int]]
    """Cause, place and step of every warning in its log."""
    inspected: list[tuple[str, str]]
    """Link and cause, by `inspect links` after it."""
    figures: dict[str, tuple[float, float]]
    """Least and largest value of everything there is a limit for."""
    seconds: float


# --- faults -----------------------------------------------------------------------------------------------------------


class Plant:
    """A fault in a system while it is trained; what it does before and in every unrolling."""

    def __init__(self, system: RecursiveSystem, place: str) -> None:
        self.system = system
        self.place = place
        self.calls = 0

    def begin(self) -> None:
        """Before the training."""

    def before(self) -> None:
        """Before every unrolling."""

    def loss(self, losses: Tensor) -> Tensor:
        """What becomes of the losses of a batch."""
        return losses

    def message(self, message: Message, edge: str, round: int) -> Message:
        """What becomes of a message."""
        return message

    @property
    def link(self) -> RecursiveLink:
        """The link it is planted at."""
        return self.system.all_links[self.place]


class DetachedRound(Plant):
    def message(self, message: Message, edge: str, round: int) -> Message:
        return detached(message) if f"round {round}" == self.place else message


class DetachedEdge(Plant):
    def message(self, message: Message, edge: str, round: int) -> Message:
        return detached(message) if edge == self.place else message


class Frozen(Plant):
    def before(self) -> None:
        self.link.requires_grad_(False)


class Rounded(Plant):
    @torch.no_grad()
    def before(self) -> None:
        for parameter in self.link.parameters():
            parameter.copy_(parameter.bfloat16())


class Loud(Plant):
    def begin(self) -> None:
        self.link.scale.mul_(50)


class Uneven(Plant):
    @torch.no_grad()
    def begin(self) -> None:
        size = self.link.config.target_size
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(1))[: size // 10]
        for linear in (self.link.w2, self.link.w3):
            assert linear is not None
            linear.weight[chosen] *= 20
            if linear.bias is not None:
                linear.bias[chosen] *= 20


class Collapsed(Plant):
    @torch.no_grad()
    def begin(self) -> None:
        """Only biases are left, as loud as the reader's embeddings."""
        states = torch.randn(64, self.link.config.source_size)
        norm = self.system.agents[Edge.parse(self.place).target].model.mean_embedding_norm
        for linear in (self.link.w2, self.link.w3):
            assert linear is not None
            nn.init.normal_(linear.bias)
            nn.init.normal_(linear.weight, std=1e-6)
        self.link.calibrate(states, norm)


class Outlier(Plant):
    def loss(self, losses: Tensor) -> Tensor:
        """In the sixth step, the sample that is worst anyhow: a hundred times that of one that is solved is nothing."""
        if self.calls != 6:
            return losses
        weights = torch.ones_like(losses)
        weights[losses.argmax()] = 100.0
        return losses * weights


def detached(message: Message) -> Message:
    assert message.latents is not None
    return replace(message, latents=message.latents.detach())


FAULTS: dict[str, tuple[type[Plant], str, tuple[tuple[str, str], ...], dict[str, Any]]] = {
    # What is planted, what should be said, where, and settings.
    "detached round": (
        DetachedRound,
        watch.DETACHED,
        (("ward", "round 1"), ("ward", "round 2"), ("relay", "round 1")),
        {},
    ),
    "frozen link": (
        Frozen,
        watch.UNMOVED,
        (("ward", "planner->critic"), ("ward", "critic"), ("relay", "solver->planner")),
        {},
    ),
    "link in bf16": (
        Rounded,
        watch.ROUNDED,
        (("ward", "critic->solver"), ("ward", "planner"), ("relay", "planner->critic")),
        {},
    ),
    "link scaled x50": (
        Loud,
        watch.LOUD,
        (("ward", "solver->planner"), ("ward", "solver"), ("relay", "critic->solver")),
        {},
    ),
    "wrong scale in some dimensions": (
        Uneven,
        UNEVENLY_LOUD,
        (("ward", "planner->critic"), ("ward", "solver->planner"), ("relay", "critic->solver")),
        {},
    ),
    "collapsed outputs": (
        Collapsed,
        watch.COLLAPSED,
        (("ward", "critic->solver"), ("ward", "solver->planner"), ("relay", "planner->critic")),
        {},
    ),
    "one outlier sample": (Outlier, watch.OUTLIER, (("ward", ""), ("ward", ""), ("relay", "")), {}),
    "a learning rate of 0": (
        Plant,
        watch.UNMOVED,
        (("ward", "critic->solver"), ("ward", "planner"), ("relay", "solver")),
        {"lr_ratios": 0.0},
    ),
    "one edge detached": (
        DetachedEdge,
        watch.DETACHED,
        (("ward", "planner->critic"), ("ward", "solver->planner"), ("relay", "critic->solver")),
        {},
    ),
    "answer leak": (
        Plant,
        watch.LEAK,
        (("ward", ""), ("ward", ""), ("relay", "")),
        {"latent_source": "targets", "leak_answer": True, "trained": "outer"},
    ),
}


def cases() -> Iterator[Case]:
    """All trainings."""
    for group, first, link_seeds in (("calibration", 0, (0,)), ("healthy", 5, (1, 2))):
        for number, (world, settings) in enumerate(SETTINGS):
            link_seed = link_seeds[number % len(link_seeds)]
            yield Case(f"{group} {number + 1}", group, world, first + number, settings, link_seed=link_seed)
    for fault, (_, _, places, settings) in FAULTS.items():
        for number, (world, place) in enumerate(places):
            chosen = {**settings, "lr_ratios": {place: 0.0}} if "lr_ratios" in settings else settings
            yield Case(f"{fault} {number + 1}", fault, world, 10 + number, chosen, place)


# --- one training -----------------------------------------------------------------------------------------------------


def train(case: Case) -> Seen:
    """Train, and read the log."""
    started = time.perf_counter()
    system = start(case)
    settings = OuterSettings(**{**COMMON, **case.settings})
    kind = FAULTS[case.group][0] if case.group in FAULTS else Plant
    anchors = pairs_of(system, case.world) if settings.anchor else {}
    with tempfile.TemporaryDirectory() as place, planted(system, kind(system, case.place)):
        run = RunDirectory(Path(place), {})
        stopped: list[tuple[str, str, int]] = []
        try:
            train_outer(system, questions_of(case), settings, anchors=anchors, seed=case.seed, run=run)
        except NumericsError as error:
            # Where nothing at all could be learnt, the training stops with the same words.
            stopped = [(cause, str(error), 1) for cause in watch.ADVICE if f" {cause}: " in str(error)]
        log = Path(place) / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    told = stopped + [(each["cause"], each["place"], each["step"]) for each in records if "warning" in each]
    inspected = [
        (diagnosis.figures.link, verdict.cause)
        for diagnosis in examine_links(system, seed=case.seed)
        for verdict in diagnosis.verdicts
    ]
    return Seen(told, inspected, ranges(records), time.perf_counter() - started)


def start(case: Case) -> RecursiveSystem:
    """The shipped agents with links that are aligned only; trained now (a minute) if that has not been done."""
    name = "aligned" + (f" seed={case.link_seed}" if case.link_seed else "")
    place = RESULTS / case.world / name
    if not (place / "system").exists():
        place = PLACE / f"{case.world} {name}"
    if not (place / "system").exists():
        settings = [f"output={place}", "save_dtype=float32", f"seed={case.link_seed}"]
        command = ["train", f"recipes/{case.world}.yaml", "--stage", "inner,alignment"]
        for setting in settings:
            command += ["--set", setting]
        print("recursivemas", *command, flush=True)
        executable = Path(sys.executable).with_name("recursivemas")
        subprocess.run([str(executable), *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return RecursiveSystem.from_pretrained(place / "system", dtype="float32", device="cpu")


def questions_of(case: Case) -> list[Question]:
    """Questions of the training split, each with what the other roles write by the book in the first round."""
    world = load_world(case.world)
    found = []
    for number, turns in enumerate(world.conversations("train", 600, case.seed)):
        targets: dict[str, str] = {}
        for turn in turns[:-1]:
            targets.setdefault(turn.role, turn.target)
        rounds = turns[-1].round if case.world == "relay" else 1
        question = turns[-1].question
        found.append(Question(id=f"{number}", text=question, answer=turns[-1].target, rounds=rounds, targets=targets))
    return found


def pairs_of(system: RecursiveSystem, world: str) -> dict[str, AlignmentPairs]:
    """Pairs of every edge for the anchor."""
    found = {}
    for name in system.links:
        edge = Edge.parse(name)
        sender, reader = (system.agents[role].model for role in edge)
        turns = [turn for turn in load_world(world).role_samples("train", 128, 0, role=edge.source) if not turn.solo]
        turns = [turn for turn in turns if turn.role != system.pattern.answers or turn.round < turn.num_rounds]
        found[name] = alignment_pairs(sender, reader, encode_turns(turns, sender, system.prompts))
    return found


@contextmanager
def planted(system: RecursiveSystem, plant: Plant) -> Iterator[None]:
    """While a system is trained: the fault in it."""
    unroll = system.unroll

    def faulty(*given: Any, judge: Callable[[PlayedTurn], Tensor] | None = None, **options: Any) -> Any:
        plant.calls += judge is not None
        plant.before()
        judged = None if judge is None else lambda played: plant.loss(judge(played))
        return unroll(*given, judge=judged, intervene=plant.message, **options)

    plant.begin()
    system.unroll = faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        del system.unroll  # type: ignore[method-assign]


def ranges(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of every figure with a limit its least and its largest value, over all links and all of the log."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            parts = name.split("/")
            if parts[0] == "output":
                values.setdefault(parts[1], []).append(value)
            elif parts[0] == "rounded" and record["step"] > watch.MIN_UPDATES:
                values.setdefault("rounded", []).append(value)
            elif name == "gradient/outlier" and record["step"] * COMMON["batch_size"] >= watch.MIN_SAMPLES:
                values.setdefault("outlier", []).append(value)
    return {name: (min(found), max(found)) for name, found in values.items()}


# --- tables -----------------------------------------------------------------------------------------------------------


def was_found(case: Case, seen: Seen) -> bool:
    """Whether the fault of a training is named, and the link or edge it is at."""
    cause = FAULTS[case.group][1]
    if cause == UNEVENLY_LOUD:
        return any(each == cause and link == case.place for link, each in seen.inspected)
    places = [place for each, place, _ in seen.told if each == cause]
    by_name = case.group in ("frozen link", "link in bf16", "link scaled x50", "collapsed outputs", "one edge detached")
    if by_name or case.group == "a learning rate of 0":
        return any(case.place in place for place in places)
    return bool(places)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def tables(done: Mapping[str, Seen]) -> str:
    """Calibration, false alarms, and what was found."""
    every = {case.name: case for case in cases()}
    groups = {
        group: [name for name, case in every.items() if case.group == group and name in done]
        for group in ("calibration", "healthy", *FAULTS)
    }
    figures: dict[str, list[list[str]]] = {}
    rows = []
    for figure, limit in watch.LIMITS.items():
        key = "loudness" if figure == "quietness" else figure
        cells = [figure, f"{limit.value:g}", f"{limit.usual[0]:g} to {limit.usual[1]:g}"]
        for group in ("calibration", "healthy"):
            found = [done[name].figures[key] for name in groups[group] if key in done[name].figures]
            cells.append(f"{min(low for low, _ in found):.3g} to {max(high for _, high in found):.3g}" if found else "")
        rows.append(cells)
    del figures
    parts = ["Figures with a limit:", "", table(["figure", "limit", "usual, as told", "calibration", "healthy"], rows)]
    alarms = [
        f"{name}: {cause} ({place}, step {step})"
        for name in groups["healthy"] + groups["calibration"]
        for cause, place, step in done[name].told
    ]
    parts += [
        "",
        f"Warnings in {len(groups['healthy'])} healthy runs, and {len(groups['calibration'])} of the "
        f"calibration: {len(alarms)}",
        *alarms,
    ]
    rows = []
    for fault, (_, cause, _, _) in FAULTS.items():
        names = groups[fault]
        found_in = [name for name in names if was_found(every[name], done[name])]
        steps = [min((step for each, _, step in done[name].told if each == cause), default=math.nan) for name in names]
        where = "inspect links" if cause == UNEVENLY_LOUD else ", ".join(f"{step:g}" for step in steps)
        others = sorted({each for name in names for each, _, _ in done[name].told if each != cause})
        rows.append([fault, cause, f"{len(found_in)} of {len(names)}", where, ", ".join(others)])
    header = ["fault", "said", "found", "after step", "also said"]
    seconds = sum(seen.seconds for seen in done.values())
    return "\n".join([*parts, "", table(header, rows), "", f"{len(done)} runs, {seconds:.0f} s in all"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the runs of one fault, or: calibration, healthy")
    parser.add_argument("--runs", type=int, default=1000, help="train no more than so many")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    PLACE.mkdir(parents=True, exist_ok=True)
    done: dict[str, Seen] = {}
    left = given.runs
    for case in cases():
        file = PLACE / f"{case.name}.json"
        chosen = given.only in (None, case.group)
        if chosen and left > 0 and (given.again or not file.exists()):
            seen = train(case)
            file.write_text(json.dumps(seen._asdict()), encoding="utf-8")
            left -= 1
            print(f"{case.name} ({case.world}{', ' + case.place if case.place else ''}): {seen.told}", flush=True)
        if file.exists():
            done[case.name] = Seen(**json.loads(file.read_text(encoding="utf-8")))
    print(tables(done))


if __name__ == "__main__":
    main()
