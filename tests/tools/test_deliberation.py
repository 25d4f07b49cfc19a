"""Deliberation with tools: in the answer, or in every round; what is told of it in prompts, traces and the meter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tools.pieces import ADD, make_pieces_model
from typer.testing import CliRunner

from recursivemas.answering import Result, TextDelta
from recursivemas.cli.main import app
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError
from recursivemas.models import LanguageModel
from recursivemas.planning import make_plan
from recursivemas.prompts import PromptSet
from recursivemas.recursion import PlayedTurn
from recursivemas.system import RecursiveSystem
from recursivemas.tools import FunctionTool, Toolbox
from recursivemas.trace import Meter, load_traces

WORDS = {
    "name": "few-words",
    "roles": {
        "reflector": {"first": "{question}{tools}", "later": "{question} {latents:toolcaller}"},
        "toolcaller": {
            "always": "{question} {latents:reflector}",
            "last": "{question} {latents:reflector} So",
            "solo": "{question} So",
        },
    },
}
QUESTIONS = [f"{number} and 1" for number in range(8)]
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=30, seed=2)


@pytest.fixture(scope="module")
def system() -> RecursiveSystem:
    agents = {"reflector": make_pieces_model(seed=1), "toolcaller": make_pieces_model(seed=0)}
    return RecursiveSystem.build(
        pattern="deliberation", prompts=WORDS, agents=agents, num_rounds=2, num_latent_steps=3, max_new_tokens=30
    )


def answers(system: RecursiveSystem, **options: object) -> list[Result]:
    return system.run(QUESTIONS, sampling=SAMPLED, **options)


def test_without_tools_nothing_is_different(system: RecursiveSystem) -> None:
    plain = answers(system)
    assert all(result.usage.total("tool_calls") == 0 and not result.trace.calls for result in plain)
    empty = answers(system, tools=[])
    assert [result.text for result in empty] == [result.text for result in plain]
    assert "tools" not in empty[0].trace.settings


@pytest.mark.parametrize("channel", ["latent", "text", "both"])
@pytest.mark.parametrize("tools_after", ["last", "every"])
def test_tools_are_used_in_the_answer_or_in_every_round(
    system: RecursiveSystem, channel: str, tools_after: str
) -> None:
    results = answers(system, tools=[ADD], tools_after=tools_after, channel=channel)
    rounds = {call.round for result in results for call in result.trace.calls}
    assert rounds == ({2} if tools_after == "last" else {1, 2})
    assert {call.role for result in results for call in result.trace.calls} == {"toolcaller"}
    for result in results:
        usage, trace = result.usage, result.trace
        assert usage.total("tool_calls") == len(trace.calls)
        assert usage.total("tool_tokens") == sum(call.num_tokens for call in trace.calls)
        for turn in usage.turns:
            own = [call for call in trace.calls if call.round == turn.round and turn.role == "toolcaller"]
            assert turn.tool_calls == len(own)
            writes = turn.role == "toolcaller" and (turn.round == 2 or tools_after == "every")
            writes = writes or (channel != "latent" and (turn.role, turn.round) != ("toolcaller", 2))
            assert (turn.generated_tokens > 0) == writes
            assert turn.generated_tokens <= SAMPLED.max_new_tokens
        for call in trace.calls:
            if call.round == 2:
                assert f"<add>{call.argument}</add><result>{call.result}</result>" in result.text.replace("\n", "\n")
        assert trace.settings["tools"] == ["add"]
        assert trace.settings["tools_after"] == tools_after


def test_after_every_round_the_message_is_what_was_written_and_thought_on_from_it(system: RecursiveSystem) -> None:
    plan = make_plan(
        system,
        {
            "num_rounds": 2,
            "num_latent_steps": 4,
            "channel": "both",
            "sampling": SAMPLED,
            "tools": [ADD],
            "tools_after": "every",
        },
    )
    meter = Meter(len(QUESTIONS), torch.device("cpu"))
    with torch.no_grad():
        played = list(system._recursion.play(QUESTIONS, QUESTIONS, plan, meter))
    before, after = played[0].messages["reflector->toolcaller"], played[1].messages["toolcaller->reflector"]
    caller, link = system.agents["toolcaller"], system.links["toolcaller->reflector"]
    model = caller.model
    assert after.texts == tuple(reply.text for reply in played[1].replies)
    assert sum(bool(reply.calls) for reply in played[1].replies) >= 2
    for row, (question, reply) in enumerate(zip(QUESTIONS, played[1].replies, strict=True)):
        # Slowly, without a cache: the prompt with the reflector's message, the text with its results, then thoughts.
        assert before.texts is not None
        assert before.latents is not None
        ended = reply.token_ids[-1] in model.stop_token_ids
        read = [*model.encode(before.texts[row]), *(reply.token_ids[:-1] if ended else reply.token_ids)]
        pieces = [
            model.embed(torch.tensor(model.encode(f"{question} "))),
            before.latents[row],
            model.embed(torch.tensor(read)),
        ]
        sequence = torch.cat(pieces).unsqueeze(0)
        thoughts = []
        with torch.no_grad():
            for _ in range(4):
                thoughts.append(model.states_of_embeds(sequence)[:, -1])
                sequence = torch.cat([sequence, caller.inner_link(thoughts[-1]).unsqueeze(1)], dim=1)
            expected = link(caller.inner_link(torch.stack(thoughts, dim=1)))[0]
        torch.testing.assert_close(after.latents[row], expected, rtol=2e-4, atol=2e-4)


def test_a_question_has_the_same_answer_alone_and_in_a_batch(system: RecursiveSystem) -> None:
    for tools_after in ("last", "every"):
        together = answers(system, tools=[ADD], tools_after=tools_after)
        for question, expected in zip(QUESTIONS, together, strict=True):
            alone = system.run(question, sampling=SAMPLED, tools=[ADD], tools_after=tools_after)
            assert alone.text == expected.text
            assert [call.result for call in alone.trace.calls] == [call.result for call in expected.trace.calls]


def test_it_is_streamed_as_it_is_run(system: RecursiveSystem) -> None:
    for question, expected in zip(QUESTIONS, answers(system, tools=[ADD], tools_after="every"), strict=True):
        # The same seed samples the same text of a question, whatever way it is asked.
        *events, result = system.stream(question, sampling=SAMPLED, tools=[ADD], tools_after="every")
        assert isinstance(result, Result)
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == result.text == expected.text
        assert [call.result for call in result.trace.calls] == [call.result for call in expected.trace.calls]
        assert result.usage.total("tool_calls") == expected.usage.total("tool_calls")
        assert any(isinstance(event, PlayedTurn) for event in events)


def test_none_is_the_tool_caller_alone_with_its_tools(system: RecursiveSystem) -> None:
    words = {
        **WORDS,
        "roles": {**WORDS["roles"], "toolcaller": {**WORDS["roles"]["toolcaller"], "solo": "{question}  So"}},
    }
    same = RecursiveSystem.build(
        pattern="deliberation", prompts=words, agents={r: a.model for r, a in system.agents.items()}
    )
    sampling = SamplingParams(max_new_tokens=30)
    none = same.run(QUESTIONS, channel="none", num_rounds=1, tools=[ADD], sampling=sampling)
    no_latents = same.run(QUESTIONS, num_latent_steps=0, num_rounds=1, tools=[ADD], sampling=sampling)
    assert [result.text for result in none] == [result.text for result in no_latents]
    alone = same.solo().run(QUESTIONS, num_rounds=1, tools=[ADD], sampling=sampling)
    assert [result.text for result in none] == [result.text for result in alone]


def test_several_samples_call_their_own_tools(system: RecursiveSystem) -> None:
    many = system.run(QUESTIONS[:3], sampling=SAMPLED, tools=[ADD], num_samples=3)
    one = system.run(QUESTIONS[:3], sampling=SAMPLED, tools=[ADD])
    assert [result.text for result in many] == [result.text for result in one]
    assert [result.trace.calls == [] for result in many] == [result.trace.calls == [] for result in one]
    for result in many:
        assert result.usage.total("tool_calls") == sum(text.count("</result>") for text in result.samples)


def test_calls_are_written_with_the_trace(system: RecursiveSystem, tmp_path: Path) -> None:
    results = answers(system, tools=[ADD], trace="full", trace_dir=tmp_path / "trace")
    loaded = load_traces(tmp_path / "trace")
    assert [trace.calls for trace in loaded] == [result.trace.calls for result in results]
    assert any(trace.calls for trace in loaded)
    off = answers(system, tools=[ADD], trace="off")
    assert not any(result.trace.calls for result in off)


def test_prompts_say_which_tools_there_are() -> None:
    prompts = PromptSet.load("deliberation")
    assert prompts.tells_of_tools("toolcaller")
    assert prompts.tells_of_tools("reflector")
    assert not PromptSet.load("sequential").tells_of_tools("solver")

    def render(messages: list[dict[str, str]]) -> str:
        return messages[0]["content"]

    text = Toolbox([ADD]).text
    for role in ("reflector", "toolcaller"):
        for round, last in ((1, False), (2, True)):
            turn = {"role": role, "question": "Q", "render_chat": render, "round": round, "is_last": last}
            plain, told = prompts.segments(**turn), prompts.segments(**turn, tools=text)
            assert "<add>" not in str(plain)
            assert told[0] == plain[0].replace("\nQuestion: Q", f"{text}\nQuestion: Q")
    solo = prompts.segments("toolcaller", "Q", render_chat=render, solo=True, tools=text)
    assert text in solo[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": ["pyton"]}, "unknown tool 'pyton': did you mean 'python'"),
        ({"tools": [ADD], "tools_after": "evry"}, "unknown time for tools 'evry': did you mean 'every'"),
        ({"tools_after": "never"}, "unknown time for tools 'never'"),
        ({"tools": [ADD, ADD]}, "two tools are called 'add'"),
        ({"tools": [FunctionTool("<|eos|>", "", str)]}, "small letters"),
    ],
)
def test_bad_settings_are_refused(system: RecursiveSystem, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("|", "[|]")):
        system.run("Why?", **options)


def test_a_tokenizer_that_cannot_write_the_tags_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pieces_model()
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<add>"]})
    with pytest.raises(ConfigError, match="cannot write <add>, or counts it among its special tokens"):
        Toolbox([ADD]).session(model, ["q"])


def test_python_and_search_are_made_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_call: Callable[[str, str], str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("The lighthouse is 41 metres high.")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make_call("search", "lighthouse") == "[a.txt] The lighthouse is 41 metres high."
    assert make_call("python", "```python\n41 + 1\n```") == "42"
    assert make_call("python", "  print(41 + 1)  ") == "42"
    assert make_call("python", "def f(x):\n    return x + 1\nf(41)") == "42"
    assert make_call("python", "1 / 0").endswith("[failed: ZeroDivisionError]")


@pytest.fixture
def make_call(tmp_path: Path) -> Callable[[str, str], str]:
    import os

    from recursivemas.sandbox import sandbox_problem
    from recursivemas.tools import make_tool

    reason = sandbox_problem()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"continuous integration must have a sandbox: {reason}")
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")
    return lambda name, text: make_tool(name, search_folder=tmp_path / "notes")(text)


# The command line


def test_a_system_is_run_with_tools_from_the_command_line(
    tiny_models: dict[str, LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("The lighthouse is 41 metres high.")
    agents = {"reflector": tiny_models["qwen3"], "toolcaller": tiny_models["llama"]}
    system = RecursiveSystem.build(pattern="deliberation", prompts=WORDS, agents=agents, num_latent_steps=2)
    system.save_pretrained(tmp_path / "saved")
    runner = CliRunner()

    def run(*options: str) -> Any:
        return runner.invoke(app, ["run", "saved", "1 and 1", "--max-new-tokens", "8", *options])

    done = run("--tools", "search", "--search-folder", "notes", "--json", "--tools-after", "every")
    assert done.exit_code == 0, done.output
    [record] = json.loads(done.stdout)
    assert record["usage"]["tool_calls"] == len(record.get("calls", []))
    streamed = run("--tools", "search", "--search-folder", "notes", "--tools-after", "every")
    assert streamed.stdout.strip() == record["text"].strip()
    assert "do not say which tools there are" in streamed.stderr
    for options, words in (
        (["--tools", "serch"], "unknown tool 'serch': did you mean 'search'"),
        (["--tools", "search"], "give a folder (--search-folder DIR), or set TAVILY_API_KEY"),
        (["--tools", "search", "--search-folder", "nowhere"], "nowhere, cannot be read: No such file"),
        (["--search-folder", "notes"], "--search-folder is for the tool search"),
        (["--run-code-without-sandbox"], "--run-code-without-sandbox is for the tool python"),
        (["--tools", "search", "--search-folder", "notes", "--tools-after", "now"], "unknown time for tools 'now'"),
        (["--tools", "search", "--search-folder", "notes", "--max-tool-calls", "-1"], "max_calls of the tools"),
    ):
        refused = run(*options)
        assert refused.exit_code == 1
        assert words in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr
