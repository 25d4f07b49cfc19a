"""The relay world: its splits, its facts and who knows them, and its texts."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from recursivemas.cli.eval import world_task
from recursivemas.errors import ConfigError
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.training.data import encode_turns
from recursivemas.worlds import World, load_world
from recursivemas.worlds.pretraining import reply_loss
from recursivemas.worlds.relay import Relay, curriculum
from recursivemas.worlds.relay.chains import (
    MAX_HOPS,
    NAMES,
    NO_HOP,
    RELATIONS,
    ROLES,
    VARIANTS,
    Chain,
    ChainWorld,
    note,
    owner,
    split_of,
    vocabulary,
)

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def relay() -> Relay:
    return Relay(seed=0)


@pytest.fixture(scope="module")
def world(relay: Relay) -> ChainWorld:
    return relay.chains


def test_it_is_a_world(relay: Relay) -> None:
    assert isinstance(relay, World)
    assert isinstance(load_world("relay", 3), Relay)
    assert load_world("relay", 3).seed == 3
    assert relay.scorer in SCORERS
    assert relay.roles == tuple(PromptSet.load(relay.prompts).roles)
    assert tuple(PromptSet.load(relay.prompts).variants) == VARIANTS


def test_splits_are_disjoint_and_stable(relay: Relay, world: ChainWorld) -> None:
    chains = world.draw(np.random.default_rng(0), 20_000)
    starts = np.array([chain.start for chain in chains])
    relations = np.array([[*chain.relations, *[NO_HOP] * (MAX_HOPS - chain.num_hops)] for chain in chains])
    shares = np.bincount(split_of(starts, relations)[relations[:, 2] != NO_HOP], minlength=10) / len(chains)
    assert shares == pytest.approx([7 / 90] * 10, abs=0.01)
    questions = {split: {s.question for s in relay.samples(split, 1000, 0)} for split in SPLITS}
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert not questions["validation"] & questions["test"]
    # The hash must never change: agents are pretrained on one side of it.
    assert split_of(np.arange(8), np.array([[0, 1, 2, 3, *[NO_HOP] * 5]] * 8)).tolist() == [8, 4, 6, 6, 8, 1, 3, 8]


def test_agents_never_read_a_held_out_question(relay: Relay) -> None:
    held_out = {s.question for split in ("validation", "test") for s in relay.samples(split, 1000, 3)}
    rng = np.random.default_rng(0)
    for role in ROLES:
        assert all(s.question not in held_out for s in curriculum.pretraining_turns(relay.chains, rng, 400, role=role))
        assert all(s.question not in held_out for s in relay.role_samples("train", 200, 0, role=role))
        assert all(s.question not in held_out for s in curriculum.drills(relay.chains, rng, 200, role=role))


def test_questions_have_one_to_nine_hops_equally_often(relay: Relay) -> None:
    samples = relay.samples("test", 2700, 1)
    assert len({sample.id for sample in samples}) == len(samples)
    shares = Counter(sample.metadata["hops"] for sample in samples)
    assert set(shares) == set(range(1, MAX_HOPS + 1))
    assert all(abs(number - 300) < 80 for number in shares.values())
    for sample in samples[:50]:
        assert sample.question.count(",") == sample.metadata["hops"] - 1


def end_of(world: ChainWorld, question: str) -> str:
    """The name a chain ends with, followed hop by hop from the text of the question."""
    owners = {word: (role, row) for role, words in RELATIONS.items() for row, word in enumerate(words)}
    start, hops = question.rstrip(".").removeprefix("Start at ").split(": ")
    name = NAMES.index(start)
    for number, hop in enumerate(hops.split(", "), start=1):
        role, row = owners[hop.removeprefix(f"{number} ")]
        assert role == owner(number)
        name = world.facts[role][row, name]
    return NAMES[name]


def test_the_target_is_where_the_chain_leads(relay: Relay) -> None:
    for sample in relay.samples("test", 200, 2):
        assert sample.target == end_of(relay.chains, sample.question)


def test_relations_are_permutations_with_one_owner_each(world: ChainWorld) -> None:
    for role in ROLES:
        assert world.facts[role].shape == (len(RELATIONS[role]), len(NAMES))
        assert (np.sort(world.facts[role], axis=1) == np.arange(len(NAMES))).all()
    assert [owner(hop) for hop in range(1, 5)] == ["planner", "critic", "solver", "planner"]


def test_words_are_distinct() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words) == 32 + 12 + 9


def test_the_optimum_is_what_the_rounds_reach(relay: Relay) -> None:
    samples = relay.samples("test", 2000, 5)
    for rounds in (1, 2, 3):
        reached = np.mean([sample.metadata["hops"] <= 3 * rounds for sample in samples])
        assert relay.optimum(samples, rounds) == pytest.approx(reached + (1 - reached) / 32)
    assert relay.optimum(samples, 3) == relay.optimum(samples, 4) == 1.0
    far = [sample for sample in samples if sample.metadata["hops"] == 4]
    assert relay.optimum(far, 1) == 1 / 32


@pytest.mark.parametrize("role", ROLES)
def test_a_role_alone_knows_its_own_hops_and_no_others(world: ChainWorld, role: str) -> None:
    rng = np.random.default_rng(3)
    right = {own: [] for own in (True, False)}
    for chain in world.draw(rng, 3000):
        names = world.follow_alone(rng, chain, role)
        assert names[0] == chain.start
        for hop, relation in enumerate(chain.relations, start=1):
            truth = world.facts[owner(hop)][relation, names[hop - 1]]
            right[owner(hop) == role].append(names[hop] == truth)
    assert all(right[True])
    assert np.mean(right[False]) == pytest.approx(1 / 32, abs=0.01)


@pytest.mark.parametrize("role", ROLES)
def test_no_fact_of_another_role_can_be_told_from_pretraining_text(relay: Relay, role: str) -> None:
    """Whoever believed every sentence an agent reads would know the facts of others no better than by guessing."""
    rng = np.random.default_rng(4)
    owners = {word: (other, row) for other, words in RELATIONS.items() for row, word in enumerate(words)}
    right: dict[str, list[bool]] = {other: [] for other in ROLES}
    for sample in curriculum.pretraining_turns(relay.chains, rng, 2500, role=role):
        for text in (sample.target, *sample.messages.values()):
            words = text.replace(",", "").replace(".", "").split()
            if "is" in words:
                relation, before, name = words[3], words[5], words[7]
                other, row = owners[relation]
                right[other].append(relay.chains.facts[other][row, NAMES.index(before)] == NAMES.index(name))
    for other in ROLES:
        assert len(right[other]) > 200 or other not in (role, curriculum.SENDER[role])
        if right[other]:
            assert np.mean(right[other]) == pytest.approx(1.0 if other == role else 1 / 32, abs=0.03)


def test_notes_say_where_the_chain_stands() -> None:
    chain, names = Chain(0, (0, 1)), [0, 1, 2]
    assert chain.question == "Start at tamo: 1 mentor, 2 partner."
    assert note(chain, names, 0, "short") == "bilo hop 1."
    assert note(chain, names, 1, "full") == "Hop 2: the partner of bilo is kesa, so go on from kesa."
    # The chain is over.
    assert note(chain, names, 2, "short") == note(chain, names, 1, "short") == "kesa hop 2."
    assert note(chain, names, 5, "full") == "The chain has ended at hop 2 with kesa."


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversations_hand_on_what_was_written_and_end_with_the_answer(relay: Relay, variant: str) -> None:
    for turns in relay.conversations("validation", 100, 0, variant=variant):
        assert [(turn.role, turn.round) for turn in turns] == [(role, r) for r in (1, 2, 3) for role in ROLES]
        assert {(turn.question, turn.num_rounds, turn.variant) for turn in turns} == {(turns[0].question, 3, variant)}
        received = [next(iter(turn.messages.values())) for turn in turns]
        assert received == ["", *(turn.target for turn in turns[:-1])]
        assert turns[-1].target == relay.answer_text(end_of(relay.chains, turns[0].question))


def test_answers_are_scored_as_they_are_written(relay: Relay) -> None:
    score = SCORERS[relay.scorer]
    for sample in relay.samples("validation", 20, 0):
        assert score(relay.answer_text(sample.target), sample.target, sample.metadata).value == 1.0
        assert score("Tamo hop.", sample.target, sample.metadata).value == 0.0


def test_an_evaluation_takes_the_scorer_of_the_world() -> None:
    system = SimpleNamespace(training={"world": {"name": "relay", "seed": 1}}, settings=SimpleNamespace(num_rounds=2))
    task = world_task(system, "relay", split="validation", n=30, seed=0)
    assert task.scorer is SCORERS["exact"]
    assert list(task.samples) == Relay(1).samples("validation", 30, 0)
    assert task.optimum == {rounds: Relay(1).optimum(list(task.samples), rounds) for rounds in (1, 2)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_role_samples_are_turns_of_the_loop(relay: Relay, variant: str) -> None:
    for role in ROLES:
        samples = relay.role_samples("train", 300, 0, role=role, variant=variant)
        assert {sample.round for sample in samples} == {1, 2, 3}
        for sample in samples:
            hops = sample.question.count(",") + 1
            received = next(iter(sample.messages.values()))
            assert (received == "") == (role == "planner" and sample.round == 1)
            turn = 3 * (sample.round - 1) + ROLES.index(role)
            is_answer = role == "solver" and sample.round == 3
            assert is_answer == (sample.target.rstrip(".") in NAMES)
            if not is_answer:
                digit = next(character for character in sample.target if character.isdigit())
                assert int(digit) == min(turn + 1, hops)


def test_seeds(relay: Relay) -> None:
    again, other = Relay(seed=0), Relay(seed=1)
    assert again.samples("test", 20, 4) == relay.samples("test", 20, 4) != relay.samples("test", 20, 5)
    assert again.conversations("train", 5, 4) == relay.conversations("train", 5, 4)
    for role in ROLES:
        turns = relay.role_samples("train", 20, 4, role=role, variant="full")
        assert again.role_samples("train", 20, 4, role=role, variant="full") == turns
        batches = [each.pretraining_batch(role, np.random.default_rng(9), 8) for each in (relay, again)]
        assert batches[0] == batches[1]
        assert (other.chains.facts[role] != relay.chains.facts[role]).any()


def kind_of(text: str) -> str:
    """Which kind of note a text is."""
    if not text.endswith("."):
        return "cut"
    return {1: "name", 3: "short"}.get(len(text.split()), "full")


def test_pretraining_text_has_every_kind_of_turn(relay: Relay) -> None:
    samples = curriculum.pretraining_turns(relay.chains, np.random.default_rng(0), 3000, role="solver")
    asked = Counter("solo" if s.solo else s.variant or "final" for s in samples)
    for reply, share in curriculum.REPLIES["solver"].items():
        assert asked[reply] / len(samples) == pytest.approx(share, abs=0.03)
    received = [s.messages["critic"] for s in samples]
    empty = curriculum.REPLIES["solver"]["solo"] + curriculum.NOTE_STYLES["empty"]
    assert np.mean([text == "" for text in received]) == pytest.approx(empty, abs=0.02)
    kinds = Counter(kind_of(text) for text in received if text)
    assert min(kinds.values()) > 30
    assert kinds["short"] + kinds["full"] > 0.75 * len(samples)
    assert set(kinds) == {"cut", "name", "short", "full"}
    lengths = Counter(s.question.count(",") + 1 for s in samples)
    assert [lengths[hops] / len(samples) for hops in range(1, 10)] == pytest.approx(curriculum.HOP_SHARES, abs=0.03)
    # All turns of the longest chains, and one round more.
    assert {s.round for s in samples} == {1, 2, 3, 4}
    over = [s for s in samples if s.variant and 3 * s.round > s.question.count(",") + 1 and not s.solo]
    assert 0.4 < len(over) / sum(asked[variant] for variant in VARIANTS) < 0.75


def test_drills_are_facts(relay: Relay) -> None:
    for role in ROLES:
        share = relay.agent_recipes[role].drill_share
        rng = np.random.default_rng(0)
        batches = [relay.pretraining_batch(role, rng, 4) for _ in range(150)]
        drilled = [batch for batch in batches if batch[0].question.startswith("Who")]
        assert len(drilled) / len(batches) == pytest.approx(share, abs=0.1)
        for sample in curriculum.drills(relay.chains, rng, 50, role=role):
            words = sample.question.rstrip("?").split()
            relation, name = RELATIONS[role].index(words[3]), NAMES.index(words[5])
            assert sample.target == f"{NAMES[relay.chains.facts[role][relation, name]]}."


@pytest.mark.parametrize("role", ROLES)
def test_every_word_is_one_token_anywhere(relay: Relay, role: str) -> None:
    tokenizer = relay.tokenizer(role)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for word in vocabulary():
        assert len(ids(word)) == 1
        assert ids(word) == ids(" " + word) == ids(f"hop {word}.")[1:2] == ids(f"of {word}, so")[1:2], word
        assert tokenizer.unk_token_id not in ids(word)
    assert len(ids("tamo hop 2.")) == relay.settings["num_latent_steps"]


@pytest.mark.parametrize("role", ROLES)
def test_texts_survive_the_tokenizer(relay: Relay, role: str) -> None:
    tokenizer = relay.tokenizer(role)
    rng = np.random.default_rng(1)
    longest = 0
    samples = curriculum.pretraining_turns(relay.chains, rng, 60, role=role)
    for sample in samples + curriculum.drills(relay.chains, rng, 5, role=role):
        for text in (sample.question, sample.target, *sample.messages.values()):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
        longest = max(longest, len(tokenizer(sample.target, add_special_tokens=False).input_ids))
    assert longest < relay.settings["max_new_tokens"]
    prompts = PromptSet.load("relay")
    for turn in ({"solo": role == "solver"}, {"is_last": True}, {"variant": "full"}):
        for piece in prompts.segments(role, samples[0].question, render_chat=lambda m: m[-1]["content"], **turn):
            if isinstance(piece, str):
                assert tokenizer.unk_token_id not in tokenizer(piece, add_special_tokens=False).input_ids


def test_vocabularies_differ(relay: Relay) -> None:
    ids = {role: tuple(relay.tokenizer(role)(" ".join(NAMES)).input_ids) for role in ROLES}
    assert len(set(ids.values())) == 3


def test_what_is_unknown_is_named(relay: Relay) -> None:
    with pytest.raises(ConfigError, match="validation"):
        relay.samples("dev", 3, 0)
    with pytest.raises(ConfigError, match="critic"):
        relay.role_samples("train", 3, 0, role="critik")
    with pytest.raises(ConfigError, match="full"):
        relay.role_samples("train", 3, 0, role="critic", variant="ful")
    with pytest.raises(ConfigError, match="short"):
        relay.conversations("train", 3, 0, variant="shrot")
    with pytest.raises(ConfigError, match="'relay'"):
        load_world("rely")


def test_pretraining_learns_and_is_reproducible() -> None:
    models = {}
    for seed, times in ((0, 2), (1, 1)):
        relay = Relay(seed)
        relay.agent_recipes["critic"] = replace(
            relay.agent_recipes["critic"], num_train_steps=12, batch_size=8, warmup_steps=2, lr=1e-2
        )
        models[seed] = [relay.pretrain("critic") for _ in range(times)]
    model, again = models[0]
    assert model.fingerprint() == again.fingerprint()
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    relay = Relay(0)
    losses = []
    config, tokenizer = relay.agent_recipes["critic"].config, relay.tokenizer("critic")
    for each in (LanguageModel.from_config(config, tokenizer), model):
        turns = encode_turns(relay.role_samples("test", 16, 0, role="critic"), each, PromptSet.load("relay"))
        losses.append(reply_loss(each, turns).item())
    assert losses[1] < losses[0] - 0.5


def test_another_world_draws_other_initial_weights() -> None:
    weights = []
    for seed in (0, 1):
        relay = Relay(seed)
        relay.agent_recipes["solver"] = replace(
            relay.agent_recipes["solver"], num_train_steps=1, batch_size=2, lr=1e-9, weight_decay=0.0
        )
        weights.append(relay.pretrain("solver").network.get_input_embeddings().weight)
    assert not weights[0].allclose(weights[1], atol=1e-3)
