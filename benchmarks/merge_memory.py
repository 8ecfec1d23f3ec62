"""Peak memory of a merge beside the size of the model: it follows the largest tensor and shard, not the model.

Random Llamas of growing depth get a LoRA adapter on every linear layer. Each is merged in a process of its own, without
the comparison with PEFT, which loads models whole where they fit in half of the free memory. By how much the peak of
the process's resident memory lies above what it had before is the figure. Linux alone tells it. The last line is JSON.

    python benchmarks/merge_memory.py --hidden 1024 --depths 4 8 16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.merging import merge_model

VOCABULARY = 8192
RANK = 16
MIB = 1 << 20


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of a block."""
    wide, inner = config.hidden_size, config.intermediate_size
    attention = {f"self_attn.{name}_proj": (wide, wide) for name in "qkvo"}
    return attention | {"mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner)}


def write_base(folder: Path, config: LlamaConfig, shard_bytes: int) -> None:
    """A random model in bfloat16, written tensor by tensor, and a tokenizer of whole words."""
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, config.hidden_size)}
    for block in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in layer_shapes(config).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{block}.{norm}.weight"] = (config.hidden_size,)
    shapes |= {"model.norm.weight": (config.hidden_size,), "lm_head.weight": (VOCABULARY, config.hidden_size)}
    with ShardWriter(folder, max_shard_bytes=shard_bytes) as writer:
        for name, shape in shapes.items():
            writer.declare(name, torch.bfloat16, shape)
        for name, shape in shapes.items():
            writer.write(name, (torch.randn(shape) * 0.02).bfloat16())
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_adapter(folder: Path, base: Path, config: LlamaConfig) -> None:
    layers = [name.rpartition(".")[2] for name in layer_shapes(config)]
    LoraConfig(r=RANK, target_modules=layers, base_model_name_or_path=str(base)).save_pretrained(str(folder))
    tensors = {}
    for block in range(config.num_hidden_layers):
        for name, (rows, columns) in layer_shapes(config).items():
            key = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")


def resident(kind: str) -> int:
    """Bytes of resident memory of this process by the kernel: ``VmRSS`` is now, ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def merged_in_a_process(base: str, adapter: str, out: str, answer: Connection) -> None:
    from quantkit.merging import stage

    torch.set_num_threads(1)
    setattr(stage, "check_merge", lambda *_, **__: {"skipped": "not asked for"})  # noqa: B010  # the tool's own seam
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    merge_model(base, adapter, Path(out))
    answer.send((before, resident("VmHWM")))


def measure(depth: int, hidden: int, shard_bytes: int, work: Path) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 64,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    base, adapter, out = (work / f"{name}-{depth}" for name in ("base", "adapter", "out"))
    write_base(base, config, shard_bytes)
    write_adapter(adapter, base, config)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=merged_in_a_process, args=(str(base), str(adapter), str(out), sender))
    process.start()
    before, after = receiver.recv()
    process.join()
    reader = CheckpointReader(base)
    return {
        "blocks": depth,
        "model_mib": sum(reader.nbytes(name) for name in reader.names()) / MIB,
        "largest_tensor_mib": max(reader.nbytes(name) for name in reader.names()) / MIB,
        "peak_mib": (after - before) / MIB,
        "process_mib": after / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--shard-mib", type=int, default=64)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print(f"{'blocks':>6}  {'model':>9}  {'largest tensor':>14}  {'merge adds':>10}  {'process':>9}")
    for depth in given.depths:
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(depth, given.hidden, given.shard_mib * MIB, Path(scratch))
        rows.append(row)
        print(
            f"{row['blocks']:6d}  {row['model_mib']:5.0f} MiB  {row['largest_tensor_mib']:10.1f} MiB"
            f"  {row['peak_mib']:6.0f} MiB  {row['process_mib']:5.0f} MiB"
        )
    print(json.dumps({"hidden": given.hidden, "rank": RANK, "shard_mib": given.shard_mib, "rows": rows}))


if __name__ == "__main__":
    main()
