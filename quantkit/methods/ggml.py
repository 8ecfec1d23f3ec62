"""llama.cpp's own quantizer: the codes that its tools would choose, weighed by an importance matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantkit.errors import QuantizationError, SchemeError
from quantkit.gguf.types import ASYMMETRIC, SYMMETRIC, scheme_of
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.schemes import GgmlMixture, GgmlScheme, IntScheme, Scheme

if TYPE_CHECKING:
    import torch

KINDS = (*SYMMETRIC.values(), *ASYMMETRIC.values())
INTEGERS = {scheme: kind for kind in KINDS if (scheme := scheme_of(kind)) is not None}
"""The integer schemes that are types of GGML."""
IMPORTANCE = "importance"
"""The part of a weight with the mean square of each input, of which GGUF exports make an importance matrix."""


def importance_of(scheme: Scheme, square_mean: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The importance of a weight's columns as its part, where the scheme is a type of GGML and its inputs are known."""
    if square_mean is None or not (isinstance(scheme, GgmlScheme) or scheme in INTEGERS):
        return {}
    return {IMPORTANCE: square_mean.float()}


class LlamaCppOptions(MethodOptions):
    """Options of llama.cpp's quantizer.

    Attributes:
        imatrix: weigh each weight's error by the mean square of its input, which llama.cpp calls an importance matrix
            and which needs calibration; otherwise by the type's own measure, which needs no data.
    """

    imatrix: bool = True


@METHODS.register
class LlamaCppQuantizer(Method):
    """``ggml_quantize_chunk`` of the installed llama.cpp.

    Scales are in float16, as GGML stores them, and rounded once more where a format stores them in less.
    """

    name = "llama.cpp"
    summary = "llama.cpp's own quantizer, for its block types and what GGUF files hold"
    source = "llama.cpp pull requests 1684 (k-quants) and 4861 (importance matrix)"
    cost = "seconds to minutes"
    usual = ({"format": "gguf", "scheme": "q4_k_m"},)
    Options: ClassVar[type[MethodOptions]] = LlamaCppOptions
    options: LlamaCppOptions

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        if self.options.imatrix:
            self.needs = frozenset({Statistic.SQUARE_MEAN})

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Only types of GGML.

        Raises:
            SchemeError: the scheme is none.
        """
        super().check(scheme)
        if not isinstance(scheme, GgmlScheme | GgmlMixture) and scheme not in INTEGERS:
            raise SchemeError(
                f"llama.cpp has no type that is {scheme.describe()}",
                "use a scheme such as q4_k or q4_k_m, or scheme: int with group_size: 32 and 4 or 5 bits, "
                "symmetric or with zeros: float, or 8 bits symmetric",
            )

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Quantize on the CPU, wherever the weight lies; see :meth:`Method.quantize`.

        Raises:
            QuantizationError: weight or importance are not finite, or beyond what float16 scales reach.
            QuantkitError: llama.cpp is not installed, or does not work here.
        """
        from dataclasses import replace

        import torch

        from quantkit.gguf.blocks import codec_of
        from quantkit.llama_cpp.quantizer import quantize_rows
        from quantkit.methods.rtn import rounded

        kind, block = _type_of(scheme)
        importance = _importance(statistics, block) if self.options.imatrix else None
        given = weight.to("cpu", torch.float32)
        if not given.isfinite().all():
            raise QuantizationError("a weight is not finite", "get the model from its source again")
        blocks = quantize_rows(given, importance, kind, torch.get_num_threads())
        found = codec_of(scheme).unpack({"weight": blocks})
        if not (found.scales.isfinite().all() and found.zeros.isfinite().all()):
            raise QuantizationError(
                f"a weight needs a scale beyond the range of float16, in which {kind} stores it",
                "keep this layer float with 'ignore'",
            )
        if isinstance(scheme, IntScheme):
            found = replace(found, scales=found.scales.to(scale_dtype))
        if importance is not None:
            found = replace(found, parts={**found.parts, **importance_of(scheme, statistics.square_mean)})
        return rounded(weight, found.to(weight.device), statistics)


def _type_of(scheme: Scheme) -> tuple[str, int]:
    """Name of a scheme's GGML type, and the weights of its blocks."""
    if isinstance(scheme, GgmlScheme):
        return scheme.ggml_type, scheme.block
    if isinstance(scheme, IntScheme) and scheme in INTEGERS:
        return INTEGERS[scheme], scheme.group_size
    raise ValueError(f"{scheme.describe()} is no type of GGML")


def _importance(statistics: InputStatistics, block: int) -> torch.Tensor | None:
    """The importance of each column, float32 on the CPU; None where nothing is known of the inputs.

    Where none of the inputs of a block was ever other than zero, all its columns count alike.
    """
    import torch

    if statistics.square_mean is None:
        return None
    found = statistics.square_mean.to("cpu", torch.float32)
    if not found.isfinite().all():
        raise QuantizationError("an input of the layer is not finite", "calibrate in bfloat16 or float32")
    blocks = found.view(-1, block)
    return torch.where(blocks.amax(1, keepdim=True) > 0, blocks, 1.0).flatten()
