"""llm-compressor (vLLM project): GPTQ, AWQ, SmoothQuant and round-to-nearest, written as compressed-tensors.

See https://github.com/vllm-project/llm-compressor; what is said here of the library was read in release 0.14.0.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from quantkit.errors import SchemeError
from quantkit.libraries import LIBRARIES
from quantkit.libraries._devices import visible
from quantkit.libraries.base import Library, Offer, Request, Used

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

WRITES = "compressed-tensors"
BITS = (4, 8, 2, 3, 5, 6, 7)
BOTH = (True, False)
OBSERVER = {"observer": "memoryless_minmax"}
"""Of weights; ``memoryless_mse`` searches each group's range for the least squared error."""
GPTQ = {"block_size": 128, "dampening_frac": 0.01, "actorder": "static"}
"""With the defaults of ``GPTQModifier``; ``actorder`` may be ``weight`` too, or ``none`` for columns as they come."""
FP8 = ("FP8_DYNAMIC", "FP8_BLOCK")
"""Schemes of weights by row or by block of 128 x 128, whose inputs are rounded as they come."""
PRESETS = {"fp8": FP8[0], "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}


@LIBRARIES.register
class Llmcompressor(Library):
    """``oneshot`` with a recipe of the library's modifiers and a loader that gives the rows as they are, one by one."""

    name = "llmcompressor"
    summary = "GPTQ, AWQ, SmoothQuant, fp8 and 4-bit floats of the vLLM project's llm-compressor"
    distribution = "llmcompressor"
    requirements = ("llmcompressor==0.14.0.1", "torch==2.14.0", "transformers==5.17.0")
    offers = (
        Offer("gptq", BITS, WRITES, calibrated=True, symmetric=BOTH, options={**GPTQ, **OBSERVER}, factorizes=True),
        Offer(
            "awq",
            BITS,
            WRITES,
            calibrated=True,
            symmetric=(False, True),
            options={"duo_scaling": True, "n_grid": 20, **OBSERVER},
        ),
        Offer("rtn", BITS, WRITES, symmetric=BOTH, options=OBSERVER),
        Offer("smoothquant", (8,), WRITES, calibrated=True, grouped=False, options={"smoothing_strength": 0.5}),
        Offer("fp8", (8,), WRITES, grouped=False, options={"scheme": PRESETS["fp8"]}),
        Offer("nvfp4", (4,), WRITES, grouped=False, options=OBSERVER),
        Offer("mxfp4", (4,), WRITES, grouped=False, options=OBSERVER),
    )

    @classmethod
    def variables(cls, cores: int, device: str) -> dict[str, str]:
        """The one device that the library may see, as it takes the first of those there are."""
        return {"CUDA_VISIBLE_DEVICES": visible(device)}

    def quantize(self, request: Request) -> Used:
        """Quantize and save compressed; the tokenizer is copied, which the library leaves out."""
        from llmcompressor import oneshot

        from quantkit.libraries._blocks import telling
        from quantkit.libraries._counting import Counter
        from quantkit.libraries._models import copy_tokenizer

        model = loaded(request)
        recipe = modifiers(request)
        counter = Counter(request.tokens)
        passes = sum(bool(modifier.requires_calibration_data) for modifier in recipe)
        with ExitStack() as around:
            around.enter_context(unpinned_without_accelerator())
            around.enter_context(counter.watching(model))
            around.enter_context(telling(model, request.progress, max(passes, 1)))
            oneshot(model=model, recipe=recipe, dataset=loader(request))
        model.save_pretrained(request.out, save_compressed=True)
        copy_tokenizer(request.model, request.out)
        return counter.used()


def loaded(request: Request) -> Any:
    """The model in main memory, from where the library takes each block to its device."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, request.dtype)
    return AutoModelForCausalLM.from_pretrained(request.model, dtype=dtype, use_safetensors=True).eval()


def loader(request: Request) -> DataLoader[Any] | None:
    """The rows as batches of one.

    The library takes a loader as it is. From a dataset it would draw 512 rows, shuffled, or sorted by length.
    """
    import torch
    from torch.utils.data import DataLoader

    if not request.tokens:
        return None
    rows = [torch.tensor([list(row)]) for row in request.tokens]
    batches: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    return DataLoader(batches, batch_size=None, shuffle=False)


def modifiers(request: Request) -> list[Any]:
    """The library's recipe for a request."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    options = dict(request.options)
    # its patterns are matched from the start of a name, and quantkit's are searched for in it
    ignore = [f"re:.*(?:{pattern})" for pattern in request.ignore]
    if request.method in PRESETS:
        weights = options.get("observer")  # of presets for floats of 4 bits; None is the preset's own
        return [
            QuantizationModifier(targets=["Linear"], scheme=preset(request), ignore=ignore, weight_observer=weights)
        ]
    if request.method == "smoothquant":
        return [SmoothQuantModifier(**options), QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=ignore)]
    groups = {"config_groups": {"group_0": integers(request, options.pop("observer"))}, "ignore": ignore}
    match request.method:
        case "gptq":
            order = options.pop("actorder")
            return [GPTQModifier(actorder=None if order == "none" else order, **options, **groups)]
        case "awq":
            return [AWQModifier(**options), QuantizationModifier(**groups)]
    return [QuantizationModifier(**groups)]


def preset(request: Request) -> str:
    """The library's scheme for a grid of floats.

    Raises:
        SchemeError: fp8 by a scheme that needs calibration, or is none of fp8.
    """
    scheme = str(request.options.get("scheme", PRESETS[request.method]))
    if request.method == "fp8" and scheme not in FP8:
        raise SchemeError(
            f"llmcompressor's fp8 has no scheme '{scheme}' without calibration", f"use {' or '.join(FP8)}"
        )
    return scheme


def integers(request: Request, observer: str) -> dict[str, Any]:
    """The config group of weights in integers."""
    whole = request.group_size == -1
    weights = {
        "num_bits": request.bits,
        "type": "int",
        "symmetric": request.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else request.group_size,
        "observer": observer,
    }
    return {"targets": ["Linear"], "weights": weights}


@contextmanager
def unpinned_without_accelerator() -> Iterator[None]:
    """AWQ pins its caches in memory, which torch refuses where there is no accelerator to copy them to."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin
