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
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.evaluation.texts import Windows
    from quantkit.runtimes.base import LoadedModel

FILES: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 64},
    "int4 gptq": {"bits": 4, "group_size": 64, "format": "gptq"},
    "int4 awq": {"bits": 4, "group_size": 64, "format": "awq", "symmetric": False},
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
        for model in chosen.model or [make_model(Path(work) / "tiny", vocab_size=320, **TINY)]:
            windows = windows_of(model, chosen.tokens)
            floats = Path(work) / f"{model.name}-float"
            with loaded("transformers", model) as whole:
                scored(whole, windows, writes=floats)
            for name in chosen.only:
                told.append(compared(model, name, windows, floats, chosen))
                print(line(told[-1]), flush=True)
    print(json.dumps(told))
    return 0 if all(each["passed"] for each in told) else 1


def compared(model: Path, name: str, windows: Windows, floats: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """What vLLM and the reference decoder find of one file."""
    import quantkit
    from quantkit.exports import open_export
    from quantkit.verification.comparison import tolerance

    out = floats.with_name(f"{model.name}-{name.replace(' ', '-')}")
    quantkit.quantize(model, out=out, method=chosen.method, dtype="bfloat16", device="cpu", **FILES[name])
    decoded = out.with_name(f"{out.name}-decoded")
    with loaded("reference", out) as decoder:
        by_decoder = scored(decoder, windows, against=floats)
        scored(decoder, windows, writes=decoded)
    with loaded("vllm", out, chosen.python) as server:
        by_server, apart = scored(server, windows, against=floats), scored(server, windows, against=decoded)
    allowed = tolerance("vllm", by_server["dtype"], open_export(out).schemes.values())
    return {
        "model": model.name,
        "file": name,
        "decoder": by_decoder,
        "vllm": by_server,
        "apart": {key: apart[key] for key in ("kl", "top1")},
        "allowed": {"kl": allowed.kl, "top1": allowed.top1},
        "passed": apart["kl"] <= allowed.kl and apart["top1"] >= allowed.top1,
    }


def windows_of(model: Path, tokens: int) -> Windows:
    """The bundled prose in windows of 512 tokens."""
    from quantkit.evaluation.texts import cut, load_text
    from quantkit.recipe import TextSpec
    from quantkit.runtimes._checkpoint import load_tokenizer

    text = load_text(TextSpec(name="prose", bundled="prose"), load_tokenizer(model, trust_remote_code=False), tokens)
    return cut(text, 512, tokens)


def loaded(runtime: str, path: Path, python: str | None = None) -> closing[LoadedModel]:
    """A checkpoint in a runtime: in float32, or in what vLLM takes by itself."""
    from quantkit.runtimes import RUNTIMES
    from quantkit.runtimes.base import LoadOptions

    dtype = None if python else "float32"
    return closing(RUNTIMES.get(runtime).load(path, LoadOptions(dtype=dtype, context_length=512, python=python)))


def scored(
    model: LoadedModel, windows: Windows, *, against: Path | None = None, writes: Path | None = None
) -> dict[str, Any]:
    """Perplexity, and divergence from the distributions in a folder; or they are written to one."""
    from quantkit.evaluation.reference import TextReader, text_writer
    from quantkit.evaluation.scoring import score

    if writes is not None:
        writes.mkdir()
        with text_writer(writes, windows, model.vocabulary) as writer:
            score(model, windows, writer=writer)
        return {}
    found = score(model, windows, reference=None if against is None else TextReader(against, windows))
    return {
        "dtype": model.dtype,
        "perplexity": found.perplexity,
        "kl": found.kl and found.kl.mean,
        "stderr": found.kl and found.kl.stderr,
        "top1": found.top1_agreement,
    }


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
