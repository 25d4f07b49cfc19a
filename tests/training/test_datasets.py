"""Data sets: every form of file, columns of the released sets, splits by hash, and what is too long, empty or missing."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import make_model

from recursivemas.config import parse
from recursivemas.errors import ConfigError, InputError, RecursiveMASError
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.prompts import PromptSet
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question, RoleSample, cut_text, encode_turns, fit_questions
from recursivemas.training.datasets import Counts, DataSets, Limits, Source, read_data
from recursivemas.training.inner import collect_pairs
from recursivemas.training.recipe import Material, Recipe
from recursivemas.worlds.material import likelihood, material_of
from recursivemas.worlds.splits import split_of

ROWS = [{"question": f"What is {n} + 2?", "answer": n + 2, "plan": f"Add 2 to {n}."} for n in range(40)]
AGENTS = {"planner": "a", "critic": "b", "solver": "c"}


def write_jsonl(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def recipe(data: object, **settings: object) -> Recipe:
    return parse(Recipe, {"agents": AGENTS, "output": "x", "data": data, **settings}, where="a recipe")


def material(data: object, pattern: str = "sequential", **settings: object) -> Material:
    return material_of(recipe(data, **settings), Pattern.load(pattern))


# Files


def as_json(place: Path) -> Path:
    (place / "rows.json").write_text(json.dumps({"data": ROWS}))
    return place / "rows.json"


def as_list(place: Path) -> Path:
    (place / "list.json").write_text(json.dumps(ROWS))
    return place / "list.json"


def as_csv(place: Path) -> Path:
    text = "question,answer,plan\r\n" + "".join(
        f'{row["question"]},{row["answer"]},"{row["plan"]}"\r\n' for row in ROWS
    )
    (place / "rows.csv").write_text("\ufeff" + text, encoding="utf-8")
    return place / "rows.csv"


def as_parquet(place: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(str(place / "rows.parquet"))
    return place / "rows.parquet"


def on_disk(place: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(place / "disk"))
    return place / "disk"


def on_disk_in_splits(place: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(place / "splits"))
    return place / "splits"


@pytest.mark.parametrize("write", [as_json, as_list, as_csv, as_parquet, on_disk, on_disk_in_splits])
def test_every_form_holds_the_same_rows(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    expected = read_data(Source(path=write_jsonl(tmp_path / "rows.jsonl", ROWS)))
    found = read_data(Source(path=str(write(tmp_path))))
    assert found.columns == expected.columns == ("question", "answer", "plan")
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert {name: str(value) for name, value in row.values.items()} == {
            name: str(value) for name, value in other.values.items()
        }
    if write is not as_csv:
        assert found.fingerprint() == expected.fingerprint()


def test_a_line_is_named_by_its_number_though_others_are_blank(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"question": "Why?", "answer": "So."}\n\n{"question": 3, "answer": "x"}\n')
    data = read_data(Source(path=str(tmp_path / "rows.jsonl")))
    assert [row.number for row in data.rows] == [2, 4]
    with pytest.raises(InputError, match="rows.jsonl, line 4: the column 'question' is not text, but int"):
        data.text(data.rows[1], "question")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "{bad", "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", "\n", "a.jsonl holds no rows"),
        ("a.json", '{"rows": []}', "a.json: expected a list of objects, alone or under the key 'data'"),
        ("a.json", '{"data": [3]}', "a.json, row 1: expected a JSON object"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv, row 1: it has more or fewer fields"),
        ("a.csv", "a,b\n1\n", "a.csv, row 1: it has more or fewer fields"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot read .*a.jsonl"),
        ("a.jsonl", None, "there is no file .*a.jsonl"),
        ("a.parquet", "no parquet", "cannot read the data set .*a.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: object, words: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(InputError, match=words):
        read_data(Source(path=str(tmp_path / name)))


def test_the_hub_needs_an_extra_and_files_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in ("RecursiveMAS/Sequential-Math", str(tmp_path), "rows.parquet"):
        with pytest.raises(ConfigError, match=r"pip install recursivemas\[data\]"):
            read_data(Source(path=path))
    assert len(read_data(Source(path=write_jsonl(tmp_path / "rows.jsonl", ROWS))).rows) == 40
    with pytest.raises(ConfigError, match=r"recursivemas\[data\]"):
        recipe("openai/gsm8k").data.check_sources()  # type: ignore[union-attr]


def test_a_set_that_cannot_be_had_is_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="cannot read the data set nobody/nothing"):
        read_data(Source(path="nobody/nothing"))


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown split 'trian': did you mean 'train'"):
        read_data(Source(path=str(on_disk_in_splits(tmp_path)), split="trian"))


# Columns


def texts(*names: str) -> dict[str, str]:
    return {name: f"<{name}>" for name in names}


RELEASED = {
    # The columns of the released sets, and what each role reads and writes, by round; then what is to be answered.
    "sequential": (
        texts("plan", "refined_plan", "answer", "answer_field"),
        {
            "planner": {1: ("<plan>", {}), 2: ("<plan>", {"solver": "<answer>"})},
            "critic": {
                1: ("<refined_plan>", {"planner": "<plan>"}),
                2: ("<refined_plan>", {"planner": "<plan>"}),
            },
            "solver": {1: ("<answer>", {"critic": "<refined_plan>"})},
        },
        "<answer>",
    ),
    "mixture": (
        texts("answer", "hie_math_expert", "hie_code_expert", "hie_science_expert", "hie_summarizer"),
        {
            "math": {1: ("<hie_math_expert>", {}), 2: ("<hie_math_expert>", {"summarizer": "<hie_summarizer>"})},
            "code": {1: ("<hie_code_expert>", {}), 2: ("<hie_code_expert>", {"summarizer": "<hie_summarizer>"})},
            "science": {
                1: ("<hie_science_expert>", {}),
                2: ("<hie_science_expert>", {"summarizer": "<hie_summarizer>"}),
            },
            "summarizer": {
                1: (
                    "<hie_summarizer>",
                    {"math": "<hie_math_expert>", "code": "<hie_code_expert>", "science": "<hie_science_expert>"},
                )
            },
        },
        "<answer>",
    ),
    "distillation": (
        texts("refined_plan", "answer", "distill_expert", "distill_learner", "task_family", "domain"),
        {
            "expert": {1: ("<distill_expert>", {}), 2: ("<distill_expert>", {"learner": "<distill_learner>"})},
            "learner": {1: ("<distill_learner>", {"expert": "<distill_expert>"})},
        },
        "<distill_learner>",
    ),
    "deliberation": (
        texts("answer", "deliberation_reflector", "deliberation_toolcaller", "tool_type"),
        {
            "reflector": {
                1: ("<deliberation_reflector>", {}),
                2: ("<deliberation_reflector>", {"toolcaller": "<deliberation_toolcaller>"}),
            },
            "toolcaller": {1: ("<deliberation_toolcaller>", {"reflector": "<deliberation_reflector>"})},
        },
        "<deliberation_toolcaller>",
    ),
}


@pytest.mark.parametrize("pattern", list(RELEASED))
def test_columns_of_the_released_sets_are_known(tmp_path: Path, pattern: str) -> None:
    columns, roles, answer = RELEASED[pattern]
    rows = [{"question": f"Question {n}?", **columns} for n in range(30)]
    found = material(write_jsonl(tmp_path / "released.jsonl", rows), pattern)
    for role, expected in roles.items():
        turns = found.turns(role, 100)
        found_turns = {turn.round: (turn.target, dict(turn.messages)) for turn in turns}
        if role == Pattern.load(pattern).answers:
            # In the last round it speaks.
            assert found_turns.pop(2) == (answer, expected[1][1])
        assert found_turns == expected
        assert {turn.num_rounds for turn in turns} == {2}
    questions = found.questions("train", 100)
    assert {each.answer for each in questions} == {answer}
    answers = Pattern.load(pattern).answers
    assert questions[0].targets == {role: each[1][0] for role, each in roles.items() if role != answers}


def test_each_role_may_have_a_set_of_its_own(tmp_path: Path) -> None:
    """As in the paper's mixture: a set for each specialist, with no text of the others."""
    inner = {}
    for role in ("math", "code", "science"):
        rows = [{"question": f"{role} {n}?", "answer": "So.", f"hie_{role}_expert": f"{role}."} for n in range(20)]
        inner[role] = write_jsonl(tmp_path / f"{role}.jsonl", rows)
    rows = [{"question": f"All {n}?", **RELEASED["mixture"][0]} for n in range(20)]
    inner["*"] = outer = write_jsonl(tmp_path / "outer.jsonl", rows)
    found = material({"inner": inner, "outer": outer}, "mixture")
    assert {turn.target for turn in found.turns("code", 100)} == {"code."}
    assert {turn.question[:4] for turn in found.turns("code", 100)} == {"code"}
    assert {turn.question[:3] for turn in found.turns("summarizer", 100)} == {"All"}
    assert {question.text[:3] for question in found.questions("train", 100)} == {"All"}


