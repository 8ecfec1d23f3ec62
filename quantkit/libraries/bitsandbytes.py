"""bitsandbytes, as transformers drives it: NF4, FP4 and LLM.int8 of weights that are rounded while they are loaded.

See ``BitsAndBytesConfig`` in https://huggingface.co/docs/transformers/quantization/bitsandbytes; what is said here was
read in bitsandbytes 0.50.2 and transformers 5.23.0.
"""

from __future__ import annotations

from typing import Any

from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import Library, Offer, Request, Used

FOUR_BIT = {"double_quant": False}
"""``bnb_4bit_use_double_quant`` of ``BitsAndBytesConfig``."""
INT8 = {"llm_int8_threshold": 6.0}
"""Inputs beyond it are multiplied in 16 bits by whoever loads the checkpoint; the weights do not depend on it."""


@LIBRARIES.register
class BitsAndBytes(Library):
    """``from_pretrained`` with a ``BitsAndBytesConfig``, then ``save_pretrained``.

    Blocks of 4-bit codes have 64 weights, as transformers leaves no choice.
    """

    name = "bitsandbytes"
    summary = "NF4, FP4 and LLM.int8 of bitsandbytes, through transformers"
    distribution = "bitsandbytes"
    requirements = ("bitsandbytes==0.50.2", "accelerate==1.15.0", "torch==2.14.1", "transformers==5.23.0")
    offers = (
        Offer("nf4", (4,), "bitsandbytes", grouped=False, options=FOUR_BIT),
        Offer("fp4", (4,), "bitsandbytes", grouped=False, options=FOUR_BIT),
        Offer("int8", (8,), "bitsandbytes", grouped=False, options=INT8),
    )

    def quantize(self, request: Request) -> Used:
        """Load, which quantizes, and save."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        from quantkit.libraries._layers import kept_float
        from quantkit.libraries._models import copy_tokenizer, layers_of

        skipped = kept_float(layers_of(request.model), request.ignore)
        request.progress("step", 0, 2)
        model = AutoModelForCausalLM.from_pretrained(
            request.model,
            dtype=getattr(torch, request.dtype),
            use_safetensors=True,
            device_map={"": request.device},
            quantization_config=BitsAndBytesConfig(**config_for(request, skipped)),
        )
        request.progress("step", 1, 2)
        model.save_pretrained(request.out)
        request.progress("step", 2, 2)
        copy_tokenizer(request.model, request.out)
        return Used()


def config_for(request: Request, skipped: list[str]) -> dict[str, Any]:
    """Arguments of ``BitsAndBytesConfig``; ``skipped`` are the full names of layers that stay float."""
    if request.method == "int8":
        return {"load_in_8bit": True, "llm_int8_skip_modules": skipped, **request.options}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": request.method,
        "bnb_4bit_use_double_quant": request.options["double_quant"],
        "bnb_4bit_compute_dtype": request.dtype,
        "llm_int8_skip_modules": skipped,
    }
