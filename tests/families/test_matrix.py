"""The exactness matrix: every family x what must change neither a latent nor a letter.

Alone = in a batch = in any order = beside rows of any length = cached = uncached = with prefixes read once, for one to
three rounds, without thoughts, with one and with several, with slots anywhere, in latents and in text. What is compared
with is the slow way of reference.py, which has no cache, no batch and no padding. Gradients, too. And, so that the
checks are known to have teeth: faults that must be caught in every family where they matter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.families.reference import (
    TOLERANCE,
    VERY_LONG,
    assert_equals_reference,
    assert_same,
    distance,
    play_by_hand,
    reply_loss,
    sender,
)
from tests.families.table import FAMILIES, WIDTHS, load_family
from torch import Tensor
from torch.nn.functional import pad

from recursivemas.agents import Agent, PrefixStore, Reading
from recursivemas.cache import LatentCache, RecurrentLayer
from recursivemas.decoding import SamplingParams
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

ROLES = ("planner", "critic", "solver")
MIXED = ("qwen3_5", "gemma3_text", "mistral-window")
"""The families of the roles in the system of the row `mixed`, where attention is computed eagerly."""

ROWS = [*FAMILIES, "mixed"]
SIMILAR = ("qwen2-r1", "qwen3_5-sees", "gemma3-sees")
"""Families that have the network of another one, and differ in their files or in their template."""

# With the words of the template, prompts from a few tokens, short of the sliding window, to several times its length.
QUESTIONS = [
    "Why?",
    "What is 2 + 2?",
    "A fox runs for two hours at four miles an hour, rests, and then runs half as far again. How far did it run?",
]

CHAIN = {
    "name": "chain",
    "stages": [["planner"], ["critic"], ["solver"]],
    "edges": ["planner->critic", "critic->solver", "solver->planner"],
    "answers": "solver",
}
# Where a slot stands; `several` has two edges into the solver, the question between them, and a system's text.
PROMPTS: dict[str, Any] = {
    "start": {
        "planner": {"first": "{question}", "later": "{latents:solver} {question}"},
        "critic": {"always": "{latents:planner} {question}"},
        "solver": {"always": "{latents:critic} {question}", "last": "{latents:critic} {question} So:"},
    },
    "middle": {
        "planner": {"first": "Plan {question}", "later": "Seen: {latents:solver}. Plan {question}"},
        "critic": {"always": "Plan: {latents:planner}. Check {question}"},
        "solver": {"always": "Plan: {latents:critic}. {question}", "last": "Plan: {latents:critic}. {question} So:"},
    },
    "end": {
        "planner": {"first": "{question}", "later": "{question} {latents:solver}"},
        "critic": {"always": "{question} {latents:planner}"},
        "solver": {"always": "{question} {latents:critic}"},
    },
    "several": {
        "planner": {"first": "{question}", "later": "{latents:solver}{latents:critic} {question}"},
        "critic": {"always": "{question} {latents:planner}"},
        "solver": {"always": "{latents:planner} {question} {latents:critic}"},
    },
}
EDGES = {"several": [*CHAIN["edges"], "planner->solver", "critic->planner"]}
MakeSystem = Callable[..., RecursiveSystem]


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[LanguageModel]]:
    """A family, and a model of it for each role: of two widths, each with weights of its own."""
    families = MIXED if request.param == "mixed" else [request.param] * 3
    options = {"attn_implementation": "eager" if request.param == "mixed" else "sdpa"}
    folder = tmp_path_factory.mktemp("checkpoints")
    return request.param, [
        load_family(name, folder / str(seed), width=WIDTHS[seed % 2], seed=seed, **options)
        for seed, name in enumerate(families)
    ]


@pytest.fixture
def family(row: tuple[str, list[LanguageModel]]) -> str:
    return row[0]


@pytest.fixture
def make(row: tuple[str, list[LanguageModel]]) -> MakeSystem:
    """Builds a system of the row's models, with slots where they are wanted."""

    def build(slots: str = "end") -> RecursiveSystem:
        words = {"name": slots, "roles": PROMPTS[slots], **({"system": "Be brief."} if slots == "several" else {})}
        pattern = {**CHAIN, "edges": EDGES.get(slots, CHAIN["edges"])}
        return RecursiveSystem.build(agents=dict(zip(ROLES, row[1], strict=True)), pattern=pattern, prompts=words)

    return build


