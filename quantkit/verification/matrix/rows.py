"""The rows of the matrix: every kind of grid in every format that stores it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.methods import METHODS
from quantkit.recipe import VariantSpec
from quantkit.system.validation import parse_section

GROUP = 32
COMPOSED = ("awq+gptq", "awq+hqq")
"""Methods in one that are tried beside the single ones."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of storing a model.

    Attributes:
        format: name of the format.
        keys: the scheme, as a variant gives it.
    """

    format: str
    keys: dict[str, Any] = field(hash=False)

    def variant(self, method: str) -> VariantSpec | None:
        """The variant by a method; None where the two do not go together."""
        given = {"name": f"{self.format}-{self.slug()}-{method.replace('+', '-')}", "method": method}
        try:
            return parse_section(VariantSpec, {**given, "format": self.format, **self.keys}, "matrix")
        except QuantkitError:
            return None

    def name(self) -> str:
        """The scheme's short name, with what is mixed into it."""
        variant = next(filter(None, map(self.variant, method_names())))
        return " + ".join(scheme.describe() for scheme in variant.schemes())

    def slug(self) -> str:
        """A name for files."""
        parts = ["mixed" if key == "overrides" else f"{key}-{value}" for key, value in self.keys.items()]
        return "-".join(parts).replace("_", "-")


def method_names() -> list[str]:
    """The methods that are tried, single ones first."""
    return [*METHODS.names(), *COMPOSED]


def rows() -> Iterator[Row]:
    """All rows."""
    yield from _compressed_tensors()
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            yield Row("gptq", _int(bits, symmetric))
    yield Row("gptq", {**_int(4, True), "desc_act": True})
    yield Row("gptq", {"overrides": {"down_proj": {"bits": 8}}, **_int(4, True)})
    yield from (Row("awq", _int(4, symmetric)) for symmetric in (True, False))
    yield from (Row("bitsandbytes", {"scheme": kind}) for kind in ("nf4", "fp4"))
    yield Row("bitsandbytes", {"scheme": "nf4", "double_quant": False})
    yield Row("bitsandbytes", {"bits": 8, "group_size": -1, "activations": "dynamic"})
    yield Row("hqq", {**_int(4, False), "zeros": "float"})
    yield Row("hqq", {**_int(3, False), "zeros": "float"})
    yield from _gguf()
    yield from (Row("float", {"scheme": kind}) for kind in ("bfloat16", "float16"))


def _compressed_tensors() -> Iterator[Row]:
    place = "compressed-tensors"
    yield from (Row(place, _int(bits, symmetric)) for bits in (4, 8) for symmetric in (True, False))
    yield Row(place, {"bits": 8, "group_size": -1})
    yield Row(place, {"overrides": {"down_proj": {"bits": 8}}, **_int(4, True)})
    yield Row(place, {"bits": 8, "group_size": -1, "activations": "dynamic"})
    yield from (Row(place, {"scheme": "fp8", "granularity": shape}) for shape in ("tensor", "channel", "block"))
    yield Row(place, {"scheme": "fp8", "granularity": "channel", "activations": "dynamic"})
    yield from (Row(place, {"scheme": kind}) for kind in ("mxfp4", "nvfp4"))


def _gguf() -> Iterator[Row]:
    for bits in (4, 5):
        yield Row("gguf", _int(bits, True))
        yield Row("gguf", {**_int(bits, False), "zeros": "float"})
    yield Row("gguf", _int(8, True))
    kinds = ("mxfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "q4_k_m", "q5_k_m", "q3_k_m")
    yield from (Row("gguf", {"scheme": kind}) for kind in kinds)


def _int(bits: int, symmetric: bool) -> dict[str, Any]:
    return {"bits": bits, "group_size": GROUP, "symmetric": symmetric}
