"""What each way to quantize loses: models x cases x calibration samples, on text like the calibration and unlike it.

    python benchmarks/quality.py --records alpaca.json --text wikitext.txt --models smollm2=FOLDER off=OTHER/FOLDER \
        --cases gptq-int4-g64-sym,awq+gptq-int4-g64-asym,gptq-nvfp4 --samples 16 64 --results quality.jsonl

A case is METHOD-SCHEME with options behind colons: ``gptq-int3-g64-asym``, ``gptq-int4-g64-sym:refinements=3``,
``rtn-int4-g64-sym:range=weighted``, ``gptq-int4-g64-sym:transforms=[{name: rotate, seed: 1}]``, ``gptq-mxfp4``,
``llama.cpp-q4_k_m``, ``gptq+tune-int4-g64-sym:tune.steps=16:tune.train=[scales,norms]``; or LIBRARY/METHOD-SCHEME for
another library in its own environment: ``autoround/autoround-int4-g64-sym:iters=50``, ``gptqmodel/gptq-int4-g64-sym``.
Behind ``=>recover`` it is trained on the same rows, with options likewise: ``gptq-int2-g64-sym=>recover``,
``gptq-int2-g64-sym=>recover:steps=60:train=[scales,norms]``. All calibrate on the same token ids. The divergence from
the float model is that of the reference decoder; with --llama-cpp GGUF files are scored in llama.cpp.

Inputs and the KV cache are rounded as the scheme says: ``gptq-w8a8``, ``gptq-int4-g64-sym-a8``, ``gptq-nvfp4-a4``,
``gptq-fp8-static:kv_cache=fp8``.

``gptq-auto:budget=3.5:choices=[int2,int3,int4]`` mixes schemes to a budget, ``budget.size=130MB`` to bytes of the file;
what choices cost is measured once for cases that differ in their budgets, and is in the seconds of the processor of the
first. ``random=1`` chooses at random instead, by that seed among some of the choices. The table tells the divergence
that mixes were predicted to have, and the rank correlation of predicted and measured over all mixes of a model.

``gptq-int4-g64-sym:token_weights=0.5`` weighs calibration tokens by what the model's loss minds; the pass backward that
finds it out is run once for a model and a number of samples, and is in the seconds of the processor of the first case.

Results are appended to a file as soon as they are there, and what is there is not run again, so that a matrix can be
cut short; --label tells code from code. The table has the divergence with its standard error over rows, and beside it
what it is of the baseline's, and the mean difference on the same rows with the standard error of that. The baseline is
the first case, or that of --baseline, or with --before the same case under another label. The last line is JSON.

``benchmarks/off_grid.py`` and ``benchmarks/narrow_model.py`` make models to try.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from scoring import machine, read_calibration
from transformers import AutoTokenizer

from quantkit import calibration
from quantkit.allocation.table import Unit
from quantkit.errors import QuantkitError
from quantkit.isolation.attempt import Attempt
from quantkit.isolation.stage import quantize_by_library
from quantkit.pipeline.mixing import Measured, Mixed, mixed
from quantkit.quantization import Job, quantize
from quantkit.quantization.sensitivity import sensitivity
from quantkit.recipe import CalibrationSpec, LibrarySpec, RecoverOptions, VariantSpec
from quantkit.recipe.mixing import AUTO, AutoSpec
from quantkit.recovery.stage import recover
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.system.progress import Silent
from quantkit.system.validation import parse_section

NAME_OF_MIX = re.compile(r"[^A-Za-z0-9._-]+")
HELD_OUT = 300
"""The first of the records that are scored; those before calibrate."""
OPTION = re.compile(r":(?=[A-Za-z_][\w.]*=)")
"""Before an option of a case: a colon within a value, as of ``{name: rotate}``, has no ``key=`` behind it."""
RECOVERY = "=>recover"
"""Behind a case: it is trained, with the options behind this."""
TEXTS = ("like", "unlike")


class Notes(Silent):
    """An observer that tells notes alone."""

    def note(self, text: str) -> None:
        """Print it."""
        print(f"  {text}", flush=True)


@dataclass(frozen=True, slots=True)
class Ground:
    """What the cases of a model and a number of samples share.

    Attributes:
        job: what is quantized, and the calibration rows.
        texts: what is scored: token ids ``[rows, length]`` by name.
        baseline: file of the float model's distributions.
        work: takes what cases share.
    """

    job: Job
    texts: dict[str, torch.Tensor]
    baseline: Path
    work: Path

    def weighed(self, token_weights: float) -> Job:
        """The job with tokens that count by what the model's loss minds; found out once."""
        known = sensitivity(
            self.job, self.work / "sensitivity", on_segment=lambda _done, _total: None, on_note=Notes().note
        )
        return replace(self.job, sensitivity=replace(known, token_weights=token_weights))

    def mixed(self, spec: AutoSpec, seed: int | None) -> Mixed:
        """A choice for every layer; what choices cost is measured once for all budgets."""
        found = mixed(self.job, spec, self.work, Measured(self.job, self.work, Notes()))
        return found if seed is None else at_random(found, spec, seed)


