"""The whole loop: what rounds, latent steps, agents, batches and kept prompts cost, in latents and in text.

A message in text has as many tokens as one in latents has steps, and answers are equally long: both arms hand on as
much, on one engine, from one set of prompts. Positions are those that the meter counted; beside them stands the closed
formula. Knows systems and loads; knows nothing of single steps.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from recursivemas.bench.machine import peak_memory
from recursivemas.bench.playing import Load, expected_positions, play, recursion_of, seconds_by_round
from recursivemas.bench.sections import Goal, Row, Section
from recursivemas.bench.timing import Arm, Measured, take_turns
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.trace import Usage

Progress = Callable[[str], None]
CHANNELS = ("latent", "text")
ROUNDS_GOAL, LATENT_STEPS_GOAL, REUSE_GOAL = 4.4, 2.3, 0.6


@dataclass(frozen=True)
class Case:
    """One point of a sweep: a system, its questions, and how they are played."""

    system: RecursiveSystem
    questions: Sequence[str]
    load: Load
    writes_words: bool = True
    """Whether a text is read as as many tokens as were written, so that its positions are known beforehand."""

    @property
    def fits(self) -> bool:
        """Whether the contexts have room for it."""
        recursion, plan = recursion_of(self.system), self.load.plan(self.system)
        return all(space.fits(question) for space in recursion.prompt_spaces(plan) for question in self.questions)

    @property
    def expected(self) -> int | str:
        """Positions of the first question by the closed formula, where it holds."""
        if self.load.channel == "text" and not self.writes_words:
            return "–"
        return expected_positions(self.system, self.questions[0], self.load)


def measure(
    cases: Mapping[str, Case],
    repeats: int,
    progress: Progress | None = None,
    *,
    warm_up: Collection[str] | None = None,
) -> tuple[dict[str, Measured], dict[str, list[list[Usage]]]]:
    """Seconds of every case, and what every question used in every repeat, the warm-up included."""
    used: dict[str, list[list[Usage]]] = {name: [] for name in cases}

    def arm(name: str, case: Case) -> Arm:
        def act() -> None:
            used[name].append(play(case.system, case.questions, case.load))

        return lambda: act

    system = next(iter(cases.values())).system
    arms = {name: arm(name, case) for name, case in cases.items()}
    return take_turns(arms, repeats, device_of(system), progress, warm_up=warm_up), used


def device_of(system: RecursiveSystem) -> torch.device:
    """Where the answering role's model is."""
    return system.agents[system.pattern.answers].model.device


def sweep(
    name: str,
    title: str,
    cases: Mapping[int, Case],
    *,
    label: str,
    repeats: int,
    note: str = "",
    goal: Callable[[dict[int, Measured]], list[Goal]] | None = None,
    progress: Progress | None = None,
) -> Section:
    """One size after the other in both channels: time of a question, positions, and the ratio to the size before."""
    both = {f"{channel} {size}": _in(case, channel) for channel in CHANNELS for size, case in cases.items()}
    told = None if progress is None else lambda arm: progress(f"{label}: {arm}")
    took, used = measure(both, repeats, told, warm_up=[f"{channel} {min(cases)}" for channel in CHANNELS])
    rows: list[Row] = []
    for channel in CHANNELS:
        before: Measured | None = None
        for size in cases:
            key = f"{channel} {size}"
            case, seconds = both[key], took[key]
            positions = [usage.positions for usage in used[key][-1]]
            rows.append(
                {
                    "channel": channel,
                    label: size,
                    "a question": seconds.milliseconds(len(case.questions)),
                    "run / row before": "–" if before is None else seconds.over(before),
                    "positions": positions[0],
                    "by the formula": case.expected,
                    "questions a second": seconds.rate(len(case.questions)),
                }
            )
            before = seconds
    latent = {size: took[f"latent {size}"] for size in cases}
    return Section(name, title, rows, goal(latent) if goal is not None else (), note)


def rounds_goal(latent: dict[int, Measured]) -> list[Goal]:
    """Four rounds over one."""
    if not {1, 4} <= latent.keys():
        return []
    return [Goal("4 rounds / 1 round, latent", latent[4].over(latent[1]), at_most=ROUNDS_GOAL)]


def latent_steps_goal(latent: dict[int, Measured]) -> list[Goal]:
    """Twice the latent steps."""
    if not {32, 64} <= latent.keys():
        return []
    return [Goal("m = 64 / m = 32", latent[64].over(latent[32]), at_most=LATENT_STEPS_GOAL)]


