"""Reports: what an evaluation found, as data, in the terminal and as a page.

    report.json    `write_json`: the numbers of `EvalLog.to_dict`, for programs
    report.html    `write_html`: one page that needs nothing from outside, for people
    terminal       `table` (also while the evaluation runs), `comparison_table`
    headline       `headline`: the numbers in words

Every sentence of the page that holds a number is made from the numbers, whichever way they came out. The page's words
and looks are in bundled/report/report.html.j2. Knows logs, stories and figures; knows nothing of worlds, of training,
of how an answer came about, or of how a figure is drawn.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from recursivemas.checkpoint import library_version
from recursivemas.errors import OutputError
from recursivemas.evaluation import figures
from recursivemas.evaluation.figures import (
    Row,
    column,
    count,
    decimal,
    measured,
    percent,
    rows_of,
    say_rounds,
    with_error,
)
from recursivemas.evaluation.runner import ALONE, Answer, Arm, EvalLog
from recursivemas.evaluation.scorers import Scorer
from recursivemas.evaluation.story import Story
from recursivemas.evaluation.task import Task

TEMPLATES = Path(__file__).parents[1] / "bundled" / "report"

NUM_LATENTS = 12
"""Of a longer message the page folds the rest away."""

ACCURACY = {
    "posterior": (
        "the mean exact probability, given everything in the case, of the answer that was chosen: "
        "the same expectation as the share of right answers, with less noise"
    ),
    "exact": "the share of answers that equal the target",
    "numeric": "the share of answers whose last number equals the target",
    "stated": "the share of answers that state the target at their end",
}

ARM_NOTES = {
    "latent": "the agents hand each other latents",
    "text": "the same agents, prompts and rounds, handing each other text",
    "both": "each message is latents, followed by text",
    "solo": "the answering agent alone, with a prompt of its own",
    "none": "the answering agent with empty slots where messages would be",
    "zero": "messages of zeros",
    "shuffled": "each reader gets the messages of another question; their cost is not counted",
    "random-link": "the links are drawn anew, as loud as the trained ones",
    "no-feedback": "edges that lead back to an earlier stage are closed",
    "no-tools": "the agents hand each other latents, and the answering one has no tools",
    "vote": "the answering agent alone, sampled so many times; what is answered most often counts",
    "system": "another system, as it is",
}


# --- the terminal -----------------------------------------------------------------------------------------------------


def table(source: EvalLog | Mapping[Arm, Sequence[Answer]], task: Task | None = None) -> Table:
    """All arms with accuracy and costs per question, and the optimum.

    Takes a log, or the answers there are while an evaluation runs (then `task` tells the optimum and the scorer).
    """
    answers, task = (source.answers, source.task) if isinstance(source, EvalLog) else (source, task)
    rows = rows_of(answers)
    wanted = len(task.samples) if task is not None else max((row.n for row in rows), default=0)
    is_running = any(row.n < wanted for row in rows)
    counted = ["n"] if is_running else []
    measures = measured(rows)
    view = _new_table("arm", "rounds", *counted, "accuracy", *measures, *(heading for _, heading in _TERMINAL_COSTS))
    columns = [*measures.values(), *(column(rows, name) for name, _ in _TERMINAL_COSTS)]
    for number, row in enumerate(rows):
        cells = [str(row.arm.rounds), *([str(row.n)] if is_running else []), _score(row) if row.n else "–"]
        is_last = number + 1 == len(rows) or _group(rows[number + 1].arm.label) != _group(row.arm.label)
        style = "bold" if row.arm.name == "latent" else ""
        view.add_row(Text(row.arm.label), *cells, *(each[number] for each in columns), style=style, end_section=is_last)
    for rounds, value in _optimum(task).items():
        view.add_row("optimum", str(rounds), *([""] if is_running else []), decimal(value) + _NO_ERROR, style="italic")
    if task is not None:
        view.caption = Text(f"accuracy: {_what_accuracy_is(task.scorer)}")
    return view


_TERMINAL_COSTS = (
    ("generated_tokens", "generated\ntokens"),
    ("latent_steps", "latent\nsteps"),
    ("prompt_tokens", "prompt\ntokens"),
    ("milliseconds", "ms per\nquestion"),
)
_NO_ERROR = " " * len(" ± .000")


def _new_table(first: str, *others: str) -> Table:
    view = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left", caption_style="dim")
    view.add_column(first, no_wrap=True, vertical="bottom")
    for heading in others:
        view.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return view


def _group(label: str) -> str:
    """What stands together in a table: the rounds of one protocol, and all controls."""
    return label if label.split("/")[0] in figures.PROTOCOLS else "controls"


def _what_accuracy_is(scorer: Scorer) -> str:
    name = getattr(scorer, "__name__", "score")
    return ACCURACY.get(name, f"the mean score by '{name}'")


def _optimum(task: Task | None) -> dict[int, float]:
    return dict(sorted((task.optimum or {}).items())) if task is not None else {}


def comparison_table(log: EvalLog) -> Table:
    """How the latent arm differs from the others on the same questions."""
    view = _new_table("compared", "rounds", "accuracy\ndifference", "p", "speed-up", "fewer\ntokens")
    for each in _comparisons(log):
        view.add_row(Text(f"{each['a']} − {each['b']}"), str(each["rounds"]), *_comparison_cells(each))
    view.caption = Text("paired t-tests on the same questions, not corrected for their number")
    return view


def group_table(log: EvalLog) -> Table:
    """Accuracy of every arm by the values of the metadata that the task is grouped by."""
    groups = _groups(log)
    view = _new_table("arm", "rounds", *groups["values"])
    for label, rounds, cells in groups["rows"]:
        view.add_row(Text(label), str(rounds), *cells)
    view.add_row("questions", "", *groups["counts"], style="dim")
    view.caption = Text(f"accuracy by {groups['key']}")
    return view


def _groups(log: EvalLog) -> dict[str, Any]:
    """Accuracy by group as cells of a table; without groups, a table of nothing."""
    key, found = log.task.group_by or "", log.groups()
    values = list(dict.fromkeys(each[key] for each in found))
    rows = [
        (arm.label, arm.rounds, [decimal(each["accuracy"]) for each in found if _arm_of(each) == arm])
        for arm in (log.answers if found else ())
    ]
    counts = [str(each["n"]) for each in found[:: len(log.answers)]]
    return {"key": key, "values": [str(value) for value in values], "rows": rows, "counts": counts}


def _arm_of(record: Mapping[str, Any]) -> Arm:
    return Arm(record["arm"], record["rounds"], record["variant"])


def _comparisons(log: EvalLog) -> list[dict[str, Any]]:
    """Comparisons with one arm next to each other, by rounds."""
    found: list[dict[str, Any]] = log.to_dict()["comparisons"]
    labels = list(dict.fromkeys(each["b"] for each in found))
    return sorted(found, key=lambda each: (labels.index(each["b"]), each["rounds"]))


def _comparison_cells(comparison: Mapping[str, Any]) -> list[str]:
    return [
        with_error(comparison["accuracy_difference"], comparison["stderr"], signed=True),
        _p_value(comparison["p_value"]),
        "–" if comparison["speedup"] is None else f"{comparison['speedup']:.2f}×",
        percent(comparison["token_reduction"]),
    ]


def _p_value(p_value: float | None) -> str:
    return "< .001" if p_value is not None and p_value < 0.001 else decimal(p_value)


# --- the numbers in words ---------------------------------------------------------------------------------------------


def headline(log: EvalLog) -> str:
    """What came out, as a paragraph of plain text made from the numbers."""
    rows = [row for row in rows_of(log.answers) if row.n]
    subjects = [row for row in rows if row.arm.name == "latent"]
    if not subjects:
        best = max(rows, key=_value)
        return f"The best of {len(rows)} arms is {_described(best)}."
    subject = subjects[-1]
    sentences = [
        _say_latent(subjects),
        *_say_text(log, subject, [row for row in rows if row.arm.name == "text"]),
        _say_controls(rows),
        _say_equal_time(log),
        _say_optimum(log.task, subject),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _described(row: Row) -> str:
    return f"{row.arm.label} with {_score(row)} at {say_rounds(row.arm.rounds)}"


def _score(row: Row) -> str:
    return with_error(row.accuracy.value, row.accuracy.stderr)


def _say_latent(subjects: list[Row]) -> str:
    first, last = subjects[0], subjects[-1]
    start = f", from {_score(first)} at {say_rounds(first.arm.rounds)}" if first is not last else ""
    return f"Latent hand-offs reach {_score(last)} at {say_rounds(last.arm.rounds)}{start}."


def _say_text(log: EvalLog, subject: Row, texts: list[Row]) -> list[str]:
    """Against the text protocol that did best at the same number of rounds."""
    equals = [row for row in texts if row.arm.rounds == subject.arm.rounds]
    if not equals:
        return [f"The best text protocol is {_described(max(texts, key=_value))}."] if texts else []
    rival, best = max(equals, key=_value), max(texts, key=_value)
    compared = next(
        each
        for each in log.to_dict()["comparisons"]
        if (each["b"], each["rounds"]) == (rival.arm.label, subject.arm.rounds) and each["a"] == "latent"
    )
    which = "The best text protocol ({}) reaches" if len(equals) > 1 else "Text hand-offs ({}) reach"
    said = [f"{which.format(rival.arm.label)} {_score(rival)}: {_verdict(compared)}.", _say_cost(subject, rival)]
    if best.accuracy.value > rival.accuracy.value:
        said.insert(1, f"Text does better still with another number of rounds: {_described(best)}.")
    return said


def _value(row: Row) -> float:
    return row.accuracy.value


def _verdict(comparison: Mapping[str, Any]) -> str:
    difference, stderr, p_value = (comparison[name] for name in ("accuracy_difference", "stderr", "p_value"))
    if stderr is None or p_value is None:
        return "one question does not tell which is better"
    if difference == 0 and stderr == 0:
        return "the same on every question"
    test = f"paired t-test, p {'' if p_value < 0.001 else '= '}{_p_value(p_value)}"
    if p_value >= 0.05:
        return f"the difference of {with_error(difference, stderr, signed=True)} may be chance ({test})"
    side = "ahead" if difference > 0 else "behind"
    return f"latent is {side} by {with_error(abs(difference), stderr)}, more than chance explains ({test})"


def _say_cost(subject: Row, rival: Row) -> str:
    ours, theirs = subject.costs, rival.costs
    saved = 1 - ours["generated_tokens"] / theirs["generated_tokens"] if theirs["generated_tokens"] else 0.0
    share = f" ({percent(abs(saved))} {'fewer' if saved > 0 else 'more'})" if saved else ""
    our_time, their_time = column([subject, rival], "milliseconds")
    ratio = theirs["milliseconds"] / max(ours["milliseconds"], 1e-12)
    pace = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / max(ratio, 1e-12):.2f} times as long"
    return (
        f"For an answer latent hand-offs generate {count(ours['generated_tokens'])} tokens where {rival.arm.label} "
        f"generates {count(theirs['generated_tokens'])}{share}, beside {count(ours['latent_steps'])} latent steps, "
        f"and take {our_time} ms against {their_time} ms ({pace})."
    )


def _say_controls(rows: list[Row]) -> str:
    phrases = {
        "solo": "the answering agent alone gets {}",
        "none": "empty slots give {}",
        "zero": "messages of zeros give {}",
        "shuffled": "messages of another question give {}",
        "random-link": "links drawn anew give {}",
        "no-feedback": "without the feedback of earlier rounds it is {}",
        "no-tools": "without tools it is {}",
    }
    found = [phrases[row.arm.name].format(_score(row)) for row in rows if row.arm.name in phrases]
    of_a_role = {
        "solo": "the {} alone gets {}",
        "none": "without the messages of the {} it is {}",
        "shuffled": "with another question's messages of the {} it is {}",
    }
    found += [of_a_role[row.arm.kind].format(row.arm.role, _score(row)) for row in rows if row.arm.role]
    matched = {"vote": "{} votes of the answering agent alone get {}", "system": "the system {} gets {}"}
    found += [matched[row.arm.kind].format(row.arm.argument, _score(row)) for row in rows if row.arm.kind in matched]
    return f"Controls: {'; '.join(found)}." if found else ""


def _say_equal_time(log: EvalLog) -> str:
    """Against the best of everything that is as fast."""
    found = log.equal_time()
    if found is None:
        return ""
    is_alone = found["b"].partition(":")[0] in ALONE
    rounds = "" if is_alone else f" at {say_rounds(found['rounds_of_b'])}"
    return f"Of all that takes no longer, {found['b']}{rounds} does best: {_verdict(found)}."


def _say_optimum(task: Task, subject: Row) -> str:
    best = _optimum(task).get(subject.arm.rounds)
    if best is None:
        return ""
    return f"A perfect reader of all that {say_rounds(subject.arm.rounds)} can uncover would get {decimal(best)}."


# --- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chapter:
    """One evaluation on a page."""

    log: EvalLog
    story: Story | None
    title: str
    intro: str = ""
    file: str = "report.json"
    """Where its numbers are."""


def write_json(log: EvalLog, directory: Path, name: str = "report.json") -> Path:
    """Write the numbers, complete or not at all. Raises `OutputError`."""
    return _write(directory / name, json.dumps(log.to_dict(), indent=2, ensure_ascii=False) + "\n")


def write_html(chapters: Sequence[Chapter], directory: Path) -> Path:
    """Write `report.html`: for each evaluation the numbers in words, tables and figures, and the story if there is one.

    The page needs nothing from outside, and everything that is not ours is escaped. Raises `OutputError`.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decimal": decimal}
    page = environment.get_template("report.html.j2").render(
        title=chapters[0].title,
        version=library_version(),
        parts=[Markup(_part(environment, chapter)) for chapter in chapters],
        files=[chapter.file for chapter in chapters],
    )
    return _write(directory / "report.html", page)


