"""The merged checkpoint against PEFT's own model of base and adapters: the same prompt, logits beside logits."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.model_class import model_class
from quantkit.errors import CheckpointError
from quantkit.merging.as_peft import for_peft, without_place
from quantkit.merging.layers import nf4_round_trip
from quantkit.merging.tensors import MergedTensors
from quantkit.runtimes._checkpoint import load_tokenizer, whole_config
from quantkit.system.free_memory import free_bytes

PROMPT = "Name three rivers of Europe, and say in one sentence each where they begin and which sea they reach."
FEWEST_ROWS_SHOWN = 8
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
"""By stored dtype, the largest root mean square of the difference of logits, as a share of that of the logits."""
SHARE_OF_MEMORY = 0.5


def check_merge(merged: Path, tensors: MergedTensors, *, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    """Compare logits after one prompt, both models computed in float32 on the CPU.

    Args:
        merged: folder of the merged model.
        tensors: that it was written from, which know base and adapters.
        dtype: of the merged weights, which decides the tolerance.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        ``prompt``, ``tokens``, ``max_abs_difference``, ``relative_difference`` (root mean square of the difference of
        logits over that of the logits), ``kl_divergence`` (mean, in nats), ``adapter_kl_divergence`` (of base and
        adapters from the base alone) and ``tolerance`` (of the relative difference), against PEFT's un-merged model;
        where a model's code reads weights past PEFT's layers, against its merged one, with the difference from the
        other as ``unmerged_difference``; or ``skipped`` with the reason.

    Raises:
        CheckpointError: the difference is larger than the tolerance.
    """
    base = tensors.base
    needed = 4 * sum(base.reader.nbytes(name) // base.reader.dtype(name).itemsize for name in base.reader.names())
    free = free_bytes(torch.device("cpu"))
    if needed > SHARE_OF_MEMORY * free:
        return {"skipped": f"in float32 the model takes {needed >> 20} MiB, of {free >> 20} MiB that are free"}
    for adapter in tensors.adapters:
        odd = without_place(adapter, base)
        if odd is not None:
            return {"skipped": f"PEFT finds no layer '{odd}' in the model that transformers {_major()} builds"}
    ids = _prompt(merged, tensors, trust_remote_code)
    with _quiet():
        try:
            reference, plain = _peft(tensors, ids, trust_remote_code, merged=False)
            found = _logits(_load(merged, trust_remote_code), ids)
            compared, allowed = _compared(reference, found), TOLERANCES[dtype]
            apart = compared["relative_difference"]
            if not apart <= allowed:
                compared = _compared(_peft(tensors, ids, trust_remote_code, merged=True)[0], found)
                compared["unmerged_difference"] = apart
        except _PeftError as error:
            return {"skipped": f"PEFT cannot run the adapter: {error}"}
    if not compared["relative_difference"] <= allowed:
        raise CheckpointError(
            f"the merged model's logits differ from PEFT's by {apart:.2g} of their size, and {allowed:.2g} is what "
            f"{dtype} may cost",
            "please report this; until then merge with PEFT's merge_and_unload and give the folder that this saves",
        )
    return {
        "prompt": PROMPT,
        "tokens": ids.shape[1],
        **compared,
        "adapter_kl_divergence": _divergence(reference, plain),
        "tolerance": TOLERANCES[dtype],
    }


def _prompt(merged: Path, tensors: MergedTensors, trust_remote_code: bool) -> torch.Tensor:
    """The prompt's tokens, and some that the adapters added or trained."""
    ids = list(load_tokenizer(merged, trust_remote_code=trust_remote_code)(PROMPT).input_ids)
    trained = [
        row for adapter in tensors.adapters for module in adapter.contents.tokens for row in adapter.token_rows(module)
    ]
    rows = tensors.rows
    added = range(max(0, rows - FEWEST_ROWS_SHOWN), rows) if rows else ()
    return torch.tensor([[*ids, *trained[:FEWEST_ROWS_SHOWN], *added]])


class _PeftError(Exception):
    """PEFT does not load, run or merge an adapter; the first line of what it says."""


@contextmanager
def _by_peft() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT raises errors of any kind for what it does not take; the merge does not go by it
        raise _PeftError(str(error).strip().partition("\n")[0][:200]) from error


@_by_peft()
def _peft(
    tensors: MergedTensors, ids: torch.Tensor, trust_remote_code: bool, *, merged: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of PEFT's model, whose adapters are merged or beside its layers, and of its base without them."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapters = tensors.adapters
    model = _load(tensors.base.folder, trust_remote_code)
    if tensors.nf4_dtype is not None:
        for name in tensors.base.linears:
            weight = model.get_submodule(name).weight
            weight.data = nf4_round_trip(weight.data, tensors.nf4_dtype)
    plain = _logits(model, ids.clamp(max=model.get_input_embeddings().num_embeddings - 1))
    if tensors.rows is not None:
        model.resize_token_embeddings(tensors.rows, mean_resizing=False)
    names = [f"adapter{number}" for number in range(len(adapters))]
    with tempfile.TemporaryDirectory(prefix="quantkit-adapters-") as scratch:
        folders = [
            str(for_peft(adapter, tensors.base, Path(scratch) / name))
            for adapter, name in zip(adapters, names, strict=True)
        ]
        tuned: Any = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            tuned.load_adapter(folder, adapter_name=name)
    if len(names) > 1:
        tuned.base_model.set_adapter(names)
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            for adapter, name in zip(adapters, names, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= adapter.weight
    if merged:
        tuned.base_model.merge_adapter(adapter_names=names)
    return _logits(tuned.eval(), ids), plain


def _load(folder: Path, trust_remote_code: bool) -> Any:
    config = whole_config(folder, trust_remote_code=trust_remote_code)
    model = model_class(config).from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.eval()


def _major() -> str:
    return version("transformers").partition(".")[0]


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].double()
    return found


def _compared(reference: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    difference = found - reference
    centred = reference - reference.mean(-1, keepdim=True)
    return {
        "max_abs_difference": float(difference.abs().max()),
        "relative_difference": float(difference.square().mean().sqrt() / centred.square().mean().sqrt()),
        "kl_divergence": _divergence(reference, found),
    }


def _divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence in nats of ``found`` from ``reference``, over the tokens that both know."""
    shared = min(reference.shape[-1], found.shape[-1])
    p, q = (logits[:, :shared].log_softmax(-1) for logits in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what was checked before, progress bars, and draws from the global generator."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
