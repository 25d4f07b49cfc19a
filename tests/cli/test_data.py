"""`recursivemas data build`, and every command and file of docs/data.md, as they stand there."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.cli.test_cli import Invoke, assert_refused, write_jsonl
from tests.cli.test_cli import invoke as invoke

from recursivemas.models import LanguageModel
from recursivemas.training.datasets import DataSets
from recursivemas.training.targets import BuildSettings

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = {
    kind: re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) for kind in ("json", "yaml", "bash")
}
RECIPE, SETS, BUILD = BLOCKS["yaml"]
SMALL = [
    "inner={num_samples: 8, num_train_steps: 2, batch_size: 16}",
    "alignment={num_samples: 8, num_train_steps: 2, batch_size: 16}",
    "outer={num_train_steps: 2, batch_size: 2, num_validation: 2, validate_every: 2, anchor_batch_size: 8}",
    "num_latent_steps=2",
]


@pytest.fixture
def models(tmp_path: Path, tiny_models: dict[str, LanguageModel]) -> str:
    """Tiny models on disk, as a setting of the recipe of the page."""
    places = {}
    for role, model in zip(("planner", "critic", "solver"), tiny_models.values(), strict=True):
        places[role] = str(tmp_path / "models" / role)
        model.save_pretrained(Path(places[role]))
    return f"agents={json.dumps(places)}"


def rows(number: int = 24) -> list[dict]:
    """More rows like those of the page."""
    known = [json.loads(line) for line in BLOCKS["json"][0].splitlines()]
    return [{**known[n % 2], "question": f"{known[n % 2]['question']} ({n})"} for n in range(number)]


def settings(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def test_the_page_trains_on_ones_own_data(invoke: Invoke, tmp_path: Path, models: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows())
    (tmp_path / "mine.yaml").write_text(RECIPE)
    plan, train = (line.split()[1:] for line in BLOCKS["bash"][0].splitlines())
    shown = invoke(*plan, *settings(models))
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "runs").exists()
    for words in ("histogram", "questions: ", "critic, stage inner, round ", "[planner: Multiply speed by time.]"):
        assert words in shown.stdout
    assert "»Speed 4, time 2: multiply them, and name miles.<|im_end|>«" in shown.stdout
    assert "[critic: 16 latents]" in shown.stdout
    trained = invoke(*train, *settings(models, *SMALL), "--json")
    assert trained.exit_code == 0, trained.output
    data = json.loads(trained.stdout)["stages"]["data"]
    number = sum(data["samples"][split]["used"] for split in ("train", "validation"))
    assert 12 < number < 24
    assert [(each["path"], each["rows"]) for each in data["sets"]] == [("train.jsonl", 24)]
    logged = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    [counted] = [record for record in logged if record["stage"] == "data"]
    assert counted["train/used"] == data["samples"]["train"]["used"]
    # Resumed on other data, a run would be neither the one nor the other.
    write_jsonl(tmp_path / "train.jsonl", rows(23))
    changed = invoke(*train, *settings(models, *SMALL))
    assert_refused(changed, "train.jsonl has changed since the run in runs/mine began", "--set output=")


def test_the_page_knows_every_setting() -> None:
    found = DataSets.model_validate(yaml.safe_load(SETS)["data"])
    assert found.outer.name == "main"
    assert found.inner["*"].path == "others.parquet"
    built = BuildSettings.model_validate(yaml.safe_load(BUILD))
    assert built.teacher.prices.completion == 1.5
    # Nothing that can be set about data is left out.
    assert set(yaml.safe_load(SETS)["data"]) == set(DataSets.model_fields)


def test_the_dry_run_counts_and_marks(invoke: Invoke, tmp_path: Path, models: str, tiny_models: dict) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows())
    (tmp_path / "mine.yaml").write_text(RECIPE)
    shown = invoke(
        "train", "mine.yaml", "--dry-run", "--json", *settings(models, "data={outer: train.jsonl, max_length: 60}")
    )
    assert shown.exit_code == 0, shown.output
    text = json.loads(shown.stdout)["text"]
    lengths = {(each["stage"], each["role"], each["text"]): each for each in text["lengths"]}
    model = tiny_models["llama"]
    targets = [len(model.encode(row["critic"])) + 1 for row in rows()]
    assert lengths["inner", "critic", "target"]["max"] == max(targets)
    assert (
        sum(lengths["inner", "critic", "target"]["histogram"].values())
        == lengths["inner", "critic", "target"]["number"]
    )
    both = lengths["outer", "solver", "both"]
    assert both["room"] == 60
    assert both["too_long"] == both["number"] > 0
    samples = {(each["stage"], each["role"]): each for each in text["samples"]}
    assert set(samples) == {("inner", "planner"), ("inner", "critic"), ("inner", "solver"), ("outer", "solver")}
    critic = samples["inner", "critic"]
    assert [piece["sender"] for piece in critic["pieces"] if piece["kind"] == "message"] == ["planner"]
    assert [piece["kind"] for piece in critic["pieces"] if piece["supervised"]] == ["target", "end"]
    answer = samples["outer", "solver"]
    assert [(piece["sender"], piece["num_tokens"]) for piece in answer["pieces"] if piece["kind"] == "latents"] == [
        ("critic", 16)
    ]
    assert answer["tokens"] == sum(piece["num_tokens"] for piece in answer["pieces"])
    # What the dry run foresees is what training says.
    refused = invoke("train", "mine.yaml", *settings(models, "data={outer: train.jsonl, max_length: 60}"))
    assert_refused(refused, "positions of 60", "data.on_long: truncate")


def test_counts_are_told(invoke: Invoke, tmp_path: Path, models: str) -> None:
    given = rows()
    for row in given[:8]:
        row["critic"] = ""
    given[9]["answer"] = "fox " * 2000
    write_jsonl(tmp_path / "train.jsonl", given)
    write_jsonl(
        tmp_path / "validation.jsonl", [{"question": "Else?", "answer": "x"}, {"question": "Or?", "answer": "y"}]
    )
    (tmp_path / "mine.yaml").write_text(RECIPE)
    data = "data={outer: train.jsonl, validation: validation.jsonl, on_empty: skip, on_long: truncate}"
    every = [change.replace("num_samples: 8", "num_samples: 64") for change in SMALL]
    trained = invoke("train", "mine.yaml", *settings(models, data, *every))
    assert trained.exit_code == 0, trained.output
    assert "planner: 47 used; left out: 1 too long" in trained.stdout
    assert re.search(r"critic: \d+ used; left out: 8 with nothing in a column that is needed", trained.stdout)
    assert re.search(r"train: 24 used; cut: 1, by \d+ tokens in all", trained.stdout)


def test_sets_of_the_paper_are_trained_on_as_the_recipes_name_them(invoke: Invoke, tmp_path: Path, models: str) -> None:
    """The recipe as it stands, with a local set of the same columns in the place of the authors'."""
    datasets = pytest.importorskip("datasets")
    columns = {"plan": "Plan.", "refined_plan": "Better plan.", "answer": "The answer.", "answer_field": "x"}
    whole = datasets.Dataset.from_list([{"question": f"Question {n}?", **columns} for n in range(30)])
    whole.save_to_disk(str(tmp_path / "RecursiveMAS" / "Sequential-Math"))
    recipe = Path(__file__).parents[2] / "recipes" / "paper" / "sequential_light.yaml"
    small = [change for change in SMALL if not change.startswith("outer")]
    outer = ["outer.num_train_steps=2", "outer.num_validation=2", "outer.validate_every=2", "dtype=float32"]
    trained = invoke("train", recipe, *settings(models, *small, *outer, "max_new_tokens=8"), "--json")
    assert trained.exit_code == 0, trained.output
    report = json.loads(trained.stdout)["stages"]
    assert report["data"]["sets"][0]["path"] == "RecursiveMAS/Sequential-Math"
    assert report["outer"]["steps"] == 2