def _part(environment: Environment, chapter: Chapter) -> str:
    """One evaluation as the markup of its part of the page."""
    log = chapter.log
    rows = [row for row in rows_of(log.answers) if row.n]
    return environment.get_template("evaluation.html.j2").render(
        title=chapter.title,
        intro=[part for part in chapter.intro.split("\n\n") if part.strip()],
        headline=headline(log),
        log=log,
        num_questions=max(row.n for row in rows),
        settings=_settings(log),
        accuracy=_what_accuracy_is(log.task.scorer),
        groups=[list(group) for _, group in itertools.groupby(enumerate(rows), lambda pair: _group(pair[1].arm.label))],
        columns=_html_columns(rows),
        optimum=_optimum(log.task),
        has_cut=any(row.cut or row.unscorable for row in rows),
        comparisons=_comparison_groups(log),
        by_group=_groups(log),
        arm_notes={row.arm.name: _arm_note(row.arm) for row in rows},
        legend=figures.legend(rows),
        accuracy_figure=figures.draw_accuracy(rows, _optimum(log.task)),
        cost_figure=figures.draw_cost(rows),
        story=chapter.story,
        num_shown=NUM_LATENTS,
    )


def _arm_note(arm: Arm) -> str:
    of_a_role = {
        "solo": f"the {arm.role} alone, with a prompt of its own",
        "none": f"the {arm.role} sends nothing",
        "shuffled": f"of the {arm.role}, readers get the messages of another question",
    }
    return of_a_role[arm.kind] if arm.role else ARM_NOTES[arm.kind]


