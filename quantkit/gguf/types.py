"""Which GGML type holds which scheme. Without torch, as recipes ask this."""

from __future__ import annotations

from quantkit.errors import SchemeError
from quantkit.schemes import PER_CHANNEL, SCHEMES, GgmlScheme, IntScheme, Mxfp4Scheme, Scheme

BLOCK = 32
"""Weights of a block."""
SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""By bits, the types with ``w = (code - 2**(bits - 1)) * d``."""
ASYMMETRIC = {4: "Q4_1", 5: "Q5_1"}
"""By bits, the types with ``w = code * d + m``."""
MXFP4 = "MXFP4"
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, MXFP4: 17}
"""Bytes of a block of 32, of the types that hold schemes of other formats too."""
FILE_TYPES = {
    **{
        kind: f"MOSTLY_{kind}"
        for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q6_K")
    },
    **{kind: f"MOSTLY_{kind}_S" for kind in ("Q3_K", "Q4_K", "Q5_K")},
    **{preset: f"MOSTLY_{preset}" for preset in ("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")},
    MXFP4: "MOSTLY_MXFP4_MOE",
}
"""By the preset or the commonest type of a file, llama.cpp's name for the whole."""
WAYS_OUT = (
    "it stores int of 4, 5 or 8 bits with symmetric: true, of 4 or 5 bits with symmetric: false and zeros: float, "
    "mxfp4, and types of llama.cpp such as q4_k; keep other layers float with 'ignore'"
)


def type_of(scheme: Scheme) -> str:
    """Name of the GGML type that holds a scheme, such as ``Q4_0``.

    Raises:
        SchemeError: there is none, with what to choose instead.
    """
    match scheme:
        case IntScheme():
            return _type_of_integers(scheme)
        case Mxfp4Scheme(activations=None):
            return MXFP4
        case GgmlScheme():
            return scheme.ggml_type
    raise SchemeError(f"the gguf format does not store {scheme.describe()}", WAYS_OUT)


def row_bytes(scheme: Scheme, in_features: int) -> int:
    """Bytes of the blocks of a row of a scheme.

    Raises:
        SchemeError: no type holds it.
    """
    if isinstance(scheme, GgmlScheme):
        return scheme.row_bytes(in_features)
    return in_features // BLOCK * BLOCK_BYTES[type_of(scheme)]


def scheme_of(kind: str) -> Scheme | None:
    """The scheme of a GGML type, as a file by any tool holds it; None where quantkit has none."""
    for types, symmetric in ((SYMMETRIC, True), (ASYMMETRIC, False)):
        for bits, name in types.items():
            if name == kind:
                return IntScheme(bits, BLOCK, symmetric, "int" if symmetric else "float")
    if kind == MXFP4:
        return Mxfp4Scheme()
    own = (scheme for scheme in SCHEMES if issubclass(scheme, GgmlScheme))
    return next((scheme() for scheme in own if scheme.ggml_type == kind), None)


def _type_of_integers(scheme: IntScheme) -> str:
    if scheme.axis == 0 or scheme.desc_act or scheme.activations is not None:
        raise SchemeError(
            f"the gguf format does not store {scheme.describe()}",
            "its blocks are neighbours in a row: use axis: 1, without desc_act and activations",
        )
    if scheme.group_size != PER_CHANNEL and scheme.group_size % BLOCK:
        raise SchemeError(
            f"gguf has blocks of {BLOCK}: {scheme.describe()} does not fit", f"use group_size: {BLOCK} or a multiple"
        )
    types = SYMMETRIC if scheme.symmetric else ASYMMETRIC
    if scheme.bits not in types:
        raise SchemeError(f"the gguf format has no type for {scheme.describe()}", WAYS_OUT)
    if not scheme.symmetric and scheme.zeros == "int":
        raise SchemeError(
            f"gguf stores the least value of a group as float16, not the code of zero: {scheme.describe()}",
            "use zeros: float",
        )
    return types[scheme.bits]
