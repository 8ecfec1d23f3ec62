"""Tiny mixtures in the formats that vLLM loads, loaded by it and compared with the reference decoder.

vLLM's CPU build (0.32) computes with packed experts on CPUs with AMX alone. `--emulate` has it load and unpack the file
by its own code and compute with the unpacked experts in torch, on any CPU: that tells whether the layout is what vLLM
reads. Prints a line for each model and format.

    python benchmarks/vllm_mixtures.py --python vllm-env/bin/python [--emulate] [--only qwen3_moe ...]

vLLM's own interpreter runs the file, too, with a folder instead of options.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
OWN = {**SIZES, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": (SIZES, {}),
    "qwen2_moe": ({**OWN, "shared_expert_intermediate_size": 64}, {}),
    "qwen3_moe": (OWN, {}),
    "olmoe": ({**SIZES, "num_key_value_heads": 4}, {}),
    "deepseek_v3": (
        {
            **OWN,
            "kv_lora_rank": 512,
            "head_dim": 64,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "q_lora_rank": 64,
        },
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "gpt_oss": (SIZES, {}),
}
"""Changes of the models of ``tests/architectures.py``, and what their vendors' configs say beside."""
FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {},
    "gptq": {},
    "awq": {"symmetric": False},
}
SCRIPT = "QUANTKIT_VLLM_SCRIPT"


def main() -> None:
    """Quantize, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from quantkit.runtimes import vllm

    if chosen.emulate:
        os.environ[SCRIPT] = str(vllm.SCRIPT)
        vllm.SCRIPT = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as work:
        for name in chosen.only:
            for form, options in FORMATS.items():
                found = tried(Path(work) / f"{name}-{form}", name, {"format": form, **options}, chosen.python)
                print(f"{name:12} {form:20} {found}", flush=True)


def tried(folder: Path, name: str, options: dict[str, Any], python: str) -> str:
    """What vLLM makes of a model in a format, in a line."""
    import quantkit
    from tests.architectures import make

    changes, vendor = MODELS[name]
    make(folder / "float", name, **changes)
    config = folder / "float" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | vendor))
    options = {"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu", **options}
    out = quantkit.quantize(folder / "float", out=folder / "out", **options)
    verdict = quantkit.verify(out, runtime="vllm", python=python, device="cpu")
    if verdict["passed"]:
        figures = verdict["figures"]
        return f"passed, KL {figures['kl']:.1e}"
    return str(verdict["reason"])[:200]


def emulate() -> None:
    """Let vLLM unpack experts for its emulation, and compute with them in torch."""
    import torch
    from torch.nn.functional import linear, silu
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe, int4_emulation_moe  # type: ignore[import-not-found]
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16  # type: ignore[import-not-found]
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq  # type: ignore[import-not-found]
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # type: ignore[import-not-found]
        compressed_tensors_moe_wna16,
    )

    class Emulated(cpu_moe.CPUUnquantizedExperts):  # type: ignore[misc]  # vLLM is in the other interpreter
        """Experts one after another."""

        def __init__(self, moe_config: Any, quant_config: Any) -> None:
            super().__init__(moe_config, quant_config)
            for each in (quant_config._w1, quant_config._w2):
                each.dtype = each.scale = None

        @staticmethod
        def is_supported_config(cls: Any, *args: Any) -> tuple[bool, None]:
            return True, None

        def apply(self, output: Any, **given: Any) -> None:
            ids, weights, states = given["topk_ids"], given["topk_weights"], given["hidden_states"]
            if given["activation"].value != "silu":
                raise NotImplementedError(f"experts with {given['activation'].value} are not emulated")
            total = torch.zeros_like(output, dtype=torch.float32)
            for expert, (inner, outer) in enumerate(zip(given["w1"], given["w2"], strict=True)):
                token, slot = (ids == expert).nonzero(as_tuple=True)
                read = states[token]
                gate, up = linear(read, inner.to(read.dtype)).chunk(2, -1)
                found = linear(silu(gate) * up, outer.to(read.dtype)).float()
                total.index_add_(0, token, found * weights[token, slot, None].float())
            output.copy_(total)

    original = int_wna16.convert_to_wna16_moe_kernel_format

    def convert(*args: Any, **given: Any) -> Any:
        """The emulation would take the stored zero points of symmetric gptq, which are one less, for the true ones."""
        if getattr(given["quant_config"], "is_sym", False):
            given |= {"w13_qzeros": None, "w2_qzeros": None}
        return original(*args, **given)

    int4_emulation_moe.Int4EmulationTritonExperts = Emulated
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.EMULATION]
    for module in (auto_awq, auto_gptq, compressed_tensors_moe_wna16):
        module.convert_to_wna16_moe_kernel_format = convert
    for module in (auto_awq, auto_gptq):
        module.check_moe_marlin_supports_layer = lambda *args, **more: True


def work(folder: str) -> int:
    """Answer requests by quantkit's own script, with the emulation in place."""
    spec = importlib.util.spec_from_file_location("_vllm_script", os.environ[SCRIPT])
    if spec is None or spec.loader is None:
        raise ImportError("quantkit's script for vLLM is missing")
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    load = script.load

    def loaded(*args: Any) -> Any:
        emulate()
        return load(*args)

    script.load = loaded
    code: int = script.main([folder])
    return code


if __name__ == "__main__":
    if SCRIPT in os.environ:
        sys.exit(work(sys.argv[1]))
    main()