def test_build_writes_with_a_model_of_ours_and_goes_on(
    invoke: Invoke, tmp_path: Path, models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [{"question": f"What is {n}?", "answer": "x"} for n in range(3)])
    (tmp_path / "build.yaml").write_text(BUILD)
    place = json.loads(models.removeprefix("agents="))["planner"]
    teacher = settings(f"teacher={{model: {place}, max_new_tokens: 4}}", "budget=null")
    plan, build = (line.split()[1:] for line in BLOCKS["bash"][1].splitlines())
    shown = invoke(*plan, *teacher)
    assert "6 requests: 3 rows, for planner, critic" in shown.stdout
    assert "The planner's plan: [what the planner writes]" in shown.stdout
    assert not (tmp_path / "train.replies.jsonl").exists()
    # A random model never ends its replies: they are cut, and not used, and the command says so.
    cut = invoke(*build, *teacher)
    assert_refused(
        cut, "3 of 3 rows are not complete", "3 replies were cut at max_new_tokens", "raise teacher.max_new_tokens"
    )
    again = invoke(*build, *teacher, "--json")
    assert again.exit_code == 1
    assert json.loads(again.stdout)["now"]["replies"] == 0
    monkeypatch.setattr("recursivemas.training.teacher.LocalTeacher._written", ended(place))
    done = invoke(*build, *teacher, "--set", "teacher.temperature=0.5")
    assert done.exit_code == 0, done.output
    assert "3 of 3 rows are complete, in train.jsonl" in done.stdout
    assert "recursivemas train CONFIG.yaml --set data=train.jsonl --dry-run" in done.stderr
    assert {tuple(json.loads(line)) for line in (tmp_path / "train.jsonl").read_text().splitlines()} == {
        ("question", "answer", "planner", "critic")
    }


def ended(place: str) -> Callable[..., object]:
    """As if the model had ended its replies."""
    from recursivemas.training.teacher import Written

    return lambda self, batch, prompts: ((request, Written("Do it.", True, 3, 2)) for request in batch)


def test_build_says_what_is_wrong_in_one_line(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_jsonl(tmp_path / "questions.jsonl", [{"qestion": "Why?", "answer": "x"}])
    (tmp_path / "build.yaml").write_text(BUILD)
    assert_refused(invoke("data", "build", "build.yaml"), "unknown column 'question': did you mean 'qestion'?")
    assert_refused(invoke("data", "build", "build.yaml", "--set", "teacher.ulr=x"), "unknown setting 'teacher.ulr'")
    assert_refused(invoke("data", "build", "missing.yaml"), "there is no file missing.yaml")
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "Why?", "answer": "x"}])
    down = settings("teacher.url=http://127.0.0.1:9/v1", "teacher.attempts=1")
    assert_refused(
        invoke("data", "build", "build.yaml", *down, "--json"), "1 of 1 rows are not complete", "asks for the rest"
    )
    assert not (tmp_path / "train.jsonl").read_text()
