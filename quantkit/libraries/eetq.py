"""EETQ (NetEase): int8 with a scale per output row, in a layout for CUTLASS kernels.

Its files hold codes in an order of those kernels, and only they can read them: what they make of the identity matrix is
the weight, of which the codes follow exactly. See https://github.com/NetEase-FuXi/EETQ, release 1.0.0, whose wheel is
for Python 3.10 alone, so that it has no environment of its own: build it beside quantkit and say ``env: current``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import CODES, Library, Offer, Request, Used

if TYPE_CHECKING:
    import torch

MIDDLE = 128
"""Code of zero."""
SCHEME = {"scheme": "int", "bits": 8, "group_size": -1, "symmetric": True}
Product = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""``w8_a16_gemm``: of float16 inputs ``[rows, in]``, packed weights ``[in, out]`` and scales ``[out]``."""


@LIBRARIES.register
class Eetq(Library):
    """``quant_weights`` and ``w8_a16_gemm`` of the package; its kernels run on CUDA alone."""

    name = "eetq"
    summary = "int8 per output row by NetEase's EETQ, and the checkpoints that transformers wrote with it"
    distribution = "eetq"
    requirements = ()
    offers = (
        Offer("int8", (8,), CODES, grouped=False, devices=("cuda",)),
        Offer("load", (8,), CODES, grouped=False, devices=("cuda",), options={"checkpoint": ""}),
    )

    def quantize(self, request: Request) -> Used:
        """Quantize the model, or read the layers of an EETQ checkpoint of it, and write the codes."""
        from eetq import w8_a16_gemm

        from quantkit.libraries._codes import write_codes

        source = stored_layers(request) if request.method == "load" else quantized_layers(request)
        codes = {name: decoded(weight, scales, w8_a16_gemm, request.device) for name, weight, scales in source}
        write_codes(request.out, codes, dict.fromkeys(codes, SCHEME))
        return Used()


def quantized_layers(request: Request) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Names, packed weights and scales of the layers, as transformers' integration quantizes them."""
    import torch
    from eetq import quant_weights

    from quantkit.libraries._layers import kept_float
    from quantkit.libraries._models import linear_layers, load

    model = load(request)
    layers = linear_layers(model)
    kept = set(kept_float(layers, request.ignore))
    wanted = [name for name in layers if name not in kept]
    for done, name in enumerate(wanted):
        request.progress("layer", done, len(wanted))
        weight = model.get_submodule(name).weight.detach()
        yield name, *quant_weights(weight.t().contiguous().cpu().half(), torch.int8, False)
    request.progress("layer", len(wanted), len(wanted))


def stored_layers(request: Request) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The same of the checkpoint that the option ``checkpoint`` names.

    Raises:
        CheckpointError: it is none of EETQ.
    """
    from safetensors import safe_open

    folder = Path(str(request.options["checkpoint"]))
    config = folder / "config.json"
    said: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if (said.get("quantization_config") or {}).get("quant_method") != "eetq":
        raise CheckpointError(f"'{folder}' is no EETQ checkpoint", "name its folder with the option 'checkpoint'")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for key in sorted(shard.keys()):
                if key.endswith(".weight_scales"):
                    name = key.removesuffix("_scales")
                    yield name.removesuffix(".weight"), shard.get_tensor(name), shard.get_tensor(key)


def decoded(weight: torch.Tensor, scales: torch.Tensor, product: Product, device: str) -> dict[str, torch.Tensor]:
    """Codes and scales of a packed layer, by the kernel's product with the identity.

    A code times its scale is rounded to float16 by the kernel, which moves it by less than a tenth of a step.
    """
    import torch

    identity = torch.eye(weight.shape[0], dtype=torch.float16, device=device)
    steps = product(identity, weight.to(device), scales.to(device)).float().cpu().t()
    scale = scales.float().cpu().reshape(-1, 1)
    codes = (steps / scale.clamp_min(torch.finfo(torch.float16).tiny)).round() + MIDDLE
    return {"codes": codes.to(torch.uint8), "scales": scale}
