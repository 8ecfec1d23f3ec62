"""What a runtime is: it loads an exported checkpoint, and tells logits, memory and speed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import EvaluationError, QuantkitError
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint is loaded.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: compute dtype: ``float32``, ``float16``, ``bfloat16``; None is the checkpoint's own.
        context_length: tokens that a prompt and its continuation have at most.
        trust_remote_code: run Python code that comes with the checkpoint.
        python: the interpreter of a runtime that has its own; None is the one that it finds.
        batch: rows that are continued at once at most.
    """

    device: str = "cpu"
    dtype: str | None = None
    context_length: int = 2048
    trust_remote_code: bool = False
    python: str | None = None
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Throughput:
    """How long rows took that were read and continued at once.

    Attributes:
        prefill: seconds until each row was read.
        steps: seconds of each step in which every row got another token.
    """

    prefill: float
    steps: tuple[float, ...]


class LoadedModel(ABC):
    """A checkpoint that a runtime has loaded, in this process or in one that it started.

    Attributes:
        vocabulary: logits per token.
        dtype: in which it computes.
        device: ``cpu``, or the name of the GPU.
        rounded_inputs: what quantkit's own code rounds the inputs of layers to, as the file asks for, such as ``int8
            per token``; runtimes that round by themselves do not say it.
        writes: whether it can be asked for one token after another; one that reads its weights for every pass cannot.
        process: the id of the process that has it, if that is not this one.
        settings: switches of the runtime that bear on its numbers.
        dropped: names of tensors that its loader was given and did not use.
    """

    vocabulary: int
    dtype: str
    device: str
    rounded_inputs: tuple[str, ...] = ()
    writes: ClassVar[bool] = True
    process: int | None = None
    settings: Mapping[str, str] = MappingProxyType({})
    dropped: tuple[str, ...] = ()

    @abstractmethod
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after each of the tokens: int64 ``[n]`` to ``[n, vocabulary]``, floats of any width on any device."""

    @abstractmethod
    def prefill(self, ids: torch.Tensor) -> None:
        """Read ``[n]`` tokens at once as a server does, with logits of the last alone, and wait for the end."""

    @abstractmethod
    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        """Continue ``[n]`` tokens greedily by ``count``: the new ids, and the seconds that each took.

        Ends of turns are not looked at.

        Raises:
            EvaluationError: the model keeps no KV cache.
        """

    def logits_in_parts(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """What :meth:`logits` gives, for some of the tokens at a time, in their order; at once by default."""
        yield self.logits(ids)

    def read_ahead(self, rows: Sequence[torch.Tensor], on_step: Callable[[int, int], None]) -> None:
        """Be told of all rows whose logits will be asked for; a model that takes them together does so now.

        Args:
            rows: int64 ``[n]`` each.
            on_step: called with the number of blocks that they went through, and how many there are.
        """

    def throughput(self, rows: torch.Tensor, count: int) -> Throughput:
        """How long it takes to read ``[rows, n]`` tokens at once, and to continue all rows greedily by ``count``.

        Raises:
            EvaluationError: the runtime takes one row at a time, or the model keeps no KV cache.
        """
        raise EvaluationError("its runtime takes one row at a time, as quantkit runs it")

    def logits_of(self, rows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What :meth:`logits` gives for each of the rows, in their order; a runtime may take several at a time."""
        yield from map(self.logits, rows)

    def greedy(self, prompt: torch.Tensor) -> Iterator[int]:
        """The likeliest tokens after ``[n]`` tokens, one after another without end.

        This one reads the whole text anew for each token; a runtime with a cache does better.
        """
        import torch

        ids = prompt
        while True:
            token = int(self.logits(ids)[-1].argmax())
            yield token
            ids = torch.cat([ids, torch.tensor([token])])

    @abstractmethod
    def weights_bytes(self) -> int:
        """Bytes that the weights take now, in the memory that the device computes from."""

    def facts(self) -> dict[str, Any]:
        """Versions, and what else a record should say."""
        return {}

    def close(self) -> None:
        """Give back what the model takes, now and not when the object goes."""


class Runtime(ABC):
    """Loads exported checkpoints. A subclass is one file and is never instantiated.

    Attributes:
        name: what recipes and the command line call it.
        summary: one line for ``quantkit runtimes``.
        install: the command that brings it.
        packed: whether it computes from packed weights; one that decodes them first has a float model's memory and
            speed.
        separate: whether it lives in an interpreter of its own, and starts a process there to load a checkpoint.
        own_allocator: whether it takes memory of a GPU by itself, of which torch's allocator knows nothing.
        fused: names of layers beside each other that it loads as one matrix, so that they must agree in scheme.
        adapters: whether it computes with the adapter that lies beside a checkpoint.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    install: ClassVar[str]
    packed: ClassVar[bool] = True
    separate: ClassVar[bool] = False
    own_allocator: ClassVar[bool] = False
    fused: ClassVar[tuple[tuple[str, ...], ...]] = ()
    adapters: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be used here, on one line; None where it can."""

    @classmethod
    def check(cls, python: str | None = None) -> None:
        """Refuse a runtime that cannot be used here.

        Args:
            python: an interpreter, for a runtime that has its own.

        Raises:
            QuantkitError: with the reason, and the command that installs it.
        """
        reason = cls.missing()
        if reason is not None:
            raise QuantkitError(f"runtime {cls.name} cannot be used: {reason}", cls.install)

    @classmethod
    def computes_by(cls, python: str | None = None) -> dict[str, str]:
        """Versions and settings that its figures depend on, of a runtime that has an interpreter of its own."""
        return {}

    @classmethod
    def refusal(cls, store: type[Format], schemes: Collection[Scheme], *, embedding: bool) -> str | None:
        """Why it does not load a checkpoint, a sentence; None where it does, or should, as far as is known.

        Args:
            store: its format.
            schemes: of its layers.
            embedding: whether its input embedding is quantized.
        """
        return None if cls.loads(store) else f"{cls.name} does not load {store.name} files."

    @classmethod
    def loads(cls, store: type[Format]) -> bool:
        """Whether it loads a format: by default if the format names it; the matrix says with which schemes."""
        return store.loads_in(cls.name)

    @classmethod
    def formats(cls) -> list[str]:
        """Names of the formats that it loads."""
        return [store.name for store in FORMATS if cls.loads(store)]

    @classmethod
    @abstractmethod
    def load(cls, path: Path, options: LoadOptions) -> LoadedModel:
        """Load a checkpoint.

        Raises:
            EvaluationError: it cannot be loaded, or not whole: tensors are missing, unexpected or dropped.
            MissingDependencyError: the runtime's package is not installed.
        """

    @classmethod
    def computes_in(cls, store: type[Format], schemes: Collection[Scheme], device: str) -> tuple[str, ...]:
        """The dtypes in which it runs checkpoints of a format with these schemes on a device."""
        return ("float32", "bfloat16", "float16")

    @classmethod
    def requires(cls, store: type[Format]) -> tuple[str, ...]:
        """The packages that it needs beside its own to load a format."""
        return ()