def test_columns_are_named_in_the_recipe(tmp_path: Path) -> None:
    rows = [{"problem": f"P{n}", "solution": "S", "draft": "D", "better": "B", "plan": "wrong"} for n in range(30)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    columns = {"question": "problem", "answer": "solution", "planner": "draft"}
    found = material({"outer": {"path": path, "columns": {"critic": "better"}}, "columns": columns})
    assert {turn.target for turn in found.turns("planner", 9)} == {"D"}
    assert {turn.target for turn in found.turns("critic", 9)} == {"B"}
    assert {turn.target for turn in found.turns("solver", 9)} == {"S"}
    assert found.questions("train", 9)[0].text.startswith("P")


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"question": "Q", "anser": "A"}, {}, r"unknown column 'answer': did you mean 'anser'\? \(known: anser, quest"),
        (
            {"qestion": "Q", "answer": "A"},
            {},
            "unknown column 'question': did you mean 'qestion'.*data.columns.question",
        ),
        (
            {"question": "Q", "answer": "A"},
            {"columns": {"answer": "solution"}},
            "unknown column 'solution'.*named by data.columns.answer",
        ),
        ({"question": "Q", "answer": "A"}, {"columns": {"anwser": "x"}}, "content of a column 'anwser'.*'answer'"),
        ({"question": "Q", "answer": "A"}, {"inner": {"plannr": "x"}}, "unknown role 'plannr': did you mean 'planner'"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, row: dict, settings: dict, words: str) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [row] * 20)
    with pytest.raises((InputError, ConfigError), match=words):
        material({"outer": path, **settings})


