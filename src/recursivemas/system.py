"""RecursiveSystem: frozen agents, a pattern, prompts and links, made into something that answers questions.

`run`, `stream` and `unroll` stand around the one loop (recursion.py): batches, traces and the meter in the first two,
gradients in the third. Here a system is also built, loaded, saved, and turned into its controls.

Knows agents, links, a pattern and prompts; knows nothing of data sets, losses, schedules or servers.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from recursivemas.agents import Agent, Message
from recursivemas.batches import as_questions, check_whole, in_batches
from recursivemas.channels import LATENT_SOURCES, choose_channels
from recursivemas.checkpoint import (
    FORMAT_VERSION,
    LinkRecord,
    Manifest,
    SystemSettings,
    atomic_directory,
    describe_agent,
    find_system,
    inside,
    library_version,
    link_folder,
    load_agent_model,
    read_link,
    read_manifest,
    write_link,
    write_manifest,
)
from recursivemas.config import parse
from recursivemas.context import fit_question
from recursivemas.decoding import Reply, SamplingParams, make_reply, told_so_far
from recursivemas.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    PatternError,
    unknown_name,
)
from recursivemas.interventions import INTERVENTIONS, Applied, Intervention, Replay, Zero
from recursivemas.links import DEFAULT_DESIGN, RecursiveLink
from recursivemas.loading import options_by_role
from recursivemas.models import LanguageModel, load_models
from recursivemas.patterns import Edge, Pattern
from recursivemas.prompts import PromptSet
from recursivemas.publishing import CARD, model_card, push
from recursivemas.recursion import TOOLS_AFTER, Plan, PlayedTurn, Recursion, Sent, count_reply, sampling_key
from recursivemas.release.reading import read_release
from recursivemas.release.writing import write_release
from recursivemas.tools import Tool, Toolbox, ToolLimits, as_toolbox
from recursivemas.trace import LEVELS, Meter, Trace, TracedMessage, Usage, check_trace_dir, save_traces

LONG_QUESTIONS = ("refuse", "truncate")

Tools = Sequence[Tool | str] | Tool | str | Toolbox
Progress = Callable[[int, int], None]
Intervene = Callable[[Message, str, int], Message]

# Ordinary words, read once by every model of a new system to see how loud its links come out.
CALIBRATION_TEXT = (
    "A team of three is asked how many days a trip will take. The first draws up a plan, the second looks for "
    "mistakes in it, and the third works out the answer: two days by train, then one more on foot."
)


@dataclass(frozen=True)
class Result:
    """The answer to one question, what it cost, and what was passed on."""

    text: str
    usage: Usage
    trace: Trace
    finished: bool = True
    """Whether the answer ended by itself; otherwise it was cut at `max_new_tokens`."""
    samples: tuple[str, ...] = ()
    """Where several answers were sampled (`num_samples`): all of them, the first of which is `text`."""
    cut_tokens: int = 0
    """Tokens that were cut off the beginning of a question too long for a context, where that was asked for."""


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer, while it is being written."""

    text: str


