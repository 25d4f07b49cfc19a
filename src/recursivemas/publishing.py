"""A saved system among others: its model card, and its way to the Hugging Face hub.

The card says what the system is made of (base models, with their licences where these are known), what it was trained
on and how, what it has reached (with the number of questions and standard errors), where its limits are and how it is
loaded. All of it is taken from the system's files and from reports of `recursivemas eval`; what they do not say, the
card does not say either. Knows files and the hub; knows nothing of tensors.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recursivemas.checkpoint import MANIFEST, SUFFIXES, AgentRecord, Manifest, inside, read_manifest, verify_sha256
from recursivemas.errors import ConfigError, InputError, OutputError

CARD = "README.md"
_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")


def model_card(
    directory: Path,
    manifest: Manifest,
    *,
    reports: Sequence[Mapping[str, Any]] = (),
    licences: Mapping[str, str] | None = None,
    name: str | None = None,
) -> str:
    """The card of a saved system, as Markdown.

    `reports` are those of evaluations (the content of report.json), `licences` those of base models by name, and `name`
    is where the system is to be had.
    """
    parts = [
        _front_matter(manifest, licences or {}),
        _what_it_is(manifest),
        _agents(manifest, licences or {}),
        _links(directory, manifest),
        _training(manifest.training),
        _results(manifest.training, reports),
        _limits(manifest, reports),
        _how_to_load(name or "DIRECTORY"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_report(place: Path) -> dict[str, Any]:
    """The report of an evaluation: a report.json, or the directory it is in. Raises `InputError`."""
    file = place / "report.json" if place.is_dir() else place
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in ("task", "n", "arms"):
            found[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} cannot be read as the report of an evaluation ({error}); give what `recursivemas eval --out` wrote"
        ) from None
    assert isinstance(found, dict)
    return found


def push(
    directory: Path,
    name: str,
    *,
    private: bool = False,
    reports: Sequence[Mapping[str, Any]] = (),
    token: str | None = None,
) -> str:
    """Put a saved system on the hub as the repository `name`, in one commit; return its address.

    Its card is written anew, with `reports` and the licences that the hub knows, unless its README.md was changed by
    hand. Raises `CheckpointError` for a system that is not whole, `ConfigError` for a name that cannot be or without a
    token, `OutputError` if the hub does not take it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    manifest = read_manifest(directory)
    for record in manifest.agents.values():
        if record.local:
            verify_sha256(inside(directory, record.model), record.sha256)
    for link in manifest.links.values():
        verify_sha256(inside(directory, link.folder), link.sha256)
    if not _NAME.match(name):
        raise ConfigError(f"'{name}' cannot be the name of a repository; write it as OWNER/NAME")
    token = token or huggingface_hub.get_token()
    if token is None:
        raise ConfigError(
            "there is no token of the Hugging Face hub; sign in with `hf auth login`, or put one into HF_TOKEN, and "
            "push again"
        )
    api = huggingface_hub.HfApi(token=token)
    try:
        name = str(api.create_repo(name, private=private, exist_ok=True, repo_type="model").repo_id)
        card = _own_card(directory, manifest)
        if card is None:
            licences = _known_licences(api, manifest)
            card = model_card(directory, manifest, reports=reports, licences=licences, name=name)
        files = {file.relative_to(directory).as_posix(): file for file in sorted(directory.rglob("*")) if _goes(file)}
        content: dict[str, Path | bytes] = {**files, CARD: card.encode()}
        commit = api.create_commit(
            name,
            operations=[huggingface_hub.CommitOperationAdd(path, given) for path, given in content.items()],
            commit_message=f"recursivemas {manifest.library_version}: {manifest.settings.name}",
            repo_type="model",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OutputError(f"the hub did not take '{name}': {' '.join(str(error).split())[:300]}") from None
    return str(commit.repo_url)


def _goes(file: Path) -> bool:
    return file.is_file() and (file.suffix in SUFFIXES or file.name == MANIFEST) and not file.name.startswith(".")


def _own_card(directory: Path, manifest: Manifest) -> str | None:
    """The README.md of a system, if somebody has written in it."""
    try:
        found = (directory / CARD).read_text(encoding="utf-8")
    except OSError:
        return None
    return None if found == model_card(directory, manifest) else found


def _known_licences(api: Any, manifest: Manifest) -> dict[str, str]:
    """What the hub says of the licences of base models; those it does not know are left out."""
    from huggingface_hub.errors import HfHubHTTPError

    found = {}
    for name in _base_models(manifest):
        try:
            tags = api.model_info(name).tags or []
        except (HfHubHTTPError, OSError, ValueError):
            continue
        licence = next((tag for tag in tags if tag.startswith("license:")), None)
        if licence is not None:
            found[name] = licence.removeprefix("license:")
    return found


# --- what a card says -------------------------------------------------------------------------------------------------


def _base_models(manifest: Manifest) -> list[str]:
    return list(dict.fromkeys(record.model for record in manifest.agents.values() if not record.local))


def _front_matter(manifest: Manifest, licences: Mapping[str, str]) -> str:
    lines = ["---", "library_name: recursivemas", "tags: [recursivemas, multi-agent, latent-communication]"]
    bases = _base_models(manifest)
    if bases:
        lines += ["base_model:", *(f"- {name}" for name in bases)]
    sets = sorted(set(_hub_sets(manifest.training.get("stages", {}).get("data", {}).get("sets", []))))
    if sets:
        lines += ["datasets:", *(f"- {name}" for name in sets)]
    same = set(licences.values()) if licences.keys() >= set(bases) else set()
    if len(same) == 1 and not any(record.local for record in manifest.agents.values()):
        lines.append(f"license: {same.pop()}")
    return "\n".join([*lines, "---"])


def _hub_sets(sets: Any) -> list[str]:
    paths = [str(each.get("path", "")) for each in sets if isinstance(each, Mapping)] if isinstance(sets, list) else []
    return [path for path in paths if path.count("/") == 1 and "." not in path.rpartition("/")[2]]


def _what_it_is(manifest: Manifest) -> str:
    settings, pattern = manifest.settings, manifest.pattern
    description = f" {pattern.description}" if pattern.description else ""
    return (
        f"# {settings.name}\n\n"
        f"{len(manifest.agents)} frozen language models that hand each other hidden states instead of text, through "
        f"trained links ([recursivemas](https://arxiv.org/abs/2604.25917) in the pattern `{pattern.name}`)."
        f"{description} The role `{pattern.answers}` answers after {_rounds(settings.num_rounds)}, with "
        f"{settings.num_latent_steps} latent thoughts a turn."
    )


def _rounds(number: int) -> str:
    return f"{number} round" + "s" * (number != 1)


def _agents(manifest: Manifest, licences: Mapping[str, str]) -> str:
    rows = [[role, _model(record), record.model_type, str(record.hidden_size)] for role, record in _records(manifest)]
    unknown = "see its page"
    for row, (_, record) in zip(rows, _records(manifest), strict=True):
        row.append("in this repository" if record.local else licences.get(record.model, unknown))
    return "## Agents\n\n" + _table(["role", "model", "family", "width", "licence"], rows)


def _records(manifest: Manifest) -> list[tuple[str, AgentRecord]]:
    return list(manifest.agents.items())


def _model(record: AgentRecord) -> str:
    if record.local:
        return f"`{record.model}` (here)"
    revision = f" at `{record.revision[:12]}`" if record.revision else ""
    held = f", in {record.quantization}" if record.quantization else ""
    return f"[{record.model}](https://huggingface.co/{record.model}){revision}{held}"


def _links(directory: Path, manifest: Manifest) -> str:
    rows = []
    for name, record in manifest.links.items():
        config = json.loads((inside(directory, record.folder) / "config.json").read_text(encoding="utf-8"))
        sizes = f"{config['source_size']} → {config['target_size']}"
        rows.append([f"`{name}`", config["kind"], config["design"], sizes])
    return "## Links\n\n" + _table(["link", "kind", "design", "width"], rows)


def _training(training: Mapping[str, Any]) -> str:
    stages = training.get("stages", {})
    if not stages:
        return ""
    recipe = training.get("recipe", {})
    lines = [f"- data: {_data(training)}"]
    outer = stages.get("outer")
    if isinstance(outer, Mapping) and "steps" in outer:
        settings = recipe.get("outer", {})
        lines.append(
            f"- outer loop: {outer['steps']} steps of {settings.get('batch_size', '?')} out of {outer['questions']} "
            f"questions, learning rate {settings.get('lr', '?')}; weights of step {outer['best_step']}"
        )
        if outer.get("stopped"):
            lines.append(f"- stopped early: {outer['stopped']}")
    early = sorted({stage.split(" ")[0] for stage in stages} & {"inner", "alignment"}, reverse=True)
    if early:
        lines.append(f"- stages before: {', '.join(early)}")
    lines += [
        f"- {key}: `{training[key]}`" for key in ("command", "commit", "seed") if training.get(key) not in (None, "")
    ]
    text = "## Training\n\nOnly the links were trained; the language models are as their authors left them.\n\n"
    text += "\n".join(lines)
    if recipe:
        text += f"\n\nThe whole recipe is in `{MANIFEST}`, under `training.recipe`."
    return text


def _data(training: Mapping[str, Any]) -> str:
    world = training.get("world")
    if isinstance(world, Mapping):
        return f"the made-up world `{world.get('name')}` (seed {world.get('seed', 0)})"
    sets = training.get("stages", {}).get("data", {}).get("sets", [])
    named = [str(each.get("path")) for each in sets if isinstance(each, Mapping) and each.get("path")]
    return ", ".join(dict.fromkeys(named)) or "not recorded"


def _results(training: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    outer = training.get("stages", {}).get("outer", {})
    scores = outer.get("validation") or {}
    if scores:
        step = str(outer["best_step"])
        n = outer.get("num_validation")
        asked = f"{n} validation questions" if n else "validation questions"
        before = _with_error(next(iter(scores.values())), n)
        parts.append(
            f"On the {asked} {_with_error(scores[step], n)} (at the start of the outer loop {before}). The weights "
            "were chosen by it, so it is on the high side."
        )
    for report in reports:
        rows = [
            [str(arm["arm"]), str(arm.get("rounds", "")), f"{arm['accuracy']:.4f} ± {arm['stderr']:.4f}"]
            for arm in report["arms"]
        ]
        named = f"Task `{report['task']}`, {report['n']} questions, seed {report.get('seed', 0)}"
        scored = f", scored by `{report['score']}`" if report.get("score") else ""
        parts.append(f"{named}{scored} (mean ± standard error):\n\n" + _table(["arm", "rounds", "score"], rows))
    return "## Results\n\n" + "\n\n".join(parts) if parts else ""


def _with_error(score: float, n: int | None) -> str:
    """A mean of scores between 0 and 1; their standard error is largest where each of them is 0 or 1."""
    if n is None or not 0 <= score <= 1:
        return f"{score:.4f}"
    return f"{score:.4f} ± {(score * (1 - score) / n) ** 0.5:.4f}"


def _limits(manifest: Manifest, reports: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "- Links are made for these models, revisions and tokenizers, and are refused with others.",
        "- What the agents can do, and what they get wrong, comes from their base models, and so do terms of use.",
        f"- Trained with {_rounds(manifest.settings.num_rounds)} and {manifest.settings.num_latent_steps} latent "
        "thoughts; with other numbers it is another system.",
        "- What agents hand each other cannot be read; that an answer is right does not show that it was heeded "
        "(`recursivemas inspect links`, and the controls of `recursivemas eval`, can).",
    ]
    if not reports:
        lines.append("- No result on held-out questions is recorded here.")
    return "## Limits\n\n" + "\n".join(lines)


def _how_to_load(name: str) -> str:
    return (
        "## How to load\n\n```python\nfrom recursivemas import RecursiveSystem\n\n"
        f'system = RecursiveSystem.from_pretrained("{name}")\n'
        'print(system.run("What is 17 * 24?").text)\n```\n\n'
        f"or `recursivemas run {name} QUESTION`."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
