"""A model that is read a block at a time gives the figures of one that is loaded whole, and says what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.estimation import anatomy_of
from quantkit.estimation.streaming import (
    Scored,
    block_bytes,
    hidden_line,
    streamed_scoring,
    where_activations_wait,
    whole_scoring,
)
from quantkit.system.free_memory import left_by_groups
from tests.test_threads import group

GIB = 1 << 30
LARGE = "llama-3.1-70b"


def test_a_70b_does_not_fit_on_a_card_and_its_blocks_do() -> None:
    anatomy, scored = anatomy_of(LARGE), Scored(16384, 512, "bfloat16", "cuda")
    assert whole_scoring(anatomy, scored).nbytes > 130 * GIB
    assert block_bytes(anatomy, "bfloat16") < streamed_scoring(anatomy, scored).nbytes < 12 * GIB


def test_activations_wait_where_there_is_room() -> None:
    anatomy, scored = anatomy_of(LARGE), Scored(1 << 21, 512, "bfloat16", "cuda")
    needed = hidden_line(anatomy, scored).nbytes
    assert needed == 2 * scored.tokens * anatomy.hidden * 2
    assert where_activations_wait(anatomy, scored, 2 * needed, 0) == "device"
    assert where_activations_wait(anatomy, scored, needed, 2 * needed) == "cpu"
    assert where_activations_wait(anatomy, scored, needed, needed) == "disk"
    on_cpu = Scored(1 << 21, 512, "bfloat16", "cpu")
    assert where_activations_wait(anatomy, on_cpu, needed, needed) == "disk"


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/\n", {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 200\nanon 1"}, [500]),
        ("0::/\n", {"memory.max": "max", "memory.current": "700", "memory.stat": "anon 1"}, []),
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "total_active_file 50\ntotal_inactive_file 0",
            },
            [150],
        ),
        ("3:cpu:/\n", {"memory/memory.limit_in_bytes": "1000"}, []),
    ],
)
def test_what_a_container_leaves_is_read(tmp_path: Path, lines: str, files: dict[str, str], left: list[int]) -> None:
    root = group(tmp_path, lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(left_by_groups(root)) == left
