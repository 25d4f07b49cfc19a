"""Interventions: what arrives is what they say, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from recursivemas.agents import Message
from recursivemas.errors import InputError
from recursivemas.interventions import Intervention, Replay
from recursivemas.system import RecursiveSystem


class Recorder(Intervention):
    """Changes nothing, and remembers everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(self, message: Message, edge: str, round: int) -> Message:
        self.seen.append((edge, round))
        return message


def answer_by_hand(system: RecursiveSystem, question: str, latents: Tensor) -> str:
    """The solver's answer to a message, by transformers' `generate`."""
    model = system.agents["solver"].model
    content = f"You are the solver of a team.\nQuestion: {question}\nThe improved plan: @@@\nAnswer the question. "
    pieces = model.render_chat([{"role": "user", "content": content}]).split("@@@")
    table = model.network.get_input_embeddings()
    before, after = (table(torch.tensor(model.encode(piece))) for piece in pieces)
    with torch.no_grad():
        new = model.network.generate(
            inputs_embeds=torch.cat([before, latents, after])[None],
            attention_mask=torch.ones(1, len(before) + len(latents) + len(after), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(model.stop_token_ids),
            pad_token_id=model.tokenizer.pad_token_id,
        )
    return model.decode(new[0].tolist())


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_shuffled_hands_over_the_next_questions_message_of_the_normal_run(
    system: RecursiveSystem, questions: list[str], seed: int, batch_size: int
) -> None:
    normal = system.run(questions, trace="full")
    shuffled = system.run(questions, intervene="shuffled", seed=seed, batch_size=batch_size)
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    for place, row in enumerate(order):
        donor = normal[order[(place + 1) % len(order)]]
        message = donor.trace.message(round=2, source="critic", target="solver")
        assert shuffled[row].text == answer_by_hand(system, questions[row], message)
        assert shuffled[row].trace.question == questions[row]
    assert [result.text for result in shuffled] != [result.text for result in normal]


def test_shuffled_text_is_the_next_questions_text(system: RecursiveSystem, questions: list[str]) -> None:
    normal = system.run(questions[:2], channel="text")
    shuffled = system.run(questions[:2], channel="text", intervene="shuffled")
    swapped = [
        Replay({("critic->solver", 2): Message(texts=(other.trace.find(2, "critic", "solver").text,))})
        for other in normal[::-1]
    ]
    expected = [
        system.run(question, channel="text", intervene=replay)
        for question, replay in zip(questions[:2], swapped, strict=True)
    ]
    assert [result.text for result in shuffled] == [result.text for result in expected]


def test_zero_gives_zeros_to_every_reader(system: RecursiveSystem, questions: list[str]) -> None:
    results = system.run(questions[:3], intervene="zero", trace="full")
    for question, result in zip(questions[:3], results, strict=True):
        assert len(result.trace.messages) == 5
        for message in result.trace.messages:
            assert message.tensor().shape[0] == 4
            assert not message.tensor().any()
        zeros = torch.zeros(4, system.agents["solver"].model.hidden_size)
        assert result.text == answer_by_hand(system, question, zeros)


def test_zero_text_is_empty_text(system: RecursiveSystem, questions: list[str]) -> None:
    result = system.run(questions[0], channel="text", intervene="zero")
    assert [message.text for message in result.trace.messages] == [""] * 5
    # An empty text fills nothing: for the solver it is as if there were no channel.
    assert result.text == system.run(questions[0], channel="none").text


def test_an_intervention_sees_every_message_once_and_in_order(system: RecursiveSystem, questions: list[str]) -> None:
    recorder = Recorder()
    watched = system.run(questions[:2], intervene=recorder)
    assert recorder.seen == [
        ("planner->critic", 1),
        ("critic->solver", 1),
        ("solver->planner", 1),
        ("planner->critic", 2),
        ("critic->solver", 2),
    ]
    assert [result.text for result in watched] == [result.text for result in system.run(questions[:2])]


def test_an_intervention_on_one_edge_leaves_what_came_before_as_it_was(
    system: RecursiveSystem, questions: list[str]
) -> None:
    class Louder(Intervention):
        def __call__(self, message: Message, edge: str, round: int) -> Message:
            return Message(-message.latents) if (edge, round) == ("solver->planner", 1) else message

    normal, changed = (system.run(questions[0], trace="full", intervene=each) for each in (None, Louder()))
    same = [
        torch.equal(one.tensor(), other.tensor())
        for one, other in zip(normal.trace.messages, changed.trace.messages, strict=True)
    ]
    assert same == [True, True, False, False, False]


def test_a_replay_that_holds_other_questions_is_refused(system: RecursiveSystem, questions: list[str]) -> None:
    trace = system.run(questions[0], trace="full").trace
    with pytest.raises(InputError, match="messages of 1 questions were recorded.*not 2"):
        system.run(questions[:2], intervene=Replay.from_traces([trace]))


def test_there_must_be_something_to_replay(system: RecursiveSystem, questions: list[str]) -> None:
    with pytest.raises(InputError, match="no trace"):
        Replay.from_traces([])
    summary = system.run(questions[0]).trace
    with pytest.raises(InputError, match="trace='full'"):
        Replay.from_traces([summary])
