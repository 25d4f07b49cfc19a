"""The cached, batched latent roll-out against the fifteen lines that read everything again."""

import pytest
import torch
from tests.conftest import make_model
from torch import Tensor

from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.rollout import latent_rollout, latent_rollout_reference


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2", "mistral"])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, LanguageModel]) -> LanguageModel:
    if request.param == "mistral":
        return make_model("mistral", 3, sliding_window=8)
    return tiny_models[request.param]


@pytest.fixture
def link(model: LanguageModel) -> RecursiveLink:
    link = RecursiveLink.inner(model.hidden_size).redraw(seed=0)
    link.calibrate(torch.randn(50, model.hidden_size), model.mean_embedding_norm)
    return link


def read(model: LanguageModel, texts: list[str]) -> tuple[object, Tensor]:
    input_ids, mask = model.pad([model.encode(text) for text in texts])
    cache = model.new_cache(len(texts))
    return cache, model.step(cache, model.embed(input_ids), mask)[:, -1]


@pytest.mark.parametrize("num_latent_steps", [1, 4, 9])
def test_cached_and_batched_thoughts_equal_the_reference(
    model: LanguageModel, link: RecursiveLink, questions: list[str], num_latent_steps: int
) -> None:
    cache, state = read(model, questions[:3])
    length = len(cache)
    found = latent_rollout(model, cache, state, link, num_latent_steps)
    assert found.shape == (3, num_latent_steps, model.hidden_size)
    # The first thought is the state of the prompt itself, so one step fewer is read.
    assert torch.equal(found[:, 0], state)
    assert len(cache) == length + num_latent_steps - 1
    for row, question in enumerate(questions[:3]):
        embeds = model.embed(torch.tensor(model.encode(question)))
        [expected] = latent_rollout_reference(model, embeds[None], link, num_latent_steps)
        assert (found[row] - expected).norm() <= 1e-4 * expected.norm()


def test_the_reference_is_equation_1(tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models["llama"]
    embeds = model.embed(torch.tensor(model.encode("A plan")))
    [double] = latent_rollout_reference(model, embeds[None], lambda state: 2 * state, 2)
    decoder = model.network.get_decoder()
    first = decoder(inputs_embeds=embeds[None]).last_hidden_state[0, -1]
    second = decoder(inputs_embeds=torch.cat([embeds, 2 * first[None]])[None]).last_hidden_state[0, -1]
    torch.testing.assert_close(double, torch.stack([first, second]))


def test_gradients_reach_the_link_from_every_step(tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models["qwen3"]
    link = RecursiveLink.inner(model.hidden_size).redraw(seed=0).requires_grad_(True)
    embeds = model.embed(torch.tensor(model.encode("A plan for the critic")))
    cache = model.new_cache(1)
    state = model.step(cache, embeds[None])[:, -1]
    # Not the sum of squares: after the final norm that is constant.
    direction = torch.randn(model.hidden_size)
    found = torch.autograd.grad(
        (latent_rollout(model, cache, state, link, 4) @ direction).sum(), list(link.parameters())
    )
    reference = (latent_rollout_reference(model, embeds[None], link, 4) @ direction).sum()
    for gradient, expected in zip(found, torch.autograd.grad(reference, list(link.parameters())), strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
