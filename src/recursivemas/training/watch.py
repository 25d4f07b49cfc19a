"""Watching the outer loop: what usually goes wrong without a word is said while it happens.

    no gradient      of a message or link that should have one: something is detached
    not moving       a link, or a tensor of it, that is as it was: frozen, or its learning rate is 0
    rounded          weights that half precision can write, so that small updates are lost
    loud, quiet      outputs far from the norm of what their reader is used to
    collapsed        outputs that are the same for all questions, or lie on a line
    outlier          one sample whose gradient is far above that of all others, after clipping sample by sample
    answer leak      what agents read changes with the gold answer, before they have given theirs

A warning says what was seen, what is usual, and what to do. What is usual is the range over the healthy runs that
`python benchmarks/planted_training.py` calibrates on; every limit stands in `LIMITS`, with that range, and the same
command says how often each planted fault is found, and how often a healthy run is accused. A wrong scale in some
dimensions alone is left to `recursivemas inspect links`, which reads enough words to tell.

Knows systems, links and gradients; knows nothing of optimizers, files or how warnings are shown.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.patterns import Edge
from recursivemas.recursion import PlayedTurn
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question
from recursivemas.training.gradients import Backflow, Place

DETACHED = "no gradient"
UNMOVED = "not moving"
ROUNDED = "rounded"
LOUD = "too loud"
QUIET = "too quiet"
COLLAPSED = "collapsed"
OUTLIER = "outlier"
LEAK = "answer leak"

ADVICE = {
    DETACHED: "find what is detached there (an intervention, no_grad, a copy), or leave out what shall not learn "
    "(outer.trained, outer.round_weights)",
    UNMOVED: "look at outer.lr_ratios and at what has requires_grad; if it shall stay as it is, say so "
    "(outer.trained: outer) and ignore this",
    ROUNDED: "keep links in float32, as recursivemas train does; only agents may be in half precision",
    LOUD: "size it: system.calibrate(TEXT), or train the alignment first",
    QUIET: "size it: system.calibrate(TEXT), or train the alignment first",
    COLLAPSED: "start again from the alignment, with a lower learning rate or a larger outer.anchor",
    OUTLIER: "look at this sample (its answer, its length) and take it out if it is wrong",
    LEAK: "set outer.leak_answer: false, or take the answer out of what agents are given; as it is, no loss shows what "
    "they can find out",
}


class Limit(NamedTuple):
    """From where on a figure is told, and where it was in healthy runs."""

    value: float
    usual: tuple[float, float]
    """The smallest and the largest value in the runs of the calibration."""


LIMITS = {
    "loudness": Limit(4.0, (0.45, 1.9)),
    "quietness": Limit(0.1, (0.45, 1.9)),
    "spread": Limit(0.02, (0.13, 7.8)),
    "directions": Limit(0.1, (0.3, 3.0)),
    "outlier": Limit(6.0, (1.0, 1.8)),
    "rounded": Limit(0.5, (0.0, 0.0005)),
}
"""By figure. loudness: norm of a link's outputs over the mean norm of its reader's embeddings, and quietness the same
from below. spread: variance of outputs between samples over their mean square, relative to that of what goes in.
directions: in how many directions (participation ratio) outputs differ, relative to what goes in. outlier: the largest
gradient of a sample over the next largest. rounded: share of a link's numbers that half precision can write."""

MIN_UPDATES = 5
"""A link is said not to move after so many updates."""

MIN_SAMPLES = 64
"""Gradients of so many samples must have been seen before one of them is said to stand out: with few, gaps are wide."""

MIN_OUTPUTS = 16
"""Outputs that are heard before a link is called loud or quiet, and questions before it is said to have collapsed."""

_SAMPLED = 2048
_PROJECTED = 32
_TOP = 3
_PROBED = 8


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    cause: str
    place: str
    """The link, message, round or sample."""
    seen: str
    usual: str
    step: int = 0
    """Steps done when it was seen."""

    def __str__(self) -> str:
        return f"{self.cause}: {self.seen}. Usual: {self.usual}. What to do: {ADVICE[self.cause]}."

    def to_plain(self) -> dict[str, str | int]:
        """As it is logged."""
        return {"warning": str(self), "cause": self.cause, "place": self.place}