def test_a_role_without_a_column_is_named_when_it_is_needed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", ROWS)
    found = material(path)
    assert found.turns("planner", 100)
    with pytest.raises(InputError, match="unknown column 'critic'.*data.columns.critic.*recursivemas data build"):
        found.turns("critic", 100)
    assert "critic" not in found.questions("train", 9)[0].targets


# Splits


def test_questions_are_split_by_a_hash_that_never_changes(tmp_path: Path) -> None:
    # A change of these would put questions that were trained on among those that judge.
    assert [split_of(f"What is {n} + 2?") for n in range(8)] == SPLIT_OF_EIGHT
    counted = Counter(split_of(f"Question number {n}") for n in range(4000))
    assert counted["train"] == pytest.approx(3200, abs=100)
    assert counted["validation"] == pytest.approx(400, abs=80)
    found = material(write_jsonl(tmp_path / "own.jsonl", ROWS))
    by_split = {split: {each.text for each in found.questions(split, 100)} for split in ("train", "validation")}
    assert all(split_of(text) == split for split, asked in by_split.items() for text in asked)
    assert {turn.question for turn in found.turns("planner", 100)} == by_split["train"]
    assert len(by_split["train"]) + len(by_split["validation"]) < len(ROWS)  # the rest is kept for tests


SPLIT_OF_EIGHT = ["train", "train", "train", "train", "validation", "train", "train", "train"]


