"""Decoding against transformers' own `generate`, and sampling against what it promises."""

import pytest
import torch
from tests.conftest import make_model
from torch import Tensor

from recursivemas.cache import LatentCache
from recursivemas.decoding import Reply, SamplingParams, decode, decode_steps, make_reply
from recursivemas.errors import ConfigError
from recursivemas.models import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    # Larger weights than those of the other tests: replies that vary, and end at different times.
    return make_model("qwen3", 5, initializer_range=0.4)


def read(model: LanguageModel, texts: list[str]) -> tuple[LatentCache, Tensor]:
    input_ids, mask = model.pad([model.encode(text) for text in texts])
    cache = model.new_cache(len(texts))
    with torch.no_grad():
        return cache, model.step(cache, model.embed(input_ids), mask)[:, -1]


def reply(model: LanguageModel, texts: list[str], keys: list[str] | None = None, **sampling: object) -> list[Reply]:
    cache, state = read(model, texts)
    with torch.no_grad():
        return decode(model, cache, state, SamplingParams(**sampling), keys or texts)


def generate(model: LanguageModel, text: str, max_new_tokens: int, **options: object) -> list[int]:
    ids = torch.tensor([model.encode(text)])
    new = model.network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(model.stop_token_ids),
        pad_token_id=model.tokenizer.pad_token_id,
        **options,
    )
    return new[0, ids.shape[1] :].tolist()


def with_early_end(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, questions: list[str]) -> list[int]:
    """Make some token that random replies hold a stop token; return the lengths that replies then have."""
    texts = [list(each.token_ids) for each in reply(model, questions, max_new_tokens=12)]
    for token in dict.fromkeys(token for text in texts for token in text[2:]):
        lengths = [text.index(token) + 1 if token in text else 12 for text in texts]
        if len(set(lengths)) >= 3:
            monkeypatch.setitem(model.__dict__, "stop_token_ids", frozenset({token}))
            return lengths
    raise AssertionError("no token ends the replies at different times")


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_greedy_tokens_are_those_of_transformers(
    tiny_models: dict[str, LanguageModel], questions: list[str], family: str
) -> None:
    model = tiny_models[family]
    for question, found in zip(questions, reply(model, questions, max_new_tokens=10), strict=True):
        assert list(found.token_ids) == generate(model, question, 10)


