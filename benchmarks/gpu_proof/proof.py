"""All parts of the proof, one after another, in at most eight minutes of a GPU.

    python benchmarks/gpu_proof [--device cuda] [--minutes 8] [--out gpu-proof]
    python benchmarks/gpu_proof --device cpu      # tries the script itself, with small sizes

It needs the checkout, torch with CUDA and quantkit's dependencies; pytest for the tests. Each part of
``gpu_proof.parts`` runs in a process of its own, with a time limit, so that one which crashes or hangs leaves
the others alone. A line is printed as each part ends, and ``gpu-proof.json`` and ``gpu-proof.html`` in the folder
``--out`` are written anew with what is known so far, so that a run that is cut short leaves what it found. Beside them
lie the logs of the parts. It ends with 1 if a part failed or was cut.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"facts": 45, "tests": 150, "bytes": 75, "blocks": 130, "solver": 40, "smollm2": 90, "gptqmodel": 120}
"""Seconds of each part at most on a GPU, the most valuable first."""
TITLES = {
    "facts": "The machine",
    "tests": "Tests marked gpu",
    "bytes": "The same bytes on two runs",
    "blocks": "Random blocks, of the widths of Llama 3.1 8B at full size",
    "solver": "The solver of columns",
    "smollm2": "SmolLM2-135M, or its shape",
    "gptqmodel": "The same work by gptqmodel",
}
MINUTES = {"cuda": 8.0, "cpu": 40.0}
"""For everything, and each part's limit in proportion: a CPU, on which the script is tried, is slow and may be busy."""
LEAST = 3.0
"""Seconds without which a part is not begun."""
TAIL = 15
"""Lines of a failed part's log on the page."""
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:.6rem;overflow:auto}h2{margin-bottom:.2rem}.failed{color:#a00000}"
)


@dataclass(slots=True)
class Part:
    """What became of a part.

    Attributes:
        name: a key of :data:`LIMITS`.
        state: ``done``; ``failed``, ``cut`` at its limit, or ``left out`` where no time was left for it.
        seconds: that it took, the start of its process included.
        lines: what it found, in words.
        figures: the same for machines.
        log: the end of its log, if it is not done.
    """

    name: str
    state: str
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    log: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """A run of all parts.

    Attributes:
        setting: what the parts are told: ``device``, ``sizes`` and ``gptqmodel_python``.
        out: folder of the results.
        deadline: by :func:`time.monotonic`.
    """

    setting: dict[str, Any]
    out: Path
    deadline: float

    def run(self, names: Sequence[str]) -> list[Part]:
        """Run parts one after another, and write what is known after each."""
        found: list[Part] = []
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gpu-proof-") as work:
            for name in names:
                figures = {part.name: part.figures for part in found}
                found.append(self._part(name, Path(work), figures))
                self._write(found, names)
                print(summary(found[-1], self.setting["device"]), flush=True)
        return found

    def _part(self, name: str, work: Path, known: dict[str, Any]) -> Part:
        left = self.deadline - time.monotonic()
        if left < LEAST:
            return Part(name, "left out", lines=["no time was left for it"])
        limit = min(LIMITS[name] * MINUTES[self.setting["device"]] / MINUTES["cuda"], left)
        told, log, started = work / f"{name}.json", self.out / f"{name}.log", time.monotonic()
        setting = {**self.setting, "work": str(work), "known": known, "told": str(told)}
        state = run_limited(command(name, setting), log, limit)
        said = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {"lines": [], "figures": {}}
        state = "failed" if state == "done" and said.get("failed") else state
        tail = "" if state == "done" else "\n".join(log.read_text("utf-8", "replace").splitlines()[-TAIL:])
        return Part(name, state, time.monotonic() - started, said["lines"], said["figures"], tail)

    def _write(self, found: Sequence[Part], names: Sequence[str]) -> None:
        """Write the record and the page anew, each at once."""
        waiting = [name for name in names if name not in {part.name for part in found}]
        record = {"device": self.setting["device"], "sizes": self.setting["sizes"], "parts": [asdict(p) for p in found]}
        _replace(self.out / "gpu-proof.json", json.dumps({**record, "not_yet": waiting}, indent=1))
        _replace(self.out / "gpu-proof.html", page(found, waiting, self.setting))


def command(name: str, setting: dict[str, Any]) -> list[str]:
    """What carries out a part."""
    return [sys.executable, "-m", "gpu_proof.parts", name, json.dumps(setting)]


def run_limited(arguments: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command with its words in a file: ``done``, ``failed``, or ``cut`` where it had to be killed."""
    places = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    with log.open("wb") as words:
        child = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=words, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(seconds)
            if code < 0:  # then it has said nothing itself
                words.write(f"\nit was ended by {signal.Signals(-code).name}\n".encode())
            return "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "cut"
        finally:  # also where somebody interrupts
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def summary(part: Part, device: str) -> str:
    """A part in one line."""
    return f"[{device}] {TITLES[part.name]}: {part.state} in {part.seconds:.0f} s: {'; '.join(part.lines[:4]) or '-'}"


def page(found: Sequence[Part], waiting: Sequence[str], setting: dict[str, Any]) -> str:
    """All that is known as a page that stands by itself."""
    device, sizes = setting["device"], setting["sizes"]
    about = f"{sizes} sizes, on {device}"
    if device == "cpu":
        about += "; every figure is one of a cpu and says nothing of a GPU"
    blocks = [
        f"<title>quantkit on {device}</title><style>{STYLE}</style>",
        f"<h1>quantkit on {device}</h1><p>{about}</p>",
    ]
    for part in found:
        shade = "" if part.state == "done" else " class=failed"
        blocks.append(f"<h2>{html.escape(TITLES[part.name])}</h2>")
        blocks.append(f"<p{shade}>{part.state} on {device}, {part.seconds:.1f} s</p><ul>")
        blocks += [f"<li>{html.escape(line)}</li>" for line in part.lines]
        blocks.append("</ul>" + (f"<pre>{html.escape(part.log)}</pre>" if part.log else ""))
    blocks += [f"<h2>{html.escape(TITLES[name])}</h2><p>not run yet</p>" for name in waiting]
    return '<!doctype html><html lang="en"><meta charset="utf-8">\n' + "\n".join(blocks) + "\n</html>\n"


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is always whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("full", "small"), help="by default full on cuda and small on cpu")
    told = ", ".join(f"{minutes:.0f} on {device}" for device, minutes in MINUTES.items())
    parser.add_argument("--minutes", type=float, help=f"for everything; {told} if not given")
    parser.add_argument("--out", type=Path, default=Path("gpu-proof"))
    parser.add_argument(
        "--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART", help=", ".join(LIMITS)
    )
    parser.add_argument("--gptqmodel-python", help="interpreter of an environment with gptqmodel")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part which is at work ends too
    deadline = time.monotonic() + 60 * (given.minutes or MINUTES[given.device])
    sizes = given.sizes or ("full" if given.device == "cuda" else "small")
    setting = {"device": given.device, "sizes": sizes, "gptqmodel_python": given.gptqmodel_python}
    found = Proof(setting, given.out.absolute(), deadline).run(given.parts)
    print(f"results: {given.out / 'gpu-proof.json'}, {given.out / 'gpu-proof.html'}")
    sys.exit(any(part.state in ("failed", "cut") for part in found))


if __name__ == "__main__":
    main()
