"""Tensors of a checkpoint that the class of its model does not know: one rule for all stages.

- What follows from the config, such as the frequencies of rotary embeddings in old files, and heads that training adds
  beside a language model are left out of exports: the model computes without them, and servers stumble over them.
- What belongs to packed layers means that a file is not what its config says, wherever it is seen.
- All else, such as layers that predict further tokens, is carried along as it is and told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached|original_inv_freq)|(attn|attention)\.(masked_)?bias|position_ids)$"
)
"""Ends of names of tensors that follow from the config."""
OF_TRAINING = re.compile(r"^(v_head|value_head|reward_head|critic)\.")
"""Heads that reinforcement learning puts beside a language model, which writes without them."""
PACKED_SUFFIXES = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale", ".qweight",
    ".qzeros", ".scales", ".g_idx", ".W_q", ".SCB", ".weight_format", ".absmax", ".quant_map",
)  # fmt: skip
"""Ends of names that only parts of packed layers have."""
SCALES_OF_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".q_scale", ".k_scale", ".v_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point",
)  # fmt: skip
"""Ends of the names of tensors by which runtimes round activations and KV caches; no weight follows from them."""


def left_out(unknown: Iterable[str], model: nn.Module) -> list[str]:
    """Those of the tensors that a model does not know which exports leave out.

    Args:
        unknown: their names.
        model: as transformers builds it, whose buffers that no file holds follow from the config too.
    """
    computed = {name for name, _ in model.named_buffers()}
    return [name for name in unknown if DERIVED.search(name) or OF_TRAINING.match(name) or name in computed]


def parts_of_packed(unknown: Iterable[str]) -> list[str]:
    """Those of the tensors that a model does not know which belong to packed layers."""
    return [name for name in unknown if name.endswith(PACKED_SUFFIXES)]


def of_quantization(unknown: Iterable[str]) -> list[str]:
    """Those of the tensors that a model does not know by which weights or activations are quantized."""
    return [name for name in unknown if name.endswith((*PACKED_SUFFIXES, *SCALES_OF_ACTIVATIONS))]
