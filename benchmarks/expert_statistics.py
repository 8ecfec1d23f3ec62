"""What calibrating experts with their layer's statistics gains: divergence of a mixture, beside the dense model's.

The mixture, such as ``benchmarks/split_mixture.py`` makes, and the dense model are rounded to nearest and solved by
GPTQ from a few records and from more. Experts get their own statistics alone (a prior of 0), these blended with those
of their layer, or those of all tokens. Each checkpoint is decoded and compared with its own float model on a text. The
last line is JSON.

    python benchmarks/expert_statistics.py --model FOLDER --mixture FOLDER --records alpaca.json --text wikitext.txt
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scoring import arguments, machine, read_calibration
from transformers import AutoTokenizer

from quantkit.engine.routing import ExpertSettings
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions

LENGTH = 512


def log_probabilities(folder: Path, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of every next token, ``[length, vocabulary]`` for each row, as the checkpoint says."""
    model: Any = RUNTIMES.get("reference").load(folder, LoadOptions(device="cpu", dtype="float32"))
    for row in rows:
        with torch.inference_mode():
            yield model.logits(row).float().log_softmax(-1)


def divergences(folder: Path, rows: torch.Tensor, wanted: list[torch.Tensor]) -> torch.Tensor:
    """KL divergence from the float model's distributions, the mean of each row."""
    both = zip(log_probabilities(folder, rows), wanted, strict=True)
    return torch.stack([(ours.exp() * (ours - theirs)).sum(-1).mean() for theirs, ours in both])


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean over rows, and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def compared(job: Job, cases: dict[str, tuple[str, ExpertSettings]], rows: torch.Tensor, work: Path) -> dict[str, Any]:
    """The divergence of each case as soon as it is there, and how far it is from the first one, row by row."""
    wanted = list(log_probabilities(job.source, rows))
    found: dict[str, Any] = {}
    first: torch.Tensor | None = None
    for name, (method, experts) in cases.items():
        keys = {"name": name, "method": method, "bits": 4, "group_size": 64, "symmetric": True}
        variant = VariantSpec.model_validate(keys)
        (done,) = quantize_together(replace(job, experts=experts), [Wanted(variant, work / name)])
        if not isinstance(done, Quantized):
            raise done
        values = divergences(done.folder, rows, wanted)
        first = values if first is None and method != "rtn" else first
        mean, error = mean_and_error(values)
        shift, shift_error = (0.0, 0.0) if first is None else mean_and_error(values - first)
        few = sum(table["few"] for table in done.facts["experts"])
        found[name] = {"kl": mean, "stderr": error, "seconds": done.facts["seconds"], "few": few}
        found[name] |= {"from_first": shift, "from_first_stderr": shift_error}
        seconds = done.facts["seconds"]
        print(f"{job.source.name:12} {name:16} KL {mean:.4f} +- {error:.4f}", end="  ")
        print(f"from the first {shift:+.4f} +- {shift_error:.4f}  {seconds:6.0f} s", flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mixture", type=Path, required=True, help="float checkpoint folder of a mixture")
    parser.add_argument("--few", type=int, nargs="+", default=[8, 64], help="how many records calibrate")
    parser.add_argument("--alone", action="store_true", help="the mixture without the dense model and rtn")
    parser.add_argument("--priors", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--all", action="store_true", help="with all tokens for all experts, too")
    parser.add_argument("--rows", type=int, default=12, help=f"of {LENGTH} tokens that are scored")
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(given.model)(text).input_ids[: given.rows * LENGTH]
    rows, found, mixture = torch.tensor(ids).view(-1, LENGTH), dict[str, Any](), given.mixture
    plain = ExpertSettings()
    for samples in given.few:
        given.samples = samples
        first = {"rtn": ("rtn", plain)} if samples == given.few[0] and not given.alone else {}
        experts = {f"gptq-prior-{prior:g}": ("gptq", ExpertSettings(prior=prior)) for prior in given.priors}
        experts |= {"gptq-all": ("gptq", ExpertSettings("all"))} if given.all else {}
        dense = [] if given.alone else [(given.model, first | {"gptq": ("gptq", plain)})]
        for folder, cases in (*dense, (mixture, first | experts)):
            with tempfile.TemporaryDirectory() as scratch:
                given.model = folder
                job = read_calibration(given, Path(scratch))
                print(f"{samples} records, {sum(map(len, job.rows))} tokens", flush=True)
                found[f"{folder.name} {samples}"] = compared(job, cases, rows, Path(scratch))
    print(json.dumps({"benchmark": "expert_statistics", "scores": found, **machine()}))


if __name__ == "__main__":
    main()