@dataclass(frozen=True, slots=True)
class Case:
    """What a case asks for.

    Attributes:
        variant: the variant.
        token_weights: the power by which tokens count; 0 for all alike.
        random: the seed by which a mix is chosen at random; None for one that is chosen well.
    """

    variant: VariantSpec | LibrarySpec
    token_weights: float = 0.0
    random: int | None = None


def read_case(text: str) -> Case:
    """What a case asks for.

    Raises:
        QuantkitError: no such method, scheme, library or option.
    """
    head, *given = OPTION.split(text.partition(RECOVERY)[0])
    options: dict[str, Any] = {}
    for key, read in (read_option(each) for each in given):
        outer, _, inner = key.partition(".")
        options[outer] = {**options.get(outer, {}), inner: read} if inner else read
    weights, seed = options.pop("token_weights", 0.0), options.pop("random", None)
    method, _, scheme = head.partition("-")
    library, _, theirs = method.rpartition("/")
    asked = {"name": "case", "scheme": scheme.replace("-", " ")}
    if scheme == AUTO:
        mix = {"name": NAME_OF_MIX.sub("-", text).strip("-")[:80], "bits": AUTO, "method": method}
        return Case(parse_section(AutoSpec, {**mix, **options}, text), weights, seed)
    if not library:
        return Case(parse_section(VariantSpec, {**asked, "method": method, **options}, text), weights)
    grid = parse_section(VariantSpec, asked, text)
    keys = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    chosen = {key: value for key, value in keys.items() if value is not None}
    theirs_too = {"name": "case", "library": library, "method": theirs, **chosen, **options}
    return Case(parse_section(LibrarySpec, theirs_too, text))


def read_option(text: str) -> tuple[str, Any]:
    """An option's name and value.

    Raises:
        QuantkitError: the value is no YAML.
    """
    key, _, value = text.partition("=")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise QuantkitError(
            f"option {key} of a case is no YAML: {value}", "write lists in [] and mappings in {}"
        ) from error


def read_recovery(text: str) -> RecoverOptions | None:
    """With what options a case is trained; None where it is not.

    Raises:
        QuantkitError: there is no such option.
    """
    _, arrow, told = text.partition(RECOVERY)
    if not arrow:
        return None
    return parse_section(RecoverOptions, dict(map(read_option, OPTION.split(told)[1:])), text)


def texts_of(given: argparse.Namespace, folder: Path, work: Path) -> dict[str, torch.Tensor]:
    """What is scored: token ids ``[rows, length]`` of later records and of another text."""
    records = json.loads(given.records.read_text(encoding="utf-8"))[HELD_OUT:]
    (work / "later.json").write_text(json.dumps(records), encoding="utf-8")
    spec = CalibrationSpec(
        dataset=str(work / "later.json"), samples=len(records), max_length=given.length, packing="full"
    )
    like = [list(row) for row in calibration.build(spec, folder, work / "later").rows if len(row) == given.length]
    some = given.text.read_text(encoding="utf-8")[: given.rows * given.length * 8]
    ids = AutoTokenizer.from_pretrained(folder)(some).input_ids
    unlike = [ids[start : start + given.length] for start in range(0, len(ids) - given.length + 1, given.length)]
    return {name: torch.tensor(rows[: given.rows]) for name, rows in zip(TEXTS, (like, unlike), strict=True)}


def log_probabilities(folder: Path, texts: dict[str, torch.Tensor], runtime: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of every next token, ``[length, vocabulary]`` for each row of each text, as the checkpoint says."""
    length = next(iter(texts.values())).shape[1]
    options = LoadOptions(device="cpu", dtype="float32", context_length=length)
    model: Any = RUNTIMES.get(runtime).load(folder, options)
    for name, rows in texts.items():
        for row in rows:
            with torch.inference_mode():
                yield name, model.logits(row).float().log_softmax(-1)


def float_baseline(folder: Path, texts: dict[str, torch.Tensor], cache: Path) -> Path:
    """The file of the float model's distributions: made once for a model and texts."""
    weights = sorted((each.name, each.stat().st_size, each.stat().st_mtime) for each in folder.glob("*.safetensors"))
    asked = [str(folder.resolve()), weights, {name: rows.tolist() for name, rows in texts.items()}]
    file = cache / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in texts}
        for name, row in log_probabilities(folder, texts, "reference"):
            found[name].append(row)
        part = file.with_suffix(".part")
        save_file({name: torch.stack(rows) for name, rows in found.items()}, part)
        part.rename(file)
    return file


