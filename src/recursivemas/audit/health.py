"""Looking at links by themselves: what can be told of any system, whatever it was made for and by whom.

    weights    A link that was never trained holds the random numbers it was drawn with. The singular values of such a
               matrix follow the law of Marchenko and Pastur, whatever the law of the numbers, to a relative error of
               about 1 / sqrt(rows * columns); what is learned sets some directions apart. So each spectrum is laid
               beside the law, once at the scale of PyTorch's default and once at the matrix's own. In narrow matrices a
               short training hides in that error; it shows in the numbers themselves, which were drawn uniformly (as
               PyTorch does) or normally (as the learned branches of this package start) and then are neither.
    gains      The gains of a LayerNorm start all equal. In bfloat16 around 1 they cannot move: a step of the optimizer
               is smaller than what can be written.
    outputs    Every sender reads the same number of words of its own vocabulary, drawn at random (a text of ours would
               be noise to agents of a small world). What its links make of its states is laid beside the embeddings
               that the reader is used to: how loud in all, how loud in each dimension, and whether outputs for
               different words differ.

Knows systems; knows nothing of conversations, of what the figures mean (`verdicts.py`) or of how they are shown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from recursivemas.audit.records import GainFigures, LinkDiagnosis, LinkFigures, OutputFigures, WeightFigures
from recursivemas.audit.variety import variety_of
from recursivemas.audit.verdicts import STANDS_OUT, UNEVEN, UNEVEN_AT_ALL, judge_link
from recursivemas.config import parse
from recursivemas.errors import ConfigError
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.patterns import Edge
from recursivemas.system import RecursiveSystem
from recursivemas.training.recipe import Recipe, starting_system

_ROWS, _WORDS, _FIRST = 16, 24, 4
"""The probe: so many rows of so many words; states at the first few words, which have hardly been told anything, are
left out."""
_KEPT_VALUES = 64
_CHUNK = 16384


@torch.no_grad()
def examine_links(
    system: RecursiveSystem, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[LinkDiagnosis]:
    """Look at every link of a system by itself: inner ones in the order of the roles, then outer ones.

    `seed` draws the words of the probe. Costs one reading of 384 tokens for each model, and the singular values of each
    matrix: about three seconds for widths of 2,048, ten for 4,096, on a CPU.
    """
    starts = starting_links(system)
    probes: dict[int, _Probe] = {}
    for agent in system.agents.values():
        if id(agent.model) not in probes:
            probes[id(agent.model)] = _Probe.of(agent.model, seed)
    diagnoses = []
    for name, link in system.all_links.items():
        edge = Edge.parse(name) if name in system.links else None
        sender = system.agents[name if edge is None else edge.source]
        reader = system.agents[name if edge is None else edge.target].model
        states = probes[id(sender.model)].states
        if edge is not None and system.settings.message == "inner+outer":
            states = sender.inner_link(states)
        moved, moved_by_tensor = _moved(link, None if starts is None else starts.get(name))
        figures = LinkFigures(
            link=name,
            kind=link.config.kind,
            parameters=sum(each.numel() for each in link.parameters()),
            output_size=link.config.target_size,
            moved=moved,
            moved_by_tensor=moved_by_tensor,
            learned_share=learned_share(link, states).mean().item(),
            weights={
                tensor.removesuffix(".weight"): weight_figures(weight)
                for tensor, weight in link.named_parameters()
                if weight.ndim == 2
            },
            gains={
                module_name: gain_figures(module.weight)
                for module_name, module in link.named_modules()
                if isinstance(module, nn.LayerNorm)
            },
            output=_output_figures(states, link(states), reader, probes[id(reader)]),
        )
        diagnoses.append(LinkDiagnosis(figures, judge_link(figures)))
        if progress is not None:
            progress(len(diagnoses), len(system.all_links))
    return diagnoses


# --- weights ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def marchenko_pastur(rows: int, columns: int) -> Float[Tensor, " value"]:
    """Singular values of a matrix of independent numbers of mean 0 and variance 1, the largest first, as quantiles.

    Eigenvalues x of X X^T / n (n the longer side, c the shorter over the longer) have the density
    sqrt((x - a)(b - x)) / (2 pi c x) between a, b = (1 -+ sqrt(c))^2.
    """
    shorter, longer = sorted((rows, columns))
    c = shorter / longer
    low, high = (1 - c**0.5) ** 2, (1 + c**0.5) ** 2
    # With x = middle - half * cos(angle) the density has no poles; at c = 1 it is their limit that remains.
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    half = (high - low) / 2
    values = low + half * (1 - angle.cos())
    density = half * (1 + angle.cos()) if c == 1 else (half * angle.sin()).square() / values
    distribution = functional.pad(torch.cumulative_trapezoid(density, angle), (1, 0))
    wanted = (torch.arange(shorter, dtype=torch.float64) + 0.5) / shorter * distribution[-1]
    after = torch.searchsorted(distribution, wanted).clamp(min=1)
    part = (wanted - distribution[after - 1]) / (distribution[after] - distribution[after - 1])
    return (longer * torch.lerp(values[after - 1], values[after], part)).sqrt().flip(0)


def singular_values(matrix: Float[Tensor, "row column"]) -> Float[Tensor, " value"]:
    """The singular values, the largest first, as roots of the eigenvalues of the smaller Gram matrix.

    In float32 that is several times faster than a singular value decomposition for wide links; values below 1/3000 of
    the largest come out as anything below that.
    """
    matrix = matrix.double() if min(matrix.shape) <= 512 else matrix.float()
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).double().cpu()


def weight_figures(weight: Float[Tensor, "target source"]) -> WeightFigures:
    """A matrix beside one that was drawn at random. Figures are not numbers (nan) for one that holds such."""
    rows, columns = weight.shape
    size = rows * columns
    default = (3 * columns) ** -0.5  # nn.Linear draws uniformly between -+ 1 / sqrt(columns)
    law = marchenko_pastur(rows, columns)
    finite = bool(weight.isfinite().all())
    values = singular_values(weight) if finite else torch.full_like(law, math.nan)
    rms = weight.float().square().mean().sqrt().item() if finite else math.nan
    unit = weight.float() / (rms or 1.0)
    # Standard errors, for `size` independent numbers: of the root mean square of uniform ones, relative; and of the
    # fourth moment of normal ones. Rounding to bfloat16 takes the largest number up by up to 2^-8.
    largest = unit.abs().max().item() / 3**0.5
    return WeightFigures(
        shape=(rows, columns),
        scale=rms / default,
        spectrum=_thinned(values),
        drawn_spectrum=_thinned(law * default),
        distance=((values - law * default).norm() / (law * default).norm()).item(),
        structure=((values - law * rms).norm() / (law * rms).norm()).item() * size**0.5 if rms else 0.0,
        beyond_uniform=(largest - 1 - 2**-8) / (0.2 / size) ** 0.5,
        off_normal=(unit.pow(4).mean().item() - 3) / (24 / size) ** 0.5,
    )


def _thinned(values: Float[Tensor, " value"]) -> tuple[float, ...]:
    places = torch.linspace(0, len(values) - 1, min(len(values), _KEPT_VALUES)).round().long()
    return tuple(values[places].tolist())


def gain_figures(gains: Float[Tensor, " width"]) -> GainFigures:
    """The most frequent gain, and how many are exactly that."""
    values, counts = gains.detach().float().cpu().unique(return_counts=True)
    first = int(counts.argmax())
    return GainFigures(values[first].item(), counts[first].item() / len(gains))


# --- the start, where it is known -------------------------------------------------------------------------------------


_DRAWN_FROM = ("agents", "pattern", "prompts", "seed", "message", "links")
"""Keys of a recipe that decide the links it starts with; others may have changed since it was recorded."""


def starting_links(system: RecursiveSystem) -> dict[str, RecursiveLink] | None:
    """The links as they were before training, drawn again: inner ones by role, outer ones by edge.

    None if it is not known: the system has no record of its training, or it was trained on from links that were given.
    """
    record = system.training.get("recipe")
    if not isinstance(record, dict) or "seed" not in record:
        return None
    kept = {name: value for name, value in record.items() if name in _DRAWN_FROM}
    agents = {} if record.get("agents") else {"system": ""}
    try:
        # Where the text came from says nothing of the start, but a recipe has it.
        recipe = parse(Recipe, {**kept, **agents, "data": "unknown", "output": ""}, where="the record of the training")
        return starting_system(system, recipe).all_links if recipe.links.start == "new" else None
    except ConfigError:
        return None  # written by another version


def _moved(link: RecursiveLink, start: RecursiveLink | None) -> tuple[float | None, dict[str, float | None] | None]:
    """How far a link is from where it started, in all and by tensor; None for both if that is not known."""
    if start is None:
        return None, None
    then = {tensor: weight.detach().cpu() for tensor, weight in start.named_parameters()}
    now = {tensor: weight.detach().cpu() for tensor, weight in link.named_parameters()}
    if {tensor: weight.shape for tensor, weight in then.items()} != {t: weight.shape for t, weight in now.items()}:
        return None, None
    total = _relative(*(torch.cat([weights[tensor].flatten() for tensor in now]) for weights in (now, then)))
    return total, {tensor: _relative(now[tensor], then[tensor]) for tensor in now}


def _relative(now: Tensor, start: Tensor) -> float | None:
    change, size = (now - start).norm().item(), start.norm().item()
    return change / size if size else None if change else 0.0


# --- outputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """What a model thinks of some words, and what it is used to read."""

    states: Float[Tensor, "place hidden_size"]
    """Its last hidden states while it reads them."""
    words: Float[Tensor, "place hidden_size"]
    """Its embeddings of the same words."""
    usual: Float[Tensor, " hidden_size"]
    """Root mean square of its embedding table, by dimension."""

    @classmethod
    def of(cls, model: LanguageModel, seed: int) -> "_Probe":
        special = {*model.tokenizer.all_special_ids, *model.tokenizer.added_tokens_decoder}
        vocabulary = torch.tensor([each for each in range(len(model.tokenizer)) if each not in special])
        generator = torch.Generator().manual_seed(seed)
        ids = vocabulary[torch.randint(len(vocabulary), (_ROWS, _WORDS), generator=generator)].to(model.device)
        squares = torch.zeros(model.hidden_size, dtype=torch.float64)
        for chunk in torch.arange(model.vocab_size).split(_CHUNK):
            squares += model.embed(chunk).float().square().sum(dim=0).double().cpu()
        return cls(
            states=model.states(ids)[:, _FIRST:].flatten(0, 1),
            words=model.embed(ids)[:, _FIRST:].flatten(0, 1).float().cpu(),
            usual=(squares / model.vocab_size).sqrt(),
        )


def _output_figures(inputs: Tensor, outputs: Tensor, reader: LanguageModel, probe: _Probe) -> OutputFigures:
    inputs, outputs = inputs.float().cpu(), outputs.float().cpu()
    norms = outputs.norm(dim=-1) / reader.mean_embedding_norm
    return OutputFigures(
        loudness=norms.mean().item(),
        loudness_spread=norms.std(unbiased=False).item(),
        outputs=variety_of(outputs.unsqueeze(1)),
        inputs=variety_of(inputs.unsqueeze(1)),
        words=variety_of(probe.words.unsqueeze(1)),
        uneven=uneven_dimensions(outputs, probe.usual) if bool(outputs.isfinite().all()) else {},
    )


def uneven_dimensions(
    outputs: Float[Tensor, "place hidden_size"], usual: Float[Tensor, " hidden_size"]
) -> dict[int, float]:
    """Dimensions in which outputs are far louder or quieter than in most, beside what is usual in each, and how far.

    Most means half of them: the half whose ratios lie closest together. A dimension that the reader hardly uses counts
    as a quarter of the usual one, since no link need be that quiet.
    """
    usual = usual.clamp(min=usual.median().item() / 4)
    found = outputs.double().square().mean(dim=0).sqrt()
    ratios = (found / usual).clamp(min=1e-12).log()
    ordered, half = ratios.sort().values, len(ratios) // 2 + 1
    first = int((ordered[half - 1 :] - ordered[: len(ordered) - half + 1]).argmin())
    off = ratios - ordered[first : first + half].mean()
    common = 1.48 * off.abs().median().item()  # of normal deviations, the standard deviation
    far = (off.abs() > math.log(UNEVEN)) | ((off.abs() > math.log(UNEVEN_AT_ALL)) & (off.abs() > STANDS_OUT * common))
    return {int(place): off[place].exp().item() for place in far.nonzero().flatten()}


def learned_share(link: RecursiveLink, states: Float[Tensor, "*batch source_size"]) -> Float[Tensor, "*batch"]:
    """Norm of the part of a link that is not its residual, over the norm of their sum, for each state.

    1 for a design without a residual. A LayerNorm or a scale after the sum does not count.
    """
    source = states.float()
    if not link.design.residual:
        return torch.ones(source.shape[:-1])
    learned = link.w1(source if link.source_norm is None else link.source_norm(source))
    if link.w2 is not None:
        learned = link.w2(functional.gelu(learned))
    whole = learned + (source if link.w3 is None else link.w3(source))
    return (learned.norm(dim=-1) / whole.norm(dim=-1)).cpu()
