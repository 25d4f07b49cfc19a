"""Who writes for others: a language model of ours, or one behind an OpenAI-compatible endpoint.

A request that fails for a reason that may pass (the network, a full or broken server) is made again, each time after
twice as long. One that is refused for good (a wrong key, an unknown model) ends the work. Knows conversations and
their replies; knows nothing of roles, questions or files.
"""

import hashlib
import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from recursivemas.agents import PrefixStore
from recursivemas.config import Config
from recursivemas.decoding import SamplingParams, decode
from recursivemas.errors import ConfigError
from recursivemas.models import LanguageModel

Conversation = tuple[dict[str, str], ...]
"""Messages as chat templates and endpoints take them: `role` and `content`."""
_LATER = (408, 409, 425, 429)
"""Refusals that are no fault of the request; so are all of a server that fails (5xx)."""
_LONGEST_WAIT = 60.0
_THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)


class Prices(Config):
    """What tokens cost, in the currency of your bill, per million of them."""

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)


class TeacherSettings(Config):
    """Who writes, and how."""

    model: str
    """Of ours: a Hugging Face name or a directory. Behind an endpoint: as it is called there."""
    url: str | None = None
    """Of an endpoint, up to and without /chat/completions: http://localhost:8000/v1. Without it the model is loaded."""
    key_from: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key, if it wants one."""
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    seed: int = 0
    extra: dict[str, Any] = Field(default_factory=dict)
    """More that an endpoint is told, like {chat_template_kwargs: {enable_thinking: false}}; null takes a field out."""
    concurrency: int = Field(default=8, ge=1)
    """Requests to an endpoint at the same time."""
    attempts: int = Field(default=6, ge=1)
    """How often a request is made before it is left for later."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the second attempt; twice as long before each further one."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds after which an endpoint is given up that says nothing."""
    batch_size: int = Field(default=16, ge=1)
    """Replies that a model of ours writes at the same time."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _check(self) -> "TeacherSettings":
        # Neither error may tell what it is about: it would be the key.
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_from):
            raise ConfigError(
                "teacher.key_from names an environment variable, in capitals: OPENAI_API_KEY; never give the key itself"
            )
        if self.url is not None and not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", self.url):
            raise ConfigError("teacher.url must begin with http:// or https:// and a host, and hold no password")
        return self

    @property
    def sampling(self) -> SamplingParams:
        """How a model of ours writes."""
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens, seed=self.seed
        )