def test_a_validation_set_of_ones_own_leaves_all_rows_for_training(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS[:30])
    validation = write_jsonl(tmp_path / "validation.jsonl", ROWS[30:])
    found = material({"outer": train, "validation": validation})
    assert len(found.questions("train", 100)) == 30
    assert [each.id for each in found.questions("validation", 100)] == [f"validation-{n}" for n in range(1, 11)]
    assert len({turn.question for turn in found.turns("planner", 100)}) == 30
    # A link must not be trained on what judges it either.
    shared = material({"outer": train, "inner": validation, "validation": validation})
    with pytest.raises(InputError, match=r"10 of 10 validation questions are train \(planner\) questions"):
        shared.turns("planner", 100)


def test_a_set_of_one_row_is_refused_with_what_to_do(tmp_path: Path) -> None:
    found = material(write_jsonl(tmp_path / "one.jsonl", ROWS[:1]))
    split = split_of(ROWS[0]["question"])
    assert len(found.questions(split, 5)) == 1
    other = "validation" if split == "train" else "train"
    with pytest.raises(InputError, match=f"none of its 1 questions is of the split '{other}'.*data.validation"):
        found.questions(other, 5)


def test_every_row_is_used_before_one_is_used_twice(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "all.jsonl", [{**row, "critic": "Check."} for row in ROWS])
    other = write_jsonl(tmp_path / "v.jsonl", [{"question": "Else?", "answer": "x"}])
    turns = material({"outer": rows, "validation": other}).turns("critic", 40)
    assert len(turns) == 80
    assert len({turn.question for turn in turns[:40]}) == 40
    assert {turn.round for turn in turns[:40]} == {1, 2}
    assert {(turn.question, turn.round) for turn in turns} == {(row["question"], r) for row in ROWS for r in (1, 2)}
    # Fewer are drawn from the seed: not the first ones, and the same ones every time.
    few = [material({"outer": rows, "validation": other}, seed=1).turns("critic", 8) for _ in range(2)]
    assert few[0] == few[1]
    assert {turn.question for turn in few[0]} != {row["question"] for row in ROWS[:8]}


# Empty and long


def test_empty_rows_are_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    trained = [place for place, row in enumerate(rows) if split_of(row["question"]) == "train"]
    rows[trained[1]]["plan"] = " "
    rows[trained[2]]["answer"] = None  # type: ignore[assignment]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    strict, lax = material(path), material({"outer": path, "on_empty": "skip"})
    with pytest.raises(InputError, match=f"line {trained[1] + 1}: the column 'plan' is empty.*data.on_empty: skip"):
        strict.turns("planner", 100)
    with pytest.raises(InputError, match=f"line {trained[2] + 1}: the column 'answer' is empty"):
        strict.questions("train", 100)
    assert len(lax.questions("train", 100)) == len(trained) - 1
    assert lax.counts["train"] == Counts(used=len(trained) - 1, empty=1)
    # The planner needs the answer as well, which comes back to it.
    assert len(lax.turns("planner", 100)) == 2 * (len(trained) - 2)
    assert lax.counts["planner"].empty == 2
    for row in rows:
        row["question"] = ""
    with pytest.raises(InputError, match="none of its 0 questions|column 'question' is empty"):
        material({"outer": write_jsonl(path_of(tmp_path), rows), "on_empty": "skip"}).questions("train", 9)


def path_of(place: Path) -> Path:
    return place / "again.jsonl"


