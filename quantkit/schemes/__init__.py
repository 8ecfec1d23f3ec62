"""Schemes: which numbers a weight can become, and how many bits that costs. One file a family.

A scheme is plain data, without torch; the arithmetic that belongs to it is in :mod:`quantkit.schemes.grids`.
"""

from __future__ import annotations

from quantkit.schemes.additive import AdditiveScheme, AdditiveWeight
from quantkit.schemes.base import PER_CHANNEL, Scheme, TableScheme, dividing_group_sizes
from quantkit.schemes.blockfloat import Mxfp4Scheme, Nvfp4Scheme
from quantkit.schemes.codebook import Fp4Scheme, Nf4Scheme
from quantkit.schemes.floating import Fp8Scheme
from quantkit.schemes.ggml import GgmlScheme
from quantkit.schemes.ggml_mixture import GgmlMixture
from quantkit.schemes.integer import INTEGER_BITS, IntScheme
from quantkit.schemes.kinds import DEFAULT_KIND, SCHEMES, make_scheme, scheme_from_json, scheme_keys
from quantkit.schemes.plain import PlainScheme
from quantkit.schemes.weight import Decodable, QuantizedWeight

__all__ = [
    "DEFAULT_KIND",
    "INTEGER_BITS",
    "PER_CHANNEL",
    "SCHEMES",
    "AdditiveScheme",
    "AdditiveWeight",
    "Decodable",
    "Fp4Scheme",
    "Fp8Scheme",
    "GgmlMixture",
    "GgmlScheme",
    "IntScheme",
    "Mxfp4Scheme",
    "Nf4Scheme",
    "Nvfp4Scheme",
    "PlainScheme",
    "QuantizedWeight",
    "Scheme",
    "TableScheme",
    "dividing_group_sizes",
    "make_scheme",
    "scheme_from_json",
    "scheme_keys",
]
