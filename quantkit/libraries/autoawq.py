"""AutoAWQ (Casper Hansen): the AWQ implementation whose file format the field took over; no longer maintained.

See https://github.com/casper-hansen/AutoAWQ, read in release 0.2.9, the last one. It imports a name of transformers
that 4.57 removed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from quantkit.errors import SchemeError
from quantkit.libraries import LIBRARIES
from quantkit.libraries._devices import visible
from quantkit.libraries.base import Library, Offer, Request, Used

if TYPE_CHECKING:
    from pathlib import Path

    import torch

OPTIONS = {"max_calib_seq_len": 512, "duo_scaling": True, "apply_clip": True, "n_parallel_calib_samples": 0}
"""With the defaults of ``quantize``; ``n_parallel_calib_samples`` 0 runs all rows at once, which is its None."""

JOINED = "autoawq joins all rows to one stream and cuts it into rows of {} tokens; what is left over is dropped"


@LIBRARIES.register
class Autoawq(Library):
    """``AutoAWQForCausalLM.quantize`` with ``version: gemm``."""

    name = "autoawq"
    summary = "AWQ by AutoAWQ, the format's own author; no longer maintained"
    distribution = "autoawq"
    requirements = ("autoawq==0.2.9", "torch==2.14.1", "transformers==4.56.2")
    offers = (Offer("awq", (4,), "awq", calibrated=True, symmetric=(False,), options=OPTIONS),)

    @classmethod
    def variables(cls, cores: int, device: str) -> dict[str, str]:
        """The one device that the library may see, as it spreads blocks over all of them."""
        return {"CUDA_VISIBLE_DEVICES": visible(device)}

    def quantize(self, request: Request) -> Used:
        """Quantize and save; the tokenizer is copied, which the library leaves out."""
        import torch
        from awq import AutoAWQForCausalLM

        from quantkit.libraries._blocks import telling
        from quantkit.libraries._counting import Counter
        from quantkit.libraries._models import copy_tokenizer

        check(request)
        origin = read_config(request.model)
        loaded = AutoAWQForCausalLM.from_pretrained(
            str(request.model),
            torch_dtype=getattr(torch, request.dtype),
            trust_remote_code=False,
            **older_keys(origin),
        )
        length = row_length(request)
        options = dict(request.options)
        options["n_parallel_calib_samples"] = options["n_parallel_calib_samples"] or None
        counter = Counter(request.tokens)
        with counter.watching(loaded.model), telling(loaded.model, request.progress):
            loaded.quantize(
                tokenizer=None,
                quant_config=config_for(request, loaded.model),
                calib_data=[list(row) for row in request.tokens],
                max_calib_samples=len(request.tokens),
                quantizer_cls=copying_quantizer(),
                **{**options, "max_calib_seq_len": length},
            )
        loaded.save_quantized(str(request.out))
        saved = read_config(request.out)["quantization_config"]
        text = json.dumps({**origin, "quantization_config": saved}, indent=2)
        (request.out / "config.json").write_text(f"{text}\n", encoding="utf-8")
        copy_tokenizer(request.model, request.out)
        return counter.used(JOINED.format(length))


def check(request: Request) -> None:
    """Refuse what the library fails on without a word.

    Raises:
        SchemeError: there are no groups.
    """
    if request.group_size < 1:
        raise SchemeError("autoawq has no scales per channel", "choose a group_size that divides the layers' inputs")


def copying_quantizer() -> type[Any]:
    """The library's quantizer, whose search for scales has real copies of the weights that it puts back.

    It keeps ``tensor.cpu()`` of them, which on a CPU is the tensor itself: each scale that is tried would stay in the
    weights, and the result would be worthless without a word.
    """
    from awq.quantize.quantizer import AwqQuantizer

    class CopyingQuantizer(AwqQuantizer):  # type: ignore[misc]  # the library has no types
        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any) -> Any:
            original = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in original().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
            finally:
                del module2inspect.state_dict

    return CopyingQuantizer


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes under ``rope_parameters``, as transformers 4 reads it.

    It would take 10000 for the base of the rotary embedding without a word, and calibrate another model.
    """
    rope = dict(config.get("rope_parameters") or {})
    if not rope or "rope_theta" in config:
        return {}
    theta = rope.pop("rope_theta", None)
    keys: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    return keys if rope.get("rope_type", "default") == "default" else {**keys, "rope_scaling": rope}


def row_length(request: Request) -> int:
    """``max_calib_seq_len``: no row is longer, as such rows are dropped, and the tokens fill at least one."""
    lengths = [len(row) for row in request.tokens]
    return max(min(int(request.options["max_calib_seq_len"]), sum(lengths)), max(lengths))


def config_for(request: Request, model: torch.nn.Module) -> dict[str, Any]:
    """The library's own config for a request.

    Raises:
        SchemeError: it would keep more layers float than are asked for, as it looks for parts of names.
    """
    from quantkit.libraries._layers import same_in_blocks
    from quantkit.libraries._models import linear_layers

    wanted, kept = same_in_blocks(linear_layers(model), request.ignore, "autoawq")
    for name in wanted:
        if any(each in name for each in kept):
            raise SchemeError(f"autoawq would keep {name} float as well", "keep it float too with 'ignore'")
    return {
        "zero_point": True,
        "q_group_size": request.group_size,
        "w_bit": request.bits,
        "version": "GEMM",
        "modules_to_not_convert": kept or None,
    }
