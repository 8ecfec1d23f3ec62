"""Requirements: the versions pinned for tests are allowed, and packages whose private parts are used are capped."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TOOLS = ("mkdocs", "mkdocs-material")
"""What builds the site, and would break it with its next major version."""
CAPPED = ("compressed-tensors", "gguf", "lm-eval", "peft", "torch", "transformers")
"""Packages of which quantkit stands in for functions, reads private attributes or knows file layouts."""


def requirements() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (each for each in map(Requirement, group) if each.name != "quantkit-ptq")


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in found}


def test_every_pinned_version_is_allowed() -> None:
    versions = pinned()
    asked = [each for each in requirements() if canonicalize_name(each.name) in versions]
    assert {each.name for each in asked} >= set(CAPPED)
    assert [str(each) for each in asked if versions[canonicalize_name(each.name)] not in each.specifier] == []


def test_packages_whose_private_parts_are_used_have_an_upper_bound() -> None:
    bounded = {each.name for each in requirements() if any(part.operator == "<" for part in each.specifier)}
    assert bounded == {*CAPPED, *TOOLS}
