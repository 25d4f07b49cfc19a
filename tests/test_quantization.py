"""Agents in fewer bits: what they compute, what comes back through them, and where they are refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.conftest import make_model
from torch import Tensor, nn

from recursivemas.checkpoint import read_manifest
from recursivemas.errors import ConfigError, ModelError
from recursivemas.loading import options_by_role
from recursivemas.models import LanguageModel, load_models
from recursivemas.system import RecursiveSystem
from recursivemas.training.recipe import Recipe, base_system


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # bitsandbytes packs weights in blocks of 64.
    found = tmp_path_factory.mktemp("model") / "llama"
    make_model("llama", intermediate_size=128).save_pretrained(found)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_are_a_few_percent_off_and_gradients_too(place: Path, dtype: str) -> None:
    pytest.importorskip("bitsandbytes")
    whole = LanguageModel.from_pretrained(place, device="cpu")
    held = LanguageModel.from_pretrained(place, device="cpu", dtype=dtype, quantization="8bit")
    assert (held.is_quantized, held.quantization, str(held.dtype)) == (True, "8bit", f"torch.{dtype}")
    assert (whole.is_quantized, whole.quantization) == (False, None)
    generator = torch.Generator().manual_seed(0)
    embeds, direction = (torch.randn(2, 5, 64, generator=generator) for _ in range(2))
    found = []
    for model in (whole, held):
        given = (0.1 * embeds).requires_grad_(True)
        states = model.states_of_embeds(given.to(model.dtype)).float()
        (states * direction).sum().backward()
        found.append((states.detach(), given.grad))
    for one, other in zip(*found, strict=True):
        assert 1e-3 < (one - other).norm() / one.norm() < 0.1


def test_what_is_held_in_fewer_bits_is_saved_so(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = Recipe(
        agents=dict.fromkeys(("planner", "critic", "solver"), str(place)),
        agent_options={"*": {"quantization": "8bit"}, "critic": {"attn_implementation": "eager"}},
        world={"name": "ward"},
        output="x",
    )
    system = base_system(recipe, device="cpu")
    models = {role: agent.model for role, agent in system.agents.items()}
    assert {model.quantization for model in models.values()} == {"8bit"}
    assert models["planner"] is models["solver"]
    assert models["planner"] is not models["critic"]
    system.save_pretrained(tmp_path / "saved", dtype="float16")
    again = RecursiveSystem.from_pretrained(tmp_path / "saved", device="cpu")
    for role, model in models.items():
        assert again.agents[role].model.fingerprint() == model.fingerprint()
    # A model that is to be had by name is loaded as it was held.
    models["planner"].source = models["critic"].source = "Org/Model"
    system.save_pretrained(tmp_path / "named")
    assert {each.quantization for each in read_manifest(tmp_path / "named").agents.values()} == {"8bit"}


class Linear8bitLt(nn.Linear):
    """As bitsandbytes calls its layers. What comes back through it is so many times what it should be."""

    share = 1.0

    def forward(self, states: Tensor) -> Tensor:
        mapped = super().forward(states)
        return self.share * mapped + (1 - self.share) * mapped.detach()


@pytest.mark.parametrize("share", [1.0, 0.9, 0.0])
def test_weights_through_which_gradients_come_back_wrong_are_refused(share: float) -> None:
    model = make_model("qwen2")  # whose layers have biases
    layer = model.network.model.layers[0].self_attn.q_proj
    layer.__class__ = Linear8bitLt
    layer.share = share
    model.network.quantization_method = "bitsandbytes"
    if share == 1.0:
        LanguageModel(model.network, model.tokenizer)
        return
    with pytest.raises(ModelError, match=rf"gradients through .* 'qwen2' are wrong on the device 'cpu' \({share:.3g} "):
        LanguageModel(model.network, model.tokenizer)


def test_four_bits_give_true_gradients_or_are_refused(place: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert "cpu" in bitsandbytes.supported_torch_devices
    # With version 0.50 on a CPU nothing comes back at all.
    refused = ""
    try:
        model = LanguageModel.from_pretrained(place, device="cpu", quantization="4bit")
    except ModelError as error:
        refused = str(error)
    assert "gradients through the quantised weights" in refused or model.quantization == "4bit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_agents_on_a_gpu(place: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = LanguageModel.from_pretrained(place, device="cuda:0", dtype="bfloat16", quantization=bits)
    assert (model.quantization, model.device.type) == (bits, "cuda")


def test_quantisation_that_cannot_be_had_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown quantization '3bit'"):
        LanguageModel.from_pretrained(place, device="cpu", quantization="3bit")
    if importlib.util.find_spec("bitsandbytes") is not None:
        with pytest.raises(ConfigError, match="'8bit' cannot be had on the device 'meta': bitsandbytes knows .*cpu"):
            LanguageModel.from_pretrained(place, device="meta", quantization="8bit")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes: pip install 'recursivemas\[quant\]'"):
        load_models({"planner": {"model": str(place), "quantization": "8bit", "device": "cpu"}})


def test_options_are_by_role() -> None:
    options = {"*": {"device": "cpu", "quantization": "8bit"}, "b": {"quantization": None, "device_map": "auto"}}
    assert options_by_role(options, ["a", "b"]) == {
        "a": {"device": "cpu", "quantization": "8bit"},
        "b": {"device": None, "quantization": None, "device_map": "auto"},
    }
    with pytest.raises(ConfigError, match="unknown role 'c'"):
        options_by_role({"c": {}}, ["a", "b"])
    with pytest.raises(ConfigError, match="agent 'a': unknown option 'devise'.*'device'"):
        options_by_role({"a": {"devise": "cpu"}}, ["a", "b"])