@pytest.fixture(scope="module")
def short() -> LanguageModel:
    """A model that reads 200 positions."""
    return make_model("qwen2", max_position_embeddings=200)


def sample(words: int, question: str = "Why?") -> RoleSample:
    return RoleSample(role="planner", question=question, target="fox " * words + "dawn.")


def test_long_turns_are_refused_left_out_or_cut(short: LanguageModel) -> None:
    prompts = PromptSet.load({"name": "p", "roles": {"planner": {"always": "{question}"}}})
    samples = [sample(3), sample(300), sample(2)]

    def encode(on_long: str, **limits: int) -> tuple[list, Counts]:
        counts = Counts()
        return encode_turns(samples, short, prompts, limits=Limits(on_long, **limits), counts=counts), counts  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"a turn of the planner needs \d+ positions of 200 .*data.on_long: truncate"):
        encode("refuse")
    turns, counts = encode("skip")
    assert [turn.target for turn in turns] == [samples[0].target, samples[2].target]
    assert counts == Counts(used=2, too_long=1)
    turns, counts = encode("truncate")
    assert [turn.is_cut for turn in turns] == [False, True, False]
    whole, cut = short.encode(samples[1].target), turns[1]
    assert len(cut.prompt_ids) + len(cut.target_ids) <= 200
    assert len(cut.prompt_ids) + len(cut.target_ids) >= 197  # all the room is used
    assert samples[1].target.startswith(cut.target)
    assert cut.target_ids == short.encode(cut.target)
    assert counts == Counts(used=3, truncated=1, cut_tokens=len(whole) - (200 - len(cut.prompt_ids)))
    shorter, _ = encode("truncate", max_length=60)
    assert len(shorter[1].prompt_ids) + len(shorter[1].target_ids) <= 60
    # What was cut off is not followed by the end of a reply.
    pairs = collect_pairs(short, turns, with_end=True)
    ends = [token for token, turn in zip(pairs.token_ids, pairs.turn_of, strict=True) if turn == 1]
    assert ends == cut.target_ids
    assert pairs.token_ids.count(short.reply_end_id) == 2
    # A message that is too long for its slot is not cut, nor is the question.
    samples[1] = RoleSample(role="critic", question="Why?", target="x", messages={"planner": "fox " * 300})
    prompts = PromptSet.load(
        {"name": "p", "roles": {"planner": {"always": "{question}"}, "critic": {"always": "{latents:planner}"}}}
    )
    turns, counts = encode("truncate")
    assert len(turns) == 2
    assert counts == Counts(used=2, too_long=1)
    samples[1] = sample(3, "Why? " * 300)
    with pytest.raises(InputError, match="cutting that would take its slots, too.*data.on_long: skip"):
        encode("truncate")


