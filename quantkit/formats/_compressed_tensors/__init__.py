"""The sub-formats of compressed-tensors. One file a family of tensors."""

from __future__ import annotations

from quantkit.errors import SchemeError
from quantkit.formats._compressed_tensors.fp4 import Mxfp4Packed, Nvfp4Packed
from quantkit.formats._compressed_tensors.layout import Layout
from quantkit.formats._compressed_tensors.packed import PackQuantized
from quantkit.formats._compressed_tensors.plain import FloatQuantized, IntQuantized
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme

__all__ = ["Layout", "embedding_layout_of", "layout_of"]


def layout_of(scheme: Scheme) -> Layout:
    """The sub-format of a scheme.

    Raises:
        SchemeError: there is none, with what to choose instead.
    """
    match scheme:
        case IntScheme():
            return _layout_of_integers(scheme)
        case Fp8Scheme():
            return FloatQuantized(scheme)
        case Mxfp4Scheme():
            return Mxfp4Packed(scheme)
        case Nvfp4Scheme():
            return Nvfp4Packed(scheme)
    raise SchemeError(
        f"compressed-tensors cannot store {scheme.describe()}", "it stores the schemes int, fp8, mxfp4 and nvfp4"
    )


def embedding_layout_of(scheme: Scheme) -> Layout:
    """The sub-format in which transformers loads an embedding of a scheme: its weight must be called ``weight``.

    Raises:
        SchemeError: there is none, with what to choose instead.
    """
    if scheme.activations is not None:
        raise SchemeError("an embedding has no activations to round", "use activations: none")
    match scheme:
        case IntScheme(bits=8, symmetric=True, axis=1):
            return IntQuantized(scheme)
        case Fp8Scheme():
            return FloatQuantized(scheme)
    raise SchemeError(
        f"transformers does not load embeddings of {scheme.describe()}: it reads their weight by its plain name",
        "use scheme: fp8, or bits: 8 with symmetric: true",
    )


def _layout_of_integers(scheme: IntScheme) -> Layout:
    if scheme.axis == 0:
        raise SchemeError("compressed-tensors has no groups along axis 0", "use axis: 1")
    if scheme.desc_act:
        raise SchemeError(
            "compressed-tensors has no groups that gather columns (g_idx) from version 0.19 on",
            "leave out desc_act, or use format gptq",
        )
    if scheme.zeros == "float":
        raise SchemeError("compressed-tensors stores zero points as codes", "use zeros: int")
    whole = scheme.activations is not None and scheme.bits == 8 and scheme.group_size == PER_CHANNEL
    return IntQuantized(scheme) if whole else PackQuantized(scheme)
