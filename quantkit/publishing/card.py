"""The model card of an exported checkpoint: what it is, what was measured, how to load it, how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.checkpoint.model_class import class_name_in
from quantkit.checkpoint.older_keys import TOKENIZER_CONFIG, newer_than
from quantkit.errors import CheckpointError
from quantkit.exports import open_export
from quantkit.exports.manifest import CALIBRATION, EXPORT_AGAIN, MANIFEST, read_manifest, read_verdicts
from quantkit.formats import FORMATS
from quantkit.inspection.mixed import mix_in
from quantkit.inspection.parallel import tensor_parallel
from quantkit.publishing.front_matter import front_matter
from quantkit.publishing.markdown import code, fenced, plain, table
from quantkit.publishing.usage import Subject, usage
from quantkit.quantization.left_float import few
from quantkit.recipe.evaluation import STREAMED
from quantkit.report.served import served_by, served_losses, served_speeds
from quantkit.schemes import Scheme, scheme_from_json
from quantkit.source.model import decoded_from
from quantkit.system.artifacts import read_json, write_text
from quantkit.system.units import finite, percentage

if TYPE_CHECKING:
    from quantkit.quantization import Job

CARD = "README.md"
RECIPE = "recipe.yaml"
NOT_MEASURED = "Not measured."
BLOCKS = "the reference decoder, a block at a time"


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What may be known of a checkpoint beside its files; all of it may be absent.

    Attributes:
        base_model: ``org/name`` of the float model on the hub; not given for a model that is not there.
        revision: its commit.
        source: folder of the float model, whose card or licence file tells the licence and the languages.
        repository: ``org/name`` under which the checkpoint will be found; else its folder's name stands in snippets.
        scores: the figures of the checkpoint as a row of a report has them: ``metrics``, ``size_bytes``, ``loaded_by``.
        baseline: the figures of the float model, likewise.
        calibration: the audit of the calibration set.
    """

    base_model: str | None = None
    revision: str | None = None
    source: Path | None = None
    repository: str | None = None
    scores: Mapping[str, Any] | None = None
    baseline: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, job: Job, repository: str | None = None) -> CardFacts:
        """What may be said of the model that a checkpoint was made of."""
        name, revision = job.hub or (None, None)
        audit = None if job.audit is None else dict(job.audit)
        return cls(base_model=name, revision=revision, source=job.source, repository=repository, calibration=audit)


def write_card(folder: Path, facts: CardFacts | None = None) -> None:
    """Write ``README.md`` beside an exported checkpoint, whose manifest is there already.

    Raises:
        CheckpointError: the folder is no export of quantkit, or its manifest is broken.
        OutputError: the folder cannot be written.
    """
    write_text(folder / CARD, card(folder, facts))


def describe(job: Job, folder: Path, name: str) -> None:
    """Write the card of a new checkpoint, before anything is measured.

    Args:
        job: it was made from.
        folder: where it lies while it is made.
        name: that its folder will have.
    """
    write_card(folder, CardFacts.of(job, name))


def card(folder: Path, facts: CardFacts | None = None) -> str:
    """The model card of an exported checkpoint.

    Raises:
        CheckpointError: the folder is no export of quantkit, or its manifest is broken.
        SchemeError: the manifest names a scheme that quantkit does not have.
    """
    given = facts or CardFacts()
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no manifest of quantkit", "give the folder of an exported checkpoint")
    store = FORMATS.get(manifest["format"])
    schemes = {name: scheme_from_json(scheme) for name, scheme in manifest["layers"].items()}
    recipe = _recipe(folder)
    name = given.repository or folder.resolve().name
    sections = {
        "": _opening(name, manifest, schemes, given),
        "Measured": _measured(read_verdicts(folder), given),
        "Mixed schemes": _mixed(folder, given),
        "How to load it": usage(_subject(name, folder, manifest, schemes)),
        "Worth knowing": _remarks(manifest, schemes),
        "How it was made": _made(manifest, recipe, given),
        "Files": _files(manifest),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text)
    method = recipe.get("method") if isinstance(recipe.get("method"), str) else None
    return f"{front_matter(store, schemes, method, given.base_model, given.source)}\n{body}\n"


