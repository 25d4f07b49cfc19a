"""The desk world: its splits, truth and optimum against brute force, its texts, its tools, and its shipped system."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from recursivemas.agents import Agent
from recursivemas.cli.eval import world_task
from recursivemas.errors import ConfigError
from recursivemas.evaluation.runner import evaluate, plan_arms
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.sandbox import sandbox_problem
from recursivemas.system import RecursiveSystem
from recursivemas.tools.tags import results_in
from recursivemas.training.data import RoleSample, encode_turns, unjudged_tokens
from recursivemas.training.recipe import Recipe, WorldSettings
from recursivemas.worlds import World, load_world
from recursivemas.worlds.desk import Desk, curriculum, programs, searches
from recursivemas.worlds.desk.cases import (
    BINDING,
    CLUES,
    FILE,
    NUM_ROUNDS,
    NUMBERS,
    OWN,
    RECORDS,
    ROLES,
    TASK,
    TURNING,
    VARIANTS,
    WORDS,
    CaseWorld,
    graded_note,
    short_note,
    softmax,
    vocabulary,
    write_note,
)
from recursivemas.worlds.desk.desk_tools import RecordSearch, toolbox
from recursivemas.worlds.material import material_of
from recursivemas.worlds.pretraining import reply_loss

SPLITS = ("train", "validation", "test")
needs_sandbox = pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox here: {sandbox_problem()}")


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk(seed=0)


@pytest.fixture(scope="module")
def world(desk: Desk) -> CaseWorld:
    return desk.cases


# --- splits, truth, optimum -------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_stable(desk: Desk, world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(0), 20_000)
    splits = np.stack([world.in_split(cases.values, split) for split in SPLITS])
    assert (splits.sum(axis=0) == 1).all()
    assert splits.mean(axis=1) == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    questions = {split: {s.question for s in desk.samples(split, 500, 0)} for split in SPLITS}
    assert all(len(found) == 500 for found in questions.values())
    # Whatever the number of the task: the words alone decide, so not even those are shared.
    words = {split: {question.rpartition(" with ")[0] for question in found} for split, found in questions.items()}
    assert not words["train"] & words["test"]
    assert not words["validation"] & (words["test"] | words["train"])
    # The hash must never change: agents are pretrained on one side of it.
    first = np.array([[(row + column) % len(words) for column, words in enumerate(WORDS)] for row in range(6)])
    assert world.split_of(first).tolist() == [4, 9, 6, 4, 9, 6]


def test_agents_never_read_a_held_out_case(desk: Desk, world: CaseWorld) -> None:
    rng = np.random.default_rng(0)
    words = [{word: number for number, word in enumerate(each)} for each in WORDS]
    for role in ROLES:
        turns = [turn for _ in range(12) for turn in desk.pretraining_batch(role, rng, 32)]
        turns += desk.role_samples("train", 100, 0, role=role)
        asked = [re.findall(r"\w+", turn.question) for turn in turns if ", file " in turn.question]
        assert len(asked) > 200
        kept = [[w for w in each if w not in {"Clues", "file", "task", "with"}][: len(WORDS)] for each in asked]
        values = np.array([[words[column][word] for column, word in enumerate(each)] for each in kept])
        assert world.in_split(values, "train").all()


def test_beliefs_are_those_of_bayes_rule(world: CaseWorld) -> None:
    """Record by record, from the tables of single words."""
    cases = world.draw(np.random.default_rng(1), 20)
    for row, values in enumerate(cases.values):
        type_ = world.type_of[values[BINDING]]
        likelihood = np.ones((3, len(RECORDS)))
        for record in range(len(RECORDS)):
            for column in (*CLUES, *FILE):
                likelihood[:2, record] *= world.direct[column][values[column], record]
            likelihood[1, record] *= world.turning[type_, values[TURNING], record]
            for column in FILE:
                likelihood[2, record] *= world.direct[column][values[column], record]
        known = likelihood / likelihood.sum(axis=1, keepdims=True)
        assert world.belief(cases.values, 1)[row] == pytest.approx(known[0])
        assert world.belief(cases.values)[row] == pytest.approx(known[1])
        assert world.alone(cases.values, "toolcaller")[row] == pytest.approx(known[2])


def test_beliefs_are_those_of_counted_cases(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(2), 400_000)
    columns = [*CLUES, *FILE]
    same = (cases.values[:, columns] == cases.values[0, columns]).all(axis=1)
    assert same.sum() > 100
    counted = np.bincount(cases.record[same], minlength=len(RECORDS)) / same.sum()
    assert counted == pytest.approx(world.belief(cases.values[:1], 1)[0], abs=0.1)


def test_no_searches_are_better_than_the_best(desk: Desk, world: CaseWorld) -> None:
    """By brute force over all sets of searches, with the belief of either round and judged by all evidence."""
    cases = world.draw(np.random.default_rng(3), 30)
    everything = world.belief(cases.values)
    for rounds in (1, 2):
        within = world.within(cases.values, rounds)
        known = world.belief(cases.values, rounds)
        for row, searches_ in itertools.product(range(len(cases)), (1, 2, 3)):
            sets = itertools.combinations(range(len(RECORDS)), searches_)
            best = max(sets, key=lambda chosen: known[row, list(chosen)].sum())
            assert within[row, searches_ - 1] == pytest.approx(everything[row, list(best)].sum())
    samples = desk.samples("test", 4000, 5)
    table = [[desk.optimum(samples, rounds, number) for number in (1, 2, 3)] for rounds in (1, 2)]
    assert (np.diff(table, axis=1) > 0.08).all()
    assert (np.diff(table, axis=0) > 0.1).all()
    assert desk.optimum(samples, 3) == desk.optimum(samples, 2)
    # What is on file is what the belief says it is.
    found = [s.metadata["posterior"][s.metadata["record"]] for s in samples]
    expected = [sum(p * p for p in s.metadata["posterior"].values()) for s in samples]
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.02)
    assert [s.metadata["optimum"][2] for s in samples[:2]] == [
        pytest.approx(s.metadata["within"][2][2] * 89 / 90 + 1 / 90) for s in samples[:2]
    ]


def test_what_is_on_file_follows_from_the_question_alone(desk: Desk, world: CaseWorld) -> None:
    samples = desk.samples("test", 2000, 0)
    contents = []
    for sample in samples[:300]:
        found = world.on_file(sample.question)
        assert found == world.on_file(f" {sample.question} ")
        assert found is not None
        record, content = found
        contents.append(content)
        assert RECORDS[record] == sample.metadata["record"]
        assert re.split(r"[-+*]", sample.metadata["program"])[0] == str(content)
        assert sample.target == str(eval(sample.metadata["program"]))
    assert NUMBERS[0] <= min(contents) < 25
    assert 85 < max(contents) < NUMBERS[1]
    # Another number of the task is another question, with another record and content.
    others = [re.sub(r"\d\d", lambda found: str(10 + (int(found[0]) + 1) % 90), s.question) for s in samples[:300]]
    same = np.mean([world.on_file(each) == world.on_file(s.question) for each, s in zip(others, samples, strict=False)])
    assert same < 0.05
    for strange in (
        "What is 2 + 2?",
        "",
        samples[0].question + " Really?",
        samples[0].question.replace("Clues", "Clue"),
    ):
        assert world.on_file(strange) is None
    assert world.on_file(re.sub(r"task \w+", "task reckoning", samples[0].question)) is None
    assert CaseWorld(1).on_file(samples[0].question) != world.on_file(samples[0].question)


def test_pretraining_text_tells_nothing_of_what_its_owner_cannot_read(world: CaseWorld) -> None:
    rng = np.random.default_rng(2)
    cases = world.draw(rng, 20_000)
    operation, type_ = world.keys(cases.values)
    for role in ROLES:
        shown = curriculum.scramble(world, rng, cases, role)
        for column, words in enumerate(WORDS):
            hidden = {TASK: operation, BINDING: type_}.get(column, cases.record)
            kinds = hidden.max() + 1
            table = np.zeros((len(words), kinds))
            np.add.at(table, (shown[:, column], hidden), 1)
            expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(cases)
            chi2_per_cell = ((table - expected) ** 2 / expected).sum() / ((len(words) - 1) * (kinds - 1))
            # Without its type the clue that turns says nothing; that it is readable shows only under a type.
            readable = column in OWN[role] and column != TURNING
            assert (chi2_per_cell > 5) == readable, (role, column, chi2_per_cell)
        one = type_ == 0
        table = np.zeros((len(WORDS[TURNING]), len(RECORDS)))
        np.add.at(table, (shown[one, TURNING], cases.record[one]), 1)
        expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / one.sum()
        chi2_per_cell = ((table - expected) ** 2 / expected).sum() / (3 * 15)
        assert (chi2_per_cell > 5) == (role == "reflector")


def test_the_second_round_is_what_the_clue_that_turns_is_worth(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(4), 4000)
    own, file, turned, nothing = world.increments(cases.values)
    assert softmax(own + file) == pytest.approx(world.belief(cases.values, 1))
    assert softmax(own + file + turned) == pytest.approx(world.belief(cases.values, 2))
    assert not nothing.any()
    for variant in VARIANTS:
        notes = world.protocol(cases.values, variant)
        right = [float((note.top[:, 0] == cases.record).mean()) for note in notes]
        assert right[0] < right[1] < right[2]
        assert [int((note.type == len(world.turning)).mean()) for note in notes] == [1, 0, 0, 0]


def test_seeds(desk: Desk) -> None:
    again, other = Desk(seed=0), Desk(seed=1)
    assert again.samples("test", 20, 4) == desk.samples("test", 20, 4)
    assert again.samples("test", 20, 4) != desk.samples("test", 20, 5)
    for role in ROLES:
        turns = desk.role_samples("train", 20, 4, role=role, variant="graded")
        assert again.role_samples("train", 20, 4, role=role, variant="graded") == turns
        batches = [each.pretraining_batch(role, np.random.default_rng(9), 8) for each in (desk, again)]
        assert batches[0] == batches[1]
    assert not np.allclose(other.cases.turning, desk.cases.turning)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_turns_of_the_loop(desk: Desk) -> None:
    for role in ROLES:
        for turn in desk.role_samples("train", 200, 0, role=role):
            received = next(iter(turn.messages.values()))
            assert (received == "") == (role == "reflector" and turn.round == 1)
            is_answer = role == "toolcaller" and turn.round == NUM_ROUNDS
            assert bool(searches(turn.target)) == is_answer
            assert ("untyped" in turn.target) == (role == "reflector" and turn.round == 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversations_hand_on_what_was_written_and_end_with_an_answer(desk: Desk, variant: str) -> None:
    loops = desk.conversations("validation", 200, 0, variant=variant)
    assert loops == Desk(seed=0).conversations("validation", 200, 0, variant=variant)
    score, right = SCORERS[desk.scorer], []
    for turns in loops:
        assert [(turn.role, turn.round) for turn in turns] == [(role, r) for r in (1, 2) for role in ROLES]
        received = [next(iter(turn.messages.values())) for turn in turns]
        assert received == ["", *(turn.target for turn in turns[:-1])]
        # The tools say just what stands in the text.
        search = RecordSearch(desk.cases).for_question(turns[0].question)
        said = re.findall(r"<search>(\w+)</search><result>(\w+)</result>", turns[-1].target)
        assert said
        assert all(search(record) == result for record, result in said)
        assert len({record for record, _ in said}) == len(said)
        target = programs(turns[-1].target)
        right.append(score(turns[-1].target, str(eval(target[0])) if target else "nothing", {}).value)
        assert bool(right[-1]) == ("unknown" not in turns[-1].target)
    assert 0.4 < np.mean(right) < 0.9


def test_answers_are_scored_as_they_are_written(desk: Desk) -> None:
    score = SCORERS[desk.scorer]
    for sample in desk.samples("validation", 20, 0):
        answer = desk.answer_of(sample)
        assert score(answer, sample.target, {}).value == 1
        assert score(desk.answer_text(sample.target), sample.target, {}).value == 1
        assert score(desk.answer_of(sample, "12345"), sample.target, {}).value == 0
        # The result of the sum is not an answer.
        assert score(answer.partition(" answer")[0], sample.target, {}).value == 0
        assert score("answer unknown.", sample.target, {}).value == 0
        known = {name: measure(answer, sample.metadata) for name, measure in desk.measures.items()}
        assert known == {
            "searches": 1, "wrong searches": 0, "repeated searches": 0, "found within 1": 1, "found within 2": 1,
            "found within 3": 1, "programs": 1, "wrong programs": 0,
        }  # fmt: skip


def test_calls_are_counted_from_the_text(desk: Desk) -> None:
    [sample] = desk.samples("validation", 1, 0)
    record = sample.metadata["record"]
    wrong = next(each for each in RECORDS if each != record)
    calls = [f"<search> {each}</search><result> none</result>" for each in (wrong, wrong, record)]
    text = "".join(calls) + "<python>1+1</python><result> 2</result> answer 2."
    known = {name: measure(text, sample.metadata) for name, measure in desk.measures.items()}
    assert known == {
        "searches": 3, "wrong searches": 2, "repeated searches": 1, "found within 1": 0, "found within 2": 0,
        "found within 3": 1, "programs": 1, "wrong programs": 1,
    }  # fmt: skip


def test_what_is_not_learnt(desk: Desk) -> None:
    """Of an answer the results of tools, and the searches that fail; all else is."""
    tokenizer = desk.tokenizer("toolcaller")
    model = LanguageModel.from_config(desk.agent_recipes["toolcaller"].config, tokenizer)
    cases = desk.cases.as_filed(desk.cases.draw(np.random.default_rng(0), 1))
    others = [record for record in range(len(RECORDS)) if record != cases.record[0]]
    for number in range(4):
        text, spans = curriculum.transcript(cases, 0, 2, others[:number])
        assert [text[a:b] for a, b in spans] == [RECORDS[record] for record in others[:number]]
        turn = RoleSample(role="toolcaller", question="Task with 11.", target=text, unjudged=spans)
        [encoded] = encode_turns([turn], model, PromptSet.load("desk"))
        words = [model.decode([token]).strip() for token in encoded.target_ids]
        told = [word for place, word in enumerate(words) if place in encoded.unjudged]
        learnt = [word for place, word in enumerate(words) if place not in encoded.unjudged]
        assert "<result>" not in learnt
        assert told.count("<result>") == len(results_in(text)) == (number + 2 if number < 3 else 3)
        assert [word for word in learnt if word in RECORDS] == ([RECORDS[cases.record[0]]] if number < 3 else [])
        assert learnt.count("<search>") == min(number + 1, 3)
        assert learnt[-2:] == [("unknown" if number == 3 else text[-2]), "."]
        assert unjudged_tokens(model, text) < encoded.unjudged or number == 0


def test_a_loss_leaves_out_what_is_not_judged(desk: Desk) -> None:
    """What tools say changes what comes after it, and has no loss of its own."""
    recipe = desk.agent_recipes["toolcaller"]
    model = LanguageModel.from_config(recipe.config, desk.tokenizer("toolcaller"))
    system = RecursiveSystem.build(agents=dict.fromkeys(ROLES, model), pattern="deliberation", prompts="desk")
    agent: Agent = system.agents["toolcaller"]
    [sample] = desk.samples("train", 1, 0)
    text = desk.answer_of(sample)
    ids, told = model.encode(text), unjudged_tokens(model, text)
    for played in system.unroll([sample.question], num_rounds=1):
        if played.turn.speaks:
            loss = agent.loss(played.reading, [text], unjudged=[told])
            whole = agent.loss(played.reading, [text])
            parts = [model.decode(ids[: number + 1]) for number in range(len(ids))]
            each = [agent.loss(played.reading, [part], is_cut=[True]).item() for part in parts]
    sums = [loss_ * (number + 1) for number, loss_ in enumerate([*each, whole.item()])]
    single = np.diff([0.0, *sums])
    kept = [loss_ for place, loss_ in enumerate(single) if place not in told]
    assert loss.item() == pytest.approx(np.mean(kept), rel=1e-3)
    assert abs(loss.item() - whole.item()) > 1e-4


def test_the_drills(desk: Desk) -> None:
    rng = np.random.default_rng(5)
    lists = curriculum._short_lists(desk.cases, rng, 300)
    tried = Counter(len(searches(turn.target)) for turn in lists)
    assert set(tried) == {1, 2, 3}
    for turn in lists:
        asked = searches(turn.target)
        assert len(set(asked)) == len(asked)
        assert set(asked) <= set(turn.messages["reflector"].split())
        assert "unknown" not in turn.target
    keys = curriculum._turned_clues(desk.cases, rng, 2000)
    word, type_ = WORDS[TURNING][1], "ledger"
    asked = [turn for turn in keys if word in turn.question and turn.messages["toolcaller"] == f"{type_}."]
    told = [RECORDS.index(turn.target.split()[0]) for turn in asked]
    counted = np.bincount(told, minlength=len(RECORDS)) / len(told)
    true = desk.cases.turning[1, 1] / desk.cases.turning[1, 1].sum()
    assert np.corrcoef(counted, true)[0, 1] > 0.9


def test_pretraining_text_has_every_kind_of_turn(desk: Desk) -> None:
    rng = np.random.default_rng(0)
    turns = [turn for _ in range(250) for turn in desk.pretraining_batch("toolcaller", rng, 2)]
    answers = [turn for turn in turns if searches(turn.target)]
    assert {turn.variant for turn in turns} == {None, *VARIANTS}
    assert 0.6 < len(answers) / len(turns) < 0.9
    assert Counter(len(searches(turn.target)) for turn in answers).keys() == {1, 2, 3}
    assert 0.02 < np.mean([turn.messages["reflector"] == "" for turn in answers]) < 0.2
    assert any(turn.target.endswith("answer unknown.") for turn in answers)
    turns = [turn for _ in range(250) for turn in desk.pretraining_batch("reflector", rng, 2)]
    assert 0.02 < np.mean([turn.solo for turn in turns]) < 0.12
    assert {turn.round for turn in turns} == {1, 2}


def test_it_is_a_world(desk: Desk) -> None:
    assert isinstance(desk, World)
    assert type(load_world("desk")) is Desk
    prompts = PromptSet.load(desk.prompts)
    assert desk.roles == tuple(prompts.roles) == Pattern.load(desk.pattern).roles
    assert tuple(prompts.variants) == VARIANTS
    # Its own prompt with the empty slot: what it reads alone is what it reads where nothing was sent.
    toolcaller = prompts.roles["toolcaller"]
    assert toolcaller.last is not None
    assert toolcaller.solo == toolcaller.last.replace("{latents:reflector} ", "")


@pytest.mark.parametrize("role", ROLES)
def test_every_word_is_one_token_anywhere(desk: Desk, role: str) -> None:
    tokenizer = desk.tokenizer(role)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for word in vocabulary():
        assert len(ids(word)) == 1
        assert ids(word) == ids(" " + word) == ids(f"Clues {word}.")[1:2], word
        assert tokenizer.unk_token_id not in ids(word)
    assert len({*vocabulary()}) == len(vocabulary())
    # A digit is the same token in a question, a program and an answer.
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "47"]
    assert all(ids(text)[-3:-1] == digits for text in ("with 47.", "answer 47.", "answer -47.", "result 147."))


def test_tags_are_tokens_that_are_text(desk: Desk) -> None:
    tokenizer = desk.tokenizer("toolcaller")
    for tag in ("<search>", "</search>", "<python>", "</python>", "<result>", "</result>"):
        [token] = tokenizer(tag, add_special_tokens=False).input_ids
        assert token not in tokenizer.all_special_ids
        assert tokenizer.decode([token], skip_special_tokens=True) == tag


@pytest.mark.parametrize("role", ROLES)
def test_texts_survive_the_tokenizer(desk: Desk, role: str) -> None:
    tokenizer = desk.tokenizer(role)
    rng = np.random.default_rng(1)
    for _ in range(40):
        for turn in desk.pretraining_batch(role, rng, 3):
            for text in (turn.question, turn.target, *turn.messages.values()):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids).replace("> ", ">") == text.replace("> ", ">")
            whole = f"{turn.question} Note: {turn.target} Short note:"
            pieces = (f"{turn.question} Note: ", turn.target, " Short note:")
            joined = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]
            assert tokenizer(whole, add_special_tokens=False).input_ids == joined


def test_notes_are_four_and_nine_tokens(desk: Desk) -> None:
    for role in ROLES:
        tokenizer = desk.tokenizer(role)
        for note, length in ((short_note(3, 1, 4), 4), (graded_note([1, 2, 3], [3, 1, 0], 2, 0), 9)):
            assert len(tokenizer(note, add_special_tokens=False).input_ids) == length
    belief = np.array([[0.72, 0.12, 0.1, *[0.06 / 13] * 13]])
    note = write_note(belief, np.array([0]), np.array([4]))
    assert note.text(0, "graded") == "alderby certain brackwell possible corrin unlikely plus untyped."
    assert note.text(0, "short", 5) == "farrowby plus untyped."


def test_what_is_unknown_is_named(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="validation"):
        desk.samples("dev", 3, 0)
    with pytest.raises(ConfigError, match="toolcaller"):
        desk.role_samples("train", 3, 0, role="toolcaler")
    with pytest.raises(ConfigError, match="graded"):
        desk.role_samples("train", 3, 0, role="reflector", variant="grade")


def test_pretraining_learns_and_is_reproducible() -> None:
    desk = Desk(seed=0)
    desk.agent_recipes["toolcaller"] = replace(
        desk.agent_recipes["toolcaller"], num_train_steps=12, batch_size=8, warmup_steps=2, lr=1e-2
    )
    model, again = desk.pretrain("toolcaller"), desk.pretrain("toolcaller")
    assert model.fingerprint() == again.fingerprint()
    fresh = LanguageModel.from_config(desk.agent_recipes["toolcaller"].config, desk.tokenizer("toolcaller"))
    losses: list[float] = []
    for each in (fresh, model):
        turns = encode_turns(desk.role_samples("test", 16, 0, role="toolcaller"), each, PromptSet.load("desk"))
        losses.append(reply_loss(each, turns).item())
    assert losses[1] < losses[0] - 0.5


# --- tools ------------------------------------------------------------------------------------------------------------


def test_every_question_has_a_search_of_its_own(desk: Desk) -> None:
    search = RecordSearch(desk.cases)
    assert search(RECORDS[0]) == "none"
    for sample in desk.samples("test", 50, 0):
        own = search.for_question(sample.question)
        said = {record: own(f" {record} ") for record in RECORDS}
        content = said.pop(sample.metadata["record"])
        assert sample.metadata["program"].startswith(content)
        assert set(said.values()) == {"none"}
    assert {search.for_question("Who was it?")(record) for record in RECORDS} == {"none"}


@needs_sandbox
def test_a_sum_is_run_once(desk: Desk) -> None:
    python = toolbox(desk.cases).tools["python"]
    assert python(" 47*37 ") == "1739"
    runs: list[str] = []
    python.sandbox.run = lambda program: runs.append(program)  # type: ignore[attr-defined]
    assert python("47*37") == "1739"
    assert not runs


# --- the shipped system -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> RecursiveSystem:
    return RecursiveSystem.from_pretrained("desk")


@pytest.fixture(scope="module")
def asked(desk: Desk) -> list[str]:
    return [sample.question for sample in desk.samples("validation", 24, 7)]


@needs_sandbox
def test_none_is_no_latents_is_the_toolcaller_alone(desk: Desk, shipped: RecursiveSystem, asked: list[str]) -> None:
    tools = desk.toolbox()
    none = shipped.run(asked, channel="none", tools=tools, num_rounds=1)
    assert all(result.text for result in none)
    for others in (
        shipped.run(asked, channel="none", tools=tools, num_rounds=2),
        shipped.run(asked, num_latent_steps=0, tools=tools),
        shipped.solo().run(asked, tools=tools),
    ):
        assert [result.text for result in others] == [result.text for result in none]
    assert any("search" in result.text for result in none)


@needs_sandbox
def test_calls_of_the_shipped_system_are_answered_truly(desk: Desk, shipped: RecursiveSystem, asked: list[str]) -> None:
    results = shipped.run(asked, tools=desk.toolbox())
    assert [shipped.run(each, tools=desk.toolbox()).text for each in asked[:4]] == [r.text for r in results[:4]]
    right = 0
    for question, result in zip(asked, results, strict=True):
        search = RecordSearch(desk.cases).for_question(question)
        assert 1 <= len(result.trace.calls) <= 4
        for call in result.trace.calls:
            if call.tool == "search":
                assert call.result == search(call.argument)
            else:
                assert call.result == str(eval(call.argument))
                right += result.text.endswith(f"answer {call.result}.")
        found = any(call.result != "none" for call in result.trace.calls)
        assert found != result.text.endswith("answer unknown.")
    assert right > len(asked) / 3


@needs_sandbox
def test_an_evaluation_gives_every_question_its_tools(shipped: RecursiveSystem) -> None:
    task = world_task(shipped, "desk", split="validation", n=16, seed=0)
    log = evaluate(shipped, task, plan_arms(["latent", "solo:reflector", "no-tools", "none", "solo"], [2], []))
    arms = {arm["arm"]: arm for arm in log.to_dict()["arms"]}
    assert arms["latent"]["accuracy"] > 0.4
    assert arms["no-tools"]["accuracy"] < 0.1
    assert arms["solo:reflector"]["accuracy"] < 0.1
    assert arms["none"]["accuracy"] == arms["solo"]["accuracy"]
    measures = {name: each["mean"] for name, each in arms["latent"]["measures"].items()}
    assert measures["found within 1"] <= measures["found within 2"] <= measures["found within 3"]
    assert measures["searches"] >= measures["wrong searches"] >= measures["repeated searches"]
    # A search that is not told its result goes on all the same, and knows nothing.
    texts = [answer.text for arm, answers in log.answers.items() if arm.name == "no-tools" for answer in answers]
    assert not any("<result>" in text for text in texts)
    assert log.settings["tools"] == {"names": ["search", "python"], "allow_repeats": True}
    banned = world_task(shipped, "desk", split="validation", n=16, seed=0, allow_repeats=False)
    assert banned.toolbox is not None
    assert not banned.toolbox.limits.allow_repeats


def test_tools_cannot_be_taken_from_who_has_none(shipped: RecursiveSystem, desk: Desk) -> None:
    task = world_task(shipped, "desk", split="validation", n=2, seed=0)
    with pytest.raises(ConfigError, match="no-tools"):
        evaluate(shipped, replace(task, toolbox=None), plan_arms(["no-tools"], [1], []))


@needs_sandbox
def test_training_is_judged_with_tools(desk: Desk, shipped: RecursiveSystem) -> None:
    recipe = Recipe(system="desk", world=WorldSettings(name="desk"), output="unused")
    material = material_of(recipe, Pattern.load("deliberation"))
    questions = material.questions("validation", 30)
    [sample, *_] = desk.samples("validation", 30, recipe.seed)
    assert questions[0].answer == desk.answer_of(sample)
    assert material.score is not None
    assert material.score(shipped, questions) > 0.4
