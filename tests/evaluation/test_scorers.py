"""Scorers: what is read out of an answer, and what it is worth."""

import pytest

from recursivemas.errors import InputError
from recursivemas.evaluation.scorers import SCORERS, exact, numeric, posterior, stated


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("The answer is 42.", "42"),
        ("5 inside 25", "25"),
        ("25 holds a 5", "5"),
        ("1,234", "1234"),
        ("$1,234,567.50!", "1.23457e+06"),
        ("-3", "-3"),
        ("it is -3, surely", "-3"),
        ("x=-3", "-3"),
        ("x = +7", "7"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("5.", "5"),
        ("5..", "5"),
        ("50%", "50"),
        ("1e3", "1000"),
        ("2.5E-1?", "0.25"),
        ("(7)", "7"),
        ("**7**", "7"),
        ("no number", None),
        ("", None),
        ("x5 y6", None),
        # A hyphen after a word or a number is no sign.
        ("pages 5-7", "7"),
        ("10-3", "3"),
        ("GPT-4", "4"),
        # What is not one number is not a number.
        ("1,2345", None),
        ("1.2.3", None),
        ("3/4", None),
        ("1e999", None),
    ],
)
def test_the_last_number_is_read(text: str, read: str | None) -> None:
    score = numeric(text, "42", {})
    assert score.answer == read
    assert score.value == float(read == "42")


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("1,234", "1234", 1),
        ("1234", "1,234", 1),
        ("12.50", "12.5", 1),
        ("-3", "3", 0),
        ("25", "5", 0),
        ("5", "25", 0),
        ("0.3333333333", "0.33333333333", 1),
        ("0.333", "0.33333333333", 0),
        ("0", "0", 1),
        ("0.0001", "0", 0),
        ("50%", "50%", 1),
        ("$5", "5", 1),
    ],
)
def test_numbers_are_compared_as_numbers(text: str, target: str, value: float) -> None:
    assert numeric(text, target, {}).value == value


@pytest.mark.parametrize("target", ["", "none", "3/4", "3 or 4", "1.2.3"])
def test_a_target_that_is_not_one_number_is_refused(target: str) -> None:
    with pytest.raises(InputError, match="not one plain number"):
        numeric("3", target, {})


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("Paris", "paris", 1),
        ("  Paris. \n", "paris", 1),
        ("New   York!?", "new york", 1),
        ("Paris, France", "Paris", 0),
        ("STRASSE", "straße", 1),
        ("B", "B.", 1),
        ("pari", "paris", 0),
    ],
)
def test_exact_ignores_case_blanks_and_closing_punctuation(text: str, target: str, value: float) -> None:
    assert exact(text, target, {}).value == value


@pytest.mark.parametrize("text", ["", "  ", "...", " ?! "])
def test_an_empty_answer_is_unscorable_and_never_right(text: str) -> None:
    score = exact(text, "", {})
    assert (score.value, score.answer) == (0, None)


@pytest.mark.parametrize(
    ("text", "value", "read"),
    [
        ("Flu.", 0.7, "flu"),
        ("It is a cold, not flu", 0.2, "cold"),
        ("HAY-FEVER!", 0.1, "hay-fever"),
        ("fluent coldness", 0.0, None),
        ("", 0.0, None),
    ],
)
def test_posterior_is_the_probability_of_the_first_choice_that_is_named(
    text: str, value: float, read: str | None
) -> None:
    score = posterior(text, "flu", {"posterior": {"flu": 0.7, "cold": 0.2, "hay-fever": 0.1}})
    assert (score.value, score.answer) == (value, read)


@pytest.mark.parametrize(
    ("text", "value", "read"),
    [
        ("<result> 84</result> answer 84.", 1.0, "84"),
        ("answer 12. No: answer 84", 1.0, "84"),
        ("<result> 84</result> answer 12.", 0.0, "12"),
        ("<result> 84</result>", 0.0, None),
        ("84 is the answer.", 0.0, None),
        ("answer unknown.", 0.0, "unknown"),
    ],
)
def test_stated_is_what_stands_after_the_last_answer(text: str, value: float, read: str | None) -> None:
    score = stated(text, "84", {})
    assert (score.value, score.answer) == (value, read)


def test_scorers_are_known_by_name() -> None:
    assert {"exact": exact, "numeric": numeric, "stated": stated, "posterior": posterior} == SCORERS
