"""The authors' released layout, read: against formulas and a loop by hand, in its varieties, refused by file and field."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import make_model
from tests.families.reference import distance, last_states, play_by_hand
from tests.release.theirs import (
    ALIASES,
    INNER_TYPES,
    KEYS,
    OUTER_TYPES,
    Release,
    Weights,
    computed,
    draw,
    load,
    write_json,
    write_theirs,
)
from torch import Tensor, nn

from recursivemas.decoding import SamplingParams
from recursivemas.errors import CheckpointError, ConfigError, PatternError
from recursivemas.patterns import Pattern
from recursivemas.release.reading import ReleaseWarning
from recursivemas.release.tensors import read_released_link
from recursivemas.system import RecursiveSystem

# Links are what the formulas say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_type", [*INNER_TYPES, *OUTER_TYPES, *ALIASES])
def test_every_released_type_computes_its_formula(adapter_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for kind in ("inner", "outer") if adapter_type in ALIASES else ("outer" if "outer" in adapter_type else "inner",):
        name = ALIASES.get(adapter_type, adapter_type)
        name = f"outer_{name}" if kind == "outer" and adapter_type in ALIASES else name
        weights = draw(name, 12, 12 if kind == "inner" else 8, seed=3, dtype=dtype)
        torch.save(weights, tmp_path / "link.pt")
        link = read_released_link(tmp_path / "link.pt", kind, adapter_type, described_in=tmp_path / "config.json")
        states = 3 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(link(states), computed(name, weights, states))
        assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in link.state_dict().values())


# Systems are what the loop by hand says

SYSTEMS: dict[str, dict[str, Any]] = {
    "sequential": {
        "models": {"planner": ("gemma3-sees", 40), "critic": ("llama", 48), "solver": ("qwen3_5", 56)},
        "inner": ("linear_adapter", "ln_res_adapter", "res_adapter"),
        "outer": ("outer_linear_res_adapter", "outer_ln_adapter", "outer_ln_res_adapter"),
        "dtype": torch.bfloat16,
    },
    "mixture": {
        "models": {
            "math": ("qwen2-r1", 40),
            "code": ("qwen2", 48),
            "science": ("mistral", 56),
            "summarizer": ("qwen3", 64),
        },
        "inner": ("adapter", "linear_res_adapter", "ln_res_adapter"),
        "outer": OUTER_TYPES,
        "tasks": (),
    },
    "distillation": {
        "models": {"expert": ("mistral-window", 48), "learner": ("gemma3_text", 40)},
        "dtype": torch.bfloat16,
    },
    "deliberation": {"models": {"reflector": ("qwen3", 48), "toolcaller": ("qwen3", 48)}, "tasks": ()},
}


def sender_by_formula(system: RecursiveSystem, release: Release, num_latent_steps: int) -> Callable[[str, Tensor], Any]:
    """What the authors' code sends on an edge: m steps that go back through the inner link, then R_out(R_in(H))."""

    def send(edge: str, reading: Tensor) -> list[Tensor]:
        role = edge.split("->")[0]

        def inner(states: Tensor) -> Tensor:
            return computed(release.types[role], release.weights[role], states)

        thoughts: list[Tensor] = []
        for _ in range(num_latent_steps):
            thoughts.append(last_states(system.agents[role].model, reading)[-1])
            reading = torch.cat([reading, inner(thoughts[-1])[None]])
        return [computed(release.types[edge], release.weights[edge], inner(torch.stack(thoughts)))]

    return send


@pytest.mark.parametrize("pattern", SYSTEMS)
def test_messages_are_those_of_the_formulas_played_by_hand(pattern: str, checkpoint: Any, tmp_path: Path) -> None:
    settings = dict(SYSTEMS[pattern])
    models = {role: checkpoint(*which) for role, which in settings.pop("models").items()}
    release = write_theirs(tmp_path / "release", pattern, models, **settings)
    system = load(release)
    questions = ["What is 2 + 2?", "Why does the quick brown fox jump?"]
    results = system.run(
        questions,
        num_rounds=2,
        num_latent_steps=3,
        sampling=SamplingParams(temperature=0.0, max_new_tokens=3),
        trace=True,
    )
    for question, result in zip(questions, results, strict=True):
        with torch.no_grad():
            sent, _ = play_by_hand(system, question, sender_by_formula(system, release, 3), 2)
        assert len(sent) == len(result.trace.messages) >= len(KEYS[pattern])
        for (round, edge), message in sent.items():
            source, target = edge.split("->")
            found = result.trace.message(round=round, source=source, target=target)
            assert distance(found, message[0]) <= 1e-4, (round, edge)


