"""The runner: several arms answer the same questions, on one engine and one meter, and are compared in pairs.

    latent        the system as it is
    text          the same agents, prompts and rounds, handing each other text; once for each wording of the prompts
    solo          the answering agent alone, with a prompt of its own
    none          the system with empty slots
    zero          the system with messages of zeros
    shuffled      the system, each reader getting the messages of another question
    random-link   the system with links drawn anew
    no-feedback   the system with the edges closed that lead back to an earlier stage: what rounds are worth without it

Arms take turns batch by batch, so that a machine that slows down slows down all of them. Answers are written as they
come; a run that was stopped goes on where it was. Knows systems from outside only.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, OutputError, unknown_name
from recursivemas.evaluation.metrics import mean, paired_difference
from recursivemas.evaluation.task import Sample, Task
from recursivemas.system import RecursiveSystem, Result

ARMS = ("latent", "text", "both", "solo", "none", "zero", "shuffled", "random-link", "no-feedback")
CONTROLS = ("none", "zero", "shuffled", "random-link")
COUNTS = ("generated_tokens", "prompt_tokens", "latent_steps", "positions")

Progress = Callable[[int, int, "dict[Arm, list[Answer]]"], None]
"""Told how many batches are done, of how many, and all answers so far."""


@dataclass(frozen=True)
class Arm:
    """One way to answer."""

    name: str
    rounds: int
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ARMS:
            raise ConfigError(unknown_name("arm", self.name, ARMS))

    @property
    def label(self) -> str:
        """Name and wording: `text/graded`."""
        return self.name if self.variant is None else f"{self.name}/{self.variant}"

    def __str__(self) -> str:
        return f"{self.label} r={self.rounds}"


@dataclass(frozen=True)
class Answer:
    """One arm's answer to one question, what it is worth and what it cost."""

    id: str
    text: str
    score: float
    read: str | None
    """What the scorer read out of the text."""
    finished: bool
    seconds: float
    generated_tokens: int
    prompt_tokens: int
    latent_steps: int
    positions: int


