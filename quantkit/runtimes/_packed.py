"""Load a folder of safetensors by transformers as it is: packed weights stay packed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.model_class import loader, model_class, text_part
from quantkit.errors import EvaluationError
from quantkit.exports.adapter import adapter_beside
from quantkit.runtimes._checkpoint import check_checkpoint, is_gguf, translated, whole_config
from quantkit.runtimes._model import TransformersModel, whole
from quantkit.runtimes.base import LoadOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_packed(path: Path, options: LoadOptions) -> TransformersModel:
    """A checkpoint as transformers loads it, from safetensors only, with the adapter beside it put on by PEFT.

    Raises:
        EvaluationError: it cannot be loaded, or a tensor is missing, unexpected or of the wrong shape.
    """
    check_checkpoint(path)
    if is_gguf(path):
        raise EvaluationError(
            f"transformers does not compute from the packed weights of {path}",
            "load it with llama.cpp, or with reference, which decodes them",
        )
    with translated(path, "the model"), packed_zero_points() as stand_in:
        config = whole_config(path, trust_remote_code=options.trust_remote_code)
        model, found = loader(model_class(config, options.trust_remote_code))(
            path,
            dtype=options.dtype or "auto",
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are reported by name
            output_loading_info=True,
        )
        stand_in.check([str(key[0]) for key in found["mismatched_keys"]])
        if found["missing_keys"]:
            found = {**found, "missing_keys": set(found["missing_keys"]) - _computed_names(model)}
    adapter = adapter_beside(path)
    if adapter is not None or text_part(model) is not model:
        # packages unpack what they loaded when the model is called: here nobody calls it, or PEFT looks at it before
        for hook in list(model._forward_pre_hooks.values()):
            hook(model, ())
    loaded = whole(path, model, found, torch.device(options.device))
    if adapter is not None:
        put_on(loaded.model, adapter)
    return loaded


def put_on(model: PreTrainedModel, adapter: Path) -> None:
    """Put an adapter on the layers of a model, which computes with it from then on.

    Raises:
        EvaluationError: PEFT cannot, or finds no layer for some of it.
    """
    from peft import PeftModel

    with translated(adapter, "the adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers about each other
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        PeftModel.from_pretrained(model, str(adapter)).eval()


def _computed_names(model: PreTrainedModel) -> set[str]:
    """Names of the buffers that no file holds, such as the normalizer of Gemma's embedding.

    compressed-tensors makes parameters of those of a module that it compresses; transformers then computes them as
    ever, but says that they were missing.
    """
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return {name for name, _ in fresh.named_buffers()} - set(fresh.state_dict())


PACKAGE = "compressed_tensors"


@dataclass(slots=True)
class StandIn:
    """What stood in for the package's function.

    Attributes:
        calls: how often the package called it.
    """

    calls: int = 0

    def check(self, mismatched: Collection[str]) -> None:
        """See that the package called it, if zero points were laid out wrongly.

        Args:
            mismatched: names of the tensors of another shape than the model expects.

        Raises:
            EvaluationError: it did not: this version has the gap elsewhere.
        """
        if self.calls or not any(name.endswith("weight_zero_point") for name in mismatched):
            return
        raise EvaluationError(
            f"{PACKAGE} {version(PACKAGE)} lays out packed zero points wrongly, and not where quantkit mends it",
            f"install {PACKAGE}<0.21, or choose the runtime reference",
        )


@contextmanager
def packed_zero_points() -> Iterator[StandIn]:
    """Mend a gap in compressed-tensors that keeps transformers from loading packed asymmetric checkpoints.

    transformers lays out a quantized model on the meta device, by asking the package to compress an empty one.
    From 0.18 on (seen up to 0.20) the package's pack-quantized compressor then packs the shape of the weight but
    not that of its zero points, so the model expects int8 ``[rows, groups]`` where every pack-quantized file
    holds int32 ``[ceil(rows * bits / 32), groups]``, and loading fails. Decompression itself is right.
    Inside the block, the package's compressor gives empty zero points the shape that they have in files.
    """
    stand_in = StandIn()
    try:
        from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    except ImportError:  # the package is not there, or laid out otherwise, which the caller checks
        yield stand_in
        return
    kept = PackedQuantizationCompressor.__dict__["compress"]
    original = PackedQuantizationCompressor.compress

    def compress(_: type[Any], state: dict[str, torch.Tensor], scheme: Any) -> dict[str, torch.Tensor]:
        stand_in.calls += 1
        compressed: dict[str, torch.Tensor] = original(state, scheme)
        zeros = compressed.get("weight_zero_point")
        if zeros is not None and zeros.is_meta and zeros.dtype != torch.int32:
            words = -(-zeros.shape[0] * scheme.weights.num_bits // 32)
            compressed["weight_zero_point"] = torch.empty(words, *zeros.shape[1:], dtype=torch.int32, device="meta")
        return compressed

    PackedQuantizationCompressor.compress = classmethod(compress)
    try:
        yield stand_in
    finally:
        PackedQuantizationCompressor.compress = kept
