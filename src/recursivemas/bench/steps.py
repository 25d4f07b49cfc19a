"""One step at a time: of latent thought, and of decoding, each beside the least that it could cost.

    latent step     beside a bare forward of the same body on transformers' own cache, with no link, mask or positions
    decode step     beside `generate` of transformers: same model, prompt and precision, greedy, no early end
    link            beside a decode step of `generate`: what it costs to map a message
    uncached        beside a roll-out that reads everything again at every step, with the body alone: same messages
    floor           beside the time it takes to read the weights once, at the speed at which memory is copied

Prompts are random tokens, as long in every row. Knows agents, caches and models; knows nothing of rounds or prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recursivemas.agents import Agent
from recursivemas.bench.playing import of_length
from recursivemas.bench.sections import Goal, Row, Section
from recursivemas.bench.timing import Act, Arm, Measured, ready, seconds_of, take_turns
from recursivemas.cache import LatentCache
from recursivemas.decoding import decode
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.rollout import latent_rollout, latent_rollout_reference

Progress = Callable[[str], None]
LATENT_STEP_GOAL, DECODE_STEP_GOAL = 1.10, 1.05
FLOOR_GOAL, COMPILED_GOAL = 0.7, 5.0
GOAL_WIDTH = 256
"""The least width at which the goals for single steps hold: below, a link is not small beside its body."""
UNCACHED_GOALS = {(120, 16): 5.0, (200, 48): 12.0, (500, 48): 18.0}
"""By tokens of the prompt and latent steps: how many times faster the cached roll-out should be, in a batch of 8."""
SAME_MESSAGES = 1e-4
"""Norm of the difference over norm of the message, in float32 (docs/concepts.md)."""


@dataclass(frozen=True)
class Prompt:
    """A batch of random prompts of one length, read by a model."""

    model: LanguageModel
    input_ids: Int[Tensor, "batch position"]
    cache: LatentCache
    state: Float[Tensor, "batch hidden_size"]

    @classmethod
    @torch.no_grad()
    def read(cls, model: LanguageModel, batch_size: int, length: int, seed: int = 0) -> "Prompt":
        """Draw the tokens and read them."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, model.vocab_size, (batch_size, length), generator=generator).to(model.device)
        cache = model.new_cache(batch_size)
        return cls(model, ids, cache, model.step(cache, model.embed(ids))[:, -1])

    @property
    def keys(self) -> list[str]:
        """A name for each row."""
        return [str(row) for row in range(len(self.input_ids))]


def latent_steps(
    agent: Agent,
    *,
    compiled: Agent | None = None,
    batch_sizes: Sequence[int],
    prompt_length: int,
    num_steps: int,
    repeats: int,
    progress: Progress | None = None,
) -> Section:
    """A latent step over a bare forward of the same body, whose cache grows as well.

    `compiled` is the agent whose steps are compiled, to be measured beside it (see `compiled_twin`).
    """
    rows: list[Row] = []
    goals = []
    model = agent.model
    for batch_size in batch_sizes:
        prompt = Prompt.read(model, batch_size, prompt_length)
        arms: dict[str, Arm] = {
            "bare": partial(_bare_forwards, prompt, num_steps),
            "latent": partial(_thinking, agent, prompt, num_steps),
            "link": ready(_map_states, agent.inner_link, prompt.state, num_steps),
        }
        if compiled is not None:
            arms["compiled"] = partial(_thinking, compiled, prompt, num_steps)
        took = take_turns(arms, repeats, model.device, _tell(progress, f"latent steps, batch {batch_size}"))
        per_step = {name: each.milliseconds(num_steps) for name, each in took.items()}
        ratio = took["latent"].over(took["bare"])
        rows.append(
            {
                "agent": agent.role,
                "batch": batch_size,
                "bare forward": per_step["bare"],
                "latent step": per_step["latent"],
                "of it the inner link": per_step["link"],
                "latent step / bare forward": ratio,
                "latent steps a second": took["latent"].rate(batch_size * num_steps),
                **_gain(compiled, took["latent"], took.get("compiled")),
            }
        )
        if batch_size == 8 and model.hidden_size >= GOAL_WIDTH:
            goals.append(Goal(f"latent step / bare forward, {agent.role}, batch 8", ratio, at_most=LATENT_STEP_GOAL))
    note = f"After a prompt of {prompt_length} tokens, {num_steps} steps, per step."
    return Section("latent-step", "A latent step beside a bare cached forward of the same body", rows, goals, note)


