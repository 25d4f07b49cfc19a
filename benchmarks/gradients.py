"""Theorem 4.1, measured: what a link and what the text channel let through backwards, alone and over rounds.

    python benchmarks/gradients.py                     the tables and figures of docs/theory.md on gradients, minutes
    python benchmarks/gradients.py --only rounds       one part: theorem, links, notes, sweep, rounds, hops, anchor
    python benchmarks/gradients.py --print-only        leave docs/theory.md and its figures as they are

The text channel is differentiated as the theorem does it, through the expected embedding E^T softmax(W h); text that is
decoded lets nothing through at all. Two sizes of a Jacobian J at h are given: its spectral norm as it stands, and the
*relative* one, |J| |h| / |R(h)|: a change of h by one per cent changes the message by at most so many per cent. Only
the relative one can be compared between channels, and between models whose embeddings are of different loudness.

Links that were only aligned are trained once (a minute for each world) and kept in runs/theory/; systems that were
trained under other objectives are taken from runs/results/, where `python benchmarks/results.py ward` leaves them, and
left out if they are not there. Everything follows from --seed.
"""

import argparse
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from results import table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.func import jacrev, vmap
from transformers import PreTrainedTokenizerFast

from recursivemas import RecursiveSystem
from recursivemas.agents import Agent
from recursivemas.links import DESIGNS, LinkConfig, RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.patterns import Edge
from recursivemas.training.alignment import AlignmentPairs, alignment_loss, alignment_pairs
from recursivemas.training.data import Question, encode_turns
from recursivemas.training.gradients import Backflow
from recursivemas.training.outer import OuterLoop, OuterSettings
from recursivemas.worlds import load_world

DOCUMENT = Path("docs/theory.md")
FIGURES = Path("docs/figures")
PLACE = Path("runs/theory")
RESULTS = Path("runs/results")
WORLDS = ("ward", "relay")
NUM_LINK_SEEDS = 3
"""Fresh links are drawn so many times."""
ENTROPIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 6.0, 8.0)
"""Entropies in nats that the temperature is set to reach."""
BINS = (0.0, 0.01, 0.1, 0.5, 1.0, float("inf"))


class Given(NamedTuple):
    """What the command line says."""

    seed: int
    num_questions: int


# --- pages, figures, models (complexity.py takes them from here) ------------------------------------------------------


def write_tables(tables: Mapping[str, str]) -> None:
    """Put tables between their markers in docs/theory.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, content in tables.items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        if start not in text:
            raise SystemExit(f"{DOCUMENT} has no marker {start}")
        head, tail = text.split(start)
        text = f"{head}{start}\n{content}\n{end}{tail.split(end, 1)[1]}"
    DOCUMENT.write_text(text, encoding="utf-8")


def save_figure(figure: Any, name: str) -> None:
    """Write a figure; the same figure is the same file."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = name
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def machine() -> str:
    """What the figures were made on."""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} {platform.machine()} cores, {threads} thread(s), torch {torch.__version__}{load}"


