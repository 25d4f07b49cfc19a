"""A question's latents and its greedy answer are the same alone, in a batch, in any order, with any padding.

On systems of several families at once, with the bundled prompts; every family by itself is in families/test_matrix.py.
What is compared with: the same question alone; the readable references of families/reference.py; and, so that the checks
are known to have teeth, planted faults that must be caught.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.conftest import make_model
from tests.families.reference import (
    TOLERANCE,
    assert_equals_reference,
    assert_exact,
    assert_same,
    distance,
    generate,
    model_of,
    play_by_hand,
    reply_loss,
    sender,
)
from torch import Tensor

from recursivemas.agents import Agent, PrefixStore, Reading
from recursivemas.cache import LatentCache
from recursivemas.decoding import SamplingParams
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

MakeSystem = Callable[..., RecursiveSystem]

# Slots come before the question here, so continuations differ in length from row to row.
SLOT_FIRST = {
    "name": "slot-first",
    "roles": {
        "planner": {"first": "Plan: {question}", "later": "Seen: {latents:solver}. Plan again: {question}"},
        "critic": {"always": "Plan: {latents:planner}. Check it for: {question}"},
        "solver": {"always": "Plan: {latents:critic}. Think of: {question}", "last": "{latents:critic} {question} So:"},
    },
}


@pytest.fixture(scope="module")
def sliding_models() -> dict[str, LanguageModel]:
    roles = ("planner", "critic", "solver")
    return {role: make_model("mistral", seed, sliding_window=24) for seed, role in enumerate(roles)}


def assert_played_by_hand(system: RecursiveSystem, question: str, num_rounds: int, num_latent_steps: int) -> None:
    """The latent messages and the answer of `run` are those of the system played by hand."""
    loop: dict[str, Any] = {"num_rounds": num_rounds, "num_latent_steps": num_latent_steps}
    result = system.run(question, trace="full", **loop)
    assert_equals_reference(system, result, question, max_new_tokens=12, **loop)


# What must hold


@pytest.mark.parametrize(("num_rounds", "num_latent_steps"), [(1, 4), (2, 1), (3, 4)])
def test_latents_and_answers_do_not_depend_on_the_batch(
    system: RecursiveSystem, questions: list[str], num_rounds: int, num_latent_steps: int
) -> None:
    assert_exact(system, questions, num_rounds=num_rounds, num_latent_steps=num_latent_steps)


@pytest.mark.parametrize(("channel", "num_rounds"), [("text", 3), ("both", 2), ("none", 3)])
def test_every_channel_is_exact(system: RecursiveSystem, questions: list[str], channel: str, num_rounds: int) -> None:
    # Random models hardly ever end a reply: stop strings make texts that are unequally long.
    sampling = SamplingParams(max_new_tokens=6, stop=("an", "er"))
    assert_exact(system, questions[:3], channel=channel, num_rounds=num_rounds, num_latent_steps=3, sampling=sampling)


def test_sampled_text_is_exact(system: RecursiveSystem, questions: list[str]) -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=4, seed=3)
    assert_exact(system, questions[:2], channel="both", num_rounds=2, sampling=sampling)


def test_mixed_channels_are_exact(system: RecursiveSystem, questions: list[str]) -> None:
    channel = {"planner->critic": "text", "critic->solver": "both", "solver->planner": "latent"}
    assert_exact(system, questions[1:4], channel=channel, sampling=SamplingParams(max_new_tokens=6))


def test_prompts_with_the_question_after_the_slot_are_exact(make_system: MakeSystem, questions: list[str]) -> None:
    # Continuations of unequal length are read in groups and merged.
    assert_exact(make_system(prompts=SLOT_FIRST), questions[:3], num_rounds=2)


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_sliding_windows_are_exact(
    make_system: MakeSystem, sliding_models: dict[str, LanguageModel], questions: list[str], channel: str
) -> None:
    system = make_system(agents=sliding_models, prompts=SLOT_FIRST)
    sampling = SamplingParams(max_new_tokens=6, stop=("an", "er"))
    assert_exact(system, questions[:3], channel=channel, num_rounds=2, sampling=sampling)


def test_one_model_in_three_roles_is_exact(
    make_system: MakeSystem, tiny_models: dict[str, LanguageModel], questions: list[str]
) -> None:
    system = make_system(agents=dict.fromkeys(("planner", "critic", "solver"), tiny_models["qwen3"]))
    assert_exact(system, questions[:2], num_rounds=2)


def test_the_papers_message_without_the_inner_link_is_exact(make_system: MakeSystem, questions: list[str]) -> None:
    assert_exact(make_system(message="outer"), questions[:2], num_rounds=2)


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_no_latent_steps_are_no_messages(system: RecursiveSystem, questions: list[str], num_rounds: int) -> None:
    without = system.run(questions, channel="none", num_rounds=num_rounds)
    zero_steps = system.run(questions, num_latent_steps=0, num_rounds=num_rounds)
    assert [result.text for result in zero_steps] == [result.text for result in without]
    assert all(not result.trace.messages and not result.usage.latent_steps for result in [*zero_steps, *without])


def test_no_latent_steps_on_both_is_text(system: RecursiveSystem, questions: list[str]) -> None:
    both = system.run(questions[:2], channel="both", num_latent_steps=0, trace="full")
    text = system.run(questions[:2], channel="text", trace="full")
    for found, expected in zip(both, text, strict=True):
        assert_same(found, expected)


def test_equal_questions_in_a_batch_get_equal_answers(system: RecursiveSystem, questions: list[str]) -> None:
    first, second, other = system.run([questions[0], questions[0], questions[1]], trace="full")
    assert_same(first, second)
    assert first.text != other.text


def test_the_same_run_twice_is_bit_identical(system: RecursiveSystem, questions: list[str]) -> None:
    once, again = (system.run(questions, trace="full") for _ in range(2))
    for result, other in zip(once, again, strict=True):
        assert result.text == other.text
        for message, same in zip(result.trace.messages, other.trace.messages, strict=True):
            assert torch.equal(message.tensor(), same.tensor())


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_reading_prefixes_once_changes_nothing(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch, channel: str
) -> None:
    reused = system.run(questions, channel=channel, num_rounds=3, trace="full")
    fresh_store = PrefixStore.get

    def always_anew(self: PrefixStore, model: LanguageModel, prefixes: tuple[str, ...]) -> Reading:
        return fresh_store(PrefixStore(), model, prefixes)

    monkeypatch.setattr(PrefixStore, "get", always_anew)
    anew = system.run(questions, channel=channel, num_rounds=3, trace="full")
    for found, expected in zip(reused, anew, strict=True):
        assert_same(found, expected)
        assert found.usage.prompt_tokens == expected.usage.prompt_tokens
        assert found.usage.positions < expected.usage.positions


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_latent_messages_equal_a_system_played_by_hand(
    system: RecursiveSystem, questions: list[str], num_rounds: int
) -> None:
    for question in questions[:2]:
        assert_played_by_hand(system, question, num_rounds, 3)


def test_sliding_windows_equal_a_system_played_by_hand(
    make_system: MakeSystem, sliding_models: dict[str, LanguageModel], questions: list[str]
) -> None:
    assert_played_by_hand(make_system(agents=sliding_models), questions[0], 2, 3)


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_the_text_channel_equals_a_loop_over_transformers_generate(
    system: RecursiveSystem, questions: list[str], num_rounds: int
) -> None:
    results = system.run(questions[:3], channel="text", num_rounds=num_rounds)
    for question, result in zip(questions[:3], results, strict=True):
        sent, reading = play_by_hand(
            system, question, lambda edge, embeds: [generate(model_of(system, edge), embeds, 12)], num_rounds
        )
        found = {(m.round, f"{m.source}->{m.target}"): [m.text] for m in result.trace.messages}
        assert found == sent
        assert result.text == generate(system.agents["solver"].model, reading, 12)


# Gradients


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_gradients_of_unroll_equal_those_of_a_system_unrolled_by_hand(
    system: RecursiveSystem, questions: list[str], num_rounds: int
) -> None:
    answers = ["the river", "forty-two"]
    solver = system.agents["solver"].model
    parameters = system.trainable_parameters()
    if num_rounds == 1:
        # Nobody reads the solver in the only round, so what it thinks through has no gradient.
        parameters = {name: p for name, p in parameters.items() if not name.startswith("solver")}
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    turns = list(system.unroll(questions[:2], num_rounds=num_rounds, num_latent_steps=3))
    loss = turns[-1].agent.loss(turns[-1].reading, answers).sum()
    found = torch.autograd.grad(loss, list(parameters.values()))

    losses = []
    for question, answer in zip(questions[:2], answers, strict=True):
        _, reading = play_by_hand(system, question, sender(system, "latent", 3, 0), num_rounds)
        losses.append(reply_loss(solver, reading, answer))
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))

    assert loss.item() == pytest.approx(sum(each.item() for each in losses), rel=1e-5)
    for name, gradient, by_hand in zip(parameters, found, expected, strict=True):
        assert by_hand.norm() > 0, name
        assert distance(gradient, by_hand) <= TOLERANCE, name


def test_unroll_plays_the_messages_of_run(system: RecursiveSystem, questions: list[str]) -> None:
    results = system.run(questions[:3], trace="full", num_rounds=2)
    for played in system.unroll(questions[:3], num_rounds=2):
        for edge, message in played.messages.items():
            for row, result in enumerate(results):
                expected = result.trace.message(played.turn.round, *edge.split("->"))
                assert distance(message.latents[row].detach(), expected) <= TOLERANCE


def test_a_loss_in_every_round_reaches_the_links_of_that_round(system: RecursiveSystem, questions: list[str]) -> None:
    for parameter in system.trainable_parameters().values():
        parameter.requires_grad_(True)
    speaking = [
        played
        for played in system.unroll(questions[:1], num_rounds=2, num_latent_steps=2, answer_rounds=(1,))
        if played.turn.speaks
    ]
    assert [played.turn.round for played in speaking] == [1, 2]
    # In round 1 the feedback link has not been used yet.
    loss = speaking[0].agent.loss(speaking[0].reading, ["yes"]).sum()
    parameters = system.trainable_parameters()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    reached = {name.split("/")[0] for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
    assert reached == {"planner", "critic", "planner->critic", "critic->solver"}


def test_base_weights_get_no_gradient(system: RecursiveSystem, questions: list[str]) -> None:
    for parameter in system.trainable_parameters().values():
        parameter.requires_grad_(True)
    *_, last = system.unroll(questions[:1], num_rounds=2, num_latent_steps=2)
    last.agent.loss(last.reading, ["yes"]).sum().backward()
    for agent in system.agents.values():
        assert all(not p.requires_grad and p.grad is None for p in agent.model.network.parameters())


# Planted faults: each must be caught by the checks above


def test_a_padding_that_is_attended_to_is_caught(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LatentCache.step

    def attend_to_all(self: LatentCache, decoder: Any, inputs_embeds: Tensor, attention_mask: Any = None) -> Tensor:
        return step(self, decoder, inputs_embeds, None)

    monkeypatch.setattr(LatentCache, "step", attend_to_all)
    with pytest.raises(AssertionError):
        assert_exact(system, questions, num_rounds=1, num_latent_steps=1)


def test_a_merge_that_forgets_its_mask_is_caught(
    make_system: MakeSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = LatentCache.merge

    def merge_unmasked(caches: Sequence[LatentCache]) -> LatentCache:
        merged = merge(caches)
        merged.attention_mask = torch.ones_like(merged.attention_mask)
        return merged

    monkeypatch.setattr(LatentCache, "merge", merge_unmasked)
    with pytest.raises(AssertionError):
        assert_exact(make_system(prompts=SLOT_FIRST), questions, num_rounds=1, num_latent_steps=2)


def test_padding_in_the_middle_is_caught_on_sliding_windows(
    make_system: MakeSystem,
    sliding_models: dict[str, LanguageModel],
    questions: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pad_in_the_middle(self: Agent, reading: Reading, rows: list[Any]) -> Reading:
        """The obvious way, with mask and positions all right: one step for rows of unequal length, padded between."""
        vectors = [
            torch.cat([self.model.embed(torch.tensor(p)) if isinstance(p, list) else p for p in row]) for row in rows
        ]
        length = max(len(each) for each in vectors)
        embeds = torch.stack([torch.nn.functional.pad(each, (0, 0, length - len(each), 0)) for each in vectors])
        mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in vectors])
        cache = reading.cache.fork()
        cache.attention_mask = torch.cat([cache.attention_mask, mask], dim=1)
        output = self.model.decoder(
            inputs_embeds=embeds,
            attention_mask=cache.attention_mask,
            position_ids=(cache.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:].contiguous(),
            past_key_values=cache.past_key_values,
            use_cache=True,
        )
        return Reading(cache, output.last_hidden_state[:, -1], reading.prompt_tokens, reading.positions)

    full_attention = make_system(prompts=SLOT_FIRST)
    sliding = make_system(agents=sliding_models, prompts=SLOT_FIRST)
    short = {"num_rounds": 1, "num_latent_steps": 2}
    # Only rows that have something to read after their first piece are padded: every role but the planner in round 1.
    read_on = Agent._read_on
    monkeypatch.setattr(
        Agent,
        "_read_on",
        lambda self, reading, rows: (pad_in_the_middle if any(rows) else read_on)(self, reading, rows),
    )
    # Where every position sees all others it happens to be exact, which is why it goes unnoticed.
    assert_exact(full_attention, questions[:3], **short)
    with pytest.raises(AssertionError):
        assert_exact(sliding, questions, **short)


def test_embeddings_that_are_scaled_twice_are_caught(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = LanguageModel.embed
    monkeypatch.setattr(LanguageModel, "embed", lambda self, ids: embed(self, ids) * self.hidden_size**0.5)
    # A batch is no less exact for it: only the reference can tell.
    assert_exact(system, questions[:2], num_rounds=1)
    with pytest.raises(AssertionError):
        assert_played_by_hand(system, questions[0], 1, 2)


def test_a_latent_step_too_many_is_caught(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    think_on = Agent.think
    monkeypatch.setattr(
        Agent, "think", lambda self, reading, steps, **options: think_on(self, reading, steps + 1)[:, 1:]
    )
    with pytest.raises(AssertionError):
        assert_played_by_hand(system, questions[0], 1, 2)