def decode_steps(
    agent: Agent,
    link: RecursiveLink,
    *,
    compiled: Agent | None = None,
    batch_sizes: Sequence[int],
    prompt_length: int,
    num_tokens: int,
    num_latent_steps: int,
    repeats: int,
    progress: Progress | None = None,
) -> Section:
    """Prefill and decode steps over those of `generate`; and what a link takes for a message."""
    rows: list[Row] = []
    goals = []
    model = agent.model
    for batch_size in batch_sizes:
        prompt = Prompt.read(model, batch_size, prompt_length)
        message = prompt.state.unsqueeze(1).repeat(1, num_latent_steps, 1)
        arms = {
            "generate 1": ready(generate, prompt, 1),
            "ours 1": ready(write, prompt, 1),
            "generate": ready(generate, prompt, num_tokens + 1),
            "ours": ready(write, prompt, num_tokens + 1),
            "link": ready(_map_states, link, message, 1),
        }
        if compiled is not None:
            arms |= {"compiled 1": ready(write, prompt, 1, compiled.model)}
            arms |= {"compiled": ready(write, prompt, num_tokens + 1, compiled.model)}
        same = write(prompt, num_tokens + 1) == generate(prompt, num_tokens + 1)
        took = take_turns(arms, repeats, model.device, _tell(progress, f"decoding, batch {batch_size}"))
        step = {
            name: took[name].less(took[f"{name} 1"]).milliseconds(num_tokens)
            for name in ("ours", "generate", "compiled")
            if name in took
        }
        ratio = step["ours"].over(step["generate"])
        rows.append(
            {
                "agent": agent.role,
                "batch": batch_size,
                "prefill of generate": took["generate 1"].milliseconds(),
                "prefill / generate's": took["ours 1"].over(took["generate 1"]),
                "decode step of generate": step["generate"],
                "decode step / generate's": ratio,
                "link / generate's step": took["link"].milliseconds().over(step["generate"]),
                "same tokens": same,
                **_gain(compiled, step["ours"], step.get("compiled")),
            }
        )
        if model.hidden_size >= GOAL_WIDTH:
            name = f"decode step / generate's, {agent.role}, batch {batch_size}"
            goals.append(Goal(name, ratio, at_most=DECODE_STEP_GOAL))
    note = (
        f"Prompts of {prompt_length} tokens, greedy, no early end. Prefill is a text of one token; a decode step is a "
        f"{num_tokens}th of what a text of {num_tokens + 1} tokens takes longer. The link maps a whole message of "
        f"{num_latent_steps} latents."
    )
    return Section("generate", "Prefill, decoding and link beside transformers' generate", rows, goals, note)


