"""Products of matrices on a CPU: what its processor multiplies fast, and by which of torch's libraries.

torch multiplies float32 matrices by MKL, which keeps to AVX2 on processors of AMD. oneDNN, which torch brings too, uses
their AVX-512: on a Zen 5 core 180 to 240 GFLOP/s instead of 100, for the shapes of a scoring and those of a walk that
come again. Which of the two it is depends on the processor alone, so that runs on one machine give the same bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PROCESSOR_FILE = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"
FEWEST_ROWS = 8
"""Rows of inputs from which a model's layer goes by oneDNN; for fewer, reading the weight is what takes the time."""


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are several times as fast as those of float32 on this CPU.

    It has instructions for them, and oneDNN, which does these products, may use them: ``ONEDNN_MAX_CPU_ISA`` can bar
    it.
    torch has no public way to ask; where it no longer answers, the passes are right in float32, and slower.
    """
    has_avx512: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", _no)
    may: Callable[[], bool] = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", _no)
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    return (multiplies_by_amx() or has_avx512()) and has_onednn() and may()


def multiplies_by_amx() -> bool:
    """Whether the CPU has AMX, in which products of bfloat16 take so little time that what is around them counts."""
    has: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", _no)
    return has()


def _no() -> bool:
    return False


def multiplies_by_onednn() -> bool:
    """Whether products of float32 matrices go by oneDNN.

    They do on processors of AMD that have AVX-512, all of which multiply bfloat16, where torch's other library is MKL.
    torch has no public product by oneDNN; where it no longer has this one, products are right by MKL, and slower.
    """
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_mkl: Callable[[], bool] = torch.backends.mkl.is_available
    return has_product and has_mkl() and _is_amd() and multiplies_bfloat16()


@cache
def _is_amd() -> bool:
    """Whether AMD made the processor."""
    known = PROCESSOR_FILE.read_text(encoding="utf-8") if PROCESSOR_FILE.is_file() else platform.processor()
    return AMD in known


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of two matrices, without a gradient; those of float32 on a CPU by the faster library.

    A row of the result does not depend on the other rows of ``left``, if these are two and more, nor a column on the
    other columns of ``right``. It is for shapes that come again: oneDNN keeps what it makes for each, half a MiB, up to
    a thousand of them, which a solver's updates with more columns at every step would fill.

    Args:
        left: ``[rows, inner]``.
        right: ``[inner, columns]``.

    Returns:
        A new tensor ``[rows, columns]``.
    """
    if not _goes_by_onednn(left):
        return left @ right
    laid = right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()
    return _linear(left, laid.mT, None)


def _goes_by_onednn(left: torch.Tensor) -> bool:
    """Whether :func:`product` of this matrix and another goes by oneDNN."""
    on_cpu = left.device.type == "cpu" and left.dtype == torch.float32
    return on_cpu and multiplies_by_onednn() and len(left) > 1 and left.numel() > 0


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to a matrix, as :func:`product` multiplies; in place where the library can.

    Args:
        total: ``[rows, columns]``.
        left: ``[rows, inner]``.
        right: ``[inner, columns]``.
    """
    if _goes_by_onednn(left):
        total.add_(product(left, right))
    else:
        total.addmm_(left, right)


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``inputs @ weight.T + bias`` by oneDNN."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return found


def fast_linears() -> AbstractContextManager[object]:
    """Inside the block, linear layers in float32 compute by the faster library, where no gradient is asked for."""
    return _Linears() if multiplies_by_onednn() else nullcontext()


class _Linears(TorchFunctionMode):
    """Linear layers of float32 on the CPU go by oneDNN."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what a model asks for."""
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled() and _is_plain(args):
            return _linear(args[0], args[1], args[2] if len(args) > 2 else None)
        return func(*args, **(kwargs or {}))


def _is_plain(given: Sequence[Any]) -> bool:
    """Whether a layer was given float32 tensors of the CPU, and many rows."""
    tensors = [each for each in given if each is not None]
    plain = all(type(each) in (torch.Tensor, torch.nn.Parameter) for each in tensors)
    if not plain or not all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors):
        return False
    inputs: torch.Tensor = given[0]
    return inputs.numel() >= FEWEST_ROWS * inputs.shape[-1] > 0


@contextmanager
def bfloat16_products(inputs: torch.Tensor) -> Iterator[None]:
    """Inside the block, products of float32 CPU matrices may round their inputs to bfloat16, if ``inputs`` are that.

    A plain product of bfloat16 matrices rounds its result to bfloat16 too, which can make a Gram matrix
    indefinite; this way the result is float32. The setting is put back as it was. A torch that has no such setting
    multiplies in float32, which is as right, and slower.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)  # its settings are not in its type hints
    before = getattr(settings, "fp32_precision", None)
    if before is None:
        yield
        return
    if inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
