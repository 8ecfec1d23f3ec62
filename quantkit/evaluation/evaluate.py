"""Carry out a job in this process: texts, model, memory, speed, scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.job import EvaluationJob, Progress
from quantkit.evaluation.loading import (
    Loader,
    choose_loader,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from quantkit.evaluation.memory import MemoryWatch, checkpoint_bytes, device_name
from quantkit.evaluation.reference import TextReader, check_reference, prepare_folder, text_writer, write_index
from quantkit.evaluation.scoring import TextScore, score
from quantkit.evaluation.speed import dtype_name, forward, measure_speed
from quantkit.evaluation.texts import load_text
from quantkit.evaluation.windows import Windows, cut

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def evaluate(job: EvaluationJob, progress: Progress) -> dict[str, Any]:
    """Score a checkpoint.

    Memory is taken after loading, one forward pass over a window and the speed runs, and before the scoring,
    whose own buffers are not the model's.

    Returns:
        ``metrics``: ``perplexity``, ``kl_divergence`` (``mean``, ``stderr``, ``median``, ``p99``) and
        ``top1_agreement``, each by text; ``texts``: how each was cut, its token ids' hash and sums;
        ``size_bytes``; ``loaded_by``, ``transformers`` or ``reference``; ``memory`` and ``speed``, None where the
        job does not ask, and for a model that the reference decoder loaded those of float weights, which
        ``memory.weights_are`` says; ``seconds``; ``environment``.

    Raises:
        EvaluationError: the checkpoint cannot be loaded, a text is too short, logits are NaN, tokens differ
            from the reference's, or the reference would be too large.
        CalibrationError: a text cannot be read.
        OutputError: the reference cannot be written.
    """
    started = time.perf_counter()
    device = resolve_device(job.spec.device)
    loader = choose_loader(job.checkpoint, job.spec.loader, resolve_dtype(job.spec.dtype, device))
    windows = _cut_texts(job, progress)
    config = load_config(job.checkpoint, trust_remote_code=job.trust_remote_code)
    _check_job(job, config, windows)
    with _memory_errors(device):
        watch = MemoryWatch(device)
        model = _load(job, loader, device, progress)
        watch.loaded(model)
        memory, speed = _run_once(job, model, next(iter(windows.values())), watch)
        if memory is not None:
            memory["weights_are"] = "decoded to float" if loader == "reference" else "as loaded by transformers"
        scores = {name: _score_text(job, model, text, progress) for name, text in windows.items()}
    if job.writes_reference and job.reference is not None:
        write_index(job.reference, windows, config.vocab_size)
    return {
        "metrics": _metrics(job, scores),
        "texts": {name: {**text.facts(), **_sums(scores[name])} for name, text in windows.items()},
        "size_bytes": checkpoint_bytes(job.checkpoint),
        "loaded_by": loader,
        "memory": memory,
        "speed": speed,
        "seconds": time.perf_counter() - started,
        "environment": _environment(model),
    }


def _cut_texts(job: EvaluationJob, progress: Progress) -> dict[str, Windows]:
    tokenizer = load_tokenizer(job.checkpoint, trust_remote_code=job.trust_remote_code)
    spec, total = job.spec, len(job.spec.texts)
    windows = {}
    for done, text in enumerate(spec.texts, start=1):
        windows[text.name] = cut(load_text(text, tokenizer, spec.max_tokens), spec.context_length, spec.max_tokens)
        progress("texts", done, total)
    return windows


def _check_job(job: EvaluationJob, config: PreTrainedConfig, windows: Mapping[str, Windows]) -> None:
    """Check what can be checked before the model is loaded."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and job.spec.context_length > longest:
        raise EvaluationError(
            f"evaluation.context_length is {job.spec.context_length}, and the model reads {longest} tokens at most",
            f"set it to {longest} or less",
        )
    vocabulary: int = config.vocab_size
    for name, text in windows.items():
        if text.ids.max().item() >= vocabulary:
            raise EvaluationError(
                f"the tokenizer gives token id {text.ids.max().item()} in text '{name}', and the model's vocabulary"
                f" has {vocabulary}",
                "the checkpoint's tokenizer belongs to another model",
            )
    if job.writes_reference and job.reference is not None:
        prepare_folder(job.reference, windows, vocabulary, job.spec.reference_limit)
    elif job.compares:
        if job.reference is None:
            raise EvaluationError(
                "kl_divergence and top1_agreement need the float model's reference", "score the float model first"
            )
        check_reference(job.reference, windows, vocabulary)


def _load(job: EvaluationJob, loader: Loader, device: torch.device, progress: Progress) -> PreTrainedModel:
    progress("load", 0, 1)
    trusted = job.trust_remote_code
    model = load_model(job.checkpoint, device=device, dtype=job.spec.dtype, trust_remote_code=trusted, loader=loader)
    progress("load", 1, 1)
    return model


def _run_once(
    job: EvaluationJob, model: PreTrainedModel, text: Windows, watch: MemoryWatch
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Run the model as a server would, and take its memory and speed; None for what the job does not ask."""
    memory = speed = None
    if "speed" in job.spec.metrics:
        speed = measure_speed(model, text.ids[0])
    if "memory" in job.spec.metrics:
        forward(model, text.ids[:1].to(model.device))
        memory = watch.figures(model)
    return memory, speed


def _score_text(job: EvaluationJob, model: PreTrainedModel, text: Windows, progress: Progress) -> TextScore:
    def on_window(done: int, total: int) -> None:
        progress(text.name, done, total)

    with ExitStack() as stack:
        writer = reader = None
        if job.writes_reference and job.reference is not None:
            vocabulary = model.config.get_text_config().vocab_size
            writer = stack.enter_context(text_writer(job.reference, text, vocabulary))
        elif job.compares and job.reference is not None:
            reader = TextReader(job.reference, text)
        return score(model, text, reference=reader, writer=writer, on_window=on_window)


def _metrics(job: EvaluationJob, scores: Mapping[str, TextScore]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if "perplexity" in job.spec.metrics:
        metrics["perplexity"] = {name: text.perplexity for name, text in scores.items()}
    if "kl_divergence" in job.spec.metrics and job.compares:
        metrics["kl_divergence"] = {
            name: {"mean": text.kl.mean, "stderr": text.kl.stderr, "median": text.kl.median, "p99": text.kl.p99}
            for name, text in scores.items()
            if text.kl is not None
        }
    if "top1_agreement" in job.spec.metrics and job.compares:
        metrics["top1_agreement"] = {name: text.top1_agreement for name, text in scores.items()}
    return metrics


def _sums(text: TextScore) -> dict[str, Any]:
    sums: dict[str, Any] = {"nll_sum": text.nll_sum, "nll_count": text.nll_count}
    return sums if text.kl is None else {**sums, "stderr_over": text.kl.stderr_over}


def _environment(model: PreTrainedModel) -> dict[str, Any]:
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(model.device),
        "dtype": dtype_name(model),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"{device_name(device)} has not enough memory for the model",
            "lower evaluation.context_length, choose an evaluation.dtype of 16 bits, or set evaluation.device to cpu",
        ) from error