def random_model(vocab_size: int, hidden_size: int, *, num_layers: int = 2, seed: int = 0) -> LanguageModel:
    """A Qwen3 with random weights and a vocabulary of words w0, w1, ...; three of its tokens are special."""
    special = ["<|pad|>", "<|eos|>", "<|unk|>"]
    words = special + [f"w{number}" for number in range(vocab_size - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>", unk_token="<|unk|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden_size,
        "head_dim": 32,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 32,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return LanguageModel.from_config(config, fast, seed=seed, dtype="float32", device="cpu")


# --- Jacobians --------------------------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Singular values of Jacobians, one row a state, largest first, and |h| / |R(h)| of each state."""

    values: Tensor
    loudness: Tensor

    @property
    def largest(self) -> Tensor:
        return self.values[:, 0]

    @property
    def relative(self) -> Tensor:
        """The largest, in per cent of the message for each per cent of the state."""
        return self.largest * self.loudness

    @classmethod
    def joined(cls, parts: Sequence["Spectrum"]) -> "Spectrum":
        """All rows; where widths differ, the values that all have, from the largest and from the smallest."""
        width = min(part.values.shape[1] for part in parts)
        values = torch.cat([part.values[:, _spread(part.values.shape[1], width)] for part in parts])
        return cls(values, torch.cat([part.loudness for part in parts]))


def _spread(count: int, width: int) -> Tensor:
    return torch.linspace(0, count - 1, width).round().long()


def spectrum_of(link: Callable[[Tensor], Tensor], states: Tensor) -> Spectrum:
    """The Jacobian of a link at states (state, source_size), by differentiating it."""
    outputs = link(states).detach()
    jacobians = vmap(jacrev(link))(states).detach()
    return Spectrum(torch.linalg.svdvals(jacobians), states.norm(dim=-1) / outputs.norm(dim=-1))


class TextChannel(NamedTuple):
    """R_text(h) = E^T softmax(W h / T) with tables of one row a token."""

    embeddings: Tensor
    output: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: LanguageModel) -> "TextChannel":
        return cls(model.embed(torch.arange(model.vocab_size)), model.network.get_output_embeddings().weight)

    def double(self) -> "TextChannel":
        return TextChannel(self.embeddings.double(), self.output.double())

    @property
    def table_norms(self) -> float:
        """|E| |W|, spectral: what the theorem takes to be of order 1."""
        return (torch.linalg.matrix_norm(self.embeddings, 2) * torch.linalg.matrix_norm(self.output, 2)).item()

    def probabilities(self, states: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
        return (states @ self.output.T / temperature).softmax(dim=-1)

    def mapped(self, states: Tensor) -> Tensor:
        """R_text(h): the expected embedding."""
        return self.probabilities(states) @ self.embeddings

    def jacobian(self, probabilities: Tensor, temperature: float = 1.0) -> Tensor:
        """E^T (diag p - p p^T) W / T for one distribution."""
        weighted = self.embeddings * probabilities[:, None]
        mean = weighted.sum(dim=0)
        return (weighted.T @ self.output - torch.outer(mean, probabilities @ self.output)) / temperature

    def spectrum(self, states: Tensor, probabilities: Tensor, temperatures: Sequence[float]) -> Spectrum:
        pairs = zip(probabilities, temperatures, strict=True)
        values = torch.stack([torch.linalg.svdvals(self.jacobian(*pair)) for pair in pairs])
        return Spectrum(values, states.norm(dim=-1) / (probabilities @ self.embeddings).norm(dim=-1))


def entropy(probabilities: Tensor) -> Tensor:
    """In nats."""
    return torch.special.entr(probabilities).sum(dim=-1)


def covariance_norm(probabilities: Tensor, num_iterations: int = 300) -> Tensor:
    """Spectral norm of diag p - p p^T for each distribution, by power iteration."""
    vectors = probabilities.clone()
    vectors[torch.arange(len(vectors)), probabilities.argmax(dim=-1)] *= -1
    norms = vectors.norm(dim=-1, keepdim=True)
    for _ in range(num_iterations):
        vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        vectors = probabilities * (vectors - (probabilities * vectors).sum(dim=-1, keepdim=True))
        norms = vectors.norm(dim=-1, keepdim=True)
    return norms.squeeze(1)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Exponent of a power law, by least squares on logarithms."""
    x, y = torch.tensor(xs).log(), torch.tensor(ys).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def middle(values: Tensor) -> float:
    return values.float().median().item()


# --- systems ----------------------------------------------------------------------------------------------------------


@cache
def trained(world: str) -> RecursiveSystem:
    """As shipped: every round's answer counts, and the alignment stays on."""
    return RecursiveSystem.from_pretrained(world, dtype="float32", device="cpu")


@cache
def aligned(world: str) -> RecursiveSystem:
    """The same agents with links before the outer loop; trained now if that has not been done."""
    for place in (RESULTS / world / "aligned", PLACE / world):
        if (place / "system").exists():
            return RecursiveSystem.from_pretrained(place / "system", dtype="float32", device="cpu")
    place = PLACE / world
    settings = [f"output={place}", "save_dtype=float32"]
    command = ["train", f"recipes/{world}.yaml", "--stage", "inner,alignment"]
    for setting in settings:
        command += ["--set", setting]
    print("recursivemas", *command, flush=True)
    executable = Path(sys.executable).with_name("recursivemas")
    subprocess.run([str(executable), *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return RecursiveSystem.from_pretrained(place / "system", dtype="float32", device="cpu")


def fresh(world: str, design: str, seed: int) -> RecursiveSystem:
    """The same agents with links drawn anew, and sized as `RecursiveSystem.build` does it."""
    base = trained(world)
    return RecursiveSystem.build(
        agents={role: agent.model for role, agent in base.agents.items()},
        pattern=base.pattern,
        prompts=base.prompts,
        design=design,
        seed=seed,
        **base.settings.model_dump(),
    )


class ExpectedWords(RecursiveLink):
    """The text channel as a link: the expected embedding of the word that the sender would write next."""

    def __init__(self, kind: str, sender: LanguageModel, embeddings: Tensor) -> None:
        """`embeddings` are those of the sender's words in the tables of the reader."""
        sizes = {"source_size": sender.hidden_size, "target_size": embeddings.shape[1]}
        super().__init__(LinkConfig(kind=kind, design="1-layer", **sizes))
        self._logits = sender.logits
        self._embeddings = embeddings
        self.gain = nn.Parameter(torch.ones(()))
        """Nothing to learn; with it, gradients are followed as far as they are with links."""

    def forward(self, states: Tensor) -> Tensor:
        return self.gain * (self._logits(states).softmax(dim=-1) @ self._embeddings)


@torch.no_grad()
def words_of(sender: LanguageModel, reader: LanguageModel) -> Tensor:
    """How the reader embeds every token of the sender: the mean over its own tokens of the same word."""
    rows = []
    for token in range(sender.vocab_size):
        ids = reader.encode(sender.decode([token]).strip())
        rows.append(reader.embed(torch.tensor(ids)).mean(dim=0) if ids else torch.zeros(reader.hidden_size))
    return torch.stack(rows)


def in_expected_words(world: str) -> RecursiveSystem:
    """The same agents, thinking and handing on expected words: the theorem's text channel in the whole loop."""
    base = trained(world)
    team = {
        role: Agent(role, each.model, ExpectedWords("inner", each.model, words_of(each.model, each.model)))
        for role, each in base.agents.items()
    }
    links = {}
    for edge in base.pattern.graph:
        sender, reader = base.agents[edge.source].model, base.agents[edge.target].model
        links[str(edge)] = ExpectedWords("outer", sender, words_of(sender, reader))
    settings = base.settings.model_copy(update={"message": "outer"})
    return RecursiveSystem(team, links, base.pattern, base.prompts, settings)


BUNDLED = "trained: every round, anchor (bundled)"
OBJECTIVES = {
    "trained: every round": "every round",
    "trained: last round, anchor": "last round, anchor",
    "trained: last round": "last round",
}


def unrolled_systems(given: Given) -> dict[str, RecursiveSystem]:
    """The ward system with every kind of link whose gradients are followed over rounds."""
    found = {
        "fresh": fresh("ward", "res-2-layer", given.seed),
        "aligned": aligned("ward"),
        BUNDLED: trained("ward"),
    }
    for label, name in OBJECTIVES.items():
        place = RESULTS / "ward" / name / "system"
        if place.exists():
            found[label] = RecursiveSystem.from_pretrained(place, dtype="float32", device="cpu")
        else:
            print(f"left out: '{label}', since there is no {place}")
    return {**found, "expected words": in_expected_words("ward")}


def questions_of(world: str, given: Given) -> list[Question]:
    """Questions of the validation split."""
    source = load_world(world)
    return [
        Question(id=each.id, text=each.question, answer=source.answer_text(each.target))
        for each in source.samples("validation", given.num_questions, given.seed)
    ]


@contextmanager
def taken_apart(system: RecursiveSystem) -> Iterator[list[tuple[RecursiveLink, Tensor, Tensor]]]:
    """Everything that goes through links as a message (not as a step of a thought): link, input, output."""
    found: list[tuple[RecursiveLink, Tensor, Tensor]] = []

    def keep(link: RecursiveLink, inputs: tuple[Tensor], output: Tensor) -> None:
        if inputs[0].dim() == 3:
            found.append((link, inputs[0], output))

    hooks = [link.register_forward_hook(keep) for link in system.all_links.values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def sent_states(system: RecursiveSystem, questions: Sequence[Question], most: int = 128) -> dict[str, Tensor]:
    """States that the links of a system meet in a run: of each role, as it thinks; evenly chosen."""
    with taken_apart(system) as calls:
        for _ in system.unroll([each.text for each in questions]):
            pass
    found = {}
    for role, agent in system.agents.items():
        states = torch.cat([states.flatten(0, 1) for link, states, _ in calls if link is agent.inner_link])
        found[role] = states[_spread(len(states), min(most, len(states)))]
    return found


# --- parts ------------------------------------------------------------------------------------------------------------


def theorem(given: Given) -> dict[str, str]:
    """The link as the theorem has it, h + W2 gelu(W1 h) with Kaiming-normal W1 and W2, over widths."""
    rows, curves = [], {}
    widths = (64, 128, 256, 512, 1024)
    for width in widths:
        found: dict[str, list[Tensor]] = {}
        for seed in range(given.seed, given.seed + 5):
            torch.manual_seed(seed)
            link = RecursiveLink.inner(width, bias=False)
            states = torch.randn(2, width)
            directions = nn.functional.normalize(torch.randn(64, width), dim=-1)
            ours = vmap(jacrev(link))(states).detach() - torch.eye(width)
            assert link.w2 is not None
            nn.init.kaiming_normal_(link.w1.weight)
            nn.init.kaiming_normal_(link.w2.weight)
            jacobians = vmap(jacrev(link))(states).detach()
            values = torch.linalg.svdvals(jacobians)
            branch = jacobians - torch.eye(width)
            for name, value in {
                "norm": values[:, 0],
                "least": values[:, -1],
                "branch": torch.linalg.svdvals(branch)[:, 0],
                "quadratic": torch.einsum("kd,nde,ke->nk", directions, branch, directions).abs().flatten(),
                "along": torch.einsum("nde,ke->nkd", jacobians, directions).norm(dim=-1).flatten(),
                "ours": torch.linalg.svdvals(ours)[:, 0],
            }.items():
                found.setdefault(name, []).append(value)
        curves[width] = {name: torch.cat(values) for name, values in found.items()}
        each = curves[width]
        rows.append(
            [
                str(width),
                f"{middle(each['norm']):.2f} ({each['norm'].min():.2f})",
                f"{middle(each['branch']):.2f}",
                f"{middle(each['quadratic']):.4f} / {each['quadratic'].quantile(0.95):.4f}",
                f"{middle(each['along']):.2f}",
                f"{middle(each['least']):.4f}",
                f"{middle(each['ours']):.4f}",
            ]
        )
    names = ("norm", "branch", "quadratic", "along", "least", "ours")
    powers = [f"{slope(widths, [middle(curves[width][name]) for width in widths]):+.2f}" for name in names]
    rows.append(["*power of d*", *powers])
    header = [
        "d",
        "‖J‖₂ (least)",
        "‖J − I‖₂",
        "abs uᵀ(J − I)u, median / 95 %",
        "‖Ju‖",
        "smallest σ",
        "‖J − I‖₂, our start",
    ]
    return {"theorem": table(header, rows)}


def links(given: Given) -> dict[str, str]:
    """Jacobians of real links at states that they meet: fresh ones of every design, aligned, trained."""
    rows = []
    for world in WORLDS:
        questions = questions_of(world, given)[:32]
        stages: dict[str, list[RecursiveSystem]] = {
            f"fresh, {design}": [fresh(world, design, given.seed + extra) for extra in range(NUM_LINK_SEEDS)]
            for design in (DESIGNS if world == "ward" else ("res-2-layer",))
        }
        stages |= {"aligned": [aligned(world)], "trained": [trained(world)]}
        parts: dict[tuple[str, str], list[Spectrum]] = {}
        for stage, systems in stages.items():
            for system in systems:
                for kind, spectrum in _spectra(system, questions):
                    parts.setdefault((kind, stage), []).append(spectrum)
        for kind in ("inner", "outer", "inner, then outer"):
            for stage in stages:
                each = Spectrum.joined(parts[kind, stage])
                rows.append(
                    [
                        world,
                        kind,
                        stage,
                        f"{middle(each.largest):.3f} ({each.largest.min():.3f}–{each.largest.max():.3f})",
                        f"{middle(each.values.mean(dim=1)):.3f}",
                        f"{middle(each.values[:, -1]):.4f}",
                        f"{middle(each.relative):.2f} ({each.relative.min():.2f}–{each.relative.max():.2f})",
                        f"{middle(each.values.mean(dim=1) * each.loudness):.2f}",
                    ]
                )
    header = ["world", "link", "", "‖J‖₂ (range)", "mean σ", "smallest σ", "relative ‖J‖₂ (range)", "relative mean σ"]
    return {"links": table(header, rows)}


def _spectra(system: RecursiveSystem, questions: Sequence[Question]) -> Iterator[tuple[str, Spectrum]]:
    states = sent_states(system, questions)
    for role, agent in system.agents.items():
        yield "inner", spectrum_of(agent.inner_link, states[role])
    for name, link in system.links.items():
        source = Edge.parse(name).source
        inner = system.agents[source].inner_link
        yield "outer", spectrum_of(link, inner(states[source]).detach())
        yield "inner, then outer", spectrum_of(partial(_in_turn, inner, link), states[source])


def _in_turn(inner: RecursiveLink, outer: RecursiveLink, states: Tensor) -> Tensor:
    return outer(inner(states))


class Notes(NamedTuple):
    """Text against links at the states from which agents write their own notes."""

    entropy: Tensor
    covariance: Tensor
    bound: Tensor
    text: Spectrum
    link: Spectrum
    norms: dict[str, float]
    """|E| |W| of each agent."""


@cache
def notes_of(world: str, given: Given) -> Notes:
    """Every token of every note of a run in text, three rounds; each agent's inner link beside its own embedding."""
    system = trained(world)
    states: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for played in system.unroll(
            [each.text for each in questions_of(world, given)[:32]], channel="text", num_rounds=3
        ):
            if not played.turn.speaks:
                thoughts = played.agent.think(played.reading, 4, in_words=True)
                states.setdefault(played.turn.role, []).append(thoughts.flatten(0, 1))
    parts = []
    norms = {}
    for role, several in states.items():
        agent, own = system.agents[role], torch.cat(several)
        channel = TextChannel.of(agent.model).double()
        norms[role] = channel.table_norms
        # In float32 nothing would be left of 1 - p where an agent is sure.
        probabilities = channel.probabilities(own.double())
        text = channel.spectrum(own.double(), probabilities, [1.0] * len(own))
        differentiated = jacrev(channel.mapped)(own[0].double())
        assert torch.allclose(channel.jacobian(probabilities[0]), differentiated, atol=1e-9)
        bound = norms[role] * entropy(probabilities)
        link = spectrum_of(agent.inner_link, own)
        parts.append((entropy(probabilities), covariance_norm(probabilities), bound, text, link))
    entropies, covariances, bounds, texts, of_links = zip(*parts, strict=True)
    return Notes(
        torch.cat(entropies),
        torch.cat(covariances),
        torch.cat(bounds),
        Spectrum.joined(texts),
        Spectrum.joined(of_links),
        norms,
    )


def notes(given: Given) -> dict[str, str]:
    """Text channel against trained inner link over the entropies of the agents' own notes."""
    rows, steps = [], []
    for world in WORLDS:
        found = notes_of(world, given)
        total = len(found.entropy)
        for low, high in pairwise(BINS):
            chosen = (found.entropy >= low) & (found.entropy < high)
            if not bool(chosen.any()):
                continue
            text, link = found.text.largest[chosen], found.link.largest[chosen]
            relative = found.text.relative[chosen], found.link.relative[chosen]
            name = f"≥ {low:g}" if high == float("inf") else f"{low:g} – {high:g}"
            rows.append(
                [
                    world,
                    name,
                    f"{chosen.sum().item()} of {total}",
                    f"{middle(text):.2g}",
                    f"{middle(link):.2g}",
                    f"{100 * (text < link).float().mean():.0f} %",
                    f"{middle(relative[0]):.2g}",
                    f"{middle(relative[1]):.2g}",
                    f"{100 * (relative[0] < relative[1]).float().mean():.0f} %",
                ]
            )
        tightness = found.text.largest / found.bound.clamp_min(1e-30)
        steps.append(
            [
                world,
                f"{100 * (found.covariance <= found.entropy + 1e-6).float().mean():.0f} %",
                f"{middle(found.covariance / found.entropy.clamp_min(1e-30)):.2f}",
                f"{100 * (found.text.largest <= found.bound + 1e-6).float().mean():.0f} %",
                f"{middle(tightness):.1e} / {tightness.max():.1e}",
                ", ".join(f"{role} {norm:.0f}" for role, norm in found.norms.items()),
            ]
        )
    header = ["world", "entropy (nats)", "tokens", "text ‖J‖₂", "link ‖J‖₂", "text < link"]
    header += ["text, relative", "link, relative", "text < link"]
    chain = ["world", "‖S‖ ≤ H", "‖S‖ / H", "‖J‖ ≤ ‖E‖‖W‖H", "‖J‖ / (‖E‖‖W‖H), median / most", "‖E‖‖W‖"]
    return {"notes": table(header, rows), "bound": table(chain, steps)}


class Point(NamedTuple):
    """The text channel of a random model at one entropy (medians over states)."""

    entropy: float
    covariance: float
    largest: float
    relative: float


@torch.no_grad()
def sweep_of(vocab_size: int, hidden_size: int, seed: int, num_states: int = 2) -> tuple[float, list[Point]]:
    """A random model's entropy as it is, and its text channel at temperatures that give the entropies asked for."""
    model = random_model(vocab_size, hidden_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (num_states, 12), generator=generator)
    states = model.states(ids)[:, -1]
    channel = TextChannel.of(model)
    points = []
    for target in (each for each in ENTROPIES if each < 0.95 * torch.tensor(vocab_size).log().item()):
        temperatures = _temperatures(channel, states, target)
        probabilities = channel.probabilities(states, temperatures[:, None])
        found = channel.spectrum(states, probabilities, temperatures.tolist())
        covariance = middle(covariance_norm(probabilities))
        points.append(Point(target, covariance, middle(found.largest), middle(found.relative)))
    return middle(entropy(channel.probabilities(states))), points


def _temperatures(channel: TextChannel, states: Tensor, target: float) -> Tensor:
    """By bisection, the temperature at which each state's distribution has an entropy."""
    low, high = torch.full((len(states),), -12.0), torch.full((len(states),), 6.0)
    for _ in range(60):
        half = (low + high) / 2
        is_high = entropy(channel.probabilities(states, half.exp()[:, None])) > target
        low, high = torch.where(is_high, low, half), torch.where(is_high, half, high)
    return ((low + high) / 2).exp()


def sweep(given: Given) -> dict[str, str]:
    """The text channel of random models over entropy, width and vocabulary; and the figure, with the agents' notes."""
    rows, curves = [], {}
    for hidden_size in (64, 256, 1024):
        for vocab_size in (300, 1500, 8000):
            own, points = sweep_of(vocab_size, hidden_size, given.seed)
            curves[hidden_size, vocab_size] = points
            at = {point.entropy: point for point in points}
            low = [point for point in points if point.entropy <= 0.1]
            power = slope([point.entropy for point in low], [point.relative for point in low])
            peak = max(points, key=lambda point: point.relative)
            rows.append(
                [
                    str(hidden_size),
                    str(vocab_size),
                    f"{own:.2f}",
                    f"{_crossing(points, 1.0):.3f}",
                    *[f"{at[each].relative:.2f}" if each in at else "" for each in (0.01, 0.1, 0.3, 1.0, 4.0)],
                    f"{peak.relative:.2f} at {peak.entropy:g}",
                    f"{power:.2f}",
                    f"{at[0.01].covariance / 0.01:.2f} / {at[1.0].covariance:.2f}",
                ]
            )
    draw_entropy(curves, given)
    header = [
        "d",
        "\\|V\\|",
        "H at T = 1",
        "reaches 1 at H =",
        *[f"H = {each:g}" for each in (0.01, 0.1, 0.3, 1.0, 4.0)],
    ]
    header += ["largest", "power of H, H ≤ 0.1", "‖S‖ / H at 0.01, ‖S‖ at 1"]
    caption = "\n\n![the text channel's Jacobian over entropy](figures/theory-entropy.svg)"
    return {"sweep": table(header, rows) + caption}


def _crossing(points: Sequence[Point], level: float) -> float:
    """The entropy from which on the relative Jacobian is above a level, by interpolation of logarithms."""
    for low, high in pairwise(points):
        if low.relative < level <= high.relative:
            share = math.log(level / low.relative) / math.log(high.relative / low.relative)
            return math.exp(math.log(low.entropy) + share * math.log(high.entropy / low.entropy))
    return float("nan")


def draw_entropy(curves: Mapping[tuple[int, int], Sequence[Point]], given: Given) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    colours = {64: "tab:blue", 256: "tab:orange", 1024: "tab:green"}
    lines = {300: ":", 1500: "--", 8000: "-"}
    for (width, vocab), points in curves.items():
        style = {"color": colours[width], "ls": lines[vocab], "lw": 1.2}
        xs = [point.entropy for point in points]
        left.plot(xs, [point.covariance for point in points], **style)
        right.plot(xs, [point.relative for point in points], **style, label=f"random, d = {width}, |V| = {vocab}")
    left.plot([1e-5, 1], [1e-5, 1], color="black", lw=0.8, label="H, the theorem's bound")
    for world, colour in zip(WORLDS, ("tab:red", "tab:purple"), strict=True):
        found = notes_of(world, given)
        seen = (found.entropy > 1e-5).nonzero()[::4, 0]
        left.scatter(
            found.entropy[seen], found.covariance[seen], s=4, alpha=0.4, color=colour, label=f"{world}, own notes"
        )
        right.scatter(found.entropy[seen], found.text.relative[seen], s=4, alpha=0.4, color=colour)
        right.axhline(middle(found.link.relative), color=colour, lw=1, label=f"{world}, trained inner link (median)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("entropy of the next token (nats)")
    left.set_ylim(1e-5, 1.5)
    left.set_ylabel("‖diag p − p pᵀ‖₂")
    right.set_ylabel("relative ‖J‖₂ of the text channel")
    left.legend(fontsize=7)
    right.legend(fontsize=6)
    save_figure(figure, "theory-entropy")


# --- over rounds ------------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """One backward pass: what came back, and the cross-entropy of the last round's answer."""

    backflow: Backflow
    loss: float


def flow(system: RecursiveSystem, questions: Sequence[Question], num_rounds: int, objective: str) -> Flow:
    """Unroll a system as the outer loop does, and go back from the loss; every question counts as 1, not as 1 / n."""
    for link in system.all_links.values():
        link.requires_grad_(True)
        link.zero_grad()
    settings = OuterSettings(num_rounds=num_rounds, round_weights=objective)
    weights = settings.weights_of(num_rounds)
    backflow = Backflow(system.all_links)
    losses = OuterLoop(system, questions, settings).losses_by_round(questions, weights, backflow)
    torch.stack([weights[round] * each.sum() for round, each in losses.items()]).sum().backward()
    return Flow(backflow, losses[num_rounds].mean().item())


ROUNDS = range(1, 7)
FIRST = ("planner->critic", 1)
"""The message that is sent first of all."""


def rounds(given: Given) -> dict[str, str]:
    """The gradient that reaches the first message of round 1, over the number of rounds, under each objective."""
    questions = questions_of("ward", given)
    rows, curves = [], {}
    for name, system in unrolled_systems(given).items():
        for objective in ("last", "every"):
            flows = {n: flow(system, questions, n, objective) for n in ROUNDS}
            norms = {n: each.backflow.before[FIRST] for n, each in flows.items()}
            curves[name, objective] = norms
            cells = [f"{middle(each):.1e} ({each.mean():.1e})" for each in norms.values()]
            # Where every round counts, what arrives is its own answer's gradient, and falls as 1 / n.
            power = f"{(norms[6].median() / norms[2].median()) ** 0.25:.2f}" if objective == "last" else ""
            losses = " / ".join(f"{flows[n].loss:.2f}" for n in (1, 3, 6))
            rows.append([name, objective, *cells, power, losses])
    draw_rounds(curves)
    header = [
        "links",
        "loss counts",
        *[f"n = {n}" for n in ROUNDS],
        "a round, n = 2 to 6",
        "cross-entropy, n = 1 / 3 / 6",
    ]
    caption = "\n\n![gradient that reaches round 1](figures/theory-rounds.svg)"
    return {"rounds": table(header, rows) + caption}


def draw_rounds(curves: Mapping[tuple[str, str], Mapping[int, Tensor]]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True, layout="constrained")
    for axes, objective in zip(panels, ("last", "every"), strict=True):
        chosen = {name: norms for (name, which), norms in curves.items() if which == objective}
        for name, norms in chosen.items():
            xs = list(norms)
            [line] = axes.plot(xs, [middle(each) for each in norms.values()], marker="o", ms=3, lw=1.2, label=name)
            low = [each.quantile(0.1).item() for each in norms.values()]
            high = [each.quantile(0.9).item() for each in norms.values()]
            axes.fill_between(xs, low, high, alpha=0.08, color=line.get_color())
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-9)
        axes.set_xlabel("rounds unrolled, n")
        axes.set_title("the last round's answer counts" if objective == "last" else "every round's answer counts")
    panels[0].set_ylabel("gradient of a question at the first message")
    panels[0].legend(fontsize=6)
    save_figure(figure, "theory-rounds")


def hops(given: Given) -> dict[str, str]:
    """Where the gradient is lost: in the links, or in the agents between them (last round's answer, four rounds)."""
    questions = questions_of("ward", given)
    rows = []
    for name, system in unrolled_systems(given).items():
        across_links, across_agents = [], []
        for before, after in _passed_back(system, questions):
            across_links.append(before.states / before.message)
            if after is not None:
                across_agents.append(before.message / after.states)
        factors = [_geometric(torch.cat(each)) for each in (across_links, across_agents)]
        hop = factors[0] * factors[1]
        spread = [torch.cat(each).quantile(torch.tensor([0.1, 0.9])) for each in (across_links, across_agents)]
        cells = [f"{factor:.2f} ({low:.2f}–{high:.2f})" for factor, (low, high) in zip(factors, spread, strict=True)]
        rows.append([name, *cells, f"{hop:.2f}", f"{hop**3:.3f}"])
    header = ["links", "link, relative (10–90 %)", "agent, relative (10–90 %)", "a hop", "a round: three hops"]
    return {"hops": table(header, rows)}


def _geometric(factors: Tensor) -> float:
    """The mean that multiplies along a chain."""
    return factors.log().mean().exp().item()


class Crossing(NamedTuple):
    """Relative gradients |g| |x| of each question, at the states of a sender and at the message made of them."""

    states: Tensor
    message: Tensor


def _passed_back(system: RecursiveSystem, questions: Sequence[Question]) -> Iterator[tuple[Crossing, Crossing | None]]:
    """Every hop of four rounds, and after it the one that its reader makes; the last one has none."""
    gradients: dict[int, Tensor] = {}

    def watch(link: RecursiveLink, inputs: tuple[Tensor], output: Tensor) -> None:
        for tensor in (inputs[0], output):
            if tensor.dim() == 3 and tensor.requires_grad:
                tensor.register_hook(partial(gradients.__setitem__, id(tensor)))

    hooks = [link.register_forward_hook(watch) for link in system.all_links.values()]
    with taken_apart(system) as calls:
        flow(system, questions, 4, "last")
    for hook in hooks:
        hook.remove()
    outer = set(system.links.values())
    through_inner = system.settings.message == "inner+outer"
    crossings = []
    for place, (link, states, message) in enumerate(calls):
        if link in outer:
            source = calls[place - 1][1] if through_inner else states
            crossings.append(Crossing(*(_size(gradients[id(each)], each) for each in (source, message))))
    yield from zip(crossings, [*crossings[1:], None], strict=True)


def _size(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.flatten(1).norm(dim=1) * tensor.detach().flatten(1).norm(dim=1)


def anchor(given: Given) -> dict[str, str]:
    """How much of a link's gradient comes from round 1, with and without the alignment loss beside it."""
    questions = questions_of("ward", given)
    rows = []
    for name, system in {"aligned": aligned("ward"), BUNDLED: trained("ward")}.items():
        pull = _anchor_gradient(system, given)
        for objective in ("last", "every"):
            cells = []
            for n in ROUNDS:
                backflow = flow(system, questions, n, objective).backflow
                first = _flat(backflow.gradient(FIRST[0], 1)) / len(questions)
                total = sum(_flat(backflow.gradient(FIRST[0], round)) for round in range(1, n + 1)) / len(questions)
                shares = [(first.norm() / each.norm()).item() for each in (total, total + pull)]
                cells.append(f"{shares[0]:.3f} / {shares[1]:.3f} ({(pull.norm() / total.norm()).item():.2f})")
            rows.append([name, objective, *cells])
    return {"anchor": table(["links", "loss counts", *[f"n = {n}" for n in ROUNDS]], rows)}


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([each.flatten() for _, each in sorted(gradients.items())])


def _anchor_gradient(system: RecursiveSystem, given: Given) -> Tensor:
    """What the alignment loss, as the outer loop has it, asks of the parameters of the first message's link."""
    edge = Edge.parse(FIRST[0])
    sender, reader = system.agents[edge.source], system.agents[edge.target]
    samples = load_world("ward").role_samples("train", 1024, given.seed, role=edge.source)
    pairs: AlignmentPairs = alignment_pairs(
        sender.model, reader.model, encode_turns(samples, sender.model, system.prompts)
    )
    link = system.links[FIRST[0]]
    link.requires_grad_(True)
    link.zero_grad()
    # The loop takes the mean over the edges.
    (alignment_loss(link, sender.inner_link(pairs.states).detach(), pairs.targets) / len(system.links)).backward()
    found = {name: each.grad.clone() for name, each in link.named_parameters() if each.grad is not None}
    link.zero_grad()
    return _flat(found)


PARTS: dict[str, Callable[[Given], dict[str, str]]] = {
    "theorem": theorem,
    "links": links,
    "notes": notes,
    "sweep": sweep,
    "rounds": rounds,
    "hops": hops,
    "anchor": anchor,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=96, help="questions whose gradients are followed over rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print-only", action="store_true", help="leave docs/theory.md and its figures as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.print_only:
        globals()["save_figure"] = lambda figure, name: plt.close(figure)
    given = Given(options.seed, options.questions)
    print(machine())
    for name in [options.only] if options.only else PARTS:
        tables = PARTS[name](given)
        for part, content in tables.items():
            print(f"\n{part}\n{content}", flush=True)
        if not options.print_only:
            write_tables(tables)


if __name__ == "__main__":
    main()