def test_rows_that_end_at_different_times_are_those_of_transformers(
    model: LanguageModel, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = with_early_end(model, monkeypatch, questions)
    replies = reply(model, questions, max_new_tokens=12)
    assert [len(each.token_ids) for each in replies] == lengths
    for question, found in zip(questions, replies, strict=True):
        assert list(found.token_ids) == generate(model, question, 12)


def test_rows_that_have_finished_yield_nothing_more(
    model: LanguageModel, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = with_early_end(model, monkeypatch, questions)
    cache, state = read(model, questions)
    seen = [0] * len(questions)
    with torch.no_grad():
        for taken in decode_steps(model, cache, state, SamplingParams(max_new_tokens=12), questions):
            for row, _ in taken:
                seen[row] += 1
    assert seen == lengths


def test_a_reply_is_finished_if_it_ended_by_itself(
    model: LanguageModel, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_early_end(model, monkeypatch, questions)
    stop = next(iter(model.stop_token_ids))
    for found in reply(model, questions, max_new_tokens=12):
        assert found.finished == (found.token_ids[-1] == stop)
        ended = found.token_ids[:-1] if found.finished else found.token_ids
        assert found.text == model.decode(ended)


def test_a_reply_never_has_more_tokens_than_asked_for(model: LanguageModel, questions: list[str]) -> None:
    for number in (1, 2, 5):
        assert all(len(each.token_ids) <= number for each in reply(model, questions, max_new_tokens=number))


def test_text_ends_before_the_first_stop_string(model: LanguageModel, questions: list[str]) -> None:
    whole = reply(model, questions[:1], max_new_tokens=12)[0]
    for start in (3, 5):
        stop = whole.text[start : start + 2]
        found = reply(model, questions[:1], max_new_tokens=12, stop=(stop, "never there"))[0]
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.finished
        # It stopped there, and did not only cut.
        assert found.token_ids == whole.token_ids[: len(found.token_ids)]
        assert stop not in model.decode(found.token_ids[:-1])


def test_the_earliest_of_several_stop_strings_counts(model: LanguageModel) -> None:
    found = make_reply(model, model.encode("one two three"), SamplingParams(stop=("three", " two")))
    assert (found.text, found.finished) == ("one", True)


@pytest.mark.usefixtures("unchecked")
def test_one_stop_string_need_not_be_in_a_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


# Sampling


def test_sampling_follows_its_seed(model: LanguageModel, questions: list[str]) -> None:
    once, again = (reply(model, questions, temperature=1.0, max_new_tokens=12, seed=1) for _ in range(2))
    other = reply(model, questions, temperature=1.0, max_new_tokens=12, seed=2)
    assert once == again
    assert all(one.text != another.text for one, another in zip(once, other, strict=True))


def test_sampling_does_not_depend_on_the_batch_or_its_order(model: LanguageModel, questions: list[str]) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12}
    together = reply(model, questions, **sampling)
    assert reply(model, questions[::-1], **sampling)[::-1] == together
    assert [reply(model, [question], **sampling)[0] for question in questions] == together


def test_equal_questions_with_unequal_keys_are_sampled_apart(model: LanguageModel) -> None:
    found = reply(model, ["A plan"] * 3, ["a", "b", "a"], temperature=1.0, max_new_tokens=12)
    assert found[0] == found[2]
    assert found[0].text != found[1].text


def test_the_likeliest_token_alone_is_greedy(model: LanguageModel, questions: list[str]) -> None:
    greedy = reply(model, questions, max_new_tokens=8)
    assert reply(model, questions, temperature=2.0, top_k=1, max_new_tokens=8) == greedy
    assert reply(model, questions, temperature=2.0, top_p=1e-6, max_new_tokens=8) == greedy
    assert reply(model, questions, temperature=1e-6, max_new_tokens=8) == greedy


def sample_first_tokens(model: LanguageModel, number: int, **sampling: object) -> Tensor:
    """The distribution of the first token over many keys."""
    cache, state = read(model, ["A plan"])
    keys = [str(key) for key in range(number)]
    rows = torch.zeros(number, dtype=torch.long)
    steps = decode_steps(
        model, cache.select(rows), state[rows], SamplingParams(max_new_tokens=1, temperature=1.0, **sampling), keys
    )
    with torch.no_grad():
        tokens = torch.tensor([token for _, token in next(steps)])
    return torch.bincount(tokens, minlength=model.vocab_size) / number


def expected_distribution(model: LanguageModel) -> Tensor:
    _, state = read(model, ["A plan"])
    return model.logits(state[0]).softmax(dim=-1)


def test_tokens_are_sampled_as_often_as_they_are_likely(model: LanguageModel) -> None:
    found, expected = sample_first_tokens(model, 4000), expected_distribution(model)
    likely = expected > 0.01
    assert likely.sum() >= 5
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((found - expected).abs()[likely] < 4.5 * error[likely]).all()


def test_top_k_samples_among_the_k_likeliest(model: LanguageModel) -> None:
    expected = expected_distribution(model)
    found = sample_first_tokens(model, 500, top_k=3)
    assert set(found.nonzero().flatten().tolist()) == set(expected.topk(3).indices.tolist())


def test_top_p_samples_among_the_likeliest_that_hold_p(model: LanguageModel) -> None:
    ranked = expected_distribution(model).sort(descending=True)
    # A p between the mass of three tokens and of four: four are needed to hold it.
    p = float(ranked.values[:3].sum() + ranked.values[:4].sum()) / 2
    found = sample_first_tokens(model, 2000, top_p=p)
    assert set(found.nonzero().flatten().tolist()) == set(ranked.indices[:4].tolist())


@pytest.mark.parametrize("least", [8, 12])
def test_texts_do_not_end_before_their_least_length_as_in_transformers(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, questions: list[str], least: int
) -> None:
    free = with_early_end(model, monkeypatch, questions)
    found = reply(model, questions, max_new_tokens=12, min_new_tokens=least)
    assert min(free) < least, "no reply would end too early"
    for question, each in zip(questions, found, strict=True):
        assert list(each.token_ids) == generate(model, question, 12, min_new_tokens=least)
        assert not model.stop_token_ids & set(each.token_ids[:least])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 513),
        ("top_k", 2.5),
        ("temperature", "hot"),
        ("stop", ("",)),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_sampling_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})
