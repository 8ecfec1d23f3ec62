"""Compare a runtime with the reference decoder on a checkpoint: the verdict, kept beside its manifest, and in words."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantkit.errors import MissingDependencyError, QuantkitError, did_you_mean
from quantkit.exports.manifest import keep_verdict, read_manifest
from quantkit.formats import FORMATS
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._choice import check_adapter, check_turns, is_installed
from quantkit.runtimes.base import Runtime
from quantkit.source.view import loadable
from quantkit.system import names
from quantkit.system.devices import resolve_device
from quantkit.system.progress import Observer, Silent
from quantkit.verification.comparison import Figures, Tolerance, compare, tolerance
from quantkit.verification.job import SECONDS, VerificationJob, carry_out
from quantkit.verification.prompts import PROMPTS, Prompts, tokenize
from quantkit.verification.subject import Subject, read_subject
from quantkit.verification.traps import dropped_tensors, fused_layers, overflow

NEW_TOKENS = 32
LONGEST_TEXT = 100
"""Characters that are shown of what a runtime wrote."""
DTYPES = ("float32", "bfloat16", "float16")


def verify(
    checkpoint: str | Path,
    runtime: str,
    *,
    python: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    prompts: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    seconds: float = SECONDS,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Load a checkpoint in a runtime and compare its logits with those of the reference decoder.

    Each of the two runs in a fresh process. The verdict is kept in ``verified.json`` where quantkit exported the
    checkpoint.

    Args:
        checkpoint: a folder, or a GGUF file.
        runtime: a runtime's name.
        python: the interpreter of a runtime that has its own.
        device: ``auto`` is CUDA where there is one.
        dtype: compute dtype; by default float32 on a CPU and the checkpoint's own on CUDA, where the runtime does it.
        prompts: texts instead of the fixed ones.
        trust_remote_code: run Python code that comes with the checkpoint.
        seconds: that each of the two may take.
        observer: is told what happens.

    Returns:
        The verdict: ``runtime``, ``passed``, ``reason`` (None if passed), ``figures`` (``kl`` of the worst prompt,
        ``max_abs``, ``top1``, ``prompts``; None if there are no logits), ``tolerance``, ``generated`` (text or None),
        ``traps``, ``device``, ``dtype``, ``reference_dtype``, ``versions``, ``settings``, ``load_seconds``,
        ``peak_bytes``, ``prompts_sha256`` and ``when``.

    Raises:
        QuantkitError: the checkpoint is broken, so that the reference cannot decode it; or the runtime is not known or
            not installed.
    """
    watching, path = observer or Silent(), Path(checkpoint)
    chosen = RUNTIMES.get(runtime)
    chosen.check(python)
    place = str(resolve_device(device))
    with ExitStack() as stack:
        seen = stack.enter_context(loadable(path, trust_remote_code=trust_remote_code, tell=watching.note))
        subject = read_subject(seen, trust_remote_code=trust_remote_code)
        _check_packages(chosen, subject)
        check_adapter(seen, chosen)
        check_turns(seen, chosen)
        computed = _dtype(chosen, subject, place, dtype)
        texts = tokenize(seen, PROMPTS if prompts is None else prompts, trust_remote_code=trust_remote_code)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="quantkit-verify-"))
        job = _job(subject, chosen.name, place, computed, texts, _new(Path(scratch) / "runtime"), trust_remote_code)
        job = replace(job, python=python, seconds=seconds)
        expected = _reference_job(job, _new(Path(scratch) / "reference"))
        watching.stage(f"reference: {path} in {expected.dtype}")
        carry_out(expected)
        watching.stage(f"{chosen.name}: {path} in {computed}")
        verdict = _verdict(chosen, subject, job, expected, texts)
    _record(path, chosen.name, verdict)
    return verdict


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _check_packages(chosen: type[Runtime], subject: Subject) -> None:
    for package in chosen.requires(FORMATS.get(subject.format)):
        if not is_installed(package):
            raise MissingDependencyError(package, f"loading format {subject.format} in {chosen.name}")


def _dtype(runtime: type[Runtime], subject: Subject, device: str, wanted: str | None) -> str:
    """The dtype to compute in: what is wanted, else the most exact on a CPU and the checkpoint's own on CUDA."""
    if wanted is not None:
        meant = names.chosen(wanted, DTYPES)
        if meant is None:
            raise QuantkitError(f"'{wanted}' is no compute dtype", did_you_mean(wanted, DTYPES))
        return meant
    able = runtime.computes_in(FORMATS.get(subject.format), set(subject.schemes.values()), device)
    first = "float32" if device == "cpu" else subject.dtype
    return next(each for each in (first, "bfloat16", "float16", "float32") if each in able)


