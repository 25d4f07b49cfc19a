"""Toolbox: the tools of a run with their limits, and the session in which a batch of replies calls them.

A session watches what is generated. When a row has closed a call it waits, the tool runs in a thread of its own while
the other rows go on, and the result, escaped and cut, is put in behind the call. A tool that raises, hangs or says what
is no text is answered with an error that the model can read, and so is a call too many. The tag of a result can be
written by nobody else: the token that would complete its beginning is never chosen.

Knows models as tokenizers; knows nothing of roles, rounds, caches or what a tool does.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from recursivemas.errors import ConfigError, InputError, RecursiveMASError, unknown_name
from recursivemas.models import LanguageModel
from recursivemas.tools.tags import Call, clean, escape, find_call, write_result
from recursivemas.tools.tool import RESULT, Tool, check_tool
from recursivemas.trace import ToolCall

AT_ONCE = 8
"""Tools that run at a time, for all rows together."""
_FORGED = (f"<{RESULT}", f"</{RESULT}")


@dataclass(frozen=True, kw_only=True)
class ToolLimits:
    """What tools may take of one reply."""

    max_calls: int = 5
    """Calls of all tools together; a call too many is answered with an error, and not run."""
    seconds: float = 30.0
    """By the clock, for one call."""
    max_result_chars: int = 6000
    max_result_tokens: int = 2048
    """Of one result. It is cut further where the context has no room for it."""
    allow_repeats: bool = True
    """Whether a call may be made again with the same text; if not, the second is answered with an error."""
    error_text: str | None = None
    """What a model reads of every error, in place of what went wrong: for models that know few words."""

    def __post_init__(self) -> None:
        for name, least in (("max_calls", 0), ("max_result_chars", 1), ("max_result_tokens", 8)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} of the tools must be a whole number, {least} or more; got {value!r}")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds > 0:
            raise ConfigError(f"seconds of the tools must be a number above 0; got {self.seconds!r}")


class Toolbox:
    """Tools by name, and their limits."""

    def __init__(self, tools: Sequence[Tool], limits: ToolLimits | None = None) -> None:
        """Raises `ConfigError` if a tool has no name that can be a tag, or two have the same."""
        self.tools: dict[str, Tool] = {}
        self.limits = limits or ToolLimits()
        for tool in tools:
            check_tool(tool)
            if tool.name in self.tools:
                raise ConfigError(f"two tools are called '{tool.name}'; give one of them another name")
            self.tools[tool.name] = tool

    @property
    def text(self) -> str:
        """For the model: which tools there are and how they are called. It goes where a prompt says `{tools}`."""
        if not self.tools:
            return ""
        lines = [f"<{name}>...</{name}>: {tool.description}" for name, tool in self.tools.items()]
        most = self.limits.max_calls
        return "\n".join(
            [
                "",
                f"Tools can be called, at most {most} {'time' if most == 1 else 'times'} in all, by writing a text "
                f"between the tags of one; what it says then follows as <{RESULT}>...</{RESULT}>:",
                *lines,
            ]
        )

    def session(self, model: LanguageModel, questions: Sequence[str]) -> "ToolSession":
        """The tools for replies to these questions, one row each, that this model is going to write.

        Raises `ConfigError` if its tokenizer cannot write the tags.
        """
        return ToolSession(self, model, questions)

    def __repr__(self) -> str:
        return f"Toolbox({', '.join(self.tools)})"


@dataclass
class _Row:
    """What one reply has called so far."""

    tools: dict[str, Tool]
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """The first token after the last result."""
        return self.calls[-1].position + self.calls[-1].num_tokens if self.calls else 0


@dataclass
class _Running:
    """A call that is under way, or still to begin."""

    row: int
    call: Call
    position: int
    room: int
    began: float | None = None


class ToolSession:
    """The calls of a batch of replies (an `Interjector`)."""

    def __init__(self, toolbox: Toolbox, model: LanguageModel, questions: Sequence[str]) -> None:
        self._limits = toolbox.limits
        self._model = model
        self._names = list(toolbox.tools)
        self._rows = [
            _Row({name: tool.for_question(question) for name, tool in toolbox.tools.items()}) for question in questions
        ]
        self._vocabulary = _vocabulary_of(model)
        self._silent = set(model.tokenizer.all_special_ids)
        self._special = [str(token) for token in model.tokenizer.added_tokens_decoder.values()]
        self._pending: list[_Running] = []
        self._answers: SimpleQueue[tuple[_Running, Any, BaseException | None]] = SimpleQueue()
        for tag in [f"<{name}>" for name in [*self._names, RESULT]]:
            if tag not in model.decode(model.encode(tag)):
                raise ConfigError(
                    f"the tokenizer of '{model.source or model.config.model_type}' cannot write {tag}, or counts it "
                    "among its special tokens, which are no text; give the tool another name"
                )

    def calls(self, row: int) -> tuple[ToolCall, ...]:
        """What has been put into a row so far."""
        return tuple(self._rows[row].calls)

    def forbidden(self, row: int, token_ids: Sequence[int]) -> list[int]:
        """Tokens that would complete the beginning of a result's tag."""
        tail: list[int] = []
        for token in reversed(token_ids[self._rows[row].begin :]):
            if token not in self._silent:  # however many of these stand between its letters
                tail.append(token)
            if len(tail) == len(_FORGED[1]):
                break
        return self._vocabulary.completing(self._model.decode(tail[::-1]).lower() if tail else "")

    def takes_up(self, row: int, token_ids: Sequence[int], room: int) -> bool:
        """Whether a row has just closed a call. Its result will have at most `room` tokens."""
        if ">" not in self._model.decode(token_ids[-1:]):
            return False
        call = find_call(self._model.decode(token_ids[self._rows[row].begin :]), self._names)
        if call is None or room < len(self._model.encode(write_result("error: no room"))) + 1:
            return False
        self._pending.append(_Running(row, call, len(token_ids), room))
        self._start()
        return True

    def ready(self, *, wait: bool) -> list[tuple[int, list[int]]]:
        """Rows whose result has come, with its tokens; in the order in which they called, as far as they are there."""
        done: list[tuple[int, list[int]]] = []
        while self._pending:
            self._start()
            done += self._collect(self._patience() if wait and not done else 0.0)
            if done or not wait:
                break
        return done

    def _start(self) -> None:
        """Answer what needs no tool, and begin what there is room for."""
        running = sum(each.began is not None for each in self._pending)
        for each in self._pending:
            if each.began is not None:
                continue
            refusal = self._refusal(each)
            if refusal is not None:
                each.began = time.monotonic()
                self._answers.put((each, None, InputError(refusal)))
            elif self._answers_at_once(each):
                each.began = time.monotonic()
                self._run(each)
            elif running < AT_ONCE:
                running += 1
                each.began = time.monotonic()
                # Not from a pool: a tool that hangs would take a place in it for ever, and keep us from ending.
                threading.Thread(target=self._run, args=(each,), name=f"tool {each.call.name}", daemon=True).start()

    def _refusal(self, each: _Running) -> str | None:
        name, argument = each.call
        row, limits = self._rows[each.row], self._limits
        tool = row.tools.get(name)
        if tool is None:
            return unknown_name("tool", name, self._names)
        made = [call for call in row.calls if call.tool == name]
        arguments = [call.argument.strip() for call in made]
        # A call that is refused as a repetition is not made, and does not count as one of this tool.
        spent = len(arguments) if limits.allow_repeats else len({*arguments})
        if len(row.calls) >= limits.max_calls or (tool.max_calls is not None and spent >= tool.max_calls):
            what = "calls" if len(row.calls) >= limits.max_calls else f"calls of {name}"
            return f"no {what} are left; answer with what you know"
        if not limits.allow_repeats and argument.strip() in arguments:
            return "this call has been made before; its result stands above"
        return None

    def _answers_at_once(self, each: _Running) -> bool:
        try:
            return self._tool_of(each).answers_at_once(each.call.argument)
        except Exception:  # whatever it does will be told when it is called
            return False

    def _tool_of(self, each: _Running) -> Tool:
        return self._rows[each.row].tools[each.call.name]

    def _run(self, each: _Running) -> None:
        tool = self._tool_of(each)
        try:
            self._answers.put((each, tool(each.call.argument), None))
        except BaseException as error:  # whatever a tool does, the reply goes on
            self._answers.put((each, None, error))

    def _patience(self) -> float:
        """Seconds until the first of the calls under way has had its time."""
        begun = [each.began for each in self._pending if each.began is not None]
        return max(0.0, min(begun) + self._limits.seconds - time.monotonic())

    def _collect(self, seconds: float) -> list[tuple[int, list[int]]]:
        """What has been answered by now, or within so many seconds; a call that has had its time is answered too."""
        done = []
        try:
            answer = self._answers.get(timeout=seconds) if seconds else self._answers.get_nowait()
            while True:
                if any(each is answer[0] for each in self._pending):  # it may come after its time
                    done.append(answer)
                answer = self._answers.get_nowait()
        except Empty:
            pass
        now = time.monotonic()
        for each in self._pending:
            late = each.began is not None and now - each.began >= self._limits.seconds
            if late and not any(each is other for other, _, _ in done):
                done.append((each, None, InputError(f"no answer within {self._limits.seconds:g} s")))
        return [(each.row, self._put(each, said, error)) for each, said, error in done]

    def _put(self, each: _Running, said: Any, error: BaseException | None) -> list[int]:
        """The tokens of an answer, which is then part of its row."""
        self._pending = [other for other in self._pending if other is not each]
        was_cut, told = False, None
        if error is None:
            try:
                said, was_cut = clean(said, self._limits.max_result_chars)
            except Exception as fault:  # a string of a class of its own may do anything
                error = fault
        if error is not None:
            told = _tell(error)
            shown = f"error: {told}" if self._limits.error_text is None else self._limits.error_text
            said, was_cut = clean(shown, self._limits.max_result_chars)
        text, tokens = self._fit(said, was_cut, min(self._limits.max_result_tokens, each.room))
        seconds = time.monotonic() - each.began if each.began is not None else 0.0
        row = self._rows[each.row]
        name, argument = each.call
        row.calls.append(ToolCall(name, argument, text, each.position, len(tokens), seconds, told))
        return tokens

    def _fit(self, text: str, was_cut: bool, most: int) -> tuple[str, list[int]]:
        """A result that is at most `most` tokens long, escaped, and these tokens."""
        while True:
            shown = escape(text + (" [cut]" if was_cut else ""), self._names, self._special)
            tokens = self._model.encode(write_result(shown))
            if len(tokens) <= most or not text:
                return shown, tokens[:most]
            text, was_cut = text[: min(len(text) - 1, int(0.9 * len(text) * most / len(tokens)))], True


