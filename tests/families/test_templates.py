"""Chat templates of every shape: the system's words are read, nothing is doubled, and replies end where they should."""

import pytest
from tests.conftest import make_tokenizer
from tests.families.table import DEAF, SPECIAL_TOKENS, TEMPLATES

from recursivemas.errors import ModelError
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet, Slot

CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def with_template(model: LanguageModel, template: str) -> LanguageModel:
    tokenizer = make_tokenizer("qwen3", chat_template=template, special_tokens=SPECIAL_TOKENS)
    return LanguageModel(model.network, tokenizer)


@pytest.fixture(params=TEMPLATES)
def model(request: pytest.FixtureRequest, tiny_models: dict[str, LanguageModel]) -> LanguageModel:
    return with_template(tiny_models["qwen3"], TEMPLATES[request.param])


def test_the_systems_words_are_read_once_and_first(model: LanguageModel) -> None:
    rendered = model.render_chat(CONVERSATION)
    assert rendered.count("Be brief.") == 1
    assert rendered.count("Why?") == 1
    assert rendered.index("Be brief.") < rendered.index("Why?")


def test_words_without_a_system_are_left_alone(model: LanguageModel) -> None:
    assert "Be brief." not in model.render_chat(CONVERSATION[1:])
    assert "Why?" in model.render_chat(CONVERSATION[1:])


@pytest.mark.parametrize("name", DEAF)
def test_without_a_system_role_its_words_open_the_users(name: str, tiny_models: dict[str, LanguageModel]) -> None:
    assert "Be brief.\n\nWhy?" in with_template(tiny_models["qwen3"], TEMPLATES[name]).render_chat(CONVERSATION)


def test_a_reply_follows_where_the_prompt_ends(model: LanguageModel) -> None:
    # What the template writes between a prompt and its reply is part of the prompt, an open or an empty thought too.
    rendered = model.render_chat(CONVERSATION[1:])
    tail = {"open thought": "<|assistant|><think>\n", "enable_thinking": "<think>\n\n</think>\n\n"}
    for name, text in tail.items():
        if model.tokenizer.chat_template == TEMPLATES[name]:
            assert rendered.endswith(text)


def test_a_beginning_that_the_template_writes_is_not_doubled(model: LanguageModel) -> None:
    begin = model.tokenizer.bos_token_id
    prompts = PromptSet.load(
        {"name": "x", "system": "Be brief.", "roles": {"critic": {"always": "{question} {latents:a} So:"}}}
    )
    first, slot, last = prompts.segments("critic", "Why?", render_chat=model.render_chat)
    assert slot == Slot("a")
    assert isinstance(first, str)
    assert isinstance(last, str)
    # By itself the tokenizer would begin every piece of text anew.
    assert model.tokenizer.encode(first)[0] == begin
    assert model.encode(first).count(begin) == first.count("<|bos|>") <= 1
    assert begin not in model.encode(last)
    assert all(begin not in ids for ids in model.encode_batch([last, "Why?"]))


def test_replies_end_at_the_end_mark_of_the_template(model: LanguageModel) -> None:
    marks = [mark for mark in ("<|im_end|>", "<|end|>") if mark in model.tokenizer.chat_template]
    ends = {model.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|eos|>", *marks)}
    assert ends == model.stop_token_ids


def test_a_question_is_read_alike_on_any_day(tiny_models: dict[str, LanguageModel]) -> None:
    model = with_template(tiny_models["qwen3"], TEMPLATES["dated"])
    assert "Today: 26 Jul 2024" in model.render_chat(CONVERSATION)


def test_a_template_that_can_render_nothing_says_so(tiny_models: dict[str, LanguageModel]) -> None:
    model = with_template(tiny_models["qwen3"], TEMPLATES["enable_thinking"])
    model.tokenizer.chat_template = "{{ raise_exception('closed today') }}"
    with pytest.raises(ModelError, match="cannot render a conversation: closed today"):
        model.render_chat(CONVERSATION)
