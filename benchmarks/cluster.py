"""The sweep of eight variants over two nodes of one core each against one: walks, scores and the report of a whole run.

Nodes are Ray's simulated ones, on this machine, which should have two idle cores at least. Runs alternate; each has a
folder of its own and nodes that have just begun. The ratio of each pair is printed; the last line is JSON, which also
says whether all checkpoints have the same bytes. With ``--tasks`` it also prints when each task was asked for, was
placed and ended, in seconds from the beginning of the run.

    OMP_NUM_THREADS=1 python benchmarks/cluster.py --model FOLDER --records alpaca.json --pairs 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sweep import EIGHT

INPUTS = ("float", "quantized")


def recipe(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The recipe of a run."""
    return {
        "name": "sweep",
        "model": str(given.model),
        "calibration": {
            "dataset": str(given.records),
            "samples": given.samples,
            "max_length": 512,
            "inputs": given.inputs,
        },
        "defaults": {"group_size": given.group_size},
        "variants": EIGHT,
        "quantization": {"device": "cpu"},
        "evaluation": {
            "device": "cpu",
            "max_tokens": given.max_tokens,
            "metrics": ["perplexity", "kl_divergence", "top1_agreement"],
        },
        "report": {"folder": str(folder)},
    }


def timed(given: argparse.Namespace, nodes: int, folder: Path) -> tuple[float, str]:
    """Seconds of a run over so many nodes, and the digest of its checkpoints."""
    import ray
    from ray.cluster_utils import Cluster

    import quantkit
    from quantkit.system.progress import Silent

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        started = time.perf_counter()
        content = quantkit.run(recipe(given, folder), Silent(), cluster=cluster.address)
        seconds = time.perf_counter() - started
    finally:
        ray.shutdown()
        cluster.shutdown()
    failed = [row for row in content["variants"] if row["status"] != "ok"]
    if failed:
        raise SystemExit(f"{failed[0]['name']}: {failed[0]['error']}")
    digest = hashlib.sha256()
    for file in sorted(folder.glob("variants/*/*.safetensors")):
        digest.update(file.read_bytes())
    return seconds, digest.hexdigest()


def tasks(folder: Path) -> list[str]:
    """When each task of a run was asked for, was placed, and ended: seconds from its beginning, as its log tells."""
    seen: dict[str, list[float]] = {}
    for line in (folder / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] in ("task", "placed", "ended"):
            seen.setdefault(event["task"], []).append(event["elapsed"])
        elif event["event"] == "end":
            seen["end"] = [event["elapsed"]]
    return [f"{' '.join(f'{time:7.1f}' for time in times):25}{task}" for task, times in seen.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--inputs", choices=INPUTS, default="float")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--tasks", action="store_true", help="print when each task ran")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    ratios, digests = [], set()
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(given.pairs):
            seconds = {}
            for nodes in (1, 2) if pair % 2 == 0 else (2, 1):
                folder = Path(scratch) / f"{pair}-{nodes}"
                seconds[nodes], digest = timed(given, nodes, folder)
                digests.add(digest)
                if given.tasks:
                    print(f"nodes: {nodes}", *tasks(folder), sep="\n", flush=True)
            ratios.append(seconds[1] / seconds[2])
            print(
                f"one node {seconds[1]:.1f} s, two nodes {seconds[2]:.1f} s: {ratios[-1]:.2f} times as fast", flush=True
            )
    print(json.dumps({"ratios": ratios, "median": statistics.median(ratios), "same_bytes": len(digests) == 1}))


if __name__ == "__main__":
    main()
