from __future__ import annotations

import errno
import re

import pytest

from quantkit import errors
from quantkit.errors import MissingDependencyError, QuantkitError, SourceError, did_you_mean
from quantkit.system.os_errors import as_quantkit_error


def drawn_tree() -> dict[str, int]:
    """Class name to depth, as the drawing at the top of the module has it."""
    tree = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}(?P<branch>(?:[│ ] {3})*(?:[├└]── )?)(?P<name>[A-Z]\w+)\b", line)
        if match:
            tree[match["name"]] = len(match["branch"]) // 4
    return tree


def class_tree(cls: type[QuantkitError], depth: int = 0) -> dict[str, int]:
    tree = {cls.__name__: depth}
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            tree |= class_tree(child, depth + 1)
    return tree


def test_the_drawing_is_the_tree() -> None:
    assert list(drawn_tree().items()) == list(class_tree(QuantkitError).items())


def test_every_line_of_the_drawing_says_what_the_error_means() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if "── " in line]
    assert lines
    assert all(re.search(r"Error {2,}\S", line) or line.rstrip().endswith("installed") for line in lines)


def test_a_message_is_one_line_with_its_remedy() -> None:
    error = SourceError("the file\n  is   broken", "get it\nagain")
    assert (error.problem, error.remedy) == ("the file is broken", "get it again")
    assert str(error) == "the file is broken (get it again)"
    assert str(QuantkitError("no remedy")) == "no remedy"


def test_a_missing_package_comes_with_the_command_that_installs_it() -> None:
    assert str(MissingDependencyError("x", "plotting")) == (
        "plotting needs the package 'x', which is not installed (pip install x)"
    )
    assert MissingDependencyError("x", "plotting", "'a-package[plots]'").remedy == "pip install 'a-package[plots]'"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gtpq", "did you mean 'gptq'? known: gptq, rtn"), ("zzz", "known: gptq, rtn")],
)
def test_did_you_mean_names_the_nearest_and_then_all(name: str, expected: str) -> None:
    assert did_you_mean(name, ["rtn", "gptq"]) == expected


def test_a_refusal_that_nobody_foresaw_is_one_line_and_a_bug_is_not() -> None:
    told = as_quantkit_error(OSError(errno.EACCES, "Permission denied", "/srv/models"))
    assert str(told) == "cannot use /srv/models: Permission denied (no permission: check who may read and write it)"
    assert as_quantkit_error(OSError(errno.EACCES, "Permission denied")) is None
    assert as_quantkit_error(OSError(errno.EBADF, "Bad file descriptor", "/srv/models")) is None
