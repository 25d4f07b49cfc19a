"""Checkpoints of every family: the right weights, or a refusal that says what is wrong and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_model
from tests.families.table import FAMILIES, load_family, save_checkpoint
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from recursivemas.errors import ConfigError, InputError, ModelError
from recursivemas.models import LanguageModel, load_models
from recursivemas.system import RecursiveSystem

SEES = ("gemma3-sees", "qwen3_5-sees")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint to be spoiled."""
    return save_checkpoint("qwen2", tmp_path / "model")


def load(directory: Path, **options: Any) -> LanguageModel:
    return LanguageModel.from_pretrained(directory, **({"device": "cpu"} | options))


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# What is loaded


def test_a_family_is_loaded_with_its_own_weights(checkpoint: tuple[str, Path]) -> None:
    name, directory = checkpoint
    as_saved = AutoModelForImageTextToText if name in SEES else AutoModelForCausalLM
    network: PreTrainedModel = as_saved.from_pretrained(directory, dtype=torch.float32)
    model = load(directory)
    ids = torch.tensor([model.encode("The planner writes a plan.")])
    with torch.no_grad():
        expected = network(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(model.logits(model.states(ids)), expected.logits)
        # Latents are the states after the final norm, and what is embedded is scaled exactly once.
        torch.testing.assert_close(model.states(ids), expected.hidden_states[-1])
        torch.testing.assert_close(model.states_of_embeds(model.embed(ids)), expected.hidden_states[-1])
    assert model.hidden_size == expected.hidden_states[-1].shape[-1]


def test_what_sees_is_left_out_and_stays_out(tmp_path: Path) -> None:
    for name in SEES:
        model = load_family(name, tmp_path / name)
        assert not [part for part, _ in model.network.named_modules() if "vis" in part or "projector" in part]
        model.save_pretrained(tmp_path / f"{name}-text")
        again = load(tmp_path / f"{name}-text")
        assert again.fingerprint() == model.fingerprint()
        assert again.config.model_type.endswith("_text")


def test_a_model_that_only_a_wrapper_knows_is_loaded_too(tmp_path: Path) -> None:
    # Mistral 3.1 and LLaVA have no class for text alone; their text parts do.
    directory = save_checkpoint("mistral", tmp_path / "model")
    text = json.loads((directory / "config.json").read_text())
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=vision)
    wrapper = AutoModelForImageTextToText.from_config(config)
    wrapper.save_pretrained(directory)
    model = load(directory)
    assert model.config.model_type == "mistral"
    ids = torch.tensor([model.encode("The planner writes a plan.")])
    torch.testing.assert_close(model.logits(model.states(ids)), wrapper.eval()(input_ids=ids).logits)


def test_missing_weights_of_what_sees_are_no_concern(tmp_path: Path) -> None:
    directory = save_checkpoint("gemma3-sees", tmp_path / "model")
    edit_weights(directory, lambda weights: [weights.pop(name) for name in list(weights) if "vision" in name])
    load(directory)
    edit_weights(directory, lambda weights: weights.pop(next(name for name in weights if "layers.1" in name)))
    with pytest.raises(ModelError, match=r"do not fit its configuration: 1 missing \(.*layers\.1"):
        load(directory)


def test_weights_that_guess_ahead_or_see_are_passed_over(directory: Path) -> None:
    others = (
        "mtp.layers.0.weight",
        "visual.blocks.0.weight",
        "model.vision_tower.weight",
        "model.visual.merger.weight",
    )
    before = load(directory).fingerprint()
    edit_weights(directory, lambda weights: weights.update({name: torch.zeros(2) for name in others}))
    assert load(directory).fingerprint() == before


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "score.weight", "model.norm.bias"])
def test_weights_that_belong_nowhere_are_refused(directory: Path, name: str) -> None:
    edit_weights(directory, lambda weights: weights.update({name: torch.zeros(2)}))
    with pytest.raises(ModelError, match=rf"1 unexpected \({name}\)"):
        load(directory)


def test_all_that_is_wrong_with_the_weights_is_said_at_once(directory: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "layers.1." in name]:
            weights[name.replace("layers.1", "layers.7")] = weights.pop(name)

    edit_weights(directory, spoil)
    with pytest.raises(
        ModelError, match=r"12 missing \(model\.layers\.1\.[^;]*, …\); 12 unexpected \(model\.layers\.7"
    ):
        load(directory)


