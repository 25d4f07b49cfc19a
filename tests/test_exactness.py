"""A question's latents and its greedy answer are the same alone, in a batch, in any order, with any padding.

What is compared with: the same question alone; readable references that use nothing of the package but the links and
call transformers without a cache; and, so that the checks are known to have teeth, planted faults that must be caught.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.conftest import make_model
from torch import Tensor

from recursivemas.agents import Agent, PrefixStore, Reading
from recursivemas.cache import LatentCache
from recursivemas.decoding import SamplingParams
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem, Result

TOLERANCE = 1e-4
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


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same(found: Result, expected: Result) -> None:
    """Same messages, in the same order, and the same text."""
    assert [(m.round, m.source, m.target, m.text) for m in found.trace.messages] == [
        (m.round, m.source, m.target, m.text) for m in expected.trace.messages
    ]
    for message, other in zip(found.trace.messages, expected.trace.messages, strict=True):
        latents, others = message.tensor(), other.tensor()
        assert (latents is None) == (others is None)
        if latents is not None and others is not None:
            assert distance(latents, others) <= TOLERANCE, f"{message.source}->{message.target}, round {message.round}"
    assert found.text == expected.text
    assert found.finished == expected.finished


def assert_exact(system: RecursiveSystem, questions: Sequence[str], **options: Any) -> None:
    """Alone = in a batch = in the opposite order beside a very long question = in small batches."""
    alone = [system.run(question, trace="full", **options) for question in questions]
    very_long = "The fox runs over the river, and then " * 12 + "where is it?"
    arrangements = [
        system.run(questions, trace="full", **options),
        system.run([*questions[::-1], very_long], trace="full", **options)[-2::-1],
        system.run(questions, trace="full", batch_size=2, **options),
    ]
    for arrangement in arrangements:
        for found, expected in zip(arrangement, alone, strict=True):
            assert_same(found, expected)


# References: transformers, lists of embeddings, and nothing of ours but the links


def token_ids(model: LanguageModel, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False)) if text else []


def embedded(model: LanguageModel, pieces: Sequence[str | Tensor]) -> Tensor:
    """Pieces of text, each tokenised on its own, and latents, as one sequence of input embeddings."""
    table = model.network.get_input_embeddings()
    return torch.cat([table(torch.tensor(token_ids(model, p))) if isinstance(p, str) else p for p in pieces if len(p)])


def prompt(system: RecursiveSystem, role: str, template: str, question: str, message: str | Tensor) -> Tensor:
    """The words of the bundled prompts, rendered by the tokenizer itself, with a message in their only slot."""
    text = getattr(system.prompts.roles[role], template).replace("{instructions}", "")
    head, *tail = text.replace("{question}", question).replace("{latents:", "<SLOT>{").split("<SLOT>")
    marked = head + "".join("@@@" + piece.partition("}")[2] for piece in tail)
    model = system.agents[role].model
    rendered = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": marked}], tokenize=False, add_generation_prompt=True
    )
    before, *after = rendered.split("@@@")
    return embedded(model, [before, message, *after] if after else [before])


def last_states(model: LanguageModel, inputs_embeds: Tensor) -> Tensor:
    return model.network.get_decoder()(inputs_embeds=inputs_embeds[None], use_cache=False).last_hidden_state[0]


def say(model: LanguageModel, inputs_embeds: Tensor, max_new_tokens: int) -> str:
    """Greedy text by transformers' own `generate`, which returns only the new tokens when it is given embeddings."""
    ends = [model.tokenizer.convert_tokens_to_ids(token) for token in ("<|eos|>", "<|im_end|>")]
    with torch.no_grad():
        new = model.network.generate(
            inputs_embeds=inputs_embeds[None],
            attention_mask=torch.ones(1, len(inputs_embeds), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=model.tokenizer.pad_token_id,
        )
    return str(model.tokenizer.decode(new[0], skip_special_tokens=True))


def think(system: RecursiveSystem, edge: str, inputs_embeds: Tensor, num_latent_steps: int) -> Tensor:
    """The message that the sender of an edge thinks: eq. 1 without a cache, then eq. 3 and eq. 4."""
    role = edge.split("->")[0]
    model, inner = system.agents[role].model, system.agents[role].inner_link
    thoughts: list[Tensor] = []
    for _ in range(num_latent_steps):
        thoughts.append(last_states(model, inputs_embeds)[-1])
        inputs_embeds = torch.cat([inputs_embeds, inner(thoughts[-1])[None]])
    return system.links[edge](inner(torch.stack(thoughts)))


def play_by_hand(
    system: RecursiveSystem, question: str, send: Callable[[str, Tensor], Any], num_rounds: int
) -> tuple[dict[tuple[int, str], Any], Tensor]:
    """The sequential pattern, spelled out. Returns every message and the last prompt of the solver."""
    sent: dict[tuple[int, str], Any] = {}
    for round in range(1, num_rounds + 1):
        first = round == 1
        feedback = "" if first else sent[round - 1, "solver->planner"]
        reading = prompt(system, "planner", "first" if first else "later", question, feedback)
        sent[round, "planner->critic"] = send("planner->critic", reading)
        reading = prompt(system, "critic", "always", question, sent[round, "planner->critic"])
        sent[round, "critic->solver"] = send("critic->solver", reading)
        if round < num_rounds:
            reading = prompt(system, "solver", "always", question, sent[round, "critic->solver"])
            sent[round, "solver->planner"] = send("solver->planner", reading)
    return sent, prompt(system, "solver", "last", question, sent[num_rounds, "critic->solver"])


def assert_equals_reference(system: RecursiveSystem, question: str, num_rounds: int, num_latent_steps: int) -> None:
    """The latent messages and the answer of `run` are those of the system played by hand."""
    with torch.no_grad():
        sent, reading = play_by_hand(
            system, question, lambda edge, embeds: think(system, edge, embeds, num_latent_steps), num_rounds
        )
    result = system.run(question, num_rounds=num_rounds, num_latent_steps=num_latent_steps, trace="full")
    assert len(result.trace.messages) == len(sent)
    for message in result.trace.messages:
        expected = sent[message.round, f"{message.source}->{message.target}"]
        assert distance(result.trace.message(message.round, message.source, message.target), expected) <= TOLERANCE
    assert result.text == say(system.agents["solver"].model, reading, 12)


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
        assert_equals_reference(system, question, num_rounds, 3)


def test_sliding_windows_equal_a_system_played_by_hand(
    make_system: MakeSystem, sliding_models: dict[str, LanguageModel], questions: list[str]
) -> None:
    assert_equals_reference(make_system(agents=sliding_models), questions[0], 2, 3)


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_the_text_channel_equals_a_loop_over_transformers_generate(
    system: RecursiveSystem, questions: list[str], num_rounds: int
) -> None:
    results = system.run(questions[:3], channel="text", num_rounds=num_rounds)
    for question, result in zip(questions[:3], results, strict=True):
        sent, reading = play_by_hand(
            system,
            question,
            lambda edge, embeds: say(system.agents[edge.split("->")[0]].model, embeds, 12),
            num_rounds,
        )
        found = {(m.round, f"{m.source}->{m.target}"): m.text for m in result.trace.messages}
        assert found == sent
        assert result.text == say(system.agents["solver"].model, reading, 12)


# Gradients


def reply_loss(model: LanguageModel, reading: Tensor, answer: str) -> Tensor:
    """Eq. 6 by hand: mean cross-entropy of the answer's tokens and the end-of-reply token."""
    labels = [*token_ids(model, answer), model.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    states = last_states(model, torch.cat([reading, embedded(model, [answer])]))[len(reading) - 1 :]
    return torch.nn.functional.cross_entropy(model.network.lm_head(states), torch.tensor(labels))


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
        _, reading = play_by_hand(system, question, lambda edge, embeds: think(system, edge, embeds, 3), num_rounds)
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
        assert_equals_reference(system, questions[0], 1, 2)


def test_a_latent_step_too_many_is_caught(
    system: RecursiveSystem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    think_on = Agent.think
    monkeypatch.setattr(
        Agent, "think", lambda self, reading, steps, **options: think_on(self, reading, steps + 1)[:, 1:]
    )
    with pytest.raises(AssertionError):
        assert_equals_reference(system, questions[0], 1, 2)
