"""Agent: how a prompt with messages in it is read, and what follows from it."""

from pathlib import Path

import pytest
import torch
from tests.conftest import make_model
from tests.families.table import load_family
from torch import Tensor

from recursivemas.agents import Agent, Message, PrefixStore, Reading
from recursivemas.decoding import SamplingParams
from recursivemas.errors import InputError
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.prompts import Slot

PROMPT = ("A plan by ", Slot("planner"), " and an answer by ", Slot("solver"), " at dawn.")


@pytest.fixture(params=["qwen3", "llama", "mistral", "qwen3_5"])
def agent(request: pytest.FixtureRequest, tiny_models: dict[str, LanguageModel], tmp_path: Path) -> Agent:
    if request.param == "qwen3_5":
        model = load_family("qwen3_5", tmp_path)
    else:
        model = make_model("mistral", 1, sliding_window=8) if request.param == "mistral" else tiny_models[request.param]
    return Agent("critic", model, RecursiveLink.inner(model.hidden_size))


def latents(agent: Agent, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, agent.model.hidden_size, generator=generator)


def expected_state(agent: Agent, *pieces: str | Tensor) -> Tensor:
    """The last state of pieces read in one go, without a cache."""
    table = agent.model.network.get_input_embeddings()
    parts = [table(torch.tensor(agent.model.encode(p))) if isinstance(p, str) else p for p in pieces]
    return agent.model.network.get_decoder()(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0, -1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_messages_stand_in_their_slots_latents_before_text(agent: Agent) -> None:
    given = latents(agent, 1, 3)
    inbox = {"planner": Message(given, ("two words",)), "solver": Message(texts=("more",))}
    reading = agent.read([PROMPT], inbox)
    pieces = ["A plan by ", given[0], "two words", " and an answer by ", "more", " at dawn."]
    assert_close(reading.state[0], expected_state(agent, *pieces))
    in_text = sum(len(agent.model.encode(piece)) for piece in pieces if isinstance(piece, str))
    assert reading.prompt_tokens == [in_text]
    assert reading.positions == [in_text + 3]


def test_a_slot_without_a_message_is_empty(agent: Agent) -> None:
    reading = agent.read([PROMPT], {})
    assert_close(reading.state[0], expected_state(agent, "A plan by ", " and an answer by ", " at dawn."))


def test_rows_of_any_form_are_read_as_if_alone(agent: Agent) -> None:
    prompts = [
        ("Short: ", Slot("planner"), " one"),
        ("A prompt that begins with very much more text: ", Slot("planner"), " one"),
        ("Short: ", Slot("planner")),
        ("Only text, and nothing after it.",),
    ]
    inbox = {"planner": Message(latents(agent, 4, 2), ("a text", "", "another text of other length", "unread"))}
    reading = agent.read(prompts, inbox)
    for row, prompt in enumerate(prompts):
        alone = Message(inbox["planner"].latents[row : row + 1], inbox["planner"].texts[row : row + 1])
        expected = agent.read([prompt], {"planner": alone})
        assert_close(reading.state[row], expected.state[0])
        assert reading.prompt_tokens[row] == expected.prompt_tokens[0]
        assert reading.positions[row] == expected.positions[0]


def test_a_prompt_may_begin_with_a_slot(agent: Agent) -> None:
    given = latents(agent, 2, 3)
    prompts = [(Slot("planner"), " says one."), (Slot("planner"), " says a lot more.")]
    reading = agent.read(prompts, {"planner": Message(given)})
    for row, (_, text) in enumerate(prompts):
        assert_close(reading.state[row], expected_state(agent, given[row], text))


def test_a_prefix_is_read_once_and_can_be_gone_on_from_twice(agent: Agent) -> None:
    store = PrefixStore()
    first = agent.read([PROMPT], {"planner": Message(latents(agent, 1, 2))}, store)
    second = agent.read([PROMPT], {"planner": Message(latents(agent, 1, 2, seed=1))}, store)
    fresh = agent.read([PROMPT], {"planner": Message(latents(agent, 1, 2, seed=1))})
    assert_close(second.state[0], fresh.state[0])
    assert second.prompt_tokens == first.prompt_tokens
    assert first.positions[0] - second.positions[0] == len(agent.model.encode("A plan by "))


def test_thinking_and_speaking_leave_a_reading_as_it_was(agent: Agent) -> None:
    reading = agent.read([PROMPT], {})
    length = len(reading.cache)
    sampling = SamplingParams(max_new_tokens=5)
    spoken = agent.speak(reading, sampling, ["key"])
    thoughts = agent.think(reading, 3)
    assert len(reading.cache) == length
    assert agent.speak(reading, sampling, ["key"]) == spoken
    assert torch.equal(agent.think(reading, 3), thoughts)


def test_loss_is_the_mean_cross_entropy_of_each_rows_reply(agent: Agent) -> None:
    prompts = [("A plan: ",), ("The critic of it all says: ",), ("Why? ",)]
    replies = ["the river", "forty-two, I say", ""]
    found = agent.loss(agent.read(prompts, {}), replies)
    table = agent.model.network.get_input_embeddings()
    for row, ((text,), answer) in enumerate(zip(prompts, replies, strict=True)):
        prompt_ids = agent.model.encode(text)
        labels = [*agent.model.encode(answer), agent.model.reply_end_id]
        embeds = table(torch.tensor([*prompt_ids, *labels[:-1]]))
        logits = agent.model.network(inputs_embeds=embeds[None]).logits[0, len(prompt_ids) - 1 :]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_selected_reading_is_that_of_its_rows(agent: Agent) -> None:
    reading = agent.read([("One plan",), ("A much longer plan than that",)], {})
    selected: Reading = reading.select(torch.tensor([1]))
    alone = agent.read([("A much longer plan than that",)], {})
    assert_close(selected.state, alone.state)
    assert selected.prompt_tokens == alone.prompt_tokens
    assert_close(agent.think(selected, 3), agent.think(alone, 3))


def test_rows_that_fit_alone_fit_together() -> None:
    # One row has a long prefix, the other a long continuation: padded, the batch is longer than the context.
    model = make_model("llama", max_position_embeddings=64)
    agent = Agent("critic", model, RecursiveLink.inner(model.hidden_size))
    prompts = [("a" * 50, Slot("planner"), "?"), ("Why ", Slot("planner"), "?")]
    texts = ("", "b" * 50)
    together = agent.read(prompts, {"planner": Message(texts=texts)})
    assert len(together.cache) > 64
    for row, prompt in enumerate(prompts):
        alone = agent.read([prompt], {"planner": Message(texts=texts[row : row + 1])})
        assert_close(together.state[row], alone.state[0])
    assert_close(agent.think(together, 4)[1], agent.think(alone, 4)[0])
    replies = agent.speak(together, SamplingParams(max_new_tokens=99), ["0", "1"])
    assert [len(reply.token_ids) for reply in replies] == [64 - int(n) for n in together.cache.num_positions]


def test_a_row_that_does_not_fit_is_refused() -> None:
    model = make_model("llama", max_position_embeddings=64)
    agent = Agent("critic", model, RecursiveLink.inner(model.hidden_size))
    with pytest.raises(InputError, match="the prompt of the critic needs .* at most 64"):
        agent.read([("Why? ", Slot("planner"))], {"planner": Message(latents(agent, 1, 99))})
    with pytest.raises(InputError, match="with its thoughts, needs 1.. positions"):
        agent.think(agent.read([("Why? ",)], {}), 100)
    with pytest.raises(InputError, match="with a reply, needs 65"):
        agent.speak(
            agent.read([("", Slot("planner"))], {"planner": Message(latents(agent, 1, 64))}), SamplingParams(), [""]
        )