def uncached(
    agent: Agent,
    *,
    settings: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    repeats: int,
    judged: bool,
    progress: Progress | None = None,
) -> Section:
    """Reading a prompt and thinking on it, over doing so without a cache; the messages must be the same."""
    rows: list[Row] = []
    goals = []
    model = agent.model
    for (length, num_steps), batch_size in ((each, size) for each in settings for size in batch_sizes):
        ids = Prompt.read(model, batch_size, length).input_ids
        thoughts: dict[str, Tensor] = {}
        arms = {
            name: _keeping(thoughts, name, partial(way, agent, ids, num_steps))
            for name, way in (("cached", cached_thoughts), ("uncached", uncached_thoughts))
        }
        told = _tell(progress, f"uncached reference, prompt {length}, m {num_steps}, batch {batch_size}")
        took = take_turns(arms, repeats, model.device, told, warm_up=["cached"])
        expected = thoughts["uncached"].flatten(1)
        difference = float(((thoughts["cached"].flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)).max())
        ratio = took["uncached"].over(took["cached"])
        rows.append(
            {
                "agent": agent.role,
                "prompt": length,
                "m": num_steps,
                "batch": batch_size,
                "cached": took["cached"].milliseconds(),
                "uncached": took["uncached"].milliseconds(),
                "uncached / cached": ratio,
                "messages differ by": difference,
            }
        )
        least = UNCACHED_GOALS.get((length, num_steps))
        if judged and batch_size == 8 and least is not None:
            goals.append(Goal(f"uncached / cached, prompt {length}, m {num_steps}", ratio, at_least=least))
        if model.dtype == torch.float32:
            name = f"messages of both differ, prompt {length}, m {num_steps}, batch {batch_size}"
            goals.append(Goal(name, difference, at_most=SAME_MESSAGES))
    note = "Reading the prompt and all latent steps; differences are of norms, the largest of the batch."
    return Section("uncached", "Thinking with a cache, and without", rows, goals, note)


def floor(
    agent: Agent,
    *,
    compiled: Agent | None = None,
    batch_sizes: Sequence[int],
    prompt_length: int,
    num_steps: int,
    repeats: int,
    copied_bytes: int = 2**30,
    progress: Progress | None = None,
) -> Section:
    """Latent steps a second of one row, beside how often the weights could be read."""
    model = agent.model
    bandwidth = copy_bandwidth(model.device, copied_bytes, repeats)
    size = body_bytes(agent)
    most = bandwidth.median / size
    rows: list[Row] = []
    goals: list[Goal] = []
    for batch_size in batch_sizes:
        prompt = Prompt.read(model, batch_size, prompt_length)
        arms = {"eager": partial(_thinking, agent, prompt, num_steps)}
        if compiled is not None:
            arms["compiled"] = partial(_thinking, compiled, prompt, num_steps)
        took = take_turns(arms, repeats, model.device, _tell(progress, f"bandwidth floor, batch {batch_size}"))
        if compiled is not None and batch_size == 1 and model.device.type == "cuda":
            goals += _compiled_goals(agent.role, took, took["compiled"].rate(num_steps).times(1 / most))
        for name, each in took.items():
            steps = each.rate(num_steps)
            rows.append(
                {
                    "agent": agent.role,
                    "path": name,
                    "batch": batch_size,
                    "steps a second": steps,
                    "latents a second": steps.times(batch_size),
                    "weights, GB": size / 1e9,
                    "copied, GB/s": bandwidth.times(1e-9),
                    "floor, steps a second": most,
                    "share of the floor": steps.times(1 / most),
                }
            )
    note = (
        f"After a prompt of {prompt_length} tokens, {num_steps} steps. Weights are those of the body, without its "
        "embedding table, and of the inner link; the floor is how often they could be read a second, at the speed at "
        "which memory is copied (bytes read and written). Caches, which are read as well, are not counted."
    )
    return Section("floor", "Latent steps beside the floor that the weights set", rows, goals, note)


def _gain(compiled: Agent | None, eager: Measured, took: Measured | None) -> Row:
    """The column that says what compiling has gained, where that was asked for."""
    if compiled is None or took is None:
        return {}
    return {"eager / compiled": eager.over(took) if compiled.model.is_compiled else "not compiled"}


def _compiled_goals(role: str, took: Mapping[str, Measured], share: Measured) -> list[Goal]:
    """What compiled steps of one row should reach on a GPU."""
    gain = took["eager"].over(took["compiled"])
    return [
        Goal(f"compiled latent step, share of the floor, {role}, batch 1", share, at_least=FLOOR_GOAL),
        Goal(f"eager / compiled latent step, {role}, batch 1", gain, at_least=COMPILED_GOAL),
    ]