@pytest.mark.parametrize("peft_is_there", [True, False])
def test_an_adapter_config_of_the_authors_is_passed_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch, peft_is_there: bool
) -> None:
    before = load(directory).fingerprint()
    for module in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: peft_is_there)
    (directory / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')
    assert load(directory).fingerprint() == before


def test_an_adapter_of_peft_is_refused_and_not_passed_over(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somewhere/else"}')
    with pytest.raises(ModelError, match=r"holds an adapter of peft \(LORA\); merge it"):
        load(directory)


# What is refused


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model.bin\).*convert them once"):
        load(directory)


@pytest.mark.parametrize(
    ("model_type", "complaint"),
    [
        ("bert", "a bert model, an encoder, which cannot write; choose a causal language model"),
        ("t5", "a t5 model, with an encoder and a decoder; choose a causal language model"),
        ("modernbert", "a modernbert model, of which transformers has no causal language model"),
    ],
)
def test_what_cannot_write_is_refused(directory: Path, model_type: str, complaint: str) -> None:
    AutoConfig.for_model(model_type).save_pretrained(directory)
    with pytest.raises(ModelError, match=complaint):
        load(directory)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    directory = save_checkpoint("gemma3_text", tmp_path / "model")
    edit_config(directory, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="looks at the words that follow"):
        load(directory)


def test_an_old_file_does_not_make_an_encoder_of_a_decoder(directory: Path) -> None:
    edit_config(directory, is_decoder=False)
    assert load(directory).config.model_type == "qwen2"


def test_states_that_are_not_finite_are_refused(directory: Path) -> None:
    edit_weights(directory, lambda weights: weights["model.norm.weight"].fill_(1e30))
    with pytest.raises(ModelError, match="not finite in float16; load it in bfloat16 or float32"):
        load(directory, dtype="float16")


def test_remote_code_is_refused_and_not_asked_about(directory: Path) -> None:
    edit_config(
        directory, model_type="novel", auto_map={"AutoConfig": "novel.Config", "AutoModelForCausalLM": "novel.Model"}
    )
    (directory / "novel.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ModelError, match=r"needs code of its own \(auto_map in its config.json\), which is never run"):
        load(directory)


def test_remote_code_beside_a_known_family_is_not_run(directory: Path) -> None:
    edit_config(directory, auto_map={"AutoModelForCausalLM": "novel.Model"})
    (directory / "novel.py").write_text("raise SystemExit('this was run')")
    assert load(directory).config.model_type == "qwen2"


def test_recurrent_states_that_take_in_padding_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_checkpoint("qwen3_5", tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.models.qwen3_5.modeling_qwen3_5.apply_mask_to_padding_states", lambda states, mask: states
        )
        with pytest.raises(ModelError, match="take in padding"):
            load(directory)
    load(directory)


# Options


def test_attention_is_computed_as_asked(directory: Path) -> None:
    ids = torch.tensor([[5, 9, 30, 31, 7]])
    eager, sdpa = (load(directory, attn_implementation=name) for name in ("eager", "sdpa"))
    assert [each.config._attn_implementation for each in (eager, sdpa)] == ["eager", "sdpa"]
    torch.testing.assert_close(eager.states(ids), sdpa.states(ids))


def test_an_attention_that_is_not_known_or_not_here_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sdpa'"):
        load(directory, attn_implementation="spda")
    with pytest.raises(ConfigError, match="unknown attention implementation 'somebody/kernel'"):
        load(directory, attn_implementation="somebody/kernel")
    with pytest.raises(ModelError, match="FlashAttention2 .* installed"):
        load(directory, attn_implementation="flash_attention_2")


def test_a_device_map_is_handed_on(directory: Path) -> None:
    pytest.importorskip("accelerate", reason="device maps need accelerate")
    mapped = LanguageModel.from_pretrained(directory, device_map={"": "cpu"}, dtype="float32")
    assert mapped.fingerprint() == load(directory).fingerprint()


def test_a_device_map_and_a_device_contradict_each_other(directory: Path) -> None:
    with pytest.raises(ConfigError, match="not both"):
        load(directory, device_map="auto")


def test_a_device_map_without_accelerate_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        LanguageModel.from_pretrained(directory, device_map="auto")


def test_every_agent_may_have_options_of_its_own(directory: Path) -> None:
    agents = {
        "planner": {"model": directory, "dtype": "bfloat16", "attn_implementation": "eager"},
        "critic": str(directory),
        "solver": {"model": str(directory), "device": "cpu"},
    }
    system = RecursiveSystem.build(agents=agents, device="cpu", num_latent_steps=2, max_new_tokens=2)
    planner, critic, solver = (system.agents[role].model for role in ("planner", "critic", "solver"))
    assert [each.dtype for each in (planner, critic, solver)] == [torch.bfloat16, torch.float32, torch.float32]
    assert planner.config._attn_implementation == "eager"
    # The same name with the same options is one copy.
    assert critic is solver is not planner
    assert system.run("Why?", num_rounds=2).usage.generated_tokens == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model": "somewhere", "devise": "cpu"}, "agent 'planner': unknown option 'devise': did you mean 'device'"),
        ({"dtype": "float32"}, "agent 'planner': `model` is missing"),
    ],
)
def test_options_of_an_agent_are_checked(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_models({"planner": options})


def test_long_contexts_by_other_angles_are_not_offered() -> None:
    # Longrope turns all positions of a batch by other angles as soon as one row is long.
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 7, "long_factor": [2.0] * 7}
    model = make_model("phi3", original_max_position_embeddings=32, rope_parameters=rope, head_dim=14, pad_token_id=0)
    assert model.max_positions == 32
    with pytest.raises(InputError, match="at most 32"):
        model.check_length(33, "the prompt")
