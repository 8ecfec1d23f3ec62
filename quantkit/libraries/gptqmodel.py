"""gptqmodel (ModelCloud): GPTQ, GPTAQ, AWQ and rounding, written as the GPTQ and AWQ files of the field.

What it calls ``gguf`` and ``fp8`` are files of safetensors that it alone reads, so that their codes are stored in a
format of quantkit. See https://github.com/ModelCloud/GPTQModel; what is said here of it was read in release 7.7.0.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import CODES, Library, Offer, Request, Used

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

BITS = (4, 2, 3, 8)
BOTH = (True, False)
SOLVER = {
    "damp_percent": 0.05,
    "damp_auto_increment": 0.01,
    "desc_act": False,
    "act_group_aware": True,
    "static_groups": False,
    "mse": 0.0,
    "true_sequential": True,
}
"""Options of the GPTQ solver with the defaults of ``GPTQConfig``."""
STORE = {"offload_to_disk": False}
"""The library's default is True, which writes the name of a temporary folder into the checkpoint's config."""
CLIPS = "gptqmodel's awq also searches a clipping range for each group, after the scales"

BLOCK = 32
"""Weights of a block of GGML's Q4_0 and Q8_0."""
CAST = "gptqmodel packs awq of 16-bit models alone: the float32 model was rounded to bfloat16 before"


@LIBRARIES.register
class Gptqmodel(Library):
    """``GPTQModel.load``, ``quantize``, ``save``; one row of calibration at a time, so that nothing is padded."""

    name = "gptqmodel"
    summary = "GPTQ, GPTAQ, AWQ, round-to-nearest, Q4_0, Q8_0 and fp8 of ModelCloud's gptqmodel"
    distribution = "gptqmodel"
    requirements = ("gptqmodel==7.7.0", "torch==2.14.1", "transformers==5.23.0")
    offers = (
        Offer("gptq", BITS, "gptq", calibrated=True, symmetric=BOTH, options={**SOLVER, **STORE}, factorizes=True),
        Offer(
            "gptaq",
            BITS,
            "gptq",
            calibrated=True,
            symmetric=BOTH,
            options={**SOLVER, **STORE, "alpha": 0.25},
            factorizes=True,
        ),
        Offer("awq", (4,), "awq", calibrated=True, symmetric=(False, True), options=STORE),
        Offer("rtn", BITS, "gptq", symmetric=BOTH, options=STORE),
        Offer("gguf", (4, 8), CODES, grouped=False),
        Offer("fp8", (8,), CODES, grouped=False),
    )

    @classmethod
    def variables(cls, cores: int, device: str) -> dict[str, str]:
        """At least two workers: with one, 7.7.0 stops as its pool for loading asks for two of them."""
        return {"GPTQMODEL_CPU_WORKERS": str(max(cores, 2))}

    def quantize(self, request: Request) -> Used:
        """Quantize and save; the library's files are left as they are."""
        import torch
        from gptqmodel import GPTQModel

        from quantkit.libraries._attention import OWN_ATTENTION, own_arguments
        from quantkit.libraries._counting import Counter

        loaded = GPTQModel.load(
            str(request.model),
            config_for(request),
            dtype=torch.bfloat16 if is_cast(request) else getattr(torch, request.dtype),
            trust_remote_code=False,
        )
        # quantize() takes calibration_data_min_length and does not pass it on: rows of up to 10 tokens would be dropped
        loaded.prepare_dataset = partial(loaded.prepare_dataset, calibration_data_min_length=0)
        blocks = int(loaded.model.config.get_text_config().num_hidden_layers)
        loaded.layer_callback = layers_done(request, blocks)
        counter = Counter(request.tokens)
        with own_arguments(loaded.model, request.tokens) as others, counter.watching(loaded.model):
            loaded.quantize(calibration(request), calibration_sort=None, batch_size=1)
        request.progress("layer", blocks, blocks)  # methods that run no rows call nobody back
        if request.method in ("gguf", "fp8"):
            write_found(loaded.model, request)
            return counter.used()
        loaded.save(str(request.out))
        notes = [
            OWN_ATTENTION.format(others) if others else "",
            CLIPS if request.method == "awq" else "",
            CAST if is_cast(request) else "",
        ]
        return counter.used(*filter(None, notes))