def _job(
    subject: Subject, runtime: str, device: str, dtype: str, texts: Prompts, folder: Path, trust_remote_code: bool
) -> VerificationJob:
    return VerificationJob(
        checkpoint=subject.path.absolute(),
        runtime=runtime,
        device=device,
        dtype=dtype,
        context_length=texts.longest + NEW_TOKENS,
        prompts=texts.ids,
        generate=texts.continued,
        new_tokens=NEW_TOKENS,
        folder=folder,
        trust_remote_code=trust_remote_code,
    )


def _reference_job(job: VerificationJob, folder: Path) -> VerificationJob:
    """The same for the reference, in float32 where the runtime computes in float16, which can overflow."""
    return replace(
        job,
        runtime="reference",
        python=None,
        dtype="float32" if job.dtype == "float16" else job.dtype,
        new_tokens=0,
        folder=folder,
    )


def _verdict(
    chosen: type[Runtime],
    subject: Subject,
    job: VerificationJob,
    expected: VerificationJob,
    texts: Prompts,
) -> dict[str, Any]:
    allowed = tolerance(chosen.name, job.dtype, subject.schemes.values())
    suspected = [fused_layers(subject.schemes, subject.layers, chosen.fused)]
    answer: dict[str, Any] = {}
    figures = reason = None
    try:
        answer = carry_out(job)
        figures = compare(expected.logits, job.logits, [len(ids) for ids in job.prompts])
    except MissingDependencyError:
        raise
    except QuantkitError as error:
        reason = str(error)
    else:
        suspected += [overflow(figures.finite, job.dtype), dropped_tensors(answer["dropped"])]
        reason = _reason(figures, allowed)
    traps = [trap for trap in suspected if trap is not None]
    if reason is not None:
        reason = "; ".join([reason, *(f"{trap.name}: {trap.found}" for trap in traps)])
    return {
        "runtime": chosen.name,
        "passed": reason is None,
        "reason": reason,
        "figures": figures and figures.to_json(),
        "tolerance": allowed.to_json(),
        "generated": texts.text(answer["generated"]) if answer else None,
        "traps": [trap.to_json() for trap in traps],
        "device": answer.get("device", job.device),
        "dtype": job.dtype,
        "reference_dtype": expected.dtype,
        **{key: answer.get(key) for key in ("versions", "settings", "load_seconds", "peak_bytes")},
        "prompts_sha256": texts.sha256,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _reason(figures: Figures, allowed: Tolerance) -> str | None:
    """Why a verdict fails; None where it passes."""
    if not figures.finite:
        return "logits are not finite"
    found = []
    if figures.kl > allowed.kl:
        found.append(f"KL {figures.kl:.2g} nats on the worst prompt, and {allowed.kl:.2g} is allowed")
    if figures.top1 < allowed.top1:
        found.append(f"the likeliest token is the same at {figures.top1:.1%}, and {allowed.top1:.1%} is asked for")
    if allowed.max_abs is not None and figures.max_abs > allowed.max_abs:
        found.append(f"logits differ by up to {figures.max_abs:.2g}, and {allowed.max_abs:.2g} is allowed")
    return "; ".join(found) or None


def _record(path: Path, runtime: str, verdict: dict[str, Any]) -> None:
    """Keep a verdict beside the manifest, where quantkit wrote one."""
    folder = path if path.is_dir() else path.parent
    if read_manifest(folder) is not None:
        keep_verdict(folder, runtime, verdict)


def verdict_lines(verdict: Mapping[str, Any]) -> Iterator[str]:
    """Whether a runtime passed, how far it was from the reference decoder, what it wrote, and the traps found."""
    state = "passed" if verdict["passed"] else "FAILED"
    yield f"{state}: {verdict['runtime']} in {verdict['dtype']} on {verdict['device']}"
    if verdict["reason"]:
        yield f"    reason     {verdict['reason']}"
    figures, allowed = verdict["figures"], verdict["tolerance"]
    if figures:
        limit = f"{allowed['kl']:.2g} is allowed ({allowed['because']})"
        yield f"    KL         {figures['kl']:.2g} nats from the reference decoder on the worst prompt; {limit}"
        yield f"    top token  the same at {figures['top1']:.1%} of positions; {allowed['top1']:.0%} is asked for"
    if verdict["generated"]:
        yield f"    it wrote   {verdict['generated']!r}"[: LONGEST_TEXT + 15]
    for trap in verdict["traps"]:
        yield f"    trap       {trap['name']}: {trap['found']}"
    if verdict["settings"]:
        yield f"    settings   {', '.join(f'{name}={value}' for name, value in verdict['settings'].items())}"
