"""The memory that a model takes: on disk, once loaded, and at its peaks while it is loaded, reads and writes."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch

from quantkit.checkpoint.adapter_folder import WEIGHTS as ADAPTER_WEIGHTS
from quantkit.errors import EvaluationError
from quantkit.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS
from quantkit.exports import IMATRIX
from quantkit.exports.adapter import adapter_beside
from quantkit.gguf.parts import parts_of
from quantkit.runtimes.base import LoadedModel
from quantkit.system.devices import device_name
from quantkit.system.free_memory import give_back

Phase = Literal["load", "prefill", "decode"]
WEIGHTS = ("*.safetensors", "*.gguf")
"""The files that hold weights."""
CLEAR_REFS = Path("/proc/self/clear_refs")
RESETS_PEAK = "5"
"""What Linux takes, written to :data:`CLEAR_REFS`, as the wish to begin ``VmHWM`` anew (``man 5 proc``)."""


class Probe(Protocol):
    """Reads the memory of this process on one device.

    Attributes:
        kind: what the peak is of.
    """

    kind: str

    def begin(self) -> bool:
        """Begin the peak anew, after all work that was asked of the device; whether that was possible."""

    def read(self) -> dict[str, Any]:
        """``used_bytes`` and ``peak_bytes``, after all work is done; on CUDA further figures."""


class HostProbe:
    """The resident set of a process, with Python, torch and mapped files in it.

    Args:
        process: its id; None is this one.
    """

    kind = "RSS"

    def __init__(self, process: int | None = None) -> None:
        self._process = process

    def begin(self) -> bool:
        """Give back what the C library keeps, then forget the peak.

        Linux alone can forget it, and not everywhere: in some containers ``/proc`` may not be written to.
        """
        if self._process is None:
            gc.collect()
            give_back()
        file = CLEAR_REFS if self._process is None else Path(f"/proc/{self._process}/clear_refs")
        try:
            file.write_text(RESETS_PEAK, encoding="ascii")
        except OSError:
            return False
        return True

    def read(self) -> dict[str, Any]:
        """Resident set, now and at most."""
        used, peak = int(psutil.Process(self._process).memory_info().rss), peak_rss(self._process)
        return {"used_bytes": used, "peak_bytes": max(used, peak)}


class CudaProbe:
    """What torch's allocator gave out, and what the process holds on the device.

    The allocator keeps freed memory for itself, so the process's figure after some work is also its peak during it, if
    what was kept is given back before.

    Args:
        device: a CUDA device.
        process: of which process what it holds is told; None is this one. The allocator is this one's.
    """

    kind = "CUDA allocator"

    def __init__(self, device: torch.device, process: int | None = None) -> None:
        self._device, self._process = device, process

    def begin(self) -> bool:
        """Give back what the allocator keeps, and begin its peaks anew."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return True

    def read(self) -> dict[str, Any]:
        """Also ``reserved_bytes``, what the allocator held at most, and ``process_bytes``, None where unknown.

        The difference of the two is what the device's runtime takes for itself: context, kernels, workspaces.
        """
        torch.cuda.synchronize(self._device)
        return {
            "used_bytes": torch.cuda.memory_allocated(self._device),
            "peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            "process_bytes": process_bytes(self._device, self._process),
        }


def probe_of(device: torch.device, process: int | None = None) -> Probe:
    """The probe of a device, and of a process by its id; None is this one."""
    return CudaProbe(device, process) if device.type == "cuda" else HostProbe(process)


def peak_rss(process: int | None = None) -> int:
    """The largest resident set that a process has had, in bytes: this one, or another by its id.

    On Linux from ``VmHWM``, which begins with the program or where :meth:`HostProbe.begin` began it anew;
    ``ru_maxrss`` would begin with the size of the process that started it (``execve`` keeps it). Where another process
    is asked for and the system tells no peak, it is what the process has now.
    """
    if sys.platform == "win32":
        return int(psutil.Process(process).memory_info().peak_wset)
    if sys.platform == "linux":
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="ascii")
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if process is not None:
        return int(psutil.Process(process).memory_info().rss)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_bytes(device: torch.device, process: int | None = None) -> int | None:
    """What NVML says that a process holds on a CUDA device, this one or another by its id.

    None without ``nvidia-ml-py`` or its answer.

    In a container the driver may list processes by numbers that mean nothing there, and some drivers, such as those
    of Windows, do not tell how much a process holds.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    found = next((each.usedGpuMemory for each in running if each.pid == (process or os.getpid())), None)
    return None if found is None else int(found)


def checkpoint_bytes(path: Path) -> int:
    """Bytes of a file with all parts of it, or of all files with weights directly in a folder, with its adapter's."""
    if path.is_file():
        return sum(part.stat().st_size for part in parts_of(path) if part.is_file())
    files = [file for pattern in WEIGHTS for file in path.glob(pattern) if file.name != IMATRIX]
    adapter = adapter_beside(path)
    return sum(file.stat().st_size for file in files) + (
        0 if adapter is None else (adapter / ADAPTER_WEIGHTS).stat().st_size
    )