def has(family: str, trait: str) -> bool:
    """Whether a family has a trait; the mixed row has what any of its own has."""
    return any(getattr(FAMILIES[name], trait) for name in (MIXED if family == "mixed" else (family,)))


def check(
    system: RecursiveSystem, num_rounds: int, num_latent_steps: int, channel: str = "latent", new: int = 3
) -> None:
    """The slow way = alone = in the opposite order, in one batch, beside a very long question.

    Which question is compared with itself alone, and which with the slow way, changes from case to case.
    """
    loop: dict[str, Any] = {"num_rounds": num_rounds, "num_latent_steps": num_latent_steps, "channel": channel}
    options: dict[str, Any] = {**loop, "sampling": SamplingParams(max_new_tokens=new), "trace": "full"}
    together = system.run([*QUESTIONS[::-1], VERY_LONG], **options)[-2::-1]
    for number, (question, result) in enumerate(zip(QUESTIONS, together, strict=True)):
        if number == (num_rounds + num_latent_steps) % len(QUESTIONS):
            assert_same(system.run(question, **options), result)
        else:
            assert_equals_reference(system, result, question, max_new_tokens=new, **loop)


# What must hold


ROUNDS_AND_STEPS = [(num_rounds, num_latent_steps) for num_rounds in (1, 2, 3) for num_latent_steps in (0, 1, 7)]


@pytest.mark.parametrize(
    ("row", "num_rounds", "num_latent_steps"),
    [(name, *each) for name in ROWS for each in (ROUNDS_AND_STEPS[-3:] if name in SIMILAR else ROUNDS_AND_STEPS)],
    indirect=["row"],
)
def test_rounds_and_steps(make: MakeSystem, num_rounds: int, num_latent_steps: int) -> None:
    check(make(), num_rounds, num_latent_steps)


@pytest.mark.parametrize("channel", ["latent", "text", "both"])
def test_several_slots(make: MakeSystem, channel: str) -> None:
    check(make("several"), 2, 2, channel)


@pytest.mark.parametrize("row", [name for name in ROWS if name not in SIMILAR], indirect=True)
@pytest.mark.parametrize("slots", ["start", "middle"])
@pytest.mark.parametrize("channel", ["latent", "text", "both"])
def test_slots_anywhere(make: MakeSystem, slots: str, channel: str) -> None:
    check(make(slots), 2, 2, channel)


@pytest.mark.parametrize("channel", ["latent", "text", "both"])
def test_prefixes_read_once(make: MakeSystem, monkeypatch: pytest.MonkeyPatch, channel: str) -> None:
    system = make()
    loop: dict[str, Any] = {"num_rounds": 3, "num_latent_steps": 2, "channel": channel}
    loop["sampling"] = SamplingParams(max_new_tokens=3)
    reused = system.run(QUESTIONS, trace="full", **loop)
    get = PrefixStore.get
    monkeypatch.setattr(PrefixStore, "get", lambda self, model, prefixes: get(PrefixStore(), model, prefixes))
    for found, expected in zip(reused, system.run(QUESTIONS, trace="full", **loop), strict=True):
        assert_same(found, expected)
        assert found.usage.positions < expected.usage.positions


@pytest.mark.parametrize("slots", ["end", "several"])
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_gradients(make: MakeSystem, slots: str, num_rounds: int) -> None:
    system, questions, answers = make(slots), QUESTIONS[:2], ["the river", "forty-two"]
    loop = {"num_rounds": num_rounds, "num_latent_steps": 3}
    parameters = system.trainable_parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    *_, last = system.unroll(questions, **loop)
    loss = last.agent.loss(last.reading, answers).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    by_hand = []
    for question, answer in zip(questions, answers, strict=True):
        _, reading = play_by_hand(system, question, sender(system, "latent", 3, 0), num_rounds)
        by_hand.append(reply_loss(last.agent.model, reading, answer))
    expected = torch.autograd.grad(torch.stack(by_hand).sum(), list(parameters.values()), allow_unused=True)

    assert loss.item() == pytest.approx(sum(each.item() for each in by_hand), rel=1e-5)
    for name, gradient, other in zip(parameters, found, expected, strict=True):
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert other.norm() > 0, name
            assert distance(gradient, other) <= TOLERANCE, name


