"""Definitions of a report's figures: each metric, and each text's own definition and counts."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.gates.precision import relative_error
from quantkit.report.columns import (
    DECODED_MARK,
    STREAMED_MARK,
    Record,
    is_decoded,
    is_streamed,
    reference_name,
    rows_of,
)
from quantkit.report.facts import Facts, present, words
from quantkit.report.numbers import ABSENT, count, figure, fixed, pick


def text_definitions(report: Record) -> list[tuple[str, str, Facts]]:
    """For each text its name, how its perplexity is defined, and the counts behind it."""
    found = []
    for name, about in (pick(report, "baseline", "texts") or {}).items():
        about = about if isinstance(about, Mapping) else {}
        facts = present(
            ("Tokens", count(about.get("tokens"))),
            ("Tokens scored", count(about.get("nll_count"))),
            ("Context length", count(about.get("context_length"))),
            ("Stride", count(about.get("stride"))),
            ("BOS", words(about.get("bos"))),
            ("Sum of negative log-likelihood, nats", fixed(figure(about, "nll_sum"), 4)),
            *_precision_facts(report, str(name)),
        )
        found.append((str(name), words(about.get("definition")), facts))
    return found


def _precision_facts(report: Record, text: str) -> Facts:
    """What precision was asked for, and of which file it is the least; nothing where none was."""
    asked, most = (figure(report, "recipe", "evaluation", key) for key in ("precision", "max_tokens"))
    if asked is None:
        return []
    known = [row for row in rows_of(report)[1:] if pick(row, "metrics") and pick(row, "texts", text)]
    errors = {str(row["name"]): relative_error(row, report["baseline"], text) for row in known}
    told = max(((error, name) for name, error in errors.items() if error is not None), default=None)
    return present(
        ("Relative standard error asked for", f"{asked:.2%}, within {count(most)} tokens"),
        ("The largest one", ABSENT if told is None else f"{told[0]:.2%}, of {told[1]}"),
    )


def definitions(report: Record) -> Facts:
    """What each metric of this report means."""
    reference = reference_name(report)
    rows = rows_of(report)
    found = [
        ("Size", "Bytes of the checkpoint's weight files on disk."),
        ("Bits per weight", "Stored bits per quantized weight, with the shares of scales and zero points."),
    ]
    if any((figure(row, "share") or 1) < 1 for row in rows):
        meaning = "Part of the weights in the decoder blocks' matrices that is quantized; notes say what stays float."
        found.append(("Of the blocks", meaning))
    if any(pick(row, "metrics", "perplexity") for row in rows):
        meaning = f"exp(sum of negative log-likelihood / tokens scored), as below; Δ is the change against {reference}."
        found.append(("Perplexity", meaning))
    if any(pick(row, "metrics", "kl_divergence") for row in rows):
        meaning = (
            f"KL({reference} ‖ quantized): how far the next-token distribution of the quantized model is from that "
            f"of {reference}, in nats per token, over the whole vocabulary; 0 is no loss. The mean over all scored "
            "tokens with its standard error, the median, and the 99th percentile (p99)."
        )
        found.append(("KL divergence", meaning))
    if any(pick(row, "metrics", "top1_agreement") for row in rows):
        meaning = f"Share of scored tokens at which the most likely next token is the same as that of {reference}."
        found.append(("Top-1", meaning))
    found += _further_definitions(report, rows) + _memory_definitions(rows) + _speed_definitions(rows)
    if any(row.get("layers") for row in rows):
        meaning = (
            "Squared error of a layer's output on the calibration tokens, as its method reports it; before is "
            "ahead of the method's own refinement, where it has one."
        )
        found.append(("Layer error", meaning))
    return found


def _further_definitions(report: Record, rows: list[Record]) -> Facts:
    found: Facts = []
    if any(pick(row, "metrics", kind) for row in rows for kind in ("tasks", "task_losses")):
        meaning = (
            "Scored by lm-evaluation-harness on the checkpoint as exported, with the standard error over documents; "
            "of each figure the task, the metric, and the filter where a task has several."
        )
        found.append(("Tasks", meaning))
    about = pick(report, "baseline", "answers")
    if about:
        left_out = "; ".join(f"{count(number)} {reason}" for reason, number in (about.get("left_out") or {}).items())
        meaning = (
            f"{count(about.get('questions'))} instructions that no variant was calibrated on, answered greedily, with "
            "the standard error over answers. Exact match is the share of answers that are the expected ones; ROUGE is "
            "the F-measure of their words in common." + (f" Records left out: {left_out}." if left_out else "")
        )
        found.append(("Answers", meaning))
    return found


def _memory_definitions(rows: list[Record]) -> Facts:
    kinds = dict.fromkeys((pick(row, "memory", "peak_kind"), pick(row, "memory", "device")) for row in rows)
    found: Facts = []
    for kind, device in kinds:
        if kind is None:
            continue
        where = f" on {device}" if device else ""
        meaning = {
            "RSS": f"Peak resident set size (RSS) of the evaluating process{where}: its code and libraries included.",
            "CUDA allocator": f"Peak bytes that PyTorch's CUDA allocator held{where}; the CUDA context is not in it.",
            "NVML": f"Bytes that the evaluating process held{where}, as the driver tells, the CUDA context included.",
        }
        found.append((f"Peak memory ({kind})", meaning.get(kind, f"Peak by {kind}{where}.")))
    found += _server_definition(rows) + _estimate_definitions(rows)
    weights = any(figure(row, "memory", "weights_bytes") is not None for row in rows)
    if not weights:
        return found
    resident = "Bytes that the weights take once loaded."
    if any(map(is_decoded, rows)):
        resident += (
            f" {DECODED_MARK} The reference decoder loaded the model as float weights: these bytes, the peak and the "
            "speed are those of a float model, and not of a runtime that keeps the weights packed."
        )
    if any(map(is_streamed, rows)):
        resident += (
            f" {STREAMED_MARK} The model was read a block at a time: these bytes are those of the largest block, "
            "decoded, and of what is around the blocks, and the peak is that of bringing all texts through it."
        )
    return [("Weights memory", resident), *found]


def _server_definition(rows: list[Record]) -> Facts:
    """What a server would hold, and why that is not what was measured here."""
    contexts = [value for row in rows if (value := figure(row, "server", "context")) is not None]
    if not contexts:
        return []
    meaning = (
        "Estimate of what a server holds that computes from the packed weights, such as vLLM, SGLang or llama.cpp: the "
        f"files as they lie on disk, the KV cache of one sequence of {count(max(contexts))} tokens in 16 bits, and "
        "activations, without what the device's runtime takes for itself (about 600 MiB on CUDA)."
    )
    if any(_unpacked_here(row) for row in rows[1:]):
        meaning += (
            " It is the figure to compare by size. What was measured here is more: the runtime that scored the file "
            "decodes packed weights, wholly or a layer at a time, so a 4-bit file can take more memory here than the "
            "float model, and does not on a server."
        )
    return [("On a server", meaning)]


def _unpacked_here(row: Record) -> bool:
    """Whether a row's weights were measured larger than its files, loaded or while it ran."""
    size = figure(row, "size_bytes")
    held = [figure(row, "memory", key) for key in ("weights_bytes", "weights_bytes_running")]
    return size is not None and any(value is not None and value > 1.1 * size for value in held)