def test_roles_with_the_same_model_share_one_copy(checkpoint: Any, tmp_path: Path) -> None:
    models = {"reflector": checkpoint("qwen3", 48), "toolcaller": checkpoint("qwen3", 48)}
    release = write_theirs(tmp_path / "release", "deliberation", models, tasks=())
    agents = load(release).agents
    assert agents["reflector"].model is agents["toolcaller"].model
    assert not torch.equal(agents["reflector"].inner_link.w1.weight, agents["toolcaller"].inner_link.w1.weight)
    # The same size, another weight.
    with_bytes("toolcaller/model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]))(release.place)
    agents = load(release).agents
    assert agents["reflector"].model is not agents["toolcaller"].model


def test_every_task_has_its_own_links(small: Release) -> None:
    math, code = load(small), load(small, task="code")
    for name, link in math.all_links.items():
        assert torch.equal(link.w1.weight, small.weights[name]["proj1.weight"])
        assert not torch.equal(link.w1.weight, code.all_links[name].w1.weight)
    assert (math.settings.num_latent_steps, code.settings.num_latent_steps) == (32, 16)


def test_the_precision_is_what_is_asked_for_or_that_of_the_files(small: Release, damaged: Path) -> None:
    half = make_model("qwen3", hidden_size=48)
    shutil.rmtree(damaged / "planner")
    (damaged / "planner").mkdir()
    half.save_pretrained(damaged / "planner", dtype="bfloat16")
    for file in (small.place / "planner").glob("*config.json"):
        if "link" in file.name or "adapter" in file.name:
            shutil.copy(file, damaged / "planner")
    for file in (small.place / "planner").glob("*.pt"):
        shutil.copy(file, damaged / "planner")
    changed = Release(damaged, small.types, small.weights, small.prompts)
    kept = load(changed, dtype="auto")
    assert [agent.model.dtype for agent in kept.agents.values()] == [torch.bfloat16, torch.float32, torch.float32]
    asked = load(changed, dtype=torch.bfloat16)
    assert {agent.model.dtype for agent in asked.agents.values()} == {torch.bfloat16}
    assert {link.w1.weight.dtype for link in asked.all_links.values()} == {torch.float32}


# The layout in its varieties


def move(directory: Path, **names: str) -> None:
    for old, new in names.items():
        (directory / old).rename(directory / new)


def as_on_the_hub(directory: Path) -> None:
    """Names, files and fields as the authors' repositories have them."""
    move(
        directory,
        planner="Sequential-Light-Planner-Qwen3-1.7B",
        critic="Sequential-Light-Critic-Llama3.2-1B",
        solver="Sequential-Light-Solver-Qwen2.5-Math-1.5B",
        outer="Sequential-Light-Outerlinks",
    )
    outer = directory / "Sequential-Light-Outerlinks"
    manifest = json.loads((outer / "outerlink_config.json").read_text())
    for task, scope in manifest["tasks"].items():
        legacy = {}
        for entry in scope["adapters"]:
            key = entry["legacy_key"]
            source, target = KEYS["sequential"][key.removeprefix("outer_")].title().split()
            name = f"{source}-{target}-Outerlink({task}).pt"
            (outer / entry["filename"]).rename(outer / name)
            entry |= {"filename": name, "legacy_filename": f"{key}.pt", "source_role": source, "target_role": target}
            legacy |= {f"{key}_type": entry["adapter_type"]}
            legacy |= {f"{key}_{field}": entry[field] for field in ("in_dim", "out_dim")}
        scope |= {"task": task, "legacy_config_filename": f"outer_adapter_config({task}).json"}
        write_json(outer / f"outer_adapter_config({task}).json", legacy)
    write_json(outer / "outerlink_config.json", {**manifest, "paradigm": "sequential"})


def as_the_trainer_writes(directory: Path, *, by_task: bool) -> None:
    """The trainer's configuration alone, without outerlink_config.json; and no innerlink_config.json."""
    outer = directory / "outer"
    entries = json.loads((outer / "outerlink_config.json").read_text())["tasks"]["math"]["adapters"]
    (outer / "outerlink_config.json").unlink()
    content: dict[str, Any] = {"mas_shape": "chain", "mas_task": "math", "num_recursive_rounds": 5}
    for entry in entries:
        content |= {f"{entry['legacy_key']}_{field}": entry[field] for field in ("in_dim", "out_dim")}
        content[f"{entry['legacy_key']}_type"] = entry["adapter_type"]
        if not by_task:
            (outer / entry["filename"]).rename(outer / f"{entry['legacy_key']}.pt")
    write_json(outer / ("outer_adapter_config(math).json" if by_task else "outer_adapter_config.json"), content)
    for role in ("planner", "critic", "solver"):
        (directory / role / "innerlink_config.json").unlink()
        if not by_task:
            (directory / role / "adapter(math).pt").rename(directory / role / "adapter.pt")
            (directory / role / "adapter(code).pt").unlink()


def in_one_directory(directory: Path) -> None:
    """The outer links at the top, and the critic under the trainer's name."""
    for file in (directory / "outer").iterdir():
        file.rename(directory / file.name)
    (directory / "outer").rmdir()
    move(directory, critic="refiner_inner")


@pytest.mark.parametrize(
    ("change", "rounds"),
    [
        (as_on_the_hub, 3),
        (lambda place: as_the_trainer_writes(place, by_task=True), 5),
        (lambda place: as_the_trainer_writes(place, by_task=False), 5),
        (in_one_directory, 3),
        (lambda place: (place / ".cache").mkdir(), 3),
    ],
    ids=["hub", "trainer, by task", "trainer", "at the top", "hidden directory"],
)
def test_the_layout_is_read_in_its_varieties(
    damaged: Path, small: Release, change: Callable[[Path], Any], rounds: int
) -> None:
    change(damaged)
    system = load(Release(damaged, small.types, small.weights, small.prompts))
    assert system.pattern == Pattern.load("sequential")
    assert system.settings.num_rounds == rounds
    for name, link in system.all_links.items():
        assert torch.equal(link.w1.weight, small.weights[name]["proj1.weight"]), name


def test_roles_have_the_names_that_the_pattern_gives_them(damaged: Path, small: Release) -> None:
    names = {"planner": "drafter", "solver": "writer"}
    move(damaged, planner="drafter")
    with pytest.warns(ReleaseWarning):
        system = RecursiveSystem.from_release(damaged, pattern=Pattern.load("sequential").renamed(names), device="cpu")
    assert list(system.agents) == ["drafter", "critic", "writer"]
    assert torch.equal(system.links["writer->drafter"].w1.weight, small.weights["solver->planner"]["proj1.weight"])
    assert "{latents:writer}" in str(system.prompts.roles["drafter"].later)


def test_roles_have_the_names_that_the_words_give_them(small: Release) -> None:
    words = json.loads(json.dumps(small.prompts).replace("critic", "Refiner"))
    system = load(small, prompts=words)
    assert list(system.agents) == ["planner", "Refiner", "solver"]
    assert torch.equal(system.links["Refiner->solver"].w1.weight, small.weights["critic->solver"]["proj1.weight"])
    with pytest.raises(PatternError, match="critic"):
        load(small, prompts=json.loads(json.dumps(small.prompts).replace("critic", "poet")))


def test_the_manifest_comes_before_the_task_and_the_task_before_the_plain_name(damaged: Path, small: Release) -> None:
    folder = damaged / "planner"
    shutil.copy(folder / "adapter(code).pt", folder / "adapter.pt")
    shutil.copy(folder / "adapter(code).pt", folder / "other.pt")
    math, code = small.weights["planner"], torch.load(folder / "other.pt", weights_only=True)
    write_json(folder / "innerlink_config.json", {"tasks": {"math": {"adapter.pt": "other.pt"}}})
    changed = Release(damaged, small.types, small.weights, small.prompts)
    assert torch.equal(load(changed).agents["planner"].inner_link.w1.weight, code["proj1.weight"])
    write_json(folder / "innerlink_config.json", {"tasks": {"code": {}}})
    assert torch.equal(load(changed).agents["planner"].inner_link.w1.weight, math["proj1.weight"])
    (folder / "adapter(math).pt").unlink()
    assert torch.equal(load(changed).agents["planner"].inner_link.w1.weight, code["proj1.weight"])


def test_where_parts_came_from_is_kept(small: Release) -> None:
    origin = load(small).training["release"]
    assert (origin["source"], origin["task"]) == ("small", "math")
    assert origin["links"]["planner"] == "planner/adapter(math).pt"
    assert origin["links"]["solver->planner"] == "outer/outer_31(math).pt"


# The words


def test_our_own_words_are_said_to_be_others_than_the_links_were_trained_on(small: Release) -> None:
    with pytest.warns(ReleaseWarning, match="trained on the authors' words.*--prompts-from") as told:
        system = RecursiveSystem.from_release(small.place, device="cpu")
    assert len(told) == 1
    assert system.prompts.name == "sequential"
    assert system.solo().pattern.answers == "solver"


@pytest.mark.parametrize("form", ["mapping", "whole mapping", "yaml", "whole yaml"])
def test_words_are_given_as_a_mapping_or_a_file(small: Release, tmp_path: Path, form: str) -> None:
    words: Any = small.prompts
    if "whole" in form:
        words = {"name": "mine", "system": "Not this one.", "roles": words}
    if "yaml" in form:
        (tmp_path / "words.yaml").write_text(yaml.safe_dump(words))
        words = tmp_path / "words.yaml"
    prompts = load(small, prompts=words, system_prompt="This one.").prompts
    assert prompts.system == "This one."
    assert prompts.roles["planner"].later == small.prompts["planner"]["later"]
    assert prompts.name == ("mine" if "whole" in form else "sequential")


def test_without_a_solo_template_the_control_says_so(small: Release) -> None:
    with pytest.raises(PatternError, match="no template for the solver.*`solo`"):
        load(small).solo()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planner": {"first": "{question}"}}, "planner.*solver"),
        ({"planner": {"always": "{question} {latents:critic}"}}, "critic"),
        ({"solver": {"always": "{question} {latents:critic} {answer}"}}, "unknown.*answer"),
        ({"solver": {"always": "{question}"}}, "solver"),
        ({"solver": {"allways": "{question}"}}, "allways.*always"),
        ({"solver": "{question}"}, "solver"),
    ],
)
def test_words_that_do_not_fit_the_pattern_are_refused(small: Release, change: dict[str, Any], message: str) -> None:
    with pytest.raises((PatternError, ConfigError), match=message):
        load(small, prompts={**small.prompts, **change})


