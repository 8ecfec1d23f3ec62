"""hqq (Dropbox, formerly Mobius Labs): half-quadratic quantization by its authors' own code.

The package saves pickles, and transformers 5 does not read its layers, so its codes are stored in a format of
quantkit. Its zero points are floats. See https://github.com/dropbox/hqq, read in version 0.2.8.post1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.errors import SchemeError
from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import CODES, Library, Offer, Request, Used

if TYPE_CHECKING:
    import torch

BITS = (4, 8, 6, 5, 3, 2, 1)
OPTIONS = {"axis": 1, "optimize": True}
"""With the defaults of ``BaseQuantizeConfig``. Without ``optimize`` grids are those of the ranges."""


@LIBRARIES.register
class Hqq(Library):
    """``HQQLinear`` of every layer, computing in the request's dtype, to which scales and zero points are rounded."""

    name = "hqq"
    summary = "half-quadratic quantization by its authors' package; its codes in a format of quantkit"
    distribution = "hqq"
    requirements = ("hqq==0.2.8.post1", "torch==2.14.1", "transformers==5.23.0")
    offers = (Offer("hqq", BITS, CODES, symmetric=(False,), options=OPTIONS),)

    def quantize(self, request: Request) -> Used:
        """Quantize layer by layer, and write the codes."""
        from quantkit.libraries._codes import write_codes
        from quantkit.libraries._layers import kept_float
        from quantkit.libraries._models import linear_layers, load

        model = load(request)
        layers = linear_layers(model)
        wanted = [name for name in layers if name not in kept_float(layers, request.ignore)]
        codes, schemes = {}, {}
        for done, name in enumerate(wanted):
            request.progress("layer", done, len(wanted))
            codes[name], schemes[name] = _solved(name, model.get_submodule(name), request)
        write_codes(request.out, codes, schemes)
        request.progress("layer", len(wanted), len(wanted))
        return Used()


def config_for(request: Request) -> dict[str, Any]:
    """The library's own config for a request."""
    from hqq.core.quantize import BaseQuantizeConfig

    config: dict[str, Any] = BaseQuantizeConfig(
        nbits=request.bits,
        group_size=None if request.group_size == -1 else request.group_size,
        axis=request.options["axis"],
    )
    config["weight_quant_params"]["optimize"] = request.options["optimize"]
    return config


def scheme_of(name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """The scheme of a layer, from what hqq says of it.

    Raises:
        SchemeError: its groups run over the ends of rows, which hqq allows and no other format knows.
    """
    size, axis, columns = int(meta["group_size"]), int(meta["axis"]), int(meta["shape"][1])
    if axis == 1 and columns % size:
        raise SchemeError(
            f"{name}: groups of {size} run over the ends of its rows of {columns}",
            "choose a group_size that divides them, or keep this layer float with 'ignore'",
        )
    return {
        "scheme": "int",
        "bits": int(meta["nbits"]),
        "group_size": -1 if axis == 1 and size == columns else size,
        "symmetric": False,
        "zeros": "float",
        "axis": axis,
    }


def parts_of(codes: torch.Tensor, meta: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points as quantkit lays them out.

    Args:
        codes: as ``Quantizer.unpack`` gives them: ``[cells, group_size]``, or ``[group_size, cells]`` for axis 0, with
            rows of padding below where 3-bit codes are ten to a word.
        meta: of the layer.
    """
    import torch

    rows, columns = meta["shape"]
    size, axis = int(meta["group_size"]), int(meta["axis"])
    layout = (-1, 1) if axis == 0 else (rows, -1)
    used = size if axis == 0 else rows * columns // size
    return {
        "codes": codes[:used].reshape(rows, columns).to(torch.uint8),
        "scales": meta["scale"].reshape(layout),
        "zeros": meta["zero"].reshape(layout),
    }


def _solved(name: str, linear: torch.nn.Linear, request: Request) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    import torch
    from hqq.core.quantize import HQQLinear, Quantizer

    layer = HQQLinear(linear, config_for(request), compute_dtype=getattr(torch, request.dtype), device=request.device)
    meta = layer.meta
    scheme = scheme_of(name, meta)
    codes = Quantizer.unpack[meta["packing"]](layer.W_q.data, dtype=torch.uint8)
    return parts_of(codes, meta), scheme
