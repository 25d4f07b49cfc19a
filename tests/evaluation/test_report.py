"""Reports: the numbers are those of the log, the page stands alone, and nothing a user wrote is taken for markup."""

import html
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.evaluation.conftest import make_story, render

from recursivemas.errors import OutputError
from recursivemas.evaluation import report
from recursivemas.evaluation.runner import Answer, Arm, EvalLog, evaluate, plan_arms
from recursivemas.evaluation.scorers import exact, posterior
from recursivemas.evaluation.story import Story, story_text, tell
from recursivemas.evaluation.task import Sample, Task
from recursivemas.system import RecursiveSystem

LATENT, TEXT = Arm("latent", 2), Arm("text", 2, "short")


def make_log(scores: dict[Arm, list[float]], optimum: dict[int, float] | None = None, tokens: int = 30) -> EvalLog:
    """A log whose latent arm takes 2 ms and 3 tokens for an answer, and every other arm 4 ms and `tokens`."""
    num_questions = max(len(values) for values in scores.values())
    samples = [Sample(id=str(i), question=f"question {i}", target="yes") for i in range(num_questions)]
    task = Task(name="toy", samples=samples, scorer=posterior, optimum=optimum)
    answers = {
        arm: [
            Answer(
                id=str(i),
                text="yes",
                score=score,
                read="yes",
                finished=True,
                seconds=0.002 if arm.name == "latent" else 0.004,
                generated_tokens=3 if arm.name == "latent" else tokens,
                prompt_tokens=100,
                latent_steps=8 if arm.name == "latent" else 0,
                positions=110,
            )
            for i, score in enumerate(values)
        ]
        for arm, values in scores.items()
    }
    return EvalLog("toy", task, 4, 7, answers, {"device": "cpu", "dtype": "float32", "batch_size": 5, "sampling": None})


@pytest.fixture
def full_log() -> EvalLog:
    arms = plan_arms(["latent", "text", "solo", "none", "shuffled", "random-link"], [1, 2], ["short", "graded"])
    scores = {arm: [0.1 * ((3 * i + j) % 10) for j in range(6)] for i, arm in enumerate(arms)}
    return make_log(scores, {1: 0.8, 2: 0.9})


@pytest.fixture
def grouped_log(full_log: EvalLog) -> EvalLog:
    samples = [
        replace(each, metadata={"kind": ["<b>", "plain"][i % 2]}) for i, each in enumerate(full_log.task.samples)
    ]
    full_log.task = replace(full_log.task, samples=samples, group_by="kind")
    return full_log


def test_what_a_task_measures_has_columns(full_log: EvalLog, tmp_path: Path) -> None:
    assert "letters" not in render(report.table(full_log)) + write_page(full_log, tmp_path)
    for answers in full_log.answers.values():
        answers[:] = [replace(each, measures={"letters": 4.25}) for each in answers]
    assert "letters" in render(report.table(full_log))
    page = write_page(full_log, tmp_path)
    assert "letters" in page
    assert "4.250" in page


def test_groups_have_a_table_in_the_terminal_and_on_the_page(grouped_log: EvalLog, tmp_path: Path) -> None:
    shown = render(report.group_table(grouped_log))
    assert "accuracy by kind" in shown
    assert "<b>" in shown
    page = write_page(grouped_log, tmp_path)
    assert "Accuracy by kind" in page
    assert "&lt;b&gt;" in page
    assert "<th><b></th>" not in page
    for arm in grouped_log.answers:
        of_arm = [answer.score for answer in grouped_log.answers[arm]]
        assert f"{sum(of_arm[::2]) / 3:.3f}".removeprefix("0") in shown


def test_without_groups_there_is_no_such_table(full_log: EvalLog, tmp_path: Path) -> None:
    assert "Accuracy by" not in write_page(full_log, tmp_path)