def compiled_twin(agent: Agent) -> Agent:
    """The same agent on the same weights, whose steps are compiled."""
    twin = LanguageModel(agent.model.network, agent.model.tokenizer, source=agent.model.source)
    twin.compile()
    return Agent(agent.role, twin, agent.inner_link)


@torch.no_grad()
def cached_thoughts(
    agent: Agent, input_ids: Int[Tensor, "batch position"], num_latent_steps: int
) -> Float[Tensor, "batch latent_step hidden_size"]:
    """Latents that follow these tokens, with a cache."""
    cache = agent.model.new_cache(len(input_ids))
    state = agent.model.step(cache, agent.model.embed(input_ids))[:, -1]
    return latent_rollout(agent.model, cache, state, agent.inner_link, num_latent_steps)


@torch.no_grad()
def uncached_thoughts(
    agent: Agent, input_ids: Int[Tensor, "batch position"], num_latent_steps: int
) -> Float[Tensor, "batch latent_step hidden_size"]:
    """The same latents, with everything read again at every step."""
    return latent_rollout_reference(agent.model, agent.model.embed(input_ids), agent.inner_link, num_latent_steps)


@torch.no_grad()
def write(prompt: Prompt, num_tokens: int, model: LanguageModel | None = None) -> list[tuple[int, ...]]:
    """Read the prompt and write so many tokens; with another wrapping of its model, if one is given."""
    model = model or prompt.model
    cache = model.new_cache(len(prompt.input_ids))
    state = model.step(cache, model.embed(prompt.input_ids))[:, -1]
    return [reply.token_ids for reply in decode(model, cache, state, of_length(num_tokens), prompt.keys)]


def generate(prompt: Prompt, num_tokens: int) -> list[tuple[int, ...]]:
    """The same by transformers."""
    model = prompt.model
    written: Any = model.network.generate(
        input_ids=prompt.input_ids,
        attention_mask=torch.ones_like(prompt.input_ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=sorted(model.stop_token_ids),
        pad_token_id=min(model.stop_token_ids),
    )
    return [tuple(row) for row in written[:, prompt.input_ids.shape[1] :].tolist()]


def copy_bandwidth(device: torch.device, num_bytes: int, repeats: int) -> Measured:
    """Bytes a second that are read and written while so many bytes are copied."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), device) for _ in range(repeats + 1)][1:]
    return Measured(tuple(2 * num_bytes / each for each in seconds), "B/s")


def body_bytes(agent: Agent) -> int:
    """Bytes of all weights that a latent step reads: those of the body but for its embedding table, and the link's."""
    table = agent.model.network.get_input_embeddings().weight
    weights = chain(agent.model.decoder.parameters(), agent.inner_link.parameters())
    return sum(each.numel() * each.element_size() for each in weights if each is not table)


def _bare_forwards(prompt: Prompt, num_steps: int) -> Act:
    """Forwards of the body with a cache of transformers, as it would be called without this package."""
    past_key_values = prompt.cache.fork().past_key_values
    inputs_embeds = prompt.state.unsqueeze(1).contiguous()
    decoder = prompt.model.decoder

    @torch.no_grad()
    def act() -> None:
        for _ in range(num_steps):
            decoder(inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=True)

    return act


def _thinking(agent: Agent, prompt: Prompt, num_steps: int) -> Act:
    """Latent steps, each of which reads one position: the first thought is there already."""
    think = torch.no_grad()(latent_rollout)
    return partial(think, agent.model, prompt.cache.fork(), prompt.state, agent.inner_link, num_steps + 1)


@torch.no_grad()
def _map_states(link: RecursiveLink, states: Tensor, times: int) -> None:
    for _ in range(times):
        link(states)


def _keeping(results: dict[str, Tensor], name: str, act: Callable[[], Tensor]) -> Arm:
    """An arm that keeps what came out."""

    def kept() -> None:
        results[name] = act()

    return lambda: kept


def _tell(progress: Progress | None, what: str) -> Progress | None:
    return None if progress is None else lambda arm: progress(f"{what}: {arm}")
