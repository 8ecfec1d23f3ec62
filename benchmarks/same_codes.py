"""Whether two versions of quantkit choose the same codes: digests of every exported tensor, written and compared.

A fixed list of variants is made of a tiny random model of each family of the tests, one of them in bfloat16 as well,
and a shorter list of every model folder that is named. All calibrated variants are solved in company, in one walk over
float inputs; some of them once more alone, and some over quantized inputs. Only the public interface of quantkit is
used, on one thread of the CPU, so that the file runs unchanged under an older version:

    PYTHONPATH=OLD_CHECKOUT python benchmarks/same_codes.py write old.json [--model FOLDER ...]
    python benchmarks/same_codes.py write new.json [--model FOLDER ...]
    python benchmarks/same_codes.py compare old.json new.json

``write`` notes the SHA-256 of dtype, shape and bytes of each tensor of a checkpoint. ``compare`` prints the layers that
differ and, last, one line of JSON; it exits with 1 if any differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

Variants = dict[str, dict[str, Any]]
Digests = dict[str, str]

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox")
LLM_INT8 = {"bits": 8, "group_size": -1, "activations": "dynamic"}
HALF_ZEROS = {"symmetric": False, "zeros": "float"}
Q4_0 = {"format": "gguf", "bits": 4}
Q4_1 = {"format": "gguf", **HALF_ZEROS}
FROM_WEIGHTS: Variants = {
    "rtn": {"method": "rtn"},
    "rtn-search": {"method": "rtn", "range": "search"},
    "rtn-asym": {"method": "rtn", "symmetric": False},
    "rtn-int8": {"method": "rtn", "bits": 8},
    "rtn-w8a8": {"method": "rtn", **LLM_INT8},
    "rtn-fp8": {"method": "rtn", "scheme": "fp8"},
    "rtn-fp8-tensor": {"method": "rtn", "scheme": "fp8", "granularity": "tensor"},
    "rtn-fp8-block": {"method": "rtn", "scheme": "fp8", "granularity": "block"},
    "rtn-mxfp4": {"method": "rtn", "scheme": "mxfp4"},
    "rtn-nvfp4": {"method": "rtn", "scheme": "nvfp4"},
    "rtn-gptq2": {"method": "rtn", "format": "gptq", "bits": 2, "symmetric": False},
    "rtn-awq": {"method": "rtn", "format": "awq", "symmetric": False},
    "rtn-nf4": {"method": "rtn", "format": "bitsandbytes", "scheme": "nf4"},
    "rtn-nf4-single": {"method": "rtn", "format": "bitsandbytes", "scheme": "nf4", "double_quant": False},
    "rtn-fp4-search": {"method": "rtn", "format": "bitsandbytes", "scheme": "fp4", "range": "search"},
    "rtn-llm-int8": {"method": "rtn", "format": "bitsandbytes", **LLM_INT8},
    "hqq": {"method": "hqq"},
    "hqq-asym": {"method": "hqq", "symmetric": False},
    "hqq-float": {"method": "hqq", "format": "hqq", **HALF_ZEROS},
    "hqq-step": {"method": "hqq", "format": "hqq", "beta_unit": "step", "kappa": 1.01, **HALF_ZEROS},
    "hqq-columns": {"method": "hqq", "format": "hqq", "axis": 0, **HALF_ZEROS},
    "rtn-q4_0": {"method": "rtn", **Q4_0},
    "rtn-q8_0": {"method": "rtn", "format": "gguf", "bits": 8, "embeddings": {}},
    "hqq-q4_1": {"method": "hqq", **Q4_1},
    "bfloat16": {"method": "none", "format": "float", "scheme": "bfloat16"},
}
CALIBRATED: Variants = {
    "rtn-weighted": {"method": "rtn", "range": "weighted"},
    "rtn-weighted-nf4": {"method": "rtn", "range": "weighted", "format": "bitsandbytes", "scheme": "nf4"},
    "gptq": {"method": "gptq"},
    "gptq-asym": {"method": "gptq", "format": "gptq", "symmetric": False},
    "gptq-3": {"method": "gptq", "format": "gptq", "bits": 3},
    "gptq-3-asym": {"method": "gptq", "bits": 3, "symmetric": False},
    "gptq-channel": {"method": "gptq", "format": "gptq", "group_size": -1},
    "gptq-desc-act": {"method": "gptq", "format": "gptq", "desc_act": True},
    "gptq-natural": {"method": "gptq", "activation_order": False, "search": 1, "negative_scales": False},
    "gptq-refined": {"method": "gptq", "refinements": 2, "damping": 0.1},
    "gptq-mixed": {
        "method": "gptq",
        "first_blocks": {"count": 1, "bits": 8},
        "overrides": {"(down_proj|dense_4h_to_h)$": {"scheme": "fp8"}},
    },
    "gptq-w8a8": {"method": "gptq", **LLM_INT8},
    "gptq-nf4": {"method": "gptq", "format": "bitsandbytes", "scheme": "nf4"},
    "gptq-mxfp4": {"method": "gptq", "scheme": "mxfp4"},
    "gptq-nvfp4": {"method": "gptq", "scheme": "nvfp4"},
    "gptq-q4_0": {"method": "gptq", "embeddings": {"bits": 8}, **Q4_0},
    "gptq-q4_1": {"method": "gptq", **Q4_1},
    "awq": {"method": "awq"},
    "awq-asym": {"method": "awq", "format": "awq", "symmetric": False},
    "awq-paper": {"method": "awq", "duo_scaling": False, "clip": False},
    "awq-nf4": {"method": "awq", "format": "bitsandbytes", "scheme": "nf4"},
    "awq-no-q": {"method": "awq", "format": "hqq", "ignore": ["lm_head", "q_proj"], **HALF_ZEROS},
    "awq-no-k": {"method": "awq", "format": "hqq", "ignore": ["lm_head", "k_proj"], **HALF_ZEROS},
    "awq+gptq": {"method": "awq+gptq"},
    "awq+gptq-desc-act": {"method": "awq+gptq", "format": "gptq", "desc_act": True},
    "awq+hqq": {"method": "awq+hqq", "format": "hqq", **HALF_ZEROS},
    "awq+rtn": {"method": "awq+rtn", **Q4_0},
    "llama.cpp-q4_0": {"method": "llama.cpp", **Q4_0},
}
WHOLE: Variants = {"rtn-whole": {"method": "rtn", "bits": 8, "ignore": [], "embeddings": {"scheme": "fp8"}}}
"""Head and embedding as well; made alone, since a head that cannot be read stops a walk for all of it."""
ALONE = ("rtn-weighted", "gptq-desc-act", "gptq-refined", "awq", "awq-no-q", "awq-no-k", "awq+gptq")
OVER_QUANTIZED = (
    "rtn-weighted",
    "gptq",
    "gptq-asym",
    "gptq-3",
    "gptq-channel",
    "gptq-desc-act",
    "gptq-mixed",
    "gptq-q4_0",
    "awq",
    "awq+gptq",
)
SHORT_LIST = ("rtn", "hqq", "rtn-weighted", "awq", "awq+gptq")
"""What is made in company of a model that is named; ``gptq`` over quantized inputs comes beside it."""


class NotScoredError(Exception):
    """A checkpoint is there and shall not be scored."""


class ScoresNothing:
    """An observer that fails every variant of a run once it is made, which spares scoring it."""

    def stage(self, title: str) -> None:
        if title.startswith("evaluate"):
            raise NotScoredError

    def progress(self, step: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Maker:
    """Makes the variants of one model.

    Args:
        model: folder of the float checkpoint.
        group_size: of every variant that has no size of its own.
        calibration: ``dataset``, ``samples`` and ``max_length``.
        work: an empty folder.
    """

    def __init__(self, model: Path, group_size: int, calibration: dict[str, Any], work: Path) -> None:
        self.model, self.group_size, self.calibration, self.work = model, group_size, calibration, work
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        fits = config.get("intermediate_size", 0) % group_size == 0
        self.ignore = ["lm_head"] if fits else ["lm_head", "down_proj"]

    def keys(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keys of a variant, with a group size where its scheme is that of integers."""
        sized = {"group_size": self.group_size} if "scheme" not in given else {}
        return {"format": "compressed-tensors", "ignore": self.ignore, **sized, **given}

    def in_company(self, variants: Variants) -> dict[str, Digests | None]:
        """All in one walk over float inputs; None stands for a variant that was refused."""
        import quantkit

        recipe = {
            "name": "company",
            "model": {"source": str(self.model)},
            "calibration": {**self.calibration, "inputs": "float"},
            "variants": [{"name": name.replace("+", "-"), **self.keys(each)} for name, each in variants.items()],
            "evaluation": {"texts": ["prose"], "context_length": 16, "max_tokens": 16, "metrics": ["perplexity"]},
            "report": {"folder": str(self.work / "company")},
        }
        report = quantkit.run(quantkit.Recipe.parse(json.dumps(recipe)), observer=ScoresNothing())
        made = self.work / "company" / "variants"
        found = {name: digests(made / name.replace("+", "-")) for name in variants}
        if not any(found.values()):
            print(f"{self.model.name}: nothing was made: {report['variants'][0]['error']}", flush=True)
        return found

    def alone(self, given: dict[str, Any], inputs: str) -> Digests | None:
        """One in a walk of its own."""
        import quantkit

        out = self.work / "alone"
        shutil.rmtree(out, ignore_errors=True)
        calibration = {**self.calibration, "inputs": inputs}
        try:
            quantkit.quantize(self.model, out=out, calibration=calibration, **self.keys(given))
        except quantkit.QuantkitError:
            return None
        return digests(out)

    def everything(self, together: Variants, alone: Variants, quantized: Variants) -> dict[str, Digests | None]:
        """Each variant by its name and how it was made."""
        found = {f"{name}, in company": made for name, made in self.in_company(together).items()}
        found |= {f"{name}, alone": self.alone(each, "float") for name, each in alone.items()}
        return found | {f"{name}, quantized": self.alone(each, "quantized") for name, each in quantized.items()}


