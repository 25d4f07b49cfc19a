"""The panel world: its splits, its probabilities against brute force, its texts, its readers, and the system it ships."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recursivemas.checkpoint import bundled_systems
from recursivemas.cli.eval import world_task
from recursivemas.errors import ConfigError
from recursivemas.evaluation.metrics import paired_difference
from recursivemas.evaluation.runner import EvalLog, evaluate, plan_arms
from recursivemas.evaluation.scorers import SCORERS
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import encode_turns
from recursivemas.worlds import World, load_world
from recursivemas.worlds.building import build
from recursivemas.worlds.panel import Panel, curriculum, readers
from recursivemas.worlds.panel.cases import (
    CAUSES,
    COLUMNS,
    FINDINGS,
    GRADES,
    NUM_NAMED,
    OPENING,
    ROLES,
    SPECIALISTS,
    SUMMARIZER,
    VARIANTS,
    CaseWorld,
    Reports,
    read_reports,
    vocabulary,
)
from recursivemas.worlds.pretraining import reply_loss


@pytest.fixture(scope="module")
def panel() -> Panel:
    return Panel(seed=0)


@pytest.fixture(scope="module")
def world(panel: Panel) -> CaseWorld:
    return panel.cases


def test_splits_are_disjoint_and_stable(panel: Panel, world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(0), 20_000)
    splits = np.stack([world.in_split(cases.values, split) for split in ("train", "validation", "test")])
    assert (splits.sum(axis=0) == 1).all()
    assert splits.mean(axis=1) == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    questions = {split: {s.question for s in panel.samples(split, 500, 0)} for split in ("train", "validation", "test")}
    assert all(len(found) == 500 for found in questions.values())
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]
    # The hash must never change: agents are pretrained on one side of it.
    first = np.arange(6)[:, None] * np.ones(len(FINDINGS), dtype=int)
    assert world.split_of(first).tolist() == [3, 6, 2, 2, 4, 7]


def test_agents_never_read_a_held_out_case(panel: Panel) -> None:
    rng = np.random.default_rng(0)
    held_out = {s.question for split in ("validation", "test") for s in panel.samples(split, 2000, 3)}
    for role in ROLES:
        turns = curriculum.pretraining_turns(panel.cases, rng, 400, role=role, is_drill=False)
        assert all(turn.question not in held_out for turn in turns)
        assert all(turn.question not in held_out for turn in panel.role_samples("train", 200, 0, role=role))


def test_posterior_is_exact(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(1), 5)
    for row, values in enumerate(cases.values):
        weights = np.ones(len(CAUSES))
        for cause in range(len(CAUSES)):
            for column in range(len(FINDINGS)):
                weights[cause] *= world.tables[column, values[column], cause]
        np.testing.assert_allclose(world.posterior(cases.values)[row], weights / weights.sum())
        # The panel's optimum is what perfect specialists know, multiplied.
        product = np.prod([world.belief_of(cases.values, role)[row] for role in SPECIALISTS], axis=0)
        np.testing.assert_allclose(world.posterior(cases.values)[row], product / product.sum())
    np.testing.assert_allclose(world.tables.sum(axis=1), 1.0)


def test_drawn_findings_follow_their_tables(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(2), 60_000)
    chosen = cases.cause == 3
    for column in (0, 7):
        shares = np.bincount(cases.values[chosen, column], minlength=6) / chosen.sum()
        np.testing.assert_allclose(shares, world.tables[column, :, 3], atol=0.03)
    assert np.bincount(cases.cause) / len(cases) == pytest.approx(np.full(len(CAUSES), 1 / len(CAUSES)), abs=0.006)


@pytest.mark.parametrize("role", ROLES)
def test_foreign_findings_carry_no_information_in_pretraining(world: CaseWorld, role: str) -> None:
    rng = np.random.default_rng(3)
    cases = world.draw(rng, 40_000)
    shown = curriculum.scramble(world, rng, cases, role)
    for column, finding in enumerate(FINDINGS):
        table = np.zeros((len(finding.words), len(CAUSES)))
        np.add.at(table, (shown[:, column], cases.cause), 1)
        expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(cases)
        chi2_per_cell = ((table - expected) ** 2 / expected).sum() / ((len(table) - 1) * (len(CAUSES) - 1))
        assert (chi2_per_cell > 5) == (finding.owner == role), (finding.name, chi2_per_cell)


def test_verdicts_in_a_specialists_text_say_nothing(world: CaseWorld) -> None:
    rng = np.random.default_rng(4)
    turns = curriculum.pretraining_turns(world, rng, 6000, role="botanist", is_drill=True)
    heard = [
        (turn.messages[SUMMARIZER].rstrip("."), turn.target.rstrip(".")) for turn in turns if turn.variant == "short"
    ]
    same = [verdict == target for verdict, target in heard if verdict]
    assert np.mean(same) == pytest.approx(1 / len(CAUSES), abs=0.02)


def test_the_optimum_is_far_above_every_specialist(panel: Panel) -> None:
    samples = panel.samples("test", 3000, seed=5)
    best = panel.optimum(samples, 1)
    assert 0.7 < best < 0.85
    assert panel.optimum(samples, 3) == best
    hits = np.mean([max(s.metadata["posterior"], key=s.metadata["posterior"].get) == s.target for s in samples])
    assert hits == pytest.approx(best, abs=0.03)
    for role in SPECIALISTS:
        assert 0.3 < np.mean([sample.metadata["alone"][role] for sample in samples]) < 0.45


def test_seeds(panel: Panel) -> None:
    again, other = Panel(seed=0), Panel(seed=1)
    assert again.samples("test", 20, 4) == panel.samples("test", 20, 4)
    assert again.samples("test", 20, 4) != panel.samples("test", 20, 5)
    for role in ROLES:
        turns = panel.role_samples("train", 20, 4, role=role, variant="long")
        assert again.role_samples("train", 20, 4, role=role, variant="long") == turns
        batches = [w.pretraining_batch(role, np.random.default_rng(9), 8) for w in (panel, again)]
        assert batches[0] == batches[1]
    assert not np.allclose(other.cases.tables, panel.cases.tables)


def test_reports_name_the_likeliest_causes_with_their_grades(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(5), 300)
    belief = world.belief_of(cases.values, "chemist")
    reports = world.reports(cases.values, "chemist")
    for row in range(len(cases)):
        by_hand = sorted(range(len(CAUSES)), key=lambda cause: -belief[row, cause])
        for variant in VARIANTS:
            words = reports.text(row, variant).rstrip(".").split()
            named = words if variant == "short" else words[::2]
            assert named == [CAUSES[cause] for cause in by_hand[: NUM_NAMED[variant]]]
        for name, grade in zip(words[::2], words[1::2], strict=True):
            probability = belief[row, CAUSES.index(name)]
            assert GRADES.index(grade) == sum(probability > bound for bound in (0.08, 0.2, 0.45))


def test_reading_a_report_gives_a_belief_that_follows_its_words(world: CaseWorld) -> None:
    cases = world.draw(np.random.default_rng(6), 4000, split="validation")
    posterior = world.posterior(cases.values)
    scores = []
    for variant in VARIANTS:
        reports = {role: world.reports(cases.values, role) for role in SPECIALISTS}
        read = read_reports(reports["botanist"], variant, world._trust[variant]["botanist"])
        np.testing.assert_allclose(read.sum(axis=1), 1.0)
        assert (read.argmax(axis=1) == reports["botanist"].top[:, 0]).mean() > 0.99
        scores.append(posterior[np.arange(len(cases)), world.verdict(reports, variant)].mean())
    # The more a report says, the better the verdict, and none says all.
    assert 0.4 < scores[0] < scores[1] - 0.1 < scores[2] - 0.1
    assert scores[2] < posterior.max(axis=1).mean() - 0.01


def test_turns_of_the_loop(panel: Panel) -> None:
    for variant in VARIANTS:
        for role in SPECIALISTS:
            for turn in panel.role_samples("train", 60, 0, role=role, variant=variant):
                assert (turn.messages[SUMMARIZER] == "") == (turn.round == 1)
                assert len(turn.target.split()) == max(1, 2 * NUM_NAMED[variant] - (variant == "short"))
        turns = panel.role_samples("train", 60, 0, role=SUMMARIZER, variant=variant)
        assert {turn.round for turn in turns} == {1, 2}
        assert all(set(turn.messages) == set(SPECIALISTS) for turn in turns)


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversations_hand_on_what_was_written_and_end_with_the_answer(panel: Panel, variant: str) -> None:
    loops = panel.conversations("validation", 100, 0, variant=variant)
    assert loops == Panel(seed=0).conversations("validation", 100, 0, variant=variant)
    for turns in loops:
        assert [(turn.role, turn.round) for turn in turns] == [(role, r) for r in (1, 2) for role in ROLES]
        for turn in turns:
            before = {each.role: each.target for each in turns if each.round == turn.round - (turn.role != SUMMARIZER)}
            assert all(text == before.get(sender, "") for sender, text in turn.messages.items())
        assert turns[-1].target in {panel.answer_text(name) for name in CAUSES}


def test_a_short_report_is_sampled_in_pretraining_and_by_the_book_in_use(world: CaseWorld) -> None:
    rng = np.random.default_rng(7)
    turns = curriculum.pretraining_turns(world, rng, 4000, role="zoologist", is_drill=True)
    likeliest = {
        turn.question: turn.target.split()[0].rstrip(".") for turn in turns if turn.variant in ("graded", "long")
    }
    pairs = [
        (turn.target, f"{likeliest[turn.question]}.")
        for turn in turns
        if turn.variant == "short" and turn.question in likeliest
    ]
    assert len(pairs) > 300
    # As often as the likeliest cause is the true one.
    assert np.mean([target == best for target, best in pairs]) == pytest.approx(0.42, abs=0.08)


def test_pretraining_text_has_every_kind_of_turn(panel: Panel) -> None:
    rng = np.random.default_rng(0)
    turns = curriculum.pretraining_turns(panel.cases, rng, 1500, role=SUMMARIZER, is_drill=False)
    assert any(turn.solo for turn in turns)
    lengths = {len(text.split()) for turn in turns for text in turn.messages.values()}
    assert set(range(11)) <= lengths
    triples = [list(turn.messages.values()) for turn in turns]
    assert any(all(text == "" for text in triple) for triple in triples)
    assert any(all(text in CAUSES for text in triple) for triple in triples)
    assert 0.03 < np.mean([text == "" for triple in triples for text in triple]) < 0.15
    specialist = curriculum.pretraining_turns(panel.cases, rng, 400, role="chemist", is_drill=False)
    assert {turn.variant for turn in specialist} == set(VARIANTS)
    assert {turn.round for turn in specialist} == {1, 2}


def test_drills_hold_what_the_role_can_read_and_no_more(panel: Panel) -> None:
    rng = np.random.default_rng(0)
    for role in ROLES:
        [*turns] = curriculum.pretraining_turns(panel.cases, rng, 50, role=role, is_drill=True)
        foreign = {word for finding in FINDINGS if finding.owner != role for word in finding.words}
        for turn in turns:
            assert not foreign & set(turn.question.replace(",", "").replace(".", "").split())
            assert (turn.question == OPENING) == (role == SUMMARIZER)
    sizes = {len(panel.pretraining_batch("botanist", np.random.default_rng(seed), 8)) for seed in range(8)}
    assert sizes == {8, 16}


# --- readers ----------------------------------------------------------------------------------------------------------


def test_the_exact_reader_of_short_reports_agrees_with_counting(world: CaseWorld) -> None:
    rng = np.random.default_rng(8)
    many = world.draw(rng, 120_000)
    counts = {role: np.ones((len(CAUSES), len(CAUSES))) for role in SPECIALISTS}
    for role in SPECIALISTS:
        np.add.at(counts[role], (world.reports(many.values, role).top[:, 0], many.cause), 1)
    asked = world.draw(rng, 400)
    total = np.zeros((len(asked), len(CAUSES)))
    for role in SPECIALISTS:
        per_cause = counts[role] / counts[role].sum(axis=0)
        total += np.log(per_cause[world.reports(asked.values, role).top[:, 0]])
    found = readers.exact_choices(world, asked.values, "short")
    assert (found == total.argmax(axis=1)).mean() > 0.94  # counts leave near ties open


def test_the_fitted_reader_of_short_reports_is_the_exact_one(world: CaseWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "NUM_TRAIN_STEPS", 300)
    reader = readers.FittedReader(world, "short", num_cases=20_000)
    cases = world.draw(np.random.default_rng(9), 3000, split="validation")
    found = readers.ceilings(world, cases, fitted={"short": reader})
    assert found["fitted reader of short"] == pytest.approx(found["exact reader of short"], abs=0.01)
    assert max(found[f"{role} alone"] for role in SPECIALISTS) + 0.1 < found["exact reader of short"]
    assert found["exact reader of short"] + 0.1 < found["optimum"]


def test_a_reader_reads_nothing_but_what_a_report_says(world: CaseWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "NUM_TRAIN_STEPS", 20)
    # Cases whose reports are worded alike are read alike, whatever was found.
    reader = readers.FittedReader(world, "graded", num_cases=2000)
    values = world.draw(np.random.default_rng(10), 1000).values
    said = reader._said(values)
    reports = [world.reports(values, role) for role in SPECIALISTS]
    choices: dict[tuple[int, ...], int] = {}
    worded: dict[tuple[str, ...], tuple[int, ...]] = {}
    for row, choice in enumerate(reader.choices(values).tolist()):
        features = tuple(said[row].tolist())
        # Reports in the same words are the same to a reader, and lead it to the same choice.
        assert worded.setdefault(tuple(each.text(row, "graded") for each in reports), features) == features
        assert choices.setdefault(features, choice) == choice
    short = readers.FittedReader(world, "short", num_cases=2000)
    top, grades = np.zeros((1, 5), dtype=int), np.zeros((1, 5), dtype=int)
    told = [Reports(top=top, grades=grades + grade).text(0, "short") for grade in range(4)]
    assert len(set(told)) == 1
    assert short._said(values[:50]).max() < len(SPECIALISTS) * len(GRADES) * len(CAUSES)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_every_word_is_one_token_anywhere(panel: Panel, role: str) -> None:
    tokenizer = panel.tokenizer(role)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert max(tokenizer.get_vocab().values()) < len(tokenizer)
    assert len(set(vocabulary())) == len(vocabulary())
    for word in vocabulary():
        assert len(ids(word)) == 1
        assert ids(word) == ids(" " + word) == ids(f"bark {word}.")[1:2], word
        assert tokenizer.unk_token_id not in ids(word)
    for turn in curriculum.pretraining_turns(panel.cases, np.random.default_rng(1), 40, role=role, is_drill=False):
        for text in (turn.question, turn.target, *turn.messages.values()):
            assert tokenizer.decode(ids(text)) == text
            assert tokenizer.unk_token_id not in ids(text)


def test_vocabularies_differ(panel: Panel) -> None:
    ids = {role: tuple(panel.tokenizer(role)(" ".join(CAUSES)).input_ids) for role in ROLES}
    assert len(set(ids.values())) == len(ROLES)


# --- building and running ---------------------------------------------------------------------------------------------


def test_it_is_a_world(panel: Panel) -> None:
    assert isinstance(panel, World)
    assert isinstance(load_world("panel"), Panel)
    assert panel.roles == tuple(PromptSet.load(panel.prompts).roles)
    assert tuple(PromptSet.load(panel.prompts).variants) == VARIANTS
    assert sorted(column for columns in COLUMNS.values() for column in columns) == list(range(len(FINDINGS)))
    for sample in panel.samples("validation", 20, 0):
        score = SCORERS[panel.scorer](panel.answer_text(sample.target), sample.target, sample.metadata)
        assert score.value == sample.metadata["posterior"][sample.target]


def test_what_is_unknown_is_named(panel: Panel) -> None:
    with pytest.raises(ConfigError, match="validation"):
        panel.samples("dev", 3, 0)
    with pytest.raises(ConfigError, match="did you mean 'chemist'"):
        panel.role_samples("train", 3, 0, role="chemists")
    with pytest.raises(ConfigError, match="graded"):
        panel.conversations("train", 3, 0, variant="grade")


def test_a_build_makes_a_system_of_the_bundled_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = Panel(seed=0)

    def untrained(name: str, seed: int, role: str, directory: Path, running: list[object]) -> dict[str, int]:
        model = LanguageModel.from_config(panel.agent_recipes[role].config, panel.tokenizer(role), seed=seed)
        model.save_pretrained(directory / "agent", dtype="float16")
        return {"steps": 0}

    # Agents are trained in processes of their own, for minutes; whether they learn is looked at below.
    monkeypatch.setattr("recursivemas.worlds.building._in_process", untrained)
    monkeypatch.setattr("recursivemas.worlds.building._NUM_WRITTEN", {"train": 20, "test": 20})
    build(panel, tmp_path)
    system = RecursiveSystem.from_pretrained(tmp_path / "system", device="cpu")
    assert system.pattern.name == "mixture"
    assert system.pattern.roles == ROLES
    assert len(system.links) == 6
    result = system.run(panel.samples("test", 2, 0)[0].question, num_rounds=2)
    assert result.usage.latent_steps == 2 * (3 + 1 + 3)
    assert {each.source for each in result.trace.messages} == set(ROLES)


def test_pretraining_learns_and_is_reproducible() -> None:
    panel = Panel(seed=0)
    panel.agent_recipes["zoologist"] = replace(
        panel.agent_recipes["zoologist"], num_train_steps=12, batch_size=8, warmup_steps=2, lr=1e-2
    )
    losses: list[float] = []
    model, again = panel.pretrain("zoologist"), panel.pretrain("zoologist")
    assert model.fingerprint() == again.fingerprint()
    fresh = LanguageModel.from_config(panel.agent_recipes["zoologist"].config, panel.tokenizer("zoologist"))
    for each in (fresh, model):
        turns = encode_turns(panel.role_samples("test", 16, 0, role="zoologist"), each, PromptSet.load("panel"))
        losses.append(reply_loss(each, turns).item())
    assert losses[1] < losses[0] - 0.5


needs_system = pytest.mark.skipif("panel" not in bundled_systems(), reason="the panel system is not bundled yet")


@pytest.fixture(scope="module")
def system() -> RecursiveSystem:
    return RecursiveSystem.from_pretrained("panel", device="cpu")


@needs_system
def test_the_bundled_system_answers_above_text_and_hangs_on_every_specialist(system: RecursiveSystem) -> None:
    task = world_task(system, "panel", split="validation", n=120, seed=3)
    names = ["latent", "text", "none", "shuffled", "solo:botanist", "shuffled:botanist"]
    log = evaluate(system, task, plan_arms(names, [1], VARIANTS), batch_size=120)
    scores = {arm.label: np.array([answer.score for answer in answers]) for arm, answers in log.answers.items()}
    means = {label: found.mean() for label, found in scores.items()}
    text = {label for label in means if label.startswith("text/")}
    assert len(text) == 3
    assert all(means["latent"] > means[label] for label in text)
    assert paired_difference(scores["latent"].tolist(), scores["text/graded"].tolist()).p_value < 0.05
    chance = 1 / len(CAUSES)
    for control in ("none", "shuffled"):
        assert means[control] == pytest.approx(chance, abs=0.05), control
    # With one specialist wrong, or one alone, it is worse than with all, and better than without any.
    for label in ("shuffled:botanist", "solo:botanist"):
        assert chance + 0.15 < means[label] < means["latent"] - 0.1, label
    tokens = _tokens(log)
    assert tokens["latent"] <= 0.15 * tokens["text/long"]
    assert task.optimum is not None
    assert means["latent"] < task.optimum[1]


def _tokens(log: EvalLog) -> dict[str, float]:
    return {
        arm.label: float(np.mean([answer.generated_tokens for answer in answers]))
        for arm, answers in log.answers.items()
    }


@needs_system
def test_specialists_run_side_by_side_and_only_the_summarizer_speaks(system: RecursiveSystem, panel: Panel) -> None:
    questions = [sample.question for sample in panel.samples("validation", 3, 0)]
    results: Sequence[object] = system.run(questions, num_rounds=2)
    for result in results:
        per_turn = {(turn.role, turn.round): turn.generated_tokens for turn in result.usage.turns}  # type: ignore[attr-defined]
        assert {turn for turn, tokens in per_turn.items() if tokens} == {(SUMMARIZER, 2)}


def test_shuffling_one_sender_leaves_the_others_alone(system_of_random_agents: RecursiveSystem, panel: Panel) -> None:
    system = system_of_random_agents
    questions = [sample.question for sample in panel.samples("validation", 4, 0)]
    plain = system.run(questions, trace="full")
    mixed = system.run(questions, trace="full", intervene="shuffled:zoologist")
    for before, after in zip(plain, mixed, strict=True):
        for role in SPECIALISTS:
            pair = [result.trace.find(1, role, SUMMARIZER).tensor() for result in (before, after)]
            assert torch.equal(*pair) == (role != "zoologist")
    with pytest.raises(ConfigError, match="did you mean 'chemist'"):
        system.run(questions, intervene="shuffled:chemst")


@pytest.fixture(scope="module")
def system_of_random_agents(panel: Panel) -> RecursiveSystem:
    models = {
        role: LanguageModel.from_config(recipe.config, panel.tokenizer(role), seed=number)
        for number, (role, recipe) in enumerate(panel.agent_recipes.items())
    }
    return RecursiveSystem.build(
        agents=models, pattern=panel.pattern, prompts=panel.prompts, roles=panel.role_names, **panel.settings
    )
