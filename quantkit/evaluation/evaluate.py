"""Carry out a job in this process: texts, model, memory, speed, scores."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.divergence import in_words
from quantkit.evaluation.job import EvaluationJob, Progress, compute_dtype
from quantkit.evaluation.loading import Loading, choose_loading, streamed
from quantkit.evaluation.memory import MemoryWatch, checkpoint_bytes
from quantkit.evaluation.positions import read_positions, write_positions
from quantkit.evaluation.reference import TextReader, check_reference, prepare_folder, text_writer, write_index
from quantkit.evaluation.scoring import TextScore, score
from quantkit.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, measure_speed
from quantkit.evaluation.stage_peak import warm_up
from quantkit.evaluation.tasks_and_answers import TasksAndAnswers, tasks_and_answers
from quantkit.evaluation.texts import Windows, cut, load_text
from quantkit.recipe.evaluation import STREAMED
from quantkit.records import Record
from quantkit.runtimes._checkpoint import load_config, load_tokenizer
from quantkit.runtimes._model import listed
from quantkit.runtimes._streamed import LOAD_WHOLE
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime
from quantkit.system.devices import device_name, resolve_device
from quantkit.system.free_memory import kept_to
from quantkit.system.garbage import no_garbage_collection
from quantkit.system.os_errors import cpu_ran_out

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KL_FIGURES = ("mean", "stderr", "median", "p99", "p999", "max")


def evaluate(job: EvaluationJob, progress: Progress) -> dict[str, Any]:
    """Score a checkpoint.

    Memory is taken after loading, one forward pass over a window and the speed runs, and before the scoring,
    whose own buffers are not the model's.

    Returns:
        ``metrics``: ``perplexity``, ``kl_divergence`` (:data:`KL_FIGURES`) and ``top1_agreement``, each by
        text; ``texts``: how each was cut, its token ids' hash, sums over it and over each of its windows, llama.cpp's
        table of divergence, and the tokens furthest from the reference;
        ``size_bytes``; ``loaded_by``, the runtime's name, or ``streamed`` where a block was read at a time, of which
        ``notes`` tell why and what was left out; ``rounded_inputs``, what the reference decoder rounded the inputs of
        layers to; ``memory`` and ``speed``, None where the job does not ask, and for a model that the reference decoder
        loaded those of float weights, which ``memory.weights_are`` says; ``peak``, that of the whole process, see
        :meth:`MemoryWatch.whole`; ``seconds``; ``environment``; what :meth:`TasksAndAnswers.score` gives; and
        ``samples``, see :func:`quantkit.evaluation.samples.samples`.

    Raises:
        EvaluationError: the checkpoint cannot be loaded, a text is too short, logits are NaN, tokens differ
            from the reference's, or the reference would be too large.
        CalibrationError: a text cannot be read.
        OutputError: the reference or the answers cannot be written.
        MissingDependencyError: a package that a task or a metric needs is not installed.
    """
    started = time.perf_counter()
    device = resolve_device(job.spec.device)
    options = _load_options(job, device)
    with no_garbage_collection():  # transformers imports most of itself for a tokenizer
        tokenizer = load_tokenizer(job.checkpoint, trust_remote_code=job.trust_remote_code)
        config = load_config(job.checkpoint, trust_remote_code=job.trust_remote_code)
    windows, conversations = _cut_texts(job, tokenizer, progress)
    known = read_positions(job.known, windows)
    unread = {name: text.after(known[name].shape[1] if known else 0) for name, text in windows.items()}
    loading = choose_loading(job, options, unread)
    _check_job(job, config, windows)
    with tasks_and_answers(job, config, tokenizer) as others, _memory_errors(device), ExitStack() as ends:
        ends.enter_context(kept_to(device, job.bounds))
        prompts = others.prompts(conversations, windows)
        needed = prompts.context_length if prompts else 0
        options = replace(options, context_length=max(options.context_length, others.context_length, needed))
        if device.type == "cpu":
            warm_up()
        watch = MemoryWatch(device, own_allocator=loading.runtime.own_allocator)
        model, loading = _load(job, loading, options, unread, ends, progress)
        ends.enter_context(closing(model))
        if not model.writes:
            others, prompts, loading = _without_writing(others, loading, job)
        watch.loaded(model)
        memory, speed = _run_once(job, loading.runtime, model, next(iter(windows.values())), watch)
        scores = {name: _score_text(job, model, text, known.get(name), progress) for name, text in windows.items()}
        other_metrics, other_facts = others.score(model, progress)
        read = others.samples(model, prompts, progress) if prompts else None
    if job.writes_reference and job.reference is not None:
        write_index(job.reference, windows, config.vocab_size, job.known_reference)
    if job.positions is not None:
        write_positions(job.positions, windows, scores)
    if memory is not None:
        memory["weights_are"] = loading.weights_are
    return {
        "metrics": _metrics(job, scores) | other_metrics,
        "texts": {name: _text_facts(text, scores[name], tokenizer) for name, text in windows.items()},
        "size_bytes": checkpoint_bytes(job.checkpoint),
        "loaded_by": loading.name,
        "notes": [*loading.notes, *_dropped(loading, model)],
        "rounded_inputs": list(model.rounded_inputs),
        "memory": memory,
        "speed": speed,
        "peak": watch.whole(),
        "seconds": time.perf_counter() - started,
        "environment": _environment(model),
        **other_facts,
        **({} if read is None else {"samples": read}),
    }


def _load_options(job: EvaluationJob, device: torch.device) -> LoadOptions:
    spec = job.spec
    return LoadOptions(
        device=str(device),
        dtype=compute_dtype(spec.dtype, device.type, served=job.is_served),
        context_length=max(spec.context_length, PROMPT_TOKENS + NEW_TOKENS),
        trust_remote_code=job.trust_remote_code,
        python=spec.python,
        batch=max(spec.batch_sizes) if "speed" in spec.metrics else 1,
    )


def _cut_texts(
    job: EvaluationJob, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[dict[str, Windows], dict[str, tuple[Record, ...]]]:
    """The windows of each text, and the conversations at its beginning."""
    spec, total = job.spec, len(job.spec.texts)
    windows, conversations = {}, {}
    progress("texts", 0, total)
    for done, text in enumerate(spec.texts, start=1):
        most = job.reach.get(text.name, spec.max_tokens)
        tokens = load_text(text, tokenizer, most)
        windows[text.name] = cut(tokens, spec.context_length, most, spec.bos)
        conversations[text.name] = tokens.conversations
        progress("texts", done, total)
    return windows, conversations


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


def _load(
    job: EvaluationJob,
    loading: Loading,
    options: LoadOptions,
    windows: Mapping[str, Windows],
    ends: ExitStack,
    progress: Progress,
) -> tuple[LoadedModel, Loading]:
    """The model; one that is read a block at a time has read all texts, or is loaded whole where that is not asked."""
    progress("load", 0, 1)
    if loading.streams:
        try:
            found, notes = _read_ahead(job, options, windows, ends, progress)
        except EvaluationError as error:
            if job.spec.loader == STREAMED or error.remedy != LOAD_WHOLE:
                raise
            loading = Loading(loading.runtime, notes=(*loading.notes, f"loaded whole all the same: {error.problem}"))
        else:
            return found, replace(loading, notes=(*loading.notes, *notes))
        gc.collect()  # what was tried refers to itself, and memory is short
    model = loading.runtime.load(job.checkpoint, options)
    progress("load", 1, 1)
    return model, loading


def _read_ahead(
    job: EvaluationJob, options: LoadOptions, windows: Mapping[str, Windows], ends: ExitStack, progress: Progress
) -> tuple[LoadedModel, list[str]]:
    """A model that has read all texts a block at a time, with notes; nothing is left of one that cannot."""
    with ExitStack() as own:
        model, notes = own.enter_context(streamed(job, options, windows))
        progress("load", 1, 1)
        rows = [row for text in windows.values() for row in text.ids]
        model.read_ahead(rows, lambda done, total: progress("blocks", done, total))
        ends.enter_context(own.pop_all())
    return model, notes


def _without_writing(
    others: TasksAndAnswers, loading: Loading, job: EvaluationJob
) -> tuple[TasksAndAnswers, None, Loading]:
    """What is asked of a model that does not write, with a note of what is not."""
    kept, left = others.without_writing()
    left = [*(["speed"] if "speed" in job.spec.metrics else []), *left]
    note = f"left out, as each token would read all weights anew: {', '.join(left)}"
    return kept, None, replace(loading, notes=(*loading.notes, *([note] if left else [])))


def _dropped(loading: Loading, model: LoadedModel) -> list[str]:
    """A note of what a runtime did not use of a file."""
    if not model.dropped:
        return []
    told = f"{loading.name} was given {len(model.dropped)} tensors that it did not use: {listed(model.dropped)}"
    return [told]


def _run_once(
    job: EvaluationJob, runtime: type[Runtime], model: LoadedModel, text: Windows, watch: MemoryWatch
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Run the model as a server would, and take its memory and speed; None for what the job does not ask.

    Memory comes first: at its first forward pass a runtime may do what it never does again, such as decode the weights.
    The speed of a model that computes from weights which were decoded is that of a float model, and taken briefly.
    """
    memory = speed = None
    loaded = model.weights_bytes()
    if "memory" in job.spec.metrics:
        if model.writes:
            watch.run(model, text.ids[0])
        memory = watch.figures(model)
    if "speed" in job.spec.metrics and model.writes:
        is_decoded = not runtime.packed or model.weights_bytes() > loaded
        speed = measure_speed(model, text.ids[0], job.spec.batch_sizes, is_warm=memory is not None, briefly=is_decoded)
    return memory, speed


