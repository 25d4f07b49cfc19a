"""The slow way: any pattern played by hand with transformers, one question at a time, without cache, batch or padding.

Uses nothing of the package but the links, and the words and the table of a system. Beside it, what compares the fast
ways with it. It is written to be read, and not to be fast.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tests.families.table import DEAF, TEMPLATES
from torch import Tensor

from recursivemas.answering import Result
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

TOLERANCE = 1e-4

Pieces = Sequence[str | Tensor]
"""What stands in a slot, or makes up a prompt: text, tokenised on its own, and latents."""
Send = Callable[[str, Tensor], Pieces]
"""What is sent on an edge by a sender who has read these embeddings."""

_MERGING = [TEMPLATES[name] for name in DEAF]
VERY_LONG = "The fox runs over the river, and then " * 8 + "where is it?"


# What is compared


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
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


def assert_exact(system: RecursiveSystem, questions: Sequence[str], **options: Any) -> list[Result]:
    """Alone = in a batch = in the opposite order beside a very long question = in small batches. Returns them alone."""
    alone = [system.run(question, trace="full", **options) for question in questions]
    arrangements = [
        system.run(questions, trace="full", **options),
        system.run([*questions[::-1], VERY_LONG], trace="full", **options)[-2::-1],
        system.run(questions, trace="full", batch_size=2, **options),
    ]
    for arrangement in arrangements:
        for found, expected in zip(arrangement, alone, strict=True):
            assert_same(found, expected)
    return alone


# The words


def token_ids(model: LanguageModel, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False)) if text else []


def embedded(model: LanguageModel, pieces: Pieces) -> Tensor:
    """Pieces of text, each tokenised on its own, and latents, as one sequence of input embeddings."""
    table = model.network.get_input_embeddings()
    return torch.cat([table(torch.tensor(token_ids(model, p))) if isinstance(p, str) else p for p in pieces if len(p)])


def rendered(model: LanguageModel, system: str | None, user: str) -> str:
    """Words through the chat template; in one message where it has no place for the system's."""
    messages = [{"role": "user", "content": user}]
    if system is not None and model.tokenizer.chat_template in _MERGING:
        messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
    elif system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return str(
        model.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024"
        )
    )


def prompt(system: RecursiveSystem, role: str, template: str, question: str, inbox: Mapping[str, Pieces]) -> Tensor:
    """A template with messages in its slots, as the embeddings that a role reads."""
    words, *rest = re.split(r"\{latents:(\w+)\}", template.replace("{instructions}", ""))
    marked = words + "".join("@@@" + text for text in rest[1::2])
    model = system.agents[role].model
    first, *others = rendered(model, system.prompts.system, marked.replace("{question}", question)).split("@@@")
    pieces: list[str | Tensor] = [first]
    for source, text in zip(rest[::2], others, strict=True):
        pieces += [*inbox.get(source, ()), text]
    return embedded(model, pieces)


# The models


def last_states(model: LanguageModel, inputs_embeds: Tensor) -> Tensor:
    return model.network.get_decoder()(inputs_embeds=inputs_embeds[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def write(model: LanguageModel, inputs_embeds: Tensor, max_new_tokens: int) -> str:
    """Greedy text, for which everything is read again at every token."""
    marks = [mark for mark in ("<|im_end|>", "<|end|>") if mark in model.tokenizer.chat_template]
    ends = {model.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|eos|>", *marks)}
    ids: list[int] = []
    while len(ids) < max_new_tokens and not ends & set(ids[-1:]):
        states = last_states(model, torch.cat([inputs_embeds, *([embedded_ids(model, ids)] if ids else [])]))
        ids.append(int(model.network.get_output_embeddings()(states[-1]).argmax()))
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


def embedded_ids(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    return model.network.get_input_embeddings()(torch.tensor(ids))


def generate(model: LanguageModel, inputs_embeds: Tensor, max_new_tokens: int) -> str:
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


def reply_loss(model: LanguageModel, reading: Tensor, answer: str) -> Tensor:
    """Eq. 6 by hand: mean cross-entropy of the answer's tokens and the end-of-reply token."""
    labels = [*token_ids(model, answer), model.reply_end_id]
    states = last_states(model, torch.cat([reading, embedded(model, [answer])]))[len(reading) - 1 :]
    return torch.nn.functional.cross_entropy(model.network.lm_head(states), torch.tensor(labels))


# The loop


def sender(system: RecursiveSystem, channel: str, num_latent_steps: int, max_new_tokens: int) -> Send:
    """How messages are made on a channel."""

    def send(edge: str, reading: Tensor) -> Pieces:
        latents = [think(system, edge, reading, num_latent_steps)] if channel != "text" and num_latent_steps else []
        return latents if channel == "latent" else [*latents, write(model_of(system, edge), reading, max_new_tokens)]

    return send


def model_of(system: RecursiveSystem, edge: str) -> LanguageModel:
    """The model of an edge's sender."""
    return system.agents[edge.split("->")[0]].model


def play_by_hand(
    system: RecursiveSystem, question: str, send: Send, num_rounds: int
) -> tuple[dict[tuple[int, str], Pieces], Tensor]:
    """A pattern, spelled out. Returns every message by round and edge, and the last prompt of the role that answers."""
    stage = {role: number for number, roles in enumerate(system.pattern.stages) for role in roles}
    sent: dict[tuple[int, str], Pieces] = {}
    for round in range(1, num_rounds + 1):
        for role in stage:
            inbox = {}
            for edge in system.pattern.edges:
                source, target = edge.split("->")
                when = round if stage[source] < stage[target] else round - 1
                if target == role and when:
                    inbox[source] = sent[when, edge]
            words = system.prompts.roles[role]
            of_round = words.first if round == 1 else words.later
            template = (words.last if round == num_rounds else None) or of_round or words.always
            reading = prompt(system, role, template or "", question, inbox)
            if role == system.pattern.answers and round == num_rounds:
                return sent, reading
            for edge in system.pattern.edges:
                source, target = edge.split("->")
                is_read = round < num_rounds or stage[source] < stage[target]
                if source == role and is_read:
                    sent[round, edge] = send(edge, reading)
    raise AssertionError("nobody has answered")


def assert_equals_reference(
    system: RecursiveSystem,
    result: Result,
    question: str,
    *,
    num_rounds: int,
    num_latent_steps: int,
    max_new_tokens: int,
    channel: str = "latent",
) -> None:
    """The messages and the answer of a run are those of the system played by hand."""
    with torch.no_grad():
        send = sender(system, channel, num_latent_steps, max_new_tokens)
        sent, reading = play_by_hand(system, question, send, num_rounds)
    expected = {place: pieces for place, pieces in sent.items() if pieces}
    assert {(m.round, f"{m.source}->{m.target}") for m in result.trace.messages} == set(expected)
    for message in result.trace.messages:
        pieces = expected[message.round, f"{message.source}->{message.target}"]
        latents = [piece for piece in pieces if isinstance(piece, Tensor)]
        found = message.tensor()
        assert (found is None) == (not latents)
        if latents and found is not None:
            assert distance(found, latents[0]) <= TOLERANCE, f"{message.source}->{message.target}, {message.round}"
        assert message.text == next((piece for piece in pieces if isinstance(piece, str)), None)
    assert result.text == write(system.agents[system.pattern.answers].model, reading, max_new_tokens)
