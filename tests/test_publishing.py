"""Model cards, and the way to the hub, without a network: a stub takes what would be uploaded."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

from recursivemas.checkpoint import find_system, read_manifest
from recursivemas.cli.main import app
from recursivemas.errors import CheckpointError, ConfigError, InputError, OutputError
from recursivemas.publishing import model_card, push, read_report
from recursivemas.system import RecursiveSystem

TRAINING = {
    "command": "recursivemas train own.yaml",
    "commit": "abc123",
    "seed": 7,
    "recipe": {"outer": {"batch_size": 32, "lr": 0.001}},
    "stages": {
        "inner planner": {"pairs": 9.0},
        "outer": {
            "questions": 640, "num_validation": 100, "steps": 40, "best_step": 20, "stopped": None,
            "validation": {"0": 0.2, "20": 0.64, "40": 0.5},
        },
        "data": {"sets": [{"path": "someone/some-set"}, {"path": "mine.jsonl"}]},
    },
}  # fmt: skip
REPORT = {
    "task": "sums",
    "n": 400,
    "seed": 3,
    "score": "numeric",
    "arms": [
        {"arm": "latent", "rounds": 2, "accuracy": 0.75, "stderr": 0.0217},
        {"arm": "solo", "rounds": 1, "accuracy": 0.5, "stderr": 0.025},
    ],
}


@pytest.fixture
def trained(make_system: Callable[..., RecursiveSystem]) -> RecursiveSystem:
    system = make_system(name="sums")
    system.training = TRAINING
    return system


@pytest.fixture
def saved(trained: RecursiveSystem, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


class Hub:
    """Takes a commit, and knows licences."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.files: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        self.commits: list[str] = []

    def __call__(self, token: str) -> "Hub":
        self.made["token"] = token
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        self.made.update(options)
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def model_info(self, name: str) -> Any:
        if name == "gone/away":
            raise OSError("not there")
        return SimpleNamespace(tags=["text-generation", "license:apache-2.0"])

    def create_commit(self, name: str, operations: Any, commit_message: str, repo_type: str) -> Any:
        if self.error is not None:
            raise self.error
        self.commits.append(commit_message)
        for each in operations:
            given = each.path_or_fileobj
            self.files[each.path_in_repo] = given if isinstance(given, bytes) else Path(given).read_bytes()
        return SimpleNamespace(repo_url=f"https://hub/{name}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return stub


def test_a_trained_system_is_saved_with_its_card(saved: Path, make_system: Callable[..., RecursiveSystem]) -> None:
    card = (saved / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "recursivemas"
    assert front["datasets"] == ["someone/some-set"]
    assert "license" not in front
    for words in (
        "# sums",
        "pattern `sequential`",
        "after 2 rounds, with 4 latent thoughts",
        "| planner | `agents/planner` (here) | qwen3 | 48 |",
        "| `planner->critic` | outer | res-2-layer | 48 → 64 |",
        "someone/some-set, mine.jsonl",
        "40 steps of 32 out of 640 questions, learning rate 0.001; weights of step 20",
        "`recursivemas train own.yaml`",
        # sqrt(.64 * .36 / 100)
        "On the 100 validation questions 0.6400 ± 0.0480 (at the start of the outer loop 0.2000 ± 0.0400)",
        "No result on held-out questions",
        'from_pretrained("DIRECTORY")',
    ):
        assert words in card, words
    RecursiveSystem.from_pretrained(saved)
    # Nobody has trained this one, and there is nothing to tell.
    untrained = saved.with_name("untrained")
    make_system().save_pretrained(untrained)
    assert not (untrained / "README.md").exists()


def test_results_and_licences_are_on_the_card(saved: Path) -> None:
    manifest = read_manifest(saved)
    record = manifest.agents["planner"].model_copy(
        update={"local": False, "model": "Org/Model", "revision": "0123456789abcdef", "quantization": "8bit"}
    )
    critic = record.model_copy(update={"model": "Org/Other", "quantization": None, "revision": None})
    agents = {"planner": record, "critic": critic, "solver": manifest.agents["solver"]}
    mixed = manifest.model_copy(update={"agents": agents})
    card = model_card(saved, mixed, reports=[REPORT], licences={"Org/Model": "mit"}, name="me/sums")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["Org/Model", "Org/Other"]
    assert "license" not in front
    for words in (
        "[Org/Model](https://huggingface.co/Org/Model) at `0123456789ab`, in 8bit | qwen3 | 48 | mit |",
        "[Org/Other](https://huggingface.co/Org/Other) | qwen3 | 48 | see its page |",
        "Task `sums`, 400 questions, seed 3, scored by `numeric`",
        "| latent | 2 | 0.7500 ± 0.0217 |",
        'from_pretrained("me/sums")',
    ):
        assert words in card, words
    assert "No result on held-out" not in card
    # One licence for all, and all of them from there: it is the system's as well.
    all_there = manifest.model_copy(update={"agents": dict.fromkeys(manifest.agents, record)})
    assert (
        yaml.safe_load(model_card(saved, all_there, licences={"Org/Model": "mit"}).split("---")[1])["license"] == "mit"
    )


def test_what_is_pushed_can_be_loaded(saved: Path, hub: Hub, tmp_path: Path) -> None:
    (saved / "notes.bin").write_bytes(b"of no concern")
    assert push(saved, "sums", private=True, reports=[REPORT]) == "https://hub/me/sums"
    assert hub.made == {"token": "secret", "private": True, "exist_ok": True, "repo_type": "model"}
    assert len(hub.commits) == 1
    assert "sums" in hub.commits[0]
    copy = tmp_path / "copy"
    for name, content in hub.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert not (copy / "notes.bin").exists()
    assert "| latent | 2 | 0.7500 ± 0.0217 |" in (copy / "README.md").read_text()
    assert 'from_pretrained("me/sums")' in (copy / "README.md").read_text()
    RecursiveSystem.from_pretrained(copy)


def test_a_card_that_somebody_wrote_in_goes_as_it_is(saved: Path, hub: Hub) -> None:
    (saved / "README.md").write_text("# Mine\n")
    push(saved, "me/sums", reports=[REPORT])
    assert hub.files["README.md"] == b"# Mine\n"


def test_a_system_in_memory_is_pushed(trained: RecursiveSystem, hub: Hub) -> None:
    assert trained.push_to_hub("me/sums", token="other") == "https://hub/me/sums"
    assert hub.made["token"] == "other"
    assert {"system.json", "README.md", "links/inner-planner/model.safetensors"} <= hub.files.keys()


def test_licences_are_asked_for_where_they_are_known(hub: Hub) -> None:
    directory = find_system("ward")
    manifest = read_manifest(directory)
    from recursivemas.publishing import _known_licences

    record = manifest.agents["planner"].model_copy(update={"local": False, "model": "Org/Model"})
    gone = record.model_copy(update={"model": "gone/away"})
    asked = manifest.model_copy(update={"agents": {"planner": record, "critic": gone}})
    assert _known_licences(hub, asked) == {"Org/Model": "apache-2.0"}


def test_what_cannot_be_pushed_is_refused(saved: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        push(saved, "a/b/c")
    hub.error = OSError("no network")
    with pytest.raises(OutputError, match=r"the hub did not take 'me/sums': no network"):
        push(saved, "me/sums")
    weights = saved / "links" / "inner-critic" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="inner-critic"):
        push(saved, "me/sums")
    assert not hub.files
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token .*hf auth login"):
        push(find_system("ward"), "me/sums")


def test_the_command_line_pushes(saved: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.json").write_text(json.dumps(REPORT))
    runner = CliRunner()
    done = runner.invoke(app, ["push", str(saved), "--to", "me/sums", "--results", str(tmp_path / "eval")])
    assert done.exit_code == 0, done.output
    assert done.stdout == "pushed to https://hub/me/sums\n"
    assert b"Task `sums`" in hub.files["README.md"]
    refused = runner.invoke(app, ["push", str(saved), "--to", "me/sums", "--results", str(tmp_path)])
    assert refused.exit_code == 1
    assert "cannot be read as the report of an evaluation" in refused.stderr
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused = runner.invoke(app, ["push", str(saved), "--to", "me/sums"])
    assert (refused.exit_code, len(refused.stderr.strip().splitlines())) == (1, 1)
    assert "HF_TOKEN" in refused.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "x"}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=r"report\.json cannot be read"):
        read_report(tmp_path)
