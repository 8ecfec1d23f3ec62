"""A GGUF file that llama.cpp has loaded: tokens in, logits out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import EvaluationError
from quantkit.llama_cpp.library import Batch, Library, Params, failure

if TYPE_CHECKING:
    import numpy as np

PIECE = 512
"""Tokens that are read at a time: llama.cpp's own default for its compute buffers."""
ALL_LAYERS = 1_000_000
_DEVICES, _GPU_LAYERS, _SPLIT_MODE, _MAIN_GPU = 0, 16, 20, 24
"""Byte offsets in ``llama_model_params``: pointers to devices and to buffer overrides, then 32-bit fields."""
_CONTEXT, _BATCH, _UBATCH = 0, 4, 8
"""Byte offsets in ``llama_context_params``."""
_SPLIT_NONE = 0
_NO_DEVICES = ctypes.c_void_p(None)
"""A list of devices that ends at once."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a file is loaded.

    Attributes:
        context_length: tokens that the KV cache holds.
        threads: of the CPU.
        gpu: index of the GPU that holds all layers; None computes on the CPU alone.
    """

    context_length: int
    threads: int
    gpu: int | None = None


class Model:
    """A model with its context. What it holds outside Python is given back by :meth:`close`, or with the object.

    Args:
        path: the GGUF file.
        settings: how it is loaded.
        library: llama.cpp.

    Attributes:
        vocabulary: number of tokens.
        size: bytes of all tensors.

    Raises:
        EvaluationError: llama.cpp cannot load the file, or has no room for its KV cache; with its own last words.
    """

    def __init__(self, path: Path, settings: Settings, library: Library) -> None:
        self.settings = settings
        self._library = library
        with library.listening() as lines:
            model = library.call("llama_model_load_from_file", str(path).encode(), _model_params(library, settings))
            if not model:
                raise failure(lines, f"load {path}", "check that the file is whole and its architecture is known to it")
            free_model = weakref.finalize(self, library.call, "llama_model_free", model)
            context = library.call("llama_init_from_model", model, _context_params(library, settings))
            if not context:
                free_model()
                raise failure(lines, f"make a context of {settings.context_length} tokens", "shorten context_length")
        free_model.detach()
        self._close = weakref.finalize(self, _free, library, model, context)
        self._context = context
        self._position = 0
        library.call("llama_set_n_threads", context, settings.threads, settings.threads)
        vocabulary = library.call("llama_model_get_vocab", model)
        self.vocabulary: int = library.call("llama_vocab_n_tokens", vocabulary)
        self.size: int = library.call("llama_model_size", model)
        self.description = _description(library, model)

    def forget(self) -> None:
        """Empty the KV cache."""
        self._position = 0
        self._library.call("llama_memory_clear", self._library.call("llama_get_memory", self._context), True)

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens behind those that were read since :meth:`forget`, with logits of the last alone.

        Raises:
            EvaluationError: they do not fit into the context, or llama.cpp refuses them.
        """
        for start in range(0, len(ids), PIECE):
            self._decode(ids[start : start + PIECE], every=False)

    def last_logits(self) -> np.ndarray:
        """Logits after the last token that was read: float32 ``[vocabulary]``, good until more is read."""
        import numpy as np

        address = self._library.call("llama_get_logits_ith", self._context, -1)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of the tokens, which begin a new text: float32 ``[n, vocabulary]``.

        Raises:
            EvaluationError: they do not fit into the context, or llama.cpp refuses them.
        """
        import numpy as np

        self.forget()
        found = np.empty((len(ids), self.vocabulary), dtype=np.float32)
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            self._decode(piece, every=True)
            address = self._library.call("llama_get_logits", self._context)
            there = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            found[start : start + len(piece)] = np.ctypeslib.as_array(there, (len(piece), self.vocabulary))
        return found

    def wait(self) -> None:
        """Wait until the device has done all work."""
        self._library.call("llama_synchronize", self._context)

    def close(self) -> None:
        """Give model and context back; the object is of no use afterwards."""
        self._close()

    def _decode(self, ids: Sequence[int], *, every: bool) -> None:
        count, room = len(ids), self.settings.context_length
        if self._position + count > room:
            # Of a batch that is longer than its buffers llama.cpp makes an end of the process.
            raise EvaluationError(
                f"the text is longer than the {room} tokens that llama.cpp was given room for", "raise context_length"
            )
        tokens = (ctypes.c_int32 * count)(*ids)
        wanted = (ctypes.c_int8 * count)(*([1] * count)) if every else None
        with self._library.listening() as lines:
            code = self._library.call("llama_decode", self._context, Batch(count, tokens, logits=wanted))
        if code != 0:
            raise failure(lines, f"read {count} tokens (code {code})")
        self._position += count


def _model_params(library: Library, settings: Settings) -> Params:
    params: Params = library.call("llama_model_default_params")
    if settings.gpu is None:
        # Without a list of devices, even an empty one, large products would still go to a GPU.
        params.set_pointer(_DEVICES, ctypes.addressof(_NO_DEVICES))
        params.set_int32(_GPU_LAYERS, 0)
    else:
        params.set_int32(_GPU_LAYERS, ALL_LAYERS)
        params.set_int32(_SPLIT_MODE, _SPLIT_NONE)
        params.set_int32(_MAIN_GPU, settings.gpu)
    return params


def _context_params(library: Library, settings: Settings) -> Params:
    params: Params = library.call("llama_context_default_params")
    params.set_int32(_CONTEXT, settings.context_length)
    piece = min(PIECE, settings.context_length)
    params.set_int32(_BATCH, piece)
    params.set_int32(_UBATCH, piece)
    return params


def _free(library: Library, model: int, context: int) -> None:
    library.call("llama_free", context)
    library.call("llama_model_free", model)


def _description(library: Library, model: int) -> str:
    text = ctypes.create_string_buffer(256)
    library.call("llama_model_desc", model, text, len(text))
    return text.value.decode("utf-8", "replace")
