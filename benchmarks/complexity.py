"""Proposition 3.1, measured: what a hand-off costs in latents and in text, over vocabulary, width, m, t and agents.

    python benchmarks/complexity.py                 all tables and the figure of docs/theory.md on cost, some minutes
    python benchmarks/complexity.py --only counts   without times: FLOPs and positions alone, the same on every machine
    python benchmarks/complexity.py --print-only    leave docs/theory.md and its figure as they are

N agents in a row, tiny ones with random weights, read a question of t words and what the one before has sent, and hand
on m latents or m words; the one who answers is left out, since it answers in text either way. FLOPs are those of the
operations that were really run (torch's FlopCounterMode: two for each multiplication and addition, attention counted
without its causal half), positions those that really went through a decoder. Times are CPU seconds of this process,
medians of repeats in which all settings and channels take turns: on a machine with other work they are a hint, and the
ratios of the two channels, taken repeat by repeat, are better than the times. All but the times follows from --seed.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice, pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from gradients import machine, random_model, save_figure, slope, write_tables
from results import table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from recursivemas import RecursiveSystem
from recursivemas.models import LanguageModel

NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
NUM_LAYERS = 2
CHANNELS = ("latent", "text")


class Setting(NamedTuple):
    """The sizes of the proposition."""

    vocab: int = 2000
    """|V|: words of the vocabulary."""
    width: int = 128
    """d: hidden size."""
    m: int = 16
    """Latent steps, or words, of a message."""
    t: int = 64
    """Words of the question, with the one that addresses its reader."""
    agents: int = 3
    """N: agents that hand on."""


SWEEPS = {
    "vocab": (300, 1000, 4000, 16000, 64000),
    "width": (64, 128, 256, 512),
    "m": (2, 8, 32, 128),
    "t": (16, 64, 256, 512),
    "agents": (1, 2, 4, 6),
}
LABELS = {"vocab": "|V|", "width": "d", "m": "m", "t": "t", "agents": "N"}


def settings() -> list[tuple[str, Setting]]:
    """Every sweep, one size at a time, the others as they are by default."""
    return [(name, Setting()._replace(**{name: value})) for name, values in SWEEPS.items() for value in values]


@cache
def model_of(vocab: int, width: int, seed: int) -> LanguageModel:
    """A random model that never ends its text: the special tokens are never the likeliest."""
    model = random_model(vocab, width, num_layers=NUM_LAYERS, seed=seed)
    with torch.no_grad():
        model.network.get_output_embeddings().weight[:3] = 0.0
    return model


def chain(setting: Setting, seed: int) -> RecursiveSystem:
    """N agents in a row that share a model, and one more to whom the last hands on.

    Each is addressed by a word of its own: agents whose prompts began alike would have the question read only once.
    """
    roles = NAMES[: setting.agents + 1]
    edges = [f"{source}->{target}" for source, target in pairwise(roles)]
    slots = {target: f" {{latents:{source}}}" for source, target in pairwise(roles)}
    return RecursiveSystem.build(
        agents=dict.fromkeys(roles, model_of(setting.vocab, setting.width, seed)),
        pattern={"name": "chain", "stages": [[role] for role in roles], "edges": edges, "answers": roles[-1]},
        prompts={
            "name": "chain",
            "roles": {
                role: {"always": f"w{place} {{question}}{slots.get(role, '')}"} for place, role in enumerate(roles)
            },
        },
        seed=seed,
        num_rounds=1,
        num_latent_steps=setting.m,
        max_new_tokens=setting.m,
    )


def question_of(setting: Setting) -> str:
    """A question of t words with the one that addresses its reader."""
    return " ".join(f"w{number % (setting.vocab - 3)}" for number in range(setting.t - 1))


@torch.no_grad()
def hand_on(system: RecursiveSystem, question: str, setting: Setting, channel: str) -> None:
    """All agents but the one who answers take their turns."""
    played = list(islice(system.unroll(question, channel=channel), setting.agents))
    for each in played:
        [message] = each.messages.values()
        sent = message.latents.shape[1] if message.latents is not None else len((message.texts or ("",))[0].split())
        assert sent == setting.m, f"{sent} words or latents were sent, not {setting.m}"


class Cost(NamedTuple):
    """What a question cost on one channel."""

    flops: float
    positions: int
    calls: int
    """Forward passes of a decoder."""


@contextmanager
def counted_positions(model: LanguageModel) -> Iterator[list[int]]:
    """The positions of every forward pass of a model's decoder."""
    found: list[int] = []

    def keep(module: Any, args: Any, kwargs: Mapping[str, Tensor]) -> None:
        found.append(kwargs["inputs_embeds"].shape[1])

    hook = model.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the attention that a CPU runs, which the counter does not know by itself."""
    return sdpa_flop_count(query, key, value)


def cost_of(system: RecursiveSystem, setting: Setting, channel: str, seed: int) -> Cost:
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: attention_flops})
    with counted_positions(model_of(setting.vocab, setting.width, seed)) as positions, counter:
        hand_on(system, question_of(setting), setting, channel)
    return Cost(float(counter.get_total_flops()), sum(positions), len(positions))


def seconds_of(systems: Mapping[Setting, RecursiveSystem], num_repeats: int) -> dict[Setting, dict[str, list[float]]]:
    """CPU seconds of each setting and channel, all of them in turn: what slows the machine down slows all of them down.

    The first of each, which warms up, does not count.
    """
    found: dict[Setting, dict[str, list[float]]] = {setting: {each: [] for each in CHANNELS} for setting in systems}
    for repeat in range(num_repeats + 1):
        for setting, system in systems.items():
            for channel in CHANNELS:
                started = time.process_time()
                hand_on(system, question_of(setting), setting, channel)
                if repeat:
                    found[setting][channel].append(time.process_time() - started)
        print(".", end="", flush=True)
    print()
    return found


class Shape(NamedTuple):
    """What the cost of a language model follows from."""

    vocab: int
    width: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def position(self) -> float:
        """FLOPs of one position, attention to others left out."""
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return 2.0 * self.layers * self.width * (attention + 3 * self.ffn)

    @property
    def attended(self) -> float:
        """FLOPs for each pair of a position and one that it attends to."""
        return 4.0 * self.layers * self.heads * self.head_dim

    @property
    def token(self) -> float:
        """FLOPs of the logits of one token."""
        return 2.0 * self.vocab * self.width

    @property
    def inner(self) -> float:
        """FLOPs of an inner link for one state."""
        return 4.0 * self.width**2

    @property
    def outer(self) -> float:
        """FLOPs of an outer link for one state, to a reader of the same width."""
        return 10.0 * self.width**2


def shape_of(setting: Setting) -> Shape:
    heads = setting.width // 32
    return Shape(setting.vocab, setting.width, NUM_LAYERS, 3 * setting.width, heads, heads, 32)


def by_calculation(shape: Shape, m: int, t: int, agents: int, channel: str) -> float:
    """FLOPs of N agents that hand on, from the sizes alone: the same operations one by one."""
    total = 0.0
    for agent in range(agents):
        received = m if agent else 0
        known = t + received
        pairs = t * t + received * known + sum(known + step for step in range(1, m))
        total += (known + m - 1) * shape.position + pairs * shape.attended
        total += m * shape.token if channel == "text" else (2 * m - 1) * shape.inner + m * shape.outer
    return total


# --- what came out ----------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One setting, by channel."""

    swept: str
    setting: Setting
    costs: dict[str, Cost]
    seconds: dict[str, list[float]]

    @property
    def flops_ratio(self) -> float:
        return self.costs["text"].flops / self.costs["latent"].flops

    @property
    def ratios(self) -> list[float]:
        """Text over latent, repeat by repeat."""
        pairs = zip(self.seconds["text"], self.seconds["latent"], strict=True)
        return [text / latent for text, latent in pairs]