@dataclass(frozen=True)
class Request:
    """Something to be written."""

    conversation: Conversation
    settings: TeacherSettings

    @property
    def key(self) -> str:
        """What makes it the same request: the words, the model, and how it samples."""
        told = self.settings.model_dump(include={"model", "temperature", "top_p", "max_new_tokens", "seed", "extra"})
        return hashlib.sha256(json.dumps([self.conversation, told], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Written:
    """A reply."""

    text: str
    finished: bool
    """Whether it ended by itself."""
    prompt_tokens: int | None
    """As its writer counts them; None if it does not say."""
    completion_tokens: int | None


@dataclass(frozen=True)
class Failure:
    """Why there is no reply yet."""

    reason: str


Record = Callable[[Request, Written | Failure], bool]
"""Is told of every reply or failure, one after the other; says whether to go on."""


@runtime_checkable
class Teacher(Protocol):
    """Writes."""

    def write(self, requests: Sequence[Request], record: Record) -> None:
        """Write a reply to every request, in whatever order. What has been begun is recorded, even if it is stopped."""


def teacher_of(settings: TeacherSettings, *, device: str | None = None) -> Teacher:
    """The teacher that settings describe. Raises `ModelError` if a model of ours cannot be loaded."""
    if settings.url is not None:
        return Endpoint(settings)
    model = LanguageModel.from_pretrained(settings.model, dtype=settings.dtype, device=device)
    return LocalTeacher(model, settings)


# --- a model of ours --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalTeacher:
    """A model of ours: writes batch by batch."""

    model: LanguageModel
    settings: TeacherSettings

    def write(self, requests: Sequence[Request], record: Record) -> None:
        """See `Teacher`."""
        prompts = {each.key: self.model.render_chat(list(each.conversation)) for each in requests}
        # Those of about one length waste least on padding.
        ordered = sorted(requests, key=lambda each: len(prompts[each.key]))
        for start in range(0, len(ordered), self.settings.batch_size):
            batch = []
            for request in ordered[start : start + self.settings.batch_size]:
                length = len(self.model.encode(prompts[request.key])) + 1
                if self.model.max_positions is not None and length > self.model.max_positions:
                    too_long = f"its prompt takes {length} positions, and the model reads {self.model.max_positions}"
                    if not record(request, Failure(too_long)):
                        return
                else:
                    batch.append(request)
            goes_on = [record(request, each) for request, each in self._written(batch, prompts)]
            if not all(goes_on):
                return

    def _written(self, batch: Sequence[Request], prompts: dict[str, str]) -> Iterator[tuple[Request, Written]]:
        if not batch:
            return
        keys = [request.key for request in batch]
        reading = PrefixStore().get(self.model, tuple(prompts[key] for key in keys))
        longest = self.model.max_positions
        room = None if longest is None else [longest - length for length in reading.prompt_tokens]
        replies = decode(self.model, reading.cache, reading.state, self.settings.sampling, keys, room)
        for request, reply, length in zip(batch, replies, reading.prompt_tokens, strict=True):
            yield request, Written(_said(reply.text), reply.finished, length, len(reply.token_ids))


# --- an endpoint ------------------------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key to another host, and lose its body."""

    def redirect_request(self, *given: Any, **more: Any) -> None:
        return None


class _RefusedError(Exception):
    """The endpoint will never take such a request."""


class Endpoint:
    """An OpenAI-compatible endpoint: several requests at the same time."""

    def __init__(self, settings: TeacherSettings) -> None:
        if settings.url is None:
            raise ConfigError("an endpoint needs teacher.url")
        self.settings = settings
        self._url = settings.url.rstrip("/") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopping = threading.Event()

    def write(self, requests: Sequence[Request], record: Record) -> None:
        """See `Teacher`. Raises `ConfigError` if the endpoint refuses for good."""
        self._stopping.clear()
        waiting = iter(requests)
        refused: list[str] = []
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            running: dict[Future[Written | Failure], Request] = {}
            try:
                while True:
                    if not self._stopping.is_set():
                        for request in islice(waiting, self.settings.concurrency - len(running)):
                            running[pool.submit(self._reply, request)] = request
                    if not running:
                        break
                    self._take(running, record, refused)
            except BaseException:
                # What has been asked for is paid for: it is waited for, and kept. A second Ctrl-C does not wait.
                self._stopping.set()
                while running:
                    self._take(running, record, refused)
                raise
        if refused:
            raise ConfigError(refused[0])

    def _take(self, running: dict[Future[Written | Failure], Request], record: Record, refused: list[str]) -> None:
        """Record what is done; stop if there is a reason to."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            request = running.pop(future)
            try:
                goes_on = record(request, future.result())
            except _RefusedError as error:
                refused.append(str(error))
                goes_on = False
            if not goes_on:
                self._stopping.set()

    def _reply(self, request: Request) -> Written | Failure:
        """The reply, or why there was none in as many attempts as there may be. Raises `_RefusedError`."""
        reason, delay = "stopped before it was asked", 0.0
        for attempt in range(self.settings.attempts):
            if self._stopping.wait(delay):
                break
            try:
                return self._ask(request)
            except urllib.error.HTTPError as error:
                with error:
                    reason, asked = self._judge(error), _retry_after(error)
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                said = " ".join(str(error).split())[:200]
                reason, asked = f"{type(error).__name__}: {said}" if said else type(error).__name__, 0.0
            # Spread a little, so that requests which failed together do not come back together.
            delay = self.settings.backoff * 2**attempt * random.uniform(1.0, 1.25)
            delay = min(max(delay, asked), _LONGEST_WAIT)
        return Failure(reason)

    def _ask(self, request: Request) -> Written:
        settings = self.settings
        body = {
            "model": settings.model,
            "messages": list(request.conversation),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            **settings.extra,
        }
        told = {name: value for name, value in body.items() if value is not None}
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(settings.key_from)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        asked = urllib.request.Request(self._url, json.dumps(told).encode(), headers, method="POST")
        with self._opener.open(asked, timeout=settings.timeout) as response:
            answer = json.loads(response.read())
        [choice, *_] = answer["choices"]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise ValueError("the reply is not text")
        usage = answer.get("usage") or {}
        return Written(
            _said(text),
            choice.get("finish_reason") in ("stop", None),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
        )

    def _judge(self, error: urllib.error.HTTPError) -> str:
        """What a refusal says. Raises `_RefusedError` if it will be said again."""
        said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        reason = f"HTTP {error.code}: {said or error.reason}"
        if error.code in _LATER or error.code >= 500:
            return reason
        advice = "look at the settings of the teacher"
        if error.code in (401, 403):
            given = "is set" if os.environ.get(self.settings.key_from) else "is not set"
            advice = f"the key is taken from the environment variable {self.settings.key_from}, which {given}"
        elif error.code == 404:
            advice = "check teacher.url and teacher.model"
        elif 300 <= error.code < 400:
            advice = f"it sends requests elsewhere ({error.headers.get('Location')}); give that address as teacher.url"
        raise _RefusedError(f"the endpoint {self._url} refuses ({reason}); {advice}")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that a server asks to wait."""
    try:
        return max(float(error.headers.get("Retry-After") or 0), 0.0)
    except ValueError:  # a date, which our own waiting does as well
        return 0.0


def _said(text: str) -> str:
    """A reply without the thoughts that some models write before it."""
    return _THOUGHTS.sub("", text).strip()
