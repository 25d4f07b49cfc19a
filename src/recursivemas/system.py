"""RecursiveSystem: the parts of a system, made into something that answers questions.

`run`, `stream` and `unroll` stand around the one loop (recursion.py): batches, traces and the meter in the first two,
gradients in the third. Here a system is also built, loaded, saved, and turned into its controls.

Knows its parts; knows nothing of data sets, losses, schedules or servers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

import torch
from torch import Tensor

from recursivemas.answering import Answering, Event, Result, TextDelta
from recursivemas.assembly import link_models, read_linked, write_parts
from recursivemas.batches import as_questions, check_whole
from recursivemas.channels import LATENT_SOURCES
from recursivemas.checkpoint import SystemSettings, atomic_directory, find_system, read_manifest
from recursivemas.config import parse
from recursivemas.errors import CheckpointError, ConfigError, InputError, PatternError, unknown_name
from recursivemas.interventions import Intervention
from recursivemas.links import DEFAULT_DESIGN
from recursivemas.models import LanguageModel, load_models
from recursivemas.parts import CALIBRATION_TEXT, Parts
from recursivemas.patterns import Pattern
from recursivemas.planning import Intervene, RunOptions, as_intervention, make_plan
from recursivemas.prompts import PromptSet
from recursivemas.publishing import push
from recursivemas.recursion import PlayedTurn, Recursion
from recursivemas.release.reading import read_release
from recursivemas.release.writing import write_release
from recursivemas.residency import turns_for
from recursivemas.running import Run
from recursivemas.trace import Meter

Progress = Callable[[int, int], None]


class RecursiveSystem(Parts):
    """Frozen agents, a pattern, prompts, and the links between the agents."""

    @cached_property
    def _recursion(self) -> Recursion:
        through_inner_link = self.through_inner_link
        return Recursion(self.agents, self.links, self.pattern, self.prompts, through_inner_link=through_inner_link)

    @property
    def _answering(self) -> Answering:
        return Answering(self, self._recursion)

    # Making and saving

    @classmethod
    def build(
        cls,
        *,
        agents: Mapping[str, str | Path | LanguageModel | Mapping[str, Any]],
        pattern: str | Path | dict[str, Any] | Pattern = "sequential",
        prompts: str | Path | dict[str, Any] | PromptSet | None = None,
        roles: Mapping[str, str] | None = None,
        design: str = DEFAULT_DESIGN,
        link_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        compile: bool = False,
        residency: str = "all",
        **settings: Any,
    ) -> "RecursiveSystem":
        """A new system with untrained links, as loud as their readers are used to.

        `agents` gives for each role a model, or its Hugging Face name or directory, or a mapping with that as `model`
        and options of its own (dtype, device, device_map, attn_implementation, revision); roles with the same name and
        options share one copy. `prompts` defaults to the bundled set with the pattern's name. `roles` gives roles of
        the pattern other names, which `agents` then has; prompts in the old names are renamed as well. With
        residency `one` agents take turns on the device (see residency.py); `compile`: see the method of this name.
        Settings: see `SystemSettings`.
        """
        table = Pattern.load(pattern)
        words = PromptSet.load(prompts if prompts is not None else table.name)
        if roles:
            table = table.renamed(dict(roles))
            words = words.renamed(roles) if roles.keys() <= words.roles.keys() else words
        models = load_models(agents, dtype=dtype, device=device, turns=turns_for(residency))
        linked = link_models(models, table, design=design, options=link_options or {}, seed=seed)
        chosen = parse(SystemSettings, {"name": table.name, **settings}, where="settings of the system")
        system = cls(*linked, table, words, chosen)
        system.place_links()
        system.calibrate(CALIBRATION_TEXT)
        if compile:
            system.compile()
        return system

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        compile: bool = False,
        residency: str = "all",
    ) -> "RecursiveSystem":
        """Load a bundled system (`"ward"`), a directory, or a Hugging Face repository.

        `options` gives agents settings of their own, by role, or `*` for all: device, dtype, device_map, quantization,
        attn_implementation. With residency `one` agents take turns on the device, each read from disk once (see
        residency.py); `compile`: see the method of this name. Raises `CheckpointError` naming the part that is missing,
        corrupt, or does not fit.
        """
        directory = find_system(name_or_path)
        manifest = read_manifest(directory)
        agents, links = read_linked(directory, manifest, options or {}, dtype=dtype, device=device, residency=residency)
        try:
            system = cls(
                agents, links, manifest.pattern, manifest.prompts, manifest.settings, training=manifest.training
            )
        except PatternError as error:
            raise CheckpointError(f"the parts in {directory} do not fit together: {error}") from None
        system.place_links()
        if compile:
            system.compile()
        return system

    @classmethod
    def from_release(
        cls,
        source: str | Path,
        task: str = "math",
        *,
        pattern: str | Path | dict[str, Any] | Pattern | None = None,
        prompts: str | Path | Mapping[str, Any] | PromptSet | None = None,
        system_prompt: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "RecursiveSystem":
        """Load a system in the authors' released layout: a directory, or a style on the hub (`"sequential_light"`).

        `task` (math or code) picks the links where there are several sets. `pattern` is found out unless given, and its
        roles are called as in `prompts`: a YAML file, or a mapping of role to `first` / `later` / `always` / ... .
        Without it the words are ours, and a `ReleaseWarning` says that the links were trained on others. `dtype="auto"`
        takes the precision of the files.

        Raises `CheckpointError` naming the file and field that is missing, corrupt, or does not fit; no code in a file
        is run.
        """
        release = read_release(
            source,
            task,
            pattern=pattern,
            prompts=prompts,
            system_prompt=system_prompt,
            dtype=dtype,
            device=device,
        )
        settings = parse(SystemSettings, release.settings, where=str(source))
        training = {"release": release.origin}
        system = cls(release.agents, release.links, release.pattern, release.prompts, settings, training=training)
        system.place_links()
        return system

    def save_release(self, directory: str | Path, *, task: str = "math", dtype: str = "float32") -> None:
        """Write the system to a new directory in the authors' released layout; `dtype` is that of the links on disk.

        Raises `CheckpointError` with the reason if the layout cannot express it, and `OutputError`.
        """
        with atomic_directory(Path(directory)) as draft:
            write_release(
                draft,
                self.agents,
                self.links,
                self.pattern,
                self.prompts,
                message=self.settings.message,
                num_rounds=self.settings.num_rounds,
                task=task,
                dtype=dtype,
            )

    def save_pretrained(self, directory: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> None:
        """Write the system to a new directory, which appears only when it is complete.

        Models that came from the Hugging Face hub are saved by name and revision, others with their weights.
        `dtype` is the precision on disk; a system that was saved in half precision runs with rounded weights.
        Raises `OutputError`.
        """
        with atomic_directory(Path(directory), overwrite=overwrite) as draft:
            write_parts(draft, self, dtype=dtype)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        reports: Sequence[Mapping[str, Any]] = (),
        token: str | None = None,
        dtype: str | None = None,
    ) -> str:
        """Save the system and put it on the Hugging Face hub as `name`, with its model card; return the address.

        `reports` are those of evaluations, for the card (see publishing.py). Raises `ConfigError` without a token, and
        `OutputError`.
        """
        with TemporaryDirectory() as place:
            self.save_pretrained(Path(place) / "system", dtype=dtype)
            return push(Path(place) / "system", name, private=private, reports=reports, token=token)

    # Other systems out of this one

    def solo(self, role: str | None = None) -> "RecursiveSystem":
        """The answering role alone, with its `solo` prompt: the control every system is compared with.

        Or another role alone, with its own. Raises `PatternError` if there is no such role, or no such prompt.
        """
        pattern = self.pattern.alone(role)
        agents = {pattern.answers: self.agents[pattern.answers]}
        settings = self.settings.model_copy(update={"channel": "none"})
        return RecursiveSystem(
            agents, {}, pattern, self.prompts.alone(pattern.answers), settings, training=self.training
        )

    def with_random_links(self, seed: int = 0) -> "RecursiveSystem":
        """The same system with every link drawn anew, each as loud as the one it replaces: the other control."""
        agents, links = self.redrawn(seed)
        return RecursiveSystem(agents, links, self.pattern, self.prompts, self.settings, training=self.training)

    # Running

    def run(
        self, questions: str | Sequence[str], *, progress: Progress | None = None, **options: Unpack[RunOptions]
    ) -> Any:
        """Answer one question (a `Result`) or several (a list of them, in the order given). Options: see `RunOptions`.

        Questions are answered in batches by length, and come out as they would alone. A batch that does not fit into
        the memory of a GPU is halved. `progress` is told after every batch how many are answered, of how many. Raises
        `InputError`, `ConfigError`, `OutputError` or `NumericsError`.
        """
        several = as_questions(questions)
        results: dict[int, Result] = {}
        for event in Run(self._answering, options).answer(several):
            if isinstance(event, list):
                results |= {result.index: result for result in event}
                if progress is not None:
                    progress(len(results), len(several))
        answers = [results[index] for index in range(len(several))]
        return answers[0] if isinstance(questions, str) else answers

    def stream(
        self, questions: str | Iterable[str], *, tokens: bool = False, **options: Unpack[RunOptions]
    ) -> Iterator[PlayedTurn | TextDelta | Result]:
        """Answer one question, telling what happens: each turn, pieces of the answer, then the `Result`.

        Or answer any number of them, which may come from an iterator, and yield each `Result` when its batch is done;
        `index` says which question it belongs to. They are read some batches ahead, and forgotten when they are
        answered. With `tokens` pieces of the answers are told too. Options and errors as in `run`.
        """
        run = Run(self._answering, options)
        if isinstance(questions, str):
            return _told(run.answer(as_questions(questions), in_pieces=True), turns=True)
        several = as_questions(questions) if isinstance(questions, Sequence) else questions
        if not isinstance(several, Iterable):
            raise InputError(f"expected questions as texts, one after the other; got {type(several).__name__}")
        return _told(run.answer(several, in_pieces=tokens), turns=False)

    def unroll(
        self,
        questions: str | Sequence[str],
        *,
        num_rounds: int | None = None,
        num_latent_steps: int | None = None,
        channel: str | Mapping[str, str] = "latent",
        latent_source: str = "rollout",
        targets: Mapping[str, Sequence[str]] | None = None,
        answer_rounds: Sequence[int] = (),
        variant: str | None = None,
        instructions: str = "",
        intervene: str | Intervention | Intervene | None = None,
        keys: Sequence[str] | None = None,
        judge: Callable[[PlayedTurn], Tensor] | None = None,
        recompute: bool = False,
    ) -> Iterator[PlayedTurn]:
        """The same loop with gradients (eq. 2): play it turn by turn, for the caller to take losses from.

        Yields every turn; a turn that speaks has a `reading` from which `agent.loss(reading, answers)` is the
        cross-entropy of eq. 6. `answer_rounds` asks for such a turn in earlier rounds too. Text before a prompt's first
        slot is read without gradient; everything after it, and every cache, carries it. `keys` name the questions.

        `latent_source` is rollout, as in a run, or teacher: the states from which the agents would write their text; or
        targets: the states at the first `num_latent_steps` words of the text that a role is given in `targets`, one for
        each question, as the authors' trainer makes them. A role that is given none takes what it would write itself.

        `judge` takes the loss of a turn that speaks, which is then its `loss`. With `recompute` the backward pass
        computes each turn again when it comes to it, its loss too, and holds what it needs of one turn at a time: same
        gradients, about a third more time, and memory that hardly grows with the rounds.
        """
        several = as_questions(questions)
        plan = make_plan(
            self,
            {
                "num_rounds": num_rounds,
                "num_latent_steps": num_latent_steps,
                "channel": channel,
                "variant": variant,
                "instructions": instructions,
            },
        )
        for round in answer_rounds:
            check_whole("a round of answer_rounds", round, 1, plan.num_rounds)
        if latent_source not in LATENT_SOURCES:
            raise ConfigError(unknown_name("latent source", latent_source, LATENT_SOURCES))
        if targets and latent_source != "targets":
            raise ConfigError(f"targets are read with latent_source='targets' only, and it is '{latent_source}'")
        for role, texts in (targets or {}).items():
            if role not in self.agents:
                raise ConfigError("targets: " + unknown_name("role", role, self.agents))
            if isinstance(texts, str) or len(texts) != len(several) or not all(texts):
                raise InputError(f"targets of the {role}: give a text that is not empty for each question")
        plan = replace(
            plan,
            answer_rounds=tuple(answer_rounds),
            intervene=as_intervention(intervene),
            latent_source=latent_source,
            targets=dict(targets or {}),
            judge=judge,
            recompute=recompute,
        )
        meter = Meter(len(several), self._answering.model.device)
        return self._recursion.play(several, several if keys is None else keys, plan, meter)

    def __repr__(self) -> str:
        models = ", ".join(f"{role}: {agent.model.config.model_type}" for role, agent in self.agents.items())
        return f"RecursiveSystem({self.settings.name!r}, pattern={self.pattern.name!r}, {models})"


def _told(events: Iterator[Event], *, turns: bool) -> Iterator[PlayedTurn | TextDelta | Result]:
    """Results one by one, and whatever else is told; turns if they are wanted."""
    for event in events:
        if isinstance(event, list):
            yield from event
        elif turns or not isinstance(event, PlayedTurn):
            yield event
