"""Tags: how a call of a tool stands in generated text, and how its result is written so that it is nothing but text.

A call is `<name>argument</name>`, its result `<result>text</result>`. The outermost open tag rules: what stands in it,
other tags too, is its argument, up to the first closing tag of the same name. A tag that is never closed is text; so is
a closing tag that was never opened. Tags inside a result are escaped, and so are the special tokens of a tokenizer.

Knows text; knows nothing of tokens, models or what a tool does.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from recursivemas.tools.tool import RESULT

_TAG = re.compile(r"<(/?)([A-Za-z_]\w{0,40})>")
_RESULT = re.compile(rf"<{RESULT}>.*?</{RESULT}>", re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What is not to be seen, or turns round what is seen; line breaks and tabs are kept."""


class Call(NamedTuple):
    """A call that has just been closed."""

    name: str
    argument: str


def find_call(text: str, names: Collection[str]) -> Call | None:
    """The first complete call of one of these names, or of a name that is hardly another one's."""
    open_tag = ""
    begin = 0
    for match in _TAG.finditer(text):
        closing, name = match.groups()
        if not open_tag and not closing and is_meant(name, names):
            open_tag, begin = name, match.end()
        elif closing and name == open_tag:
            return Call(name, text[begin : match.start()])
    return None


def is_meant(name: str, names: Collection[str]) -> bool:
    """Whether a tag is a tool, or one that was hardly meant as anything else (`Python`, `serach`)."""
    return name in names or bool(difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.8))


def write_result(text: str) -> str:
    """A result as it stands in the text."""
    return f"<{RESULT}>{text}</{RESULT}>"


def results_in(text: str) -> tuple[tuple[int, int], ...]:
    """Where results stand in a text with calls, tags included: characters [start, end)."""
    return tuple(match.span() for match in _RESULT.finditer(text)) if f"<{RESULT}>" in text else ()


def clean(said: Any, most: int) -> tuple[str, bool]:
    """What a tool said, as plain text of at most `most` characters, and whether it was cut.

    Bytes are read as UTF-8; control characters are replaced. Raises `TypeError` for what is no text.
    """
    if isinstance(said, (bytes, bytearray)):
        said = bytes(said[: 4 * most + 4]).decode("utf-8", "replace")
    if not isinstance(said, str):
        raise TypeError(f"the tool gave a {type(said).__name__} instead of text")
    kept = said[: most + 1].replace("\r\n", "\n")
    return _CONTROL.sub("\ufffd", kept[:most]), len(kept) > most


def escape(text: str, names: Iterable[str], special: Iterable[str] = ()) -> str:
    """Text in which no tag is a tag, and no special token one: the `<` that begins it becomes `&lt;`."""
    words = "|".join(map(re.escape, sorted({RESULT, *names})))
    text = re.sub(rf"<(?=\s*/?\s*(?:{words})\b)", "&lt;", text, flags=re.IGNORECASE)
    for token in sorted(special, key=len, reverse=True):
        if token.strip() and token in text:
            broken = "&lt;" + token[1:] if token[0] == "<" else token[0] + "\u200b" + token[1:]
            text = text.replace(token, broken)
    return text
