"""Compiled steps give what ordinary ones give, in every family, or are not taken and say why.

Where our buffers are under test the backend does nothing but call what it was handed; inductor itself is run once.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_model
from tests.families.reference import assert_same
from tests.families.table import FAMILIES, load_family
from torch import Tensor, fx

from recursivemas import static
from recursivemas.cache import LatentCache
from recursivemas.decoding import Reply, SamplingParams, decode, decode_on, decode_steps
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.rollout import latent_rollout
from recursivemas.static import CompileWarning, StaticCache
from recursivemas.system import RecursiveSystem
from recursivemas.trace import ToolCall

SAMPLING = SamplingParams(max_new_tokens=24)
STEPS = 7


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that they are outgrown again and again; only our own part of a compiled step is there."""
    monkeypatch.setattr(static, "_SHORTEST", 16)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other tests have compiled is forgotten."""
    # torch writes what it compiles to whoever listens, and pytest listens to everything.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def read(model: LanguageModel, texts: Sequence[str]) -> tuple[LatentCache, Tensor]:
    input_ids, mask = model.pad([model.encode(text) for text in texts])
    cache = model.new_cache(len(texts))
    return cache, model.step(cache, model.embed(input_ids), mask)[:, -1]


@torch.no_grad()
def think_and_write(model: LanguageModel, texts: Sequence[str]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Thoughts and tokens that follow some texts, all in one batch."""
    link = RecursiveLink.inner(model.hidden_size).redraw(seed=0)
    link.calibrate(torch.ones(1, model.hidden_size), model.mean_embedding_norm)
    cache, state = read(model, texts)
    thoughts = latent_rollout(model, cache.fork(), state, link, STEPS)
    return thoughts, [reply.token_ids for reply in decode(model, cache.fork(), state, SAMPLING, texts)]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert bool(((found - expected).norm(dim=-1) <= 1e-4 * expected.norm(dim=-1)).all())


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.recurrent])
@pytest.mark.usefixtures("small_buffers")
def test_thoughts_and_text_are_the_same(family: str, tmp_path: Path, questions: list[str]) -> None:
    # The longer questions, and all texts, are beyond the sliding window.
    model = load_family(family, tmp_path / family)
    expected = think_and_write(model, questions)
    model.compile()
    for _ in range(2):  # in new buffers, in which steps are compared, and in used ones
        thoughts, tokens = think_and_write(model, questions)
        assert_close(thoughts, expected[0])
        assert tokens == expected[1]
    for row, question in enumerate(questions):
        alone = think_and_write(model, [question])
        assert_close(alone[0][0], expected[0][row])
        assert alone[1] == [expected[1][row]]
    assert model.is_compiled


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.usefixtures("compiler")
def test_compiled_they_are_the_same(family: str, tmp_path: Path, questions: list[str]) -> None:
    model = load_family(family, tmp_path / family)
    expected = think_and_write(model, questions[:2])
    model.compile(backend="aot_eager")
    for _ in range(2):
        thoughts, tokens = think_and_write(model, questions[:2])
        assert_close(thoughts, expected[0])
        assert tokens == expected[1]
    assert model.is_compiled


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_with_inductor_they_are_the_same(questions: list[str]) -> None:
    model = make_model("llama", num_hidden_layers=1)
    expected = think_and_write(model, questions[:2])
    model.compile()
    thoughts, tokens = think_and_write(model, questions[:2])
    assert_close(thoughts, expected[0])
    assert (tokens, model.is_compiled) == (expected[1], True)


@pytest.mark.usefixtures("small_buffers")
def test_a_whole_run_is_the_same(make_system: Callable[..., RecursiveSystem], questions: list[str]) -> None:
    models = [make_model(family, seed) for seed, family in enumerate(("qwen3", "llama"))]
    agents = dict(zip(("planner", "critic", "solver"), [*models, models[0]], strict=True))
    system = make_system(agents=agents)
    options: dict[str, Any] = {"channel": "both", "trace": "full"}
    expected = system.run(questions, **options)
    system.compile()
    assert all(model.is_compiled for model in models)
    for found, one in zip(system.run(questions, **options), expected, strict=True):
        assert_same(found, one)
    assert all(model.is_compiled for model in models)
    # Gradients need every tensor of a step, so nothing is overwritten where they are wanted.
    state = models[0].step(cache := models[0].new_cache(1), models[0].embed(torch.tensor([[5, 6]])))[:, -1]
    assert models[0].with_room(cache) is cache
    thoughts = latent_rollout(models[0], cache, state, RecursiveLink.inner(48).requires_grad_(True), 3)
    assert thoughts.requires_grad
    system.compile(False)
    assert not any(model.is_compiled for model in models)


class Interjected:
    """After its third token a row waits for these, once."""

    token_ids = [11, 12, 13]

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.served: dict[int, ToolCall] = {}

    def calls(self, row: int) -> tuple[ToolCall, ...]:
        return (self.served[row],) if row in self.served else ()

    def forbidden(self, row: int, token_ids: Sequence[int]) -> list[int]:
        return []

    def takes_up(self, row: int, token_ids: Sequence[int], room: int) -> bool:
        if len(token_ids) != 3 or row in self.served or row == 1:
            return False
        self.waiting.append(row)
        return True

    def ready(self, *, wait: bool) -> list[tuple[int, list[int]]]:
        rows, self.waiting = self.waiting, []
        for row in rows:
            self.served[row] = ToolCall("t", "", "", position=3, num_tokens=3)
        return [(row, self.token_ids) for row in rows]


