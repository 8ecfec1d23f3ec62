"""A format costs one file: one that another package brings is offered, written, read, decoded, converted and shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import RecipeError
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.recipe import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes.base import LoadOptions
from quantkit.system.validation import parse_section
from quantkit.verification.matrix.rows import rows
from tests.test_registry import plug_in
from tests.tiny import make_model

SOURCE = '''
"""octets: a code to a byte, and float32 scales."""

import torch

from quantkit.errors import SchemeError
from quantkit.formats.base import Format
from quantkit.schemes import IntScheme, QuantizedWeight


class Octets(Format):
    name = "octets"
    summary = "symmetric int8, a code to a byte"
    runtimes = ("octet server",)
    requires = ("octets",)
    examples = ({"bits": 8, "group_size": 32},)

    @classmethod
    def check(cls, scheme):
        if not isinstance(scheme, IntScheme) or scheme.bits != 8 or not scheme.symmetric:
            raise SchemeError(f"octets does not store {scheme.describe()}", "use bits: 8")

    @classmethod
    def reads(cls, config):
        return config.get("quant_method") == "octets"

    @classmethod
    def schemes_in(cls, config, reader):
        layers = [name.removesuffix(".octets") for name in reader.names() if name.endswith(".octets")]
        return dict.fromkeys(layers, IntScheme(8, config["group"]))

    @classmethod
    def author(cls, config, folder):
        return "octet maker"

    @classmethod
    def scale_dtype(cls, dtype):
        return "float32"

    def pack(self, weight):
        return {"octets": weight.codes, "octet_scales": weight.scales}

    def unpack(self, tensors, scheme):
        scales = tensors["octet_scales"]
        zeros = torch.full(scales.shape, scheme.zero, dtype=torch.uint8)
        return QuantizedWeight(scheme, tensors["octets"], scales, zeros)

    def packed_shapes(self, scheme, rows, columns):
        return {
            "octets": ("uint8", (rows, columns)),
            "octet_scales": ("float32", (rows, scheme.groups(columns))),
        }

    def layer_suffixes(self, scheme):
        return ("octets", "octet_scales")

    def quantization_config(self, layers):
        (scheme,) = {scheme for scheme in layers.values() if scheme is not None}
        return {"quant_method": "octets", "group": scheme.group_size}
'''
SERVER = '''
"""octet server: the runtime of another package."""

from quantkit.runtimes.base import Runtime


class OctetServer(Runtime):
    name = "octet server"
    summary = "serves octets"
    install = "pip install octet-server"

    @classmethod
    def missing(cls):
        return "it is made up"

    @classmethod
    def load(cls, path, options):
        raise NotImplementedError
'''


@pytest.fixture
def octets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with a format and a runtime, installed as far as quantkit can tell."""
    package = tmp_path / "octet_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "octets.py").write_text(SOURCE)
    (package / "server.py").write_text(SERVER)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (FORMATS, RUNTIMES):
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_loaded", False)
    plug_in(
        monkeypatch,
        EntryPoint("octets", "octet_parts.octets:Octets", "quantkit.formats"),
        EntryPoint("octet server", "octet_parts.server:OctetServer", "quantkit.runtimes"),
    )
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "octet_parts"]:
        del sys.modules[name]


@pytest.fixture
def exported(octets: None, tmp_path: Path) -> Path:
    model = make_model(tmp_path / "model")
    return quantkit.quantize(
        model, out=tmp_path / "out", method="rtn", bits=8, group_size=32, format="octets", dtype="own"
    )


def test_a_recipe_offers_it_and_tells_what_it_refuses(octets: None) -> None:
    keys = {"name": "v", "method": "rtn", "bits": 8, "format": "octets"}
    assert parse_section(VariantSpec, keys, "variant").format == "octets"
    with pytest.raises(RecipeError, match="octets does not store int4"):
        parse_section(VariantSpec, {**keys, "bits": 4}, "variant")


def test_without_the_package_it_is_unknown() -> None:
    with pytest.raises(RecipeError, match="unknown format 'octets'"):
        FORMATS.get("octets")


def test_what_is_written_is_read_decoded_and_converted(exported: Path, tmp_path: Path) -> None:
    assert choose_runtime(exported).name == "reference"
    ids = torch.arange(20, 40)
    options = LoadOptions(dtype="float32")
    logits = RUNTIMES.get("reference").load(exported, options).logits(ids)
    quantkit.convert(exported, out=tmp_path / "there", to="compressed-tensors")
    assert torch.equal(logits, RUNTIMES.get("reference").load(tmp_path / "there", options).logits(ids))
    quantkit.convert(tmp_path / "there", out=tmp_path / "back", to="octets")
    back, first = open_export(tmp_path / "back"), open_export(exported)
    assert back.format == "octets"
    assert all(torch.equal(back.weight(layer).codes, first.weight(layer).codes) for layer in first.schemes)


def test_a_checkpoint_of_its_own_tool_is_read_by_its_config(exported: Path) -> None:
    before = open_export(exported)
    (exported / "manifest.json").unlink()
    found = open_export(exported)
    assert found.schemes == before.schemes
    assert found.made_by == "octet maker"


def test_it_is_inspected_and_shown(exported: Path) -> None:
    found = quantkit.inspect(exported)
    assert found["format"] == "octets"
    assert found["loads"] == ["octet server", "quantkit's reference decoder: as a float model"]
    card = (exported / "README.md").read_text()
    assert "transformers does not compute from octets files" in card
    assert "vLLM does not load octets files" in card
    formats = CliRunner().invoke(app, ["formats"]).output
    assert "octets: symmetric int8, a code to a byte" in formats
    assert "octet server" in formats


def test_runtimes_load_it_as_it_says(octets: None) -> None:
    loading = [runtime.name for runtime in RUNTIMES if "octets" in runtime.formats()]
    assert loading == ["octet server", "reference"]
    assert RUNTIMES.get("octet server").formats() == ["octets"]
    runtimes = CliRunner().invoke(app, ["runtimes"]).output
    assert "octet server: serves octets" in runtimes


def test_the_matrix_tries_its_examples(octets: None) -> None:
    assert [row.name() for row in rows() if row.format == "octets"] == ["int8 g32 sym"]


def test_no_format_is_named_where_runtimes_and_cards_are_made() -> None:
    """Names of formats stand in their own files alone, not where who loads them is told."""
    root = Path(quantkit.__file__).parent
    for path in [*(root / "runtimes").glob("*.py"), *(root / "publishing").glob("*.py"), root / "exports/folder.py"]:
        text = path.read_text()
        named = [name for name in FORMATS.names() if f'"{name}"' in text and name not in ("gguf", "float")]
        assert not named, (path.name, named)