def _estimate_definitions(rows: list[Record]) -> Facts:
    """What stands beside what, for the devices of the report."""
    if not any(pick(row, "memory", "estimates") for row in rows):
        return []
    kinds = {pick(row, "memory", "peak_kind") for row in rows}
    meaning = (
        "Memory that was taken while one window was read at once, at most, and how it compares with the estimate of "
        "weights, KV cache and activations, which knows the model's shapes alone."
    )
    if "RSS" in kinds:
        meaning += (
            " On a CPU it is what the resident set grew by since before the model was loaded: the code of libraries "
            "that is read at first use, weights that are mapped and not copied, and what the C library keeps of freed "
            "memory are in the measurement and not in the estimate. In small models they weigh."
        )
    if "CUDA allocator" in kinds:
        meaning += " On CUDA it is what PyTorch's allocator gave out since before the model was loaded."
    if "NVML" in kinds:
        meaning += " Where the runtime has its own allocator it is the whole process, estimated with its CUDA context."
    if any(pick(row, "memory", "peaks_are_of") == "process" for row in rows):
        meaning += " Here no peak could be begun anew, so each is that of all that came before it."
    return [("At prefill, estimated", meaning)]


def _speed_definitions(rows: list[Record]) -> Facts:
    places = dict.fromkeys((pick(row, "speed", "device"), pick(row, "speed", "threads")) for row in rows)
    found: Facts = []
    for device, threads in places:
        if device is not None:
            on = f" on {device}" + (f" with {threads} threads" if threads else "")
            meaning = f"Tokens per second{on}: prefill reads a prompt, decode writes one token after another."
            found.append(("Speed", meaning))
    return found