def _score_text(
    job: EvaluationJob, model: LoadedModel, text: Windows, known: torch.Tensor | None, progress: Progress
) -> TextScore:
    def on_window(done: int, total: int) -> None:
        progress(text.name, done, total)

    progress(text.name, 0, len(text.ids))
    with ExitStack() as stack:
        writer = reader = None
        if job.writes_reference and job.reference is not None:
            begun = None if job.known_reference is None else TextReader(job.known_reference, text)
            writer = stack.enter_context(text_writer(job.reference, text, model.vocabulary, begun))
        elif job.compares and job.reference is not None:
            reader = TextReader(job.reference, text)
        return score(model, text, reference=reader, writer=writer, on_window=on_window, known=known)


def _metrics(job: EvaluationJob, scores: Mapping[str, TextScore]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if "perplexity" in job.spec.metrics:
        metrics["perplexity"] = {name: text.perplexity for name, text in scores.items()}
    if "kl_divergence" in job.spec.metrics and job.compares:
        metrics["kl_divergence"] = {
            name: {figure: getattr(text.kl, figure) for figure in KL_FIGURES}
            for name, text in scores.items()
            if text.kl is not None
        }
    if "top1_agreement" in job.spec.metrics and job.compares:
        metrics["top1_agreement"] = {name: text.top1_agreement for name, text in scores.items()}
    return metrics


def _text_facts(text: Windows, score: TextScore, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How a text was cut, and what two runs on the same windows are compared by."""
    found = {
        **text.facts(),
        "nll_sum": score.nll_sum,
        "nll_count": score.nll_count,
        "nll_by_window": list(score.nll_by_window),
    }
    if score.kl is None or score.kl_by_window is None or score.agreements_by_window is None:
        return found
    return found | {
        "stderr_over": score.kl.stderr_over,
        "kl_by_window": list(score.kl_by_window),
        "agreements_by_window": list(score.agreements_by_window),
        "divergence": score.table,
        "departures": in_words(score.departures, text.ids, tokenizer),
    }


def _environment(model: LoadedModel) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **model.facts(),
        **({"settings": dict(model.settings)} if model.settings else {}),
        "device": model.device,
        "dtype": model.dtype,
    }


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not cpu_ran_out(error):
            raise
        where = "the CPU" if cpu_ran_out(error) else device_name(device)
        raise EvaluationError(
            f"{where} has not enough memory for the model",
            "set evaluation.loader: streamed, lower evaluation.context_length, or take an evaluation.dtype of 16 bits",
        ) from error
