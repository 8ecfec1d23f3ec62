"""Records with images: what the model's processor makes of them, token ids and further inputs of the model."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from quantkit import records
from quantkit.calibration.rows import Encoded
from quantkit.errors import CalibrationError, MissingDependencyError
from quantkit.records import Record, RefusedRecordError
from quantkit.records.record import IMAGE
from quantkit.system.artifacts import read_json
from quantkit.system.distribution import requirement

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

EXTRA = requirement("vision")
_OTHERS = "choose records of text alone"
BLIND = "its images left out: the model does not see"


class Processor:
    """The processor of a model that sees; it is loaded when the first image comes.

    Args:
        folder: the model's files.
        chat_template: of the calibration, see :func:`quantkit.records.template_text`.
        trust_remote_code: run Python code that comes with the processor.
    """

    def __init__(self, folder: Path, chat_template: str, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self._chat_template = chat_template
        self._trust_remote_code = trust_remote_code
        self._loaded: Any = None
        self._seeing: bool | None = None

    def encode(self, record: Record, tokenizer: Any, index: int) -> Encoded:
        """A record with images as token ids, with the model's further inputs by their names, each of one row.

        For a model that does not see it is the record's texts.

        Raises:
            MissingDependencyError: Pillow is missing.
            RefusedRecordError: an image cannot be read, or the template or the processor does not take the record.
            CalibrationError: the model's processor cannot be loaded.
        """
        if not self._sees():
            found = records.encoded(_as_text(record, index), tokenizer, self._chat_template, index=index)
            return Encoded(index, found.ids, changes=(*found.changes, BLIND))
        processor = self._processor(index)
        mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or "<image>"
        written = records.rendered(record, tokenizer, self._chat_template, index=index, image_mark=str(mark))
        templated = records.is_templated(record, tokenizer, self._chat_template)
        images = [_opened(image, index) for image in record.images]
        try:
            found = processor(
                text=[written.text], images=[images], return_tensors="pt", add_special_tokens=not templated
            )
            inputs = dict(found)
            ids = inputs.pop("input_ids")[0].tolist()
        except Exception as error:  # a processor of any model
            text = f"the processor of the model does not take record {index}: {_first_line(error)}"
            raise RefusedRecordError(text, _OTHERS, "the processor of images does not take it") from error
        return Encoded(index, ids, _tensors(inputs, index), written.changes)

    def _sees(self) -> bool:
        """Whether the model sees: it has a processor of images, or its config has a part for them."""
        if self._seeing is None:
            self._seeing = any(self._folder.glob("*processor_config.json")) or _has_vision(self._folder)
        return self._seeing

    def _processor(self, index: int) -> Any:
        if self._loaded is None:
            self._loaded = self._load(index)
        return self._loaded

    def _load(self, index: int) -> Any:
        try:
            import PIL  # noqa: F401 - whether it is here
        except ImportError as error:
            raise MissingDependencyError("pillow", f"record {index}, which has images,", EXTRA) from error
        from transformers import AutoProcessor

        if not any(self._folder.glob("*processor_config.json")):
            raise CalibrationError(
                f"record {index} has images, and {self._folder} has no processor of images, though the model sees",
                f"copy preprocessor_config.json from its repository, or {_OTHERS}",
            )
        try:
            found: Any = AutoProcessor.from_pretrained(
                self._folder, trust_remote_code=self._trust_remote_code, local_files_only=True
            )
        except Exception as error:  # a processor of any model
            raise CalibrationError(
                f"the processor of images in {self._folder} cannot be loaded: {_first_line(error)}",
                f"install what it names, or {_OTHERS}",
            ) from error
        if not hasattr(found, "image_processor"):
            raise CalibrationError(f"record {index} has images, and the model does not see", _OTHERS)
        return found


def _has_vision(folder: Path) -> bool:
    """Whether a model's config has a part for images."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False  # whoever needs the config says what is wrong with it
    return any(key.startswith(("vision", "image_token", "mm_vision")) for key, value in config.items() if value)


def _as_text(record: Record, index: int) -> Record:
    """A record without its images.

    Raises:
        RefusedRecordError: nothing is left of it.
    """
    if record.text is not None:
        text = record.text.replace(IMAGE, "").strip()
        left = replace(record, text=text, images=()) if text else None
    else:
        messages = tuple(replace(each, content=each.content.replace(IMAGE, "").strip()) for each in record.messages)
        blank = any(message.is_empty() and message.role != "tool" for message in messages)
        left = None if blank else replace(record, messages=messages, images=())
    if left is None:
        text = f"record {index} has images, and is nothing without them for a model that does not see"
        raise RefusedRecordError(text, _OTHERS, "nothing but images in a turn, and the model does not see")
    return left


def _opened(image: str | bytes, index: int) -> Image:
    """An image, in RGB.

    Raises:
        CalibrationError: it is not there, or no image.
    """
    from PIL import Image, UnidentifiedImageError

    name = image if isinstance(image, str) and not image.startswith("data:") else "the image"
    try:
        return Image.open(io.BytesIO(_content(image, index))).convert("RGB")
    except FileNotFoundError as error:
        text = f"record {index}: {name} is not there"
        raise RefusedRecordError(text, "paths start at the data set's folder", "its image is not there") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        text = f"record {index}: {name} is no image that Pillow reads"
        raise RefusedRecordError(text, "remove the record", "its image is none that Pillow reads") from error


def _content(image: str | bytes, index: int) -> bytes:
    """The bytes of an image file."""
    if isinstance(image, bytes):
        return image
    file = image_file(image)
    if file is not None:
        return file.read_bytes()
    if not image.startswith("data:"):
        text = f"record {index}: {image} is on the network"
        raise RefusedRecordError(text, "download it, and give its path", "its image is on the network")
    try:
        return base64.b64decode(image.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError("no base64") from error


def image_file(image: str | bytes) -> Path | None:
    """The file in which an image of a record lies; None for one in the record itself, or on the network."""
    if isinstance(image, bytes):
        return None
    kind, _, rest = image.partition(":")
    if kind.lower() in ("data", "http", "https"):
        return None
    return Path(unquote(rest.removeprefix("//")) if kind.lower() == "file" else image)


def _tensors(inputs: Mapping[str, Any], index: int) -> dict[str, torch.Tensor]:
    import torch

    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise CalibrationError(
                f"the processor of the model gives record {index} {name} that are no tensor", _OTHERS
            )
    return {name: value.contiguous() for name, value in inputs.items()}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