# Planted faults: each must be caught by the check above, in every family where it can matter


def assert_caught(system: RecursiveSystem, num_rounds: int = 1) -> None:
    with pytest.raises(AssertionError):
        check(system, num_rounds, 3)


def test_a_mask_of_ones_is_caught(make: MakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LatentCache.step
    monkeypatch.setattr(LatentCache, "step", lambda self, decoder, embeds, mask=None: step(self, decoder, embeds, None))
    assert_caught(make())


def test_padding_in_the_middle_is_caught(make: MakeSystem, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pad_in_the_middle(self: Agent, reading: Reading, rows: list[Any]) -> Reading:
        """The obvious way, with mask and positions all right: one step for rows of unequal length, padded between."""
        vectors = [self._embed(row) for row in rows]
        length = max(len(each) for each in vectors)
        embeds = torch.stack([pad(each, (0, 0, length - len(each), 0)) for each in vectors])
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

    # Rows with nothing to read after their first piece are not padded: the planner's in round 1.
    read_on = Agent._read_on
    monkeypatch.setattr(
        Agent,
        "_read_on",
        lambda self, reading, rows: (pad_in_the_middle if any(rows) else read_on)(self, reading, rows),
    )
    if has(family, "window") or has(family, "recurrent"):
        assert_caught(make("start"))
    else:
        # Where every position sees all others it happens to be exact, which is why it goes unnoticed.
        check(make("start"), 1, 3)


def test_embeddings_scaled_twice_or_never_are_caught(
    make: MakeSystem, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, embed = make(), LanguageModel.embed
    if not has(family, "scaled"):
        # A family without a scale has none to apply twice: the rows of its table are what it reads.
        for agent in system.agents.values():
            ids = torch.arange(9)
            assert torch.equal(agent.model.embed(ids), agent.model.network.get_input_embeddings().weight[ids])
        return
    monkeypatch.setattr(
        LanguageModel,
        "embed",
        lambda self, ids: embed(self, ids) * getattr(self.network.get_input_embeddings(), "embed_scale", 1.0),
    )
    assert_caught(system)
    monkeypatch.setattr(LanguageModel, "embed", lambda self, ids: self.network.get_input_embeddings().weight[ids])
    assert_caught(system)


def test_a_cropped_cache_is_caught(make: MakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = LatentCache.fork

    def cropped(self: LatentCache) -> LatentCache:
        """A fork that has lost its last position, as after a rollback that went one too far."""
        shorter = fork(self)
        for layer in shorter.past_key_values.layers:
            # A recurrent state has no positions that could be taken away: it keeps what the others have lost.
            if isinstance(layer, RecurrentLayer) or not layer.is_initialized:
                continue
            # A full window has dropped what would have to come back: nothing stands in its place.
            gap = int(layer.is_sliding and layer.cumulative_length >= layer.sliding_window)
            layer.keys, layer.values = (pad(x[:, :, :-1], (0, 0, gap, 0)) for x in (layer.keys, layer.values))
            if layer.is_sliding:
                layer.cumulative_length -= 1
        shorter.attention_mask = self.attention_mask[:, :-1]
        return shorter

    monkeypatch.setattr(LatentCache, "fork", cropped)
    assert_caught(make())


def test_a_latent_step_too_many_is_caught(make: MakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    think = Agent.think

    def one_more(self: Agent, reading: Reading, steps: int, **options: Any) -> Tensor:
        return think(self, reading, steps + 1, **options)[:, 1:]

    monkeypatch.setattr(Agent, "think", one_more)
    assert_caught(make())


def test_a_fork_that_shares_its_recurrent_state_is_caught(
    make: MakeSystem, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has(family, "recurrent"):
        # There is no state that is written over: keys and values are only ever added to.
        assert not any(agent.model.new_cache(1).is_recurrent for agent in make().agents.values())
        return

    def shared(self: RecurrentLayer) -> RecurrentLayer:
        same = object.__new__(RecurrentLayer)
        vars(same).update(vars(self))
        return same

    monkeypatch.setattr(RecurrentLayer, "__copy__", shared)
    # A prefix that was read on from in one round is read on from again in a later one.
    assert_caught(make(), 3)
