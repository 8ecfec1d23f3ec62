"""The files and folders on this machine that a recipe names: where each is looked for, and which are not there.

A relative path is taken from the folder in which quantkit is run; where nothing lies there, from the recipe's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantkit.errors import RecipeError
from quantkit.recipe.evaluation import AnswerSpec, EvaluationSpec, SampleSpec, TaskSpec, TextSpec
from quantkit.recipe.fields import Section
from quantkit.recipe.mixing import AutoSpec
from quantkit.recipe.model import HUB_REFERENCE, NAMED_BY_ADAPTER, ModelSpec
from quantkit.recipe.quantization import CalibrationSpec
from quantkit.system.strict_yaml import line_of

if TYPE_CHECKING:
    from quantkit.recipe.document import Recipe

V = TypeVar("V", bound=Section)
S = TypeVar("S", TextSpec, TaskSpec, AnswerSpec, SampleSpec)
PACKAGE, HUB, LLAMAFACTORY = "package:", "hub:", "llamafactory:"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_LOOKED = "relative paths are from the folder in which quantkit is run, or from the recipe's"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file or folder that a recipe names.

    Attributes:
        place: the keys and indices that lead to it.
        path: as it was written.
    """

    place: tuple[int | str, ...]
    path: str

    @property
    def key(self) -> str:
        """Its place as messages write it, such as ``evaluation.texts[1].file``."""
        first, *rest = self.place
        return str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)

    def is_there(self) -> bool:
        """Whether something lies there."""
        return Path(self.path).expanduser().exists()


def local_files(recipe: Recipe) -> Iterator[LocalFile]:
    """All that a recipe names, in the order of its keys."""
    yield from model_files(recipe.model)
    yield from calibration_files(recipe.calibration)
    yield from training_files(recipe)
    yield from allocation_files(recipe)
    yield from scoring_files(recipe.evaluation)


def allocation_files(recipe: Recipe) -> Iterator[LocalFile]:
    """Allocations that are given back."""
    for index, variant in enumerate(recipe.variants):
        if isinstance(variant, AutoSpec) and variant.allocation is not None:
            yield LocalFile(("variants", index, "allocation"), variant.allocation)


def model_files(spec: ModelSpec) -> Iterator[LocalFile]:
    """The model and its adapters, as far as they are on this machine."""
    if _is_local_model(spec.source):
        yield LocalFile(("model", "source"), spec.source)
    for index, adapter in enumerate(spec.adapter):
        if _is_local_model(adapter.source):
            yield LocalFile(("model", "adapter", index), adapter.source)


def calibration_files(spec: CalibrationSpec) -> Iterator[LocalFile]:
    """Records and chat template."""
    if spec.dataset.startswith(LLAMAFACTORY):
        yield LocalFile(("calibration", "dataset"), _folder_of(spec.dataset))
    elif is_file_of_records(spec.dataset):
        yield LocalFile(("calibration", "dataset"), spec.dataset)
    if spec.chat_template not in ("auto", "none"):
        yield LocalFile(("calibration", "chat_template"), spec.chat_template)


def training_files(recipe: Recipe) -> Iterator[LocalFile]:
    """Records and chat templates of variants that are trained on data of their own."""
    for index, variant in enumerate(recipe.variants):
        data = getattr(variant, "data", None)
        if isinstance(data, CalibrationSpec):
            for file in calibration_files(data):
                yield LocalFile(("variants", index, "data", *file.place[1:]), file.path)


def scoring_files(spec: EvaluationSpec) -> Iterator[LocalFile]:
    """Texts, files of tasks, instructions to answer, and prompts to continue."""
    named = [("texts", [text.file for text in spec.texts]), ("tasks", [task.file for task in spec.tasks])]
    for kind, files in named:
        for index, file in enumerate(files):
            if file is not None:
                yield LocalFile(("evaluation", kind, index), _folder_of(file))
    if spec.answers is not None and spec.answers.file is not None:
        yield LocalFile(("evaluation", "answers"), _folder_of(spec.answers.file))
    if spec.samples is not None and spec.samples.file is not None:
        yield LocalFile(("evaluation", "samples"), _folder_of(spec.samples.file))


