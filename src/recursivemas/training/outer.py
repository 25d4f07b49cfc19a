"""Outer loop (eq. 6): the links learn together, from the answer's loss through the whole unrolled recursion.

    L_out = sum over rounds of w_r CE(answer after round r) + anchor * alignment loss

An answer counts from the round on in which it can be known (`Question.rounds`; 1 unless a world says otherwise).

Thoughts are rolled out as in inference, and gradients flow through every message, every cache and every round back to
every link; the language models stay as they are. Every part of the loss, and every safeguard, is a setting with its
reason (see `OuterSettings`). Knows a system and questions with answers; knows nothing of where these come from.

The authors' released trainer makes latents in another way, which can be had for comparison: `latent_source: targets`,
with `trained: outer`, `round_weights: last` and `anchor: 0`. Every role is given the text that it should write, and the
states at its first `num_latent_steps` tokens travel; the first role of the first round, upstream of which nothing is
trained, needs no gradient there and here. There the answering role is given the gold answer, and hands it on to the
next round: that leak is closed here (its own words travel), unless `leak_answer` opens it. Loss and gradient of a
sample are then those of that trainer in float32, where all rounds have one prompt for the answer. What is not
reproduced, because nobody wants it: a loss divided twice when gradients are accumulated; a schedule that runs as many
times too fast as there are processes; a cross-entropy taken, and links kept, in bfloat16; and a cut of long prompts on
the left that may take the message with it, where here a prompt that is too long is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from recursivemas.agents import Agent, Reading
from recursivemas.config import Config
from recursivemas.errors import ConfigError, InputError, NumericsError, unknown_name
from recursivemas.links import RecursiveLink
from recursivemas.patterns import Edge
from recursivemas.recursion import PlayedTurn
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import AlignmentPairs, alignment_loss
from recursivemas.training.data import Question, unjudged_tokens
from recursivemas.training.gradients import Backflow, figures, say_samples
from recursivemas.training.loop import ALONE, Fitted, LoopSettings, Progress, RunDirectory, Validation, fit
from recursivemas.training.processes import Processes
from recursivemas.training.watch import Finding, Watch, find_leak, missing_gradients

Warn = Callable[[Finding], None]

_OTHERS = 100
"""Questions whose answers are tried in the place of others'."""


class Phase(Config):
    """A part of the training that unrolls fewer rounds than the whole."""

    num_rounds: int = Field(ge=1)
    num_train_steps: int = Field(ge=1)