class MemoryWatch:
    """Watches one process's memory from before the model is loaded, phase by phase.

    On a CPU that is the process's resident set. On CUDA it is what torch's allocator gave out, and beside it, where
    ``nvidia-ml-py`` is installed and the driver tells, what the whole process holds on the device. Each phase begins
    its peaks anew, where the system allows it.

    Args:
        device: where the model will run.
        own_allocator: whether the runtime that loads it takes memory of a GPU past torch's allocator, so that NVML
            alone can tell.
    """

    def __init__(self, device: torch.device, *, own_allocator: bool = False) -> None:
        self._device = device
        self._probe: Probe = probe_of(device)
        self._knows = device.type == "cpu" or not own_allocator
        before = self._probe.read()
        self._resets = self._probe.begin()
        baseline = self._probe.read()
        self._baseline: int | None = baseline["used_bytes"]
        self._process_baseline: int | None = baseline.get("process_bytes")
        self._highest: int = before["peak_bytes"] if device.type == "cpu" else baseline["used_bytes"]
        self._phases: dict[Phase, dict[str, Any]] = {}
        self._weights = 0

    def loaded(self, model: LoadedModel) -> None:
        """Note the weights as they were loaded, and what loading took, before any forward pass.

        If another process has the model, its memory is watched from here on.
        """
        if model.process is not None:
            self._probe = probe_of(self._device, model.process)
            self._baseline = self._process_baseline = None  # of a process that has begun with the model
            self._highest = 0
        self._weights = model.weights_bytes()
        self._note("load")

    def run(self, model: LoadedModel, ids: torch.Tensor) -> None:
        """Have the model read a prompt, then continue a short one, and note what either takes.

        Args:
            model: that was loaded.
            ids: int64 ``[n]``, the prompt; its first tokens, again and again if need be, are continued.
        """
        with self.phase("prefill", tokens=len(ids)):
            model.prefill(ids)
        prompt = ids.repeat(-(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
        try:
            with self.phase("decode", tokens=NEW_TOKENS, prompt_tokens=PROMPT_TOKENS):
                model.decode(prompt, NEW_TOKENS)
        except EvaluationError as error:  # it keeps no KV cache
            self._phases["decode"] = {"missing": error.problem}

    @contextmanager
    def phase(self, name: Phase, **facts: int) -> Iterator[None]:
        """Watch what is done inside.

        Args:
            name: of the phase.
            facts: what its figures say beside bytes.
        """
        self._probe.begin()
        yield
        self._note(name, **facts)

    def figures(self, model: LoadedModel) -> dict[str, Any]:
        """All figures, after the phases.

        Returns:
            ``weights_bytes`` as loaded, ``weights_bytes_running`` now; ``peak_bytes``, the largest of all phases and on
            a CPU of all that the process did before, and ``peak_kind``; ``peaks_are_of``, ``phase`` or ``process``
            where no peak could be begun anew; ``baseline_bytes`` before loading; ``phases``, by name ``used_bytes`` at
            its end and ``peak_bytes``, with the tokens of a prompt and of an answer; ``device``.

            On CUDA each phase also has ``reserved_bytes`` and ``process_bytes``, and ``process_bytes`` is the largest
            of these; None is what cannot be told, as the allocator's figures of a runtime that has its own.
        """
        processes = [phase.get("process_bytes") for phase in self._phases.values()]
        figures: dict[str, Any] = {
            "weights_bytes": self._weights,
            "weights_bytes_running": model.weights_bytes(),
            "peak_bytes": self._highest if self._knows else max(filter(None, processes), default=None),
            "peak_kind": self._probe.kind if self._knows else "NVML",
            "peaks_are_of": "phase" if self._resets else "process",
            "baseline_bytes": self._baseline if self._knows else self._process_baseline,
            "phases": dict(self._phases),
            "device": device_name(self._device),
        }
        if self._device.type == "cuda":
            figures["process_bytes"] = max(filter(None, processes), default=None)
        return figures

    def whole(self) -> dict[str, Any] | None:
        """The peak of all that the process did until now, for :class:`quantkit.evaluation.stage_peak.StagePeaks`.

        None where it cannot be told: a runtime has an allocator of its own, or another process has the model.
        """
        if not self._knows or self._baseline is None:
            return None
        self._highest = max(self._highest, self._probe.read()["peak_bytes"])
        return {"kind": self._probe.kind, "baseline_bytes": self._baseline, "peak_bytes": self._highest}

    def _note(self, name: Phase, **facts: int) -> None:
        found = self._probe.read()
        self._highest = max(self._highest, found["peak_bytes"])
        if not self._resets:  # the kernel counts in portions for each core, so that its own figure may fall a little
            found["peak_bytes"] = self._highest
        if not self._knows:
            found |= dict.fromkeys(("used_bytes", "peak_bytes", "reserved_bytes"))
        self._phases[name] = {**found, **facts}