class Watch:
    """Looks at the steps of an outer loop, and tells each thing once."""

    def __init__(
        self,
        system: RecursiveSystem,
        trained: Mapping[str, RecursiveLink],
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        """`trained` are the links that should learn, `ratios` the shares of the learning rate of their tensors."""
        self._trained = dict(trained)
        self._ratios = dict(ratios or {})
        self._told: set[tuple[str, str]] = set()
        self._outputs = {name: Outputs(name, *_ends(system, name)) for name in system.all_links}
        self._links = dict(system.all_links)
        self._start = {name: _sampled(link) for name, link in self._trained.items()}
        self._updates = 0
        self._gradients: dict[str, float] = {}
        """The largest gradient of each sample at the message that is read last, of those that stand out."""
        self._num_samples = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While a system is unrolled: look at what comes out of its links."""
        hooks = [link.register_forward_hook(partial(_hear, self._outputs[name])) for name, link in self._links.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def figures(self) -> dict[str, float]:
        """What `LIMITS` are about, as it is now: of every link, and of the samples so far."""
        found = {"gradient/outlier": self._outlier_ratio()[0]}
        for name, outputs in self._outputs.items():
            for figure, value in outputs.figures().items():
                found[f"output/{figure}/{name}"] = value
        for name in self._trained:
            found[f"rounded/{name}"] = _half_share(self._moved(name))
        return found

    def follow(self, backflows: Sequence[tuple[Sequence[str], Backflow]]) -> None:
        """After every backward pass: keep the largest gradients of samples."""
        self._updates += 1
        for names, backflow in backflows:
            if backflow.last is None:
                continue
            self._num_samples += len(names)
            for name, norm in zip(names, backflow.last.tolist(), strict=True):
                self._gradients[name] = max(norm, self._gradients.get(name, 0.0))
        top = sorted(self._gradients.items(), key=lambda item: item[1], reverse=True)[: _TOP + 1]
        self._gradients = dict(top)

    def look(self, step: int, backflows: Sequence[tuple[Sequence[str], Backflow]]) -> list[Finding]:
        """All that is new after the backward pass of a step (counted from 0)."""
        found = [
            *missing_gradients([backflow for _, backflow in backflows]),
            *self._still(),
            *self._rounded(),
            *(finding for name in self._outputs for finding in self._wrong_outputs(name)),
            *self._outliers(),
        ]
        return self.new(step, found)

    def new(self, step: int, found: Iterable[Finding]) -> list[Finding]:
        """Those that were not told yet."""
        fresh = [replace(each, step=step + 1) for each in found if (each.cause, each.place) not in self._told]
        self._told |= {(each.cause, each.place) for each in fresh}
        return fresh

    def _still(self) -> Iterator[Finding]:
        if self._updates <= MIN_UPDATES:
            return
        for name, link in self._trained.items():
            now = _sampled(link)
            still = [each for each, values in now.items() if torch.equal(values, self._start[name][each])]
            if not still:
                continue
            whole = len(still) == len(now)
            reason = self._why_still(name, still, link, now)
            what = f"{name} has not moved" if whole else f"{', '.join(still)} of {name} has not moved"
            yield Finding(
                UNMOVED,
                name if whole else f"{name}/{', '.join(still)}",
                f"{what} in {self._updates - 1} updates{reason}",
                "every tensor moves with the first update",
            )

    def _why_still(self, name: str, still: Sequence[str], link: RecursiveLink, now: Mapping[str, Tensor]) -> str:
        gradients = [dict(link.named_parameters())[each].grad for each in still]
        if all(self._ratios.get(f"{name}/{each}", 1.0) == 0 for each in still):
            return ": its share of the learning rate is 0"
        if all(each is None for each in gradients):
            return ": its weights take no gradient (frozen)"
        if not any(each is not None and bool(each.any()) for each in gradients):
            return ": its gradient is 0"
        values = torch.cat([now[each] for each in still])
        if _half_share(values) > LIMITS["rounded"].value:
            return ", though it has a gradient; half precision can write all its numbers, where small updates get lost"
        return ", though it has a gradient: the optimizer passes it over, or its learning rate is 0"

    def _rounded(self) -> Iterator[Finding]:
        limit = LIMITS["rounded"]
        for name, link in self._trained.items() if self._updates > MIN_UPDATES else ():
            values = self._moved(name)
            share = _half_share(values)
            kinds = {str(each.dtype).removeprefix("torch.") for each in link.parameters()} - {"float32", "float64"}
            if not kinds and (not len(values) or share <= limit.value):
                continue
            said = f"{100 * share:.0f}% of the weights of {name} that have moved are numbers half precision can write"
            if kinds:
                said = f"weights of {name} are in {', '.join(sorted(kinds))}"
            yield Finding(ROUNDED, name, said, "float32, where less than 1% are")

    def _moved(self, name: str) -> Tensor:
        """Some of those numbers of a link that are no more what they were."""
        now = _sampled(self._trained[name])
        return torch.cat([values[values != self._start[name][each]] for each, values in now.items()])

    def _wrong_outputs(self, name: str) -> Iterator[Finding]:
        outputs = self._outputs[name]
        found = outputs.figures()
        loudness = found.get("loudness")
        if loudness is not None:
            for cause, figure, is_wrong in (
                (LOUD, "loudness", loudness > LIMITS["loudness"].value),
                (QUIET, "quietness", loudness < LIMITS["quietness"].value),
            ):
                if is_wrong:
                    seen = f"what comes out of {name} is {loudness:.3g} times as loud as its reader's embeddings"
                    yield Finding(cause, name, seen, _range(figure, "times"))
        collapsed = [each for each in ("spread", "directions") if found.get(each, 1.0) < LIMITS[each].value]
        for figure, words in (
            ("spread", "differ between questions {:.2g} times as much as what goes in"),
            ("directions", "differ in {:.2g} times as many directions as what goes in"),
        ):
            if figure in collapsed[:1]:
                seen = f"outputs of {name} {words.format(found[figure])}"
                yield Finding(COLLAPSED, name, seen, _range(figure, "times"))
        if "spread" in found:
            outputs.forget()

    def _outlier_ratio(self) -> tuple[float, list[str]]:
        """The widest gap below the largest gradients of samples, as a ratio, and the samples above it."""
        top = sorted(self._gradients.items(), key=lambda item: item[1], reverse=True)
        gaps = [(top[i][1] / max(top[i + 1][1], 1e-30), i + 1) for i in range(len(top) - 1)]
        ratio, count = max(gaps, default=(1.0, 0))
        return ratio, [name for name, _ in top[:count]]

    def _outliers(self) -> Iterator[Finding]:
        limit = LIMITS["outlier"]
        ratio, names = self._outlier_ratio()
        if self._num_samples >= MIN_SAMPLES and ratio > limit.value:
            yield Finding(
                OUTLIER,
                ", ".join(names),
                f"the gradient of {', '.join(names)} is {ratio:.3g} times the largest of all other samples "
                f"({self._num_samples} so far), after clipping sample by sample",
                _range("outlier", "times"),
            )


def missing_gradients(backflows: Sequence[Backflow]) -> list[Finding]:
    """That there are messages, or links in some round, for which no part of a batch had a gradient, if that is so."""
    expected: list[Place] = list(dict.fromkeys(place for each in backflows for place in each.expected))
    reached = {place for each in backflows for place in each.reached()}
    missing = [place for place in expected if place not in reached]
    if not missing:
        return []
    rounds: dict[str, list[int]] = {}
    for name, round in missing:
        rounds.setdefault(name, []).append(round)
    name, round = missing[-1]
    where = ", ".join(f"{name} (round {', '.join(map(str, each))})" for name, each in rounds.items())
    said = f"the gradient ends before {name} in round {round}; none arrives at: {where}"
    return [Finding(DETACHED, ", ".join(rounds), said, "some at every message and link of every round")]


# --- outputs ----------------------------------------------------------------------------------------------------------


class Outputs:
    """What came out of a link since it was last looked at, in sums: of norms, and of a random projection."""

    def __init__(self, name: str, sender: LanguageModel, reader: LanguageModel) -> None:
        self.name = name
        self._reader = reader
        generator = torch.Generator().manual_seed(0)
        self._maps = [
            torch.randn(model.hidden_size, min(_PROJECTED, model.hidden_size), generator=generator)
            for model in (sender, reader)
        ]
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._norms, self._count = 0.0, 0
        self._moments: list[dict[int, _Moments]] = [{}, {}]
        """Of what went in and of what came out, by place in the message."""

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add one use of the link."""
        norms = outputs.float().norm(dim=-1)
        self._norms += norms.sum().item()
        self._count += norms.numel()
        if inputs.dim() < 3:
            return  # a step of a thought, not a message
        for moments, vectors, projection in zip(self._moments, (inputs, outputs), self._maps, strict=True):
            projected = vectors.float().cpu() @ projection
            for place in range(projected.shape[1]):
                moments.setdefault(place, _Moments()).add(projected[:, place].double())

    def figures(self) -> dict[str, float]:
        """Loudness; spread and directions relative to what went in, if enough was heard."""
        if self._count < MIN_OUTPUTS:
            return {}  # one message may be quiet, as that of an agent which has nothing to say
        found = {"loudness": self._norms / self._count / self._reader.mean_embedding_norm}
        inside, outside = (list(each.values()) for each in self._moments)
        if not inside or inside[0].count < MIN_OUTPUTS:
            return found
        spreads, directions = zip(*(_variety(each) for each in (inside, outside)), strict=True)
        return {**found, "spread": spreads[1] / spreads[0], "directions": directions[1] / directions[0]}


class _Moments:
    """Count, sum, and sum of outer products of vectors."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, vectors: Float[Tensor, "vector size"]) -> None:
        self.count += len(vectors)
        self.total = self.total + vectors.sum(dim=0)
        self.products = self.products + vectors.T @ vectors


def _variety(moments: Sequence[_Moments]) -> tuple[float, float]:
    """Variance between samples over the mean square, and the participation ratio of the directions it is in."""
    within, size = 0.0, 0.0
    covariance: Tensor | float = 0.0
    for each in moments:
        assert isinstance(each.total, Tensor)
        assert isinstance(each.products, Tensor)
        centred = each.products - torch.outer(each.total, each.total) / each.count
        covariance = covariance + centred
        within += centred.trace().item()
        size += each.products.trace().item()
    assert isinstance(covariance, Tensor)
    squares = covariance.square().sum().item()
    tiny = 1e-30
    return max(within, tiny) / max(size, tiny), max(covariance.trace().item() ** 2, tiny) / max(squares, tiny)


@torch.no_grad()
def _hear(outputs: Outputs, link: RecursiveLink, inputs: tuple[Tensor], output: Tensor) -> None:
    outputs.add(inputs[0].detach(), output.detach())


def _ends(system: RecursiveSystem, name: str) -> tuple[LanguageModel, LanguageModel]:
    """The models of a link's sender and reader; of an inner link both are one."""
    edge = Edge.parse(name) if name in system.links else Edge(name, name)
    return system.agents[edge.source].model, system.agents[edge.target].model


# --- weights ----------------------------------------------------------------------------------------------------------


def _sampled(link: RecursiveLink) -> dict[str, Tensor]:
    """Some numbers of every tensor, evenly spread: all of a small one."""
    found = {}
    for name, parameter in link.named_parameters():
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(len(flat), _SAMPLED), device=flat.device).round().long()
        found[name] = flat[places].float().cpu().clone()
    return found


