"""torchao (PyTorch): round-to-nearest and scale-only HQQ in integers, and 8-bit floats.

What transformers saves of it are safetensors that ``torchao.prototype.safetensors`` flattened and nothing else reads,
so that its codes are stored in a format of quantkit. Of its configs those are taken whose tensors tell their codes on
every device; the packed int4 layouts are for kernels of one device each. Read in version 0.18.0 of
https://github.com/pytorch/ao.
"""

from __future__ import annotations

from typing import Any

from quantkit.errors import SchemeError
from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import CODES, Library, Offer, Request, Used

BITS = (4, 8, 2, 3, 5, 6, 7)
INTX, FLOAT8, HQQ = "intx", "float8", "hqq_scale_only"


@LIBRARIES.register
class TorchAo(Library):
    """``quantize_`` with a weight-only config."""

    name = "torchao"
    summary = "PyTorch's torchao: rounding to integers and 8-bit floats; its codes in a format of quantkit"
    distribution = "torchao"
    requirements = ("torchao==0.18.0", "torch==2.14.1", "transformers==5.23.0")
    offers = (
        Offer(INTX, BITS, CODES, symmetric=(True, False)),
        Offer(HQQ, BITS, CODES),
        Offer(FLOAT8, (8,), CODES, grouped=False, options={"granularity": "channel"}),
    )

    def quantize(self, request: Request) -> Used:
        """Quantize layer by layer, and write the codes."""
        from torchao.quantization import quantize_

        from quantkit.libraries._codes import write_codes
        from quantkit.libraries._layers import kept_float
        from quantkit.libraries._models import linear_layers, load

        model, config = load(request), config_for(request)
        layers = linear_layers(model)
        wanted = [name for name in layers if name not in kept_float(layers, request.ignore)]
        codes, schemes = {}, {}
        for done, name in enumerate(wanted):
            request.progress("layer", done, len(wanted))
            linear = model.get_submodule(name)
            quantize_(linear, config)
            codes[name], schemes[name] = parts_of(linear.weight, request), scheme_for(request)
            linear.weight = None
        write_codes(request.out, codes, schemes)
        request.progress("layer", len(wanted), len(wanted))
        return Used()


def config_for(request: Request) -> Any:
    """The library's own config for a request.

    Raises:
        SchemeError: an option that the library does not have.
    """
    import torch
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerRow,
        PerTensor,
    )

    if request.method == FLOAT8:
        shares, asked = {"channel": PerRow, "tensor": PerTensor}, request.options["granularity"]
        if asked not in shares:
            raise SchemeError(f"torchao's float8 has no granularity '{asked}' here", "use channel or tensor")
        return Float8WeightOnlyConfig(granularity=shares[asked]())
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{request.bits}"),
        granularity=PerAxis(0) if request.group_size == -1 else PerGroup(request.group_size),
        mapping_type=MappingType.SYMMETRIC if request.symmetric else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=HQQ if request.method == HQQ else "affine",
    )


def scheme_for(request: Request) -> dict[str, Any]:
    """The scheme of every layer."""
    if request.method == FLOAT8:
        return {"scheme": "fp8", "granularity": request.options["granularity"]}
    return {
        "scheme": "int",
        "bits": request.bits,
        "group_size": request.group_size,
        "symmetric": request.symmetric,
    }


def parts_of(weight: Any, request: Request) -> dict[str, Any]:
    """Codes, scales and zero points of a quantized weight, as quantkit lays them out.

    Args:
        weight: with ``qdata`` (int8 from ``-2 ** (bits - 1)`` on, or float8), ``scale`` and for integers
            ``zero_point``, which is on the grid of ``qdata``.
        request: what was asked for.
    """
    import torch

    if request.method == FLOAT8:
        return {"codes": weight.qdata.contiguous().view(torch.uint8), "scales": weight.scale.reshape(-1, 1)}
    least = -(1 << (request.bits - 1))
    parts = {"codes": (weight.qdata.to(torch.int16) - least).to(torch.uint8), "scales": weight.scale}
    if not request.symmetric:
        parts["zeros"] = (weight.zero_point.to(torch.int16) - least).to(torch.uint8)
    return parts
