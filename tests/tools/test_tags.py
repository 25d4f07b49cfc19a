"""Tags: what is a call and what is text; and how what a tool says becomes nothing but text."""

import pytest
from tests.tools.pieces import ADD

from recursivemas.errors import ConfigError
from recursivemas.tools import TOOLS, FunctionTool, Tool, Toolbox, ToolLimits, as_toolbox, make_tool
from recursivemas.tools.tags import clean, escape, find_call, write_result


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("", None),
        ("<python>1", None),
        ("<python>1</search>", None),
        ("1</python>", None),
        ("</python><python>", None),
        ("<python>1</python>", ("python", "1")),
        ("so <python>\nprint(1)\n</python>\n", ("python", "\nprint(1)\n")),
        ("</python> <search>a b</search>", ("search", "a b")),
        ("<search>a</search><python>1</python>", ("search", "a")),
        ("<python>'<search>a</search>'</python>", ("python", "'<search>a</search>'")),
        ("<python><python>1</python></python>", ("python", "<python>1")),
        ("<python>1 < 2 > 0</python>", ("python", "1 < 2 > 0")),
        ("<b><python>1</python></b>", ("python", "1")),
        ("<html><b>bold</b></html>", None),
        ("<wolfram>1</wolfram>", None),
        ("<serach>a</serach>", ("serach", "a")),
        ("<Python>1</Python>", ("Python", "1")),
        ("<result>1</result>", None),
        ("< python>1</python>", None),
    ],
)
def test_what_is_a_call(text: str, call: tuple[str, str] | None) -> None:
    found = find_call(text, ["python", "search"])
    assert (None if found is None else tuple(found)) == call


@pytest.mark.parametrize(
    "text",
    ["</result>", "<result>", "< / RESULT >", "<python>", "</Python>", "<add x='1'>", "<|end|>", "[INST]", "<s>"],
)
def test_no_tag_and_no_special_token_is_left_in_a_result(text: str) -> None:
    special = ["<|end|>", "[INST]", "<s>"]
    escaped = escape(f"a {text} b", ["python", "add"], special)
    assert text not in escaped
    assert escaped.startswith("a ")
    assert find_call(f"<python>{escaped}", ["python"]) is None
    assert escape("x < y, <class 'int'>, a<b>c", ["python"], special) == "x < y, <class 'int'>, a<b>c"


def test_a_result_is_written_between_its_tags() -> None:
    assert write_result("4") == "<result>4</result>"


def test_what_a_tool_said_is_made_plain_text() -> None:
    assert clean("abc", 3) == ("abc", False)
    assert clean("abcd", 3) == ("abc", True)
    assert clean("é".encode() * 9, 3) == ("ééé", True)
    with pytest.raises(TypeError, match="gave a int instead of text"):
        clean(3, 9)


def test_the_model_is_told_which_tools_there_are() -> None:
    assert Toolbox([]).text == ""
    text = Toolbox([ADD], ToolLimits(max_calls=3)).text
    assert text.startswith("\n")
    assert "at most 3 times" in text
    assert f"<add>...</add>: {ADD.description}" in text
    assert "<result>...</result>" in text


class Nameless(Tool):
    def __call__(self, argument: str) -> str:
        return ""


class Silent(Nameless):
    name = "silent"


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        (["pyton"], "unknown tool 'pyton': did you mean 'python'"),
        ([ADD, ADD], "two tools are called 'add'"),
        ([FunctionTool("Add", "", str)], "small letters"),
        ([FunctionTool("result", "", str)], "not 'result'"),
        ([FunctionTool("a b", "", str)], "small letters"),
        ([Nameless()], "got None"),
        ([Silent()], "the tool 'silent' has no description"),
        ([FunctionTool("add", "", str, max_calls=-1)], "max_calls of the tool 'add'"),
        ([FunctionTool("add", "", str, max_calls=True)], "max_calls of the tool 'add'"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(tools: list, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        as_toolbox(tools)


@pytest.mark.parametrize(
    "limits", [{"max_calls": -1}, {"max_calls": 1.0}, {"seconds": 0}, {"seconds": True}, {"max_result_tokens": 0}]
)
@pytest.mark.usefixtures("unchecked")
def test_limits_that_are_none_are_refused(limits: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(limits))} of the tools must be"):
        ToolLimits(**limits)


def test_a_toolbox_has_its_own_limits() -> None:
    box = Toolbox([ADD])
    assert as_toolbox(box) is box
    with pytest.raises(ConfigError, match="given twice"):
        as_toolbox(box, ToolLimits())
    assert list(as_toolbox(ADD).tools) == ["add"]


def test_search_needs_something_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    assert TOOLS == ("python", "search")
    with pytest.raises(ConfigError, match="--search-folder DIR.*TAVILY_API_KEY"):
        make_tool("search")
