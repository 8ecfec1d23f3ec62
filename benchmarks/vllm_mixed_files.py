"""Files that hold several schemes, loaded by vLLM and compared with the reference decoder.

vLLM's CPU build (0.32) has kernels for packed integers of 4 bits alone. Where it has none, its own code reads the
config, finds each layer's scheme and places the tensors, and torch computes with what is unpacked from them: that tells
whether the file is what vLLM reads, not whether its kernels for CUDA compute it. Prints a line for each mix.

    python benchmarks/vllm_mixed_files.py --python vllm-env/bin/python [--only gptq ...]

vLLM's own interpreter runs the file, too, with a folder instead of options.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

QKV, GATE_UP = r"layers\.1\..*[qkv]_proj", r"layers\.1\..*(gate|up)_proj"
FLOAT = ["lm_head", r"layers\.0\..*[qkv]_proj", r"layers\.2\..*down_proj"]
INT4 = {"scheme": "int", "bits": 4, "group_size": 32}
MIXES: dict[str, dict[str, Any]] = {
    "int4 float": {"ignore": FLOAT, **INT4},
    "int4 int8 float": {"ignore": FLOAT, **INT4, "overrides": {"down_proj": "int8", QKV: "int8"}},
    "int2 to int8": {
        **INT4,
        "overrides": {QKV: "int2", GATE_UP: "int3", r"layers\.2\.self": "int5", "down_proj": "int6", "o_proj": "int8"},
    },
    "int4 fp8": {**INT4, "overrides": {"down_proj": "fp8", QKV: "fp8"}},
    "nvfp4 fp8 float": {"scheme": "nvfp4", "ignore": FLOAT, "overrides": {"down_proj": "fp8", QKV: "fp8"}},
    "mxfp4 fp8": {"scheme": "mxfp4", "overrides": {"down_proj": "fp8", QKV: "fp8"}},
    "nvfp4 int4": {"scheme": "nvfp4", "overrides": {"down_proj": INT4}},
    "int4 with inputs in 8 bits": {**INT4, "overrides": {"down_proj": "W8A8", QKV: "FP8_DYNAMIC"}},
    "gptq int4 float": {"format": "gptq", "ignore": FLOAT, **INT4},
    "gptq int4 int8 float": {
        "format": "gptq",
        "ignore": FLOAT,
        **INT4,
        "overrides": {"down_proj": "int8", GATE_UP: {"group_size": 64}},
    },
    "int4 and an int8 head": {**INT4, "ignore": [], "overrides": {"lm_head": "int8"}},
    "gptq int4 and an int8 head": {"format": "gptq", **INT4, "ignore": [], "overrides": {"lm_head": "int8"}},
    "awq int4 float": {"format": "awq", "ignore": FLOAT, **INT4, "symmetric": False},
}
"""The keys of variants."""
SCRIPT = "QUANTKIT_VLLM_SCRIPT"


def main() -> None:
    """Quantize, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--only", nargs="*", default=[""])
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import quantkit
    from quantkit.runtimes import vllm
    from tests.tiny import make_model

    os.environ[SCRIPT] = str(vllm.SCRIPT)
    vllm.SCRIPT = Path(__file__).resolve()
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
    shape["vocab_size"] = 320  # vLLM fills a head to multiples of 64, and fails on gptq's where that adds any
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work) / "float", **shape)
        for name in (each for each in MIXES if any(part in each for part in chosen.only)):
            out = Path(work) / name.replace(" ", "-")
            quantkit.quantize(model, out=out, method="rtn", dtype="bfloat16", device="cpu", **MIXES[name])
            verdict = quantkit.verify(out, runtime="vllm", python=chosen.python, device="cpu")
            told = f"KL {verdict['figures']['kl']:.1e}" if verdict["passed"] else str(verdict["reason"])[:400]
            print(f"{name:28} {'passed' if verdict['passed'] else 'FAILED'}, {told}", flush=True)


def emulate() -> None:
    """Let torch compute with layers for which vLLM's CPU build has no kernel."""
    import torch
    from vllm.model_executor.kernels import linear  # type: ignore[import-not-found]  # vLLM is in the other interpreter
    from vllm.model_executor.layers.quantization import auto_gptq  # type: ignore[import-not-found]
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (  # type: ignore[import-not-found]
        compressed_tensors_w4a4_mxfp4,
        compressed_tensors_w4a4_nvfp4,
        compressed_tensors_w8a16_fp8,
    )
    from vllm.model_executor.parameter import permute_param_layout_  # type: ignore[import-not-found]
    from vllm.platforms.interface import PlatformEnum  # type: ignore[import-not-found]

    fp4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def codes_of(words: Any, bits: int) -> Any:
        """int32 ``[rows, n]`` to ``[rows, columns]``: a dense stream of bits along each row."""
        flat = words.contiguous().view(torch.uint8)
        stream = (flat[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(words.shape[0], -1, bits)
        return (stream.int() << torch.arange(bits, dtype=torch.int32)).sum(-1)

    class Computed:
        """Computes with the weight that it has unpacked."""

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return torch.nn.functional.linear(x, layer.unpacked.to(x.dtype), bias)

    class Integers(Computed, linear.MPLinearKernel):  # type: ignore[misc]
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            if self.config.zero_points:
                raise NotImplementedError("zero points are not emulated")
            words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
            permute_param_layout_(words, input_dim=1, output_dim=0, packed_dim=1)
            permute_param_layout_(scales, input_dim=1, output_dim=0)
            bits = self.config.weight_type.size_bits
            codes, scale = codes_of(words.data, bits) - (1 << bits - 1), scales.data.float()
            layer.unpacked = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)

    class Floats(Computed):
        """8-bit floats ``[in, out]`` with a scale per channel, or two E2M1 numbers to a byte with a scale per group."""

        def process_weights_after_loading(self, layer: Any) -> None:
            weight, scale = layer.weight.data, layer.weight_scale.data
            if weight.dtype == torch.float8_e4m3fn:
                layer.unpacked = weight.float().T * scale.float().reshape(-1, 1)
                return
            values = fp4[torch.stack([weight & 15, weight >> 4], dim=-1).reshape(weight.shape[0], -1).long()]
            sizes = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
            whole = getattr(layer, "weight_global_scale", torch.ones(()))
            layer.unpacked = values * sizes.repeat_interleave(values.shape[1] // sizes.shape[1], dim=1) * whole

    linear.register_linear_kernel(Integers, PlatformEnum.CPU, "mp")
    auto_gptq.verify_marlin_supported = lambda **given: None
    compressed_tensors_w8a16_fp8.init_wfp8_a16_linear_kernel = lambda **given: Floats()
    compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel = lambda **given: Floats()
    compressed_tensors_w4a4_nvfp4.expose_input_quant_key = lambda *given: None
    compressed_tensors_w4a4_mxfp4.init_mxfp4_linear_kernel = lambda **given: Floats()


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
