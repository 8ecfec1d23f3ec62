from __future__ import annotations

import importlib.util
import inspect
import pkgutil

import pytest

import quantkit

WITHOUT_TRITON = () if importlib.util.find_spec("triton") else (".columns_kernel",)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(quantkit.__path__, "quantkit.")
    if not module.name.endswith((".worker", "__main__", *WITHOUT_TRITON))
]


def test_the_public_names_are_sorted() -> None:
    assert quantkit.__all__ == sorted(quantkit.__all__)


@pytest.mark.parametrize("name", quantkit.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    member = getattr(quantkit, name)
    assert inspect.getdoc(member)
    assert name in dir(quantkit)


def test_no_module_hides_a_public_name() -> None:
    """Importing a module sets its name on the package, where it would replace the function of that name."""
    assert not {module.name for module in pkgutil.iter_modules(quantkit.__path__)} & set(quantkit.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'quantise'"):
        quantkit.quantise  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_exports_what_it_lists(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for member in getattr(module, "__all__", ()):
        assert hasattr(module, member)
