"""What a variant does to a model, known before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Strategy
from quantkit.errors import SchemeError
from quantkit.recipe import VariantSpec
from quantkit.schemes import IntScheme

SPARE_MEMORY = 0.5
"""Share of the free memory that paused activations may take."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Every Linear layer of a model under one variant.

    Attributes:
        schemes: full name to scheme, None where the layer stays float.
        shapes: full name to ``(out_features, in_features)``.
    """

    schemes: Mapping[str, IntScheme | None]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def quantized(self) -> dict[str, IntScheme]:
        """The layers that are quantized."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme is not None}

    def weights(self) -> int:
        """Number of weights in quantized layers."""
        return sum(rows * columns for rows, columns in (self.shapes[name] for name in self.quantized))

    def quantized_bytes(self, scale_bits: int) -> int:
        """Bytes of the quantized layers with scales of ``scale_bits``, but for rounding to whole words."""
        bits = 0.0
        for name, scheme in self.quantized.items():
            rows, columns = self.shapes[name]
            bits += rows * columns * scheme.bits_per_weight(columns, scale_bits)
        return round(bits / 8)


def plan_layers(skeleton: Skeleton, variant: VariantSpec) -> Layers:
    """Give every Linear layer its scheme.

    Raises:
        SchemeError: a group size does not divide a layer, a pattern matches nothing, or no layer is left.
    """
    modules = {name: module for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)}
    reachable = {name for segment in skeleton.segments for name in segment.linears}
    if skeleton.head is not None:
        reachable.add(skeleton.head.prefix)
    schemes: dict[str, IntScheme | None] = {}
    for name, module in modules.items():
        scheme = variant.scheme_of(name) if name in reachable else None
        if scheme is not None:
            _check_groups(variant.name, name, module, scheme)
        schemes[name] = scheme
    if not any(schemes.values()):
        raise SchemeError(f"{variant.name}: no layer is left to quantize", "'ignore' matches every Linear layer")
    _check_patterns(variant, list(modules))
    return Layers(schemes, {name: (module.out_features, module.in_features) for name, module in modules.items()})


def _check_groups(variant: str, name: str, module: nn.Linear, scheme: IntScheme) -> None:
    try:
        scheme.groups(module.in_features)
    except SchemeError as error:
        raise SchemeError(f"{variant}: {name}: {error.problem}", error.remedy) from error


def _check_patterns(variant: VariantSpec, names: list[str]) -> None:
    for pattern in variant.overrides:
        if not any(re.search(pattern, name) for name in names):
            raise SchemeError(
                f"{variant.name}: the override '{pattern}' matches no Linear layer", f"a layer's name is {names[0]}"
            )


def paused_bytes(skeleton: Skeleton, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of activations alive at the widest pause: what the widest layer reads, and the stream beside it."""
    widest = max(
        (module.in_features for module in skeleton.model.modules() if isinstance(module, nn.Linear)), default=0
    )
    hidden: int = skeleton.model.get_input_embeddings().weight.shape[1]
    # At down_proj a block holds the gate, its activation and the product, and the residual stream twice.
    return tokens * (3 * widest + 2 * hidden) * dtype.itemsize


def choose_strategy(skeleton: Skeleton, tokens: int, dtype: torch.dtype, device: torch.device) -> Strategy:
    """One pass where the paused activations fit into half of the free memory, else a run per group."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "one-pass" if paused_bytes(skeleton, tokens, dtype) <= SPARE_MEMORY * free else "recompute"
