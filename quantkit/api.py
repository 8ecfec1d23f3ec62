"""The public functions. Each is what a command of the command line does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import EvaluationError, RecipeError
from quantkit.recipe import COMPARING_METRICS, CalibrationSpec, EvaluationSpec, ModelSpec, Recipe
from quantkit.recipe.mixing import is_mixed
from quantkit.system.progress import Among, Logged, Observer
from quantkit.system.units import parse_seconds
from quantkit.system.validation import parse_section

if TYPE_CHECKING:
    from quantkit.estimation import Estimate


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    observer: Observer | None = None,
    *,
    install: bool = True,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Run a recipe: quantize every variant, score each exported file, write the report.

    Args:
        recipe: a recipe, its keys and values, or the path of its file.
        observer: is told what happens; the logger ``quantkit`` by default.
        install: make the environments of libraries that are not there.
        cluster: address of a Ray cluster whose nodes do the work, ``auto`` for the one of this machine.

    Returns:
        The content of ``report.json``. ``status`` is ``failed`` if a variant or a gate failed.

    Raises:
        QuantkitError: nothing can run: the recipe, the model or the calibration set is unusable, or the environment of
            a library is not there and may not be made.
    """
    from quantkit.pipeline.recorded import recorded_run

    found, watching = Recipe.of(recipe), observer or Logged()
    if cluster is None:
        return recorded_run(found, watching, installs=install)
    from quantkit.pipeline.cluster import joined

    with joined(cluster) as workers:
        return recorded_run(found, Among(watching), installs=install, workers=workers)