def missing(files: Iterable[LocalFile], recipe: Path | None = None) -> list[RecipeError]:
    """Those that are not there, each as the message that says so.

    Args:
        files: that a recipe, or a section of one, names.
        recipe: its file; messages then tell the line.
    """
    found = []
    for file in files:
        if not file.is_there():
            where = (
                "" if recipe is None else f"{recipe}:{line_of(recipe.read_text(encoding='utf-8-sig'), file.place)}: "
            )
            remedy = _remedy(Path(file.path).expanduser())
            found.append(RecipeError(f"{where}{file.key}: there is no {file.path}", remedy))
    return found


def beside_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with each path that leads somewhere from its folder, and nowhere from here, taken from there."""

    def found(reference: str) -> str:
        there = folder / reference
        leads_there = not Path(reference).expanduser().exists() and there.exists()
        return str(there) if leads_there else reference

    wanted = {file.path for file in local_files(recipe)}
    moved = {path: found(path) for path in wanted}
    if all(path == place for path, place in moved.items()):
        return recipe
    return _moved(recipe, lambda path: moved.get(path, path))


def is_file_of_records(reference: str) -> bool:
    """Whether a data set is written as a file's path, and not as a name or a place on the hub."""
    if reference.startswith((HUB, LLAMAFACTORY)):
        return False
    return bool(Path(reference).suffix) or reference.startswith((".", "/", "~"))


def _is_local_model(reference: str) -> bool:
    if reference == NAMED_BY_ADAPTER or reference.startswith(PACKAGE):
        return False
    may_be_hub = HUB_REFERENCE.fullmatch(reference) is not None and not reference.endswith((".gguf", *ARCHIVES))
    return not may_be_hub or Path(reference).exists()


def _moved(recipe: Recipe, place: Callable[[str], str]) -> Recipe:
    """The recipe with each path at its place."""
    model, calibration, scoring = recipe.model, recipe.calibration, recipe.evaluation
    adapters = tuple(each.model_copy(update={"source": place(each.source)}) for each in model.adapter)
    model = model.model_copy(update={"source": place(model.source), "adapter": adapters})
    calibration = _placed(calibration, place)
    texts = tuple(_with_file(each, place) for each in scoring.texts)
    tasks = tuple(_with_file(each, place) for each in scoring.tasks)
    answers = None if scoring.answers is None else _with_file(scoring.answers, place)
    samples = None if scoring.samples is None else _with_file(scoring.samples, place)
    scoring = scoring.model_copy(update={"texts": texts, "tasks": tasks, "answers": answers, "samples": samples})
    variants = tuple(_with_data(each, place) for each in recipe.variants)
    moved = {"model": model, "calibration": calibration, "evaluation": scoring, "variants": variants}
    return recipe.model_copy(update=moved)


def _with_data(variant: V, place: Callable[[str], str]) -> V:
    """A variant with its own data or allocation, where it has some, at its place."""
    if isinstance(variant, AutoSpec) and variant.allocation is not None:
        return variant.model_copy(update={"allocation": place(variant.allocation)})
    data = getattr(variant, "data", None)
    return variant.model_copy(update={"data": _placed(data, place)}) if isinstance(data, CalibrationSpec) else variant


def _placed(spec: CalibrationSpec, place: Callable[[str], str]) -> CalibrationSpec:
    """A data set at its place, with its chat template."""
    found = {"dataset": _place_of(spec.dataset, place), "chat_template": place(spec.chat_template)}
    return spec.model_copy(update=found)


def _with_file(section: S, place: Callable[[str], str]) -> S:
    return section if section.file is None else section.model_copy(update={"file": _place_of(section.file, place)})


def _folder_of(reference: str) -> str:
    """The file that a reference names, of ``llamafactory:DIR/NAME`` the folder, which is ``data`` where it has none."""
    if not reference.startswith(LLAMAFACTORY):
        return reference
    folder, _, _ = reference.removeprefix(LLAMAFACTORY).rpartition("/")
    return folder or "data"


def _place_of(reference: str, place: Callable[[str], str]) -> str:
    """The same reference with its path at its place."""
    if not reference.startswith(LLAMAFACTORY):
        return place(reference)
    return f"{LLAMAFACTORY}{place(_folder_of(reference))}/{reference.rpartition('/')[2].removeprefix(LLAMAFACTORY)}"


def _remedy(path: Path) -> str:
    """The nearest name beside a path that leads nowhere."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f"did you mean {path.parent / near[0]}? " if near else "check the path; "
    return f"{hint}{_LOOKED}"