def _subject(name: str, folder: Path, manifest: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> Subject:
    files = [file for file in manifest.get("files", {}) if file.endswith(".gguf") and not file.startswith("imatrix")]
    dtype = str(manifest.get("source", {}).get("dtype", "float32"))
    export = open_export(folder) if schemes and (folder / "config.json").is_file() else None
    return Subject(
        name=name,
        store=FORMATS.get(manifest["format"]),
        schemes=set(schemes.values()),
        dtype=dtype,
        embedding=manifest.get("embedding") is not None,
        gguf=files[0] if files else None,
        loads=class_name_in(folder),
        split=None if export is None else tensor_parallel(export).words(),
        turned=export is not None and bool(export.turns),
        newer=tuple(newer_than(_json(folder / "config.json"), _json(folder / TOKENIZER_CONFIG))),
        remote_code=manifest.get("remote_code") is True,
    )


def _json(file: Path) -> dict[str, Any]:
    """A file of the checkpoint; empty where there is none."""
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _recipe(folder: Path) -> dict[str, Any]:
    """The recipe of the checkpoint; empty where there is none."""
    try:
        content = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / RECIPE} cannot be read", EXPORT_AGAIN) from error
    return content if isinstance(content, dict) else {}


def _opening(name: str, manifest: Mapping[str, Any], schemes: Mapping[str, Scheme], facts: CardFacts) -> str:
    kinds = ", ".join(dict.fromkeys(scheme.describe() for scheme in schemes.values())) or "not quantized"
    base = code(facts.base_model) if facts.base_model else "a model that is not on the hub"
    bits = manifest.get("bits_per_weight")
    cost = f" {bits:.3f} bits per quantized weight." if isinstance(bits, int | float) and schemes else ""
    share = finite(manifest.get("share"))
    part = "" if share is None else f", {percentage(share)} of the weights of its blocks,"
    return (
        f"# {plain(name)}\n\nThis is {base} in the format {manifest['format']} ({plain(kinds)}), "
        f"{len(schemes)} layers{part} quantized by {plain(manifest.get('created_by', 'quantkit'))}.{cost}"
    )


def _measured(found: Mapping[str, Mapping[str, Any]], facts: CardFacts) -> str:
    parts = [_scores(facts.scores, facts.baseline) if facts.scores else NOT_MEASURED]
    verdicts = [_verdict(name, verdict) for name, verdict in found.items()]
    return "\n\n".join([*parts, *(["\n".join(verdicts)] if verdicts else [])])


