"""What the parts of the proof share: random models, a quantizing run with its figures, and scores of what it wrote."""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from gpu_proof.phases import timed
from quantkit.estimation import estimate
from quantkit.quantization import Job, Quantized, quantize
from quantkit.recipe import VariantSpec
from quantkit.runtimes.base import LoadedModel, LoadOptions
from quantkit.runtimes.reference import Reference
from quantkit.system.devices import synchronize

GPTQ: dict[str, Any] = {"name": "gptq", "method": "gptq", "bits": 4, "group_size": 128}


def random_llama(folder: Path, device: str, **shape: Any) -> Path:
    """A random Llama in bfloat16, with a tokenizer that other libraries find, and cannot use for much."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    del model
    _free()
    return folder


def random_rows(vocabulary: int, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids to calibrate or to score on."""
    draw = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(3, vocabulary, (rows, length), generator=draw).tolist()
    return found


def job_of(folder: Path, rows: Sequence[Sequence[int]], device: str, dtype: str = "bfloat16") -> Job:
    """A model of a dtype with these calibration rows, and none that it writes itself."""
    return Job(folder, {"reference": "proof"}, dtype, rows, "0" * 64, device=device, generated=0)


def digest(folder: Path) -> str:
    """Of the weights of a checkpoint."""
    found, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no safetensors in {folder}")
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                found.update(chunk)
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Run:
    """A quantizing run.

    Attributes:
        done: its result.
        seconds: it took.
        segments: when each block was done, in seconds from the start.
        phases: seconds by phase, of a run that was timed by phases.
        peak: bytes that torch had allocated on the card at most, and had reserved; None on a CPU.
    """

    done: Quantized
    seconds: float
    segments: tuple[float, ...]
    phases: dict[str, float]
    peak: tuple[int, int] | None

    def by_block(self) -> float:
        """Seconds of a block after the first, which also waits for what is loaded once."""
        first, last = self.segments[0], self.segments[-1]
        return (last - first) / (len(self.segments) - 1) if len(self.segments) > 1 else last


def run(job: Job, keys: dict[str, Any], out: Path, *, by_phase: bool = False) -> Run:
    """Quantize, and look at the clock and at the allocator."""
    device = torch.device(job.device)
    variant = VariantSpec.model_validate(keys)
    segments: list[float] = []
    _free()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    started = time.perf_counter()

    def reached(_done: int, _total: int) -> None:
        synchronize(device)
        segments.append(time.perf_counter() - started)

    phases: dict[str, float] = {}
    if by_phase:
        with timed(device) as clock:
            done = quantize(job, variant, out, on_segment=reached)
        phases = clock.seconds
    else:
        done = quantize(job, variant, out, on_segment=reached)
    synchronize(device)
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device.type == "cuda" else None
    return Run(done, seconds, tuple(segments), phases, peak)


def estimated(folder: Path, job: Job, keys: dict[str, Any]) -> int:
    """Bytes that ``quantkit estimate`` says quantizing takes, without what the device's runtime takes for itself."""
    plain = {key: value for key, value in keys.items() if key != "name"}
    found = estimate(str(folder), calibration_tokens=job.tokens, device=job.device, overhead=0, **plain)
    return found.part("quantizing").nbytes


@dataclass(frozen=True, slots=True)
class Scored:
    """A checkpoint that was loaded and read.

    Attributes:
        load, read: seconds of loading, and of the logits of all rows.
        prefill, decode: tokens a second.
        logits: of each row, float on the CPU.
    """

    load: float
    read: float
    prefill: float
    decode: float
    logits: list[torch.Tensor]


def score(folder: Path, rows: Sequence[Sequence[int]], device: str, new_tokens: int) -> Scored:
    """Load a checkpoint by the reference runtime and read rows with it."""
    _free()
    started = time.perf_counter()
    options = LoadOptions(device=device, dtype="bfloat16", context_length=len(rows[0]) + new_tokens)
    model = Reference.load(folder, options)
    synchronize(torch.device(device))
    load = time.perf_counter() - started
    ids = [torch.tensor(row) for row in rows]
    with torch.inference_mode():
        prefill, decode = _speed(model, ids[0], new_tokens)
        started = time.perf_counter()
        logits = [model.logits(each).to("cpu") for each in ids]
        read = time.perf_counter() - started
    del model
    _free()
    return Scored(load, read, prefill, decode, logits)


def divergence(reference: Scored, other: Scored, rows: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Mean ``KL(reference || other)`` in nats a token, and the perplexity of both."""
    total, losses, count = 0.0, [0.0, 0.0], 0
    for row, one, two in zip(rows, reference.logits, other.logits, strict=True):
        first, second = (each[:-1].float().log_softmax(-1) for each in (one, two))
        total += float((first.exp() * (first - second)).sum())
        targets = torch.tensor(row[1:]).unsqueeze(1)
        losses = [
            loss - float(each.gather(1, targets).sum()) for loss, each in zip(losses, (first, second), strict=True)
        ]
        count += len(targets)
    one_loss, two_loss = (math.exp(loss / count) for loss in losses)
    return total / count, one_loss, two_loss


def phases_in_words(phases: dict[str, float]) -> str:
    """Seconds by phase, the longest first."""
    ordered = sorted(phases.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in ordered)


def _speed(model: LoadedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    model.prefill(prompt)
    started = time.perf_counter()
    model.prefill(prompt)
    prefill = len(prompt) / (time.perf_counter() - started)
    _, each = model.decode(prompt[: len(prompt) // 2], new_tokens)
    return prefill, 1 / sorted(each)[len(each) // 2]


def _free() -> None:
    """Have the card's memory free of what is no longer used, so that peaks are those of what follows."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