def divergences(folder: Path, texts: dict[str, torch.Tensor], baseline: Path, runtime: str) -> dict[str, list[float]]:
    """The mean KL divergence of each row from the float model's distributions, by text."""
    found: dict[str, list[float]] = {name: [] for name in texts}
    with safe_open(baseline, "pt") as stored:
        for name, ours in log_probabilities(folder, texts, runtime):
            wanted = stored.get_slice(name)[len(found[name])]
            found[name].append(float((wanted.exp() * (wanted - ours)).sum(-1).mean()))
    return found


def prepare(given: argparse.Namespace, model: Path, samples: int, work: Path) -> Ground:
    """Read calibration and texts, and run the float model where nobody has."""
    wanted = argparse.Namespace(model=model, records=given.records, samples=samples)
    job = replace(read_calibration(wanted, work, inputs=given.inputs), generated=given.generated)
    texts = texts_of(given, job.source, work)
    return Ground(job, texts, float_baseline(job.source, texts, given.results.parent / "quality-cache"), work)


def at_random(found: Mixed, spec: AutoSpec, seed: int) -> Mixed:
    """The same with choices that are drawn for every unit, among some of those that there are."""
    draws = random.Random(seed)
    names = list(found.allocation.choices)
    some = draws.sample(names, draws.randint(2, len(names)))
    drawn = [draws.choice([name for name in some if name in unit.sizes] or [chosen]) for unit, chosen in _chosen(found)]
    allocation = found.allocation.with_choice(drawn)
    return Mixed(spec.with_choice(allocation), allocation)


def _chosen(found: Mixed) -> list[tuple[Unit, str]]:
    return list(zip(found.allocation.units, found.allocation.chosen, strict=True))


