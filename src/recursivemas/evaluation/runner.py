"""The runner: several arms answer the same questions, on one engine and one meter, and are compared in pairs.

    latent        the system as it is
    text          the same agents, prompts and rounds, handing each other text; once for each wording of the prompts
    solo          the answering agent alone, with a prompt of its own (solo:ROLE another agent, with its own)
    none          the system with empty slots (none:ROLE without the messages of that role alone)
    zero          the system with messages of zeros
    shuffled      the system, each reader getting the messages of another question (shuffled:ROLE those of that role)
    random-link   the system with links drawn anew
    no-feedback   the system with the edges closed that lead back to an earlier stage: what rounds are worth without it
    no-tools      the system without its tools
    vote          the answering agent alone, sampled as often as the time of `latent` allows (vote:K, K times); what is
                  answered most often counts
    system:DIR    another system, as it is: a fine-tuned agent, or one model that was trained on what all agents know

Arms take turns batch by batch, so that a machine that slows down slows down all of them. Answers are written as they
come; a run that was stopped goes on where it was. Knows systems from outside only.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recursivemas.answering import Result
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, OutputError, unknown_name
from recursivemas.evaluation.metrics import mean, paired_difference
from recursivemas.evaluation.task import Sample, Task
from recursivemas.journal import Journal
from recursivemas.system import RecursiveSystem

CONTROLS = ("none", "zero", "shuffled", "random-link", "no-tools")
ARMS = ("latent", "text", "both", "solo", *CONTROLS, "no-feedback", "vote", "system")
OF_A_ROLE = ("solo", "none", "shuffled")
"""Arms that can be had of a role: `solo:critic`."""
ALONE = ("solo", "vote", "system")
"""Arms whose rounds, if they have any, are not those of the system."""
EQUAL_TIME = 1.05
"""What takes at most so many times as long counts as equally fast."""
MOST_VOTES = 256
VOTE_TEMPERATURE = 0.7
"""Of the samples that vote, unless the evaluation samples in any case."""
COUNTS = ("generated_tokens", "prompt_tokens", "latent_steps", "positions")

Progress = Callable[[int, int, "dict[Arm, list[Answer]]"], None]
"""Told how many batches are done, of how many, and all answers so far."""


@dataclass(frozen=True)
class Arm:
    """One way to answer."""

    name: str
    rounds: int
    variant: str | None = None
    num_latent_steps: int | None = None
    """By default those of the evaluation."""

    def __post_init__(self) -> None:
        if self.kind not in ARMS or (self.argument and self.kind not in (*OF_A_ROLE, "vote", "system")):
            raise ConfigError(unknown_name("arm", self.name, ARMS))
        if self.kind == "system" and not self.argument:
            raise ConfigError("the arm system needs a system: system:DIR")
        if self.kind == "vote" and self.argument and not (self.argument.isdigit() and int(self.argument) > 1):
            raise ConfigError(f"{self.name}: write how many samples vote, 2 or more, as in vote:8")

    @property
    def kind(self) -> str:
        """The name without what it is of: `solo` of `solo:expert`."""
        return self.name.partition(":")[0]

    @property
    def argument(self) -> str:
        """What stands after the name: `expert` of `solo:expert`."""
        return self.name.partition(":")[2]

    @property
    def role(self) -> str:
        """Who is alone, or whose messages are missing or shuffled, if the arm names somebody."""
        return self.argument if self.kind in OF_A_ROLE else ""

    @property
    def label(self) -> str:
        """Name, wording and latent steps, where it has any of its own: `text/graded`."""
        steps = "" if self.num_latent_steps is None else f" m={self.num_latent_steps}"
        return (self.name if self.variant is None else f"{self.name}/{self.variant}") + steps

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
    measures: dict[str, float] = field(default_factory=dict)
    """What the task measures beside the score."""


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
            "equal_time": self.equal_time(),
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
            if b.name != "latent" and (b.rounds == a.rounds or b.kind in ALONE)
        ]

    def equal_time(self) -> dict[str, Any] | None:
        """The best of all other arms that take no longer than the latent one with most rounds, compared with it.

        None if there is no latent arm, or nothing that is as fast. Controls are no rivals: they know nothing that
        `solo` does not know.
        """
        latent = max((arm for arm in self.answers if arm.name == "latent"), key=lambda arm: arm.rounds, default=None)
        if latent is None:
            return None
        limit = EQUAL_TIME * _mean_of(self.answers[latent], "seconds")
        rivals = [arm for arm in self.answers if arm.kind in ("text", "both", *ALONE)]
        as_fast = [arm for arm in rivals if _mean_of(self.answers[arm], "seconds") <= limit]
        if not as_fast:
            return None
        best = max(as_fast, key=lambda arm: _mean_of(self.answers[arm], "score"))
        return {**self._compare(latent, best), "rounds_of_b": best.rounds}

    def _arm(self, arm: Arm) -> dict[str, Any]:
        answers = self.answers[arm]
        score = mean([answer.score for answer in answers])
        is_latent = arm.name not in ("text", "none") and arm.kind not in ALONE
        steps = self.latent_steps if arm.num_latent_steps is None else arm.num_latent_steps
        measured = {name: mean([answer.measures[name] for answer in answers]) for name in self.task.measures}
        return {
            "arm": arm.name,
            "variant": arm.variant,
            "rounds": arm.rounds,
            "latent_steps": steps if is_latent else 0,
            "accuracy": score.value,
            "stderr": _number(score.stderr),
            "measures": {name: {"mean": m.value, "stderr": _number(m.stderr)} for name, m in measured.items()},
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
            "speedup": None if b.kind == "shuffled" else _number(speedup),
            "token_reduction": _number(1 - _mean_of(ours, "generated_tokens") / tokens) if tokens else None,
        }


def plan_arms(names: Sequence[str], rounds: Sequence[int], variants: Sequence[str]) -> list[Arm]:
    """The arms of an evaluation: text once for each wording, solo once, controls at the largest number of rounds."""
    arms: list[Arm] = []
    for name in names:
        if Arm(name, 1).kind in ALONE:
            arms.append(Arm(name, 1))
        elif Arm(name, 1).kind in CONTROLS:
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
    if len(task.samples) < 2 and any(arm.kind == "shuffled" for arm in arms):
        raise ConfigError("the arm shuffled hands each question the message of another: it needs two questions or more")
    if task.toolbox is None and any(arm.kind == "no-tools" for arm in arms):
        raise ConfigError(f"the arm no-tools takes the tools away, and the task '{task.name}' has none")
    steps = system.settings.num_latent_steps if num_latent_steps is None else num_latent_steps
    others = {arm.argument: _other(system, arm.argument) for arm in arms if arm.kind == "system"}
    arms = [
        replace(arm, rounds=others[arm.argument].settings.num_rounds) if arm.kind == "system" else arm for arm in arms
    ]
    log = EvalLog(system.settings.name, task, steps, seed)
    log.settings = {
        "num_latent_steps": steps,
        "batch_size": batch_size,
        "sampling": asdict(sampling) if sampling is not None else None,
        "device": str(next(iter(system.agents.values())).model.device),
        "dtype": str(next(iter(system.agents.values())).model.dtype).removeprefix("torch."),
    }
    runner_of = partial(_runner, system, others, task, sampling, steps, batch_size, seed)
    if task.toolbox is not None:
        limits = task.toolbox.limits
        log.settings["tools"] = {"names": list(task.toolbox.tools), "allow_repeats": limits.allow_repeats}
    identity = {**log.settings, "system": log.system, "task": task.name, "seed": seed, "n": len(task.samples)}
    identity["hash"] = _hash_of(task, system, *others.values())
    written = _Answers(journal, identity)
    arms = [
        Arm(f"vote:{written.votes() or _votes_in_time(runner_of, arms, task)}", 1) if arm.name == "vote" else arm
        for arm in arms
    ]
    log.answers |= {arm: [] for arm in arms}
    runs = {arm: runner_of(arm) for arm in arms}
    batches = [task.samples[start : start + batch_size] for start in range(0, len(task.samples), batch_size)]
    # What is shuffled, is shuffled over all questions, so that arm answers them in one go.
    jobs = [(arm, batch) for batch in batches for arm in arms if arm.kind != "shuffled"]
    jobs += [(arm, list(task.samples)) for arm in arms if arm.kind == "shuffled"]
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
    others: Mapping[str, RecursiveSystem],
    task: Task,
    sampling: SamplingParams | None,
    num_latent_steps: int,
    batch_size: int,
    seed: int,
    arm: Arm,
) -> Runner:
    players = {
        "solo": lambda: system.solo(arm.role or None),
        "vote": system.solo,
        "random-link": lambda: system.with_random_links(seed),
        "system": lambda: others[arm.argument],
    }
    player = players.get(arm.kind, lambda: system)()
    channel: str | dict[str, str] | None = arm.name if arm.name in ("text", "both", "none") else "latent"
    own_steps: int | None = num_latent_steps if arm.num_latent_steps is None else arm.num_latent_steps
    if arm.kind == "system":
        channel = own_steps = None  # as it is
    num_samples = int(arm.argument) if arm.kind == "vote" else 1
    if num_samples > 1 and (sampling is None or sampling.temperature == 0):
        most = player.settings.max_new_tokens if sampling is None else sampling.max_new_tokens
        sampling = SamplingParams(temperature=VOTE_TEMPERATURE, seed=seed, max_new_tokens=most)
    if arm.name == "no-feedback":
        edges = system.pattern.graph
        channel = {str(edge): "none" if system.pattern.is_feedback(edge) else "latent" for edge in edges}
    if arm.kind == "none" and arm.role:
        channel = _without(system, arm.role)

    def run(samples: Sequence[Sample]) -> list[Result]:
        results: list[Result] = player.run(
            [sample.question for sample in samples],
            num_rounds=arm.rounds,
            num_latent_steps=own_steps,
            channel=channel,
            intervene=arm.name if arm.kind in ("shuffled", "zero") else None,
            variant=arm.variant,
            sampling=sampling,
            trace="off",
            instructions=task.instructions,
            keys=[sample.id for sample in samples],
            batch_size=batch_size,
            seed=seed,
            num_samples=num_samples,
            tools=None if arm.kind == "no-tools" else task.toolbox,
        )
        return results

    return run


def _other(system: RecursiveSystem, name: str) -> RecursiveSystem:
    """Another system, on the same device and in the same precision."""
    model = next(iter(system.agents.values())).model
    return RecursiveSystem.from_pretrained(name, device=model.device, dtype=model.dtype)


def _votes_in_time(runner_of: Callable[[Arm], Runner], arms: Sequence[Arm], task: Task) -> int:
    """How many samples of the answering agent alone take as long as an answer of the latent arm with most rounds."""
    latent = max((arm for arm in arms if arm.name == "latent"), key=lambda arm: arm.rounds, default=None)
    if latent is None:
        raise ConfigError("the arm vote samples as often as the time of latent allows: add latent, or say vote:8")
    some = task.samples[:64]
    few, many = 2, 10
    seconds = {}
    for arm in (latent, Arm(f"vote:{few}", 1), Arm(f"vote:{many}", 1)):
        run = runner_of(arm)
        # The first of them warms up; the least time is the one that was disturbed least.
        seconds[arm.name] = min(sum(result.usage.seconds for result in run(some)) for _ in range(4))
    each = max(seconds[f"vote:{many}"] - seconds[f"vote:{few}"], 1e-9) / (many - few)
    fitting = few + int((seconds["latent"] - seconds[f"vote:{few}"]) / each)
    return min(max(fitting, 2), MOST_VOTES)


def _without(system: RecursiveSystem, role: str) -> dict[str, str]:
    """The channel of every edge when a role sends nothing. Raises `ConfigError` if it never does."""
    senders = dict.fromkeys(edge.source for edge in system.pattern.graph)
    if role not in senders:
        raise ConfigError(f"none:{role}: {unknown_name('sender', role, senders)}")
    return {str(edge): "none" if edge.source == role else "latent" for edge in system.pattern.graph}


def _warm_up(runs: dict[Arm, Runner], samples: Sequence[Sample]) -> None:
    """First calls are slow for reasons of their own (allocation, lazy loading); they are not timed."""
    for arm, run in runs.items():
        if arm.rounds == max(each.rounds for each in runs if each.name == arm.name) and len(samples) > 1:
            run(samples)


def _score(task: Task, sample: Sample, result: Result) -> Answer:
    text = _elected(task, sample, result.samples) if result.samples else result.text
    score = task.scorer(text, sample.target, sample.metadata)
    return Answer(
        sample.id,
        text,
        score.value,
        score.answer,
        result.finished,
        result.usage.seconds,
        **{name: result.usage.total(name) for name in COUNTS},
        measures={name: measure(text, sample.metadata) for name, measure in task.measures.items()},
    )


def _elected(task: Task, sample: Sample, texts: Sequence[str]) -> str:
    """The first text that gives the answer which most of them give; those from which none can be read do not count."""
    read = [task.scorer(text, sample.target, sample.metadata).answer for text in texts]
    votes = Counter(each for each in read if each is not None)
    return texts[read.index(votes.most_common(1)[0][0])] if votes else texts[0]


def _hash_of(task: Task, *systems: RecursiveSystem) -> str:
    """Changes with the questions, with what they are scored against, and with every part of the system."""
    digest = hashlib.sha256(f"{task.seed}{task.instructions}{getattr(task.scorer, '__name__', '')}".encode())
    digest.update("\0".join(task.measures).encode())
    for sample in task.samples:
        digest.update(f"{sample.id}\0{sample.question}\0{sample.target}\0".encode())
    for system in systems:
        system.hash_into(digest)
    return digest.hexdigest()


class _Answers:
    """Answers of an earlier run and of this one, by arm and question; on disk, if there is a file for them."""

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._journal = None if file is None else Journal(file, identity, "an evaluation")
        self._known: dict[tuple[str, str], Answer] = {}
        for _, record in self._journal.records() if self._journal is not None else ():
            try:
                arm, answer = record.pop("arm"), Answer(**record)
            except (KeyError, TypeError):
                raise OutputError(
                    f"{file} is not the record of an evaluation; choose another place with --out"
                ) from None
            self._known[arm, answer.id] = answer

    def votes(self) -> int | None:
        """How many samples voted in the run that is gone on with, if any did."""
        labels = {label.partition(" ")[0] for label, _ in self._known}
        return next((int(label.partition(":")[2]) for label in labels if label.startswith("vote:")), None)

    def find(self, arm: Arm, samples: Sequence[Sample]) -> list[Answer] | None:
        """The answers of an arm to these questions, if all of them are there."""
        found = [self._known.get((str(arm), sample.id)) for sample in samples]
        return None if None in found else [answer for answer in found if answer is not None]

    def append(self, arm: Arm, answers: Sequence[Answer]) -> None:
        """Keep some answers."""
        if self._journal is not None:
            self._journal.append([{"arm": str(arm), **asdict(answer)} for answer in answers])


def _mean_of(answers: Sequence[Answer], name: str) -> float:
    return mean([float(getattr(answer, name)) for answer in answers]).value


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value