@pytest.mark.usefixtures("small_buffers")
def test_rows_leave_compiled_steps_and_come_back(questions: list[str]) -> None:
    model = make_model("llama", 1)
    assert not model.is_compiled

    def written() -> tuple[list[Reply], LatentCache, Tensor]:
        cache, state = read(model, questions)
        return decode_on(model, cache, state, SAMPLING, questions, None, Interjected())

    expected, held, state = written()
    assert any(Interjected.token_ids == list(reply.token_ids[3:6]) for reply in expected)
    model.compile()
    found, cache, last = written()
    assert [reply.token_ids for reply in found] == [reply.token_ids for reply in expected]
    assert_close(last, state)
    assert torch.equal(cache.num_positions, held.num_positions)
    with torch.no_grad():
        inputs_embeds = model.embed(torch.tensor([[7]] * len(questions)))
        assert_close(model.step(cache, inputs_embeds), model.step(held, inputs_embeds))


@pytest.mark.usefixtures("small_buffers")
def test_buffers_are_never_shared_and_are_used_again(questions: list[str]) -> None:
    model = make_model("llama", 1)
    expected = think_and_write(model, questions[:1])[1] + think_and_write(model, questions[1:2])[1]
    model.compile()
    with torch.no_grad():
        parts = [read(model, [question]) for question in questions[:2]]
        writing = [
            decode_steps(model, cache, state, SAMPLING, ["a"]) for cache, state in parts
        ]  # both are under way at once
        tokens: list[list[int]] = [[], []]
        for pair in zip(*writing, strict=False):
            for row, taken in enumerate(pair):
                tokens[row] += [token for _, token in taken]
    shortest = min(len(each) for each in tokens)
    assert [each[:shortest] for each in tokens] == [list(each)[:shortest] for each in expected]
    for each in writing:
        each.close()
    del writing
    steps = model._compiled
    assert steps is not None
    before = {size: [id(each) for each in free] for size, free in steps._free.items()}
    assert before
    think_and_write(model, questions[:1])
    after = {size: [id(each) for each in free] for size, free in steps._free.items()}
    assert all(set(ids) <= set(after[size]) for size, ids in before.items())


@pytest.mark.usefixtures("small_buffers")
def test_several_positions_are_not_read_in_compiled_steps() -> None:
    model = make_model("llama", 1)
    model.compile()
    with torch.no_grad():
        cache, _ = read(model, ["Why?"])
        growing = model.with_room(cache)
        assert isinstance(growing, StaticCache)
        with pytest.raises(ValueError, match="one position of every row"):
            model.step(growing, model.embed(torch.tensor([[5, 6]])))


def run_uncompiled(model: LanguageModel, backend: Any, match: str, questions: Sequence[str]) -> None:
    """What cannot be compiled gives what it gave before; one warning says why."""
    expected = think_and_write(model, questions)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CompileWarning)
        model.compile(backend=backend)
        found = [think_and_write(model, questions) for _ in range(2)]
    [warning] = [each for each in told if each.category is CompileWarning]
    assert f"'{model.config.model_type}' is not compiled, and runs as without" in str(warning.message)
    assert match in str(warning.message)
    assert not model.is_compiled
    for thoughts, tokens in found:
        assert_close(thoughts, expected[0])
        assert tokens == expected[1]


def no_compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise RuntimeError("there is no C++ compiler")


def wrong(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A compiler that computes something else."""
    return lambda *given: tuple(
        out + 1 if isinstance(out, Tensor) and out.is_floating_point() else out for out in graph(*given)
    )


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("backend", "match"), [(no_compiler, "there is no C++ compiler"), (wrong, "gives other states")]
)
def test_a_compiler_that_fails_is_not_used(backend: Any, match: str, questions: list[str]) -> None:
    run_uncompiled(make_model("llama", 1), backend, match, questions[:2])


@pytest.mark.usefixtures("small_buffers")
def test_a_fault_after_the_first_step_is_found_too(questions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # As a CUDA graph would give that is replayed with what it was recorded with.
    fill = static._Buffers.fill

    def stale(self: static._Buffers, cache: LatentCache) -> None:
        fill(self, cache)
        monkeypatch.setattr(self.position, "add_", lambda number: self.position, raising=False)

    model = make_model("llama", 1)
    monkeypatch.setattr(static._Buffers, "fill", stale)
    run_uncompiled(model, "eager", "gives other states", questions[:1])


@pytest.mark.usefixtures("compiler")
def test_memory_that_runs_out_is_left_to_whoever_makes_batches(questions: list[str]) -> None:
    def full(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        return run

    model = make_model("llama", 1)
    model.compile(backend=full)
    with pytest.raises(torch.OutOfMemoryError):
        think_and_write(model, questions[:1])
    assert model.is_compiled


@pytest.mark.usefixtures("small_buffers")
def test_models_that_cannot_be_compiled_say_why(tmp_path: Path, questions: list[str]) -> None:
    run_uncompiled(load_family("qwen3_5", tmp_path / "hybrid"), "eager", "linear attention", questions[:2])
    model = make_model("llama", 1)
    model.network.quantization_method = "bitsandbytes"
    run_uncompiled(model, "eager", "held in fewer bits", questions[:1])
    flash = make_model("llama", 1)
    before = flash.config._attn_implementation
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.warns(CompileWarning, match="choose attn_implementation sdpa"):
        flash.compile()
    flash.config._attn_implementation = before
