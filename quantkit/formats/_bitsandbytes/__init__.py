"""The layouts of bitsandbytes: 4-bit codebooks, and int8. One file each."""

from __future__ import annotations

from quantkit.errors import SchemeError
from quantkit.formats._bitsandbytes.four_bit import FourBit
from quantkit.formats._bitsandbytes.int8 import INT8, Int8
from quantkit.formats._bitsandbytes.layout import Layout
from quantkit.schemes import PER_CHANNEL, IntScheme, Scheme
from quantkit.schemes.codebook import CodebookScheme

__all__ = ["Layout", "layout_of"]


def layout_of(scheme: Scheme) -> Layout:
    """The layout of a scheme.

    Raises:
        SchemeError: there is none, with what to choose instead.
    """
    if isinstance(scheme, CodebookScheme):
        return FourBit(scheme)
    if scheme == INT8:
        return Int8()
    if scheme == IntScheme(8, PER_CHANNEL, symmetric=True):
        raise SchemeError(
            f"bitsandbytes rounds the inputs of {scheme.describe()} layers to 8 bits too", "set activations: dynamic"
        )
    raise SchemeError(
        f"the bitsandbytes format does not store {scheme.describe()}",
        "it stores the schemes nf4 and fp4, and int8 per channel with activations: dynamic; use format "
        "compressed-tensors for others",
    )
