"""A scheme of another package: one file, found by its entry point, and nothing of quantkit is edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
SCHEME = '''
"""Four levels, two of them nearer to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from quantkit.schemes import SCHEMES, TableScheme


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Quarters(TableScheme):
    """Four levels.

    Args:
        group_size: weights that share a scale.
        inner: how near to zero the inner levels are.
    """

    kind: ClassVar[str] = "quarters"
    summary: ClassVar[str] = "four levels"
    source: ClassVar[str] = "a test"

    group_size: int = 32
    inner: Literal["near", "far"] | None = None

    bits: ClassVar[int] = 2

    @property
    def table(self) -> tuple[float, ...]:
        """Levels by code."""
        return (-1.0, -0.25, 0.25, 1.0) if self.inner is None else (-1.0, -0.5, 0.5, 1.0)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """2, and the share of a scale."""
        return 2 + scale_bits / self.group_size

    def describe(self) -> str:
        """A short name."""
        return f"quarters g{self.group_size} {self.inner}"
'''
FORMAT = '''
"""A format that stores codes as they are, a byte each."""

from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import QuantizedWeight


@FORMATS.register
class Bytes(Format):
    name = "bytes"
    summary = "a byte each"
    runtimes = ()
    native = False

    @classmethod
    def check(cls, scheme):
        """Anything."""

    def pack(self, weight):
        return {"codes": weight.codes, "scales": weight.scales.contiguous()}

    def unpack(self, tensors, scheme):
        return QuantizedWeight(scheme, tensors["codes"], tensors["scales"], tensors["scales"].byte().zero_())

    def packed_shapes(self, scheme, out_features, in_features):
        scales = (out_features, scheme.groups(in_features))
        return {"codes": ("uint8", (out_features, in_features)), "scales": (self.dtype, scales)}

    def layer_suffixes(self, scheme):
        return ("codes", "scales")

    def quantization_config(self, layers):
        return {"quant_method": "bytes"}
'''
CALLS = """
import json, sys
from pathlib import Path
from quantkit.cli.tables import method_lines
from quantkit.errors import QuantkitError
from quantkit.recipe import VariantSpec
from quantkit.system.validation import parse_section

def spec(**keys):
    return parse_section(VariantSpec, {"name": "v", "format": "bytes", **keys}, "recipe")

said = {"refused": []}
for wrong in ({"scheme": "quartes"}, {"scheme": "int", "inner": "near"}, {"scheme": "quarters", "inner": "nearby"},
              {"scheme": "quarters", "bits": 2}):
    try:
        spec(**wrong)
    except QuantkitError as error:
        said["refused"].append(str(error))
variants = {method: spec(method=method, scheme="quarters", inner="far", group_size=16) for method in ("rtn", "gptq")}
patched = spec(method="rtn", overrides={"down_proj": {"scheme": "quarters"}})
said["patched"] = patched.scheme_of("down_proj").describe()
said["resolved"] = variants["rtn"].resolved()["inner"], spec(scheme="quarters").resolved()["inner"]
said["listed"] = "quarters: four levels" in list(method_lines())
said["torch"] = "torch" in sys.modules

import torch
from quantkit.checkpoint import CheckpointReader
from quantkit.exports import open_export
from quantkit.quantization import Job, quantize
from tests.tiny import tiny_rows
model, out = Path(sys.argv[1]), Path(sys.argv[2])
source = CheckpointReader(model)
for method, variant in variants.items():
    job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "calibration", device="cpu")
    export = open_export(quantize(job, variant, out / method).folder)
    layer = "model.layers.0.mlp.down_proj"
    weight = export.decodable(layer)
    shares = weight.dequantize().view(weight.codes.shape[0], -1, 16) / weight.scales.unsqueeze(-1)
    wanted = source.read(layer + ".weight")
    said[method] = {
        "scheme": weight.scheme.describe(), "levels": sorted(set(shares.flatten().tolist())),
        "layers": len(export.schemes), "lost": float((wanted - weight.dequantize()).norm() / wanted.norm()),
    }
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says in which the package is installed."""
    folder = tmp_path_factory.mktemp("plugin")
    site = folder / "site"
    info = site / "quarters-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "quarters.py").write_text(SCHEME, encoding="utf-8")
    (site / "bytes_format.py").write_text(FORMAT, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quarters\nVersion: 1.0\n", encoding="utf-8")
    points = "[quantkit.schemes]\nquarters = quarters:Quarters\n[quantkit.formats]\nbytes = bytes_format:Bytes\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    line = [sys.executable, "-c", CALLS, str(make_model(folder / "model")), str(folder / "out")]
    done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_recipe_may_ask_for_it_and_names_its_keys(said: dict[str, Any]) -> None:
    unknown, foreign, value, key = said["refused"]
    assert "unknown scheme 'quartes' (did you mean 'quarters'?" in unknown
    assert "scheme int does not take 'inner'" in foreign
    assert "'nearby' is not allowed" in value
    assert "scheme quarters does not take 'bits' (it takes group_size, inner)" in key
    assert said["resolved"] == ["far", "none"]
    assert said["patched"] == "quarters g32 None"
    assert said["listed"]
    assert not said["torch"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_is_quantized_stored_and_decoded(said: dict[str, Any], method: str) -> None:
    found = said[method]
    assert found["scheme"] == "quarters g16 far"
    assert found["levels"] == [-1.0, -0.5, 0.5, 1.0]
    assert found["layers"] == 14
    assert 0 < found["lost"] < 0.7, "of the weight's norm: two bits and no zero"