def write_page(log: EvalLog, directory: Path, story: Story | None = None, **words: str) -> str:
    chapter = report.Chapter(log, story, **{"title": "A title", **words})
    file = report.write_html([chapter], directory)
    assert file == directory / "report.html"
    return file.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element of a page with its attributes; fails if tags do not match."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def attributes(self, *names: str) -> list[str]:
        return [value for _, attributes in self.found for name, value in attributes.items() if name in names and value]


# --- report.json ------------------------------------------------------------------------------------------------------


def test_json_holds_the_numbers_computed_by_hand(tmp_path: Path) -> None:
    log = make_log({LATENT: [1.0, 0.0, 0.5, 0.5], TEXT: [0.5, 0.0, 0.25, 0.25]}, {2: 0.75})
    data = json.loads(report.write_json(log, tmp_path / "new" / "place").read_text(encoding="utf-8"))
    assert (data["system"], data["task"], data["n"], data["seed"]) == ("toy", "toy", 4, 7)
    assert data["optimum"] == {"2": 0.75}
    latent, text = data["arms"]
    assert (latent["arm"], latent["variant"], latent["rounds"], latent["latent_steps"]) == ("latent", None, 2, 4)
    assert latent["accuracy"] == 0.5
    assert latent["stderr"] == pytest.approx(math.sqrt((0.25 + 0.25) / 3 / 4))
    assert (latent["generated_tokens"], latent["prompt_tokens"], latent["latent_steps_total"]) == (3, 100, 8)
    assert latent["seconds_per_question"] == pytest.approx(0.002)
    assert (text["variant"], text["accuracy"]) == ("short", 0.25)
    (compared,) = data["comparisons"]
    assert (compared["a"], compared["b"], compared["rounds"]) == ("latent", "text/short", 2)
    assert compared["accuracy_difference"] == 0.25
    assert compared["stderr"] == pytest.approx(math.sqrt((0.25**2 + 0.25**2) / 3 / 4))
    assert compared["speedup"] == pytest.approx(2.0)
    assert compared["token_reduction"] == pytest.approx(0.9)


def test_json_knows_no_error_of_one_question(tmp_path: Path) -> None:
    text = report.write_json(make_log({LATENT: [1.0], TEXT: [0.0]}), tmp_path).read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["arms"][0]["stderr"] is None


