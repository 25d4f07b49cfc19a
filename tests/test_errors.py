"""The tree of errors, and the text of those about unknown names."""

import inspect

import pytest

from recursivemas import errors
from recursivemas.errors import RecursiveMASError, unknown_name


def test_every_error_is_in_the_tree_that_the_module_draws() -> None:
    classes = {
        name: each
        for name, each in vars(errors).items()
        if inspect.isclass(each) and each.__module__ == errors.__name__
    }
    drawn = [line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line]
    assert {"RecursiveMASError", *drawn} == set(classes)
    assert all(issubclass(each, RecursiveMASError) for each in classes.values())


@pytest.mark.parametrize(
    ("given", "known", "text"),
    [
        ("textt", ["latent", "text"], "unknown thing 'textt': did you mean 'text'? (known: latent, text)"),
        ("zzz", ["latent", "text"], "unknown thing 'zzz'. (known: latent, text)"),
        ("x", [], "unknown thing 'x'. (known: none)"),
        (True, ["text"], "unknown thing 'True'. (known: text)"),
        ("", ["text"], "unknown thing ''. (known: text)"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_known(given: object, known: list[str], text: str) -> None:
    assert unknown_name("thing", given, known) == text
