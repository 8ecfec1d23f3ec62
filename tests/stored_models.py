"""Weights of tiny models stored as their authors would: in blocks of 8-bit floats, or in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantkit.checkpoint import CheckpointReader, ShardWriter

E4M3 = torch.float8_e4m3fn


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None, **config: Any) -> None:
    """Replace the weights of a model, and say how they are quantized."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    said = json.loads((folder / "config.json").read_text())
    said |= {"dtype": "bfloat16", **config}
    if quantization:
        said["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(said))


def by_blocks(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales ``[ceil(out / block), ceil(in / block)]``, as DeepSeek's quantization makes them."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    split = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scales = split.abs().amax((1, 3)) / 448
    codes = (split / scales[:, None, :, None]).view(padded.shape)[:rows, :columns].to(E4M3)
    return codes, scales


def as_deepseek(folder: Path, block: int, exponents: bool = False) -> dict[str, torch.Tensor]:
    """Store the projections of a model in blocks of E4M3; returns what they decode to, in bfloat16."""
    stored, wanted = {}, {}
    for name, tensor in tensors_of(folder).items():
        if not name.endswith("proj.weight"):
            stored[name] = wanted[name] = tensor.bfloat16() if tensor.ndim == 2 else tensor
            continue
        codes, scales = by_blocks(tensor, block)
        scales = torch.exp2(scales.log2().ceil()) if exponents else scales
        stored[name] = codes
        stored[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if exponents else scales
        spread = scales.repeat_interleave(block, 0)[: len(codes)].repeat_interleave(block, 1)[:, : codes.shape[1]]
        wanted[name] = (codes.float() * spread).bfloat16()
    write(folder, stored, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]})
    return wanted


def as_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Store the experts of a gpt-oss as its authors do, at random; returns what transformers decodes them to."""
    draw = torch.Generator().manual_seed(0)
    stored, wanted = {}, {}
    for name, tensor in tensors_of(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = wanted[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:-1], generator=draw, dtype=torch.uint8)
        scales[0, 0, 0] = 0
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    write(folder, stored, config)
    return wanted