class RecursiveSystem:
    """Frozen agents, a pattern, prompts, and the links between the agents."""

    def __init__(
        self,
        agents: Mapping[str, Agent],
        links: Mapping[str, RecursiveLink],
        pattern: Pattern,
        prompts: PromptSet,
        settings: SystemSettings | None = None,
        *,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Put the parts together. `links` are the outer links by edge; inner links belong to the agents.

        Raises `PatternError` or `CheckpointError` if a part is missing, unknown, or does not fit.
        """
        self.agents = dict(agents)
        self.links = dict(links)
        self.pattern = pattern
        self.prompts = prompts
        self.settings = settings or SystemSettings()
        self.training = dict(training or {})
        self._check()
        self._recursion = Recursion(self.agents, self.links, pattern, prompts, through_inner_link=self._through_inner)

    def _check(self) -> None:
        self.prompts.variant(self.settings.variant)
        choose_channels(self.settings.channel, self._edge_names)
        for role in self.agents:
            if role not in self.pattern.roles:
                raise PatternError(f"pattern '{self.pattern.name}': " + unknown_name("role", role, self.pattern.roles))
        for role in self.pattern.roles:
            if role not in self.agents:
                raise PatternError(f"the pattern '{self.pattern.name}' needs an agent for the role '{role}'")
            inner = self.agents[role].inner_link.config
            self._check_width(f"inner link of '{role}'", inner.source_size, role, "thinks")
            self._check_slots(role)
        for name in self.links:
            if name not in self._edge_names:
                raise PatternError(f"pattern '{self.pattern.name}': " + unknown_name("edge", name, self._edge_names))
        for edge in self.pattern.graph:
            if str(edge) not in self.links:
                raise CheckpointError(f"the system has no link for the edge '{edge}'")
            config = self.links[str(edge)].config
            self._check_width(f"link '{edge}'", config.source_size, edge.source, "thinks")
            self._check_width(f"link '{edge}'", config.target_size, edge.target, "reads")

    def _check_slots(self, role: str) -> None:
        sources = {edge.source for edge in self.pattern.sources(role)}
        slots = self.prompts.slots(role)
        for slot in sorted(slots - sources):
            raise PatternError(
                f"prompt set '{self.prompts.name}', {role}: {unknown_name('slot', slot, sources)}; the pattern "
                f"'{self.pattern.name}' has no edge {slot}->{role}"
            )
        for source in sorted(sources - slots):
            raise PatternError(
                f"prompt set '{self.prompts.name}': no template of the {role} has the slot {{latents:{source}}}, so "
                f"the edge {source}->{role} of the pattern '{self.pattern.name}' would lead nowhere"
            )

    def _check_width(self, link: str, size: int, role: str, does: str) -> None:
        hidden_size = self.agents[role].model.hidden_size
        if size != hidden_size:
            raise CheckpointError(
                f"the {link} is made for {size}-wide states, but the {role} {does} in {hidden_size} dimensions; "
                "was it trained for another pair of models?"
            )

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
        **settings: Any,
    ) -> "RecursiveSystem":
        """A new system with untrained links, as loud as their readers are used to.

        `agents` gives for each role a model, or its Hugging Face name or directory, or a mapping with that as `model`
        and options of its own (dtype, device, device_map, attn_implementation, revision); roles with the same name and
        options share one copy. `prompts` defaults to the bundled set with the pattern's name. `roles` gives roles of
        the pattern other names, which `agents` then has; prompts in the old names are renamed as well. Settings: see
        `SystemSettings`.
        """
        table = Pattern.load(pattern)
        words = PromptSet.load(prompts if prompts is not None else table.name)
        if roles:
            table = table.renamed(dict(roles))
            words = words.renamed(roles) if roles.keys() <= words.roles.keys() else words
        models = load_models(agents, dtype=dtype, device=device)
        for role in table.roles:
            if role not in models:
                raise PatternError(f"the pattern '{table.name}' needs an agent for the role '{role}'")
        options = dict(link_options or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            team = {
                role: Agent(role, model, RecursiveLink.inner(model.hidden_size, design=design, **options))
                for role, model in models.items()
            }
            links = {
                str(edge): RecursiveLink.outer(
                    models[edge.source].hidden_size, models[edge.target].hidden_size, design=design, **options
                )
                for edge in table.graph
            }
        chosen = parse(SystemSettings, {"name": table.name, **settings}, where="settings of the system")
        system = cls(team, links, table, words, chosen)
        system._place_links()
        system.calibrate(CALIBRATION_TEXT)
        return system

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "RecursiveSystem":
        """Load a bundled system (`"ward"`), a directory, or a Hugging Face repository.

        `options` gives agents settings of their own, by role, or `*` for all: device, dtype, device_map, quantization,
        attn_implementation. Raises `CheckpointError` naming the part that is missing, corrupt, or does not fit.
        """
        directory = find_system(name_or_path)
        manifest = read_manifest(directory)
        chosen = options_by_role(options or {}, manifest.agents)
        models: dict[str, LanguageModel] = {}
        keys = {role: repr((record, sorted(chosen[role].items()))) for role, record in manifest.agents.items()}
        for role, record in manifest.agents.items():
            if keys[role] not in models:
                settings = {"dtype": dtype, "device": device, **chosen[role]}
                models[keys[role]] = load_agent_model(directory, role, record, **settings)
        links = {
            name: read_link(inside(directory, saved.folder), saved.sha256) for name, saved in manifest.links.items()
        }
        for role in manifest.agents:
            if role not in links:
                raise CheckpointError(f"{directory}: the role '{role}' has no inner link")
        agents = {role: Agent(role, models[keys[role]], links.pop(role)) for role in manifest.agents}
        try:
            system = cls(
                agents, links, manifest.pattern, manifest.prompts, manifest.settings, training=manifest.training
            )
        except PatternError as error:
            raise CheckpointError(f"the parts in {directory} do not fit together: {error}") from None
        system._place_links()
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
        system._place_links()
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
            records = {}
            folders: dict[int, str] = {}
            for role, agent in self.agents.items():
                model = agent.model
                if id(model) not in folders:
                    folders[id(model)] = model.source or f"agents/{role}"
                    if model.source is None:
                        model.save_pretrained(draft / folders[id(model)], dtype=dtype)
                records[role] = describe_agent(draft, model, folders[id(model)])
            links = {
                name: LinkRecord(
                    folder=link_folder(name), sha256=write_link(draft / link_folder(name), link, dtype=dtype)
                )
                for name, link in self.all_links.items()
            }
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                library_version=library_version(),
                settings=self.settings,
                pattern=self.pattern,
                prompts=self.prompts,
                agents=records,
                links=links,
                training=self.training,
            )
            write_manifest(draft, manifest)
            if "stages" in self.training:
                (draft / CARD).write_text(model_card(draft, manifest), encoding="utf-8")

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

    @torch.no_grad()
    def with_random_links(self, seed: int = 0) -> "RecursiveSystem":
        """The same system with every link drawn anew, each as loud as the one it replaces: the other control.

        Loudness is compared on states of the senders while they read `CALIBRATION_TEXT`.
        """

        def seed_of(name: str) -> int:
            return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")

        agents: dict[str, Agent] = {}
        links: dict[str, RecursiveLink] = {}
        for role, agent in self.agents.items():
            ids = torch.tensor([agent.model.encode(CALIBRATION_TEXT)], device=agent.model.device)
            states = agent.model.states(ids)[0]
            inner = agent.inner_link.redraw(seed_of(role), states)
            agents[role] = Agent(role, agent.model, inner)
            for name, link in self.links.items():
                if Edge.parse(name).source == role:
                    old, new = (agent.inner_link(states), inner(states)) if self._through_inner else (states, states)
                    links[name] = link.redraw(seed_of(name), new, link(old).float().norm(dim=-1).mean().item())
        return RecursiveSystem(agents, links, self.pattern, self.prompts, self.settings, training=self.training)

    @property
    def _through_inner(self) -> bool:
        return self.settings.message == "inner+outer"

    # Links

    @property
    def all_links(self) -> dict[str, RecursiveLink]:
        """Inner links by role and outer links by edge: all that is ever trained."""
        return {**{role: agent.inner_link for role, agent in self.agents.items()}, **self.links}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of all links by `link/tensor` name. The language models have none that train."""
        return {
            f"{name}/{tensor}": parameter
            for name, link in self.all_links.items()
            for tensor, parameter in link.named_parameters()
        }

    @torch.no_grad()
    def calibrate(self, text: str) -> None:
        """Size every link by how its reader embeds this text (see `RecursiveLink.calibrate`)."""
        for role, agent in self.agents.items():
            ids = agent.model.encode(text)
            states = agent.model.states(torch.tensor([ids], device=agent.model.device))[0]
            agent.inner_link.calibrate(states, agent.model.embedding_norm(ids))
            for edge in self.pattern.graph:
                if edge.source == role:
                    reader = self.agents[edge.target].model
                    link = self.links[str(edge)]
                    sent = agent.inner_link(states) if self._through_inner else states
                    link.calibrate(sent, reader.embedding_norm(reader.encode(text)))

    def _place_links(self) -> None:
        for agent in self.agents.values():
            agent.inner_link.to(agent.model.device).requires_grad_(False).eval()
        for edge in self.pattern.graph:
            self.links[str(edge)].to(self.agents[edge.source].model.device).requires_grad_(False).eval()

    # Running

    def run(
        self,
        questions: str | Sequence[str],
        *,
        num_rounds: int | None = None,
        num_latent_steps: int | None = None,
        channel: str | Mapping[str, str] | None = None,
        sampling: SamplingParams | None = None,
        trace: str | bool = "summary",
        trace_dir: Path | None = None,
        intervene: str | Intervention | Intervene | None = None,
        variant: str | None = None,
        instructions: str = "",
        keys: Sequence[str] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_samples: int = 1,
        tools: Tools | None = None,
        tools_after: str = "last",
        tool_limits: ToolLimits | None = None,
        progress: Progress | None = None,
        on_long_question: str | None = None,
    ) -> Any:
        """Answer one question (a `Result`) or several (a list of them, in the order given).

        `channel` is one name for all edges, or one for each (`*` for all others); `variant` a wording of the prompts;
        `instructions` go where the prompts say `{instructions}`. `trace` is off, summary or full (True means full);
        with `trace_dir` tensors go to disk batch by batch. `intervene` is shuffled, shuffled:ROLE, zero, or a function
        (see interventions.py); `seed` orders what is shuffled. `keys` name the questions for sampling (default: text).
        `num_samples` answers are sampled from the same latents, which are thought once; the first is what would be
        sampled alone. `tools` are what the answering role can call while it writes (see tools/), within `tool_limits`:
        in its answer (`tools_after="last"`), or in `every` round.
        A batch that does not fit into the memory of a GPU is halved. A question that does not fit into a context is
        refused, or with `on_long_question="truncate"` cut on its left (see context.py). Raises `InputError`,
        `ConfigError` or `NumericsError`.
        """
        several = as_questions(questions)
        level = _trace_level(trace)
        plan = self._plan(num_rounds, num_latent_steps, channel, sampling, variant, instructions)
        plan = self._equipped(plan, tools, tools_after, tool_limits)
        names = list(keys) if keys is not None else several
        if len(names) != len(several):
            raise InputError(f"{len(names)} keys were given for {len(several)} questions; give one for each")
        check_whole("batch_size", batch_size, 1, 1_000_000)
        check_whole("num_samples", num_samples, 1, 1_000_000)
        if num_samples > 1 and plan.sampling.temperature == 0:
            raise ConfigError(f"{num_samples} answers at temperature 0 would all be the same; give a temperature")
        asked, cut = self._cut(several, plan, on_long_question)
        order, plan_of = self._intervened(plan, intervene, asked, names, seed)

        def answer(rows: list[int]) -> list[Result]:
            some = [asked[row] for row in rows], [names[row] for row in rows]
            done = self._answer(*some, plan_of(rows), level, num_samples)
            return [_mark_cut(result, several[row], cut[row]) for row, result in zip(rows, done, strict=True)]

        place = Path(trace_dir) if trace_dir is not None else None
        if place is not None:
            check_trace_dir(place, level)
        results: dict[int, Result] = {}
        for number, (rows, done) in enumerate(in_batches(answer, order, batch_size)):
            if place is not None:
                kept = save_traces(place, [result.trace for result in done], batch=number)
                done = [replace(result, trace=each) for result, each in zip(done, kept, strict=True)]
            results.update(zip(rows, done, strict=True))
            if progress is not None:
                progress(len(results), len(order))
        answers = [results[row] for row in range(len(several))]
        return answers[0] if isinstance(questions, str) else answers

    def stream(
        self,
        question: str,
        *,
        num_rounds: int | None = None,
        num_latent_steps: int | None = None,
        channel: str | Mapping[str, str] | None = None,
        sampling: SamplingParams | None = None,
        variant: str | None = None,
        instructions: str = "",
        tools: Tools | None = None,
        tools_after: str = "last",
        tool_limits: ToolLimits | None = None,
        on_long_question: str | None = None,
    ) -> Iterator[PlayedTurn | TextDelta | Result]:
        """Answer one question, telling what happens: each turn, pieces of the answer, then the `Result`.

        Options as in `run`. Raises `InputError`, `ConfigError` or `NumericsError`.
        """
        [question] = as_questions([question])
        plan = self._plan(num_rounds, num_latent_steps, channel, sampling, variant, instructions)
        plan = self._equipped(plan, tools, tools_after, tool_limits)
        meter = Meter(1, self._answering_model.device)
        trace = self._new_trace(question, question, plan, "summary")
        asked, [cut] = self._cut([question], plan, on_long_question)
        # Gradients are switched off around each step, not around the yields: the mode is the caller's in between.
        turns = self._recursion.play(asked, [question], plan, meter)
        while True:
            with torch.no_grad():
                played = next(turns, None)
                if played is None:
                    return
                self._record([trace], played)
            if not played.turn.speaks:
                yield played
                continue
            tokens: list[int] = []
            told = ""
            name = sampling_key(question, played.turn)
            session = self._recursion.tool_session(played.turn, asked, plan)
            steps = played.agent.speak_steps(played.reading, plan.sampling, [name], session)
            while True:
                with torch.no_grad(), meter.phase(played.turn.round, played.turn.role, "decode"):
                    taken = next(steps, None)
                if taken is None:
                    break
                tokens += [token for _, token in taken]
                calls = session.calls(0) if session is not None else ()
                text = told_so_far(make_reply(played.agent.model, tokens, plan.sampling, calls), plan.sampling)
                if len(text) > len(told):
                    yield TextDelta(text[len(told) :])
                    told = text
            reply = make_reply(
                played.agent.model, tokens, plan.sampling, session.calls(0) if session is not None else ()
            )
            if len(reply.text) > len(told):
                yield TextDelta(reply.text[len(told) :])
            count_reply(meter, played.turn, [reply])
            _record_calls([trace], played, [reply])
            trace.answer = reply.text
            yield _mark_cut(Result(reply.text, meter.usages()[0], trace, reply.finished), question, cut)

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
        plan = self._plan(num_rounds, num_latent_steps, channel, None, variant, instructions)
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
        meter = Meter(len(several), self._answering_model.device)
        return self._recursion.play(several, several if keys is None else keys, plan, meter)

    # Batches

    def _answer(
        self, questions: list[str], keys: list[str], plan: Plan, level: str, num_samples: int = 1
    ) -> list[Result]:
        """Play one batch and speak, so many times from where the answering role has read."""
        meter = Meter(len(questions), self._answering_model.device)
        traces = [self._new_trace(*pair, plan, level) for pair in zip(questions, keys, strict=True)]
        replies: list[Reply] = []
        with torch.no_grad():
            for played in self._recursion.play(questions, keys, plan, meter):
                self._record(traces, played)
                if played.turn.speaks:
                    with meter.phase(played.turn.round, played.turn.role, "decode"):
                        names = [sampling_key(key, played.turn, index) for key in keys for index in range(num_samples)]
                        reading = played.reading
                        asked = [question for question in questions for _ in range(num_samples)]
                        session = self._recursion.tool_session(played.turn, asked, plan)
                        if num_samples > 1:
                            rows = torch.arange(len(keys), device=reading.state.device)
                            reading = reading.select(rows.repeat_interleave(num_samples))
                        replies = played.agent.speak(reading, plan.sampling, names, session)
                    count_reply(meter, played.turn, replies)
                    _record_calls(traces, played, replies[::num_samples])
        results = []
        for row, (usage, trace) in enumerate(zip(meter.usages(), traces, strict=True)):
            first, *others = replies[row * num_samples : (row + 1) * num_samples]
            trace.answer = first.text
            samples = (first.text, *(each.text for each in others)) if others else ()
            results.append(Result(first.text, usage, trace, first.finished, samples))
        return results

    def _intervened(
        self,
        plan: Plan,
        intervene: str | Intervention | Intervene | None,
        questions: list[str],
        keys: list[str],
        seed: int,
    ) -> tuple[list[int], Callable[[list[int]], Plan]]:
        """The order in which questions are answered, and the plan for some of them, under an intervention."""
        order = list(range(len(questions)))
        if intervene is None:
            return order, lambda rows: plan
        if isinstance(intervene, Replay) and intervene.batch_sizes - {len(questions)}:
            recorded = max(intervene.batch_sizes)
            raise InputError(f"messages of {recorded} questions were recorded; give just these, not {len(questions)}")
        kind, _, sender = intervene.partition(":") if isinstance(intervene, str) else ("", "", "")
        if kind != "shuffled":
            applied = as_intervention(intervene)
            return order, lambda rows: replace(plan, intervene=applied.for_rows(rows))
        if sender and not any(edge.source == sender for edge in self.pattern.graph):
            senders = dict.fromkeys(edge.source for edge in self.pattern.graph)
            raise ConfigError(f"{intervene}: {unknown_name('sender', sender, senders)}")
        if len(questions) < 2:
            raise InputError("shuffled hands each question the message of another one: give at least two questions")
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
        following = dict(zip(order, [*order[1:], order[0]], strict=True))

        def of_the_next(rows: list[int]) -> Plan:
            donors = [following[row] for row in rows]
            sent = self._messages([questions[row] for row in donors], [keys[row] for row in donors], plan)
            chosen = {place: each for place, each in sent.items() if sender in ("", Edge.parse(place[0]).source)}
            return replace(plan, intervene=Replay(chosen))

        return order, of_the_next

    def _messages(self, questions: list[str], keys: list[str], plan: Plan) -> Sent:
        """Every message of a batch; nobody speaks."""
        messages: Sent = {}
        meter = Meter(len(questions), self._answering_model.device)
        with torch.no_grad():
            for played in self._recursion.play(questions, keys, plan, meter):
                messages.update({(edge, played.turn.round): message for edge, message in played.messages.items()})
        return messages

    def _cut(self, questions: list[str], plan: Plan, on_long_question: str | None) -> tuple[list[str], list[int]]:
        """The questions as they are read, and how many tokens (of the role that answers) were cut off each."""
        wanted = self.settings.on_long_question if on_long_question is None else on_long_question
        if wanted not in LONG_QUESTIONS:
            raise ConfigError(unknown_name("way with long questions", wanted, LONG_QUESTIONS))
        if wanted == "refuse":
            return questions, [0] * len(questions)
        prompts = self._recursion.prompt_spaces(plan)
        kept = [fit_question(question, prompts) for question in questions]
        lengths = [[len(ids) for ids in self._answering_model.encode_batch(texts)] for texts in (questions, kept)]
        return kept, [before - after for before, after in zip(*lengths, strict=True)]

    # Settings and records

    @property
    def _answering_model(self) -> LanguageModel:
        return self.agents[self.pattern.answers].model

    def _plan(
        self,
        num_rounds: int | None,
        num_latent_steps: int | None,
        channel: str | Mapping[str, str] | None,
        sampling: SamplingParams | None,
        variant: str | None,
        instructions: str | None = None,
    ) -> Plan:
        rounds = self.settings.num_rounds if num_rounds is None else num_rounds
        steps = self.settings.num_latent_steps if num_latent_steps is None else num_latent_steps
        check_whole("num_rounds", rounds, 1, 1000)
        check_whole("num_latent_steps", steps, 0, 100_000)
        variant = self.settings.variant if variant is None else variant
        self.prompts.variant(variant)
        return Plan(
            int(rounds),
            int(steps),
            choose_channels(self.settings.channel if channel is None else channel, self._edge_names),
            sampling or SamplingParams(max_new_tokens=self.settings.max_new_tokens),
            variant,
            instructions or "",
        )

    def _equipped(self, plan: Plan, tools: Tools | None, tools_after: str, tool_limits: ToolLimits | None) -> Plan:
        """The plan with the tools of a run."""
        if tools_after not in TOOLS_AFTER:
            raise ConfigError(unknown_name("time for tools", tools_after, TOOLS_AFTER))
        toolbox = as_toolbox(tools, tool_limits)
        return replace(plan, tools=toolbox, tools_after=tools_after) if toolbox.tools else plan

    @property
    def _edge_names(self) -> list[str]:
        return [str(edge) for edge in self.pattern.graph]

    def _new_trace(self, question: str, key: str, plan: Plan, level: str) -> Trace:
        settings = {
            "system": self.settings.name,
            "pattern": self.pattern.name,
            "channel": {edge: channel.name for edge, channel in plan.channels.items()},
            "num_rounds": plan.num_rounds,
            "num_latent_steps": plan.num_latent_steps,
            "variant": plan.variant,
            "instructions": plan.instructions,
            "sampling": plan.sampling.__dict__,
            "key": key,
            "intervention": type(plan.intervene).__name__,
            **({} if plan.tools is None else {"tools": list(plan.tools.tools), "tools_after": plan.tools_after}),
            "library_version": library_version(),
        }
        return Trace(level, question, settings)

    def _record(self, traces: Sequence[Trace], played: PlayedTurn) -> None:
        """Put what arrived in this turn into the traces, and before it what was at hand and is read now."""
        if traces[0].level == "off":
            return
        _record_calls(traces, played, played.replies)
        arrived = {(edge, played.turn.round): message for edge, message in played.messages.items()}
        for (edge, round), message in {**played.known, **arrived}.items():
            source, target = Edge.parse(edge)
            reader = self.agents[target].model
            size = 0 if message.latents is None else message.latents.shape[1]
            nearest: list[Any] = []
            norms: list[list[float]] = []
            if message.latents is not None and size:
                nearest = reader.nearest_tokens(message.latents.flatten(0, 1))
                norms = (message.latents.float().norm(dim=-1) / reader.mean_embedding_norm).tolist()
            for row, trace in enumerate(traces):
                trace.messages.append(
                    TracedMessage(
                        round,
                        source,
                        target,
                        None if message.texts is None else message.texts[row],
                        norms[row] if size else None,
                        nearest[row * size : (row + 1) * size] if size else None,
                        self._kept(message, row) if trace.level == "full" else None,
                    )
                )

    @staticmethod
    def _kept(message: Message, row: int) -> Tensor | None:
        return None if message.latents is None else message.latents[row].detach().cpu().clone()

    def __repr__(self) -> str:
        models = ", ".join(f"{role}: {agent.model.config.model_type}" for role, agent in self.agents.items())
        return f"RecursiveSystem({self.settings.name!r}, pattern={self.pattern.name!r}, {models})"


def _record_calls(traces: Sequence[Trace], played: PlayedTurn, replies: Sequence[Reply]) -> None:
    """Put the tools that were called in some replies into the traces."""
    turn = played.turn
    for trace, reply in zip(traces, replies, strict=False):  # a role that wrote nothing has no replies
        if trace.level != "off":
            trace.calls += [replace(call, round=turn.round, role=turn.role) for call in reply.calls]


def _mark_cut(result: Result, question: str, cut_tokens: int) -> Result:
    """A result that says how much of its question was cut off."""
    if cut_tokens:
        result.trace.question = question
        result.trace.settings["cut_tokens"] = cut_tokens
    return replace(result, cut_tokens=cut_tokens)


def as_intervention(given: str | Intervention | Intervene | None) -> Intervention:
    """An intervention from its name, or from a plain function. Raises `ConfigError`."""
    if given is None:
        return Intervention()
    if isinstance(given, Intervention):
        return given
    if callable(given):
        return Applied(given)
    if given != "zero":
        raise ConfigError(unknown_name("intervention", given, INTERVENTIONS))
    return Zero()


def _trace_level(trace: str | bool) -> str:
    level = ("off", "full")[trace] if isinstance(trace, bool) else trace
    if level not in LEVELS:
        raise ConfigError(unknown_name("trace level", level, LEVELS))
    return level