def test_long_questions_are_refused_left_out_or_their_answers_cut(short: LanguageModel) -> None:
    words = {
        "name": "few-words",
        "roles": {
            "planner": {"first": "{question}", "later": "{question} {latents:solver}"},
            "critic": {"always": "{question} {latents:planner}"},
            "solver": {"always": "{question} {latents:critic}", "last": "{question} {latents:critic} So:"},
        },
    }
    system = RecursiveSystem.build(
        agents=dict.fromkeys(AGENTS, short), prompts=words, num_rounds=2, num_latent_steps=40
    )
    questions = [Question(id=str(n), text="Why?", answer="fox " * n) for n in (1, 300, 2)]

    def fit(on_long: str) -> tuple[list[Question], Counts]:
        counts = Counts()
        fitted = fit_questions(
            questions,
            {role: agent.model for role, agent in system.agents.items()},
            system.pattern,
            system.prompts,
            num_rounds=2,
            num_latent_steps=40,
            limits=Limits(on_long),  # type: ignore[arg-type]
            counts=counts,
        )
        return fitted, counts

    with pytest.raises(InputError, match=r"300: the prompt of the solver.* of 200 .*data.on_long"):
        fit("refuse")
    assert [each.id for each in fit("skip")[0]] == ["1", "2"]
    fitted, counts = fit("truncate")
    assert [each.is_cut for each in fitted] == [False, True, False]
    assert (counts.used, counts.truncated) == (3, 1)
    # As long as it can be: the context holds all of it, and not ten tokens more.
    [played] = [each for each in system.unroll("Why?", num_rounds=2, keys=["x"]) if each.turn.speaks]
    with torch.no_grad():
        cut = played.agent.loss(played.reading, [fitted[1].answer], is_cut=[True])
        assert cut.isfinite().all()
    used = int(played.reading.cache.num_positions.max()) + len(short.encode(fitted[1].answer))
    assert 190 <= used <= 200
    questions[1] = Question(id="long", text="Why? " * 60, answer="fox")
    for on_long in ("refuse", "truncate"):
        with pytest.raises(InputError, match=r"long: the prompt of the .*, with its messages"):
            fit(on_long)
    assert [each.id for each in fit("skip")[0]] == ["1", "2"]


def test_a_cut_answer_is_not_taught_to_end(system: RecursiveSystem) -> None:
    [played] = [each for each in system.unroll("Why?", num_rounds=1) if each.turn.speaks]
    model = played.agent.model
    ids = model.encode("the river")
    with torch.no_grad():
        whole = played.agent.loss(played.reading, ["the river"])
        cut = played.agent.loss(played.reading, ["the river"], is_cut=[True])
        states = torch.cat(
            [
                played.reading.state.unsqueeze(1),
                model.step(played.reading.cache.fork(), model.embed(torch.tensor([ids]))),
            ],
            dim=1,
        )
        each = -model.logits(states)[0].float().log_softmax(-1)[torch.arange(len(ids) + 1), [*ids, model.reply_end_id]]
    assert whole.item() == pytest.approx(each.mean().item(), abs=1e-5)
    assert cut.item() == pytest.approx(each[:-1].mean().item(), abs=1e-5)


def test_text_is_cut_where_a_token_ends(short: LanguageModel) -> None:
    text = "The quick brown fox jumps over the lazy dog near the river bank"
    for number in range(1, 12):
        kept, ids = cut_text(short, text, number)
        assert text.startswith(kept)
        assert 0 < len(ids) <= number
        assert ids == short.encode(kept)


# What chooses the checkpoint


def test_the_likelihood_is_that_of_each_answer_alone(system: RecursiveSystem) -> None:
    questions = [Question(id=str(n), text=f"Why {n}?", answer="fox " * n + "ran") for n in range(1, 4)]
    each = []
    for question in questions:
        [played] = [turn for turn in system.unroll([question.text]) if turn.turn.speaks]
        with torch.no_grad():
            each.append((-played.agent.loss(played.reading, [question.answer])).exp().item())
    assert likelihood(system, questions, "latent", 2) == pytest.approx(sum(each) / 3, rel=1e-4)
    assert likelihood(system, questions, "none", 2) != pytest.approx(sum(each) / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.jsonl", {"outer": {"path": "a.jsonl"}}),
        ({"outer": "a.jsonl", "inner": "b.csv"}, {"outer": {"path": "a.jsonl"}, "inner": {"*": {"path": "b.csv"}}}),
        (
            {"outer": "a.jsonl", "inner": {"path": "x/y", "name": "main"}},
            {"outer": {"path": "a.jsonl"}, "inner": {"*": {"path": "x/y", "name": "main"}}},
        ),
    ],
)
def test_short_forms_mean_the_long_ones(given: object, expected: dict) -> None:
    assert recipe(given).data == DataSets.model_validate(expected)


def test_errors_are_ours() -> None:
    with pytest.raises(RecursiveMASError):
        parse(DataSets, {"outer": ""}, where="data")