def measure(seed: int, num_repeats: int) -> list[Measured]:
    """All settings; without repeats there are no times."""
    systems = {setting: chain(setting, seed) for _, setting in settings()}
    costs = {
        setting: {channel: cost_of(system, setting, channel, seed) for channel in CHANNELS}
        for setting, system in systems.items()
    }
    seconds = seconds_of(systems, num_repeats) if num_repeats else {}
    return [Measured(swept, setting, costs[setting], seconds.get(setting, {})) for swept, setting in settings()]


def costs_table(found: Sequence[Measured]) -> str:
    rows = []
    for each in found:
        latent, text = (each.costs[channel] for channel in CHANNELS)
        row = [
            f"{LABELS[each.swept]} = {getattr(each.setting, each.swept)}".replace("|", "\\|"),
            f"{latent.flops / 1e6:.1f}",
            f"{text.flops / 1e6:.1f}",
            f"{each.flops_ratio:.2f}",
            f"{latent.positions} / {text.positions}",
        ]
        if each.seconds:
            times = [1e3 * statistics.median(each.seconds[channel]) for channel in CHANNELS]
            ratios = each.ratios
            row += [
                f"{times[0]:.1f} / {times[1]:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            ]
        rows.append(row)
    header = ["", "latent, MFLOPs", "text, MFLOPs", "text / latent", "positions, latent / text"]
    if found[0].seconds:
        header += ["CPU ms, latent / text", "text / latent (range)"]
    return table(header, rows)


class Fit(NamedTuple):
    """Coefficients of terms, and how far what they give is from what was measured."""

    coefficients: list[float]
    deviations: Tensor

    def say(self) -> str:
        return f"{100 * self.deviations.median():.1f} % / {100 * self.deviations.max():.0f} %"


def terms_of(setting: Setting, channel: str) -> list[float]:
    """Those of the proposition: N m |V| d (text), N m d^2 (latents), N (t + m) d^2, N (t + m)^2 d."""
    vocab, width, m, t, agents = map(float, setting)
    is_text = channel == "text"
    own = [agents * m * vocab * width * is_text, agents * m * width**2 * (not is_text)]
    return [*own, agents * (t + m) * width**2, agents * (t + m) ** 2 * width]


def fit(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> Fit:
    """Least squares of relative errors; a term that would come out negative is left out."""
    matrix = torch.tensor(rows, dtype=torch.float64) / torch.tensor(targets, dtype=torch.float64)[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        chosen = matrix[:, kept]
        size = chosen.norm(dim=0)
        solution = torch.linalg.lstsq(chosen / size, torch.ones(len(matrix), 1, dtype=torch.float64)).solution[:, 0]
        if bool((solution >= 0).all()):
            break
        kept.pop(int(solution.argmin()))
    coefficients = [0.0] * matrix.shape[1]
    for place, value in zip(kept, (solution / size).tolist(), strict=True):
        coefficients[place] = value
    return Fit(coefficients, (chosen / size @ solution - 1).abs())


def fits_table(found: Sequence[Measured]) -> str:
    """The proposition's terms fitted to FLOPs, and to times with and without what a forward pass costs by itself."""
    pairs = [(each, channel) for each in found for channel in CHANNELS]
    rows = [terms_of(each.setting, channel) for each, channel in pairs]
    flops = fit(rows, [each.costs[channel].flops for each, channel in pairs])
    shapes = {each.setting: shape_of(each.setting) for each, _ in pairs}
    exact = max(
        abs(
            by_calculation(shapes[each.setting], each.setting.m, each.setting.t, each.setting.agents, channel)
            / each.costs[channel].flops
            - 1
        )
        for each, channel in pairs
    )
    shape = shape_of(Setting())
    width = shape.width
    given = [2.0, (2 * shape.inner + shape.outer) / width**2, shape.position / width**2, shape.attended / width]
    lines = [
        ["FLOPs, by calculation", *[f"{value:.1f}" for value in given], "", f"operation by operation: {exact:.1e}"],
        ["FLOPs, fitted", *[f"{value:.1f}" for value in flops.coefficients], "", flops.say()],
    ]
    if found[0].seconds:
        seconds = [statistics.median(each.seconds[channel]) for each, channel in pairs]
        plain = fit(rows, seconds)
        calls = [[*row, float(each.costs[channel].calls)] for row, (each, channel) in zip(rows, pairs, strict=True)]
        full = fit(calls, seconds)
        in_picoseconds = [f"{1e12 * value:.1f}" for value in plain.coefficients]
        with_calls = [f"{1e12 * value:.1f}" for value in full.coefficients[:-1]]
        lines += [
            ["CPU time, ps", *in_picoseconds, "", plain.say()],
            ["CPU time, ps, and passes", *with_calls, f"{1e3 * full.coefficients[-1]:.2f} ms", full.say()],
        ]
    header = ["", "N m \\|V\\| d (text)", "N m d² (latent)", "N (t + m) d²", "N (t + m)² d", "a forward pass"]
    return table([*header, "off by, median / worst"], lines)


def powers_table(found: Sequence[Measured]) -> str:
    """How cost grows with each size over its last two values, as a power: FLOPs, positions, time."""
    rows = []
    for swept in SWEEPS:
        last = [each for each in found if each.swept == swept][-2:]
        sizes = [getattr(each.setting, swept) for each in last]
        row = [LABELS[swept].replace("|", "\\|"), f"{sizes[0]} – {sizes[1]}"]
        for channel in CHANNELS:
            row.append(f"{slope(sizes, [each.costs[channel].flops for each in last]):.2f}")
            if found[0].seconds:
                times = [statistics.median(each.seconds[channel]) for each in last]
                row.append(f"{slope(sizes, times):.2f}")
        rows.append(row)
    each_channel = [
        f"{channel}, {what}"
        for channel in CHANNELS
        for what in ("FLOPs", "time")
        if what == "FLOPs" or found[0].seconds
    ]
    return table(["size", "between", *each_channel], rows)


REAL = {
    "Qwen3-1.7B": Shape(vocab=151936, width=2048, layers=28, ffn=6144, heads=16, kv_heads=8, head_dim=128),
    "Llama-3.2-1B": Shape(vocab=128256, width=2048, layers=16, ffn=8192, heads=32, kv_heads=8, head_dim=64),
    "Qwen2.5-Math-1.5B": Shape(vocab=151936, width=1536, layers=28, ffn=8960, heads=12, kv_heads=2, head_dim=128),
    "Gemma3-4B": Shape(vocab=262208, width=2560, layers=34, ffn=10240, heads=8, kv_heads=4, head_dim=256),
    "Llama-3.2-3B": Shape(vocab=128256, width=3072, layers=28, ffn=8192, heads=24, kv_heads=8, head_dim=128),
}
"""Sizes from the published configurations."""


def real_table() -> str:
    """The saving at the sizes of the paper's agents, by calculation: three of a kind, a question of 512 tokens."""
    rows = []
    for name, shape in REAL.items():
        ratios = []
        for words, latents in ((32, 32), (512, 512), (512, 32)):
            costs = [by_calculation(shape, m, 512, 3, kind) for m, kind in ((words, "text"), (latents, "latent"))]
            ratios.append(f"{costs[0] / costs[1]:.2f}")
        share = shape.token / (shape.position + shape.token)
        links = (2 * shape.inner + shape.outer) / shape.position
        rows.append([name, f"{100 * share:.0f} %", f"{100 * links:.1f} %", *ratios])
    header = ["agents", "logits, of a generated token", "links, beside a position", "32 words / 32 latents"]
    return table([*header, "512 / 512", "512 / 32"], rows)


def draw(found: Sequence[Measured]) -> None:
    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(14, 3.2), sharey=True, layout="constrained")
    for axes, swept in zip(panels, SWEEPS, strict=True):
        chosen = [each for each in found if each.swept == swept]
        sizes = [getattr(each.setting, swept) for each in chosen]
        axes.plot(sizes, [each.flops_ratio for each in chosen], color="tab:blue", marker="o", ms=4, label="FLOPs")
        shapes = [(shape_of(each.setting), each.setting) for each in chosen]
        expected = [
            by_calculation(shape, each.m, each.t, each.agents, "text")
            / by_calculation(shape, each.m, each.t, each.agents, "latent")
            for shape, each in shapes
        ]
        axes.plot(sizes, expected, color="black", ls=":", lw=1, label="by calculation")
        if found[0].seconds:
            times = [statistics.median(each.ratios) for each in chosen]
            axes.plot(sizes, times, color="tab:orange", marker="s", ms=4, lw=1, label="CPU time")
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(LABELS[swept])
    panels[0].set_ylabel("text / latent")
    panels[0].legend(fontsize=7)
    save_figure(figure, "theory-complexity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["counts"], help="FLOPs and positions, no times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repeats", type=int, default=7, help="times are medians of so many, the channels taking turns"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print-only", action="store_true", help="leave docs/theory.md and its figure as they are")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about = machine()
    print(about)
    found = measure(given.seed, 0 if given.only else given.repeats)
    tables = {
        "costs": f"{costs_table(found)}\n\n![text over latents](figures/theory-complexity.svg)",
        "powers": powers_table(found),
        "fits": fits_table(found),
        "real": real_table(),
    }
    for name, content in tables.items():
        print(f"\n{name}\n{content}")
    if not given.print_only:
        draw(found)
        write_tables(tables | {"machine": f"Times: {about}, {given.repeats} repeats."})


if __name__ == "__main__":
    main()