# Refused by file and field


class Hostile:
    """A pickle that leaves a mark when it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def replaced(name: str, change: Callable[[Weights], Any]) -> Callable[[Path], None]:
    """Other content in one .pt file."""

    def apply(place: Path) -> None:
        torch.save(change(torch.load(place / name, weights_only=True)), place / name)

    return apply


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(change((place / name).read_bytes()))  # type: ignore[return-value]


def in_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        content = json.loads((place / name).read_text())
        write_json(place / name, change(content) or content)

    return apply


def in_entry(key: str, **changes: Any) -> Callable[[Path], None]:
    """Other fields in one entry of the outer manifest; None takes a field away."""

    def change(content: dict[str, Any]) -> None:
        for entry in content["tasks"]["math"]["adapters"]:
            if entry["legacy_key"] == f"outer_{key}":
                entry.update(changes)
                for field in [field for field, value in changes.items() if value is None]:
                    del entry[field]

    return in_json(OUTER, change)


def swapped(*names: str) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        one, other = (place / name for name in names)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)

    return apply


def removed(name: str) -> Callable[[Path], None]:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def without_entry(content: dict[str, Any]) -> None:
    del content["tasks"]["math"]["adapters"][2]


def twice(content: dict[str, Any]) -> None:
    content["tasks"]["math"]["adapters"].append(content["tasks"]["math"]["adapters"][0])


def of_another_width(place: Path) -> None:
    torch.save(draw("ln_res_adapter", 44, 44, seed=0), place / "planner" / "adapter(math).pt")


def edge_of_another_width(place: Path) -> None:
    torch.save(draw("outer_ln_res_adapter", 48, 44, seed=0), place / LINK)
    in_entry("12", out_dim=44)(place)


def with_legacy(**said: Any) -> Callable[[Path], None]:
    return lambda place: write_json(place / "outer" / "outer_adapter_config(math).json", said)


OUTER, LINK, INNER = "outer/outerlink_config.json", "outer/outer_12(math).pt", "planner/adapter(math).pt"
FILE, INNER_FILE = r"outer_12\(math\)\.pt", r"planner/adapter\(math\)\.pt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # Missing
        (removed("outer"), "is no release.*outerlink_config.json.*critic, planner, solver"),
        (removed(OUTER), "is no release.*outerlink_config.json"),
        (removed("planner"), "no directory of the planner.*critic, solver"),
        (removed(LINK), f"outerlink_config.json names the file '{FILE}', which is missing"),
        (removed(INNER), r"innerlink_config.json names the file 'adapter\(math\)\.pt', which is missing"),
        (removed("planner/adapter_config.json"), "planner.*adapter_config.json"),
        (removed("planner/config.json"), "agent of the planner cannot be loaded.*config.json"),
        (removed("planner/model.safetensors"), "agent of the planner cannot be loaded"),
        (removed("planner/tokenizer.json"), "agent of the planner cannot be loaded"),
        # Truncated, or no such file at all
        (with_bytes(LINK, lambda b: b[: len(b) // 2]), f"{FILE} cannot be read.*truncated"),
        (with_bytes(LINK, lambda b: b[:-30]), f"{FILE} cannot be read.*truncated"),
        (with_bytes(LINK, lambda b: b""), f"{FILE} cannot be read"),
        (
            with_bytes(LINK, lambda b: b"version https://git-lfs.github.com/spec/v1\noid 1\n"),
            f"{FILE} is a pointer of git-lfs",
        ),
        (with_bytes(LINK, lambda b: b"<html>404</html>"), f"{FILE} cannot be read"),
        (with_bytes(INNER, lambda b: b[:-30]), f"{INNER_FILE} cannot be read"),
        (with_bytes(OUTER, lambda b: b[:-30]), "outerlink_config.json cannot be read as JSON"),
        (with_bytes(OUTER, lambda b: b"[]"), "outerlink_config.json holds a list"),
        (with_bytes(OUTER, lambda b: b"\xff"), "outerlink_config.json cannot be read as JSON"),
        (with_bytes("planner/adapter_config.json", lambda b: b""), "planner/adapter_config.json cannot be read"),
        (with_bytes("planner/model.safetensors", lambda b: b[:-30]), "agent of the planner cannot be loaded"),
        # Something else than a link
        (replaced(LINK, lambda w: list(w.values())), f"{FILE} holds a list"),
        (replaced(LINK, lambda w: {}), f"{FILE} holds"),
        (replaced(LINK, lambda w: {"model": w}), f"{FILE}: 'model' is no plain tensor"),
        (replaced(LINK, lambda w: {1: w["proj1.weight"]}), f"{FILE}: '1' is no plain tensor"),
        (
            replaced(LINK, lambda w: {**w, "proj1.bias": w["proj1.bias"].to_sparse()}),
            f"{FILE}: 'proj1.bias' is no plain",
        ),
        (replaced(LINK, lambda w: {**w, "proj1.bias": w["proj1.bias"].int()}), f"{FILE}: proj1.bias is of type int32"),
        (replaced(LINK, lambda w: {**w, "proj1.bias": w["proj1.bias"] * 1j}), f"{FILE}: proj1.bias is of type complex"),
        (replaced(LINK, lambda w: {**w, "proj2.bias": w["proj2.bias"] * torch.nan}), f"{FILE}: proj2.bias.*not finite"),
        (
            replaced(INNER, lambda w: {**w, "post_ln.bias": w["post_ln.bias"] / 0}),
            f"{INNER_FILE}: post_ln.bias.*not fini",
        ),
        # Under a wrong label
        (swapped(LINK, "outer/outer_23(math).pt"), f"says in_dim 48, but the tensors in .*{FILE} have 40"),
        (swapped(INNER, "critic/adapter(math).pt"), f"{INNER_FILE} is made for 40-wide states, but the planner"),
        (swapped(INNER, LINK), rf"{INNER_FILE} maps 48-wide states to 40-wide"),
        (in_entry("12", in_dim=64), f"outerlink_config.json says in_dim 64, .*{FILE} have 48"),
        (in_entry("12", out_dim=10**15), f"outerlink_config.json says out_dim 1{'0' * 15}, .*{FILE} have 40"),
        (in_entry("12", in_dim="wide"), "outerlink_config.json.*in_dim"),
        (in_entry("12", adapter_type="outer_ln_adapter"), f"{FILE}: residual_proj.*adapter_type is 'outer_ln_adapter'"),
        (in_entry("12", adapter_type="outer_res_adapter"), f"{FILE}: ln_source.*adapter_type is 'outer_res_adapter'"),
        (
            in_entry("12", adapter_type="outer_ln_res_adaptor"),
            "outerlink_config.json: unknown adapter_type.*'outer_ln_res_",
        ),
        (in_entry("12", adapter_type="ln_res_adapter"), "unknown adapter_type of an outer link 'ln_res_adapter'"),
        (in_entry("12", adapter_type=None), "outerlink_config.json gives no adapter_type for outer_12"),
        (in_json("planner/adapter_config.json", lambda c: {"adapter_type": "adapter"}), "post_ln.*should not be there"),
        (
            in_json("planner/adapter_config.json", lambda c: {"type": "x"}),
            "planner/adapter_config.json names no adapter_ty",
        ),
        (
            in_json("planner/adapter_config.json", lambda c: {"adapter_type": "lora"}),
            "unknown adapter_type of an inner",
        ),
        (
            in_entry("12", source_role="Solver"),
            "says source_role 'Solver' of outer_12, whose source_role is the planner",
        ),
        (in_entry("12", legacy_key="outer_21"), "unknown legacy_key 'outer_21'.*outer_12"),
        (in_entry("12", legacy_key="outer_rt"), "different patterns: deliberation, sequential"),
        (in_entry("12", legacy_key=None), "legacy_key"),
        (in_json(OUTER, lambda c: {**c, "paradigm": "mixture"}), "different patterns: mixture, sequential"),
        (in_json(OUTER, lambda c: {"adapters": []}), "adapters"),
        (in_json(OUTER, lambda c: {"adapters": 3}), "adapters"),
        (in_json(OUTER, lambda c: {"tasks": 3}), "'tasks' is a int"),
        (in_json(OUTER, lambda c: {"tasks": {"math": 3}}), "the task 'math' is a int"),
        (
            in_json(OUTER, lambda c: {"tasks": {"maths": c["tasks"]["math"]}}),
            "unknown task 'math': did you mean 'maths'",
        ),
        (in_json(OUTER, without_entry), r"names no link outer_31 \(solver to planner\)"),
        (in_json(OUTER, twice), "names the link outer_12 twice"),
        (
            with_legacy(outer_12_type="outer_adapter"),
            "says adapter_type 'outer_ln_res_adapter' of outer_12, and outer_ad",
        ),
        (with_legacy(outer_12_in_dim=7), "says in_dim 48 of outer_12, and outer_adapter_config.* says 7"),
        # Shapes
        (
            replaced(LINK, lambda w: {**w, "proj1.bias": w["proj1.bias"][:-1]}),
            rf"{FILE}: proj1.bias has the shape \(79,\)",
        ),
        (replaced(LINK, lambda w: {k: w[k] for k in w if k != "ln_target.bias"}), f"{FILE}: ln_target.bias is missing"),
        (replaced(LINK, lambda w: {**w, "proj3.bias": w["proj2.bias"]}), f"{FILE}: proj3.bias .*should not be there"),
        (replaced(LINK, lambda w: {k: w[k] for k in w if "proj1" not in k}), f"{FILE} has no matrix proj1.weight"),
        (of_another_width, f"{INNER_FILE} is made for 44-wide states, but the planner thinks in 48 dimensions"),
        (edge_of_another_width, f"{FILE} is made for 44-wide states, but the critic reads in 40 dimensions"),
        # Elsewhere
        (in_entry("12", filename="../planner/adapter(math).pt"), r"'\.\./planner.*outside of .*not read"),
        (in_entry("12", filename="/etc/hostname"), "'/etc/hostname', which is outside"),
        (in_entry("12", filename="a/../../x.pt"), "outside"),
        (in_entry("12", filename=""), "outside"),
        (in_entry("12", filename="x\0.pt"), "outside"),
        (in_entry("12", filename=7), "filename"),
        (
            in_json(
                "planner/innerlink_config.json",
                lambda c: {"tasks": {"math": {"adapter.pt": "../critic/adapter(math).pt"}}},
            ),
            r"planner/innerlink_config.json names the file '\.\./critic.*outside",
        ),
        (
            in_json(OUTER, lambda c: c["tasks"]["math"].update(legacy_config_filename="../planner/config.json")),
            r"'\.\./planner/config.json', which is outside",
        ),
        # Not to be told apart
        (lambda place: shutil.copytree(place / "planner", place / "old-planner"), None),
        (
            lambda place: move(place, planner="planner-a") or shutil.copytree(place / "planner-a", place / "planner-b"),
            "several .*planner-a, planner-b",
        ),
        (lambda place: shutil.copytree(place / "outer", place / "outer-old"), "several releases: outer, outer-old"),
        (lambda place: write_json(place / "system.json", {}), "from_pretrained"),
    ],
)
def test_what_is_wrong_with_a_release_is_named(damaged: Path, small: Release, damage: Any, message: str | None) -> None:
    damage(damaged)
    changed = Release(damaged, small.types, small.weights, small.prompts)
    if message is None:
        load(changed)
        return
    with pytest.raises(CheckpointError, match=message):
        load(changed)


@pytest.mark.parametrize(
    "form", ["pickle", "new pickle", "pickle in a zip", "new pickle in a zip", "whole module", "script"]
)
@pytest.mark.parametrize("name", [LINK, INNER])
def test_code_in_a_file_is_refused_and_not_run(
    damaged: Path, small: Release, tmp_path: Path, name: str, form: str
) -> None:
    mark = tmp_path / "it was run"
    protocol = 4 if "new" in form else 2
    if form.endswith("in a zip"):
        torch.save({"proj1.weight": Hostile(mark)}, damaged / name, pickle_protocol=protocol)
    elif form.endswith("pickle"):
        (damaged / name).write_bytes(pickle.dumps({"proj1.weight": Hostile(mark)}, protocol))
    elif form == "whole module":
        torch.save(nn.Linear(2, 2), damaged / name)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(nn.Linear(2, 2)).save(damaged / name)
    with pytest.raises(CheckpointError, match=r"\(math\)\.pt holds code .* was not run"):
        load(Release(damaged, small.types, small.weights, small.prompts))
    assert not mark.exists()


def test_a_tensor_that_claims_to_be_huge_is_refused_before_it_is_made(damaged: Path, small: Release) -> None:
    replaced(LINK, lambda w: {**w, "proj1.weight": torch.zeros(1, 1).expand(10**8, 48)})(damaged)
    with pytest.raises(CheckpointError, match=f"{FILE}: proj1.weight has the shape"):
        load(Release(damaged, small.types, small.weights, small.prompts))


@pytest.mark.parametrize("pattern", ["mixture", "distillation"])
def test_a_pattern_that_the_links_are_not_for_is_refused(small: Release, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=f"pattern '{pattern}' does not fit this release.*planner->critic"):
        load(small, pattern=pattern)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sequential_lite", "unknown released system 'sequential_lite': did you mean 'sequential_light'"),
        ("/nowhere/at/all", "/nowhere/at/all.*a directory in the same layout"),
    ],
)
def test_a_release_that_is_nowhere_is_refused(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        RecursiveSystem.from_release(source)


def test_an_unknown_task_is_refused_with_those_there_are(small: Release) -> None:
    with pytest.raises(CheckpointError, match="unknown task 'coding': did you mean 'code'"):
        load(small, task="coding")
