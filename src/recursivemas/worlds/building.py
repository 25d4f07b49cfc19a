"""Building a world: its texts and splits on disk, and its agents, pretrained from nothing.

    DIR/data/{train,validation,test}.jsonl    questions with targets, and what is known about them
    DIR/data/turns-ROLE.jsonl                 a sample of the text each agent is made of
    DIR/training/ROLE/                        metrics and state of its pretraining; a stopped build goes on from there
    DIR/system/                               the agents as a system, with links that are drawn but not trained

Agents are small and independent of each other, so they are trained in processes of their own, one core each.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recursivemas.checkpoint import atomic_directory
from recursivemas.errors import OutputError
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.loop import RunDirectory, write_atomically
from recursivemas.worlds import World, load_world
from recursivemas.worlds.pretraining import exact_share

SAVE_DTYPE = "float16"
_NUM_WRITTEN = {"train": 2000, "validation": 1000, "test": 1000}
NUM_DRAWS = 3
"""How often an agent is drawn at most, where a recipe asks for one that makes no mistakes (`least_exact`)."""
_POLL_SECONDS = 0.5

BuildProgress = Callable[[str, int, int, dict[str, float]], None]


def build(
    world: World,
    directory: Path,
    *,
    workers: int = 2,
    provenance: dict[str, str] | None = None,
    progress: BuildProgress | None = None,
) -> dict[str, Any]:
    """Write a world to a directory; return what is known of its agents. Raises `OutputError`."""
    if (directory / "system").exists():
        raise OutputError(f"{directory} holds a finished world already; choose another --out, or remove it first")
    write_data(world, directory / "data")
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = {
            role: pool.submit(_in_process, world.name, world.seed, role, directory / "training" / role, running)
            for role in world.roles
        }
        try:
            _watch(world, jobs, directory, progress)
        except BaseException:  # whatever ends the build, Ctrl-C too, must end its processes
            pool.shutdown(wait=False, cancel_futures=True)
            _stop(running)
            raise
    agents = {role: job.result() for role, job in jobs.items()}
    models = {
        role: LanguageModel.from_pretrained(directory / "training" / role / "agent", device="cpu")
        for role in world.roles
    }
    system = RecursiveSystem.build(
        agents=models,
        pattern=world.pattern,
        prompts=world.prompts,
        roles=world.role_names,
        seed=world.seed,
        name=world.name,
        **world.settings,
    )
    summary = {**(provenance or {}), "world": {"name": world.name, "seed": world.seed}, "agents": agents}
    system.training = summary
    system.save_pretrained(directory / "system", dtype=SAVE_DTYPE)
    return summary


def write_data(world: World, directory: Path) -> None:
    """Questions of every split, and a sample of every agent's text, as JSON Lines."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for split, number in _NUM_WRITTEN.items():
            rows = [{**asdict(sample), "answer": sample.target} for sample in world.samples(split, number, world.seed)]
            write_atomically(directory / f"{split}.jsonl", _lines(rows))
        for role in world.roles:
            turns = world.pretraining_batch(role, np.random.default_rng(world.seed), 500)
            write_atomically(directory / f"turns-{role}.jsonl", _lines([asdict(turn) for turn in turns]))
    except OSError as error:
        raise OutputError(f"cannot write the texts to {directory}: {error.strerror}") from None


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _in_process(
    name: str, seed: int, role: str, directory: Path, running: list[subprocess.Popen[str]]
) -> dict[str, Any]:
    """Make one agent in a process of its own; its progress is read from its metrics file."""
    command = [sys.executable, "-m", "recursivemas.worlds.building", name, str(seed), role, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.append(process)
    printed, complaint = process.communicate()
    if process.returncode != 0:
        reason = (complaint.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise OutputError(f"the agent of the {role} could not be made: {reason}")
    summary: dict[str, Any] = json.loads(printed)
    return summary


def _stop(running: list[subprocess.Popen[str]]) -> None:
    """End processes that make agents. Ctrl-C has reached them, as a rule, and they are saving their state."""
    for process in running:
        for insist in (lambda: None, lambda each=process: each.send_signal(signal.SIGINT), process.kill):
            insist()
            try:
                process.wait(timeout=5)
                break
            except subprocess.TimeoutExpired:
                continue


def make_agent(name: str, seed: int, role: str, directory: Path) -> dict[str, Any]:
    """Make one agent and save it in `directory`/agent; return what is known of it."""
    torch.set_num_threads(1)
    world = load_world(name, seed)
    recipe = world.agent_recipes[role]
    started = time.process_time()
    marks: list[float] = []
    for number in range(NUM_DRAWS):
        world.agent_recipes[role] = drawn = replace(recipe, seed=recipe.seed + number)
        place = _draw_of(directory, number)
        run = RunDirectory(place, {"world": name, "seed": seed, "role": role, "recipe": asdict(drawn)})
        model = world.pretrain(role, run=run)
        mark = 1.0 if recipe.least_exact is None else exact_share(world, role, model)
        if mark > max(marks, default=-1.0):
            loss = _last_record(place / "metrics.jsonl")["loss"]
            with atomic_directory(directory / "agent", overwrite=True) as draft:
                model.save_pretrained(draft, dtype=SAVE_DTYPE)
        marks.append(mark)
        if mark >= (recipe.least_exact or 0.0):
            break
    return {
        "parameters": model.num_parameters,
        "model_type": model.config.model_type,
        "steps": recipe.num_train_steps,
        "loss": loss,
        **({} if recipe.least_exact is None else {"exact": marks}),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _draw_of(directory: Path, number: int) -> Path:
    """Where the run of an agent's first (0), second, ... draw is."""
    return directory / f"draw-{number + 1}" if number else directory


def _watch(
    world: World, jobs: dict[str, Future[dict[str, Any]]], directory: Path, progress: BuildProgress | None
) -> None:
    """Report the progress of every agent until all are done; the first that fails ends the build."""
    while any(not job.done() for job in jobs.values()):
        for role, job in jobs.items():
            if job.done():
                job.result()
            runs = [_draw_of(directory / "training" / role, number) for number in range(NUM_DRAWS)]
            written = [run / "metrics.jsonl" for run in runs if (run / "metrics.jsonl").exists()]
            if written:
                _report(role, written[-1], world, progress)
        time.sleep(_POLL_SECONDS)


def _report(role: str, metrics: Path, world: World, progress: BuildProgress | None) -> None:
    if progress is not None:
        record = _last_record(metrics)
        progress(role, record["step"], world.agent_recipes[role].num_train_steps, record)


def _last_record(metrics: Path) -> dict[str, Any]:
    """The last line of a metrics file that has been written to its end."""
    whole = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    record: dict[str, Any] = json.loads(whole[-1]) if whole else {"step": 0, "loss": float("nan")}
    return record


if __name__ == "__main__":
    sys.stdout.write(json.dumps(make_agent(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))))