def _scores(scores: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    metrics, before = scores["metrics"], (baseline or {}).get("metrics", {})
    rows = []
    for text, perplexity in (metrics.get("perplexity") or {}).items():
        divergence = (metrics.get("kl_divergence") or {}).get(text)
        rows.append(
            [
                plain(text),
                _figure((before.get("perplexity") or {}).get(text), ".4f"),
                _figure(perplexity, ".4f"),
                _figure(divergence and divergence["mean"], ".5f"),
                _figure((metrics.get("top1_agreement") or {}).get(text), ".2%"),
            ]
        )
    header = ["Text", "Perplexity, float", "Perplexity", "KL divergence", "Same top token"]
    sizes = [("float model", (baseline or {}).get("size_bytes")), ("this checkpoint", scores.get("size_bytes"))]
    lines = "\n".join(f"- {what}: {count / 2**20:.1f} MiB of tensors" for what, count in sizes if count is not None)
    who = BLOCKS if scores.get("loaded_by") == STREAMED else scores.get("loaded_by")
    by = f"\n\nMeasured through {plain(who)}." if who else ""
    return f"{table(header, rows, figures=4)}\n\n{lines}{by}{_served(scores)}"


def _served(scores: Mapping[str, Any]) -> str:
    """The same by a server's own kernels, and its speed; empty where it was not served."""
    by = served_by(dict(scores))
    if not by:
        return ""
    rows = [[plain(cell) for cell in line] for line in served_losses(dict(scores))]
    losses = table(["Text", "Perplexity", "KL divergence", "Same top token"], rows, figures=3)
    speeds = "\n".join(f"- {line}" for line in served_speeds(dict(scores)))
    return "\n\n".join(["", f"As served by {plain(by)}:", losses, *([speeds] if speeds else [])])


def _mixed(folder: Path, facts: CardFacts) -> str:
    """What each layer got and what it was predicted to lose; empty where one scheme is that of all."""
    mix = mix_in(folder)
    if mix is None:
        return ""
    within = f", within {plain(mix.budget)}" if mix.budget else ""
    lead = f"The scheme of each layer was chosen by what its errors are predicted to cost{within}."
    if mix.predicted is not None:
        lead += f" Predicted: {mix.predicted:.5f} nats per token of KL divergence."
    measured = (facts.scores or {}).get("metrics", {}).get("kl_divergence") or {}
    told = ", ".join(f"{_figure(found['mean'], '.5f')} on {plain(text)}" for text, found in measured.items())
    parts = [
        [plain(part.choice), f"{part.bits:.2f}", f"{part.layers:,}", f"{part.weights:,}", f"{part.nbytes:,}"]
        for part in mix.parts
    ]
    kinds = [
        [code(kind.label), plain(kind.named), code(kind.digits) if kind.digits else "", kind.range]
        for kind in mix.kinds()
    ]
    choices = table(["Choice", "Bits per weight", "Layers", "Weights", "Bytes"], parts, figures=4)
    strip = table(["Layers", "Choices", "Block by block", "Bits per weight"], kinds, figures=1)
    lead += f" Measured: {told}." if told else ""
    return f"{lead}\n\n{choices}\n\n{strip}\n\nBlock by block is a character each: its bits, and f for float."


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdict(runtime: str, verdict: Mapping[str, Any]) -> str:
    outcome = "loads it and agrees with the reference decoder" if verdict.get("passed") else "did not pass"
    reason = f": {plain(verdict['reason'])}" if verdict.get("reason") else ""
    where = f" ({plain(verdict['device'])}, {plain(verdict['dtype'])})" if verdict.get("device") else ""
    return f"- `quantkit verify` with {plain(runtime)}{where}: {outcome}{reason}"


def _remarks(manifest: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> str:
    store, embedding = FORMATS.get(manifest["format"])(), manifest.get("embedding")
    found = list(store.remarks({scheme for name, scheme in schemes.items() if name != embedding}))
    if embedding is not None and embedding in schemes:
        found += store.for_embeddings().remarks({schemes[embedding]})
    left = manifest.get("float")
    for reason, names in left.items() if isinstance(left, dict) else ():
        found.append(f"float: {few(names)}: {reason}" if isinstance(names, list) else f"float: {reason}")
    return "\n".join(f"- {plain(remark)}" for remark in dict.fromkeys(found))


def _made(manifest: Mapping[str, Any], recipe: Mapping[str, Any], facts: CardFacts) -> str:
    lines = "\n".join(f"- {line}" for line in _origins(manifest, facts))
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return f"{lines}\n\n{fenced(text, 'yaml')}" if recipe else lines


def _origins(manifest: Mapping[str, Any], facts: CardFacts) -> Iterator[str]:
    if facts.base_model is not None:
        commit = f" at commit {code(facts.revision)}" if facts.revision else ""
        yield f"float model: {code(facts.base_model)}{commit}"
    hashed = manifest.get("calibration_sha256")
    if hashed is None:
        yield "no calibration data"
    else:
        audit = facts.calibration or {}
        named = f" {code(audit['dataset']['name'])}," if audit else ""
        counted = f" {audit['rows']} rows, {audit['tokens']} tokens," if audit else ""
        more = f"; what became of its records is in {code(CALIBRATION)}" if audit else ""
        yield f"calibration set:{named}{counted} SHA-256 of its token ids {code(hashed)}{more}"
    decoded = decoded_from(manifest.get("source") or {})
    if decoded is not None:
        yield f"the float model was decoded from {code(decoded)}: its weights are what that holds, not those before it"
    if manifest.get("remote_code") is True:
        yield "made with Python code that came with the model, and loaded by it: read it before you trust it"
    versions = manifest.get("versions") or {}
    if versions:
        yield f"versions: {plain(', '.join(f'{name} {number}' for name, number in versions.items()))}"


def _files(manifest: Mapping[str, Any]) -> str:
    rows = [[code(name), code(each["sha256"]), f"{each['bytes']:,}"] for name, each in manifest["files"].items()]
    listed = table(["File", "SHA-256", "Bytes"], rows, figures=1)
    return f"{listed}\n\n{code(MANIFEST)} has the scheme of every layer."
