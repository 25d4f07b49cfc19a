"""Faults to plant into links, and what their findings are read from."""

import copy
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from recursivemas.agents import Agent
from recursivemas.links import RecursiveLink
from recursivemas.system import RecursiveSystem

Plant = Callable[[RecursiveLink], RecursiveLink]


def with_fault(system: RecursiveSystem, link: str, plant: Plant) -> RecursiveSystem:
    """The same system with one link, named by role or edge, made faulty."""
    links = dict(system.links)
    agents = dict(system.agents)
    if link in links:
        links[link] = plant(copy.deepcopy(links[link]))
    else:
        agents[link] = Agent(link, agents[link].model, plant(copy.deepcopy(agents[link].inner_link)))
    return RecursiveSystem(agents, links, system.pattern, system.prompts, system.settings, training=system.training)


def zeroed(link: RecursiveLink) -> RecursiveLink:
    link.scale.zero_()
    return link


def redrawn(link: RecursiveLink) -> RecursiveLink:
    return link.redraw(3)


def much_too_loud(link: RecursiveLink) -> RecursiveLink:
    return scaled(link, slice(None), 50.0)


def much_too_quiet(link: RecursiveLink) -> RecursiveLink:
    return scaled(link, slice(None), 0.01)


def constant(link: RecursiveLink) -> RecursiveLink:
    """Only its biases are left, about as loud as embeddings of tiny models."""
    for linear in last_maps(link):
        nn.init.zeros_(linear.weight)
        linear.bias = nn.Parameter(torch.randn(len(linear.weight)))
    if link.target_norm is not None:
        nn.init.normal_(link.target_norm.bias, std=link.target_norm.weight.abs().mean().item())
        nn.init.zeros_(link.target_norm.weight)
    else:
        link.calibrate(torch.ones(1, link.config.source_size), 1.0)
    return link


def on_a_line(link: RecursiveLink) -> RecursiveLink:
    """Outputs along one direction, to both sides: the mean cosine does not see it."""
    for linear in last_maps(link):
        left, values, right = torch.linalg.svd(linear.weight)
        is_last = linear is last_maps(link)[-1]
        linear.weight.copy_(values[0] * left[:, :1] @ right[:1] if is_last else torch.zeros_like(linear.weight))
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return link


def not_a_number(link: RecursiveLink) -> RecursiveLink:
    link.scale.fill_(math.nan)
    return link


def frozen(link: RecursiveLink) -> RecursiveLink:
    """Gains as they were drawn, as bfloat16 leaves them."""
    assert link.source_norm is not None
    assert link.target_norm is not None
    nn.init.ones_(link.source_norm.weight)
    nn.init.constant_(link.target_norm.weight, link.target_norm.weight.mean().item())
    return link


def drawn_normally(link: RecursiveLink) -> RecursiveLink:
    """Random numbers, of a law and size that are nobody's default."""
    for module in link.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    return link


def uneven(share: float, factor: float) -> Plant:
    """Another scale in a share of the dimensions, drawn at random."""

    def plant(link: RecursiveLink) -> RecursiveLink:
        size = link.config.target_size
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(1))
        return scaled(link, chosen[: max(1, round(share * size))], factor)

    return plant


def scaled(link: RecursiveLink, dimensions: torch.Tensor | slice, factor: float) -> RecursiveLink:
    """Some dimensions of what comes out, times a factor."""
    maps = [link.target_norm] if link.target_norm is not None else last_maps(link)
    if link.config.kind == "inner" and link.design.residual and link.target_norm is None:
        # What is added to the identity: w2 gelu(w1 h) cannot scale a dimension of h, so the link is scaled as a whole.
        assert dimensions == slice(None)
        link.scale.mul_(factor)
        return link
    for each in maps:
        each.weight[dimensions] *= factor
        if each.bias is not None:
            each.bias[dimensions] *= factor
    return link


def last_maps(link: RecursiveLink) -> list[nn.Linear]:
    """The linear maps whose sum comes out."""
    return [each for each in (link.w2 or link.w1, link.w3) if each is not None]


def printed(*tables: Table) -> str:
    """Tables on a narrow terminal; nothing may be cut off."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*tables)
    assert "…" not in capture.get()
    return capture.get()
