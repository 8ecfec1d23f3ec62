"""The block types of GGUF. One file a family."""

from __future__ import annotations

from quantkit.gguf.blocks.codec import Codec
from quantkit.gguf.blocks.types import BLOCK, row_bytes, scheme_of, type_of
from quantkit.schemes import GgmlScheme, IntScheme, Mxfp4Scheme, Scheme

__all__ = ["BLOCK", "Codec", "codec_of", "row_bytes", "scheme_of", "type_of"]


def codec_of(scheme: Scheme) -> Codec:
    """What packs a scheme.

    Raises:
        SchemeError: no type holds it, with what to choose instead.
    """
    from quantkit.gguf.blocks.ggml import GgmlBlocks
    from quantkit.gguf.blocks.integers import Integers
    from quantkit.gguf.blocks.mxfp4 import Mxfp4

    kind = type_of(scheme)
    match scheme:
        case IntScheme():
            return Integers(scheme)
        case Mxfp4Scheme():
            return Mxfp4(scheme)
        case GgmlScheme():
            return GgmlBlocks(scheme)
    raise TypeError(f"no codec of {kind}")
