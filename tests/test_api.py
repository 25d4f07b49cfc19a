"""The public names, and that they cost nothing until they are used."""

import subprocess
import sys

import pytest

import recursivemas


def test_all_is_what_can_be_imported() -> None:
    for name in recursivemas.__all__:
        assert getattr(recursivemas, name).__name__ == name
    assert set(recursivemas._HOMES) == set(recursivemas.__all__)
    assert sorted(recursivemas.__all__) == recursivemas.__all__


def test_public_names_are_listed_for_completion() -> None:
    assert set(recursivemas.__all__) <= set(dir(recursivemas))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RecursiveSytem'"):
        _ = recursivemas.RecursiveSytem


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, recursivemas; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
