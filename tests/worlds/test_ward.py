"""The ward world: its splits, its probabilities against brute force, and its texts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from recursivemas.errors import ConfigError
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.training.data import encode_turns
from recursivemas.worlds import World, load_world
from recursivemas.worlds.pretraining import reply_loss
from recursivemas.worlds.ward import Ward, curriculum
from recursivemas.worlds.ward.cases import (
    COLUMN,
    DISEASES,
    EXPOSURES,
    FINDINGS,
    GRADES,
    NO_EXPOSURE,
    NO_STAGE,
    ROLES,
    STAGES,
    VARIANTS,
    Cases,
    CaseWorld,
    in_split,
    split_of,
    vocabulary,
)


@pytest.fixture(scope="module")
def ward() -> Ward:
    return Ward(seed=0)


@pytest.fixture(scope="module")
def world(ward: Ward) -> CaseWorld:
    return ward.cases


def test_splits_are_disjoint_and_stable(ward: Ward, world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(0), 20_000)
    splits = np.stack([in_split(cases.values, split) for split in ("train", "validation", "test")])
    assert (splits.sum(axis=0) == 1).all()
    assert splits.mean(axis=1) == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    questions = {split: {s.question for s in ward.samples(split, 500, 0)} for split in ("train", "validation", "test")}
    assert all(len(found) == 500 for found in questions.values())
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]
    # The hash must never change: agents are pretrained on one side of it.
    first = np.arange(6)[:, None] * np.ones(len(FINDINGS), dtype=int) % [len(finding.words) for finding in FINDINGS]
    assert split_of(first).tolist() == [3, 8, 0, 9, 4, 5]


def test_agents_never_read_a_held_out_case(ward: Ward) -> None:
    rng = np.random.default_rng(0)
    held_out = {s.question for split in ("validation", "test") for s in ward.samples(split, 2000, 3)}
    for role in ROLES:
        assert all(s.question not in held_out for s in curriculum.pretraining_turns(ward.cases, rng, 400, role=role))
        assert all(s.question not in held_out for s in ward.role_samples("train", 200, 0, role=role))


def brute_force(world: CaseWorld, cases: Cases, row: int, readable: set[str]) -> np.ndarray:
    """P(disease | the readable findings) by enumerating every place and stain."""
    weights = np.zeros(len(DISEASES))
    value = {finding.name: cases.values[row, column] for column, finding in enumerate(FINDINGS)}
    for disease, place, stain in itertools.product(range(len(DISEASES)), range(12), range(8)):
        if any(name in readable and found != value[name] for name, found in (("place", place), ("stain", stain))):
            continue
        exposure = world.exposure_of_place[place]
        keys = {"dreams": exposure, "hands": world.stage_of[stain, exposure]}
        probability = 1.0
        for name in readable - {"place", "stain"}:
            if name in keys:
                probability *= world.rotated[name][(value[name] + keys[name]) % 4, disease]
            else:
                probability *= world.direct[name][value[name], disease]
        weights[disease] += probability
    return weights / weights.sum()


def test_posterior_is_exact(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(1), 5)
    names = {finding.name for finding in FINDINGS}
    for row in range(len(cases)):
        full = world.posterior(cases)[row]
        assert full.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(full, brute_force(world, cases, row, names))
        # In round 2 the reader of the hands lacks the stage; in round 1 the reader of the dreams lacks the exposure.
        np.testing.assert_allclose(
            world.posterior(cases, 2)[row], brute_force(world, cases, row, names - {"stain"}), rtol=1e-6
        )
        np.testing.assert_allclose(
            world.posterior(cases, 1)[row], brute_force(world, cases, row, names - {"stain", "place"}), rtol=1e-6
        )


def test_a_rotated_finding_says_nothing_without_its_key(world: CaseWorld) -> None:
    for name in ("dreams", "hands"):
        tables = np.stack([world.keyed_likelihood(name, key) for key in range(4)])
        np.testing.assert_allclose(tables.sum(axis=1), 1.0)
        np.testing.assert_allclose(tables.mean(axis=0), 0.25)
    # Nor does the exposure alone hint at the stage.
    for exposure in range(4):
        assert np.bincount(world.stage_of[:, exposure]).tolist() == [2, 2, 2, 2]


def test_drawn_findings_follow_their_tables(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(2), 60_000)
    chosen = (cases.disease == 3) & (cases.stage == 1)
    shares = np.bincount(cases.values[chosen, COLUMN["hands"]], minlength=4) / chosen.sum()
    np.testing.assert_allclose(shares, world.keyed_likelihood("hands", 1)[:, 3], atol=0.04)
    chosen = cases.disease == 5
    shares = np.bincount(cases.values[chosen, COLUMN["serum"]], minlength=6) / chosen.sum()
    np.testing.assert_allclose(shares, world.direct["serum"][:, 5], atol=0.03)


@pytest.mark.parametrize("role", ROLES)
def test_foreign_findings_carry_no_information_in_pretraining(world: CaseWorld, role: str) -> None:
    rng = np.random.default_rng(3)
    cases = world.draw(rng, 40_000)
    shown = curriculum.scramble(world, rng, cases, role)
    for column, finding in enumerate(FINDINGS):
        table = np.zeros((len(finding.words), len(DISEASES)))
        np.add.at(table, (shown[:, column], cases.disease), 1)
        expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(cases)
        chi2_per_cell = ((table - expected) ** 2 / expected).sum() / ((len(table) - 1) * (len(DISEASES) - 1))
        informative = finding.owner == role and (finding.name in world.direct)
        assert (chi2_per_cell > 5) == informative, (finding.name, chi2_per_cell)


def test_the_optimum_rises_with_the_rounds(ward: Ward) -> None:
    samples = ward.samples("test", 3000, seed=5)
    one, two, three = (ward.optimum(samples, num_rounds) for num_rounds in (1, 2, 3))
    assert 0.4 < one < two - 0.08 < three - 0.12 < 0.9
    assert ward.optimum(samples, 4) == three
    hits = np.mean([max(s.metadata["posterior"], key=s.metadata["posterior"].get) == s.target for s in samples])
    assert hits == pytest.approx(three, abs=0.03)


def test_seeds(ward: Ward) -> None:
    again, other = Ward(seed=0), Ward(seed=1)
    assert again.samples("test", 20, 4) == ward.samples("test", 20, 4)
    assert again.samples("test", 20, 4) != ward.samples("test", 20, 5)
    for role in ROLES:
        turns = ward.role_samples("train", 20, 4, role=role, variant="graded")
        assert again.role_samples("train", 20, 4, role=role, variant="graded") == turns
        batches = [w.pretraining_batch(role, np.random.default_rng(9), 8) for w in (ward, again)]
        assert batches[0] == batches[1]
    assert not np.allclose(other.cases.direct["cough"], ward.cases.direct["cough"])


def test_turns_of_the_loop(ward: Ward) -> None:
    exposures, stages = {*EXPOSURES}, {*STAGES}
    for role in ROLES:
        for sample in ward.role_samples("train", 200, 0, role=role):
            received = next(iter(sample.messages.values()))
            assert (received == "") == (role == "planner" and sample.round == 1)
            words = sample.target.rstrip(".").split()
            assert words[0] in DISEASES
            if role == "solver" and sample.round == 3:
                assert len(words) == 1
                continue
            turn = 3 * (sample.round - 1) + ROLES.index(role)
            assert words[1] in (exposures if turn >= 2 else {NO_EXPOSURE})
            assert words[2] in (stages if turn >= 4 else {NO_STAGE})


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversations_hand_on_what_was_written_and_end_with_the_answer(ward: Ward, variant: str) -> None:
    loops = ward.conversations("validation", 200, 0, variant=variant)
    assert loops == Ward(seed=0).conversations("validation", 200, 0, variant=variant)
    for turns in loops:
        assert [(turn.role, turn.round) for turn in turns] == [(role, r) for r in (1, 2, 3) for role in ROLES]
        assert {(turn.question, turn.num_rounds, turn.variant) for turn in turns} == {(turns[0].question, 3, variant)}
        received = [next(iter(turn.messages.values())) for turn in turns]
        assert received == ["", *(turn.target for turn in turns[:-1])]
        assert turns[-1].target in {ward.answer_text(name) for name in DISEASES}
    # By the book a note names the likeliest disease, not a sampled one: first thoughts often last.
    first, last = ([turns[turn].target.split()[0].rstrip(".") for turns in loops] for turn in (0, -1))
    assert 0.2 < np.mean([a == b for a, b in zip(first, last, strict=True)]) < 0.9


def test_answers_are_scored_as_they_are_written(ward: Ward) -> None:
    score = SCORERS[ward.scorer]
    for sample in ward.samples("validation", 20, 0):
        known = sample.metadata["posterior"]
        assert score(ward.answer_text(sample.target), sample.target, sample.metadata).value == known[sample.target]


def test_it_is_a_world(ward: Ward) -> None:
    assert isinstance(ward, World)
    assert isinstance(load_world("ward"), Ward)
    assert ward.roles == tuple(PromptSet.load(ward.prompts).roles)
    assert tuple(PromptSet.load(ward.prompts).variants) == VARIANTS


def test_pretraining_text_has_every_kind_of_turn(ward: Ward) -> None:
    rng = np.random.default_rng(0)
    samples = [s for _ in range(6) for s in curriculum.pretraining_turns(ward.cases, rng, 100, role="solver")]
    assert any(s.solo for s in samples)
    assert {s.variant for s in samples} == {None, "short", "graded"}
    received = [s.messages["critic"] for s in samples]
    lengths = {len(note.split()) for note in received}
    assert {0, 1, 2, 3, 5, 8} <= lengths
    assert 0.05 < np.mean([note == "" for note in received if note is not None]) < 0.3
    assert any(len(s.question.split()) < 8 for _ in range(8) for s in ward.pretraining_batch("planner", rng, 8))


@pytest.mark.parametrize("role", ROLES)
def test_every_word_is_one_token_anywhere(ward: Ward, role: str) -> None:
    tokenizer = ward.tokenizer(role)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert max(tokenizer.get_vocab().values()) < len(tokenizer)
    stop = ids("saltfever.")[1:]
    assert len(stop) == 1
    for word in vocabulary():
        assert len(ids(word)) == 1
        assert ids(word) == ids(" " + word) == ids(f"high {word}.")[1:2], word
        assert tokenizer.unk_token_id not in ids(word)


@pytest.mark.parametrize("role", ROLES)
def test_texts_survive_the_tokenizer(ward: Ward, role: str) -> None:
    tokenizer = ward.tokenizer(role)
    rng = np.random.default_rng(1)
    for sample in curriculum.pretraining_turns(ward.cases, rng, 60, role=role):
        for text in (sample.question, sample.target, *sample.messages.values()):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
        whole = f"{sample.question} Note: {sample.target} Short note:"
        pieces = (f"{sample.question} Note: ", sample.target, " Short note:")
        joined = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]
        assert tokenizer(whole, add_special_tokens=False).input_ids == joined
    assert len(tokenizer("saltfever river late.", add_special_tokens=False).input_ids) == 4


@pytest.mark.parametrize("role", ROLES)
def test_chat_template_uses_single_tokens(ward: Ward, role: str) -> None:
    tokenizer, markers = ward.tokenizer(role), ward.agent_recipes[role].markers
    turns = [{"role": "user", "content": "A patient."}, {"role": "assistant", "content": "saltfever."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == f"{markers.user}A patient.{markers.assistant}saltfever.{markers.end}{markers.assistant}"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 4 + 3 + 2
    assert tokenizer.eos_token == markers.end
    assert set(tokenizer.all_special_tokens) >= {markers.user, markers.assistant, markers.end}


def test_foreign_words_do_not_vanish_in_a_bpe_tokenizer(ward: Ward) -> None:
    for role in ("critic", "solver"):
        tokenizer = ward.tokenizer(role)
        text = "Zebra's x = {42}~ @home"
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
        assert GRADES[0] not in text


def test_vocabularies_differ(ward: Ward) -> None:
    ids = {role: tuple(ward.tokenizer(role)(" ".join(DISEASES)).input_ids) for role in ROLES}
    assert len(set(ids.values())) == 3


def test_what_is_unknown_is_named(ward: Ward) -> None:
    with pytest.raises(ConfigError, match="validation"):
        ward.samples("dev", 3, 0)
    with pytest.raises(ConfigError, match="critic"):
        ward.role_samples("train", 3, 0, role="critik")
    with pytest.raises(ConfigError, match="graded"):
        ward.role_samples("train", 3, 0, role="critic", variant="grade")
    with pytest.raises(ConfigError, match="graded"):
        ward.conversations("train", 3, 0, variant="grade")


@pytest.mark.parametrize("role", ROLES)
def test_reply_loss_is_the_loss_of_turns_one_by_one(ward: Ward, role: str) -> None:
    model = LanguageModel.from_config(ward.agent_recipes[role].config, ward.tokenizer(role))
    turns = encode_turns(ward.pretraining_batch(role, np.random.default_rng(0), 6), model, PromptSet.load("ward"))
    losses = []
    for turn in turns:
        reply = torch.tensor([*turn.target_ids, model.reply_end_id])
        states = model.states(torch.tensor([[*turn.prompt_ids, *turn.target_ids]]))[0, len(turn.prompt_ids) - 1 :]
        losses += functional.cross_entropy(model.logits(states), reply, reduction="none").tolist()
    assert reply_loss(model, turns).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_pretraining_learns_and_is_reproducible() -> None:
    ward = Ward(seed=0)
    ward.agent_recipes["critic"] = replace(
        ward.agent_recipes["critic"], num_train_steps=12, batch_size=8, warmup_steps=2, lr=1e-2
    )
    losses: list[float] = []
    model, again = ward.pretrain("critic"), ward.pretrain("critic")
    assert model.fingerprint() == again.fingerprint()
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    fresh = LanguageModel.from_config(ward.agent_recipes["critic"].config, ward.tokenizer("critic"))
    for each in (fresh, model):
        turns = encode_turns(ward.role_samples("test", 16, 0, role="critic"), each, PromptSet.load("ward"))
        losses.append(reply_loss(each, turns).item())
    assert losses[1] < losses[0] - 0.5
