"""Files as vLLM scores them beside the reference decoder: whether its kernels compute what the file says.

Of each model some files are written and scored twice on the same windows: by vLLM's own kernels, and by the reference
decoder in float32, which rounds inputs where the file says so. Prints for each what it loses from the float model by
the one and by the other, and how far the two are apart, then a line of JSON; ends with 1 if they are further apart than
the tolerance of `quantkit verify`.

    python benchmarks/vllm_scores.py --python vllm-env/bin/python [--model FOLDER ...] [--only int4 ...] [--tokens 4096]

Without a model a tiny Llama is made, whose weights are random: it tells whether the layout is read, and no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FILES: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 64},
    "int4 gptq": {"bits": 4, "group_size": 64, "format": "gptq"},
    "int4 awq": {"bits": 4, "group_size": 64, "format": "awq", "symmetric": False},
    "int8": {"bits": 8, "group_size": 64},
    "w8a8": {"bits": 8, "group_size": -1, "activations": "dynamic"},
}
TINY: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}


def main() -> int:
    """Quantize, score twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--model", nargs="*", type=Path, default=[])
    parser.add_argument("--only", nargs="*", choices=list(FILES), default=list(FILES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--method", default="rtn")
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.tiny import make_model

    told = []
    with tempfile.TemporaryDirectory() as work:
        # vLLM fills a head to multiples of 64, and fails on gptq's where that adds any
        models = chosen.model or [make_model(Path(work) / "tiny", vocab_size=320, **TINY)]
        for model in models:
            floats = Path(work) / f"{model.name}-float"
            scored(model, floats, "transformers", chosen.tokens, writes=True)
            for name in chosen.only:
                told.append(compared(model, name, floats, Path(work), chosen))
                print(line(told[-1]), flush=True)
    print(json.dumps(told))
    return 0 if all(each["passed"] for each in told) else 1


def compared(model: Path, name: str, floats: Path, work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """What vLLM and the reference decoder find of one file."""
    import quantkit
    from quantkit.exports import open_export
    from quantkit.verification.comparison import tolerance

    out = work / f"{model.name}-{name.replace(' ', '-')}"
    quantkit.quantize(model, out=out, method=chosen.method, dtype="bfloat16", device="cpu", **FILES[name])
    decoded = out.with_name(f"{out.name}-decoded")
    decoder = scored(out, floats, "reference", chosen.tokens)
    scored(out, decoded, "reference", chosen.tokens, writes=True)
    served = scored(out, floats, "vllm", chosen.tokens, python=chosen.python)
    apart = scored(out, decoded, "vllm", chosen.tokens, python=chosen.python)
    allowed = tolerance("vllm", served["dtype"], open_export(out).schemes.values())
    passed = apart["kl"] <= allowed.kl and apart["top1"] >= allowed.top1
    allowed_in_words = {"kl": allowed.kl, "top1": allowed.top1}
    return {
        "model": model.name,
        "file": name,
        "decoder": decoder,
        "vllm": served,
        "apart": {key: apart[key] for key in ("kl", "top1")},
        "allowed": allowed_in_words,
        "passed": passed,
    }


def scored(
    path: Path, logprobs: Path, loader: str, tokens: int, *, writes: bool = False, python: str | None = None
) -> dict[str, Any]:
    """Perplexity of a checkpoint, and its divergence from the log-probabilities in a folder, unless it writes these."""
    from quantkit.evaluation import EvaluationJob, run_job
    from quantkit.recipe import EvaluationSpec
    from quantkit.system.validation import parse_section

    metrics = ["perplexity", "kl_divergence", "top1_agreement"]
    given = {"texts": "prose", "max_tokens": tokens, "metrics": metrics, "loader": loader, "python": python}
    spec = parse_section(EvaluationSpec, {**given, "device": "cpu", "samples": False}, "evaluation")
    job = EvaluationJob(path.absolute(), spec, logprobs, writes_reference=writes)
    found = run_job(job, log=logprobs.with_name(f"{path.name}-{loader}.log"))
    figures = {"perplexity": found["metrics"]["perplexity"]["prose"], "dtype": found["environment"]["dtype"]}
    if writes:
        return figures
    divergence = found["metrics"]["kl_divergence"]["prose"]
    agreement = found["metrics"]["top1_agreement"]["prose"]
    return {**figures, "kl": divergence["mean"], "stderr": divergence["stderr"], "top1": agreement}


def line(found: dict[str, Any]) -> str:
    """One file's figures."""
    decoder, served, apart = found["decoder"], found["vllm"], found["apart"]
    return (
        f"{found['model']:12} {found['file']:10} {'passed' if found['passed'] else 'FAILED'}: from the float model "
        f"KL {decoder['kl']:.5f} decoded, {served['kl']:.5f} served ({served['dtype']}); "
        f"perplexity {decoder['perplexity']:.4f} and {served['perplexity']:.4f}; "
        f"apart KL {apart['kl']:.2g}, top-1 {apart['top1']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