def digests(folder: Path) -> Digests | None:
    """Of every tensor of a checkpoint by name; None if there is no checkpoint."""
    found: Digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= dict(safetensors_digests(file))
    for file in sorted(folder.glob("*.gguf")):
        found |= {
            f"{file.name}: {name}" if "imatrix" in file.name else name: tensor for name, tensor in gguf_digests(file)
        }
    return found or None


def safetensors_digests(file: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each tensor of a file in safetensors' format."""
    content = memoryview(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(bytes(content[8:start])).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, digest(entry["dtype"], entry["shape"], content[start + first : start + last])


def gguf_digests(file: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each tensor of a GGUF file."""
    from gguf import GGUFReader

    for tensor in GGUFReader(file).tensors:
        yield tensor.name, digest(tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())


def digest(dtype: str, shape: list[int], content: bytes | memoryview) -> str:
    """SHA-256 of a tensor, as hexadecimal digits."""
    found = hashlib.sha256(f"{dtype} {shape} ".encode())
    found.update(content)
    return found.hexdigest()


def write_records(file: Path, count: int, words: int) -> Path:
    """Records of made-up sentences, the same each time."""
    draw = random.Random(0)
    subjects = ("the river", "a doctor", "our neighbour", "the old clock", "she", "every student", "the committee")
    verbs = ("carries", "remembers", "measures", "explains", "does not mind", "sells", "follows")
    objects = ("the light of stars", "three letters", "a number below ten", "bread", "the question again", "an hour")
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            text = ""
            while len(text.split()) < words:
                text += f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}. ".capitalize()
            lines.write(json.dumps({"text": text.strip()}) + "\n")
    return file


def write(given: argparse.Namespace) -> int:
    """Make all variants of all models and write their digests."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    import quantkit

    torch.set_num_threads(1)
    found: dict[str, dict[str, Digests | None]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        short = {"dataset": str(write_records(work / "short.jsonl", 12, 30)), "samples": 12, "max_length": 96}
        long = {"dataset": str(write_records(work / "long.jsonl", 8, 250)), "samples": 8, "max_length": 512}
        for name, folder in tiny_models(work / "tiny", given.only):
            maker = Maker(folder, 32, short, work / f"of-{name}")
            together = FROM_WEIGHTS | CALIBRATED
            found[name] = told(name, folder, maker, together, chosen(ALONE) | WHOLE, chosen(OVER_QUANTIZED))
        for folder in given.model:
            maker = Maker(folder, 64, long, work / f"of-{folder.name}")
            found[folder.name] = told(folder.name, folder, maker, chosen(SHORT_LIST), {}, chosen(("gptq",)))
    content = {
        "quantkit": str(Path(quantkit.__file__).parent),
        "versions": {each: version(each) for each in ("torch", "transformers", "numpy")},
        "processor": platform.processor() or platform.machine(),
        "models": found,
    }
    given.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(json.dumps({"models": len(found), "variants": sum(map(len, found.values())), "out": str(given.out)}))
    return 0


def chosen(names: tuple[str, ...]) -> Variants:
    """The variants of these names."""
    return {name: (FROM_WEIGHTS | CALIBRATED)[name] for name in names}


def tiny_models(work: Path, only: list[str]) -> Iterator[tuple[str, Path]]:
    """A random model of each family, of the tests that belong to the quantkit that is imported."""
    import torch

    import quantkit

    sys.path.insert(0, str(Path(quantkit.__file__).parents[1]))
    from tests.tiny import make_model

    for family, dtype in [*((family, torch.float32) for family in FAMILIES), ("llama", torch.bfloat16)]:
        name = family if dtype == torch.float32 else f"{family}-bfloat16"
        if name in only:
            yield name, make_model(work / name, family, dtype=dtype)


def told(name: str, folder: Path, maker: Maker, *lists: Variants) -> dict[str, Digests | None]:
    """The variants of a model, and the digests of the model itself; says how long they took."""
    maker.work.mkdir()
    started = time.perf_counter()
    found = {"the float model": digests(folder), **maker.everything(*lists)}
    shutil.rmtree(maker.work)
    refused = [variant for variant, tensors in found.items() if tensors is None]
    print(f"{name:20} {len(found):3} variants, {time.perf_counter() - started:6.1f} s, refused: {refused}", flush=True)
    return found


def layer_of(tensor: str) -> str:
    """The layer to which a tensor belongs."""
    return tensor.split(".weight")[0] if ".weight" in tensor else tensor.rsplit(".", 1)[0]


def differing(old: Digests, new: Digests) -> list[str]:
    """The layers of which a tensor differs, or is in one of the two only."""
    return sorted({layer_of(name) for name in old.keys() | new.keys() if old.get(name) != new.get(name)})


def compare(given: argparse.Namespace) -> int:
    """Print what differs; 1 if anything does."""
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (given.old, given.new))
    for key in ("versions", "processor"):
        if old[key] != new[key]:
            print(f"{key} differ, which may change codes by itself: {old[key]}, {new[key]}")
    counts: Counter[str] = Counter()
    for model, variants in old["models"].items():
        for variant, before in variants.items():
            after = new["models"].get(model, {}).get(variant)
            verdict, detail = compared(before, after)
            counts[verdict] += 1
            if verdict != "same":
                print(f"{model:20} {variant:28} {verdict:10} {detail}")
    company = [(model, name) for model, variants in new["models"].items() for name in minds_company(variants)]
    for model, name in company:
        print(f"{model:20} {name:28} the new version gives other codes in company than alone")
    missing = sorted(new["models"].keys() - old["models"].keys())
    print(f"{sum(counts.values())} variants: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    print(json.dumps({**counts, "only_new": missing, "minds_company": len(company)}))
    return int(counts["same"] != sum(counts.values()))


def compared(before: Digests | None, after: Digests | None) -> tuple[str, str]:
    """A verdict in one word, and which layers it is about."""
    if before is None or after is None:
        if before is None and after is None:
            return "same", ""
        return ("made", "was refused or not there before") if before is None else ("missing", "refused or not there")
    layers = differing(before, after)
    every = {layer_of(name) for name in before.keys() | after.keys()}
    shown = ", ".join(layers[:4]) + (" ..." if len(layers) > 4 else "")
    return ("different", f"{len(layers)} of {len(every)} layers: {shown}") if layers else ("same", "")


def minds_company(variants: dict[str, Digests | None]) -> list[str]:
    """The variants whose codes in company are not those alone."""
    pairs = [(name, f"{name.removesuffix(', alone')}, in company") for name in variants if name.endswith(", alone")]
    return [alone for alone, together in pairs if together in variants and variants[alone] != variants[together]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write", help="make the variants and write their digests")
    writing.add_argument("out", type=Path)
    writing.add_argument("--model", type=Path, nargs="*", default=[], help="float checkpoint folders")
    writing.add_argument("--only", nargs="*", default=[*FAMILIES, "llama-bfloat16"], help="tiny models to make")
    writing.set_defaults(does=write)
    comparing = commands.add_parser("compare", help="print what differs between two files")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.set_defaults(does=compare)
    given = parser.parse_args()
    return int(given.does(given))


if __name__ == "__main__":
    sys.exit(main())
