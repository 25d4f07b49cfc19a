"""A teacher writes role targets: what it is asked, that nothing is paid twice, and what happens when it fails."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_model

from recursivemas.config import parse
from recursivemas.errors import ConfigError, InputError, OutputError, RecursiveMASError
from recursivemas.models import LanguageModel
from recursivemas.patterns import Pattern
from recursivemas.system import RecursiveSystem
from recursivemas.training.recipe import Recipe
from recursivemas.training.targets import Build, BuildSettings, Report, build_targets, replies_file
from recursivemas.training.teacher import Endpoint, LocalTeacher, teacher_of
from recursivemas.worlds.material import material_of

ROWS = [{"question": f"What is {n} + 2?", "answer": str(n + 2), "source": "us"} for n in range(6)]


@dataclass
class StandIn:
    """An endpoint of our own, that can be told to fail."""

    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    answer: Callable[[int, dict], tuple[int, Any]] = lambda number, body: (200, reply(body["messages"][-1]["content"]))
    more_headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Semaphore | None = None
    """Requests wait here, if it is there."""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, words: str) -> int:
        return sum(words in body["messages"][-1]["content"] for body in self.bodies)


def reply(prompt: str, *, finish: str = "stop", usage: bool = True) -> dict:
    """Says which question it was, and in which role."""
    question = prompt.split("What is ")[1].split(" ")[0]
    text = f"{'critic' if 'critic of a team' in prompt else 'planner'} on {question}"
    told = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    return {**told, "usage": {"prompt_tokens": 100, "completion_tokens": 10}} if usage else told


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stand_in._lock:
                number = len(stand_in.bodies)
                stand_in.bodies.append(body)
                stand_in.headers.append(dict(self.headers))
                stand_in.paths.append(self.path)
                stand_in._now += 1
                stand_in.most_at_once = max(stand_in.most_at_once, stand_in._now)
            if stand_in.gate is not None:
                stand_in.gate.acquire(timeout=20)
            code, content = stand_in.answer(number, body)
            with stand_in._lock:
                stand_in._now -= 1
            if code == 0:
                return  # hangs up
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(sent)), **stand_in.more_headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *given: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stand_in
    server.shutdown()
    server.server_close()
    thread.join()


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(place: Path, endpoint: StandIn | None = None, rows: list[dict] = ROWS, **changes: Any) -> BuildSettings:
    teacher = {"model": "big", "backoff": 0.01, "prices": {"prompt": 1.0, "completion": 10.0}}
    if endpoint is not None:
        teacher["url"] = endpoint.url
    plain = {
        "source": str(write_rows(place / "questions.jsonl", rows)),
        "output": str(place / "train.jsonl"),
        **changes,
        "teacher": {**teacher, **changes.get("teacher", {})},
    }
    return parse(BuildSettings, plain, where="build.yaml")


def build(given: BuildSettings) -> Report:
    return build_targets(Build.of(given), lambda: teacher_of(given.teacher))


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# What is asked and written


def test_roles_are_asked_in_turn_in_the_words_of_the_prompt_set(tmp_path: Path, endpoint: StandIn) -> None:
    report = build(settings(tmp_path, endpoint))
    found = rows_of(tmp_path / "train.jsonl")
    assert found == [{**row, "planner": f"planner on {n}", "critic": f"critic on {n}"} for n, row in enumerate(ROWS)]
    assert endpoint.asked("planner of a team") == endpoint.asked("critic of a team") == 6
    # The critic reads, in its slot, what the planner has written about the same question.
    for body in endpoint.bodies:
        [message] = body["messages"]
        if "critic of a team" in message["content"]:
            number = message["content"].split("What is ")[1].split(" ")[0]
            assert f"The planner's plan: planner on {number}\n" in message["content"]
        assert "latents" not in message["content"]
        assert message["role"] == "user"
    assert {body["model"] for body in endpoint.bodies} == {"big"}
    assert {(body["max_tokens"], body["temperature"]) for body in endpoint.bodies} == {(1024, 0.0)}
    assert set(endpoint.paths) == {"/v1/chat/completions"}
    assert (report.rows, report.complete, report.stopped) == (6, 6, None)
    assert (report.now.prompt_tokens, report.now.completion_tokens) == (1200, 120)
    assert report.now.cost == report.in_all.cost == pytest.approx((1200 * 1.0 + 120 * 10.0) / 1e6)
    # What was written can be trained on as it is.
    recipe = parse(
        Recipe,
        {
            "agents": {"planner": "a", "critic": "b", "solver": "c"},
            "output": "x",
            "data": str(tmp_path / "train.jsonl"),
        },
        where="recipe",
    )
    turns = material_of(recipe, Pattern.load("sequential")).turns("critic", 9)
    assert {turn.messages["planner"].split()[0] for turn in turns} == {"planner"}


def test_several_are_asked_at_the_same_time(tmp_path: Path, endpoint: StandIn) -> None:
    endpoint.gate = threading.Semaphore(0)
    given = settings(tmp_path, endpoint, teacher={"concurrency": 3}, roles=["planner"])
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(build, given)
        deadline = threading.Event()
        for _ in range(400):
            if endpoint._now == 3:
                break
            deadline.wait(0.02)
        assert (endpoint._now, len(endpoint.bodies)) == (3, 3)
        endpoint.gate.release(100)
        assert running.result(timeout=30).complete == 6
    assert endpoint.most_at_once == 3


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    tmp_path: Path, endpoint: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(settings(tmp_path, endpoint, limit=1))
    assert all("Authorization" not in headers for headers in endpoint.headers)
    monkeypatch.setenv("MY_KEY", "secret-word")
    given = settings(tmp_path, endpoint, output=str(tmp_path / "b" / "other.jsonl"), teacher={"key_from": "MY_KEY"})
    build(given)
    assert endpoint.headers[-1]["Authorization"] == "Bearer secret-word"
    kept = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file()) + given.model_dump_json()
    assert "secret-word" not in kept
    for key in ("sk-secret-word", "secretword"):
        with pytest.raises(ConfigError, match="names an environment variable") as refused:
            settings(tmp_path, endpoint, teacher={"key_from": key})
        assert key not in str(refused.value)


def test_the_answer_is_shown_only_if_asked_for(tmp_path: Path, endpoint: StandIn) -> None:
    rows = [{"question": "What is 1 + 2?", "answer": "the-answer"}]
    build(settings(tmp_path, endpoint, rows))
    assert not endpoint.asked("the-answer")
    build(settings(tmp_path, endpoint, rows, sees_answer=True))
    assert endpoint.asked("the-answer") == 2


def test_columns_that_there_are_need_not_be_written(tmp_path: Path, endpoint: StandIn) -> None:
    rows = [{**row, "plan": f"given {n}"} for n, row in enumerate(ROWS)]
    build(settings(tmp_path, endpoint, rows))
    assert endpoint.asked("planner of a team") == 0
    assert endpoint.asked("The planner's plan: given 3\n") == 1
    assert rows_of(tmp_path / "train.jsonl")[3]["plan"] == "given 3"


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("mixture", ["math", "code", "science"]),
        ("distillation", ["expert"]),
        ("deliberation", ["reflector"]),
    ],
)
def test_every_pattern_has_what_its_roles_should_write(
    tmp_path: Path, endpoint: StandIn, pattern: str, written: list[str]
) -> None:
    build(settings(tmp_path, endpoint, pattern=pattern))
    assert set(rows_of(tmp_path / "train.jsonl")[0]) == {*ROWS[0], *written}


def test_extra_fields_and_thoughts(tmp_path: Path, endpoint: StandIn) -> None:
    def think(number: int, body: dict) -> tuple[int, dict]:
        told = reply(body["messages"][-1]["content"], usage=False)
        told["choices"][0]["message"]["content"] = "<think>\nHm, 2.\n</think>\n\nA plan."
        return 200, told

    endpoint.answer = think
    extra = {"max_tokens": None, "max_completion_tokens": 7}
    report = build(settings(tmp_path, endpoint, teacher={"extra": extra}, roles=["planner"]))
    assert {row["planner"] for row in rows_of(tmp_path / "train.jsonl")} == {"A plan."}
    assert {(body.get("max_tokens"), body["max_completion_tokens"]) for body in endpoint.bodies} == {(None, 7)}
    assert report.now.uncounted == 6


# Nothing twice


def test_nothing_is_asked_twice(tmp_path: Path, endpoint: StandIn) -> None:
    given = settings(tmp_path, endpoint)
    first = build(given)
    content = (tmp_path / "train.jsonl").read_bytes()
    again = build_targets(Build.of(given), lambda: pytest.fail("nothing is left to be written"))
    assert len(endpoint.bodies) == 12
    assert again.now.replies == 0
    assert again.in_all == first.in_all
    assert (tmp_path / "train.jsonl").read_bytes() == content
    # More rows ask for these alone; the same question in two rows is asked once.
    more = [*ROWS, {"question": "What is 6 + 2?", "answer": "8"}, {"question": "What is 6 + 2?", "answer": "8"}]
    assert build(settings(tmp_path, endpoint, more)).complete == 8
    assert len(endpoint.bodies) == 14
    # Another model, or another way to sample, is another request.
    build(settings(tmp_path, endpoint, more, teacher={"temperature": 0.7}))
    assert len(endpoint.bodies) == 28


def test_a_flaky_endpoint_is_asked_until_it_answers(tmp_path: Path, endpoint: StandIn) -> None:
    tries: dict[str, int] = {}
    faults = [(503, b"busy"), (429, b"slow down"), (0, b""), (200, b"<html>not JSON"), (200, {"choices": []})]

    def flaky(number: int, body: dict) -> tuple[int, Any]:
        words = body["messages"][-1]["content"]
        tries[words] = tries.get(words, 0) + 1
        return faults[tries[words] - 1] if tries[words] <= 5 else (200, reply(words))

    endpoint.answer = flaky
    report = build(settings(tmp_path, endpoint))
    assert report.complete == 6
    assert not report.failures
    assert set(tries.values()) == {6}
    assert report.now.replies == 12


def test_waiting_is_doubled_and_as_long_as_the_server_asks(
    tmp_path: Path, endpoint: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    class Recording(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    def asked(given: BuildSettings) -> Report:
        teacher = Endpoint(given.teacher)
        teacher._stopping = Recording()
        return build_targets(Build.of(given), lambda: teacher)

    monkeypatch.setattr("recursivemas.training.teacher.random.uniform", lambda low, high: low)
    endpoint.answer = lambda number, body: (500, b"broken")
    given = settings(tmp_path, endpoint, rows=ROWS[:1], roles=["planner"], teacher={"backoff": 2.0, "concurrency": 1})
    report = asked(given)
    assert waited == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert report.by_role["planner"]["failed"] == 1
    endpoint.more_headers = {"Retry-After": "17"}
    waited.clear()
    asked(given)
    assert waited == [0.0, 17.0, 17.0, 17.0, 17.0, 32.0]


def test_what_failed_is_asked_later_and_what_was_paid_is_kept(tmp_path: Path, endpoint: StandIn) -> None:
    broken = {"What is 1 +", "What is 4 +"}

    def some(number: int, body: dict) -> tuple[int, Any]:
        words = body["messages"][-1]["content"]
        return (500, b"broken") if any(each in words for each in broken) else (200, reply(words))

    endpoint.answer = some
    given = settings(tmp_path, endpoint, teacher={"attempts": 2})
    report = build(given)
    assert (report.complete, report.by_role["planner"]["failed"]) == (4, 2)
    assert report.failures[0].startswith("planner: HTTP 500: broken")
    assert [row["answer"] for row in rows_of(tmp_path / "train.jsonl")] == ["2", "4", "5", "7"]
    broken.clear()
    before = len(endpoint.bodies)
    report = build(given)
    assert report.complete == 6
    assert len(endpoint.bodies) - before == 4  # two rows, two roles
    assert report.in_all.replies == 12


def test_an_endpoint_that_is_down_is_not_asked_for_ever(tmp_path: Path, endpoint: StandIn) -> None:
    endpoint.answer = lambda number, body: (502, b"bad gateway")
    rows = [{"question": f"What is {n} + 2?", "answer": "x"} for n in range(40)]
    report = build(settings(tmp_path, endpoint, rows, teacher={"attempts": 2, "concurrency": 2}))
    assert report.stopped == "4 requests in a row have failed"
    assert report.complete == 0
    assert len(endpoint.bodies) <= 2 * (4 + 2)
    assert report.by_role["critic"]["asked"] == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (401, r"refuses \(HTTP 401: no\); the key is taken from the environment variable OPENAI_API_KEY, which is not"),
        (404, "check teacher.url and teacher.model"),
        (400, "look at the settings of the teacher"),
        (302, "it sends requests elsewhere .http://127.0.0.1:9/v1.; give that address"),
    ],
)
def test_what_is_refused_for_good_ends_the_work(tmp_path: Path, endpoint: StandIn, code: int, words: str) -> None:
    endpoint.answer = lambda number, body: (
        (code, b"no") if number == 2 else (200, reply(body["messages"][-1]["content"]))
    )
    endpoint.more_headers = {"Location": "http://127.0.0.1:9/v1"} if code == 302 else {}
    given = settings(tmp_path, endpoint, teacher={"concurrency": 1})
    with pytest.raises(ConfigError, match=words):
        build(given)
    assert len(endpoint.bodies) == 3
    endpoint.answer = StandIn.answer
    build(given)
    assert len(endpoint.bodies) == 13  # the two that were answered are not asked again


def test_a_budget_is_kept(tmp_path: Path, endpoint: StandIn) -> None:
    given = settings(tmp_path, endpoint, budget=0.0005, teacher={"concurrency": 1})
    report = build(given)
    assert report.stopped is not None
    assert report.stopped.startswith("the budget of 0.0005 is spent (0.0006")
    assert len(endpoint.bodies) == 3  # each costs 0.0002
    assert build(given).now.replies == 0
    assert build(settings(tmp_path, endpoint)).complete == 6
    assert len(endpoint.bodies) == 12


def test_a_killed_process_loses_nothing_that_was_written(tmp_path: Path, endpoint: StandIn) -> None:
    given = settings(tmp_path, endpoint)
    build(given)
    file = replies_file(given.output)
    lines = file.read_text().splitlines(keepends=True)
    # Killed in the middle of a line, before the output was written.
    file.write_text("".join(lines[:7]) + lines[7][:30])
    given.output.unlink()
    before = len(endpoint.bodies)
    assert build(given).complete == 6
    assert len(endpoint.bodies) - before == 5
    before = len(endpoint.bodies)
    assert build(given).complete == 6  # the torn line does no harm later either
    assert len(endpoint.bodies) == before


def test_an_interrupt_waits_for_what_is_paid_for(tmp_path: Path, endpoint: StandIn) -> None:
    given = settings(tmp_path, endpoint, teacher={"concurrency": 2})

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_targets(Build.of(given), lambda: teacher_of(given.teacher), interrupted)
    # The reply that was being told of, and the one that was on its way.
    assert len(rows_of(replies_file(given.output))) == len(endpoint.bodies)
    before = len(endpoint.bodies)
    assert before < 6
    assert build(given).complete == 6
    assert len(endpoint.bodies) == 12


def test_only_one_process_writes(tmp_path: Path, endpoint: StandIn) -> None:
    endpoint.gate = threading.Semaphore(0)
    given = settings(tmp_path, endpoint)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(build, given)
        while not endpoint.bodies:
            pass
        with pytest.raises(OutputError, match="another process is writing"):
            build(given)
        endpoint.gate.release(100)
        assert running.result(timeout=30).complete == 6


def test_replies_that_are_cut_or_empty_are_left_out(tmp_path: Path, endpoint: StandIn) -> None:
    def odd(number: int, body: dict) -> tuple[int, dict]:
        words = body["messages"][-1]["content"]
        told = reply(words, finish="length" if "What is 1 +" in words else "stop")
        if "What is 2 +" in words:
            told["choices"][0]["message"]["content"] = None
        return 200, told

    endpoint.answer = odd
    given = settings(tmp_path, endpoint, roles=["planner"])
    report = build(given)
    assert (report.complete, report.by_role["planner"]["cut"], report.by_role["planner"]["empty"]) == (4, 1, 1)
    assert build(given).now.replies == 0  # they are paid for


# A model of ours


def test_a_model_of_ours_writes_what_it_would_write_alone(tmp_path: Path) -> None:
    model = make_model("qwen3", max_position_embeddings=600)
    rows = [*ROWS[:3], {"question": "What is 9 + 2? " * 60, "answer": "11"}]
    given = settings(tmp_path, rows=rows, roles=["planner"], teacher={"max_new_tokens": 8, "batch_size": 2})
    planned = Build.of(given)
    report = build_targets(planned, lambda: LocalTeacher(model, given.teacher))
    system = RecursiveSystem.build(agents={"a": model}, pattern={"name": "one", "stages": [["a"]], "answers": "a"}, prompts={"name": "one", "roles": {"a": {"always": "{question}", "solo": "{question}"}}}, max_new_tokens=8)  # fmt: skip
    planned.start()
    prompts = [planned.conversation("planner", row, {})[-1]["content"] for row in planned.rows[:3]]
    expected = {result.text.strip() for result in system.run(prompts)}
    found = {record["text"] for record in rows_of(replies_file(given.output))}
    assert found == expected
    assert report.by_role["planner"]["failed"] == 1
    assert "positions, and the model reads 600" in report.failures[0]
    assert report.now.prompt_tokens == sum(
        len(model.encode(model.render_chat([{"role": "user", "content": prompt}]))) for prompt in prompts
    )


def test_a_model_of_ours_is_loaded_from_a_directory(tmp_path: Path, tiny_models: dict[str, LanguageModel]) -> None:
    tiny_models["llama"].save_pretrained(tmp_path / "model")
    given = settings(tmp_path, rows=ROWS[:1], teacher={"model": str(tmp_path / "model"), "max_new_tokens": 4})
    teacher = teacher_of(given.teacher, device="cpu")
    assert isinstance(teacher, LocalTeacher)
    assert teacher.model.hidden_size == tiny_models["llama"].hidden_size


# Mistakes


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (ROWS, {"roles": ["plannr"]}, "unknown role 'plannr': did you mean 'planner'"),
        (ROWS, {"roles": ["critic"]}, "the critic reads the planner, of whom nothing is known"),
        (ROWS, {"pattern": "seqential"}, "'sequential'"),
        (ROWS, {"outputt": "x"}, "unknown setting 'outputt'"),
        (ROWS, {"teacher": {"modle": "x"}}, "unknown setting 'teacher.modle'.*'teacher.model'"),
        (ROWS, {"teacher": {"url": "localhost:8000"}}, "must begin with http"),
        (ROWS, {"teacher": {"url": "https://me:word@host/v1"}}, "hold no password"),
        ([{"qestion": "a", "answer": "b"}], {}, "unknown column 'question': did you mean 'qestion'"),
        ([{"question": "a", "answer": " "}], {}, "line 1: the column 'answer' is empty"),
        ([{**ROWS[0], "plan": "p", "critic": "c"}], {}, "has a column for every role already"),
        ([{**ROWS[0], "planner": "p"}], {"roles": ["planner"]}, "has a column 'planner' already"),
        (ROWS, {"columns": {"planer": "x"}}, "'planer'.*'planner'"),
    ],
)
def test_mistakes_are_told_before_anything_is_paid(tmp_path: Path, rows: list, changes: dict, words: str) -> None:
    with pytest.raises(RecursiveMASError, match=words):
        Build.of(settings(tmp_path, rows=rows, **changes))


def test_files_of_others_are_not_overwritten(tmp_path: Path, endpoint: StandIn) -> None:
    given = settings(tmp_path, endpoint)
    given.output.write_text("mine")
    with pytest.raises(OutputError, match="exists, and was not made by this command"):
        build(given)
    assert given.output.read_text() == "mine"
    given.output.unlink()
    build(given)
    replies_file(given.output).write_text('{"other": 1}\n')
    with pytest.raises(InputError, match="line 1 is not a reply"):
        build(given)
