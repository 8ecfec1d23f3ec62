"""4-bit GPTQ of the same model on the same token ids: quantkit against gptqmodel, time and divergence.

gptqmodel lives in an environment of its own, named by --gptqmodel-python. Both quantize the float model with
group size 64, symmetric, from the same calibration rows; only the quantization is timed, not loading and
saving. gptqmodel's file is decoded to float weights, so that both are scored by the same code on the same
tokens. Runs alternate, and the ratio of each pair is printed; the last line is JSON.

    python benchmarks/gptq_against_gptqmodel.py --model FOLDER --records alpaca.json --text wikitext.txt \
        --gptqmodel-python /path/to/other/venv/bin/python
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scoring import arguments, machine, prepare, print_scores, scores

from quantkit.quantization import quantize
from quantkit.recipe import VariantSpec

GROUP_SIZE = 64

OTHER = """
import json, sys, time
from gptqmodel import GPTQModel, QuantizeConfig
model, rows, out = sys.argv[1:]
ids = json.load(open(rows))
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64, sym=True), device="cpu")
started = time.perf_counter()
loaded.quantize(data, batch_size=1)
seconds = time.perf_counter() - started
loaded.save(out)
print(json.dumps({"seconds": seconds}))
"""


def with_gptqmodel(python: str, model: Path, rows: Path, out: Path) -> float:
    """Seconds that gptqmodel takes; its default of one CPU worker fails on two cores, so it is given two."""
    done = subprocess.run(
        [python, "-c", OTHER, str(model), str(rows), str(out)],
        env={"PATH": "/usr/bin:/bin", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def decode_gptq(checkpoint: Path, model: Path, out: Path) -> None:
    """Write gptqmodel's symmetric 4-bit file as a float checkpoint."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*", "stage.json"))
    stored = load_file(checkpoint / "model.safetensors")
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(QUANTIZED)}
    shifts = torch.arange(0, 32, 4).view(1, 8, 1)
    for name in [name for name in stored if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        codes = ((stored[name].unsqueeze(1) >> shifts) & 15).flatten(0, 1).float()
        scales = stored[f"{layer}.scales"].float()[stored[f"{layer}.g_idx"].long()]
        weights[f"{layer}.weight"] = ((codes - 8) * scales).T.contiguous()
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, out / "model.safetensors")


QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gptqmodel-python", required=True)
    parser.add_argument("--pairs", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        setting = prepare(given, work)
        pairs = []
        variant = VariantSpec.model_validate({"name": "gptq", "group_size": GROUP_SIZE})
        for pair in range(given.pairs):
            ours = quantize(setting.job, variant, work / f"ours-{pair}")
            theirs = with_gptqmodel(given.gptqmodel_python, setting.folder, setting.rows_file, work / f"theirs-{pair}")
            pairs.append((ours.facts["seconds"], theirs))
            print(f"pair {pair}: quantkit {pairs[-1][0]:.1f} s with export, gptqmodel {theirs:.1f} s", flush=True)
        decode_gptq(work / "theirs-0", setting.folder, work / "decoded")
        found = {
            "quantkit": scores(work / "ours-0", setting.folder, setting.texts),
            "gptqmodel": scores(work / "decoded", setting.folder, setting.texts),
        }
    print_scores(found)
    ratios = [ours / theirs for ours, theirs in pairs]
    tokens = sum(map(len, setting.job.rows))
    print(json.dumps({"seconds": pairs, "ratios": ratios, "scores": found, "tokens": tokens, **machine()}))


if __name__ == "__main__":
    main()
