"""LatentCache: steps, forks, selections and merges are exact for every kind of layer."""

from pathlib import Path

import pytest
import torch
from tests.conftest import make_model
from tests.families.table import load_family
from torch import Tensor
from transformers import PretrainedConfig

from recursivemas.cache import LatentCache, RecurrentLayer
from recursivemas.errors import ModelError
from recursivemas.models import LanguageModel

WINDOW = 8


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2", "mistral", "qwen3_5"])
def model(
    request: pytest.FixtureRequest, tiny_models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    if request.param == "mistral":
        return make_model("mistral", 3, sliding_window=WINDOW)
    if request.param == "qwen3_5":
        return load_family("qwen3_5", tmp_path_factory.mktemp("checkpoint"))
    return tiny_models[request.param]


def draw(model: LanguageModel, *shape: int, seed: int = 0) -> Tensor:
    """Input embeddings of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return model.embed(torch.randint(model.vocab_size, shape, generator=generator))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


def uncached(model: LanguageModel, inputs_embeds: Tensor) -> Tensor:
    return model.network.get_decoder()(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def read(model: LanguageModel, *parts: Tensor) -> tuple[LatentCache, Tensor]:
    cache = model.new_cache(len(parts[0]))
    return cache, torch.cat([model.step(cache, part) for part in parts], dim=1)


# Lengths short of the window, at it, just over it, and far beyond.
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("piece", [1, 3, WINDOW + 1])
def test_steps_in_pieces_equal_one_reading_without_a_cache(model: LanguageModel, length: int, piece: int) -> None:
    embeds = draw(model, 2, length)
    cache, found = read(model, *embeds.split(piece, dim=1))
    assert close(found, uncached(model, embeds))
    assert len(cache) == length
    assert cache.num_positions.tolist() == [length, length]


def test_a_mask_goes_along_where_it_hides_something(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []
    forward = model.decoder.forward

    def seen(*args: object, attention_mask: Tensor | None = None, **kwargs: object) -> object:
        masks.append(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model.decoder, "forward", seen)
    (short, _), (long, _) = read(model, draw(model, 2, 3)), read(model, draw(model, 2, 5))
    assert not short.is_padded
    merged = LatentCache.merge([short, long])
    assert merged.is_padded
    model.step(merged, draw(model, 4, 1))
    only_long = merged.select(torch.tensor([2, 3]))
    assert not only_long.is_padded
    model.step(only_long, draw(model, 2, 1))
    model.step(only_long.fork(), draw(model, 2, 2))
    model.step(merged.fork(), draw(model, 4, 2))
    assert [mask is not None for mask in masks] == [False, False, True, False, False, True]
    assert [mask.shape for mask in masks if mask is not None] == [(4, 6), (4, 8)]


def test_a_fork_goes_on_alone(model: LanguageModel) -> None:
    start, one, other = draw(model, 2, 10), draw(model, 2, 5, seed=1), draw(model, 2, 3, seed=2)
    cache, _ = read(model, start)
    fork = cache.fork()
    on_fork = model.step(fork, one)
    on_cache = model.step(cache, other)
    assert close(on_fork, uncached(model, torch.cat([start, one], dim=1))[:, -5:])
    assert close(on_cache, uncached(model, torch.cat([start, other], dim=1))[:, -3:])
    assert (len(fork), len(cache)) == (15, 13)


@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 0, 2, 1]])
def test_selected_rows_go_on_as_if_alone(model: LanguageModel, rows: list[int]) -> None:
    start, more = draw(model, 3, 11), draw(model, len(rows), 4, seed=1)
    cache, _ = read(model, start)
    selected = cache.select(torch.tensor(rows))
    assert selected.batch_size == len(rows)
    assert close(model.step(selected, more), uncached(model, torch.cat([start[rows], more], dim=1))[:, -4:])
    # The cache it was taken from is as it was.
    assert close(
        model.step(cache, draw(model, 3, 1)), uncached(model, torch.cat([start, draw(model, 3, 1)], 1))[:, -1:]
    )


# Pairs of lengths around the window: both below, one on each side, both above, and very unequal.
@pytest.mark.parametrize(
    "lengths", [(2, 5), (WINDOW - 1, WINDOW), (WINDOW - 2, WINDOW + 1), (3, 25), (WINDOW, WINDOW + 9), (25, 3)]
)
def test_merged_caches_of_unequal_length_go_on_as_if_alone(model: LanguageModel, lengths: tuple[int, int]) -> None:
    starts = [draw(model, 1 + index, length, seed=index) for index, length in enumerate(lengths)]
    merged = LatentCache.merge([read(model, start)[0] for start in starts])
    assert merged.num_positions.tolist() == [lengths[0], lengths[1], lengths[1]]
    # Several steps, so that a window slides over the place where they were joined.
    more = draw(model, 3, WINDOW + 3, seed=9)
    found = torch.cat([model.step(merged, part) for part in more.split(2, dim=1)], dim=1)
    rows = [starts[0][0], starts[1][0], starts[1][1]]
    for row, start in enumerate(rows):
        alone = uncached(model, torch.cat([start, more[row]])[None])[0, -more.shape[1] :]
        assert close(found[row], alone)


def test_merging_what_was_merged_and_selected_stays_exact(model: LanguageModel) -> None:
    lengths = (4, 9, 17)
    starts = [draw(model, 1, length, seed=length) for length in lengths]
    caches = [read(model, start)[0] for start in starts]
    pair = LatentCache.merge(caches[:2]).select(torch.tensor([1, 0]))
    merged = LatentCache.merge([caches[2], pair]).select(torch.tensor([2, 0, 1]))
    more = draw(model, 3, 3, seed=5)
    found = model.step(merged, more)
    for row, start in enumerate([starts[0], starts[2], starts[1]]):
        assert close(found[row], uncached(model, torch.cat([start[0], more[row]])[None])[0, -3:])


def test_merging_leaves_the_parts_as_they_were(model: LanguageModel) -> None:
    short, long = draw(model, 1, 3), draw(model, 1, 12, seed=1)
    cache, _ = read(model, short)
    LatentCache.merge([cache, read(model, long)[0]])
    more = draw(model, 1, 2, seed=2)
    assert close(model.step(cache, more), uncached(model, torch.cat([short, more], dim=1))[:, -2:])


def test_rows_that_have_read_nothing_merge_with_others(model: LanguageModel) -> None:
    start, more = draw(model, 1, 9), draw(model, 3, 3, seed=5)
    merged = LatentCache.merge([model.new_cache(2), read(model, start)[0]])
    found = model.step(merged, more)
    assert close(found[:2], uncached(model, more[:2]))
    assert close(found[2], uncached(model, torch.cat([start[0], more[2]])[None])[0, -3:])


def test_a_merge_of_one_is_a_fork(model: LanguageModel) -> None:
    start = draw(model, 2, 5)
    cache, _ = read(model, start)
    model.step(LatentCache.merge([cache]), draw(model, 2, 2))
    assert len(cache) == 5


@pytest.mark.parametrize("garbage", [0.0, 1e3])
def test_padding_on_the_left_changes_nothing(model: LanguageModel, garbage: float) -> None:
    length, pads = 13, 12
    start = draw(model, 1, length)
    embeds = torch.cat([torch.full((1, pads, model.hidden_size), garbage), start], dim=1)
    mask = torch.tensor([[0] * pads + [1] * length])
    cache = model.new_cache(1)
    assert close(model.step(cache, embeds, mask)[:, -length:], uncached(model, start))
    assert cache.num_positions.tolist() == [length]
    more = draw(model, 1, 4, seed=1)
    assert close(model.step(cache, more), uncached(model, torch.cat([start, more], dim=1))[:, -4:])


def test_padding_in_the_middle_is_refused(model: LanguageModel) -> None:
    cache, _ = read(model, draw(model, 2, 5))
    with pytest.raises(ValueError, match="padding in the middle"):
        model.step(cache, draw(model, 2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]]))


def test_gradients_flow_through_steps_forks_selections_and_merges(model: LanguageModel) -> None:
    leaves = [draw(model, 1, length, seed=length).requires_grad_() for length in (4, 11)]
    more = draw(model, 2, 2, seed=1).requires_grad_()
    caches = [read(model, leaf)[0].fork() for leaf in leaves]
    merged = LatentCache.merge(caches).select(torch.tensor([1, 0]))
    # Not the sum of squares: after the final norm that is constant.
    direction = torch.randn(model.hidden_size)
    found = torch.autograd.grad((model.step(merged, more)[:, -1] @ direction).sum(), [*leaves, more])

    alone = [torch.cat([leaves[1 - row], more[row : row + 1]], dim=1) for row in range(2)]
    loss = sum(uncached(model, embeds)[0, -1] @ direction for embeds in alone)
    expected = torch.autograd.grad(loss, [*leaves, more])
    for gradient, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert close(gradient, other)


def test_a_recurrent_state_is_replaced_and_never_written_into(tmp_path: Path) -> None:
    model = load_family("qwen3_5", tmp_path)
    cache, _ = read(model, draw(model, 2, 5))
    layers = [layer for layer in cache.past_key_values.layers if isinstance(layer, RecurrentLayer)]
    assert cache.is_recurrent
    assert layers
    before = [(layer.conv_states[0].clone(), layer.recurrent_states[0].clone()) for layer in layers]
    fork = cache.fork()
    for length in (1, 3):
        model.step(fork, draw(model, 2, length, seed=length))
    for layer, (conv, recurrent) in zip(layers, before, strict=True):
        assert torch.equal(layer.conv_states[0], conv)
        assert torch.equal(layer.recurrent_states[0], recurrent)


def test_a_cache_that_cannot_be_merged_exactly_is_refused() -> None:
    class Both(PretrainedConfig):
        model_type = "both"
        num_hidden_layers = 1
        layer_types = ["hybrid"]

    with pytest.raises(ModelError, match="both model has a layer of the kind LinearAttentionAndFullAttentionLayer"):
        LatentCache.new(Both(), 1, torch.device("cpu"))
