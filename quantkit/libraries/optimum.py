"""optimum (Hugging Face): its ``GPTQQuantizer``, which transformers' ``GPTQConfig`` runs, written as GPTQ files.

It goes through a model of transformers by itself and takes the solver and the packing from gptqmodel. See
https://github.com/huggingface/optimum, ``optimum/gptq/quantizer.py``, read in release 2.3.0.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from quantkit.libraries import LIBRARIES
from quantkit.libraries._devices import visible
from quantkit.libraries.base import Library, Offer, Request, Used

if TYPE_CHECKING:
    import torch

BITS = (4, 2, 3, 8)
OPTIONS = {"damp_percent": 0.1, "desc_act": False, "act_group_aware": True, "true_sequential": True}
"""With the defaults of ``GPTQQuantizer``; with ``true_sequential`` each layer of a block is solved by itself."""


@LIBRARIES.register
class Optimum(Library):
    """``GPTQQuantizer.quantize_model`` on rows that are already tokens, one at a time."""

    name = "optimum"
    summary = "GPTQ as transformers' GPTQConfig runs it: optimum's GPTQQuantizer with gptqmodel's solver"
    distribution = "optimum"
    requirements = ("optimum==2.3.0", "gptqmodel==7.7.0", "torch==2.14.1", "transformers==5.23.0")
    offers = (Offer("gptq", BITS, "gptq", calibrated=True, symmetric=(True, False), options=OPTIONS, factorizes=True),)

    @classmethod
    def variables(cls, cores: int, device: str) -> dict[str, str]:
        """What gptqmodel needs on few cores, and the one device to which optimum moves blocks, the first it sees."""
        return {"GPTQMODEL_CPU_WORKERS": str(max(cores, 2)), "CUDA_VISIBLE_DEVICES": visible(device)}

    def quantize(self, request: Request) -> Used:
        """Quantize and save, with a config that has neither the calibration rows nor the wrong format in it."""
        import torch
        from optimum.gptq import GPTQQuantizer
        from transformers import AutoModelForCausalLM

        from quantkit.libraries._attention import OWN_ATTENTION, own_arguments
        from quantkit.libraries._blocks import telling
        from quantkit.libraries._counting import Counter
        from quantkit.libraries._models import copy_tokenizer

        model = AutoModelForCausalLM.from_pretrained(
            request.model, dtype=getattr(torch, request.dtype), use_safetensors=True
        )
        quantizer = GPTQQuantizer(
            bits=request.bits,
            dataset=[{"input_ids": [list(row)], "attention_mask": [[1] * len(row)]} for row in request.tokens],
            group_size=request.group_size,
            sym=request.symmetric,
            modules_in_block_to_quantize=wanted(request, model),
            **solver_options(request),
        )
        counter = Counter(request.tokens)
        with (
            own_arguments(model, request.tokens) as others,
            counter.watching(model),
            telling(model, request.progress),
        ):
            quantizer.quantize_model(model)
        quantizer.dataset = None  # it would be written into the config
        model.config.quantization_config = quantizer.to_dict()
        quantizer.save(model, str(request.out))
        settle_config(request)
        copy_tokenizer(request.model, request.out)
        return counter.used(*([OWN_ATTENTION.format(others)] if others else []))


def solver_options(request: Request) -> dict[str, Any]:
    """The options as the solver takes them: it regroups columns within groups, which need some order and an end."""
    options = dict(request.options)
    options["act_group_aware"] = options["act_group_aware"] and not options["desc_act"] and request.group_size > 0
    return options


def wanted(request: Request, model: torch.nn.Module) -> list[list[str]] | None:
    """``modules_in_block_to_quantize``, each layer to be solved by itself; None where all of a block are."""
    from quantkit.libraries._layers import same_in_blocks
    from quantkit.libraries._models import linear_layers

    names, kept = same_in_blocks(linear_layers(model), request.ignore, "optimum")
    return [[name] for name in names] if kept else None


def settle_config(request: Request) -> None:
    """Let ``config.json`` say what ``quantize_config.json`` does.

    While it saves, the library turns symmetric layers into the older format, and says so in the latter file alone.
    """
    said = json.loads((request.out / "quantize_config.json").read_text(encoding="utf-8"))
    path = request.out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {**said, "checkpoint_format": said["format"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
