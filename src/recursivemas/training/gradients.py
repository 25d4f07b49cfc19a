"""What flows back through an unrolled system: gradients per message, and per link and round, sample by sample.

A norm of the whole batch hides what matters: a few samples may carry a thousand times the median, and the signal may
vanish from round to round. So every message is watched where it crosses its edge (and clipped there, if that is asked
for), and the gradient of each link is taken apart by round and sample. Knows turns that were played and links; knows
no losses and no optimizer.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, grad, vmap

from recursivemas.errors import NumericsError
from recursivemas.links import RecursiveLink
from recursivemas.recursion import PlayedTurn

Place = tuple[str, int]
"""An edge or a link by name, and a round."""


class Backflow:
    """Gradients of one backward pass through an unrolled system."""

    def __init__(self, links: Mapping[str, RecursiveLink], *, clip: float | None = None) -> None:
        """`links` are those that are trained.

        `clip` bounds, for each sample, the norm of its gradient at every message to so many times its norm at the last
        one.
        """
        self.links = dict(links)
        self._clip = clip
        self._calls: dict[Place, list[_Call]] = defaultdict(list)
        self._unplaced: list[tuple[str, _Call, Tensor]] = []
        """With the output of each call: a call must not hold it, or neither would ever be let go."""
        self.expected: dict[Place, None] = {}
        """Messages, and trained links that were used, in the order of play: each should get a gradient."""
        self.last: Float[Tensor, " batch"] | None = None
        """Norm at the message that is read last, for each sample: what clipping goes by."""
        self._arrived: list[tuple[str, Place, Tensor]] = []
        """Every gradient that arrived at a message or at the output of a link, in the order of the backward pass."""
        self.before: dict[Place, Float[Tensor, " batch"]] = {}
        """Norm at each message, for each sample, as it comes from its reader."""
        self.after: dict[Place, Float[Tensor, " batch"]] = {}
        """The same after clipping."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While a system is unrolled: keep what goes into its links, and what comes out."""
        hooks = [link.register_forward_hook(partial(self._keep, name)) for name, link in self.links.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def watch(self, played: PlayedTurn) -> None:
        """Watch the messages of a turn, and attribute to its round the calls of links since the turn before."""
        round = played.turn.round
        self.expected.update(dict.fromkeys((name, round) for name, _, _ in self._unplaced))
        for edge, message in played.messages.items():
            if message.latents is not None:
                self.expected[edge, round] = None
                if message.latents.requires_grad:
                    message.latents.register_hook(partial(self._cross, (edge, round)))
        # After the hooks of messages: what a link gets back is what clipping has left.
        for name, call, output in self._unplaced:
            if output.requires_grad:
                output.register_hook(partial(self._arrive, (name, round), call))
                self._calls[name, round].append(call)
        self._unplaced.clear()

    def check(self, names: Sequence[str]) -> None:
        """Raise `NumericsError` with place, round and samples if a gradient is not finite: where it was so first."""
        for kind, (name, round), gradient in self._arrived:
            is_finite = gradient.flatten(1).isfinite().all(dim=1)
            if not bool(is_finite.all()):
                raise NumericsError(
                    f"the gradient that reaches the {kind} {name} in round {round} is not finite for "
                    f"{say_samples((~is_finite).tolist(), names)}."
                )

    def reached(self) -> set[Place]:
        """Those of `expected` at which a gradient has arrived that is not 0 for every sample."""
        messages = {place for place, norms in self.before.items() if bool(norms.any())}
        links = {
            place
            for place, calls in self._calls.items()
            if any(call.gradient is not None and bool(call.gradient.any()) for call in calls)
        }
        # A link and its message have one name: where the message gets nothing, the link cannot.
        return {place for place in self.expected if place in messages or (place in links and "->" not in place[0])}

    def of_links(self) -> dict[Place, Float[Tensor, " batch"]]:
        """Norm of the gradient of each link's parameters, by round, for each sample (after clipping at messages)."""
        return {place: _norms_of_samples(self.links[place[0]], calls) for place, calls in self._calls.items()}

    def gradient(self, link: str, round: int) -> dict[str, Tensor]:
        """The gradient of a link's parameters that comes from one round, summed over the batch."""
        total: dict[str, Tensor] = {}
        for name, each in _gradients(self.links[link], self._calls.get((link, round), [])).items():
            total[name] = each.sum(dim=0)
        return total

    def _cross(self, place: Place, gradient: Tensor) -> Tensor | None:
        """Backward, the message that is read last comes first: its norms are what the others are measured by."""
        # In float32 at least, whatever the agents compute in: of a norm in bfloat16 three digits would be left.
        precise = torch.promote_types(gradient.dtype, torch.float32)
        norms = gradient.flatten(1).to(precise).norm(dim=1).detach()
        self._arrived.append(("message", place, gradient.detach()))
        self.before[place] = norms
        if self.last is None:
            self.last = norms
        if self._clip is None:
            return None
        factor = (self._clip * self.last / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        self.after[place] = norms * factor
        return (gradient * factor[:, None, None]).to(gradient.dtype)

    def _arrive(self, place: Place, call: "_Call", gradient: Tensor) -> None:
        call.gradient = gradient.detach()
        self._arrived.append(("link", place, call.gradient))

    def _keep(self, name: str, link: RecursiveLink, inputs: tuple[Tensor], output: Tensor) -> None:
        self._unplaced.append((name, _Call(inputs[0].detach()), output))


class _Call:
    """One use of a link: what went in, and the gradient that arrived at what came out."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.gradient: Tensor | None = None


def figures(backflows: Sequence[Backflow]) -> dict[str, float]:
    """All norms of the parts of a batch in numbers: median, maximum, and the share of samples that carries the sum."""
    parts: dict[tuple[str, Place], list[Tensor]] = defaultdict(list)
    for backflow in backflows:
        groups = {"message": backflow.before, "message_clipped": backflow.after, "link": backflow.of_links()}
        for group, places in groups.items():
            for place, norms in places.items():
                parts[group, place].append(norms)
    return {
        f"gradient/{group}/{name}/round {round}/{statistic}": value
        for (group, (name, round)), norms in sorted(parts.items(), key=lambda item: item[0])
        for statistic, value in statistics(torch.cat(norms)).items()
    }


def statistics(norms: Float[Tensor, " batch"]) -> dict[str, float]:
    """Median, maximum, and the share of the batch that carries the sum: 1 if all carry alike, 1/n if one carries it.

    >>> statistics(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    {'median': 0.0, 'maximum': 2.0, 'share': 0.25}
    """
    squares = norms.square().sum().item()
    share = norms.sum().item() ** 2 / (len(norms) * squares) if squares > 0 else 0.0
    return {"median": norms.quantile(0.5).item(), "maximum": norms.max().item(), "share": share}


def say_samples(chosen: Sequence[bool], names: Sequence[str]) -> str:
    """Some of the samples by name: `2 of 32 samples: ward-7, ward-12`."""
    found = [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]
    more = ", ..." if len(found) > 3 else ""
    return f"{len(found)} of {len(names)} samples: {', '.join(found[:3])}{more}"


def _gradients(link: RecursiveLink, calls: Sequence[_Call]) -> dict[str, Tensor]:
    """Gradients of a link's parameters by sample, from what went in and what came back: (batch, *parameter)."""
    arrived = [call for call in calls if call.gradient is not None]
    if not arrived:
        return {name: torch.zeros_like(parameter)[None] for name, parameter in link.named_parameters()}
    width = arrived[0].states.shape[-1]
    batch_size = len(arrived[0].states)
    states = torch.cat([call.states.reshape(batch_size, -1, width) for call in arrived], dim=1)
    cotangents = torch.cat(
        [
            call.gradient.reshape(batch_size, -1, call.gradient.shape[-1])
            for call in arrived
            if call.gradient is not None
        ],
        dim=1,
    )
    parameters = {name: parameter.detach() for name, parameter in link.named_parameters()}

    def product(parameters: dict[str, Tensor], states: Tensor, cotangents: Tensor) -> Tensor:
        mapped: Tensor = functional_call(link, parameters, (states,))
        return (mapped * cotangents).sum()

    gradients: dict[str, Tensor] = vmap(grad(product), in_dims=(None, 0, 0))(parameters, states, cotangents)
    return gradients


def _norms_of_samples(link: RecursiveLink, calls: Sequence[_Call]) -> Tensor:
    return torch.stack([each.flatten(1).norm(dim=1) for each in _gradients(link, calls).values()]).norm(dim=0)