class OuterSettings(LoopSettings):
    """Settings of the outer loop."""

    num_train_steps: int = Field(default=300, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    """Start low: from a good alignment 3e-4 to 1e-3 improve it, 3e-3 may wipe it out."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    save_every: int = Field(default=25, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Questions of each step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Questions that are unrolled at the same time: memory grows with them, and the loss is the same. By default all
    questions of the step."""
    recompute: bool = False
    """Compute each turn again in the backward pass: same gradients, a third more time, memory that hardly grows with
    the rounds."""
    num_samples: int = Field(default=16384, ge=1)
    """Questions of the training split that steps draw from."""
    trained: Literal["outer", "inner+outer"] = "inner+outer"
    """Which links learn; the others stay as the stages before have left them. The paper trains `outer`."""
    num_rounds: int | None = Field(default=None, ge=1)
    """Rounds that are unrolled; by default those of the system."""
    curriculum: tuple[Phase, ...] = ()
    """Phases with fewer rounds at the start, for a system that is not yet good enough to learn from all rounds at once.
    One round at first teaches links to ignore the loop where early rounds already say something of the answer."""
    round_weights: Literal["every", "last"] | tuple[float, ...] = "every"
    """Which answers count. With the last round's alone (as in eq. 6) gradients of earlier rounds may vanish; with every
    round's they stay level. A tuple gives each round its weight."""
    anchor: float = Field(default=1.0, ge=0)
    """Weight of the alignment loss, kept on: it holds messages in the language that frozen readers know."""
    anchor_batch_size: int = Field(default=256, ge=1)
    """Token positions of each edge and step for it."""
    clip_messages: float | None = Field(default=None, gt=0)
    """For each sample, its gradient at a message is bounded to so many times its gradient at the last message. Few
    samples may carry a thousand times the median, and global clipping would throw away all the others."""
    lr_ratios: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Shares of the learning rate, by link (`planner`, `planner->critic`) or for all of a kind (`inner`, `outer`)."""
    latent_source: Literal["rollout", "teacher", "targets"] = "rollout"
    """Thoughts as in inference; or the states from which the agents would write their text: cheaper to trust, but
    never what a run meets. `targets`: states at the words of the text that each role is given with the question, as in
    the released trainer (see above)."""
    leak_answer: bool = False
    """Only to reproduce the released trainer, with `latent_source: targets`: the answering role reads the gold answer
    before it sends, so that rounds after the first are told what they should find out."""
    distillation: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that is taken against the exact posterior of a world instead of the one true answer."""
    num_validation: int = Field(default=1000, ge=2)
    """Questions of the validation split on which the checkpoint is chosen."""
    validate_every: int = Field(default=50, ge=1)
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one."""
    max_loss_ratio: float | None = Field(default=3.0, gt=1)

    @model_validator(mode="after")
    def _check(self) -> "OuterSettings":
        if sum(phase.num_train_steps for phase in self.curriculum) >= self.num_train_steps and self.curriculum:
            raise ConfigError(
                f"the phases of the curriculum take all {self.num_train_steps} steps (num_train_steps); leave some for "
                "the full number of rounds"
            )
        if isinstance(self.round_weights, tuple) and (
            not self.round_weights or min(self.round_weights) < 0 or self.round_weights[-1] == 0
        ):
            raise ConfigError(
                f"round_weights {self.round_weights} must give each round a weight of 0 or more, and the last one more "
                "than 0"
            )
        if self.leak_answer and self.latent_source != "targets":
            raise ConfigError(
                f"leak_answer gives the answering role the gold answer to read, which latent_source: "
                f"{self.latent_source} never does; leave it out, or take latent_source: targets"
            )
        return self

    def rounds_at(self, step: int, num_rounds: int) -> int:
        """How many rounds a step (counted from 0) unrolls."""
        for phase in self.curriculum:
            if step < phase.num_train_steps:
                return min(phase.num_rounds, num_rounds)
            step -= phase.num_train_steps
        return num_rounds

    def weights_of(self, num_rounds: int) -> dict[int, float]:
        """The weight of each round whose answer counts, when so many are unrolled; they add up to 1."""
        if self.round_weights == "last":
            return {num_rounds: 1.0}
        if self.round_weights == "every":
            return dict.fromkeys(range(1, num_rounds + 1), 1 / num_rounds)
        if len(self.round_weights) < num_rounds:
            raise ConfigError(f"round_weights has {len(self.round_weights)} weights for {num_rounds} rounds")
        # With fewer rounds than weights, the weights of the last rounds are those that stay.
        chosen = self.round_weights[-num_rounds:]
        return {round: weight / sum(chosen) for round, weight in enumerate(chosen, start=1) if weight > 0}


@dataclass
class OuterLoop:
    """The loss of a step of the outer loop, and what is to be said about it."""

    system: RecursiveSystem
    questions: Sequence[Question]
    settings: OuterSettings
    seed: int = 0
    anchors: Mapping[str, AlignmentPairs] = field(default_factory=dict)
    """Pairs of each edge for the alignment loss."""
    processes: Processes = ALONE
    watch: Watch | None = None
    """Looks for what goes wrong, in the first step and whenever figures are logged."""
    warn: Warn | None = None
    """Told what it finds."""
    _figures: dict[str, float] = field(default_factory=dict)
    _backflows: list[tuple[list[str], Backflow]] = field(default_factory=list)
    """Of every part of the batch: the names of its questions, and what flowed back."""
    _own: Sequence[Question] = ()
    """The questions of the step that this process unrolls."""
    _is_looked_at: bool = False
    _within_reach: dict[int, Sequence[Question]] = field(default_factory=dict)

    @property
    def num_rounds(self) -> int:
        """Rounds that are unrolled in the end."""
        return self.settings.num_rounds or self.system.settings.num_rounds

    def losses(self, step: int) -> Iterator[Float[Tensor, ""]]:
        """The loss of a step, in parts that add up to it; everything random in it follows from its number.

        Every part is that of some questions (`micro_batch_size`) of this process's share of the batch; the last one is
        that of the anchor, which the first process computes.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        num_rounds = self.settings.rounds_at(step, self.num_rounds)
        within = self.within_reach(num_rounds)
        rows = torch.randint(len(within), (self.settings.batch_size,), generator=generator).tolist()
        batch = [within[row] for row in rows]
        weights = self.settings.weights_of(num_rounds)
        # Every question weighs what it weighs in the mean over the whole batch, in whichever part it comes.
        known = {round: max(sum(question.rounds <= round for question in batch), 1) for round in weights}
        self._figures = {f"loss/round {round}": 0.0 for round in weights}
        self._backflows = []
        self._is_looked_at = self.watch is not None and (step == 0 or (step + 1) % self.settings.log_every == 0)
        self._own = own = self.processes.share(batch)
        size = self.settings.micro_batch_size or len(batch)
        for start in range(0, len(own), size):
            yield self._part(own[start : start + size], weights, known)
        if self.settings.anchor and self.anchors and self.processes.is_first:
            anchor = self._anchor_loss(generator)
            self._figures["loss/anchor"] = anchor.item()
            yield self.settings.anchor * anchor

    def _part(
        self, batch: Sequence[Question], weights: Mapping[int, float], known: Mapping[int, int]
    ) -> Float[Tensor, ""]:
        """What some questions of a batch, of which so many count in each round, add to its loss."""
        backflow = Backflow(trained_links(self.system, self.settings), clip=self.settings.clip_messages)
        names = [question.id for question in batch]
        self._backflows.append((names, backflow))
        parts = []
        for round, losses in self.losses_by_round(batch, weights, backflow).items():
            counts = torch.tensor([question.rounds <= round for question in batch], device=losses.device)
            mean = (losses * counts).sum() / known[round]
            self._figures[f"loss/round {round}"] += mean.item()
            parts.append(weights[round] * mean)
        total = torch.stack(parts).sum()
        if not total.requires_grad and any(each.requires_grad for each in self.system.trainable_parameters().values()):
            # No optimizer could do anything with it.
            raise NumericsError(f"the loss depends on no link. {missing_gradients([backflow])[0]}")
        return total

    def within_reach(self, num_rounds: int) -> Sequence[Question]:
        """The questions whose answers so many rounds can find. Raises `ConfigError` if there is none."""
        if num_rounds not in self._within_reach:
            found = [question for question in self.questions if question.rounds <= num_rounds]
            if not found:
                least = min(question.rounds for question in self.questions)
                raise ConfigError(f"no question can be answered in {num_rounds} rounds; the easiest one takes {least}")
            self._within_reach[num_rounds] = found
        return self._within_reach[num_rounds]

    def losses_by_round(
        self, batch: Sequence[Question], rounds: Mapping[int, float], backflow: Backflow
    ) -> dict[int, Float[Tensor, " batch"]]:
        """Cross-entropy of each question's answer after each of some rounds."""
        losses: dict[int, Tensor] = {}
        listening = self.watch.listening() if self.watch and self._is_looked_at else nullcontext()
        with backflow.recording(), listening:
            for played in self.unroll(batch, tuple(rounds), lambda played: self._answer_loss(played, batch)):
                backflow.watch(played)
                if played.loss is not None:
                    losses[played.turn.round] = played.loss
        return losses

    def unroll(
        self,
        batch: Sequence[Question],
        rounds: Sequence[int],
        judge: Callable[[PlayedTurn], Tensor] | None = None,
    ) -> Iterator[PlayedTurn]:
        """The turns of a batch whose answers after some rounds are judged, as they are played in training."""
        return self.system.unroll(
            [question.text for question in batch],
            num_rounds=max(rounds),
            answer_rounds=tuple(rounds),
            latent_source=self.settings.latent_source,
            targets=self._targets(batch),
            keys=[question.id for question in batch],
            judge=judge,
            recompute=self.settings.recompute,
        )

    def _targets(self, batch: Sequence[Question]) -> dict[str, list[str]]:
        """What roles are given to read before they send; the answering one only where the answer may leak."""
        if self.settings.latent_source != "targets":
            return {}
        answers = self.system.pattern.answers
        found = {role: [each.targets[role] for each in batch] for role in given_targets(self.system)}
        return {**found, answers: [each.answer for each in batch]} if self.settings.leak_answer else found

    def observe(self, step: int) -> dict[str, float]:
        """Figures of the step whose gradients have just been computed. Raises `NumericsError` naming what is wrong."""
        for names, backflow in self._backflows:
            backflow.check(names)
        shares = self.processes.gather(self._figures)
        self._figures = {name: sum(each.get(name, 0.0) for each in shares) for name in shares[0]}
        if (step + 1) % self.settings.log_every == 0:
            # Of this process's share: sample by sample, so that it says enough.
            self._figures |= figures([backflow for _, backflow in self._backflows])
            self._figures |= self._link_figures()
            self._figures |= self.watch.figures() if self.watch else {}
        if self.watch:
            self._look(step, self.watch)
        return self._figures

    def _look(self, step: int, watch: Watch) -> None:
        """See whether something has gone wrong, in any process, and tell it."""
        watch.follow(self._backflows)
        found = watch.look(step, self._backflows) if self._is_looked_at else []
        if step == 0 and self.processes.is_first:
            found += watch.new(step, self.find_leak(self._own))
        for finding in dict.fromkeys(each for share in self.processes.gather(found) for each in share):
            if self.warn is not None:
                self.warn(finding)

    def find_leak(self, batch: Sequence[Question]) -> list[Finding]:
        """What says that agents are told the gold answers of some questions; as a rule nothing does."""
        rounds = tuple(self.settings.weights_of(self.num_rounds))
        others = [question.answer for question in self.questions[:_OTHERS]]
        found = find_leak(lambda asked: self.unroll(asked, rounds), batch, others)
        return [] if found is None else [found]

    def _link_figures(self) -> dict[str, float]:
        """Gradient norm of each link over all rounds, before and after global clipping."""
        norms = {}
        for name, link in trained_links(self.system, self.settings).items():
            gradients = [each.grad for each in link.parameters() if each.grad is not None]
            norms[name] = nn.utils.get_total_norm(gradients).item() if gradients else 0.0
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        factor = min(1.0, self.settings.max_grad_norm / total) if total else 1.0
        before = {f"gradient/total/{name}": norm for name, norm in norms.items()}
        return before | {f"gradient/total_clipped/{name}": norm * factor for name, norm in norms.items()}

    def _answer_loss(self, played: PlayedTurn, batch: Sequence[Question]) -> Float[Tensor, " batch"]:
        share = self.settings.distillation
        losses = torch.zeros(len(batch), device=played.reading.state.device)
        if share < 1:
            answers = [question.answer for question in batch]
            losses = (1 - share) * played.agent.loss(
                played.reading,
                answers,
                as_rendered=self._as_rendered,
                is_cut=[question.is_cut for question in batch],
                unjudged=[unjudged_tokens(played.agent.model, answer) for answer in answers],
            )
        if share > 0:
            expected = expected_loss(played.agent, played.reading, batch, as_rendered=self._as_rendered)
            losses = losses + share * expected
        if not bool(losses.isfinite().all()):
            raise NumericsError(
                f"the loss of the {played.turn.role}'s answer in round {played.turn.round} is not finite for "
                f"{say_samples((~losses.isfinite()).tolist(), [question.id for question in batch])}."
            )
        return losses

    @property
    def _as_rendered(self) -> bool:
        return self.settings.latent_source == "targets"

    def _anchor_loss(self, generator: torch.Generator) -> Float[Tensor, ""]:
        through_inner = self.system.settings.message == "inner+outer"
        losses = []
        for name, pairs in self.anchors.items():
            size = (self.settings.anchor_batch_size,)
            chosen = torch.randint(len(pairs.states), size, generator=generator).to(pairs.states.device)
            states, targets = pairs.states[chosen], pairs.targets[chosen]
            features = self.system.agents[Edge.parse(name).source].inner_link(states) if through_inner else states
            losses.append(alignment_loss(self.system.links[name], features, targets))
        # Every link is where its sender is.
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def expected_loss(
    agent: Agent, reading: Reading, batch: Sequence[Question], *, as_rendered: bool = False
) -> Float[Tensor, " batch"]:
    """Cross-entropy against the posterior: of every answer that is possible, weighted by its probability."""
    rows, texts, weights = [], [], []
    for row, question in enumerate(batch):
        for answer, probability in question.posterior.items():
            rows.append(row)
            texts.append(answer)
            weights.append(probability)
    device = reading.state.device
    places = torch.tensor(rows, device=device)
    unjudged = [unjudged_tokens(agent.model, text) for text in texts]
    losses = agent.loss(reading.select(places), texts, as_rendered=as_rendered, unjudged=unjudged)
    weighted = losses * torch.tensor(weights, device=device, dtype=losses.dtype)
    return torch.zeros(len(batch), device=device, dtype=losses.dtype).index_add(0, places, weighted)


def trained_links(system: RecursiveSystem, settings: OuterSettings) -> dict[str, RecursiveLink]:
    """The links that learn: all of them, or the outer ones."""
    return dict(system.all_links if settings.trained == "inner+outer" else system.links)


def given_targets(system: RecursiveSystem) -> tuple[str, ...]:
    """The roles that are given a text where latents are taken from targets: all that send, but the answering one."""
    senders = {edge.source for edge in system.pattern.graph} - {system.pattern.answers}
    return tuple(role for role in system.pattern.roles if role in senders)


def check_questions(system: RecursiveSystem, questions: Sequence[Question], settings: OuterSettings) -> None:
    """Raise `InputError` if there is no question, or one lacks what these settings need."""
    if not questions:
        raise InputError("there are no questions for the outer loop")
    if settings.latent_source == "targets":
        for question in questions:
            for role in given_targets(system):
                if not question.targets.get(role, "").strip():
                    raise InputError(
                        f"the question {question.id} has no target for the {role}, and latent_source: targets takes "
                        f"latents from what each role should write; give the questions a column '{role}'"
                    )


def learning_rate_ratios(system: RecursiveSystem, settings: OuterSettings) -> dict[str, float]:
    """The share of the learning rate of every parameter. Raises `ConfigError` for a link that does not exist."""
    known = ["inner", "outer", *system.all_links]
    for name in settings.lr_ratios:
        if name not in known:
            raise ConfigError("lr_ratios: " + unknown_name("link", name, known))
    found = {}
    for name, link in system.all_links.items():
        kind = "outer" if name in system.links else "inner"
        ratio = settings.lr_ratios.get(name, settings.lr_ratios.get(kind, 1.0))
        found.update({f"{name}/{tensor}": ratio for tensor, _ in link.named_parameters()})
    return found


def check_outer(system: RecursiveSystem, settings: OuterSettings) -> None:
    """Raise `ConfigError` for settings that do not fit the system."""
    settings.weights_of(settings.num_rounds or system.settings.num_rounds)
    learning_rate_ratios(system, settings)
    if not system.settings.num_latent_steps or not system.links:
        raise ConfigError(
            "the outer loop trains what agents hand to each other: it needs a pattern with edges and num_latent_steps "
            f"of 1 or more, got {len(system.links)} edges and {system.settings.num_latent_steps} latent steps"
        )


def logged_warnings(run: RunDirectory) -> list[str]:
    """What a run was warned of in the outer loop, also before it was stopped and went on; each thing once."""
    log = run.path / "metrics.jsonl"
    if not log.exists():
        return []
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if "warning" in line]
    return list({(each["cause"], each["place"]): each["warning"] for each in records if "warning" in each}.values())


