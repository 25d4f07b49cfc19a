"""What `recursivemas bench` measures of a system: every section, with sizes that fit the time there is.

Knows which sections there are, and what is measured in each; knows nothing of terminals.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from recursivemas.agents import Agent
from recursivemas.bench import steps
from recursivemas.bench.loops import CHANNELS, Case, latent_steps_goal, memory, prefixes, rounds_goal, sweep
from recursivemas.bench.playing import Load
from recursivemas.bench.sections import Goal, Section, merged
from recursivemas.bench.subjects import NAMES, chain, numbered_questions, questions_for, random_model
from recursivemas.bench.timing import Measured
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

Progress = Callable[[str], None]
SECTIONS = (
    "latent-step",
    "generate",
    "uncached",
    "rounds",
    "latent-steps",
    "agents",
    "batch",
    "prefixes",
    "memory",
    "floor",
)
BATCH_SIZE = 8
WORDS_BEHIND = 20
"""Behind a slot, in the prompts of a random system."""
QUESTION, LONG_QUESTION = 79, 179
"""Words of a question to a random system: its prompts have 80, or 180, before their slot."""
REFERENCE = 256, 6
"""Width and layers for which the goals of whole runs are set."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    repeats: int = 9
    """Of single steps; of whole runs a third, three at least."""
    quick: bool = False
    """Small sizes alone."""
    compiled: bool = False
    """Single steps compiled, too."""

    @property
    def runs(self) -> int:
        """Repeats of what takes long."""
        return min(self.repeats, max(self.repeats // 3, 3))

    def some(self, sizes: Sequence[int]) -> list[int]:
        """All sizes, or the first two."""
        return list(sizes[:2] if self.quick else sizes)


@dataclass(frozen=True)
class Subject:
    """A system to be measured, and questions for it."""

    system: RecursiveSystem
    questions: Callable[[int, int], list[str]]
    """So many questions, of about so many words if they are made up."""
    is_random: bool

    @classmethod
    def of(cls, system: RecursiveSystem, seed: int = 0) -> "Subject":
        """A system as it is."""
        return cls(system, lambda count, _: questions_for(system, count, seed), is_random=False)

    @classmethod
    def random(
        cls, config: Mapping[str, Any], seed: int = 0, device: str | None = None, dtype: str | None = None
    ) -> "Subject":
        """Three agents in a chain on one model with random weights."""
        model = random_model(config, seed=seed, device=device, dtype=dtype)
        return cls(
            chain([model] * 3, after=WORDS_BEHIND),
            lambda count, words: numbered_questions(count, words, seed),
            is_random=True,
        )

    @property
    def answering_model(self) -> LanguageModel:
        """The model of the role that answers."""
        return self.system.agents[self.system.pattern.answers].model

    @property
    def agents(self) -> list[Agent]:
        """One agent of each model."""
        return list({id(agent.model): agent for agent in reversed(self.system.agents.values())}.values())[::-1]

    @property
    def is_reference(self) -> bool:
        """Whether the goals of whole runs are set for it."""
        model = self.answering_model
        return self.is_random and (model.hidden_size, model.config.num_hidden_layers) == REFERENCE

    def outgoing_link(self, agent: Agent) -> RecursiveLink:
        """A link that an agent sends through."""
        for edge in self.system.pattern.graph:
            if edge.source == agent.role:
                return self.system.links[str(edge)]
        return agent.inner_link


def sections_for(device: torch.device) -> tuple[str, ...]:
    """Those measured by default. On a CPU small models live in its caches, and the speed of memory is no floor."""
    return SECTIONS if device.type == "cuda" else tuple(name for name in SECTIONS if name != "floor")


class Suite:
    """All sections of one subject; a method for each, and sizes that fit into its contexts."""

    def __init__(self, subject: Subject, effort: Effort, progress: Progress | None = None) -> None:
        self._subject = subject
        self._effort = effort
        self._progress = progress

    def measure(self, names: Sequence[str]) -> Iterator[Section]:
        """The sections asked for, in their order; those for which the contexts are too short are left out."""
        makers: dict[str, Callable[[], Section | None]] = {
            "latent-step": lambda: self._of_agents(120 + 16, self._latent_step),
            "generate": lambda: self._of_agents(120 + 33, self._generate),
            "uncached": lambda: self._of_agents(120 + 16, self._uncached),
            "rounds": self._rounds,
            "latent-steps": self._latent_steps,
            "agents": self._agents,
            "batch": self._batch,
            "prefixes": self._prefixes,
            "memory": self._memory,
            "floor": lambda: self._of_agents(120 + 32, self._floor),
        }
        for name in SECTIONS:
            if name in names:
                section = makers[name]()
                if section is not None:
                    yield section

    def _of_agents(self, positions: int, measure: Callable[[Agent], Section]) -> Section | None:
        """Of every model one agent, if it reads so many positions."""
        agents = [agent for agent in self._subject.agents if positions <= (agent.model.max_positions or positions)]
        return merged([measure(agent) for agent in agents]) if agents else None

    # Single steps

    def _twin(self, agent: Agent) -> Agent | None:
        return steps.compiled_twin(agent) if self._effort.compiled else None

    def _latent_step(self, agent: Agent) -> Section:
        return steps.latent_steps(
            agent,
            compiled=self._twin(agent),
            batch_sizes=self._effort.some([8, 1, 32]),
            prompt_length=120,
            num_steps=16,
            repeats=self._effort.repeats,
            progress=self._progress,
        )

    def _generate(self, agent: Agent) -> Section:
        return steps.decode_steps(
            agent,
            self._subject.outgoing_link(agent),
            compiled=self._twin(agent),
            batch_sizes=self._effort.some([8, 1]),
            prompt_length=120,
            num_tokens=32,
            num_latent_steps=16,
            repeats=self._effort.repeats,
            progress=self._progress,
        )

    def _uncached(self, agent: Agent) -> Section:
        settings = [(120, 16)] if self._effort.quick else [(120, 16), (200, 48), (500, 48)]
        longest = agent.model.max_positions
        return steps.uncached(
            agent,
            settings=[(length, m) for length, m in settings if longest is None or length + m <= longest],
            batch_sizes=[8, 1],
            repeats=self._effort.runs,
            judged=self._subject.is_reference,
            progress=self._progress,
        )

    def _floor(self, agent: Agent) -> Section:
        return steps.floor(
            agent,
            compiled=self._twin(agent),
            batch_sizes=self._effort.some([1, 8, 32]),
            prompt_length=120,
            num_steps=32,
            repeats=self._effort.repeats,
            progress=self._progress,
        )

    # Whole runs

    def _rounds(self) -> Section | None:
        cases = {rounds: self._case(BATCH_SIZE, Load(rounds)) for rounds in self._effort.some([1, 2, 3, 4])}
        return self._sweep("rounds", "Rounds", "rounds", cases, rounds_goal)

    def _latent_steps(self) -> Section | None:
        sizes = self._effort.some([4, 16, 32, 64])
        cases = {m: self._case(BATCH_SIZE, Load(1, m, message_tokens=m)) for m in sizes}
        return self._sweep(
            "latent-steps", "Latent steps, or tokens of a message in text", "m", cases, latent_steps_goal
        )

    def _agents(self) -> Section | None:
        model = self._subject.answering_model
        questions = self._subject.questions(BATCH_SIZE, QUESTION)
        cases = {
            count: Case(chain([model] * count, after=WORDS_BEHIND), questions, Load(2), self._subject.is_random)
            for count in self._effort.some(range(1, len(NAMES) + 1))
        }
        title = "Agents in a row, on the model of the one who answers, two rounds"
        return self._sweep("agents", title, "agents", cases)

    def _batch(self) -> Section | None:
        cases = {size: self._case(size, Load(1)) for size in self._effort.some([1, 8, 64])}
        return self._sweep("batch", "Questions in a batch", "batch", cases)

    def _prefixes(self) -> Section | None:
        case = self._case(BATCH_SIZE, Load(3 if self._effort.quick else 4), LONG_QUESTION)
        if not (case.fits and replace(case, load=replace(case.load, channel="text")).fits):
            return None
        judged = self._subject.is_reference
        return prefixes(case, repeats=self._effort.runs, judged=judged, progress=self._progress)

    def _memory(self) -> Section | None:
        case = self._case(BATCH_SIZE, Load(1))
        sizes = self._effort.some([1, 8, 64])
        return memory(case.system, case.questions, case.load, sizes) if case.fits else None

    def _case(self, count: int, load: Load, words: int = QUESTION) -> Case:
        """So many questions to the system, played in one batch."""
        subject = self._subject
        return Case(subject.system, subject.questions(count, words), load, writes_words=subject.is_random)

    def _sweep(
        self,
        name: str,
        title: str,
        label: str,
        cases: Mapping[int, Case],
        goal: Callable[[dict[int, Measured]], list[Goal]] | None = None,
    ) -> Section | None:
        fitting = {
            size: case
            for size, case in cases.items()
            if all(replace(case, load=replace(case.load, channel=channel)).fits for channel in CHANNELS)
        }
        if not fitting:
            return None
        return sweep(
            name,
            title,
            fitting,
            label=label,
            repeats=self._effort.runs,
            note=_note(fitting),
            goal=goal if self._subject.is_reference else None,
            progress=self._progress,
        )


def _note(cases: Mapping[int, Case]) -> str:
    """What is the same in all cases of a sweep."""
    loads, batches = [case.load for case in cases.values()], {len(case.questions) for case in cases.values()}
    told = [f"batch {batches.pop()}"] if len(batches) == 1 else []
    for what, values in (
        ("rounds", {load.num_rounds for load in loads}),
        ("m", {load.num_latent_steps for load in loads}),
    ):
        told += [f"{what} = {values.pop()}"] if len(values) == 1 else []
    return (
        f"{', '.join(told)}; a text has as many tokens as a message has latents, the answer {loads[0].answer_tokens}."
    )