def rank_correlation(results: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's, of the predicted and the measured divergence of mixes, by model and text; of three mixes or more."""
    found = {}
    for model in dict.fromkeys(each["model"] for each in results):
        own = [each for each in results if each["model"] == model and "predicted" in each]
        for text in own[0]["kl"] if len(own) > 2 else ():
            pairs = [[each["predicted"], sum(each["kl"][text])] for each in own]
            ranks = torch.tensor(pairs, dtype=torch.float64).T.argsort().argsort().double()
            found[f"{model} {text}"] = float(torch.corrcoef(ranks)[0, 1])
    return found


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended: what others do meanwhile adds nothing."""
    return sum(os.times()[:4])


def runtime_of(folder: Path, llama_cpp: bool) -> str:
    """The name of the runtime that scores a checkpoint."""
    return "llama.cpp" if llama_cpp and any(folder.glob("*.gguf")) else "reference"


def measured(ground: Ground, case: Case, llama_cpp: bool, recovery: RecoverOptions | None = None) -> dict[str, Any]:
    """A case, quantized and scored: divergences by text and row, seconds, and bits."""
    with tempfile.TemporaryDirectory() as scratch:
        work, before = Path(scratch), processor_seconds()
        variant, predicted = case.variant, {}
        if isinstance(variant, AutoSpec):
            mix = ground.mixed(variant, case.random)
            variant, predicted = mix.variant, {"predicted": mix.allocation.predicted}
        if isinstance(variant, VariantSpec):
            job = ground.weighed(case.token_weights) if case.token_weights else ground.job
            done = quantize(job, variant, work / "case")
        else:
            done = quantize_by_library(Attempt(ground.job, variant, work / "case", work / "worker.log", Notes()))
        facts = {key: done.facts[key] for key in ("seconds", "bits_per_weight")}
        if recovery is not None:
            done = recover(ground.job, done.folder, recovery, work / "recovered", Notes())
            facts["seconds"] += done.facts["seconds"]
        busy = processor_seconds() - before
        kl = divergences(done.folder, ground.texts, ground.baseline, runtime_of(done.folder, llama_cpp))
    return {"kl": kl, **facts, **predicted, "cpu_seconds": busy, "calibration_tokens": sum(map(len, ground.job.rows))}


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean over rows, and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def place_of(result: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a result from another."""
    keys = ("label", "model", "case", "samples", "rows", "length", "inputs", "llama_cpp", "generated")
    return tuple(result.get(key) for key in keys)


def compared(result: dict[str, Any], base: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A line of the table for each text."""
    lines = []
    for text, rows in result["kl"].items():
        ours = torch.tensor(rows, dtype=torch.float64)
        mean, error = mean_and_error(ours)
        line = {key: result[key] for key in ("model", "samples", "case", "seconds", "cpu_seconds", "bits_per_weight")}
        line |= {"text": text, "kl": mean, "stderr": error}
        line |= {key: result[key] for key in ("predicted",) if key in result}
        if base is not None:
            theirs = torch.tensor(base["kl"][text], dtype=torch.float64)
            shift, shift_error = mean_and_error(ours - theirs)
            line |= {"ratio": mean / float(theirs.mean()), "shift": shift, "shift_stderr": shift_error}
        lines.append(line)
    return lines


def table(given: argparse.Namespace, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of all results under this label that were asked for, printed."""
    by_place = {place_of(each): each for each in results}
    lines: list[dict[str, Any]] = []
    for each in results:
        if each["label"] == given.label and each["case"] in given.cases and each["model"] in given.models:
            other = {"label": given.before} if given.before else {"case": given.baseline}
            lines += compared(each, by_place.get(place_of({**each, **other})))
    print(f"{'model':8} samples {'case':36} {'text':7} {'KL':>7}    error  ratio   shift    error    time     cpu")
    for line in lines:
        told = f"{line['model']:8} {line['samples']:7} {line['case']:36} {line['text']:7}"
        told += f" {line['kl']:7.4f} {line['stderr']:8.4f}"
        if "ratio" in line:
            told += f" {line['ratio']:6.3f} {line['shift']:+7.4f} {line['shift_stderr']:8.4f}"
        mix = f"  predicted {line['predicted']:.4f}" if "predicted" in line else ""
        print(f"{told:102} {line['seconds']:7.1f} {line['cpu_seconds']:7.1f}{mix}")
    own = [each for each in results if each["label"] == given.label and each["case"] in given.cases]
    for place, value in rank_correlation(own).items():
        print(f"{place}: rank correlation of predicted and measured divergence {value:.2f}")
    return lines


def split_cases(text: str) -> list[str]:
    """Cases that commas join; those within brackets and braces are parts of values."""
    return [case.strip() for case in re.split(r",(?![^\[]*\])(?![^{]*\})", text)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help=f"alpaca records; {HELD_OUT} and later are scored")
    parser.add_argument("--text", type=Path, required=True, help="text to score on, unlike the calibration")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="float checkpoints")
    parser.add_argument("--cases", required=True, help="joined by commas")
    parser.add_argument("--samples", type=int, nargs="+", default=[16], help="how many of the records calibrate")
    parser.add_argument("--rows", type=int, default=12, help="of each text that are scored")
    parser.add_argument("--length", type=int, default=256, help="of such a row, in tokens")
    parser.add_argument("--inputs", choices=("quantized", "float"), default="quantized", help="of the calibration")
    parser.add_argument("--generated", type=int, help="tokens that the float model writes beside them")
    parser.add_argument("--llama-cpp", action="store_true", help="score GGUF files in llama.cpp")
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"), help="file that results go to")
    parser.add_argument("--label", default="now", help="of these results, where code changes")
    parser.add_argument("--baseline", help="the case that others are compared with; the first if not given")
    parser.add_argument("--before", metavar="LABEL", help="compare each case with itself under another label")
    given = parser.parse_args()
    given.cases = split_cases(given.cases)
    given.baseline = given.baseline or given.cases[0]
    given.models = {name: Path(folder) for name, _, folder in (each.partition("=") for each in given.models)}
    if max(given.samples) > HELD_OUT:
        parser.error(f"at most {HELD_OUT} records calibrate; later ones are scored")
    return given


def run(given: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, str]:
    """Add what is asked for and not there to the results, and to their file; returns the errors of those that fail."""
    cases = {case: read_case(case) for case in given.cases}
    failed = {}
    there = {place_of(each) for each in results}
    for samples, (name, folder) in itertools.product(given.samples, given.models.items()):
        keys = {"label": given.label, "model": name, "samples": samples, "rows": given.rows, "length": given.length}
        keys |= {"inputs": given.inputs, "llama_cpp": given.llama_cpp, "generated": given.generated}
        missing = [case for case in cases if place_of({**keys, "case": case}) not in there]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            ground = prepare(given, folder, samples, Path(scratch))
            for case in missing:
                try:
                    done = measured(ground, cases[case], given.llama_cpp, read_recovery(case))
                    found = {**keys, "case": case, **done}
                except QuantkitError as error:
                    failed[f"{name} {samples} {case}"] = str(error)
                    print(f"{name} {samples} {case}: {error}", flush=True)
                    continue
                with given.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                results.append(found)
                told = [f"{text} {sum(rows) / len(rows):.4f}" for text, rows in found["kl"].items()]
                print(f"{name} {samples} {case}: KL {', '.join(told)}; {found['seconds']:.1f} s", flush=True)
    return failed


def main() -> None:
    given = parse()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    lines = given.results.read_text(encoding="utf-8").splitlines() if given.results.exists() else []
    results = [{"cpu_seconds": 0.0, **json.loads(line)} for line in lines]
    failed = run(given, results)
    print(json.dumps({"benchmark": "quality", "scores": table(given, results), "failed": failed, **machine()}))


if __name__ == "__main__":
    main()
