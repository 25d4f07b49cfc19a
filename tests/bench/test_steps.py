"""Single steps: both arms of every comparison do the same work, and what they give is the same."""

from collections.abc import Callable

import pytest
import torch

from recursivemas.agents import Agent
from recursivemas.bench import steps
from recursivemas.bench.steps import Prompt
from recursivemas.bench.subjects import random_model, small_configuration
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel


@pytest.fixture(scope="module")
def agent() -> Agent:
    model = random_model(small_configuration(64, 2), device="cpu")
    return Agent("thinker", model, RecursiveLink.inner(64).redraw(0))


@pytest.fixture
def forwards(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and positions of every forward of the body."""
    seen: list[tuple[int, int]] = []
    decoder = agent.model.decoder
    forward = decoder.forward

    def counted(*args: object, **kwargs: object) -> object:
        given = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if given is None else given
        seen.append(tuple(given.shape[:2]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", counted)
    return seen


def test_a_latent_step_and_a_bare_forward_read_one_position_each(agent: Agent, forwards: list[tuple[int, int]]) -> None:
    section = steps.latent_steps(agent, batch_sizes=[3], prompt_length=5, num_steps=4, repeats=1)
    assert forwards == [(3, 5)] + 2 * 2 * 4 * [(3, 1)]  # a warm-up and a repeat, of two arms
    [row] = section.rows
    assert row["batch"] == 3
    assert row["latent step"].median > 0
    assert not section.goals  # they are set for wider models


def test_goals_of_single_steps_are_set_for_wide_models() -> None:
    model = random_model(small_configuration(256, 1), device="cpu")
    wide = Agent("thinker", model, RecursiveLink.inner(256))
    section = steps.latent_steps(wide, batch_sizes=[1, 8], prompt_length=4, num_steps=2, repeats=1)
    assert [(goal.name, goal.at_most) for goal in section.goals] == [
        ("latent step / bare forward, thinker, batch 8", steps.LATENT_STEP_GOAL)
    ]


def test_both_write_the_same_tokens_in_as_many_steps(agent: Agent, forwards: list[tuple[int, int]]) -> None:
    prompt = Prompt.read(agent.model, 2, 6)
    found = []
    for way in (steps.write, steps.generate):
        forwards.clear()
        found.append(way(prompt, 5))
        assert forwards == [(2, 6)] + 4 * [(2, 1)]
    assert found[0] == found[1]
    assert {len(ids) for ids in found[0]} == {5}
    section = steps.decode_steps(
        agent, agent.inner_link, batch_sizes=[2], prompt_length=6, num_tokens=3, num_latent_steps=4, repeats=1
    )
    assert section.rows[0]["same tokens"] is True


def test_thoughts_with_and_without_a_cache(agent: Agent, forwards: list[tuple[int, int]]) -> None:
    ids = Prompt.read(agent.model, 3, 6).input_ids
    forwards.clear()
    cached = steps.cached_thoughts(agent, ids, 4)
    assert forwards == [(3, 6)] + 3 * [(3, 1)]
    forwards.clear()
    expected = steps.uncached_thoughts(agent, ids, 4)
    assert forwards == [(3, 6), (3, 7), (3, 8), (3, 9)]
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)
    section = steps.uncached(agent, settings=[(6, 4), (120, 16)], batch_sizes=[8], repeats=1, judged=True)
    assert all(row["messages differ by"] < 1e-5 for row in section.rows)
    assert [(goal.at_least, goal.at_most) for goal in section.goals] == [(None, 1e-4), (5.0, None), (None, 1e-4)]


def test_a_difference_of_messages_is_told(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "cached_thoughts", lambda *given: 1.5 * steps.uncached_thoughts(*given))
    section = steps.uncached(agent, settings=[(6, 4)], batch_sizes=[2], repeats=1, judged=False)
    assert section.rows[0]["messages differ by"] == pytest.approx(0.5)
    assert not section.goals[0].holds


def test_the_floor_counts_what_a_latent_step_reads(
    agent: Agent, tiny_models: dict[str, LanguageModel], make_weights: Callable[[torch.nn.Module], int]
) -> None:
    for model in (agent.model, *tiny_models.values()):
        each = Agent("thinker", model, RecursiveLink.inner(model.hidden_size))
        embeddings = model.network.get_input_embeddings().weight
        expected = make_weights(model.decoder) - embeddings.numel() + make_weights(each.inner_link)
        assert steps.body_bytes(each) == 4 * expected


@pytest.fixture
def make_weights() -> Callable[[torch.nn.Module], int]:
    return lambda module: sum(weight.numel() for weight in module.state_dict().values() if weight.dim() > 0)


def test_steps_a_second_beside_the_floor(agent: Agent) -> None:
    section = steps.floor(agent, batch_sizes=[1, 2], prompt_length=4, num_steps=3, repeats=2, copied_bytes=2**20)
    for row, rows in zip(section.rows, (1, 2), strict=True):
        share = row["steps a second"].median / row["floor, steps a second"]
        assert row["share of the floor"].median == pytest.approx(share)
        assert row["latents a second"].median == pytest.approx(rows * row["steps a second"].median)
        assert row["floor, steps a second"] == pytest.approx(row["copied, GB/s"].median / row["weights, GB"])


def test_compiled_steps_are_measured_beside_the_others(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, but not compiled to machine code, which takes minutes.
    compile = LanguageModel.compile
    monkeypatch.setattr(LanguageModel, "compile", lambda self: compile(self, backend="eager"))
    twin = steps.compiled_twin(agent)
    assert twin.model.network is agent.model.network
    sizes = {"batch_sizes": [1], "prompt_length": 4, "repeats": 1}
    section = steps.latent_steps(agent, compiled=twin, num_steps=5, **sizes)
    assert section.rows[0]["eager / compiled"].median > 0
    assert twin.model.is_compiled
    section = steps.decode_steps(agent, agent.inner_link, compiled=twin, num_tokens=5, num_latent_steps=2, **sizes)
    assert section.rows[0]["eager / compiled"].unit == ""
    section = steps.floor(agent, compiled=twin, num_steps=5, copied_bytes=2**20, **sizes)
    assert [row["path"] for row in section.rows] == ["eager", "compiled"]
    assert not section.goals  # they are set for GPUs


def test_what_cannot_be_compiled_is_told(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "compile", lambda self: None)
    section = steps.latent_steps(
        agent, compiled=steps.compiled_twin(agent), batch_sizes=[1], prompt_length=4, num_steps=2, repeats=1
    )
    assert section.rows[0]["eager / compiled"] == "not compiled"
