"""llama.cpp: loads GGUF files and computes from their blocks, on the CPU or on GPUs that its build knows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import CheckpointError, EvaluationError, QuantkitError
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime
from quantkit.system.distribution import install_line

if TYPE_CHECKING:
    import torch

    from quantkit.llama_cpp.library import Library
    from quantkit.llama_cpp.model import Model

DTYPE = "float32, inputs of quantized layers in 8 bits, KV cache in float16"
"""What llama.cpp computes in, whatever dtype is asked for: on the CPU it rounds what a quantized layer reads to Q8_0
or Q8_K, blocks of 32 or 256 with one scale each; its kernels for GPUs do so for most types."""


class LlamaCppModel(LoadedModel):
    """A GGUF file in llama.cpp.

    Args:
        model: the file.
        facts: of the library.
        device: ``cpu``, or the name of the GPU.
    """

    def __init__(self, model: Model, facts: dict[str, str], device: str) -> None:
        self._model = model
        self._facts = facts
        self.vocabulary = model.vocabulary
        self.dtype = DTYPE
        self.device = device

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after each token, on the CPU; see :meth:`LoadedModel.logits`.

        Raises:
            EvaluationError: there are more tokens than the context was made for.
        """
        import torch

        return torch.from_numpy(self._model.logits(ids.tolist()))

    def prefill(self, ids: torch.Tensor) -> None:
        """Read the tokens anew; see :meth:`LoadedModel.prefill`."""
        self._model.forget()
        self._model.read(ids.tolist())
        self._model.wait()

    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        """Continue greedily; see :meth:`LoadedModel.decode`."""
        self.prefill(prompt)
        ids, seconds = [], []
        for _ in range(count):
            started = time.perf_counter()
            ids.append(int(self._model.last_logits().argmax()))
            self._model.read(ids[-1:])
            self._model.wait()
            seconds.append(time.perf_counter() - started)
        return ids, seconds

    def greedy(self, prompt: torch.Tensor) -> Iterator[int]:
        """One token after another with the KV cache; see :meth:`LoadedModel.greedy`."""
        self.prefill(prompt)
        while True:
            token = int(self._model.last_logits().argmax())
            yield token
            self._model.read([token])

    def weights_bytes(self) -> int:
        """Bytes of all tensors of the file, by llama.cpp's own count."""
        return self._model.size

    def facts(self) -> dict[str, Any]:
        """Package and version of llama.cpp, what it calls the model, and threads."""
        return {**self._facts, "model": self._model.description, "threads": self._model.settings.threads}

    def close(self) -> None:
        """Give the memory back now, not when the object goes."""
        self._model.close()


@RUNTIMES.register
class LlamaCpp(Runtime):
    """llama.cpp in this process, through its C API."""

    name: ClassVar[str] = "llama.cpp"
    summary: ClassVar[str] = "llama.cpp on the CPU, or on GPUs with a build for them"
    install: ClassVar[str] = install_line("llama-cpp")
    own_allocator: ClassVar[bool] = True

    @classmethod
    def missing(cls) -> str | None:
        """Why llama.cpp cannot be used here: it is not installed, or what is installed does not suit the system."""
        from quantkit.llama_cpp.library import library

        try:
            library()
        except QuantkitError as error:
            return error.problem
        return None

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> LoadedModel:
        """Load a ``.gguf`` file, or the one of a folder. The dtype asked for is not used: see :data:`DTYPE`.

        Raises:
            EvaluationError: there is no such file, llama.cpp cannot load it, or the GPU is not there.
            QuantkitError: llama.cpp is not installed, or does not work here.
        """
        import torch

        from quantkit.llama_cpp.library import library
        from quantkit.llama_cpp.model import Model, Settings

        llama = library()
        gpu, device = _device(llama, options.device)
        settings = Settings(options.context_length, torch.get_num_threads(), gpu)
        return LlamaCppModel(Model(gguf_in(path), settings, llama), llama.facts(), device)


def gguf_in(path: Path) -> Path:
    """The GGUF file that a path names.

    Raises:
        EvaluationError: there is none, or a folder has several models.
    """
    from quantkit.exports import find_gguf

    try:
        found = find_gguf(path) if path.exists() else None
    except CheckpointError as error:
        raise EvaluationError(error.problem, error.remedy) from error
    if found is None:
        raise EvaluationError(f"{path} has no GGUF file, which is what llama.cpp loads", "check the path")
    return found


def _device(llama: Library, wanted: str) -> tuple[int | None, str]:
    """Index of the GPU, None for the CPU, and the name of the device."""
    kind, _, place = wanted.partition(":")
    if kind == "cpu":
        return None, "cpu"
    gpus, index = llama.gpus(), int(place or 0)
    if index < len(gpus):
        return index, gpus[index]
    sees = f"sees {len(gpus)} GPUs" if gpus else "was built for the CPU alone, or sees no GPU"
    raise EvaluationError(
        f"llama.cpp of {llama.found.package} cannot compute on {wanted}: it {sees}",
        "use device cpu, or install a build for your GPU: https://github.com/xorbitsai/xllamacpp#install",
    )