def run_all(
    recipes: Sequence[Recipe | Mapping[str, Any] | str | Path],
    observer: Observer | None = None,
    *,
    page: str | Path | None = None,
    install: bool = True,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Run several recipes, each as :func:`run` does, and write one page that lists them all.

    One that cannot run, or of which a variant fails, leaves the others alone.

    Args:
        recipes: of each the recipe, its keys and values, or the path of its file.
        observer: is told what happens; the logger ``quantkit`` by default.
        page: where the page goes, a file that ends in ``.html``; beside it lies the same as JSON. By default
            ``runs.html`` in the folder that holds all their folders.
        install: make the environments of libraries that are not there.
        cluster: see :func:`run`; the recipes then run at the same time.

    Returns:
        ``schema``, ``status`` (``failed`` if some run is not ``ok``) and ``runs``, each with ``name``, ``status``,
        ``error``, ``report``, ``recommended``, ``gates_missed`` and ``variants``.

    Raises:
        QuantkitError: a recipe is not valid, two of them have one folder, or the page cannot be written.
    """
    from quantkit.pipeline.several import run_several

    found, watching = loaded_recipes(recipes), observer or Logged()
    place = None if page is None else Path(page).expanduser()
    if cluster is None:
        return run_several(found, watching, page=place, installs=install)
    from quantkit.pipeline.cluster import joined

    with joined(cluster) as workers:
        return run_several(found, Among(watching), page=place, installs=install, workers=workers)


def loaded_recipes(given: Sequence[Recipe | Mapping[str, Any] | str | Path]) -> list[Recipe]:
    """Recipes from what people have of them.

    Raises:
        RecipeError: some are not valid, or there is none; all mistakes are told.
    """
    found, mistakes = [], []
    for each in given:
        try:
            found.append(Recipe.of(each))
        except RecipeError as error:
            mistakes += [error, *(other for other in error.others if isinstance(other, RecipeError))]
    if mistakes:
        raise RecipeError.together(mistakes)
    if not found:
        raise RecipeError("no recipe was given", "name at least one")
    return found


def plan(recipe: Recipe | Mapping[str, Any] | str | Path, *, rehearse: bool = False) -> dict[str, Any]:
    """What a run would do: stages with their state, and for each variant its layers and estimated bytes.

    The model is fetched or converted if it is not here yet; nothing else is written.

    Args:
        recipe: a recipe, its keys and values, or the path of its file.
        rehearse: run the blocks up to the largest one with one batch through everything, in a scratch folder, and tell
            what that took and what the whole run will take: ``rehearsal``, see
            :func:`quantkit.pipeline.rehearsal.rehearsed`.

    Raises:
        QuantkitError: the recipe or the model is unusable, or a variant does not suit the model.
    """
    from quantkit.pipeline.plan import forecast

    found = forecast(Recipe.of(recipe))
    if rehearse:
        from quantkit.pipeline.rehearsal import rehearsed

        found["rehearsal"] = rehearsed(Recipe.of(recipe), found, forecast)
    return found


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


def evaluate(
    checkpoint: str | Path,
    *,
    texts: str | Sequence[str | Mapping[str, Any]] | None = None,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score a checkpoint in a fresh process.

    Args:
        checkpoint: folder of a float or quantized checkpoint, a GGUF file, or the name of a hub model.
        texts: names of bundled texts, files, or mappings as in a recipe, or one of these; the bundled ones by default.
        reference: the float model to compare with; without it there is no divergence.
        adapter: folder of an adapter that ``recover`` made for the checkpoint, with which it is scored.
        trust_remote_code: run Python code that comes with the checkpoint or the reference.
        observer: is told what happens.
        settings: further keys of a recipe's ``evaluation`` section: ``context_length``, ``tasks``, ``device`` ...

    Returns:
        ``metrics``, ``texts``, ``size_bytes``, ``loaded_by``, ``notes``, ``memory``, ``speed``, ``seconds`` and
        ``environment``.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.evaluation import EvaluationJob, run_job
    from quantkit.exports.adapter import with_adapter
    from quantkit.pipeline.preflight import check_scoring
    from quantkit.source.view import loadable

    watching = observer or Logged()
    given = settings if texts is None else {**settings, "texts": texts if isinstance(texts, str) else list(texts)}
    spec = parse_section(EvaluationSpec, given, "evaluation")
    if spec.served is not None:
        raise RecipeError("'served' is for recipes, whose files are scored twice", "give loader: vllm to score by it")
    check_scoring(spec, [checkpoint] if reference is None else [checkpoint, reference])
    folder = _checkpoint_folder(checkpoint, trusted=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch, _logs() as logs, ExitStack() as ends:
        if adapter is not None:
            folder = ends.enter_context(with_adapter(folder, Path(adapter).expanduser()))
        logprobs = samples = None
        if reference is not None and spec.compares:
            watching.stage(f"baseline: {reference}")
            logprobs = Path(scratch) / "logprobs"
            baseline = _float_folder(reference, Path(scratch), watching, trusted=trust_remote_code)
            job = EvaluationJob(
                baseline, _without_costs(spec), logprobs, writes_reference=True, trust_remote_code=trust_remote_code
            )
            found = run_job(job, log=logs / "baseline.log", on_progress=watching.progress)
            _tell(watching, found)
            samples = found["samples"]["items"] if "samples" in found else None
        watching.stage(f"evaluate: {checkpoint}")
        alone = spec if reference is not None else _alone(spec)
        with loadable(folder, trust_remote_code=trust_remote_code, tell=watching.note) as seen:
            job = EvaluationJob(seen, alone, logprobs, trust_remote_code=trust_remote_code, float_samples=samples)
            found = run_job(job, log=logs / "evaluate.log", on_progress=watching.progress)
        _tell(watching, found)
        return found


def _tell(observer: Observer, scored: Mapping[str, Any]) -> None:
    for note in scored["notes"]:
        observer.note(note)


def convert(
    checkpoint: str | Path,
    to: str,
    *,
    out: str | Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Write a model in another format: a quantized checkpoint with the same codes or decoded, or a float model.

    Args:
        checkpoint: folder or GGUF file, quantkit's or another tool's; of a float model also a hub id.
        to: name of a format, or ``float16`` or ``bfloat16``; with ``float`` or these codes are decoded.
        out: folder of the new checkpoint; it appears when it is whole.
        dtype: of a float checkpoint or file, see :class:`quantkit.recipe.ModelSpec`.
        trust_remote_code: run Python code that comes with the checkpoint.
        observer: is told what happens.

    Returns:
        ``from``, ``format``, ``layers``, ``bits_per_weight``, ``largest_shift`` in steps of the grid, and ``notes``;
        of floats ``float``, ``dtype``, and ``decoded``, what they were decoded from, or None.

    Raises:
        QuantkitError: the format cannot tell a layer's grid, with the reason; the checkpoint is broken.
    """
    from quantkit.pipeline.converting import convert_any

    watching = observer or Logged()
    watching.stage(f"convert: {checkpoint} to {to}")
    return convert_any(
        str(checkpoint), to, Path(out).expanduser(), watching, dtype=dtype, trust_remote_code=trust_remote_code
    )


def inspect(checkpoint: str | Path, *, deep: bool = True) -> dict[str, Any]:
    """Tell what a checkpoint holds, whoever wrote it, and what will load it.

    Args:
        checkpoint: folder or GGUF file.
        deep: decode every layer, to find outliers and bad scales; without it headers alone are read.

    Returns:
        See :func:`quantkit.inspection.inspect`.

    Raises:
        QuantkitError: it is no checkpoint that quantkit reads, or a broken one.
    """
    from quantkit.inspection import inspect as inspect_checkpoint

    return inspect_checkpoint(Path(checkpoint).expanduser(), deep=deep)


def verify(
    checkpoint: str | Path,
    *,
    runtime: str = "transformers",
    python: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    time_limit: str = "1h",
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Load a checkpoint in a runtime and compare its logits with those of the reference decoder.

    The verdict is also written into the manifest of a checkpoint that quantkit exported.

    Args:
        checkpoint: folder or GGUF file.
        runtime: name of a runtime.
        python: interpreter of the environment that the runtime lives in, for one that has its own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: compute dtype; the runtime's usual one by default.
        time_limit: such as ``90s``, ``30min``, ``2h``: that the runtime may take, and the reference.
        trust_remote_code: run Python code that comes with the checkpoint.
        observer: is told what happens.

    Returns:
        The verdict, see :func:`quantkit.verification.verify`; ``passed`` is its heart.

    Raises:
        QuantkitError: the checkpoint or the runtime cannot be used at all.
    """
    from quantkit.verification import verify as verify_checkpoint

    return verify_checkpoint(
        Path(checkpoint).expanduser(),
        runtime,
        python=python,
        device=device,
        dtype=dtype,
        seconds=parse_seconds(time_limit),
        trust_remote_code=trust_remote_code,
        observer=observer or Logged(),
    )


def push(checkpoint: str | Path, repository: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload a checkpoint with its model card to the Hugging Face hub.

    The token is that of ``huggingface_hub``: the variable ``HF_TOKEN``, or a login.

    Args:
        checkpoint: folder that quantkit exported.
        repository: ``org/name``; made if it is not there.
        private: of a new repository.
        revision: branch.

    Returns:
        The address of the commit.

    Raises:
        QuantkitError: the folder is not whole, the hub refuses or cannot be reached.
    """
    from quantkit.publishing import push as push_checkpoint

    return push_checkpoint(Path(checkpoint).expanduser(), repository, private=private, revision=revision)


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


def import_recipe(path: str | Path) -> str:
    """The text of a recipe that does what a LLaMA-Factory export configuration asks for.

    Args:
        path: its YAML or JSON file.

    Raises:
        QuantkitError: the file cannot be read, is no export configuration, or asks for what quantkit refuses.
    """
    from quantkit.recipe.llamafactory import import_recipe as imported

    return imported(path)


def estimate(
    model: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    format: str | None = None,  # noqa: A002 - the recipe's word
    dtype: str | None = None,
    train: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Estimate:
    """What a quantized model takes on disk, while it runs, while it is quantized, and on request while it is trained.

    Nothing but the model's config is read. What fits a card is asked with ``quantkit.estimation.fits`` and ``cards``.

    Args:
        model: a well-known name such as ``llama-3-8b``, a folder, or the name of a hub model.
        method, scheme, format: names, see :func:`quantize`.
        dtype: of the float model; its config's own by default.
        train: estimate QLoRA training too.
        trust_remote_code: run Python code that comes with the model in a folder.
        options: ``batch``, ``context``, ``kv_dtype``, ``lora_rank`` and other keys of
            :class:`quantkit.estimation.Use`, and further keys of a variant.

    Raises:
        QuantkitError: there is no such model, or the variant does not suit it.
    """
    from quantkit.estimation import estimate as estimated

    names: dict[str, Any] = {"method": method, "scheme": scheme, "format": format}
    further: dict[str, Any] = {"dtype": dtype, "train": train, "trust_remote_code": trust_remote_code}
    if is_mixed(options):
        from quantkit.pipeline.estimating import mixed_estimate

        return mixed_estimate(str(model), names, options, **further)
    return estimated(str(model), **names, **further, **options)


@contextmanager
def _logs() -> Iterator[Path]:
    """A temporary folder for logs, which stays where an error tells the user to read them."""
    folder = Path(tempfile.mkdtemp(prefix="quantkit-logs-"))
    try:
        yield folder
    except EvaluationError as error:
        if str(folder) not in str(error):
            shutil.rmtree(folder)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _checkpoint_folder(checkpoint: str | Path, *, trusted: bool) -> Path:
    """The folder or file of a checkpoint; one of the hub is fetched.

    Raises:
        EvaluationError: there is no checkpoint.
    """
    from quantkit.checkpoint.adapter_folder import adapter_in
    from quantkit.exports import find_gguf
    from quantkit.recipe.model import HUB_REFERENCE
    from quantkit.source import hub

    folder = Path(checkpoint).expanduser()
    if not folder.exists() and HUB_REFERENCE.fullmatch(str(checkpoint)) and folder.suffix != ".gguf":
        return hub.download(str(checkpoint), None, trust_remote_code=trusted).folder
    adapter = adapter_in(folder)
    if adapter is not None:
        raise EvaluationError(*adapter)
    if not (folder / "config.json").is_file() and not (folder.exists() and find_gguf(folder)):
        raise EvaluationError(
            f"{folder} is not a checkpoint: it has no config.json",
            "name the folder of a checkpoint, a GGUF file, or org/name of the hub",
        )
    return folder


def _float_folder(reference: str | Path, work: Path, observer: Observer, *, trusted: bool) -> Path:
    from quantkit.source import resolve

    found = resolve(ModelSpec(source=str(reference), trust_remote_code=trusted), work)
    for note in found.notes:
        observer.note(f"baseline: {note}")
    return found.folder


def _without_costs(spec: EvaluationSpec) -> EvaluationSpec:
    """The same without memory, speed, tasks and answers, which nobody asked for of the baseline."""
    metrics = tuple(metric for metric in spec.metrics if metric not in ("memory", "speed"))
    return spec.model_copy(update={"metrics": metrics, "tasks": (), "answers": None})


def _alone(spec: EvaluationSpec) -> EvaluationSpec:
    """The metrics that need no float model.

    Raises:
        RecipeError: none is left.
    """
    metrics = tuple(metric for metric in spec.metrics if metric not in COMPARING_METRICS)
    if not metrics:
        raise RecipeError("kl_divergence and top1_agreement compare with a float model", "give reference=")
    return spec.model_copy(update={"metrics": metrics})
