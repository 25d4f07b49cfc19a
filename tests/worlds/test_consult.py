"""The consult world: its splits, its probabilities against brute force, its texts, and what grades are worth."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from recursivemas.errors import ConfigError
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.training.data import encode_turns
from recursivemas.training.recipe import Recipe, WorldSettings
from recursivemas.worlds import World, load_world
from recursivemas.worlds.causes import Cases
from recursivemas.worlds.consult import Consult, ConsultBlind, curriculum
from recursivemas.worlds.consult.cases import (
    CAUSES,
    COLUMNS,
    GRADE_THRESHOLDS,
    GRADES,
    ROLES,
    VARIANTS,
    WORDS,
    CaseWorld,
    answer_text,
    case_text,
    pairs_right,
    vocabulary,
    write_notes,
    written_grades,
)
from recursivemas.worlds.material import material_of
from recursivemas.worlds.pretraining import reply_loss

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def consult() -> Consult:
    return Consult(seed=0)


@pytest.fixture(scope="module")
def blind() -> ConsultBlind:
    return ConsultBlind(seed=0)


@pytest.fixture(scope="module")
def world(consult: Consult) -> CaseWorld:
    return consult.cases


def test_splits_are_disjoint_and_stable(consult: Consult, world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(0), 20_000)
    splits = np.stack([world.in_split(cases.values, split) for split in SPLITS])
    assert (splits.sum(axis=0) == 1).all()
    assert splits.mean(axis=1) == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    questions = {split: {s.question for s in consult.samples(split, 500, 0)} for split in SPLITS}
    assert all(len(found) == 500 for found in questions.values())
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]
    # The hash must never change: agents are pretrained on one side of it.
    first = np.arange(6)[:, None] * np.ones(len(WORDS), dtype=int) % len(WORDS[0])
    assert world.split_of(first).tolist() == [3, 6, 2, 2, 4, 7]


def test_agents_never_read_a_held_out_case(consult: Consult) -> None:
    rng = np.random.default_rng(0)
    held_out = {s.question for split in ("validation", "test") for s in consult.samples(split, 2000, 3)}
    for role in ROLES:
        for _ in range(6):
            assert all(s.question not in held_out for s in consult.pretraining_batch(role, rng, 64))
        assert all(s.question not in held_out for s in consult.role_samples("train", 200, 0, role=role))


def test_beliefs_are_those_of_counted_cases(world: CaseWorld, blind: ConsultBlind) -> None:
    """Among many drawn cases that share what a role can read, causes are as frequent as it says."""
    cases = world.draw(np.random.default_rng(1), 120_000)
    columns = [*COLUMNS["heard"]][:3]
    same = (cases.values[:, columns] == cases.values[0, columns]).all(axis=1)
    counted = np.bincount(cases.cause[same], minlength=len(CAUSES)) / same.sum()
    assert same.sum() > 300
    assert counted == pytest.approx(world.belief(cases.values[:1], columns)[0], abs=0.06)
    values = cases.values[:300]
    parts = {role: blind.cases.alone(values, role) for role in ROLES}
    # With causes equally likely at first, what two know without each other multiplies to all there is.
    product = parts["expert"] * parts["learner"]
    assert product / product.sum(axis=1, keepdims=True) == pytest.approx(world.posterior(values))
    assert world.alone(values, "expert") == pytest.approx(world.posterior(values))
    assert world.alone(values, "learner") == pytest.approx(parts["learner"])


@pytest.mark.parametrize("name", ["consult", "consult-blind"])
def test_pretraining_text_tells_nothing_of_what_its_owner_cannot_read(name: str) -> None:
    case_world = CaseWorld(0, name)
    rng = np.random.default_rng(2)
    cases = case_world.draw(rng, 12_000)
    for role in ROLES:
        shown = curriculum.scramble(case_world, rng, cases, role)
        for column, words in enumerate(WORDS):
            table = np.zeros((len(words), len(CAUSES)))
            np.add.at(table, (shown[:, column], cases.cause), 1)
            expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(cases)
            chi2_per_cell = ((table - expected) ** 2 / expected).sum() / ((len(table) - 1) * (len(CAUSES) - 1))
            assert (chi2_per_cell > 5) == (column in case_world.known[role]), (role, column, chi2_per_cell)


def test_the_optimum_and_what_each_knows_alone(consult: Consult, blind: ConsultBlind) -> None:
    samples, same = consult.samples("test", 3000, seed=5), blind.samples("test", 3000, seed=5)
    assert consult.optimum(samples, 1) == consult.optimum(samples, 2) == blind.optimum(same, 1)
    alone = {role: float(np.mean([s.metadata["alone"][role] for s in samples])) for role in ROLES}
    expert = float(np.mean([s.metadata["alone"]["expert"] for s in same]))
    assert alone["expert"] == consult.optimum(samples, 1)
    assert alone["learner"] + 0.1 < expert < alone["expert"] - 0.1
    hits = np.mean([max(s.metadata["posterior"], key=s.metadata["posterior"].get) == s.target for s in samples])
    assert hits == pytest.approx(consult.optimum(samples, 1), abs=0.03)


def test_seeds(consult: Consult, blind: ConsultBlind) -> None:
    again, other = Consult(seed=0), Consult(seed=1)
    assert again.samples("test", 20, 4) == consult.samples("test", 20, 4)
    assert again.samples("test", 20, 4) != consult.samples("test", 20, 5)
    for role in ROLES:
        turns = consult.role_samples("train", 20, 4, role=role, variant="graded")
        assert again.role_samples("train", 20, 4, role=role, variant="graded") == turns
        batches = [w.pretraining_batch(role, np.random.default_rng(9), 8) for w in (consult, again)]
        assert batches[0] == batches[1]
    assert not np.allclose(other.cases.tables, consult.cases.tables)
    assert np.array_equal(blind.cases.tables, consult.cases.tables)


def test_turns_of_the_loop(consult: Consult) -> None:
    for role in ROLES:
        for sample in consult.role_samples("train", 200, 0, role=role):
            received = next(iter(sample.messages.values()))
            assert (received == "") == (role == "expert" and sample.round == 1)
            if role == "learner" and sample.round == 2:
                assert len(written_grades(sample.target)) == len(CAUSES)
            else:
                assert sample.target.split()[1:] == ["fits", "best."]


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversations_hand_on_what_was_written_and_end_with_the_answer(consult: Consult, variant: str) -> None:
    loops = consult.conversations("validation", 100, 0, variant=variant)
    assert loops == Consult(seed=0).conversations("validation", 100, 0, variant=variant)
    for turns in loops:
        assert [(turn.role, turn.round) for turn in turns] == [(role, r) for r in (1, 2) for role in ROLES]
        assert {(turn.question, turn.num_rounds, turn.variant) for turn in turns} == {(turns[0].question, 2, variant)}
        received = [next(iter(turn.messages.values())) for turn in turns]
        assert received == ["", *(turn.target for turn in turns[:-1])]
        assert len(written_grades(turns[-1].target)) == len(CAUSES)


def test_answers_are_scored_as_they_are_written(consult: Consult) -> None:
    score = SCORERS[consult.scorer]
    for sample in consult.samples("validation", 20, 0):
        known = sample.metadata["posterior"]
        answer = consult.answer_of(sample)
        assert score(answer, sample.target, sample.metadata).value == known[sample.target]
        assert score(consult.answer_text(sample.target), sample.target, sample.metadata).value == known[sample.target]
        other = next(cause for cause in CAUSES if cause != sample.target)
        assert consult.answer_of(sample, other) == answer.replace(f"{sample.target}.", f"{other}.", 1)


def test_the_outer_loop_asks_for_the_whole_answer(consult: Consult) -> None:
    recipe = Recipe(system="consult", world=WorldSettings(name="consult"), output="unused")
    [question, *_] = material_of(recipe, Pattern.load("distillation")).questions("train", 3)
    [sample, *_] = consult.samples("train", 3, recipe.seed)
    assert question.answer == consult.answer_of(sample)
    assert question.posterior[consult.answer_of(sample, "coghaze")] == sample.metadata["posterior"]["coghaze"]


def test_grades_are_those_of_the_thresholds() -> None:
    limits = (0.0, *GRADE_THRESHOLDS, 1.0)
    belief = np.array([[(low + high) / 2 for low, high in pairwise(limits)]])
    assert write_notes(belief).grades.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert write_notes(np.array([[GRADE_THRESHOLDS[0], 0.007, 0.7]])).grades.tolist() == [[1, 0, 5]]


def test_pairs_are_counted_as_f1_of_what_is_not_excluded(consult: Consult) -> None:
    grades = dict.fromkeys(CAUSES, "excluded") | {"airsnag": "certain", "coghaze": "remote"}
    metadata = {"grades": grades}
    assert pairs_right(answer_text(0, np.array([GRADES.index(grades[c]) for c in CAUSES])), metadata) == 1.0
    assert pairs_right("airsnag. Grades: airsnag certain.", metadata) == pytest.approx(2 / 3)
    assert pairs_right("airsnag certain coghaze certain drumfret remote", metadata) == pytest.approx(2 / 5)
    assert pairs_right("airsnag fits best.", metadata) == 0.0
    # Only the first grade of a cause counts, and a name followed by no grade has none.
    assert written_grades("airsnag. Grades: airsnag likely airsnag certain coghaze fits") == {"airsnag": "likely"}


def test_divergence_is_least_for_the_exact_answer(consult: Consult) -> None:
    samples = consult.samples("test", 300, 0)
    rng = np.random.default_rng(0)

    def mean(answers: list[str]) -> float:
        pairs = zip(answers, samples, strict=True)
        return float(np.mean([consult.cases.divergence(text, sample.metadata) for text, sample in pairs]))

    exact = mean([consult.answer_of(sample) for sample in samples])
    silent = mean(["airsnag fits best."] * len(samples))
    swapped = mean([consult.answer_of(samples[row]) for row in rng.permutation(len(samples))])
    assert 0 <= exact < 0.05 < silent < swapped
    posterior = np.array([[s.metadata["posterior"][cause] for cause in CAUSES] for s in samples])
    # To say nothing is to say that all are equal.
    assert silent == pytest.approx(float((posterior * np.log(posterior * len(CAUSES))).sum(axis=1).mean()))
    values = consult.cases.grade_values
    assert sorted(values, key=lambda grade: values[grade]) == [*GRADES]


def test_it_is_a_world(consult: Consult, blind: ConsultBlind) -> None:
    assert isinstance(consult, World)
    for name, each in (("consult", consult), ("consult-blind", blind)):
        assert type(load_world(name)) is type(each)
        assert each.name == name
    assert consult.roles == tuple(PromptSet.load(consult.prompts).roles) == Pattern.load(consult.pattern).roles
    assert tuple(PromptSet.load(consult.prompts).variants) == VARIANTS


def test_pretraining_text_has_every_kind_of_turn(consult: Consult) -> None:
    rng = np.random.default_rng(0)
    batches = [consult.pretraining_batch("learner", rng, 2) for _ in range(300)]
    for batch in batches:
        # One kind a batch, so that nothing is padded.
        assert len({(s.variant, s.solo, len(s.target.split()), len(s.messages["expert"].split())) for s in batch}) == 1
    first = [batch[0] for batch in batches]
    assert {s.variant for s in first} == {None, *VARIANTS}
    assert 0.05 < np.mean([s.solo for s in first]) < 0.2
    received = [s.messages["expert"] for s in first]
    assert {0, 1, 2, 3, 5, 6, 34} <= {len(note.split()) for note in received}
    assert 0.1 < np.mean([note == "" for note in received]) < 0.35
    assert any(s.variant for s in first if not s.messages["expert"])


def test_what_is_heard_is_worth_knowing(blind: ConsultBlind) -> None:
    """Targets hold what the note tells, and no more where there is none."""
    rng = np.random.default_rng(3)
    while (batch := blind.pretraining_batch("learner", rng, 200))[0].messages["expert"] or batch[0].variant:
        pass
    words = [{word: number for number, word in enumerate(each)} for each in WORDS]
    for sample in batch:
        values = np.array([[words[n][w] for n, w in enumerate(_findings(sample.question))]])
        assert sample.target.endswith(answer_text(0, write_notes(blind.cases.alone(values, "learner")).grades[0])[9:])


def _findings(question: str) -> list[str]:
    skipped = {"Heard", "seen", "logged"}
    return [word.strip(",.") for word in question.split() if word not in skipped]


@pytest.mark.parametrize("role", ROLES)
def test_every_word_is_one_token_anywhere(consult: Consult, role: str) -> None:
    tokenizer = consult.tokenizer(role)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert max(tokenizer.get_vocab().values()) < len(tokenizer)
    for word in vocabulary():
        assert len(ids(word)) == 1
        assert ids(word) == ids(" " + word) == ids(f"Heard {word}.")[1:2], word
        assert tokenizer.unk_token_id not in ids(word)
    assert len({*vocabulary()}) == len(vocabulary())


@pytest.mark.parametrize("role", ROLES)
def test_texts_survive_the_tokenizer(consult: Consult, role: str) -> None:
    tokenizer = consult.tokenizer(role)
    rng = np.random.default_rng(1)
    for _ in range(12):
        for sample in consult.pretraining_batch(role, rng, 4):
            for text in (sample.question, sample.target, *sample.messages.values()):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.decode(ids) == text
                assert tokenizer.unk_token_id not in ids
            whole = f"{sample.question} Note: {sample.target} Short note:"
            pieces = (f"{sample.question} Note: ", sample.target, " Short note:")
            joined = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]
            assert tokenizer(whole, add_special_tokens=False).input_ids == joined
    answer = answer_text(3, np.zeros(len(CAUSES), dtype=int))
    assert len(tokenizer(answer, add_special_tokens=False).input_ids) == 37


def test_what_is_unknown_is_named(consult: Consult) -> None:
    with pytest.raises(ConfigError, match="validation"):
        consult.samples("dev", 3, 0)
    with pytest.raises(ConfigError, match="expert"):
        consult.role_samples("train", 3, 0, role="expret")
    with pytest.raises(ConfigError, match="graded"):
        consult.role_samples("train", 3, 0, role="expert", variant="grade")
    with pytest.raises(ConfigError, match="consult"):
        load_world("consalt")


def test_cases_can_be_chosen_by_row() -> None:
    cases = Cases(cause=np.arange(5), values=np.arange(10).reshape(5, 2))
    assert cases[np.array([3, 1])].values.tolist() == [[6, 7], [2, 3]]
    assert len(cases[1:]) == 4
    assert case_text(np.zeros(len(WORDS), dtype=int)).startswith("Heard humming steady knocking hissing, seen white")


def test_pretraining_learns_and_is_reproducible() -> None:
    consult = Consult(seed=0)
    consult.agent_recipes["learner"] = replace(
        consult.agent_recipes["learner"], num_train_steps=12, batch_size=8, warmup_steps=2, lr=1e-2
    )
    model, again = consult.pretrain("learner"), consult.pretrain("learner")
    assert model.fingerprint() == again.fingerprint()
    fresh = LanguageModel.from_config(consult.agent_recipes["learner"].config, consult.tokenizer("learner"))
    losses: list[float] = []
    for each in (fresh, model):
        turns = encode_turns(consult.role_samples("test", 16, 0, role="learner"), each, PromptSet.load("consult"))
        losses.append(reply_loss(each, turns).item())
    assert losses[1] < losses[0] - 0.5
