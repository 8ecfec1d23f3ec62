"""Checkpoints that are made: quantized, trained, merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.recipe import CalibrationSpec
from quantkit.system.progress import Logged, Observer
from quantkit.system.validation import parse_section


def quantize(
    model: str | Path,
    *,
    out: str | Path,
    method: str | None = None,
    scheme: str | None = None,
    format: str | None = None,  # noqa: A002 - the recipe's word
    target: str | None = None,
    adapter: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
    calibration: str | Path | Mapping[str, Any] | CalibrationSpec | None = None,
    device: str = "auto",
    devices: str | int | Sequence[str] | None = None,
    dtype: str = "auto",
    decode: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> Path:
    """Quantize a model into one checkpoint.

    Args:
        model: hub id, folder, GGUF file or ``package:`` reference; see :class:`quantkit.recipe.ModelSpec`.
        out: folder of the checkpoint; it appears when it is whole.
        method: name of a method; by default what goes with the others, or ``gptq``.
        scheme: kind of scheme, such as ``int``, ``nf4`` or ``q4_k_m``; by default what goes with the rest, or ``int``.
        format: name of a format; by default what goes with the others, or ``compressed-tensors``.
        target: who will load the checkpoint, instead of a format: ``ollama``, ``vllm``, ``transformers`` ...
        adapter: LoRA adapters to merge first; see :class:`quantkit.recipe.AdapterSpec`.
        calibration: a data set, or the keys of a recipe's ``calibration`` section.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        devices: over which the walk is dealt: ``all`` GPUs, how many, or their names; see
            :class:`quantkit.recipe.QuantizationSpec`.
        dtype: of scales and of all that stays float; ``auto`` is one of 16 bits, ``own`` the model's own.
        decode: decode a model that a tool has quantized; see :class:`quantkit.recipe.ModelSpec`.
        trust_remote_code: run Python code that comes with the model.
        observer: is told what happens.
        options: further keys of a variant: those of its scheme (``bits``, ``group_size``, ``symmetric`` ..., by default
            the scheme's own), ``ignore``, ``overrides``, ``first_blocks``, ``last_blocks``, the method's own options;
            with ``bits="auto"`` ``budget``, ``choices`` or ``allocation``, see :class:`quantkit.recipe.AutoSpec`.

    Returns:
        ``out``.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.pipeline.preflight import check_inputs
    from quantkit.pipeline.single import quantize_one
    from quantkit.recipe.single import single_recipe

    watching = observer or Logged()
    told = {
        "source": str(model),
        "adapter": adapter,
        "dtype": dtype,
        "decode": decode,
        "trust_remote_code": trust_remote_code,
    }
    keys = {"method": method, "scheme": scheme, "format": format, **options}
    recipe, lines = single_recipe(told, keys, calibration=calibration, device=device, devices=devices, target=target)
    for line in lines:
        watching.note(line)
    check_inputs(recipe)
    return quantize_one(recipe, Path(out).expanduser(), watching)


def recover(
    checkpoint: str | Path,
    *,
    data: str | Path | Mapping[str, Any] | CalibrationSpec,
    out: str | Path,
    source: str | Path | None = None,
    adapter: Mapping[str, Any] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train what a quantized checkpoint stores, so that it comes closer to the float model; its format and size stay.

    Args:
        checkpoint: a folder that quantkit exported.
        data: a data set, or the keys of a recipe's ``calibration`` section; by default 512 records, packed into rows of
            512 tokens.
        out: folder of the new checkpoint; it appears when it is whole.
        source: the float model; by default the one that the checkpoint was made of, where that is still there.
        adapter: make a LoRA for the codes as they are instead, with the keys of
            :class:`quantkit.recipe.adapting.AdapterOptions`, none of which must be given.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: run Python code that comes with the model.
        observer: is told what happens.
        options: see :class:`quantkit.recipe.RecoverOptions`: ``steps``, ``train``, ``learning_rate`` ...

    Returns:
        ``checkpoint``, ``before`` and ``after`` (mean divergence on held-out rows, nats a token), ``steps``,
        ``tokens``, ``history`` and ``notes``; of an adapter what
        :func:`quantkit.pipeline.adapting.adapt_one` gives.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.pipeline.adapting import adapt_one
    from quantkit.pipeline.recovering import recover_one, source_of
    from quantkit.recipe import RecoverOptions
    from quantkit.recipe.adapting import AdapterOptions

    usual = {"samples": 512, "max_length": 512, "packing": "full"}
    keys = dict(data) if isinstance(data, Mapping) else {"dataset": str(data)}
    spec = data if isinstance(data, CalibrationSpec) else parse_section(CalibrationSpec, {**usual, **keys}, "data")
    training = parse_section(RecoverOptions, options, "recover")
    if adapter is not None:
        return adapt_one(
            Path(checkpoint).expanduser(),
            str(source or source_of(Path(checkpoint).expanduser())),
            spec,
            parse_section(AdapterOptions, dict(adapter), "adapter"),
            training,
            Path(out).expanduser(),
            observer or Logged(),
            device=device,
            trust_remote_code=trust_remote_code,
        )
    done = recover_one(
        Path(checkpoint).expanduser(),
        spec,
        training,
        Path(out).expanduser(),
        observer or Logged(),
        source=None if source is None else str(source),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return {"checkpoint": str(done.folder), **done.facts["recovered"], "notes": done.facts["notes"]}


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Mapping[str, Any]],
    *,
    out: str | Path,
    observer: Observer | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Merge LoRA adapters into a float model.

    Args:
        base: hub id, folder, GGUF file or ``package:`` reference.
        adapters: a folder, hub id or archive, or several, each such a reference or a mapping with ``source`` and
            ``weight``.
        out: folder of the merged model; it appears when it is whole.
        observer: is told what happens.
        settings: ``dtype``, ``base_weights``, ``any_base``, ``decode`` and ``trust_remote_code``, see
            :func:`quantkit.merging.merge_model`.

    Returns:
        ``folder``, ``dtype``, ``base``, ``base_weights``, ``adapters``, ``notes`` and ``check``.

    Raises:
        QuantkitError: base and adapter do not fit each other, with the remedy; a file is broken.
    """
    from quantkit.merging import merge_model

    given = str(adapters) if isinstance(adapters, str | Path) else adapters
    return merge_model(str(base), given, Path(out).expanduser(), observer=observer, **settings)
