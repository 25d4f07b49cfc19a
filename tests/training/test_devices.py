"""Agents on several devices of one process: messages, what flows back, losses and figures go from one to another.

Most machines that run tests have one device, the CPU. So others are feigned: `cpu:1` and `cpu:2` are devices of their
own here, every tensor knows on which it is, and an operation on tensors of two of them is refused, as it would be
between GPUs. What is computed is the same, so it can be compared with what one device gives.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from tests.conftest import FEW_WORDS, make_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.alignment import AlignmentSettings, alignment_pairs, train_alignment
from recursivemas.training.data import EncodedTurn, Question
from recursivemas.training.inner import InnerSettings, train_inner
from recursivemas.training.outer import OuterSettings, train_outer

HOST = torch.device("cpu")


class SeveralDevices(TorchFunctionMode):
    """Tells tensors of `cpu:1`, `cpu:2`, ... apart, and refuses to compute with those of two."""

    # Copies go from device to device, and torch itself sorts the tensors of an optimizer by theirs.
    ACROSS = ("copy_", "clip_grad", "_group_tensors", "_has_foreach_support", "__set__", "requires_grad_")

    def __init__(self) -> None:
        super().__init__()
        self.moved: set[tuple[torch.device, torch.device]] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = resolve_name(function) or str(function)
        if function == Tensor.device.__get__:
            return of(args[0])
        if function in (Tensor.data.__set__, Tensor.grad.__set__) and isinstance(args[1], Tensor):
            mark(args[0], of(args[1]))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        target = self._target(function, name, args, kwargs)
        result = function(*args, **kwargs)
        if "_foreach_" in name:
            for each, like in zip(result or (), args[0], strict=False):
                mark(each, of(like))
            return result
        if target is None:
            target = self._common(name, args, tensors)
        elif tensors:
            self.moved.add((of(tensors[0]), target))
            if result is tensors[0] and of(tensors[0]) != target:
                result = result.clone()  # to another device is a copy
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                mark(each, target)
        return result

    def _common(self, name: str, args: Any, tensors: list[Tensor]) -> torch.device:
        """The device of everything that a call is given, and so of what comes out."""
        if any(each in name for each in self.ACROSS) and isinstance(args[0], Tensor):
            return of(args[0])
        found = {of(each) for each in tensors if each.dim() or of(each) != HOST}
        if name.endswith(("__getitem__", "__setitem__")):  # a GPU is indexed by tensors of the host, too
            found = {of(args[0])} | (found - {HOST})
        if len(found) > 1 and not any(each in name for each in self.ACROSS):
            raise RuntimeError(f"{name} was given tensors on {sorted(map(str, found))}")
        return next(iter(found), HOST)

    @staticmethod
    def _target(function: Any, name: str, args: Any, kwargs: Any) -> torch.device | None:
        """The device that a call names, if it names one."""
        if function == Tensor.cpu:
            return HOST
        if function == Tensor.grad.__get__:  # made by autograd, where its parameter is
            return of(args[0])
        named = [kwargs["device"]] if kwargs.get("device") is not None else []
        if function == Tensor.to:
            named += [each for each in args[1:] if isinstance(each, (str, torch.device))]
            named += [of(each) for each in args[1:] if isinstance(each, Tensor)]
        return torch.device(named[0]) if named else None


def of(tensor: Tensor) -> torch.device:
    found: torch.device = tensor.__dict__.get("feigned", HOST)
    return found


def mark(tensor: Tensor, device: torch.device) -> None:
    tensor.__dict__["feigned"] = device


@pytest.fixture
def devices() -> Iterator[SeveralDevices]:
    with SeveralDevices() as mode:
        yield mode


PLACES = {"planner": "cpu:1", "critic": "cpu:2", "solver": "cpu:1"}


def spread(places: Mapping[str, str]) -> RecursiveSystem:
    """A system whose agents are on these devices."""
    families = dict(zip(("planner", "critic", "solver"), ("qwen3", "llama", "qwen2"), strict=True))
    models = {role: make_model(family) for role, family in families.items()}
    for role, model in models.items():
        model.network.to(places.get(role, "cpu"))
    return RecursiveSystem.build(agents=models, prompts=FEW_WORDS, num_rounds=2, num_latent_steps=1, max_new_tokens=2)


QUESTIONS = [
    Question(id=f"q-{n}", text=text, answer=answer)
    for n, (text, answer) in enumerate([("Why?", "no"), ("What is 2 + 2?", "four"), ("Who is it?", "a fox or two")])
]
INNER = InnerSettings(num_train_steps=2, batch_size=8)
ALIGNMENT = AlignmentSettings(num_train_steps=2, batch_size=8)
SETTINGS = OuterSettings(
    num_train_steps=2, batch_size=3, num_validation=2, validate_every=1, log_every=10, warmup_steps=0
)


def turns_of(model: LanguageModel) -> list[EncodedTurn]:
    texts = ["the river bank", "a quick brown fox", "seventeen"]
    return [EncodedTurn(model.encode("Say it: "), model.encode(text), text) for text in texts]


def trained(places: Mapping[str, str]) -> tuple[list[float], dict[str, Tensor], list[str]]:
    """All stages of training on some devices: losses and weights, and what is answered in the end."""
    system = spread(places)
    anchors = {}
    for role, agent in system.agents.items():
        report = train_inner(agent, turns_of(agent.model), INNER)
        losses = [report["loss_after"]]
        for edge in system.pattern.graph:
            if edge.source == role:
                reader = system.agents[edge.target].model
                pairs = anchors[str(edge)] = alignment_pairs(agent.model, reader, turns_of(agent.model))
                features = agent.inner_link(pairs.states)
                report = train_alignment(str(edge), system.links[str(edge)], features, pairs.targets, ALIGNMENT)
                losses.append(report["loss_after"])
    fitted = train_outer(system, QUESTIONS, SETTINGS, anchors=anchors, validate=lambda each: 0.0)
    weights = {
        f"{name}/{tensor}": value.cpu()
        for name, link in system.all_links.items()
        for tensor, value in link.state_dict().items()
    }
    return losses + fitted.losses, weights, [each.text for each in system.run([each.text for each in QUESTIONS])]


def test_what_is_trained_does_not_depend_on_where_agents_are(devices: SeveralDevices) -> None:
    expected_losses, expected_weights, expected_answers = trained({})
    losses, weights, answers = trained(PLACES)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert answers == expected_answers
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)
    # Messages went both ways, and the feigned devices do tell.
    one, other = torch.device("cpu:1"), torch.device("cpu:2")
    assert {(one, other), (other, one)} <= devices.moved
    with pytest.raises(RuntimeError, match="was given tensors on"):
        torch.ones(2, device=one) + torch.ones(2, device=other)


def test_every_link_is_where_its_sender_is(devices: SeveralDevices) -> None:
    system = spread(PLACES)
    for name, link in system.all_links.items():
        assert {str(each.device) for each in link.parameters()} == {PLACES[name.split("->")[0]]}
    assert isinstance(system.links["planner->critic"], nn.Module)


def test_a_link_on_the_wrong_device_is_found(devices: SeveralDevices) -> None:
    system = spread(PLACES)
    system.links["planner->critic"].to("cpu:2")
    with pytest.raises(RuntimeError, match="was given tensors on"):
        train_outer(system, QUESTIONS, SETTINGS)


def gpus() -> list[str]:
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    # A GPU and the processor are two devices as well.
    return [*found, "cpu"][:2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU: with one, it and the CPU are the two devices")
def test_agents_on_real_devices_are_trained_together() -> None:
    one, other = gpus()
    expected_losses, _, _ = trained({})
    losses, _, _ = trained({"planner": one, "critic": other, "solver": one})
    assert losses == pytest.approx(expected_losses, rel=1e-3)