def _html_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Costs by heading, one cell for each row; what went wrong has columns only if something did."""
    names = ("generated_tokens", "latent_steps", "prompt_tokens", "positions", "milliseconds")
    costs = {{"milliseconds": "ms"}.get(name, name.replace("_", " ")): column(rows, name) for name in names}
    columns = measured(rows) | costs
    if any(row.cut for row in rows):
        columns["cut off"] = [percent(row.cut) for row in rows]
    if any(row.unscorable for row in rows):
        columns["not scorable"] = [percent(row.unscorable) for row in rows]
    return columns


def _comparison_groups(log: EvalLog) -> list[list[tuple[dict[str, Any], list[str]]]]:
    """Comparisons with their cells; those with one protocol together, and those with all controls."""
    pairs = [(each, _comparison_cells(each)) for each in _comparisons(log)]
    return [list(members) for _, members in itertools.groupby(pairs, lambda pair: _group(pair[0]["b"]))]


def _settings(log: EvalLog) -> dict[str, str]:
    """The settings of a run, in the words of the page."""
    settings = {**log.settings, "sampling": log.settings.get("sampling") or "greedy"}
    if isinstance(settings["sampling"], Mapping):
        settings["sampling"] = ", ".join(f"{name} {value}" for name, value in settings["sampling"].items())
    names = {"num_latent_steps": "latent steps per turn"}
    return {names.get(name, name.replace("_", " ")): str(value) for name, value in settings.items()}


def _write(file: Path, text: str) -> Path:
    """Put a file in its place in one step, so that nobody ever reads half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as place:
            draft = Path(place) / file.name
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}; choose another directory") from None
    return file
