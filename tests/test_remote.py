"""Answers written by a server, against those written here. No vLLM is at hand: a stand-in speaks its protocol.

It reads the requests that a vLLM server would get, and writes with a model of ours by the slowest of loops: every token
from the whole of what stands before it. What a real server's kernels do is for its check (`VLLMServer.check`) to find.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import torch
from tests.conftest import FEW_WORDS, make_model

from recursivemas import remote
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError, ServerError
from recursivemas.models import LanguageModel
from recursivemas.remote import VLLMServer
from recursivemas.system import RecursiveSystem

MakeSystem = Callable[..., RecursiveSystem]


class StandIn(BaseHTTPRequestHandler):
    """The two endpoints of a vLLM server that are used. What it is and does wrong stands in `server.settings`."""

    server: Any

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        names = self.server.settings.get("names", ["tiny"])
        self.reply({"object": "list", "data": [{"id": name, "root": f"/models/{name}"} for name in names]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(asked)
        settings = self.server.settings
        if "status" in settings:
            self.reply({"error": {"message": "prompt embeds are off"}}, settings["status"])
            return
        embeds = torch.load(io.BytesIO(base64.b64decode(asked["prompt_embeds"])), weights_only=True)
        tokens, reason = self.written(embeds, asked)
        choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": tokens}
        self.reply({"choices": [{**choice, **settings.get("choice", {})}]})

    @torch.no_grad()
    def written(self, embeds: torch.Tensor, asked: dict[str, Any]) -> tuple[list[int], str]:
        network = self.server.settings["model"].network
        assert embeds.dim() == 2
        tokens: list[int] = []
        while len(tokens) < asked["max_tokens"]:
            token = int(network(inputs_embeds=embeds[None]).logits[0, -1].argmax())
            if token in asked["stop_token_ids"]:
                return tokens + [token] * self.server.settings.get("tells_end", True), "stop"
            tokens.append(token)
            embeds = torch.cat([embeds, network.get_input_embeddings()(torch.tensor([token]))])
        return tokens, "length"

    def reply(self, content: Any, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        body = self.server.settings.get("body", body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


Serve = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a stand-in around a model; returns its address, and what it is asked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started: list[ThreadingHTTPServer] = []

    def start(model: LanguageModel, **settings: Any) -> tuple[str, list[dict[str, Any]]]:
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
        server.settings = {"model": model, **settings}
        server.requests = []
        started.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", server.requests

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("tells_end", [True, False])
def test_answers_are_those_written_here(
    make_system: MakeSystem, questions: list[str], serve: Serve, tells_end: bool
) -> None:
    system = make_system()
    solver = system.agents["solver"].model
    url, requests = serve(solver, tells_end=tells_end)
    writer = VLLMServer(url + "/v1/")
    expected = system.run(questions, trace="full")
    found = system.run(questions, trace="full", writer=writer)
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.finished for each in found] == [each.finished for each in expected]
    # What is counted is the same, but that the server reads whole prompts.
    for one, other in zip(found, expected, strict=True):
        assert one.usage.prompt_tokens == other.usage.prompt_tokens
        assert one.usage.generated_tokens == other.usage.generated_tokens
        assert one.usage.latent_steps == other.usage.latent_steps
    # One request a question, after the probe; none for the roles before.
    assert len(requests) == 2 * len(remote.PROBE) + len(questions)
    system.run(questions[0], writer=writer)
    assert len(requests) == 2 * len(remote.PROBE) + len(questions) + 1


def test_every_setting_of_a_request_is_said(make_system: MakeSystem, serve: Serve) -> None:
    system = make_system()
    solver = system.agents["solver"].model
    url, requests = serve(solver, names=["other", "tiny"])
    sampling = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=6, stop=("x",), seed=3)
    results = system.run(
        ["Why?"], sampling=sampling, num_samples=2, writer=VLLMServer(url, model="tiny", concurrency=1)
    )
    assert len(results[0].samples) == 2
    asked = requests[-2:]
    for each in asked:
        assert each["model"] == "tiny"
        assert each["stop_token_ids"] == sorted(solver.stop_token_ids)
        assert (each["temperature"], each["top_p"], each["top_k"]) == (0.7, 0.9, 5)
        assert (each["max_tokens"], each["min_tokens"], each["stop"]) == (6, 0, ["x"])
        assert (each["repetition_penalty"], each["min_p"], each["return_token_ids"]) == (1.0, 0.0, True)
    assert asked[0]["prompt_embeds"] == asked[1]["prompt_embeds"]
    assert asked[0]["seed"] != asked[1]["seed"]


def test_a_reply_ends_where_the_context_does(make_system: MakeSystem, serve: Serve) -> None:
    solver = make_model("qwen2", 2, max_position_embeddings=160)
    agents = {"planner": solver, "critic": solver, "solver": solver}
    system = make_system(agents=agents, prompts=FEW_WORDS, max_new_tokens=512)
    url, requests = serve(solver)
    expected = system.run("Why?")
    assert system.run("Why?", writer=VLLMServer(url)).text == expected.text
    assert requests[-1]["max_tokens"] < 160
    with pytest.raises(InputError, match="the prompt .* reads at most 160"):
        system.run("Why? " * 60, writer=VLLMServer(url))


def refused(system: RecursiveSystem, writer: VLLMServer, match: str) -> None:
    with pytest.raises(ServerError, match=match):
        system.run("Why?", writer=writer)


def test_a_server_that_writes_other_tokens_is_refused(make_system: MakeSystem, serve: Serve) -> None:
    url, requests = serve(make_model("qwen2", 7))
    refused(
        make_system(), VLLMServer(url), r"does not write what 'tiny' writes here: of \d+ greedy tokens the first \d"
    )
    assert len(requests) == 1


def test_a_server_that_knows_words_alone_is_refused(make_system: MakeSystem, serve: Serve) -> None:
    # One that would take the nearest word for every vector writes the same after words.
    system = make_system()
    solver = system.agents["solver"].model

    class Words(LanguageModel):
        """Reads words alone."""

        @property
        def network(self) -> Any:
            return self._words

        @network.setter
        def network(self, network: Any) -> None:
            table = network.get_input_embeddings()

            def words(inputs_embeds: torch.Tensor) -> Any:
                ids = torch.cdist(inputs_embeds, table.weight[None]).argmin(dim=-1)
                return network(input_ids=ids)

            words.get_input_embeddings = lambda: table  # type: ignore[attr-defined]
            self._words = words

    deaf = Words.__new__(Words)
    deaf.network = solver.network
    url, requests = serve(deaf)
    refused(system, VLLMServer(url), "does not write what")
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("settings", "model", "match"),
    [
        ({"names": ["other"]}, "tiny", "serves other, and 'tiny' was asked for; give the name as model="),
        ({"names": ["one", "two"]}, None, "serves one, two, and none of them was named"),
        ({"names": []}, None, "serves no model"),
        ({"status": 400}, None, r"refuses /v1/completions \(HTTP 400: .*prompt embeds are off.*--enable-prompt-embeds"),
        ({"choice": {"token_ids": None}}, None, "sends no token ids .* it takes vllm 0.24 or newer"),
        ({"choice": {"token_ids": [10**6]}}, None, "sends tokens that 'tiny' does not have"),
        ({"body": b"<html>"}, None, "is not JSON; is it a vLLM server"),
        ({"body": b"[]"}, None, "is not a JSON object; is it a vLLM server"),
        ({"body": b"{}"}, None, "lists no models; is it a vLLM server"),
    ],
)
def test_a_server_that_is_another_is_told(
    make_system: MakeSystem, serve: Serve, settings: dict[str, Any], model: str | None, match: str
) -> None:
    system = make_system()
    url, _ = serve(system.agents["solver"].model, **settings)
    refused(system, VLLMServer(url, model=model), match)


def test_a_server_that_is_down_is_told(make_system: MakeSystem) -> None:
    refused(
        make_system(), VLLMServer("http://127.0.0.1:9", timeout=5.0), "cannot be reached .*; start it with: vllm ser"
    )


def test_what_cannot_be_asked_of_a_server_is_refused(make_system: MakeSystem) -> None:
    with pytest.raises(ConfigError, match="'localhost:8000' is no address of a server; write it as http://"):
        VLLMServer("localhost:8000")
    with pytest.raises(ConfigError, match="give either tools or a writer"):
        make_system().run("Why?", tools="python", writer=VLLMServer("http://127.0.0.1:9"))
