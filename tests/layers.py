"""Layers of odd weights and correlated inputs, and what the compressed-tensors package says of a scheme."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.methods.base import InputStatistics, Solution
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.schemes import QuantizedWeight, Scheme


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of unlike strength, with zeros of both signs in between."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) * torch.randn(rows, 1, generator=draw).exp()
    weight *= torch.randn(columns, generator=draw).exp() * 0.02
    weight[torch.rand(rows, columns, generator=draw) < 0.05] = 0
    weight[torch.rand(rows, columns, generator=draw) < 0.05] = -0.0
    return weight


def package_scheme(scheme: Scheme) -> QuantizationScheme:
    config = CompressedTensors().quantization_config({"layer": scheme})
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert isinstance(group, QuantizationScheme)
    return group


def assert_same_bytes(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def correlated_gram(columns: int, tokens: int = 300) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 12, generator=draw) @ torch.randn(12, columns, generator=draw)
    inputs += 0.5 * torch.randn(tokens, columns, generator=draw)
    return inputs.T @ inputs / tokens


def solved(weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, dtype: torch.dtype, **options: int) -> Solution:
    statistics = InputStatistics(tokens=300, gram=gram)
    return Gptq(GptqOptions.model_validate(options)).quantize(weight, statistics, scheme, dtype)


def layer_error(weight: torch.Tensor, found: QuantizedWeight, gram: torch.Tensor) -> float:
    difference = (weight - found.dequantize(torch.float32)).double()
    return float(((difference @ gram.double()) * difference).sum())
