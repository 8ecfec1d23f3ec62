"""4-bit GPTQ of the same model on the same token ids: quantkit against gptqmodel, time and divergence.

gptqmodel lives in an environment of its own, named by --gptqmodel-python. Both quantize the float model with
group size 64, symmetric, from the same calibration rows; only the quantization is timed, not loading and
saving. gptqmodel's file is decoded to float weights, so that both are scored by the same code on the same
tokens. Runs alternate, and the ratio of each pair is printed; the last line is JSON.

    python benchmarks/gptq_against_gptqmodel.py --model FOLDER --records alpaca.json --text wikitext.txt \
        --gptqmodel-python /path/to/other/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import calibration
from quantkit.quantization import Job, quantize
from quantkit.recipe import CalibrationSpec, ModelSpec, VariantSpec
from quantkit.source import resolve

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


def scores(checkpoint: Path, model: Path, texts: list[dict[str, str]]) -> dict[str, Any]:
    """KL divergence by text."""
    result = quantkit.evaluate(
        checkpoint,
        texts=texts,
        reference=model,
        context_length=512,
        max_tokens=24 * 512,
        metrics=["perplexity", "kl_divergence"],
    )
    return {
        text: {"kl": result["metrics"]["kl_divergence"][text]["mean"], "perplexity": value}
        for text, value in result["metrics"]["perplexity"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records; the first 128 calibrate")
    parser.add_argument("--text", type=Path, required=True, help="text to score on, unlike the calibration")
    parser.add_argument("--gptqmodel-python", required=True)
    parser.add_argument("--pairs", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        records = json.loads(given.records.read_text(encoding="utf-8"))
        (work / "calibration.json").write_text(json.dumps(records[:128]), encoding="utf-8")
        (work / "held-out.json").write_text(json.dumps(records[300:]), encoding="utf-8")
        texts = [{"name": "unlike", "file": str(given.text)}, {"name": "held-out", "file": str(work / "held-out.json")}]
        source = resolve(ModelSpec(source=str(given.model)), work)
        spec = CalibrationSpec(dataset=str(work / "calibration.json"), samples=128, max_length=512)
        rows = calibration.build(spec, source.folder, work / "calibration").rows
        (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        pairs = []
        for pair in range(given.pairs):
            job = Job(source.folder, source.made_from(), source.dtype, rows, "benchmark")
            ours = quantize(job, VariantSpec(name="gptq", group_size=GROUP_SIZE), work / f"ours-{pair}")
            theirs = with_gptqmodel(given.gptqmodel_python, source.folder, work / "rows.json", work / f"theirs-{pair}")
            pairs.append((ours.facts["seconds"], theirs))
            print(f"pair {pair}: quantkit {pairs[-1][0]:.1f} s with export, gptqmodel {theirs:.1f} s", flush=True)
        decode_gptq(work / "theirs-0", source.folder, work / "decoded")
        found = {
            "quantkit": scores(work / "ours-0", source.folder, texts),
            "gptqmodel": scores(work / "decoded", source.folder, texts),
        }
    for who, by_text in found.items():
        for text, figures in by_text.items():
            print(f"{who:10} {text:10} KL {figures['kl']:.4f} perplexity {figures['perplexity']:.3f}")
    ratios = [ours / theirs for ours, theirs in pairs]
    machine = {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"seconds": pairs, "ratios": ratios, "scores": found, "tokens": sum(map(len, rows)), **machine}))


if __name__ == "__main__":
    main()