def _half_share(values: Float[Tensor, " value"]) -> float:
    """Share of numbers other than 0 that bfloat16, or float16, can write."""
    values = values[values != 0]
    if not len(values):
        return 0.0
    shares = [(values == values.to(dtype).float()).float().mean().item() for dtype in (torch.bfloat16, torch.float16)]
    return max(shares)


def _range(figure: str, unit: str) -> str:
    low, high = LIMITS[figure].usual
    return f"{low:.2g} to {high:.2g} {unit}"


# --- data flow --------------------------------------------------------------------------------------------------------


Play = Callable[[Sequence[Question]], Iterable[PlayedTurn]]


@torch.no_grad()
def find_leak(play: Play, batch: Sequence[Question], answers: Sequence[str] = ()) -> Finding | None:
    """Whether anything that agents read, before they are judged, depends on the gold answer of a question.

    The same questions are played twice, the second time with each the answer of another one (of `answers`, if they
    are all the same). Where nothing leaks, everything that is read is the same, bit for bit; on devices on which no
    two runs are, it must differ by more than they do.
    """
    batch = batch[:_PROBED]
    others = _swapped(batch, answers)
    if others is None:
        return None
    given, swapped = (_readings(play(each)) for each in (batch, others))
    changed = {place for place, state in given.items() if not torch.equal(state, swapped[place])}
    if changed:
        again = _readings(play(batch))
        changed = {
            place
            for place in changed
            if (swapped[place] - given[place]).norm() > 10 * (again[place] - given[place]).norm()
        }
    if not changed:
        return None
    places = [place for place in given if place in changed]
    said = ", ".join(dict.fromkeys(f"{role} in round {round}" for role, round, _ in places))
    return Finding(
        LEAK,
        said,
        f"with another gold answer something else is read by: {said}",
        "nothing that is read depends on the gold answer",
    )


def _swapped(batch: Sequence[Question], answers: Sequence[str]) -> list[Question] | None:
    """Each question with another answer, wherever its own one stands; None if there is none."""
    pool = dict.fromkeys([*(each.answer for each in batch), *answers])
    found = []
    for place, question in enumerate(batch):
        others = [each for each in pool if each != question.answer]
        if not others:
            return None
        other = others[place % len(others)]
        targets = {role: other if text == question.answer else text for role, text in question.targets.items()}
        found.append(replace(question, answer=other, posterior={other: 1.0}, targets=targets))
    return found


def _readings(turns: Iterable[PlayedTurn]) -> dict[tuple[str, int, bool], Tensor]:
    """What every turn has read by the time it sends or speaks."""
    return {
        (played.turn.role, played.turn.round, played.turn.speaks): played.reading.state.float().cpu()
        for played in turns
    }