@pytest.mark.parametrize(
    "write", [report.write_json, lambda log, place: report.write_html([report.Chapter(log, None, "")], place)]
)
def test_a_place_that_cannot_be_written_to_is_one_line(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*report\.\w+: .*directory") as caught:
        write(make_log({LATENT: [1.0, 0.0]}), tmp_path / "file" / "below")
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = report.write_json(make_log({LATENT: [1.0, 0.0]}), tmp_path)
    before = file.read_text(encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        report.write_json(make_log({LATENT: [0.0, 0.0]}), tmp_path)
    assert file.read_text(encoding="utf-8") == before
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_table_shows_means_errors_costs_and_the_optimum() -> None:
    shown = render(report.table(make_log({LATENT: [1.0, 0.0, 0.5, 0.5], TEXT: [0.5, 0.0, 0.25, 0.25]}, {2: 0.75})))
    cells = [line.split() for line in shown.splitlines()]
    assert ["latent", "2", ".500", "±", ".204", "3", "8", "100", "2.0"] in cells
    assert ["text/short", "2", ".250", "±", ".102", "30", "0", "100", "4.0"] in cells
    assert ["optimum", "2", ".750"] in cells
    assert "exact probability" in shown  # says what its accuracy is


def test_table_can_be_shown_before_every_arm_has_answered() -> None:
    log = make_log({LATENT: [1.0, 0.0], TEXT: [0.5, 0.0]})
    shown = render(report.table({LATENT: log.answers[LATENT][:1], TEXT: []}, log.task))
    cells = [line.split() for line in shown.splitlines()]
    assert ["latent", "2", "1", "1.000", "3", "8", "100", "2.0"] in cells
    assert ["text/short", "2", "0", *"–––––"] in cells
    assert "text/short" in render(report.table({LATENT: [], TEXT: []}))


def test_comparisons_show_difference_error_p_speed_up_and_tokens() -> None:
    log = make_log({LATENT: [1.0, 0.0, 0.5, 0.5], TEXT: [0.5, 0.0, 0.25, 0.25]})
    p_value = log.to_dict()["comparisons"][0]["p_value"]
    shown = render(report.comparison_table(log))
    row = ["latent", "−", "text/short", "2", "+.250", "±", ".102", f"{p_value:.3f}"[1:], "2.00×", "90%"]
    assert row in [line.split() for line in shown.splitlines()]


def test_one_question_has_no_p_value() -> None:
    shown = render(report.comparison_table(make_log({LATENT: [1.0], TEXT: [0.0]})))
    assert ["latent", "−", "text/short", "2", "+1.000", "–", "2.00×", "90%"] in [
        line.split() for line in shown.splitlines()
    ]


# --- the numbers in words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "text", "verdict"),
    [
        ([0.9, 0.8, 0.9, 0.7], [0.2, 0.2, 0.1, 0.1], "latent is ahead by .675 ± "),
        ([0.2, 0.2, 0.1, 0.1], [0.9, 0.8, 0.9, 0.7], "latent is behind by .675 ± "),
        ([0.9, 0.2, 0.5, 0.5], [0.1, 0.9, 0.6, 0.6], "the difference of −.025 ± .309 may be chance"),
        ([0.9, 0.2, 0.5, 0.5], [0.9, 0.2, 0.5, 0.5], "the same on every question"),
        ([1.0], [0.0], "one question does not tell which is better"),
    ],
)
def test_headline_says_whichever_way_it_came_out(latent: list[float], text: list[float], verdict: str) -> None:
    said = report.headline(make_log({LATENT: latent, TEXT: text}))
    assert verdict in said
    assert "latent hand-offs generate 3 tokens where text/short generates 30 (90% fewer), beside 8 latent steps" in said
    assert "2.0 ms against 4.0 ms (2.00 times as fast)" in said


def test_headline_takes_the_best_text_protocol_of_the_same_rounds_and_names_a_better_one(full_log: EvalLog) -> None:
    scores = {LATENT: [0.6, 0.5], TEXT: [0.3, 0.2], Arm("text", 2, "graded"): [0.4, 0.3], Arm("text", 1): [0.9, 0.8]}
    said = report.headline(make_log(scores))
    assert "The best text protocol (text/graded) reaches .350 ± .050" in said
    assert "another number of rounds: text with .850 ± .050 at one round." in said


def test_headline_of_more_tokens_and_more_time_says_so() -> None:
    log = make_log({LATENT: [0.6, 0.5], TEXT: [0.3, 0.2]}, tokens=2)
    log.answers[LATENT], log.answers[TEXT] = log.answers[TEXT], log.answers[LATENT]
    said = report.headline(log)
    assert "generate 2 tokens where text/short generates 3 (33% fewer)" in said
    assert "(2.00 times as long)" in said


# --- report.html ------------------------------------------------------------------------------------------------------


def test_page_asks_for_nothing_from_outside(full_log: EvalLog, tmp_path: Path) -> None:
    page = write_page(full_log, tmp_path, make_story())
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in elements.found}
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    ids = elements.attributes("id")
    assert len(set(ids)) == len(ids)
    named = [each.removeprefix("#") for each in elements.attributes("src", "href", "xlink:href")]
    named += re.findall(r"url\(#?([^)]*)\)", page)
    assert set(named) <= set(ids)


