"""optimum-quanto (Hugging Face): ranges or HQQ's shifts in 2 and 4 bits, and absolute maxima in 8.

Its files are read by itself alone, so its codes are stored in a format of quantkit. It stores the shift of a group as a
float, in units of the weight; divided by the scale that is a zero point. See
https://github.com/huggingface/optimum-quanto, read in version 0.2.7, the last one: the project is in maintenance.
"""

from __future__ import annotations

from typing import Any

from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import CODES, Library, Offer, Request, Used

CPU = ("cpu",)
AFFINE = {"zeropoint": False}
"""``zeropoint`` of ``AffineOptimizer``: whole zero points in place of float shifts."""


@LIBRARIES.register
class Quanto(Library):
    """The optimizers and ``quantize_weight``, as ``freeze`` calls them.

    ``quantize`` itself leaves no choice of groups: the largest of 128, 96, 64 and 32 that divides the rows.
    """

    name = "quanto"
    summary = "optimum-quanto: integers of 2, 4 and 8 bits and 8-bit floats; its codes in a format of quantkit"
    distribution = "optimum-quanto"
    requirements = ("optimum-quanto==0.2.7", "torch==2.14.1", "transformers==5.23.0")
    offers = (
        Offer("max", (4, 2), CODES, symmetric=(False,), devices=CPU, options=AFFINE),
        Offer("hqq", (4, 2), CODES, symmetric=(False,), devices=CPU),
        Offer("absmax", (8,), CODES, grouped=False, devices=CPU),
        Offer("float8", (8,), CODES, grouped=False, devices=CPU),
    )

    def quantize(self, request: Request) -> Used:
        """Quantize layer by layer, and write the codes."""
        from quantkit.libraries._codes import write_codes
        from quantkit.libraries._layers import kept_float
        from quantkit.libraries._models import linear_layers, load

        _unpack_without_compiling()
        model = load(request)
        layers = linear_layers(model)
        wanted = [name for name in layers if name not in kept_float(layers, request.ignore)]
        codes, schemes = {}, {}
        for done, name in enumerate(wanted):
            request.progress("layer", done, len(wanted))
            weight = model.get_submodule(name).weight.detach()
            codes[name] = parts_of(quantized(weight, request), tuple(weight.shape))
            schemes[name] = scheme_for(request)
        write_codes(request.out, codes, schemes)
        request.progress("layer", len(wanted), len(wanted))
        return Used()


def _unpack_without_compiling() -> None:
    """Give quanto what it would compile of C++, inside its own package, when it first looks at packed codes."""
    from types import SimpleNamespace

    from optimum.quanto.library.extensions.cpp import ext

    ext._lib = SimpleNamespace(unpack=unpacked)


def unpacked(packed: Any, bits: int) -> Any:
    """The codes in bytes, those in the lowest bits first, along the first dimension."""
    import torch

    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


def quantized(weight: Any, request: Request) -> Any:
    """The library's own tensor for a weight; the kernel-agnostic one, which keeps its codes apart."""
    from optimum.quanto import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer, qfloat8, qint8, qtypes, quantize_weight

    if request.bits == 8:
        kind = qfloat8 if request.method == "float8" else qint8
        scale = AbsmaxOptimizer()(weight, qtype=kind, axis=0)
        return quantize_weight(weight, kind, 0, scale, optimized=False)
    kind = qtypes[f"qint{request.bits}"]
    group = weight.shape[1] if request.group_size == -1 else request.group_size
    optimizer = HqqOptimizer() if request.method == "hqq" else MaxOptimizer()
    zeropoint = request.options.get("zeropoint", False)
    scale, shift = optimizer(weight, qtype=kind, axis=0, group_size=group, zeropoint=zeropoint)
    return quantize_weight(weight, kind, 0, scale, shift, group, optimized=False)


def scheme_for(request: Request) -> dict[str, Any]:
    """The scheme of every layer."""
    if request.method == "float8":
        return {"scheme": "fp8", "granularity": "channel"}
    scheme = {"scheme": "int", "bits": request.bits, "group_size": request.group_size, "symmetric": request.symmetric}
    if not request.symmetric:
        scheme["zeros"] = "int" if request.options.get("zeropoint") else "float"
    return scheme


def parts_of(tensor: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Codes, scales and zero points of a quantized weight, as quantkit lays them out.

    Args:
        tensor: with ``_data`` (int8 or float8 ``[rows, columns]``, or packed codes of ``[groups, group_size]``),
            ``_scale`` and for fewer than 8 bits ``_shift``, whole zero points or floats in units of the weight.
        shape: of the weight.
    """
    import torch

    data, scale = tensor._data, tensor._scale
    scales = scale.reshape(shape[0], -1)
    shift = getattr(tensor, "_shift", None)
    if shift is None:
        codes = (data.to(torch.int16) + 128).to(torch.uint8) if data.dtype == torch.int8 else data.view(torch.uint8)
        return {"codes": codes, "scales": scales}
    codes = data.unpack() if hasattr(data, "unpack") else data
    # an exact quotient of two numbers of few bits would still be rounded in a 16-bit dtype
    zeros = shift.float() / scale.float() if shift.dtype.is_floating_point else shift
    return {"codes": codes.reshape(shape).to(torch.uint8), "scales": scales, "zeros": zeros.reshape(shape[0], -1)}
