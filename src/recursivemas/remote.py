"""A vLLM server as the writer of final answers: it is sent the embeddings of a prompt, and sends tokens back.

The answering role's last prompt, with the latents in its slots, goes to the completions endpoint as `prompt_embeds`
(base64 of a tensor, as torch.save writes it), one request a question. vLLM's kernels are not ours, and a server may
hold other weights, another precision or other defaults, so nothing is taken from one on trust: before its first answer
it has to write the same greedy tokens as the model here, after words and after vectors that are no words. Nothing that
comes from a server is unpickled; it is JSON, and only token ids are taken from it.

The server is started apart: `vllm serve MODEL --enable-prompt-embeds`, vllm 0.24 or newer. Knows models, embeddings and
sampling; knows nothing of roles, rounds or questions.
"""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from recursivemas.decoding import Reply, SamplingParams, decode, make_reply, seed_of
from recursivemas.errors import ConfigError, ServerError
from recursivemas.models import LanguageModel

PROBE = (
    "Name the days of the week, in order, and say which of them you like best.",
    "A train leaves at nine and goes at forty miles an hour. How far has it come at noon? Think step by step.",
)
PROBE_TOKENS = 24
"""Greedy tokens that have to be the same, after each text of the probe as it is and with vectors between its words."""


class VLLMServer:
    """A vLLM server with prompt embeddings switched on."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 64,
    ) -> None:
        """`url` is that of the server, `http://localhost:8000`; it is asked for nothing yet.

        `model` is what it calls the model, by default the name the model was loaded by, or the only one it serves.
        `key` is sent as a bearer token; `timeout` is in seconds; `concurrency` is how many requests are under way.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"'{url}' is no address of a server; write it as http://localhost:8000")
        self.model = model
        self._key = key
        self._timeout = timeout
        self._concurrency = concurrency
        self._served: dict[int, tuple[LanguageModel, str]] = {}
        """Models that the server was found to agree with, and what it calls them."""

    def check(self, model: LanguageModel) -> str:
        """Find the server to write what `model` writes; returns what it calls the model. Asked once for each.

        Raises `ServerError` if it is down, serves another model, or answers other tokens.
        """
        if id(model) in self._served:
            return self._served[id(model)][1]
        served = self._name_of(model)
        sampling = SamplingParams(max_new_tokens=PROBE_TOKENS)
        for prompt in _probe(model):
            expected = _greedy(model, prompt)
            found = self._tokens(served, model, prompt, sampling, "probe", PROBE_TOKENS)
            if found != expected:
                pairs = enumerate(zip(found, expected, strict=False))
                place = next((n for n, (one, other) in pairs if one != other), min(len(found), len(expected)))
                raise ServerError(
                    f"the server {self.url} does not write what '{served}' writes here: of {len(expected)} greedy "
                    f"tokens the first {place} are the same, then it writes {model.decode(found[place:])!r} for "
                    f"{model.decode(expected[place:])!r}; give it the same weights and dtype as here, or decode here"
                )
        self._served[id(model)] = model, served
        return served

    def write(
        self,
        model: LanguageModel,
        prompts: Sequence[Float[Tensor, "_ hidden_size"]],
        sampling: SamplingParams,
        keys: Sequence[str],
        room: Sequence[int] | None,
    ) -> list[Reply]:
        """The reply to each prompt (see `decoding.Writer`); what is sampled is drawn by the server, from seed and key.

        Raises `ServerError`, as `check` does, or if a request fails.
        """
        served = self.check(model)
        longest = [sampling.max_new_tokens] * len(keys) if room is None else room

        def one(row: int) -> Reply:
            limit = min(sampling.max_new_tokens, longest[row])
            return make_reply(model, self._tokens(served, model, prompts[row], sampling, keys[row], limit), sampling)

        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(one, range(len(prompts))))

    def _name_of(self, model: LanguageModel) -> str:
        """What the server calls the model that was asked for."""
        try:
            cards = self._ask("/v1/models")["data"]
            names = {str(name): str(card["id"]) for card in cards for name in (card.get("root"), card["id"]) if name}
        except (AttributeError, KeyError, TypeError):
            raise ServerError(f"{self.url}/v1/models lists no models; is it a vLLM server?") from None
        wanted = self.model or model.source
        known = sorted({*names.values()})
        if wanted is None and len(known) == 1:
            return known[0]
        if wanted not in names:
            asked = f"'{wanted}' was asked for" if wanted else "none of them was named"
            raise ServerError(
                f"the server {self.url} serves {', '.join(known) or 'no model'}, and {asked}; give the name as model="
            )
        return names[wanted]

    def _tokens(
        self, served: str, model: LanguageModel, prompt: Tensor, sampling: SamplingParams, key: str, limit: int
    ) -> list[int]:
        """What the server writes after a prompt, with the token that ends the reply, if one does."""
        buffer = io.BytesIO()
        torch.save(prompt.detach().cpu().contiguous(), buffer)
        answer = self._ask(
            "/v1/completions",
            {
                "model": served,
                "prompt_embeds": base64.b64encode(buffer.getbuffer()).decode("ascii"),
                "prompt": "",
                "max_tokens": limit,
                "min_tokens": min(sampling.min_new_tokens, limit),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or 0,
                # Left out, these would be what the model's own generation_config.json says.
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": seed_of(sampling.seed, key),
                "stop": list(sampling.stop),
                "stop_token_ids": sorted(model.stop_token_ids),
                "include_stop_str_in_output": True,
                "return_token_ids": True,
            },
        )
        try:
            [choice] = answer["choices"]
            tokens = [int(token) for token in choice["token_ids"]]
            ended = choice["finish_reason"] == "stop"
        except (KeyError, TypeError, ValueError):
            raise ServerError(
                f"the server {self.url} sends no token ids (choices[0].token_ids); it takes vllm 0.24 or newer"
            ) from None
        if any(not 0 <= token < model.vocab_size for token in tokens) or len(tokens) > limit:
            raise ServerError(f"the server {self.url} sends tokens that '{served}' does not have, or too many")
        # Whether the token that ended a reply is among its tokens has changed from version to version.
        if ended and not make_reply(model, tokens, sampling).finished:
            tokens.append(model.reply_end_id)
        return tokens

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the server says. Raises `ServerError` with what is wrong."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=self._timeout
            ) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            raise ServerError(
                f"the server {self.url} refuses {path} (HTTP {error.code}: {said or error.reason}); was it started "
                "with --enable-prompt-embeds, and for this model?"
            ) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(
                f"the server {self.url} cannot be reached ({reason}); start it with: vllm serve MODEL "
                "--enable-prompt-embeds"
            ) from None
        except ValueError:
            raise ServerError(f"what {self.url}{path} sends is not JSON; is it a vLLM server?") from None
        if not isinstance(answer, dict):
            raise ServerError(f"what {self.url}{path} sends is not a JSON object; is it a vLLM server?")
        return answer


@torch.no_grad()
def _probe(model: LanguageModel) -> list[Float[Tensor, "_ hidden_size"]]:
    """Prompts of words, and the same with vectors among them that are no word's embedding, as latents are not."""
    prompts = []
    for text in PROBE:
        embeds = model.embed(torch.tensor(model.encode(model.render_chat([{"role": "user", "content": text}]))))
        prompts += [embeds, torch.cat([embeds, (embeds[:8] + embeds[1:9]) / 2, embeds[-4:]])]
    return prompts


@torch.no_grad()
def _greedy(model: LanguageModel, prompt: Float[Tensor, "position hidden_size"]) -> list[int]:
    cache = model.new_cache(1)
    state = model.step(cache, prompt.unsqueeze(0))[:, -1]
    [reply] = decode(model, cache, state, SamplingParams(max_new_tokens=PROBE_TOKENS), ["probe"])
    return list(reply.token_ids)
