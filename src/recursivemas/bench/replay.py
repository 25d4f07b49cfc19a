"""Table 2 of the paper, replayed: what its token counts cost on this engine, in both arms.

The agents have the configurations of the paper's models and random weights; `scale` makes them so many times narrower
and shallower, and all lengths so many times shorter. How long a text is does not come from the weights, then, but is
given: end-of-reply tokens are forbidden, and the least number of tokens is the largest.

    text      every turn writes the same number of tokens, so that a question takes the tokens that the paper prints
    latent    every turn but the last thinks m steps; the last writes as many tokens as the paper prints for that arm

So the reduction in tokens is the paper's own, and the meter confirms it; time is what is measured. Latent steps are
forward passes like tokens: the reduction is also told with each of them counted as one. Both arms read the same prompts
and reuse their beginnings. The paper prints neither its prompts nor m of this table: 150 words of a question, 50 before
and 20 behind, and m = 80, from its figure 8, are assumed.

Knows models, systems and the printed table; knows nothing of terminals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recursivemas.bench.loops import Case, measure
from recursivemas.bench.playing import Load, play
from recursivemas.bench.sections import Row, Section
from recursivemas.bench.subjects import chain, configuration, numbered_questions, random_model, scaled
from recursivemas.bench.table2 import SPEEDUP, TOKEN_REDUCTION, Printed, printed
from recursivemas.bench.timing import Measured
from recursivemas.system import RecursiveSystem
from recursivemas.trace import Usage

Progress = Callable[[str], None]
AGENTS = {
    "sequential_light": (
        "Qwen/Qwen3-1.7B",
        "meta-llama/Llama-3.2-1B-Instruct",
        "Qwen/Qwen2.5-Math-1.5B-Instruct",
    ),
    "sequential_scaled": ("google/gemma-3-4b-it", "meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen3.5-4B"),
}
"""Planner, critic and solver of table 1 (recipes/paper/)."""
NUM_LATENT_STEPS, WORDS_BEFORE, WORDS_AFTER = 80, 200, 20


@dataclass(frozen=True)
class Cell:
    """One benchmark and number of rounds, replayed: seconds of the batch, and what its first question used."""

    system: str
    benchmark: str
    num_rounds: int
    paper: Printed
    seconds: Mapping[str, Measured]
    used: Mapping[str, Usage]

    @property
    def speedup(self) -> Measured:
        """Time of text over that of latents."""
        return self.seconds["text"].over(self.seconds["latent"])

    def reduction(self, *, with_steps: bool) -> float:
        """The share of the tokens of text that latents save; with each latent step counted as a token, or without."""
        latent, text = self.used["latent"], self.used["text"]
        return 1 - (latent.generated_tokens + with_steps * latent.latent_steps) / text.generated_tokens

    def to_row(self, batch_size: int) -> Row:
        """As a row of the table."""
        positions = {channel: usage.positions for channel, usage in self.used.items()}
        return {
            "system": self.system.removeprefix("sequential_"),
            "benchmark": self.benchmark,
            "r": self.num_rounds,
            "text, a question": self.seconds["text"].milliseconds(batch_size),
            "latent, a question": self.seconds["latent"].milliseconds(batch_size),
            "speed-up": self.speedup,
            "paper": self.paper.text_seconds / self.paper.latent_seconds,
            "tokens saved": _percent(self.reduction(with_steps=False)),
            "paper: saved": _percent(1 - self.paper.latent_tokens / self.paper.text_tokens),
            "saved, steps counted": _percent(self.reduction(with_steps=True)),
            "positions, text / latent": positions["text"] / positions["latent"],
        }


def replay(
    systems: Sequence[str],
    benchmarks: Sequence[str],
    *,
    scale: int,
    batch_size: int,
    repeats: int,
    rounds: Sequence[int] = (1, 2, 3),
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compiled: bool = False,
    progress: Progress | None = None,
) -> list[Section]:
    """Replay some benchmarks of some systems: the cells, and what they are together."""
    cells: list[Cell] = []
    for name in systems:
        if progress is not None:
            progress(f"{name}: making agents")
        system = random_system(name, scale, seed=seed, device=device, dtype=dtype)
        system.compile(compiled)
        questions = numbered_questions(batch_size, max(WORDS_BEFORE // scale - 1, 1), seed)
        _warm_up(system, questions)
        for benchmark in benchmarks:
            for num_rounds in rounds:
                paper = printed()[name, benchmark, num_rounds]
                cases = {
                    channel: Case(system, questions, load) for channel, load in loads(paper, num_rounds, scale).items()
                }
                told = _tell(progress, f"{name} {benchmark}, r = {num_rounds}")
                took, used = measure(cases, repeats, told, warm_up=())
                first = {channel: each[-1][0] for channel, each in used.items()}
                cells.append(Cell(name, benchmark, num_rounds, paper, took, first))
    return [_summary(cells, scale), _cells(cells, scale, batch_size)]


def random_system(name: str, scale: int, *, seed: int = 0, device: Any = None, dtype: Any = None) -> RecursiveSystem:
    """The agents of one of the paper's systems with random weights, in a chain with feedback."""
    configs = [scaled(configuration(model), scale) for model in AGENTS[name]]
    models = [random_model(config, seed=seed, device=device, dtype=dtype) for config in configs]
    return chain(models, after=max(WORDS_AFTER // scale, 1))


def loads(paper: Printed, num_rounds: int, scale: int) -> dict[str, Load]:
    """How both arms are played: all lengths are the paper's over `scale`."""
    num_turns = 3 * num_rounds
    tokens = max(round(paper.text_tokens / scale), num_turns)
    message = tokens // num_turns
    latent_steps = max(round(NUM_LATENT_STEPS / scale), 1)
    answer = max(round(paper.latent_tokens / scale), 1)
    return {
        "text": Load(num_rounds, 0, "text", message_tokens=message, answer_tokens=tokens - (num_turns - 1) * message),
        "latent": Load(num_rounds, latent_steps, "latent", answer_tokens=answer),
    }


def _warm_up(system: RecursiveSystem, questions: Sequence[str]) -> None:
    for channel in ("text", "latent"):
        play(system, questions, Load(2, 2, channel, message_tokens=2, answer_tokens=2))


def _summary(cells: Sequence[Cell], scale: int) -> Section:
    """All cells of each number of rounds together."""
    rows: list[Row] = []
    for num_rounds in sorted({cell.num_rounds for cell in cells}):
        some = [cell for cell in cells if cell.num_rounds == num_rounds]
        text, latent = (_sum([cell.seconds[channel] for cell in some]) for channel in ("text", "latent"))
        speedups = Measured(tuple(cell.speedup.median for cell in some))
        tokens = {channel: sum(cell.used[channel].generated_tokens for cell in some) for channel in ("text", "latent")}
        steps = sum(cell.used["latent"].latent_steps for cell in some)
        paper = [cell.paper for cell in some]
        rows.append(
            {
                "r": num_rounds,
                "columns": len(some),
                "speed-up": text.over(latent),
                "of a column": speedups,
                "paper": sum(each.text_seconds for each in paper) / sum(each.latent_seconds for each in paper),
                "headline": SPEEDUP[num_rounds],
                "tokens saved": _percent(1 - tokens["latent"] / tokens["text"]),
                "paper: saved": _percent(
                    1 - sum(each.latent_tokens for each in paper) / sum(each.text_tokens for each in paper)
                ),
                "headline: saved": _percent(TOKEN_REDUCTION[num_rounds]),
                "saved, steps counted": _percent(1 - (tokens["latent"] + steps) / tokens["text"]),
            }
        )
    note = (
        "The text arm is forced to the paper's token counts (end-of-reply tokens forbidden, least = most), shared "
        "evenly by its turns; the latent arm thinks m steps a turn, and its answer has the paper's tokens. So tokens "
        "saved are the paper's own, counted again by the meter, and what is measured is the speed-up: seconds of text "
        "over those of latents, of all columns together, and the median over the columns. Paper: the same columns, as "
        "printed; headline: its summary of all twelve. " + _how(scale)
    )
    return Section("replay", "Table 2 replayed: latents beside text, by rounds", rows, note=note)


def _cells(cells: Sequence[Cell], scale: int, batch_size: int) -> Section:
    return Section(
        "replay-cells",
        "Table 2 replayed, every column",
        [cell.to_row(batch_size) for cell in cells],
        note=f"Batch {batch_size}. {_how(scale)}",
    )


def _how(scale: int) -> str:
    steps = max(round(NUM_LATENT_STEPS / scale), 1)
    if scale == 1:
        return f"Random weights at real size, m = {steps}."
    return f"Random weights, widths, depths and all lengths divided by {scale}, m = {steps} for {NUM_LATENT_STEPS}."


def _sum(parts: Sequence[Measured]) -> Measured:
    return Measured(tuple(map(sum, zip(*(part.values for part in parts), strict=True))), parts[0].unit)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _tell(progress: Progress | None, what: str) -> Progress | None:
    return None if progress is None else lambda arm: progress(f"{what}: {arm}")
