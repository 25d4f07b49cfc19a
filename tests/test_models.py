"""LanguageModel: what it reads, how it is loaded, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import make_model, make_tokenizer

from recursivemas.errors import ConfigError, InputError, ModelError
from recursivemas.loading import choose_device, choose_dtype
from recursivemas.models import LanguageModel


@pytest.fixture(params=["qwen3", "llama", "qwen2"])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, LanguageModel]) -> LanguageModel:
    return tiny_models[request.param]


@pytest.fixture
def saved(tiny_models: dict[str, LanguageModel], tmp_path: Path) -> Path:
    tiny_models["qwen3"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_loaded_bit_by_bit(tmp_path: Path, model: LanguageModel, questions: list[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.encode_batch(questions) == model.encode_batch(questions)
    assert loaded.stop_token_ids == model.stop_token_ids
    assert loaded.source is None


def test_half_precision_on_disk_is_float32_on_a_cpu(tmp_path: Path, tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models["qwen3"]
    model.save_pretrained(tmp_path / "model", dtype="float16")
    assert model.dtype == torch.float32
    loaded = LanguageModel.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.embed(torch.arange(9)), model.embed(torch.arange(9)).half().float())
    assert LanguageModel.from_pretrained(tmp_path / "model", device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_from_config_follows_its_seed_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    prints = [make_model("qwen3", seed).fingerprint() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert prints[0] == prints[1] != prints[2]


def test_latents_are_what_the_output_head_reads(model: LanguageModel) -> None:
    ids = torch.tensor([model.encode("The planner writes")])
    with torch.no_grad():
        expected = model.network(input_ids=ids).logits
        torch.testing.assert_close(model.logits(model.states(ids)), expected)


def test_embeddings_are_scaled_as_the_model_itself_scales_them() -> None:
    # Gemma multiplies by sqrt(hidden size): rows of the table, fed as they are, would be too quiet.
    gemma = make_model("gemma3_text", query_pre_attn_scalar=14, head_dim=14, sliding_window=8)
    ids = torch.tensor([gemma.encode("The planner writes")])
    with torch.no_grad():
        torch.testing.assert_close(gemma.states_of_embeds(gemma.embed(ids)), gemma.states(ids))
    assert gemma.embed(ids).norm() > 5 * gemma.network.get_input_embeddings().weight[ids].norm()


def test_padded_states_equal_those_of_each_row_alone(model: LanguageModel, questions: list[str]) -> None:
    sequences = model.encode_batch(questions)
    with torch.no_grad():
        together = model.states(*model.pad(sequences))
        for row, ids in enumerate(sequences):
            alone = model.states(torch.tensor([ids]))[0]
            assert (together[row, -len(ids) :] - alone).norm() <= 1e-4 * alone.norm()


def test_a_reply_ends_at_the_end_of_sequence_and_at_the_templates_own_end(model: LanguageModel) -> None:
    ids = {token: model.tokenizer.convert_tokens_to_ids(token) for token in ("<|eos|>", "<|im_end|>")}
    assert model.stop_token_ids == set(ids.values())
    assert model.reply_end_id == ids["<|im_end|>"]


def test_encode_batch_equals_encode_one_by_one(model: LanguageModel, questions: list[str]) -> None:
    texts = [*questions, "", questions[0], " ", "naïve – 漢字 🦊"]
    assert model.encode_batch(texts) == [model.encode(text) for text in texts]
    assert model.decode(model.encode(texts[-1])) == texts[-1]


def test_spans_cover_the_characters_of_each_token(model: LanguageModel) -> None:
    text = "The planner writes a plan, twice."
    ids, spans = model.spans(text)
    assert ids == model.encode(text)
    for token, (start, end) in zip(ids, spans, strict=True):
        assert text[start:end].strip() == model.decode([token]).strip()


def test_nearest_tokens_of_an_embedding_start_with_its_own(model: LanguageModel) -> None:
    ids = [token for token in model.encode(" planner critic writes") if model.decode([token]).strip()]
    found = model.nearest_tokens(model.embed(torch.tensor(ids)), k=2)
    assert [[len(row), row[0][0]] for row in found] == [[2, model.decode([token]).strip()] for token in ids]
    assert all(row[0][1] == pytest.approx(1, abs=1e-5) and row[0][1] > row[1][1] for row in found)


def test_nearest_tokens_of_a_large_table_are_found_in_chunks(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = torch.randn(4, model.hidden_size)
    whole, norm = model.nearest_tokens(vectors), model.mean_embedding_norm
    monkeypatch.setattr("recursivemas.models._EMBEDDING_CHUNK", 7)
    chunked = model.nearest_tokens(vectors)
    assert [[token for token, _ in row] for row in chunked] == [[token for token, _ in row] for row in whole]
    assert norm == pytest.approx(model.embed(torch.arange(model.vocab_size)).norm(dim=-1).mean().item())


def test_a_fingerprint_sees_one_changed_bit() -> None:
    model = make_model("llama")
    before = model.fingerprint()
    weight = next(iter(model.network.parameters()))
    weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
    assert model.fingerprint() != before


def test_a_model_is_frozen_and_in_evaluation_mode(model: LanguageModel) -> None:
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


# What is refused


def test_too_long_a_context_names_both_lengths(model: LanguageModel) -> None:
    model.check_length(1024, "the prompt")
    with pytest.raises(InputError, match="needs 1025 positions, but the model reads at most 1024"):
        model.check_length(1025, "the prompt")


def test_a_model_without_a_chat_template_is_refused() -> None:
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        LanguageModel(make_model("qwen3").network, tokenizer)


def test_a_model_whose_replies_would_never_end_is_refused() -> None:
    model = make_model("qwen3")
    model.tokenizer.eos_token = None
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.config.eos_token_id = model.network.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        LanguageModel(model.network, model.tokenizer)


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    settings = {"query_pre_attn_scalar": 14, "head_dim": 14, "final_logit_softcapping": 0.5}
    with pytest.raises(ModelError, match="soft cap"):
        make_model("gemma2", **settings)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"garbage"),
        ("config.json", b"{"),
        ("config.json", None),
        ("model.safetensors", None),
        ("tokenizer.json", None),
        ("tokenizer.json", b'{"version"'),
        ("chat_template.jinja", b"{% for %}"),
    ],
)
def test_a_damaged_directory_is_one_model_error(saved: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_bytes(content)
    with pytest.raises(ModelError):
        LanguageModel.from_pretrained(saved, device="cpu")


def test_missing_weights_are_refused_and_not_drawn_at_random(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config["layer_types"] = ["full_attention"] * 3
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"do not fit.*layers\.2"):
        LanguageModel.from_pretrained(saved, device="cpu")


def test_weights_of_other_shapes_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["intermediate_size"] = 100
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        LanguageModel.from_pretrained(saved, device="cpu")


def test_a_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ModelError, match="nobody/nothing"):
        LanguageModel.from_pretrained("nobody/nothing")


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    for device in ("tpu9", "cuda:99", "meat"):
        with pytest.raises(ConfigError, match=device):
            choose_device(device)


def test_an_unknown_precision_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        choose_dtype("float15", torch.device("cpu"))
