"""The runner: which arms there are, that each answers as the system would, and that a stopped run goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError, OutputError, PatternError
from recursivemas.evaluation.runner import Arm, EvalLog, evaluate, plan_arms
from recursivemas.evaluation.scorers import Score
from recursivemas.evaluation.task import Sample, Task
from recursivemas.system import RecursiveSystem

SAMPLING = SamplingParams(max_new_tokens=3)


def length(text: str, target: str, metadata: Any) -> Score:
    """Any scorer: longer answers are better ones."""
    return Score(min(len(text) / 20, 1.0), text or None, "its length")


@pytest.fixture
def task(questions: list[str]) -> Task:
    samples = [Sample(id=f"q{i}", question=question, target="") for i, question in enumerate(questions)]
    return Task(name="toy", samples=samples, scorer=length, instructions="Be brief.")


@pytest.fixture
def system(make_system: Callable[..., RecursiveSystem]) -> RecursiveSystem:
    return make_system(num_latent_steps=2)


def without_seconds(log: EvalLog) -> dict[str, list[dict[str, Any]]]:
    return {str(arm): [{**asdict(answer), "seconds": 0} for answer in answers] for arm, answers in log.answers.items()}


# Planning


def test_controls_run_once_and_text_once_for_each_wording() -> None:
    arms = plan_arms(["latent", "text", "solo", "none", "shuffled"], [1, 3], ["short", "long"])
    assert [str(arm) for arm in arms] == [
        "latent r=1",
        "latent r=3",
        "text/short r=1",
        "text/long r=1",
        "text/short r=3",
        "text/long r=3",
        "solo r=1",
        "none r=3",
        "shuffled r=3",
    ]


def test_an_arm_is_planned_once_however_often_it_is_named() -> None:
    assert plan_arms(["latent", "latent", "solo", "solo"], [2, 2], []) == [Arm("latent", 2), Arm("solo", 1)]


def test_an_unknown_arm_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown arm 'latnet': did you mean 'latent'"):
        plan_arms(["latnet"], [1], [])


def test_latent_is_compared_with_the_others_of_its_rounds_and_with_solo(task: Task) -> None:
    arms = plan_arms(["latent", "text", "solo", "none"], [1, 3], [])
    log = EvalLog("x", task, 2, 0, {arm: [] for arm in arms})
    assert [(str(a), str(b)) for a, b in log.pairs()] == [
        ("latent r=1", "text r=1"),
        ("latent r=1", "solo r=1"),
        ("latent r=3", "text r=3"),
        ("latent r=3", "solo r=1"),
        ("latent r=3", "none r=3"),
    ]


# Answering


def test_every_arm_answers_as_the_system_does(system: RecursiveSystem, task: Task) -> None:
    task = replace(task, samples=task.samples[:3])
    names = ["latent", "text", "both", "solo", "none", "zero", "shuffled", "random-link"]
    log = evaluate(system, task, plan_arms(names, [1], []), sampling=SAMPLING, batch_size=2, seed=3)
    asked = [sample.question for sample in task.samples]
    options = {"num_rounds": 1, "sampling": SAMPLING, "instructions": "Be brief."}
    expected = {
        "latent": system.run(asked, **options),
        "text": system.run(asked, channel="text", **options),
        "both": system.run(asked, channel="both", **options),
        "solo": system.solo().run(asked, **options),
        "none": system.run(asked, channel="none", **options),
        "zero": system.run(asked, intervene="zero", **options),
        "shuffled": system.run(asked, intervene="shuffled", seed=3, **options),
        "random-link": system.with_random_links(3).run(asked, **options),
    }
    for arm, answers in log.answers.items():
        assert [answer.text for answer in answers] == [result.text for result in expected[arm.name]], arm
        assert [answer.id for answer in answers] == [sample.id for sample in task.samples]
        for answer, result in zip(answers, expected[arm.name], strict=True):
            assert answer.score == min(len(result.text) / 20, 1.0)
            assert answer.generated_tokens == result.usage.generated_tokens
            assert answer.positions > 0


def test_another_role_can_be_alone(system: RecursiveSystem, task: Task) -> None:
    roles = {**system.prompts.roles, "critic": system.prompts.roles["critic"].model_copy(update={"solo": "{question}"})}
    prompts = system.prompts.model_copy(update={"roles": roles})
    system = RecursiveSystem(system.agents, system.links, system.pattern, prompts, system.settings)
    log = evaluate(system, task, plan_arms(["latent", "solo:critic"], [1, 2], []), sampling=SAMPLING)
    asked = [sample.question for sample in task.samples]
    expected = system.solo("critic").run(asked, sampling=SAMPLING, instructions="Be brief.")
    assert [answer.text for answer in log.answers[Arm("solo:critic", 1)]] == [result.text for result in expected]
    assert [str(b) for _, b in log.pairs()] == ["solo:critic r=1"] * 2
    assert expected != system.solo().run(asked, sampling=SAMPLING, instructions="Be brief.")
    with pytest.raises(PatternError, match="did you mean 'critic'"):
        system.solo("critik")
    with pytest.raises(PatternError, match="no template for the planner"):
        system.solo("planner")
    with pytest.raises(ConfigError, match="unknown arm"):
        plan_arms(["latent:critic"], [1], [])


def test_what_a_task_measures_is_kept_with_answers_and_in_the_report(
    system: RecursiveSystem, task: Task, tmp_path: Path
) -> None:
    task = replace(task, measures={"letters": lambda text, metadata: float(len(text))})
    arms = plan_arms(["latent", "solo"], [1], [])
    journal = tmp_path / "answers.jsonl"
    log = evaluate(system, task, arms, sampling=SAMPLING, journal=journal)
    again = evaluate(system, task, arms, sampling=SAMPLING, journal=journal)
    assert again.to_dict() == log.to_dict()
    for arm, found in zip(arms, log.to_dict()["arms"], strict=True):
        lengths = [len(answer.text) for answer in log.answers[arm]]
        assert found["measures"]["letters"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert found["measures"]["letters"]["stderr"] > 0
    with pytest.raises(OutputError, match="other settings"):
        evaluate(system, replace(task, measures={}), arms, sampling=SAMPLING, journal=journal)


def test_without_feedback_only_the_edges_that_lead_back_are_closed(system: RecursiveSystem, task: Task) -> None:
    log = evaluate(system, task, plan_arms(["latent", "no-feedback"], [1, 2], []), sampling=SAMPLING)
    expected = system.run(
        [sample.question for sample in task.samples],
        channel={"planner->critic": "latent", "critic->solver": "latent", "solver->planner": "none"},
        num_rounds=2,
        sampling=SAMPLING,
        instructions="Be brief.",
    )
    found = without_seconds(log)
    assert [each["text"] for each in found["no-feedback r=2"]] == [result.text for result in expected]
    assert found["no-feedback r=1"] == found["latent r=1"]
    steps = {arm: each[0]["latent_steps"] for arm, each in found.items()}
    # What nobody reads is not thought: without feedback the last round alone is played.
    assert steps == {"latent r=1": 4, "latent r=2": 10, "no-feedback r=1": 4, "no-feedback r=2": 4}


def test_accuracy_is_told_by_group(system: RecursiveSystem, task: Task) -> None:
    hops = [2, 1, 2, 2, 1]
    samples = [replace(each, metadata={"hops": k}) for each, k in zip(task.samples, hops, strict=True)]
    log = evaluate(system, replace(task, samples=samples, group_by="hops"), plan_arms(["latent", "text"], [1], []))
    groups = json.loads(json.dumps(log.to_dict()))["groups"]
    assert [(each["hops"], each["arm"], each["n"]) for each in groups] == [
        (1, "latent", 2),
        (1, "text", 2),
        (2, "latent", 3),
        (2, "text", 3),
    ]
    scores = [answer.score for answer in log.answers[Arm("latent", 1)]]
    assert groups[0]["accuracy"] == pytest.approx((scores[1] + scores[4]) / 2)
    assert log.to_dict()["arms"][0]["accuracy"] == pytest.approx(sum(scores) / 5)


def test_a_group_that_is_not_there_is_named(task: Task) -> None:
    with pytest.raises(InputError, match="cannot group by 'hops': sample q0 has no metadata"):
        replace(task, group_by="hops")


def test_a_report_is_plain_data_with_errors_and_costs(system: RecursiveSystem, task: Task) -> None:
    log = evaluate(system, task, plan_arms(["latent", "text"], [1], []), sampling=SAMPLING)
    report = json.loads(json.dumps(log.to_dict(), allow_nan=False))
    latent, text = report["arms"]
    scores = [answer.score for answer in log.answers[Arm("latent", 1)]]
    assert latent["accuracy"] == pytest.approx(sum(scores) / 5)
    assert (latent["latent_steps"], latent["latent_steps_total"], text["latent_steps"]) == (2, 4, 0)
    assert latent["generated_tokens"] == 3
    assert text["generated_tokens"] == 9
    [comparison] = report["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("latent", "text")
    assert comparison["token_reduction"] == pytest.approx(2 / 3)
    assert report["n"] == 5


def test_a_report_on_one_question_has_no_nan(system: RecursiveSystem, task: Task) -> None:
    one = replace(task, samples=task.samples[:1])
    log = evaluate(system, one, plan_arms(["latent", "none"], [1], []), sampling=SAMPLING)
    report = json.loads(json.dumps(log.to_dict(), allow_nan=False))
    assert report["arms"][0]["stderr"] is None
    assert report["comparisons"][0]["p_value"] is None


def test_unscorable_and_cut_answers_are_counted(system: RecursiveSystem, task: Task) -> None:
    blind = replace(task, scorer=lambda text, target, metadata: Score(0.0, None, "nothing"))
    log = evaluate(system, blind, [Arm("none", 1)], sampling=SAMPLING)
    [arm] = log.to_dict()["arms"]
    assert (arm["unscorable"], arm["cut"]) == (1, 1)


# Going on


class StoppedError(Exception):
    pass


def stop_after(number: int) -> Callable[..., None]:
    def progress(done: int, total: int, answers: Any) -> None:
        if done == number:
            raise StoppedError

    return progress


@pytest.mark.parametrize("stopped_after", [1, 4, 7])
def test_a_stopped_run_goes_on_and_gives_the_same_log(
    system: RecursiveSystem, task: Task, tmp_path: Path, stopped_after: int
) -> None:
    arms = plan_arms(["latent", "none", "shuffled"], [1], [])
    options = {"sampling": SAMPLING, "batch_size": 2}
    whole = evaluate(system, task, arms, journal=tmp_path / "whole.jsonl", **options)
    journal = tmp_path / "stopped.jsonl"
    with pytest.raises(StoppedError):
        evaluate(system, task, arms, journal=journal, progress=stop_after(stopped_after), **options)
    kept = journal.read_text()
    resumed = evaluate(system, task, arms, journal=journal, **options)
    assert without_seconds(resumed) == without_seconds(whole)
    # What was there is there still, seconds and all, and nothing came twice.
    assert journal.read_text().startswith(kept)
    assert len(journal.read_text().splitlines()) == 1 + 3 * len(task.samples)
    # A third time nothing is left to do.
    again = evaluate(system, task, arms, journal=journal, **options)
    assert again.answers == resumed.answers


@pytest.mark.parametrize("left", [0.3, 0.6, 0.95])
def test_a_run_killed_in_the_middle_of_a_line_goes_on(
    system: RecursiveSystem, task: Task, tmp_path: Path, left: float
) -> None:
    arms = [Arm("latent", 1), Arm("none", 1)]
    journal = tmp_path / "journal.jsonl"
    whole = evaluate(system, task, arms, sampling=SAMPLING, batch_size=2, journal=journal)
    text = journal.read_text()
    journal.write_text(text[: int(len(text) * left)])
    resumed = evaluate(system, task, arms, sampling=SAMPLING, batch_size=2, journal=journal)
    assert without_seconds(resumed) == without_seconds(whole)
    known = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len({(each["arm"], each["id"]) for each in known}) == 10


def retrain(system: RecursiveSystem) -> RecursiveSystem:
    return system.with_random_links(9)


@pytest.mark.parametrize(
    "change",
    [
        lambda system, task: (system, task, {"seed": 1}),
        lambda system, task: (system, task, {"num_latent_steps": 3}),
        lambda system, task: (system, task, {"sampling": SamplingParams(max_new_tokens=4)}),
        lambda system, task: (system, replace(task, instructions="Be long."), {}),
        lambda system, task: (system, replace(task, samples=task.samples[:4]), {}),
        lambda system, task: (
            system,
            replace(task, samples=[*task.samples[:4], replace(task.samples[4], question="Another?")]),
            {},
        ),
        lambda system, task: (
            system,
            replace(task, samples=[*task.samples[:4], replace(task.samples[4], target="9")]),
            {},
        ),
        lambda system, task: (retrain(system), task, {}),
    ],
)
def test_a_journal_of_another_evaluation_is_refused_and_untouched(
    system: RecursiveSystem, task: Task, tmp_path: Path, change: Callable[..., Any]
) -> None:
    journal = tmp_path / "journal.jsonl"
    evaluate(system, task, [Arm("none", 1)], sampling=SAMPLING, journal=journal)
    before = journal.read_text()
    other_system, other_task, options = change(system, task)
    with pytest.raises(OutputError, match="belongs to an evaluation with other settings"):
        evaluate(other_system, other_task, [Arm("none", 1)], journal=journal, **{"sampling": SAMPLING, **options})
    assert journal.read_text() == before


@pytest.mark.parametrize("content", [b"", b'{"num_lat'])
def test_a_journal_that_was_cut_in_its_first_line_is_begun_anew(
    system: RecursiveSystem, task: Task, tmp_path: Path, content: bytes
) -> None:
    journal = tmp_path / "answers.jsonl"
    journal.write_bytes(content)
    evaluate(system, task, [Arm("none", 1)], sampling=SAMPLING, journal=journal)
    assert len(journal.read_text().splitlines()) == 1 + len(task.samples)


@pytest.mark.parametrize("content", [b"years of work", b"years\nof\nwork\n", b"\xff\xfe\n", b"[1]\n"])
def test_a_file_that_is_no_journal_is_refused_and_untouched(
    system: RecursiveSystem, task: Task, tmp_path: Path, content: bytes
) -> None:
    journal = tmp_path / "thesis.txt"
    journal.write_bytes(content)
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        evaluate(system, task, [Arm("none", 1)], sampling=SAMPLING, journal=journal)
    assert journal.read_bytes() == content


def test_a_journal_that_cannot_be_written_is_an_output_error(
    system: RecursiveSystem, task: Task, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        evaluate(system, task, [Arm("none", 1)], sampling=SAMPLING, journal=tmp_path / "file" / "journal.jsonl")


# Equal time


def test_votes_are_what_the_answering_agent_alone_answers_most_often(task: Task, system: RecursiveSystem) -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=1, seed=2)
    first = {sample.id: Score(1.0, "", "") for sample in task.samples}

    def by_letter(text: str, target: str, metadata: Any) -> Score:
        return Score(1.0, text[:1].strip() or None, "its first letter")

    voting = replace(task, scorer=by_letter)
    log = evaluate(system, voting, [Arm("vote:9", 1)], sampling=sampling)
    solo = system.solo().run(
        [sample.question for sample in task.samples],
        num_rounds=1,
        sampling=sampling,
        instructions=task.instructions,
        keys=list(first),
        num_samples=9,
    )
    [answers] = log.answers.values()
    several = 0
    for answer, result in zip(answers, solo, strict=True):
        letters = [text[:1].strip() for text in result.samples if text[:1].strip()]
        assert answer.read in letters
        assert letters.count(answer.read or "") == max(map(letters.count, letters))
        assert answer.generated_tokens == result.usage.total("generated_tokens") >= 9
        several += len(set(letters)) > 1
    assert several > 0


def test_how_many_votes_fit_into_the_time_of_latent_is_measured_once(
    task: Task, system: RecursiveSystem, tmp_path: Path
) -> None:
    journal = tmp_path / "answers.jsonl"
    arms = plan_arms(["latent", "vote"], [1, 2], [])
    assert arms[-1] == Arm("vote", 1)
    log = evaluate(system, task, arms, sampling=SAMPLING, journal=journal)
    voted = list(log.answers)[-1]
    assert voted.kind == "vote"
    assert int(voted.argument) >= 2
    assert ("latent r=2", str(voted)) in [(str(a), str(b)) for a, b in log.pairs()]
    # Gone on with, it is the same number, whatever the clock says now.
    assert list(evaluate(system, task, arms, sampling=SAMPLING, journal=journal).answers)[-1] == voted


def test_votes_that_make_no_sense_are_refused(task: Task, system: RecursiveSystem) -> None:
    for name in ("vote:1", "vote:many"):
        with pytest.raises(ConfigError, match="2 or more"):
            Arm(name, 1)
    with pytest.raises(ConfigError, match="add latent, or say vote:8"):
        evaluate(system, task, [Arm("vote", 1)], sampling=SAMPLING)


def test_another_system_answers_as_it_is(task: Task, system: RecursiveSystem, tmp_path: Path) -> None:
    other = system.with_random_links(7)
    other.settings = other.settings.model_copy(update={"num_rounds": 3, "num_latent_steps": 1, "max_new_tokens": 2})
    other.save_pretrained(tmp_path / "other")
    log = evaluate(system, task, plan_arms(["latent", f"system:{tmp_path}/other"], [1], []), sampling=SAMPLING)
    assert [arm.rounds for arm in log.answers] == [1, 3]
    expected = other.run(
        [sample.question for sample in task.samples],
        sampling=SAMPLING,
        instructions=task.instructions,
        keys=[sample.id for sample in task.samples],
    )
    assert [answer.text for answer in list(log.answers.values())[1]] == [result.text for result in expected]
    assert len(log.pairs()) == 1
    with pytest.raises(ConfigError, match="system:DIR"):
        Arm("system", 1)


def test_the_best_of_what_is_as_fast_is_compared(task: Task, system: RecursiveSystem) -> None:
    log = evaluate(system, task, plan_arms(["latent", "text", "solo", "none"], [1, 2], []), sampling=SAMPLING)
    seconds = {"latent r=2": 1.0, "text r=1": 0.9, "text r=2": 1.2, "solo r=1": 0.1, "none r=2": 0.1}
    scores = {"latent r=2": 0.5, "text r=1": 0.4, "text r=2": 0.9, "solo r=1": 0.2, "none r=2": 1.0}
    for arm, answers in log.answers.items():
        made = (seconds.get(str(arm), 1.0), scores.get(str(arm), 0.0))
        log.answers[arm] = [replace(answer, seconds=made[0], score=made[1]) for answer in answers]
    found = log.equal_time()
    assert found is not None
    assert (found["b"], found["rounds_of_b"], found["rounds"]) == ("text", 1, 2)
    assert found["accuracy_difference"] == pytest.approx(0.1)
    del log.answers[Arm("text", 1)], log.answers[Arm("solo", 1)]
    assert log.equal_time() is None
