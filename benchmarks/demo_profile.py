"""Where the time of a run goes: seconds and processor seconds of each stage of a recipe, and within stages.

A walk is told apart into the passes of the calibration rows, sums of their products, solving and so on, as
`benchmarks/walk_phases.py` has them; scoring into the start of its process, loading, the runs that tell memory and
speed, and each text. Processor seconds are those of all processes of the run. The run is done anew in a folder that is
removed again, or in the one that `--folder` names. `--keep FILE` writes the table into a file; the last line is JSON.

    python benchmarks/demo_profile.py recipes/smollm2.yaml
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import psutil
import torch
from scoring import machine
from walk_phases import Phases, phases

import quantkit
from quantkit.engine.precision import pass_dtype
from quantkit.recipe import Recipe

START, LOADED, END = "start of the process", "memory and speed", "end"
BEFORE = {"texts": START, "load": "reading the tokenizer"}
"""What the time before the first event of a step belongs to."""


def processor_seconds() -> float:
    """Of this process and of all that it has started, alive or not."""
    own = psutil.Process()
    found = 0.0
    for each in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found


class Profile:
    """An observer that keeps what passed between two events, by stage and by what was done.

    Attributes:
        found: seconds and processor seconds, by stage and part.
        notes: that the run gave.
    """

    def __init__(self, spent: Phases) -> None:
        self.found: dict[tuple[str, str], list[float]] = {}
        self.notes: list[str] = []
        self._spent = spent
        self._stage, self._step = "start", ""
        self._walk: dict[str, tuple[float, float]] = {}
        self._then = time.perf_counter(), processor_seconds()

    def stage(self, title: str) -> None:
        """A stage begins, and the one before has ended."""
        self.close()
        self._stage, self._step = title, ""
        self._spent.switch()
        self._walk = self._phases()

    def progress(self, step: str, done: int, total: int) -> None:
        """Count what passed to the step, or to what comes before it."""
        if self._is_scoring():
            before = BEFORE.get(step, LOADED if self._step == "load" else step)
            self._count(before if step != self._step and done == 0 else step)
        self._step = step

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)

    def close(self) -> None:
        """A stage has ended, and is printed."""
        self._count(END if self._is_scoring() else "")
        self._end_walk()
        print("\n".join(self.lines_of(self._stage)), flush=True)

    def _is_scoring(self) -> bool:
        return self._stage.startswith(("baseline", "evaluate"))

    def _count(self, part: str) -> None:
        now = time.perf_counter(), processor_seconds()
        kept = self.found.setdefault((self._stage, part), [0.0, 0.0])
        for place, (since, until) in enumerate(zip(self._then, now, strict=True)):
            kept[place] += until - since
        self._then = now

    def _phases(self) -> dict[str, tuple[float, float]]:
        return {name: (seconds, self._spent.processor[name]) for name, seconds in self._spent.seconds.items()}

    def _end_walk(self) -> None:
        """Split what a walk took into its phases."""
        if not self._stage.startswith("quantize"):
            return
        self._spent.switch()
        self.found.pop((self._stage, ""))
        for name, now in self._phases().items():
            then = self._walk.get(name, (0.0, 0.0))
            self.found[self._stage, name] = [after - before for after, before in zip(now, then, strict=True)]

    def lines(self) -> list[str]:
        """A table for people."""
        stages = dict.fromkeys(stage for stage, _ in self.found)
        whole = [sum(taken[place] for taken in self.found.values()) for place in (0, 1)]
        head, end = f"{'':44} {'seconds':>8} {'processor':>10}", f"{'in all':44} {whole[0]:8.1f} {whole[1]:10.1f}"
        return [head, *(line for stage in stages for line in self.lines_of(stage)), end]

    def lines_of(self, stage: str) -> list[str]:
        """A stage, and what it was made of."""
        parts = {part: taken for (other, part), taken in self.found.items() if other == stage}
        lines = [f"{stage[:44]:44} {_sum(parts, 0):8.1f} {_sum(parts, 1):10.1f}"]
        return [*lines, *(f"  {part:42} {taken[0]:8.1f} {taken[1]:10.1f}" for part, taken in parts.items() if part)]


def _sum(parts: dict[str, list[float]], place: int) -> float:
    return sum(taken[place] for taken in parts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--folder", help="where the run goes, and stays")
    parser.add_argument("--keep", type=Path, help="a file for the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, phases() as spent:
        recipe = Recipe.load(given.recipe)
        folder = recipe.report.model_copy(update={"folder": given.folder or scratch})
        history = recipe.history.model_copy(update={"enabled": False})
        profile = Profile(spent)
        quantkit.run(recipe.model_copy(update={"report": folder, "history": history}), profile)
        profile.close()
    about = machine()
    dtype = str(pass_dtype(torch.device("cpu"), torch.bfloat16)).removeprefix("torch.")
    head = f"{given.recipe.name}, {date.today()}: {about['cpu']}, {about['threads']} threads, passes in {dtype}"
    table = "\n".join([head, *profile.lines()])
    print(f"\n{table}")
    if given.keep is not None:
        given.keep.write_text(table + "\n", encoding="utf-8")
    parts = [{"stage": stage, "part": part, "seconds": taken} for (stage, part), taken in profile.found.items()]
    print(json.dumps({"parts": parts, "notes": profile.notes, **about}))


if __name__ == "__main__":
    main()
