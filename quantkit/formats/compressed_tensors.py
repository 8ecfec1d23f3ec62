"""compressed-tensors, pack-quantized: what llm-compressor writes and vLLM and transformers load.

Codes lie as one dense stream of bits per row, least significant bit first, in int32 words; a row ends on a
whole word. Zero points are packed the same way along the output rows. The layout is that of the
``pack-quantized`` compressor of the compressed-tensors package (https://github.com/vllm-project/compressed-tensors).
For 3 bits that is so from version 0.18 on; earlier ones put ten codes in a word and leave two bits of it empty.

Scales of a symmetric scheme may be negative, see :func:`quantkit.numerics.grids.search_grid`; the package decompresses
them exactly. vLLM's Marlin kernel misreads them in its opt-in mode with int8 activations
(https://github.com/vllm-project/vllm/issues/48905).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight

if TYPE_CHECKING:
    import torch


@FORMATS.register
class CompressedTensors(Format):
    """The pack-quantized layout of compressed-tensors."""

    name = "compressed-tensors"
    summary = "pack-quantized int2/3/4/8, grouped or per channel, symmetric or not"
    runtimes = ("transformers", "vllm")
    requires = ("compressed-tensors",)

    @classmethod
    def check(cls, scheme: IntScheme) -> None:
        """Every integer scheme fits."""

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packed codes, scales, shape and, if asymmetric, packed zero points."""
        import torch

        tensors = {
            "weight_packed": pack_bits(weight.codes, weight.scheme.bits),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not weight.scheme.symmetric:
            tensors["weight_zero_point"] = pack_bits(weight.zeros.T, weight.scheme.bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: IntScheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        rows, columns = (int(size) for size in tensors["weight_shape"])
        scales = tensors["weight_scale"]
        if scheme.symmetric:
            zeros = torch.full(scales.shape, scheme.zero, dtype=torch.uint8)
        else:
            zeros = unpack_bits(tensors["weight_zero_point"].T, scheme.bits, rows).T.contiguous()
        return QuantizedWeight(scheme, unpack_bits(tensors["weight_packed"], scheme.bits, columns), scales, zeros)

    def layer_suffixes(self, scheme: IntScheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        common = ("weight_packed", "weight_scale", "weight_shape")
        return common if scheme.symmetric else (*common, "weight_zero_point")

    def quantization_config(self, layers: Mapping[str, IntScheme | None]) -> dict[str, Any]:
        """One config group per scheme; a single one targets every Linear, several name their layers."""
        schemes = list(dict.fromkeys(scheme for scheme in layers.values() if scheme is not None))
        groups = {}
        for index, scheme in enumerate(schemes):
            names = [name for name, of_layer in layers.items() if of_layer == scheme]
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": _quantization_args(scheme),
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [name for name, scheme in layers.items() if scheme is None],
            "kv_cache_scheme": None,
        }

    def remarks(self, schemes: Collection[IntScheme]) -> tuple[str, ...]:
        """Asymmetric weights need vLLM, or an older package for transformers."""
        if all(scheme.symmetric for scheme in schemes):
            return ()
        return (
            "asymmetric: vLLM loads it; transformers does with compressed-tensors below 0.18 (3 bits excepted), and "
            "with 0.18 to 0.20 fails on the shape of weight_zero_point, which quantkit's own evaluation works around",
        )


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[rows, columns]`` to int32 words ``[rows, ceil(columns * bits / 32)]`` on the CPU."""
    import numpy as np
    import torch

    rows, columns = codes.shape
    octets = np.pad(codes.cpu().numpy(), ((0, 0), (0, -columns % 32))).reshape(rows, -1, 8)
    # Eight codes fill ``bits`` whole bytes, the low ones of a 64-bit word.
    wide = octets[:, :, 0].astype("<u8", order="C")
    for place in range(1, 8):
        wide |= octets[:, :, place].astype("<u8") << np.uint64(bits * place)
    stream = wide.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    words = stream.view("<i4")[:, : -(-columns * bits // 32)]
    return torch.from_numpy(words.astype(np.int32, order="C"))


def unpack_bits(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: uint8 ``[rows, columns]`` on the CPU."""
    import numpy as np
    import torch

    rows = words.shape[0]
    whole = words.cpu().numpy().astype("<i4", order="C").view(np.uint8)
    groups = -(-columns // 8)
    stream = np.pad(whole, ((0, 0), (0, max(0, groups * bits - whole.shape[1]))))[:, : groups * bits]
    wide = np.pad(stream.reshape(rows, groups, bits), ((0, 0), (0, 0), (0, 8 - bits))).view("<u8")[:, :, 0]
    codes = np.empty((rows, groups, 8), dtype=np.uint8)
    for place in range(8):
        codes[:, :, place] = (wide >> np.uint64(bits * place)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns]))


def _quantization_args(scheme: IntScheme) -> dict[str, Any]:
    per_channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "actorder": None,
        "dynamic": False,
        "observer": "minmax",
    }