def test_page_holds_every_arm_the_figures_and_the_story(full_log: EvalLog, tmp_path: Path) -> None:
    page = write_page(full_log, tmp_path, make_story(), intro="First.\n\nSecond.")
    for arm in full_log.answers:
        assert f'<th scope="row">{arm.label}</th><td>{arm.rounds}</td>' in page
    for expected in ("A title", "<p>First.</p>", "<p>Second.</p>", "fox", "river", ".75", "a fox, perhaps", "float32"):
        assert expected in page
    assert "hint, not a reading" in page
    assert html.unescape(page).count(report.headline(full_log)) == 1
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawn) == 2
    assert all("var(--series-0)" in figure and "#fa00" not in figure for figure in drawn)
    assert "text/graded" in drawn[0]
    assert "optimum" in drawn[0]


def test_page_escapes_what_users_wrote(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    log = make_log({LATENT: [0.5, 0.4], Arm("text", 2, f"{evil}$x$"): [0.1, 0.2]})
    log.system = evil
    page = write_page(log, tmp_path, make_story(evil, evil, evil), title=evil, intro=evil)
    assert "<script" not in page
    assert "alert(1)" in page
    Elements(page)


@pytest.mark.parametrize(
    "scores",
    [
        {LATENT: [0.5, 0.4]},
        {LATENT: [1.0]},
        {LATENT: [1.0], TEXT: [0.0]},
        {TEXT: [0.5, 0.4]},
        {Arm("solo", 1): [0.5, 0.4]},
        {LATENT: [0.0, 0.0], TEXT: [0.0, 0.0]},
        {LATENT: [0.5, 0.4], Arm("both", 2): [0.1, 0.2], Arm("zero", 2): [0.1, 0.2]},
    ],
    ids=["one arm", "one question", "one question, two arms", "text only", "solo only", "all wrong", "both and zero"],
)
def test_page_of_little(scores: dict[Arm, list[float]], tmp_path: Path) -> None:
    page = write_page(make_log(scores), tmp_path)
    Elements(page)
    assert all(f'<th scope="row">{arm.label}</th>' in page for arm in scores)
    assert "nan" not in re.sub(r"\w{4,}", "", page)
    assert "step by step" not in page


def test_page_tells_a_story_without_a_text_run(tmp_path: Path) -> None:
    page = write_page(make_log({LATENT: [0.5, 0.4]}), tmp_path, make_story(text=None))
    Elements(page)
    assert "river" in page
    assert "on the text channel" not in page


def test_page_folds_long_messages(tmp_path: Path) -> None:
    story = make_story()
    message = story.latent.trace.messages[0]
    message.norms = [1.0] * 20
    message.nearest = [[(f"word{number}", 0.5)] for number in range(20)]
    page = write_page(make_log({LATENT: [0.5, 0.4]}), tmp_path, story)
    assert page.index("word11") < page.index("<summary>8 more</summary>") < page.index("word12")
    assert "The first 4 of 20 latents" in render(story_text(story))


def test_page_says_what_was_cut_off(full_log: EvalLog, tmp_path: Path) -> None:
    assert "cut<br>off" not in write_page(full_log, tmp_path)
    answers = next(iter(full_log.answers.values()))
    answers[0] = Answer(**{**answers[0].__dict__, "finished": False})
    assert "cut<br>off" in write_page(full_log, tmp_path)


def test_a_real_evaluation_and_its_story_become_a_page(
    system: RecursiveSystem, questions: list[str], tmp_path: Path
) -> None:
    samples = [Sample(id=str(i), question=question, target="yes") for i, question in enumerate(questions[:3])]
    task = Task(name="toy", samples=samples, scorer=exact)
    log = evaluate(system, task, plan_arms(["latent", "text"], [1], []), num_latent_steps=2, batch_size=3)
    story = tell(system, samples[1], rounds=1, scorer=exact, num_latent_steps=2)
    page = write_page(log, tmp_path, story)
    Elements(page)
    words = html.unescape(page)
    for message in story.latent.trace.messages:
        for tokens in message.nearest or []:
            assert all(f"<b>{token}</b>" in words for token, _ in tokens)
    assert json.loads(report.write_json(log, tmp_path).read_text(encoding="utf-8"))["n"] == 3