def prefixes(case: Case, *, repeats: int, judged: bool, progress: Progress | None = None) -> Section:
    """Prompts up to their first slot kept for all rounds, or read anew in every turn; for both channels alike."""
    num_rounds = case.load.num_rounds
    arms = {
        f"{channel} {'kept' if kept else 'anew'}": replace(
            case, load=replace(case.load, channel=channel, reuse_prefixes=kept)
        )
        for channel in CHANNELS
        for kept in (True, False)
    }
    took, used = measure(arms, repeats, None if progress is None else lambda arm: progress(f"prefixes: {arm}"))
    # Neither the first round, which reads what is kept, nor the last, in which the answer is written.
    later = {
        name: Measured(tuple(_later_round(usages, num_rounds) for usages in each[1:]), "s")
        for name, each in used.items()
    }
    rows: list[Row] = []
    for name, arm in arms.items():
        channel, _, way = name.partition(" ")
        rows.append(
            {
                "channel": channel,
                "beginnings of prompts": "kept" if way == "kept" else "read anew",
                "whole run, a question": took[name].milliseconds(len(case.questions)),
                "a later round, a question": later[name].milliseconds(len(case.questions)),
                "kept / anew, a later round": later[name].over(later[f"{channel} anew"]),
                "positions": used[name][-1][0].positions,
                "by the formula": arm.expected,
            }
        )
    ratio = later["latent kept"].over(later["latent anew"])
    goals = [Goal("a later round with kept prefixes / without", ratio, at_most=REUSE_GOAL)] if judged else []
    text, latent = took["text kept"].over(took["latent kept"]), took["text anew"].over(took["latent anew"])
    note = (
        f"{num_rounds} rounds, batch {len(case.questions)}. Text over latents, whole run: {text.median:.2f} with "
        f"prefixes kept for both, {latent.median:.2f} with them for neither."
    )
    return Section("prefixes", "Beginnings of prompts: kept, or read anew in every turn", rows, goals, note)


def memory(system: RecursiveSystem, questions: Sequence[str], load: Load, batch_sizes: Sequence[int]) -> Section:
    """What weights, links and a position in a cache take; on a GPU, the peak of a batch as well."""
    rows: list[Row] = []
    for model in {id(agent.model): agent.model for agent in system.agents.values()}.values():
        roles = [role for role, agent in system.agents.items() if agent.model is model]
        rows.append(
            {
                "what": f"weights of the {', '.join(roles)}",
                "MB": sum(each.numel() * each.element_size() for each in model.network.parameters()) / 1e6,
            }
        )
        rows.append({"what": f"a position of the {', '.join(roles)} in a cache", "MB": _bytes_of_position(model) / 1e6})
    links = [*system.links.values(), *(agent.inner_link for agent in system.agents.values())]
    size = sum(each.numel() * each.element_size() for link in links for each in link.parameters())
    rows.append({"what": "all links", "MB": size / 1e6})
    device = device_of(system)
    for batch_size in batch_sizes if device.type == "cuda" else batch_sizes[-1:]:
        for channel in CHANNELS:
            asked = [questions[row % len(questions)] for row in range(batch_size)]
            play(system, asked, replace(load, channel=channel))
            rows.append({"what": f"peak, batch {batch_size}, {channel}", "MB": peak_memory(device) / 1e6})
    on_cpu = "On a CPU the peak is that of the whole process, with all that it has loaded."
    note = "" if device.type == "cuda" else on_cpu
    return Section("memory", "Memory", rows, note=note)


def _later_round(usages: Sequence[Usage], num_rounds: int) -> float:
    """Mean seconds of the rounds between the first and the last."""
    seconds = seconds_by_round(usages)
    rounds = range(2, num_rounds)
    return sum(seconds[round] for round in rounds) / len(rounds)


def _bytes_of_position(model: LanguageModel) -> float:
    """Bytes by which the cache of one row grows with a position, while no window is full."""
    sizes = []
    for length in (8, 16):
        cache = model.new_cache(1)
        with torch.no_grad():
            model.step(cache, model.embed(torch.zeros(1, length, dtype=torch.long)))
        sizes.append(cache.num_bytes)
    return (sizes[1] - sizes[0]) / 8


def _in(case: Case, channel: str) -> Case:
    return replace(case, load=replace(case.load, channel=channel))