@dataclass
class EvalLog:
    """Everything an evaluation found."""

    system: str
    task: Task
    latent_steps: int
    seed: int
    answers: dict[Arm, list[Answer]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: arms with their errors and costs per question, and paired comparisons."""
        first = next(iter(self.answers.values()))
        return {
            "system": self.system,
            "task": self.task.name,
            "n": len(first),
            "seed": self.seed,
            "score": getattr(self.task.scorer, "__name__", "score"),
            "optimum": {str(rounds): value for rounds, value in (self.task.optimum or {}).items()},
            "arms": [self._arm(arm) for arm in self.answers],
            "groups": self.groups(),
            "comparisons": [self._compare(a, b) for a, b in self.pairs()],
            "settings": self.settings,
        }

    def groups(self) -> list[dict[str, Any]]:
        """Accuracy of each arm by the values of the metadata that the task is grouped by."""
        key = self.task.group_by
        if key is None:
            return []
        values = {sample.id: sample.metadata.get(key) for sample in self.task.samples}
        found = []
        for value in sorted(set(values.values()), key=lambda each: (str(type(each)), each)):
            for arm, answers in self.answers.items():
                score = mean([answer.score for answer in answers if values[answer.id] == value])
                found.append(
                    {
                        "arm": arm.name,
                        "variant": arm.variant,
                        "rounds": arm.rounds,
                        key: value,
                        "n": score.n,
                        "accuracy": score.value,
                        "stderr": _number(score.stderr),
                    }
                )
        return found

    def pairs(self) -> list[tuple[Arm, Arm]]:
        """Which arms are compared: the latent one with every other of the same rounds, and with the solo arm."""
        return [
            (a, b)
            for a in self.answers
            if a.name == "latent"
            for b in self.answers
            if b.name != "latent" and (b.rounds == a.rounds or b.name == "solo")
        ]

    def _arm(self, arm: Arm) -> dict[str, Any]:
        answers = self.answers[arm]
        score = mean([answer.score for answer in answers])
        is_latent = arm.name not in ("text", "solo", "none")
        return {
            "arm": arm.name,
            "variant": arm.variant,
            "rounds": arm.rounds,
            "latent_steps": self.latent_steps if is_latent else 0,
            "accuracy": score.value,
            "stderr": _number(score.stderr),
            "generated_tokens": _mean_of(answers, "generated_tokens"),
            "prompt_tokens": _mean_of(answers, "prompt_tokens"),
            "latent_steps_total": _mean_of(answers, "latent_steps"),
            "positions": _mean_of(answers, "positions"),
            "seconds_per_question": _mean_of(answers, "seconds"),
            "cut": sum(not answer.finished for answer in answers) / len(answers),
            "unscorable": sum(answer.read is None for answer in answers) / len(answers),
        }

    def _compare(self, a: Arm, b: Arm) -> dict[str, Any]:
        ours, theirs = self.answers[a], self.answers[b]
        difference = paired_difference([each.score for each in ours], [each.score for each in theirs])
        tokens = _mean_of(theirs, "generated_tokens")
        # What other questions' messages cost is not counted to the shuffled arm, so its speed says nothing.
        speedup = _mean_of(theirs, "seconds") / max(_mean_of(ours, "seconds"), 1e-12)
        return {
            "a": a.label,
            "b": b.label,
            "rounds": a.rounds,
            "accuracy_difference": difference.value,
            "stderr": _number(difference.stderr),
            "p_value": _number(difference.p_value),
            "speedup": None if b.name == "shuffled" else _number(speedup),
            "token_reduction": _number(1 - _mean_of(ours, "generated_tokens") / tokens) if tokens else None,
        }


def plan_arms(names: Sequence[str], rounds: Sequence[int], variants: Sequence[str]) -> list[Arm]:
    """The arms of an evaluation: text once for each wording, solo once, controls at the largest number of rounds."""
    arms: list[Arm] = []
    for name in names:
        if name not in ARMS:
            raise ConfigError(unknown_name("arm", name, ARMS))
        if name == "solo":
            arms.append(Arm(name, 1))
        elif name in CONTROLS:
            arms.append(Arm(name, max(rounds)))
        elif name in ("text", "both"):
            arms += [Arm(name, each, variant) for each in rounds for variant in (*variants,) or (None,)]
        else:
            arms += [Arm(name, each) for each in rounds]
    return list(dict.fromkeys(arms))


def evaluate(
    system: RecursiveSystem,
    task: Task,
    arms: Sequence[Arm],
    *,
    sampling: SamplingParams | None = None,
    num_latent_steps: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> EvalLog:
    """Let every arm answer every question of a task. With a `journal` file, goes on where an earlier run stopped."""
    if len(task.samples) < 2 and any(arm.name == "shuffled" for arm in arms):
        raise ConfigError("the arm shuffled hands each question the message of another: it needs two questions or more")
    steps = system.settings.num_latent_steps if num_latent_steps is None else num_latent_steps
    log = EvalLog(system.settings.name, task, steps, seed, {arm: [] for arm in arms})
    log.settings = {
        "num_latent_steps": steps,
        "batch_size": batch_size,
        "sampling": asdict(sampling) if sampling is not None else None,
        "device": str(next(iter(system.agents.values())).model.device),
        "dtype": str(next(iter(system.agents.values())).model.dtype).removeprefix("torch."),
    }
    runs = {arm: _runner(system, arm, task, sampling, steps, batch_size, seed) for arm in arms}
    identity = {**log.settings, "system": log.system, "task": task.name, "seed": seed, "n": len(task.samples)}
    identity["hash"] = _hash_of(system, task)
    written = _Journal(journal, identity)
    batches = [task.samples[start : start + batch_size] for start in range(0, len(task.samples), batch_size)]
    # What is shuffled, is shuffled over all questions, so that arm answers them in one go.
    jobs = [(arm, batch) for batch in batches for arm in arms if arm.name != "shuffled"]
    jobs += [(arm, list(task.samples)) for arm in arms if arm.name == "shuffled"]
    _warm_up(runs, task.samples[: min(batch_size, 16)])
    for number, (arm, samples) in enumerate(jobs, start=1):
        known = written.find(arm, samples)
        answers = (
            known
            if known is not None
            else [_score(task, sample, result) for sample, result in zip(samples, runs[arm](samples), strict=True)]
        )
        if known is None:
            written.append(arm, answers)
        log.answers[arm] += answers
        if progress is not None:
            progress(number, len(jobs), log.answers)
    return log


Runner = Callable[[Sequence[Sample]], list[Result]]


def _runner(
    system: RecursiveSystem,
    arm: Arm,
    task: Task,
    sampling: SamplingParams | None,
    num_latent_steps: int,
    batch_size: int,
    seed: int,
) -> Runner:
    players = {"solo": system.solo, "random-link": lambda: system.with_random_links(seed)}
    player = players.get(arm.name, lambda: system)()
    channel: str | dict[str, str] = arm.name if arm.name in ("text", "both", "none") else "latent"
    if arm.name == "no-feedback":
        edges = system.pattern.graph
        channel = {str(edge): "none" if system.pattern.is_feedback(edge) else "latent" for edge in edges}

    def run(samples: Sequence[Sample]) -> list[Result]:
        results: list[Result] = player.run(
            [sample.question for sample in samples],
            num_rounds=arm.rounds,
            num_latent_steps=num_latent_steps,
            channel=channel,
            intervene=arm.name if arm.name in ("shuffled", "zero") else None,
            variant=arm.variant,
            sampling=sampling,
            trace="off",
            instructions=task.instructions,
            keys=[sample.id for sample in samples],
            batch_size=batch_size,
            seed=seed,
        )
        return results

    return run


def _warm_up(runs: dict[Arm, Runner], samples: Sequence[Sample]) -> None:
    """First calls are slow for reasons of their own (allocation, lazy loading); they are not timed."""
    for arm, run in runs.items():
        if arm.rounds == max(each.rounds for each in runs if each.name == arm.name) and len(samples) > 1:
            run(samples)


def _score(task: Task, sample: Sample, result: Result) -> Answer:
    score = task.scorer(result.text, sample.target, sample.metadata)
    counts = {name: result.usage.total(name) for name in COUNTS}
    return Answer(sample.id, result.text, score.value, score.answer, result.finished, result.usage.seconds, **counts)


def _hash_of(system: RecursiveSystem, task: Task) -> str:
    """Changes with the questions, with what they are scored against, and with every part of the system."""
    digest = hashlib.sha256(f"{task.seed}{task.instructions}{getattr(task.scorer, '__name__', '')}".encode())
    for sample in task.samples:
        digest.update(f"{sample.id}\0{sample.question}\0{sample.target}\0".encode())
    for part in (system.settings, system.pattern, system.prompts):
        digest.update(part.model_dump_json().encode())
    for role, agent in sorted(system.agents.items()):
        model = agent.model
        digest.update(f"{role}\0{model.source}\0{model.revision}\0".encode())
        digest.update(b"" if model.source else model.fingerprint().encode())
    for name, link in sorted(system.all_links.items()):
        digest.update(name.encode())
        for tensor in link.state_dict().values():
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Journal:
    """Answers on disk, one a line, behind a first line that says what run they belong to."""

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._file = file
        self._known: dict[tuple[str, str], Answer] = {}
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._read(file, identity)
            else:
                file.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to {file}: {error.strerror}") from None

    def _read(self, file: Path, identity: dict[str, Any]) -> None:
        """Take over the answers of an earlier run; a last line that was cut by a kill is dropped."""
        try:
            first, *lines = file.read_text(encoding="utf-8").split("\n")
            if not lines and json.dumps(identity).startswith(first):
                # Stopped while the first line was written: there is nothing to take over.
                file.write_text(json.dumps(identity) + "\n", encoding="utf-8")
                return
            found = json.loads(first)
            records = [json.loads(line) for line in lines[:-1]]
            answers = [(record.pop("arm"), Answer(**record)) for record in records]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OutputError(f"{file} is not the record of an evaluation; choose another place with --out") from None
        if found != json.loads(json.dumps(identity)):
            raise OutputError(
                f"{file} belongs to an evaluation with other settings; choose another place with --out, or remove it"
            )
        self._known = {(arm, answer.id): answer for arm, answer in answers}
        if lines[-1]:
            os.truncate(file, file.stat().st_size - len(lines[-1].encode()))

    def find(self, arm: Arm, samples: Sequence[Sample]) -> list[Answer] | None:
        """The answers of an arm to these questions, if all of them are there."""
        found = [self._known.get((str(arm), sample.id)) for sample in samples]
        return None if None in found else [answer for answer in found if answer is not None]

    def append(self, arm: Arm, answers: Sequence[Answer]) -> None:
        if self._file is None:
            return
        lines = [json.dumps({"arm": str(arm), **asdict(answer)}) + "\n" for answer in answers]
        try:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write("".join(lines))
        except OSError as error:
            raise OutputError(f"cannot write to {self._file}: {error.strerror}; what was written is kept") from None


def _mean_of(answers: Sequence[Answer], name: str) -> float:
    return mean([float(getattr(answer, name)) for answer in answers]).value


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value
