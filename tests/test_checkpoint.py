"""Saved systems: they come back as they were, or are refused by the name of the part that is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_model

from recursivemas import checkpoint
from recursivemas.checkpoint import atomic_directory, find_system, read_link, read_manifest, write_link
from recursivemas.errors import CheckpointError, ConfigError, OutputError
from recursivemas.links import DESIGNS, RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem

MakeSystem = Callable[..., RecursiveSystem]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, LanguageModel]) -> Path:
    """A system of two models in three roles, one of them shared."""
    place = tmp_path_factory.mktemp("systems") / "saved"
    RecursiveSystem.build(
        agents={"planner": tiny_models["qwen3"], "critic": tiny_models["llama"], "solver": tiny_models["qwen3"]},
        num_rounds=2,
        num_latent_steps=3,
        max_new_tokens=8,
    ).save_pretrained(place)
    return place


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "system.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def everything_in(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


# Back as it was


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_a_loaded_system_runs_bit_by_bit_as_the_saved_one(
    system: RecursiveSystem, questions: list[str], tmp_path: Path, channel: str
) -> None:
    system.with_random_links(3).save_pretrained(tmp_path / "saved")
    loaded = RecursiveSystem.from_pretrained(tmp_path / "saved", device="cpu")
    expected = system.with_random_links(3).run(questions[:3], trace="full", channel=channel)
    for result, other in zip(loaded.run(questions[:3], trace="full", channel=channel), expected, strict=True):
        assert result.text == other.text
        for message, same in zip(result.trace.messages, other.trace.messages, strict=True):
            assert message.text == same.text
            assert channel == "text" or torch.equal(message.tensor(), same.tensor())


def test_everything_about_a_system_is_kept(make_system: MakeSystem, tmp_path: Path) -> None:
    system = make_system(num_rounds=5, num_latent_steps=7, channel="both", message="outer", max_new_tokens=9, name="x")
    system.training["data"] = {"seed": 3}
    system.save_pretrained(tmp_path / "saved")
    loaded = RecursiveSystem.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.settings == system.settings
    assert loaded.pattern == system.pattern
    assert loaded.prompts == system.prompts
    assert loaded.training == {"data": {"seed": 3}}
    for name, link in system.all_links.items():
        assert loaded.all_links[name].config == link.config
        assert torch.equal(loaded.all_links[name].scale, link.scale)
    assert not any(parameter.requires_grad for parameter in loaded.trainable_parameters().values())


def test_shared_models_are_written_once_and_stay_shared(saved: Path) -> None:
    assert sorted(place.name for place in (saved / "agents").iterdir()) == ["critic", "planner"]
    loaded = RecursiveSystem.from_pretrained(saved, device="cpu")
    assert loaded.agents["planner"].model is loaded.agents["solver"].model
    assert loaded.agents["planner"].model is not loaded.agents["critic"].model


def test_a_solo_system_stays_one(system: RecursiveSystem, questions: list[str], tmp_path: Path) -> None:
    system.solo().save_pretrained(tmp_path / "solo")
    loaded = RecursiveSystem.from_pretrained(tmp_path / "solo", device="cpu")
    assert loaded.run(questions[0]).text == system.solo().run(questions[0]).text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_disk_is_rounded_and_smaller(
    system: RecursiveSystem, questions: list[str], tmp_path: Path, dtype: str
) -> None:
    for name, option in (("whole", None), ("half", dtype)):
        system.save_pretrained(tmp_path / name, dtype=option)
    sizes = [
        (tmp_path / name / "links/critic-to-solver/model.safetensors").stat().st_size for name in ("whole", "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = RecursiveSystem.from_pretrained(tmp_path / "half", device="cpu")
    for name, link in system.all_links.items():
        precision = getattr(torch, dtype)
        for key, parameter in link.named_parameters():
            found = loaded.all_links[name].get_parameter(key)
            assert found.dtype == torch.float32
            assert torch.equal(found, parameter.to(precision).float())
        # One number, and everything is multiplied by it.
        assert torch.equal(loaded.all_links[name].scale, link.scale)
    # The system that was saved keeps its own precision.
    assert system.agents["planner"].model.dtype == torch.float32
    for message, other in zip(
        loaded.run(questions[0], trace="full").trace.messages,
        system.run(questions[0], trace="full").trace.messages,
        strict=True,
    ):
        assert (message.tensor() - other.tensor()).norm() < 0.2 * other.tensor().norm()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_design_of_link_comes_back(tmp_path: Path, design: str, bias: bool) -> None:
    link = RecursiveLink.outer(6, 4, design=design, bias=bias, intermediate_size=5)
    link.scale.fill_(0.3)
    loaded = read_link(tmp_path / "link", write_link(tmp_path / "link", link))
    assert loaded.config == link.config
    states = torch.randn(3, 6)
    assert torch.equal(loaded(states), link(states))


def test_the_manifest_explains_itself(saved: Path) -> None:
    content = json.loads((saved / "system.json").read_text())
    assert content["format_version"] == 1
    assert content["agents"]["critic"]["model_type"] == "llama"
    assert content["agents"]["critic"]["hidden_size"] == 64
    assert set(content["links"]) == {
        "planner",
        "critic",
        "solver",
        "planner->critic",
        "critic->solver",
        "solver->planner",
    }


def test_nothing_in_a_saved_system_is_pickled(saved: Path) -> None:
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".jinja"}


# Refused by name


def swap(*places: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        one, other = (directory / place for place in places)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)

    return apply


def truncate(place: str, size: int = 50) -> Callable[[Path], None]:
    return lambda directory: (directory / place).write_bytes((directory / place).read_bytes()[:-size])


def flip_a_bit(place: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = bytearray((directory / place).read_bytes())
        content[-20] ^= 1
        (directory / place).write_bytes(content)

    return apply


def edit(place: str, **changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / place).read_text())
        content.update(changes)
        (directory / place).write_text(json.dumps(content))

    return apply


def remove(place: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        target = directory / place
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return apply


def in_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: change_manifest(directory, change)


LINK, AGENT = "links/critic-to-solver", "agents/planner"


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (truncate(f"{LINK}/model.safetensors"), LINK),
        (flip_a_bit(f"{LINK}/model.safetensors"), LINK),
        (swap(f"{LINK}/model.safetensors", "links/planner-to-critic/model.safetensors"), "links/"),
        (swap("links/inner-planner/model.safetensors", "links/inner-solver/model.safetensors"), "links/inner-"),
        # The same tensors, another function: its keys alone cannot tell.
        (edit("links/inner-planner/config.json", design="2-layer"), "links/inner-planner"),
        (truncate(f"{LINK}/config.json", 5), LINK),
        (remove(f"{LINK}/config.json"), LINK),
        (remove(f"{LINK}/model.safetensors"), LINK),
        (remove(LINK), LINK),
        (truncate(f"{AGENT}/model.safetensors"), AGENT),
        (flip_a_bit(f"{AGENT}/model.safetensors"), AGENT),
        (swap(f"{AGENT}/model.safetensors", "agents/critic/model.safetensors"), "agents/"),
        (edit(f"{AGENT}/config.json", rms_norm_eps=0.5), AGENT),
        (truncate(f"{AGENT}/tokenizer.json"), AGENT),
        (remove(f"{AGENT}/tokenizer.json"), AGENT),
        (remove(AGENT), AGENT),
        (in_manifest(lambda m: m["agents"]["planner"].update(tokenizer_sha256="0")), "planner.*tokenizer_sha256"),
        (
            in_manifest(lambda m: m["agents"]["planner"].update(hidden_size=99)),
            "planner.*hidden_size is 48, expected 99",
        ),
        (in_manifest(lambda m: m["agents"]["planner"].update(model="../elsewhere")), r"\.\./elsewhere"),
        (in_manifest(lambda m: m["links"]["planner"].update(folder="../elsewhere")), r"\.\./elsewhere.*outside"),
        (in_manifest(lambda m: m["links"]["planner"].update(folder="/etc")), r"/etc.*outside"),
        (in_manifest(lambda m: m["agents"].pop("critic")), "critic"),
        (in_manifest(lambda m: m["links"].pop("critic")), "critic.*no inner link"),
        (in_manifest(lambda m: m["links"].pop("critic->solver")), "no link for the edge 'critic->solver'"),
        (in_manifest(lambda m: m["agents"].update(poet=m["agents"]["critic"])), "poet"),
        (in_manifest(lambda m: m["links"].update({"a->b": m["links"]["critic->solver"]})), "a->b"),
        (in_manifest(lambda m: m["pattern"].update(answers="poet")), "poet"),
        (in_manifest(lambda m: m["pattern"].update(edges=["planner critic"])), "planner critic"),
        (in_manifest(lambda m: m["prompts"]["roles"].pop("critic")), "critic"),
        (in_manifest(lambda m: m["prompts"]["roles"]["critic"].update(always="{questoin}")), "questoin"),
        (in_manifest(lambda m: m.update(format_version=2)), "format 2.*upgrade"),
        (in_manifest(lambda m: m.update(format_version=0)), "format 0"),
        (in_manifest(lambda m: m.update(format_version="new")), "format"),
        (in_manifest(lambda m: m.pop("format_version")), "format_version"),
        (in_manifest(lambda m: m.pop("pattern")), "'pattern' is missing"),
        (in_manifest(lambda m: m.update(colour="red")), "colour"),
        (in_manifest(lambda m: m["settings"].update(num_rounds=0)), "num_rounds"),
        (truncate("system.json"), "system.json"),
        (remove("system.json"), "holds no system.json"),
        (lambda directory: (directory / "system.json").write_text("[]"), "system.json"),
    ],
)
def test_a_damaged_system_is_refused_by_the_name_of_the_part(
    saved: Path, damage: Callable[[Path], None], part: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=part):
        RecursiveSystem.from_pretrained(saved, device="cpu")


def reseal(directory: Path, name: str) -> None:
    """Write the hash of a link that was changed into the manifest: what somebody does who puts a system together."""
    folder = checkpoint.link_folder(name)
    change_manifest(directory, lambda m: m["links"][name].update(sha256=checkpoint.folder_sha256(directory / folder)))


def test_a_link_of_another_pair_is_refused_by_its_widths(saved: Path) -> None:
    write_link(saved / LINK, RecursiveLink.outer(64, 56))
    reseal(saved, "critic->solver")
    with pytest.raises(CheckpointError, match=r"'critic->solver' is made for 56-wide states, but the solver"):
        RecursiveSystem.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"design": "res-1-layer"}, "does not fit its config.json: w"),
        ({"target_size": 10**9}, "does not fit its config.json"),
        ({"intermediate_size": 10**9}, "does not fit its config.json"),
        ({"design": "3-layer"}, "unknown link design"),
        ({"colour": "red"}, "colour"),
        ({"source_size": "wide"}, "cannot be read"),
        ({"source_size": 0}, "at least 1"),
    ],
)
def test_a_link_whose_weights_do_not_fit_its_configuration_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit(f"{LINK}/config.json", **changes)(saved)
    reseal(saved, "critic->solver")
    with pytest.raises(CheckpointError, match=message):
        RecursiveSystem.from_pretrained(saved, device="cpu")


def test_agents_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(saved / AGENT)
    make_model("qwen3", seed=9).save_pretrained(saved / AGENT)
    with pytest.raises(CheckpointError, match=f"{AGENT} is not what was saved"):
        RecursiveSystem.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrad", "unknown system 'wrad': did you mean 'ward'"),
        ("/nowhere/at/all", "/nowhere/at/all"),
        ("nobody/nothing", "cannot download the system 'nobody/nothing'"),
    ],
)
def test_a_system_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(checkpoint, "bundled_systems", lambda: ["ward"])
    with pytest.raises(CheckpointError, match=message):
        RecursiveSystem.from_pretrained(name)


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no system.json"):
        find_system(tmp_path)


# Saving is all or nothing


@pytest.mark.parametrize("occupant", ["file", "directory"])
def test_a_place_that_is_taken_is_refused_and_untouched(system: RecursiveSystem, tmp_path: Path, occupant: str) -> None:
    place = tmp_path / "taken"
    if occupant == "directory":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    else:
        place.write_text("years of work")
    before = everything_in(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        system.save_pretrained(place)
    assert everything_in(tmp_path) == before


def test_overwriting_replaces_the_whole_directory(system: RecursiveSystem, tmp_path: Path) -> None:
    place = tmp_path / "taken"
    place.mkdir()
    (place / "old.txt").write_text("old")
    system.save_pretrained(place, overwrite=True)
    assert not (place / "old.txt").exists()
    assert read_manifest(place).settings.name == "sequential"


def test_an_empty_directory_may_be_written_to(system: RecursiveSystem, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    system.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "system.json").is_file()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_nothing_behind(
    system: RecursiveSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, overwrite: bool
) -> None:
    if overwrite:
        system.save_pretrained(tmp_path / "saved")
    before = everything_in(tmp_path)

    def stop(*args: Any) -> None:
        raise fault

    monkeypatch.setattr("recursivemas.assembly.write_manifest", stop)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        system.save_pretrained(tmp_path / "saved", overwrite=overwrite)
    assert everything_in(tmp_path) == before
    assert not [place for place in tmp_path.iterdir() if place.name != "saved"]


def test_a_place_that_cannot_be_written_to_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"), atomic_directory(tmp_path / "file" / "below"):
        raise AssertionError("not reached")


def test_an_unknown_precision_is_refused_and_leaves_nothing(system: RecursiveSystem, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float15"):
        system.save_pretrained(tmp_path / "saved", dtype="float15")
    assert not list(tmp_path.iterdir())
