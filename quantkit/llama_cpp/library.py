"""The shared library of llama.cpp: functions, devices, and what it logs.

Only the stable part of the C API of ``llama.h`` and ``ggml.h`` is used. Structs of parameters grow from release to
release; they are passed as what the library itself gives as defaults, in a buffer larger than any of them, and only
their leading fields, which have not moved since early 2025, are set.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from quantkit.errors import EvaluationError, MissingDependencyError, QuantkitError
from quantkit.llama_cpp.packages import Found, installed
from quantkit.system.distribution import requirement

EXTRA = requirement("llama-cpp")
PURPOSE = "llama.cpp"
LOGGER = logging.getLogger("quantkit.llama_cpp")
KEPT_LINES = 20
_INFO, _ERROR, _CONTINUED = 2, 4, 5
_GPU = 1


class Params(ctypes.Structure):
    """Room for any struct of parameters; 8-byte aligned, passed and returned by value."""

    _fields_ = (("words", ctypes.c_uint64 * 256),)

    def set_int32(self, offset: int, value: int) -> None:
        """Write a 32-bit field at a byte offset."""
        ctypes.c_int32.from_buffer(self, offset).value = value

    def set_pointer(self, offset: int, value: int) -> None:
        """Write a pointer at a byte offset."""
        ctypes.c_void_p.from_buffer(self, offset).value = value


class Batch(ctypes.Structure):
    """``llama_batch``: tokens to read; what is null has its default, see ``llama.h``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT32, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _POINTER, _POINTER),
    "llama_model_default_params": (Params,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p, Params),
    "llama_model_free": (None, _POINTER),
    "llama_model_size": (ctypes.c_uint64, _POINTER),
    "llama_model_desc": (_INT32, _POINTER, ctypes.c_char_p, _SIZE),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT32, _POINTER),
    "llama_context_default_params": (Params,),
    "llama_init_from_model": (_POINTER, _POINTER, Params),
    "llama_free": (None, _POINTER),
    "llama_set_n_threads": (None, _POINTER, _INT32, _INT32),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, ctypes.c_bool),
    "llama_decode": (_INT32, _POINTER, Batch),
    "llama_synchronize": (None, _POINTER),
    "llama_get_logits": (_POINTER, _POINTER),
    "llama_get_logits_ith": (_POINTER, _POINTER, _INT32),
    "ggml_backend_dev_count": (_SIZE,),
    "ggml_backend_dev_get": (_POINTER, _SIZE),
    "ggml_backend_dev_type": (ctypes.c_int, _POINTER),
    "ggml_backend_dev_description": (ctypes.c_char_p, _POINTER),
    "ggml_backend_load_all_from_path": (None, ctypes.c_char_p),
    "ggml_quantize_chunk": (_SIZE, ctypes.c_int, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER),
    "ggml_version": (ctypes.c_char_p,),
    "ggml_commit": (ctypes.c_char_p,),
}
"""Result and arguments of every function that is called."""


class Library:
    """The loaded library. Get the one of this process from :func:`library`.

    Attributes:
        found: where it came from.
        lines: the last lines that llama.cpp logged as errors.

    Raises:
        QuantkitError: the file cannot be loaded here, as where the system is too old for it.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._functions: dict[str, Callable[..., Any]] = {}
        self._level = _INFO
        try:
            self._handle = ctypes.CDLL(str(found.path))
        except OSError as error:
            raise _unusable(found, str(error)) from error
        self._callback = _LogCallback(self._log)
        self.call("llama_log_set", self._callback, None)
        # Nobody is left to listen when the interpreter is gone. Finalizers at exit run last in, first out: what models
        # have to say when they are given back is still heard.
        weakref.finalize(Library, self.call, "llama_log_set", None, None)
        self.call("llama_backend_init")
        if self.call("ggml_backend_dev_count") == 0:
            # Builds that keep their backends in files of their own.
            self.call("ggml_backend_load_all_from_path", str(found.path.parent).encode())

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the C API.

        Raises:
            QuantkitError: this build of llama.cpp is too old, or too new, to have it.
        """
        if name not in self._functions:
            try:
                function = getattr(self._handle, name)
            except AttributeError as error:
                raise _unusable(self.found, f"it has no function {name}") from error
            function.restype, *function.argtypes = _SIGNATURES[name]
            self._functions[name] = function
        return self._functions[name](*arguments)

    @contextmanager
    def listening(self) -> Iterator[deque[str]]:
        """Inside the block, ``lines`` holds only what was logged since it began."""
        self.lines.clear()
        yield self.lines

    def gpus(self) -> list[str]:
        """Names of the GPUs that this build computes on; none for a build without a backend for them."""
        devices = [self.call("ggml_backend_dev_get", index) for index in range(self.call("ggml_backend_dev_count"))]
        gpus = [device for device in devices if self.call("ggml_backend_dev_type", device) == _GPU]
        return [self.call("ggml_backend_dev_description", gpu).decode("utf-8", "replace") for gpu in gpus]

    def facts(self) -> dict[str, str]:
        """Package with its version, and the version of ggml, with the commit where the build knows it."""
        told = {
            name: self.call(function).decode()
            for name, function in (("ggml", "ggml_version"), ("commit", "ggml_commit"))
            if hasattr(self._handle, function)  # both came in the course of 2025
        }
        return {"package": self.found.package} | {name: text for name, text in told.items() if text != "unknown"}

    def _log(self, level: int, text: bytes, _: object) -> None:
        """Take a piece of a line from llama.cpp; one at level 5 goes on with the line before."""
        words = " ".join(text.decode("utf-8", "replace").split())
        self._level = level if level != _CONTINUED else self._level
        if not words.strip("."):
            return
        if self._level == _ERROR:
            self.lines.append(words)
        # An error of llama.cpp reaches the user as an exception; whatever else it says is for those who ask.
        LOGGER.log(logging.INFO if self._level == _ERROR else logging.DEBUG, "%s", words)


@cache
def library() -> Library:
    """The library of this process, loaded on the first call.

    Raises:
        MissingDependencyError: no package that brings it is installed.
        QuantkitError: none of those that are installed works here.
    """
    refusals: list[QuantkitError] = []
    for found in installed():
        try:
            return Library(found)
        except QuantkitError as error:
            refusals.append(error)
    raise refusals[0] if refusals else MissingDependencyError("xllamacpp", PURPOSE, EXTRA)


def _unusable(found: Found, reason: str) -> QuantkitError:
    """Why an installed library is of no use, with the way out."""
    newer = re.search(r"version `GLIBC_([\d.]+)' not found", reason)
    if newer is not None:
        reason = f"it was built for a newer Linux, with glibc {newer[1]}, and this one has {platform.libc_ver()[1]}"
    remedy = f"pip install -U {EXTRA}"
    absent = re.search(r"(lib\S+\.so\S*): cannot open shared object file", reason)
    if absent is not None:
        named = ", on Debian and Ubuntu libgomp1" if absent[1].startswith("libgomp.") else ""
        remedy = f"install the system's package that has {absent[1]}{named}"
    return QuantkitError(f"llama.cpp of {found.package} cannot be used here: {reason}", remedy)


def failure(lines: deque[str], what: str, remedy: str = "") -> EvaluationError:
    """An error with the first words of llama.cpp on it; those that follow repeat where they came from."""
    words = "; ".join(list(dict.fromkeys(lines))[:2]) or "it does not say why"
    return EvaluationError(f"llama.cpp cannot {what}: {words}", remedy)