def is_cast(request: Request) -> bool:
    """Whether a float32 model is rounded first, as the library's AWQ layers exist for 16 bits alone."""
    return request.method == "awq" and request.dtype == "float32"


def calibration(request: Request) -> list[dict[str, list[int]]] | None:
    """Rows as the library takes them without a tokenizer; none for a method that runs none."""
    rows = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in request.tokens]
    return rows or None


def config_for(request: Request) -> Any:
    """The library's own config for a request."""
    from gptqmodel.quantization import config

    common: dict[str, Any] = {
        "bits": request.bits,
        "group_size": request.group_size,
        "sym": request.symmetric,
        "device": request.device,
        "dynamic": rules(request) or None,
    }
    options = dict(request.options)
    common["offload_to_disk"] = options.pop("offload_to_disk", False)
    if request.method in ("gguf", "fp8"):
        for key in ("group_size", "sym"):
            common.pop(key)
        return config.FP8Config(**common) if request.method == "fp8" else config.GGUFConfig(format="q_0", **common)
    if request.method == "awq":
        return config.AWQConfig(format=config.FORMAT.GEMM, **common)
    # zero points less one, as the older of the formats stores them, cannot tell a zero point of 0
    common["format"] = config.FORMAT.GPTQ if request.symmetric else config.FORMAT.GPTQ_V2
    if request.method == "rtn":
        return config.RTNConfig(**common)
    alpha = options.pop("alpha", None)
    options["act_group_aware"] = options["act_group_aware"] and not options["desc_act"] and request.group_size > 0
    return config.GPTQConfig(gptaq=None if alpha is None else config.GPTAQConfig(alpha=alpha), **common, **options)


def write_found(model: torch.nn.Module, request: Request) -> None:
    """Write the codes of the layers that the library made."""
    from quantkit.libraries._codes import write_codes

    part = "weight_scale_inv" if request.method == "fp8" else "qweight"
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, part)}
    codes: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in layers.items():
        if request.method == "fp8":
            codes[name] = fp8_parts(module.weight, getattr(module, part))
        else:
            codes[name] = block_parts(getattr(module, part), request.bits)
    scheme: dict[str, Any] = {"scheme": "fp8", "granularity": "channel"}
    if request.method == "gguf":
        scheme = {"scheme": "int", "bits": request.bits, "group_size": BLOCK, "symmetric": True}
    write_codes(request.out, codes, dict.fromkeys(layers, scheme))


def fp8_parts(weight: torch.Tensor, inverse: torch.Tensor) -> dict[str, torch.Tensor]:
    """E4M3 numbers by their bits, and a scale for each row of what the library stores as its inverse."""
    import torch

    return {"codes": weight.view(torch.uint8), "scales": inverse.float().reciprocal().unsqueeze(1)}


def block_parts(rows: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Codes and scales of rows of GGML's blocks Q4_0 or Q8_0, uint8 ``[out_features, bytes]``.

    A block of 32 weights is a float16 scale and the codes: of Q8_0 signed bytes, of Q4_0 half bytes whose zero is 8,
    the low halves for the first 16 weights.
    """
    import torch

    blocks = rows.view(rows.shape[0], -1, 2 + BLOCK * bits // 8)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    stored = blocks[..., 2:]
    codes = torch.cat((stored & 15, stored >> 4), dim=-1) if bits == 4 else stored ^ 128
    return {"codes": codes.flatten(1), "scales": scales}


def rules(request: Request) -> dict[str, dict[str, Any]]:
    """``dynamic`` of the library, which keeps layers float; it never quantizes what is outside the blocks.

    Its patterns are matched from the start of a name, and quantkit's are searched for in it.
    """
    from quantkit.libraries._layers import in_blocks, kept_float, stored_layers

    layers = in_blocks(stored_layers(request.model))
    return {f"-:.*(?:{pattern})": {} for pattern in request.ignore if kept_float(layers, [pattern])}


def layers_done(request: Request, total: int) -> Callable[..., None]:
    """What the library calls twice for each block: when it is solved, and when it is packed."""

    def done(*, layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:
            request.progress("layer", layer_idx + 1, total)

    return done
