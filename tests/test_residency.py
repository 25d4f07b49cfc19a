"""Agents that take turns on a device: same results, one at a time, and no more moves than there are turns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tests.conftest import make_model
from tests.families.reference import assert_same
from torch import Tensor, nn

from recursivemas import assembly, residency
from recursivemas.errors import ConfigError
from recursivemas.loading import load_network
from recursivemas.models import LanguageModel
from recursivemas.residency import Turns
from recursivemas.static import CompileWarning
from recursivemas.system import RecursiveSystem

MakeSystem = Callable[..., RecursiveSystem]
ROLES = ("planner", "critic", "solver")


class Strict(Turns):
    """Weights that wait are no numbers: who computes with them gets none. Counts networks that are on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.most_present = 0

    def _at_rest(self, weights: Tensor) -> Tensor:
        nowhere = torch.full_like(weights, torch.nan if weights.is_floating_point() else 0)
        self.kept[id(nowhere)] = nowhere, weights
        return nowhere

    def _on_device(self, waiting: Tensor) -> Tensor:
        return self.kept[id(waiting)][1]

    def call(self, network: nn.Module) -> None:
        super().call(network)
        present = [not tensors[0][0].isnan().any() for tensors in self._waiting.values()]
        self.most_present = max(self.most_present, sum(present))


@pytest.fixture
def models() -> dict[str, LanguageModel]:
    """A model for each role; the solver's is the planner's."""
    planner, critic = make_model("qwen3"), make_model("llama", 1)
    return {"planner": planner, "critic": critic, "solver": planner}


def test_results_are_the_same(make_system: MakeSystem, questions: list[str], models: dict[str, LanguageModel]) -> None:
    expected = make_system(agents=models).run(questions, trace="full")
    system = make_system(agents=models, residency="one")
    assert [model.turns for model in system.models] == [models["planner"].turns] * 2
    for found, one in zip(system.run(questions, trace="full"), expected, strict=True):
        assert_same(found, one)


@pytest.mark.parametrize(("num_rounds", "moves"), [(1, 3), (2, 5), (3, 7)])
def test_one_is_on_the_device_and_comes_once_a_turn(
    make_system: MakeSystem, questions: list[str], models: dict[str, LanguageModel], num_rounds: int, moves: int
) -> None:
    system = make_system(agents=models)
    expected = system.run(questions, num_rounds=num_rounds)
    turns = Strict()
    for model in system.models:
        model.take_turns(turns)
    found = system.run(questions, num_rounds=num_rounds, trace="off")
    assert [each.text for each in found] == [each.text for each in expected]
    # planner, critic, solver; the solver's model is the planner's, and stays from one round to the next.
    assert (turns.num_moves, turns.most_present) == (moves, 1)
    width = models["critic"].hidden_size
    assert models["critic"].decoder(inputs_embeds=torch.zeros(1, 1, width)).last_hidden_state.isnan().all()


def test_what_is_shown_of_a_message_moves_nobody(make_system: MakeSystem, models: dict[str, LanguageModel]) -> None:
    system = make_system(agents=models, residency="one")
    turns = models["planner"].turns
    assert turns is not None
    system.run("Why?")
    before = turns.num_moves
    system.run("Why?", trace="full")
    assert turns.num_moves - before == 4  # the planner's model is there still


def test_every_agent_is_read_from_disk_once(
    make_system: MakeSystem, models: dict[str, LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make_system(agents=models)
    saved.save_pretrained(tmp_path / "system")
    read: list[str] = []

    def counted(name: str, **options: Any) -> Any:
        read.append(Path(name).name)
        return load_network(name, **options)

    made: list[Strict] = []
    monkeypatch.setattr("recursivemas.models.load_network", counted)
    monkeypatch.setattr(assembly, "turns_for", lambda residency: made.append(Strict()) or made[0])
    system = RecursiveSystem.from_pretrained(tmp_path / "system", device="cpu", residency="one")
    texts = [system.run(question, trace="off").text for question in ("Why?", "Where?")]
    assert texts == [saved.run(question).text for question in ("Why?", "Where?")]
    assert sorted(read) == ["critic", "planner"]
    assert made[0].most_present == 1


def test_weights_that_wait_are_those_that_were_read(models: dict[str, LanguageModel]) -> None:
    before = [model.fingerprint() for model in models.values()]
    turns = Turns()
    for model in dict.fromkeys(models.values()):
        model.take_turns(turns)
    ids = torch.tensor([[5, 6]])
    for model in models.values():
        model.states(ids)
    assert [model.fingerprint() for model in models.values()] == before


def test_weights_offloaded_layer_by_layer_compute_the_same(
    make_system: MakeSystem, questions: list[str], models: dict[str, LanguageModel]
) -> None:
    # What a device_map with "cpu" in it does: every layer has its weights while it is called.
    expected = make_system(agents=models).run(questions, trace="full")
    offloaded = make_model("llama", 1)
    cpu_offload(offloaded.network, execution_device=torch.device("cpu"))
    assert all(each.is_meta for each in offloaded.network.parameters())
    assert offloaded.device == torch.device("cpu")
    system = make_system(agents={**models, "critic": offloaded})
    for found, one in zip(system.run(questions, trace="full"), expected, strict=True):
        assert_same(found, one)
    with pytest.warns(CompileWarning, match="offloaded"):
        offloaded.compile()
    with pytest.raises(ConfigError, match="take turns on one device, but the weights of 'llama' are on cpu, meta"):
        offloaded.take_turns(Turns())


def test_a_device_without_room_keeps_nobody(models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Strict):
        def _on_device(self, waiting: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

    turns = Full()
    models["critic"].take_turns(turns)
    with pytest.raises(torch.OutOfMemoryError):
        models["critic"].states(torch.tensor([[5]]))
    assert all(each.isnan().all() for each in models["critic"].network.parameters())


def test_what_cannot_take_turns_is_refused(make_system: MakeSystem, models: dict[str, LanguageModel]) -> None:
    with pytest.raises(ConfigError, match=r"unknown residency 'two'.*\(known: all, one\)"):
        make_system(agents=models, residency="two")
    held = make_model("llama", 1)
    held.network.quantization_method = "bitsandbytes"
    with pytest.raises(ConfigError, match="'llama' is held in fewer bits .* choose either residency 'one' or a quant"):
        held.take_turns(Turns())
    system = make_system(agents=models, residency="one")
    spread = make_model("llama", 1)
    spread.network.model.norm.to("meta")
    with pytest.raises(ConfigError, match="the weights of 'llama' are on cpu, meta; give all of them the same"):
        spread.take_turns(residency.Turns())
    planner = models["planner"]
    embeds = planner.embed(torch.tensor([[5]])).requires_grad_(True)
    with pytest.raises(ConfigError, match="no link is trained through agents that take turns"):
        planner.step(planner.new_cache(1), embeds)
    with pytest.warns(CompileWarning, match="take turns on the device"):
        system.compile()