def _tell(error: BaseException) -> str:
    """An exception in one short line."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # of a class of its own
        said = ""
    kind = type(error).__name__
    known = isinstance(error, RecursiveMASError)
    return (said if known and said else f"{kind}: {said}" if said else kind)[:500]


class _Vocabulary:
    """Which tokens of a tokenizer would complete the beginning of a result's tag."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._always = [number for number, text in enumerate(texts) if any(tag in text for tag in _FORGED)]
        self._after: dict[str, list[int]] = {}
        for tag in _FORGED:
            for cut in range(1, len(tag)):
                rest = tag[cut:]
                self._after[tag[:cut]] = [number for number, text in enumerate(texts) if text.startswith(rest)]

    def completing(self, tail: str) -> list[int]:
        """Tokens after which text that ends in `tail` would hold the beginning of a result's tag."""
        found = list(self._always)
        for begun, tokens in self._after.items():
            if tail.endswith(begun):
                found += tokens
        return found


_VOCABULARIES: "dict[int, tuple[Any, _Vocabulary]]" = {}


def _vocabulary_of(model: LanguageModel) -> _Vocabulary:
    """Made once for each tokenizer; of a large one it takes a second."""
    tokenizer = model.tokenizer
    if id(tokenizer) not in _VOCABULARIES:
        numbers = range(min(model.vocab_size, len(tokenizer)))
        texts = tokenizer.batch_decode([[number] for number in numbers], skip_special_tokens=True)
        _VOCABULARIES[id(tokenizer)] = tokenizer, _Vocabulary([text.lower() for text in texts])
    return _VOCABULARIES[id(tokenizer)][1]
