"""What every library plugin keeps to, in its own environment: run by ``make libraries``.

A library whose environment is not installed is skipped; ``quantkit env install NAME`` makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibration import token_ids_sha256
from quantkit.errors import QuantkitError
from quantkit.exports import open_export
from quantkit.isolation.attempt import Attempt
from quantkit.isolation.environments import environment_of
from quantkit.isolation.lockfile import read_lock
from quantkit.isolation.stage import quantize_by_library
from quantkit.libraries import LIBRARIES
from quantkit.quantization import Job
from quantkit.recipe import LibrarySpec
from quantkit.system.devices import resolve_device
from quantkit.system.validation import parse_section
from tests.lock_files import downloads
from tests.runs import Notebook, hidden_names
from tests.tiny import make_model, tiny_rows

OFFERS = [(library.name, offer.method) for library in LIBRARIES for offer in library.offers]
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Rows are whole blocks of every library."""
MOST_ERROR = {8: 0.002, 4: 0.06, 2: 1.0}
"""By bits, what a layer's weights may lose of their square, generously."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16, **SHAPE)
    rows = tiny_rows(count=16, shortest=20, longest=48)
    return Job(folder, {"reference": "tiny"}, "bfloat16", rows, token_ids_sha256(rows))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), OFFERS)
def test_a_library_keeps_to_the_contract(job: Job, tmp_path: Path, name: str, method: str) -> None:
    variant = _variant(job, name, method)
    notes = Notebook()
    done = quantize_by_library(Attempt(job, variant, tmp_path / "out", tmp_path / "log", notes, installs=False))
    export = open_export(done.folder)
    layers = {layer["name"]: layer for layer in done.facts["layers"]}
    assert set(layers) == set(export.schemes)
    assert sum(name.endswith("_proj") for name in layers) == 14
    assert "lm_head" not in layers
    limit = MOST_ERROR[max(bits for bits in MOST_ERROR if bits <= variant.width)]
    for layer in layers.values():
        assert layer["error_after"] is None or layer["error_after"] < limit
    assert done.facts["library"]["versions"][variant.plugin.distribution]
    assert notes.steps, "no progress was told"
    assert hidden_names(tmp_path) == []
    if variant.calibrated:
        _assert_counted(done.facts["library"]["calibration"], done.facts["notes"], job)
    again = quantize_by_library(Attempt(job, variant, tmp_path / "out", tmp_path / "log", notes, installs=False))
    assert again.reused


def _variant(job: Job, name: str, method: str) -> LibrarySpec:
    """The method as it is by default, on this machine; skipped where that cannot be."""
    library = LIBRARIES.get(name)
    (offer,) = (each for each in library.offers if each.method == method)
    if offer.scores_only:
        pytest.skip(f"{name} does not quantize here: {offer.scores_only}")
    if resolve_device(job.device).type not in offer.devices and "cpu" not in offer.devices:
        pytest.skip(f"{name} {method} needs {' or '.join(offer.devices)}")
    try:
        state = environment_of(library).state
    except QuantkitError as error:
        pytest.skip(str(error))
    if state != "ready":
        pytest.skip(f"its environment is {state}: quantkit env install {name}")
    return parse_section(LibrarySpec, {"name": "v", "library": name, "method": method, "limits": {"time": "15min"}}, "")


def _assert_counted(counted: dict[str, dict[str, int]], notes: list[str], job: Job) -> None:
    """Rows and tokens were counted where the library ran them, and what differs is said."""
    assert counted["given"] == {"samples": len(job.rows), "tokens": sum(map(len, job.rows))}
    assert counted["used"]["tokens"] > 0
    assert counted["used"] == counted["given"] or any("the library ran" in note for note in notes)


def test_every_library_has_a_lock_that_pins_what_it_asks_for() -> None:
    for library in LIBRARIES:
        if not library.requirements:
            continue
        packages = read_lock(library).packages
        for requirement in library.requirements:
            name, _, version = requirement.partition("==")
            assert packages[name.partition("[")[0]] == version, f"{library.name}.lock is not of {requirement}"


def test_a_lock_says_what_this_machine_would_fetch() -> None:
    url = "https://index/one-1.0-py3-none-any.whl"
    wheels = [{"url": url.replace("py3-none-any", "cp311-cp311-win_amd64"), "size": 900}, {"url": url, "size": 30}]
    lock = {
        "packages": [
            {"name": "one", "version": "1.0", "wheels": wheels, "sdist": {"size": 5}},
            {"name": "built", "version": "1.0", "sdist": {"size": 7}},
            {"name": "elsewhere", "version": "1.0", "marker": "sys_platform == 'sunos5'", "sdist": {"size": 11}},
        ]
    }
    assert downloads(lock) == (2, 37)
