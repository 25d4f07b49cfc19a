"""Assembly: the agents and links of a new system, of a saved one, and how all parts are written.

Knows models by name, and files; knows nothing of questions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recursivemas.agents import Agent
from recursivemas.checkpoint import (
    FORMAT_VERSION,
    LinkRecord,
    Manifest,
    describe_agent,
    inside,
    library_version,
    link_folder,
    load_agent_model,
    read_link,
    write_link,
    write_manifest,
)
from recursivemas.errors import CheckpointError, PatternError
from recursivemas.links import RecursiveLink
from recursivemas.loading import options_by_role
from recursivemas.models import LanguageModel
from recursivemas.parts import Parts
from recursivemas.patterns import Pattern
from recursivemas.publishing import CARD, model_card
from recursivemas.residency import turns_for

Linked = tuple[dict[str, Agent], dict[str, RecursiveLink]]
"""Agents by role, with their inner links, and the outer links by edge."""


def link_models(
    models: Mapping[str, LanguageModel], pattern: Pattern, *, design: str, options: Mapping[str, Any], seed: int
) -> Linked:
    """Agents for the models of all roles, and a new link for every edge; they are drawn from `seed`."""
    for role in pattern.roles:
        if role not in models:
            raise PatternError(f"the pattern '{pattern.name}' needs an agent for the role '{role}'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        agents = {
            role: Agent(role, model, RecursiveLink.inner(model.hidden_size, design=design, **options))
            for role, model in models.items()
        }
        links = {
            str(edge): RecursiveLink.outer(
                models[edge.source].hidden_size, models[edge.target].hidden_size, design=design, **options
            )
            for edge in pattern.graph
        }
    return agents, links


def read_linked(
    directory: Path,
    manifest: Manifest,
    options: Mapping[str, Mapping[str, Any]],
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    residency: str,
) -> Linked:
    """The agents and links of a saved system; roles with the same model and options share one copy of it.

    With residency 'one' each model leaves the device before the next is read. Raises `CheckpointError` naming the part
    that is missing, corrupt, or not the one that was saved.
    """
    chosen = options_by_role(options, manifest.agents)
    turns = turns_for(residency)
    models: dict[str, LanguageModel] = {}
    keys = {role: repr((record, sorted(chosen[role].items()))) for role, record in manifest.agents.items()}
    for role, record in manifest.agents.items():
        if keys[role] not in models:
            settings = {"dtype": dtype, "device": device, **chosen[role]}
            models[keys[role]] = load_agent_model(directory, role, record, **settings)
            if turns is not None:
                models[keys[role]].take_turns(turns)
    links = {name: read_link(inside(directory, saved.folder), saved.sha256) for name, saved in manifest.links.items()}
    for role in manifest.agents:
        if role not in links:
            raise CheckpointError(f"{directory}: the role '{role}' has no inner link")
    return {role: Agent(role, models[keys[role]], links.pop(role)) for role in manifest.agents}, links


def write_parts(draft: Path, parts: Parts, *, dtype: str | None) -> None:
    """Write all parts into an empty directory, with the manifest, and a model card if they were trained."""
    records = {}
    folders: dict[int, str] = {}
    for role, agent in parts.agents.items():
        model = agent.model
        if id(model) not in folders:
            folders[id(model)] = model.source or f"agents/{role}"
            if model.source is None:
                model.save_pretrained(draft / folders[id(model)], dtype=dtype)
        records[role] = describe_agent(draft, model, folders[id(model)])
    links = {
        name: LinkRecord(folder=link_folder(name), sha256=write_link(draft / link_folder(name), link, dtype=dtype))
        for name, link in parts.all_links.items()
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        library_version=library_version(),
        settings=parts.settings,
        pattern=parts.pattern,
        prompts=parts.prompts,
        agents=records,
        links=links,
        training=parts.training,
    )
    write_manifest(draft, manifest)
    if "stages" in parts.training:
        (draft / CARD).write_text(model_card(draft, manifest), encoding="utf-8")
