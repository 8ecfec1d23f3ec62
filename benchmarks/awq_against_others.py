"""4-bit AWQ of the same model on the same token ids: quantkit against gptqmodel and llm-compressor, divergence.

Both live in environments of their own. All quantize the float model asymmetrically with group size 64 from the same
calibration rows. gptqmodel's file is decoded to float weights and llm-compressor writes such, so that all are scored
by the same code on the same tokens. The last line is JSON.

    python benchmarks/awq_against_others.py --model FOLDER --records alpaca.json --text wikitext.txt \
        --gptqmodel-python /path/to/venv/bin/python --llmcompressor-python /path/to/other/venv/bin/python
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scoring import Setting, arguments, machine, prepare, print_scores, scores

from quantkit.checkpoint.companions import copy_companions
from quantkit.quantization import Wanted, quantize_together
from quantkit.recipe import VariantSpec

GPTQMODEL = """
import json, sys
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FORMAT, METHOD
model, rows, out = sys.argv[1:]
ids = json.load(open(rows))
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
config = QuantizeConfig(bits=4, group_size=64, sym=False, method=METHOD.AWQ, format=FORMAT.GEMM)
loaded = GPTQModel.load(model, config, device="cpu")
loaded.quantize(data, batch_size=1)
loaded.save(out)
"""

LLMCOMPRESSOR = """
import json, sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from transformers import AutoModelForCausalLM
if not torch.cuda.is_available():  # release 0.14 pins memory, which fails where there is no accelerator
    torch.Tensor.pin_memory = lambda tensor, *rest: tensor
model, rows, out = sys.argv[1:]
ids = json.load(open(rows))
data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
oneshot(
    model=loaded,
    dataset=data,
    recipe=[AWQModifier(ignore=["lm_head"], config_groups=groups)],
    max_seq_length=512,
    num_calibration_samples=len(ids),
)
loaded.save_pretrained(out, save_compressed=False)
"""
ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Places of eight neighbouring outputs in a word of AWQ's gemm layout."""


def run(python: str, code: str, *arguments: Path) -> None:
    """Run a library's code in its environment."""
    subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        env={"PATH": "/usr/bin:/bin", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=arguments[-1].parent,
    )


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 ``[rows, outputs / 8]`` to codes ``[rows, outputs]``."""
    shifts = torch.arange(0, 32, 4)
    return ((words.unsqueeze(-1) >> shifts) & 15)[..., ORDER].flatten(1).float()


def decode_awq(checkpoint: Path, model: Path, out: Path) -> None:
    """Write gptqmodel's AWQ file as a float checkpoint."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*", "stage.json"))
    stored = load_file(checkpoint / "model.safetensors")
    packed = ("qweight", "qzeros", "scales")
    weights = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] not in packed}
    for name in [name for name in stored if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        codes, zeros = unpacked(stored[name]), unpacked(stored[f"{layer}.qzeros"])
        size = codes.shape[0] // zeros.shape[0]
        scales = stored[f"{layer}.scales"].float().repeat_interleave(size, 0)
        weights[f"{layer}.weight"] = ((codes - zeros.repeat_interleave(size, 0)) * scales).T
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, out / "model.safetensors")


def scored(checkpoint: Path, setting: Setting, who: str) -> dict[str, dict[str, float]]:
    """The scores of a checkpoint, printed as soon as they are there."""
    found = scores(checkpoint, setting.folder, setting.texts)
    print_scores({who: found})
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gptqmodel-python")
    parser.add_argument("--llmcompressor-python")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        setting = prepare(given, work, inputs="float")
        asymmetric = {"symmetric": False}
        wanted = [
            Wanted(
                VariantSpec.model_validate({**asymmetric, "name": name.replace("+", "-"), "method": name}), work / name
            )
            for name in ("awq", "awq+gptq")
        ]
        found = {}
        for each, outcome in zip(wanted, quantize_together(setting.job, wanted), strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            found[f"quantkit {each.variant.name}"] = scored(each.out, setting, each.variant.name)
        if given.gptqmodel_python:
            run(given.gptqmodel_python, GPTQMODEL, setting.folder, setting.rows_file, work / "gptqmodel")
            decode_awq(work / "gptqmodel", setting.folder, work / "decoded")
            found["gptqmodel awq"] = scored(work / "decoded", setting, "gptqmodel awq")
        if given.llmcompressor_python:
            run(given.llmcompressor_python, LLMCOMPRESSOR, setting.folder, setting.rows_file, work / "llmcompressor")
            copy_companions(setting.folder, work / "llmcompressor")  # it saves the model alone
            found["llm-compressor"] = scored(work / "llmcompressor", setting, "llm-compressor awq")
    print(json.dumps({"scores": found, "tokens": sum(map(len, setting.job.rows)), **machine()}))


if __name__ == "__main__":
    main()