def train_outer(
    system: RecursiveSystem,
    questions: Sequence[Question],
    settings: OuterSettings,
    *,
    anchors: Mapping[str, AlignmentPairs] | None = None,
    validate: Callable[[RecursiveSystem], float] | None = None,
    seed: int = 0,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    processes: Processes = ALONE,
) -> Fitted:
    """Train the links of a system in place through its own recursion; they end as they did best on validation.

    `validate` scores the system on held-out questions, the higher the better; without it the last weights are kept.
    What seems wrong on the way (see watch.py) is logged, and told to `warn`; it stops nothing.
    Raises `NumericsError` when something is not finite, or diverges: the best weights are in place then.
    """
    check_outer(system, settings)
    check_questions(system, questions, settings)
    for link in system.all_links.values():
        link.float()
    trained = trained_links(system, settings)
    parameters = {
        f"{name}/{tensor}": parameter for name, link in trained.items() for tensor, parameter in link.named_parameters()
    }
    ratios = learning_rate_ratios(system, settings)

    def tell(finding: Finding) -> None:
        if run is not None:
            run.log({"stage": "outer", "step": finding.step, **finding.to_plain()})
        if warn is not None:
            warn(finding)

    watch = Watch(system, trained, ratios)
    loop = OuterLoop(system, questions, settings, seed, anchors or {}, processes, watch, tell)
    validation = None
    if validate is not None:
        validation = Validation(lambda: validate(system), settings.validate_every, settings.patience)
    return fit(
        "outer",
        parameters,
        loop.losses,
        settings,
        lr_ratios=ratios,
        observe=loop.observe,
        validation=validation,
        run=run,
        progress=progress,
        processes=processes,
    )
