"""The threads of a process of quantkit's own: how many, and how they wait for each other.

How many follows from the machine alone, never from its load: products are summed in another order by another number of
threads, so that codes differ (:mod:`quantkit.quantization.resume` counts it in). Nor need there be fewer beside other
processes, as long as threads sleep while they wait. OpenMP lets them spin by default, for milliseconds at the end of
every parallel loop; where a processor is shared, they spin away the time of the very thread that they wait for.

OpenMP reads its variables when it is loaded, with torch. So they are set before, in the process of the command line and
in children. A process that imports quantkit is somebody else's, and is left as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import ceil
from pathlib import Path

COUNT = "OMP_NUM_THREADS"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What tells OpenMP how to wait: the standard's variable, GNU's and LLVM's."""
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of threads in a process of quantkit's own: those that the user has set, and what fits else.

    The number of threads is set only where OpenMP would not see how few processors there are: it knows those that a
    process is bound to, and not the quota of a container.

    Args:
        environment: that of this process.
    """
    told = {name: environment[name] for name in (COUNT, *WAITING) if name in environment}
    waiting = {} if any(name in told for name in WAITING) else PASSIVE
    few = {} if COUNT in told or processors() == _bound_to() else {COUNT: str(processors())}
    return {**waiting, **few, **told}


def count(environment: Mapping[str, str]) -> int:
    """Threads of work that OpenMP does not share out: ``OMP_NUM_THREADS``, or one for each processor."""
    asked = environment.get(COUNT, "").partition(",")[0].strip()  # a number for each level of nesting
    return int(asked) if asked.isdecimal() and int(asked) > 0 else processors()


def processors() -> int:
    """Processors that this process may use: those that it is bound to, or fewer by the quota of its control group."""
    quota = quota_of()
    return _bound_to() if quota is None else max(min(_bound_to(), ceil(quota)), 1)


def quota_of(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups of this process leave it; None where they set no limit.

    Both versions of control groups are read. Inside a container a group may go by the name that it has outside; the
    limit of the container is then that of the root.

    Args:
        root: the folder that has ``proc`` and ``sys``.
    """
    quotas = [_quota_in(group) for group in control_groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def control_groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """The folders of the control groups that this process is in, with those around them, for a controller.

    Args:
        controller: such as ``cpu`` or ``memory``.
        root: the folder that has ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux, or one that hides it
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", controller) or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = top / name.strip("/")
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def _quota_in(group: Path) -> float | None:
    """The limit that one control group sets."""
    try:
        if (group / "cpu.max").is_file():  # version 2
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((group / name).read_text(encoding="utf-8").strip() for name in names)
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _bound_to() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
