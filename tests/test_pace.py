"""Time left: of the step from its own rate, of the run from all that was measured, whatever steps a stage has."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from quantkit.cli import display
from quantkit.system.events import EventLog
from quantkit.system.pace import Ahead, Pace, about, tell_ahead
from quantkit.system.progress import Several, Silent


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def evaluation(name: str, *, answers: float = 40.0) -> list[Ahead]:
    title = f"evaluate: {name}"
    return [
        Ahead(title, "load", 10.0, "load"),
        Ahead(title, "", 5.0, "speed"),
        Ahead(title, "prose", 20.0, "prose"),
        Ahead(title, "answers", answers, "answers"),
    ]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock)


def steps(pace: Pace, clock: Clock, step: str, total: int, each: float, upto: int | None = None) -> None:
    pace.progress(step, 0, total)
    for done in range(1, (total if upto is None else upto) + 1):
        clock.now += each
        pace.progress(step, done, total)


def test_a_step_is_not_charged_with_the_steps_before_it(pace: Pace, clock: Clock) -> None:
    pace.stage("evaluate: a")
    steps(pace, clock, "prose", 16, 60.0)
    steps(pace, clock, "answers", 16, 2.0, upto=1)
    assert pace.step_left() == pytest.approx(30.0)  # and not 15 times the minutes that prose took
    assert pace.run_left() is None


def test_a_step_that_begins_without_a_word_is_timed_from_its_second_unit(pace: Pace, clock: Clock) -> None:
    pace.stage("evaluate: a")
    steps(pace, clock, "load", 1, 1.0)
    clock.now += 100.0  # memory and speed, of which nothing is told
    pace.progress("prose", 1, 4)
    clock.now += 3.0
    pace.progress("prose", 2, 4)
    assert pace.step_left() == pytest.approx(6.0)


def test_the_run_is_told_from_the_start_and_moves_with_what_is_measured(pace: Pace, clock: Clock) -> None:
    pace.expect([*evaluation("baseline"), *evaluation("a"), *evaluation("b")])
    assert pace.run_left() == pytest.approx(225.0)
    assert pace.is_rough()
    pace.stage("evaluate: baseline")
    steps(pace, clock, "load", 1, 20.0)  # twice what was expected: all else is taken for twice as slow
    assert pace.run_left() == pytest.approx(2 * (65 + 75 + 75))
    clock.now += 5.0
    steps(pace, clock, "prose", 4, 10.0)
    steps(pace, clock, "answers", 4, 5.0)
    left = (20 + 5 + 40 + 20) * 2
    assert pace.run_left() == pytest.approx(left)
    assert not pace.is_rough()
    pace.stage("evaluate: a")
    assert pace.run_left() == pytest.approx(left)
    pace.stage("evaluate: b")  # the result was there
    assert pace.run_left() == pytest.approx(left / 2)
    steps(pace, clock, "load", 1, 20.0)
    clock.now += 5.0
    steps(pace, clock, "prose", 4, 20.0, upto=2)  # slower than before
    assert pace.step_left() == pytest.approx(40.0)
    assert pace.run_left() == pytest.approx(40.0 + 20.0)


def test_a_process_counts_from_its_start_to_its_end(pace: Pace, clock: Clock) -> None:
    ahead = [
        Ahead(f"evaluate: {name}", step, seconds, step or "close")
        for name in "abc"
        for step, seconds in (("load", 6.0), ("prose", 1.0), ("", 1.0))
    ]
    pace.expect(ahead)
    for name in "ab":
        pace.stage(f"evaluate: {name}")
        clock.now += 5.0  # the process starts
        pace.progress("texts", 1, 1)
        steps(pace, clock, "load", 1, 1.0)
        steps(pace, clock, "prose", 2, 0.5)
        clock.now += 3.0  # it ends, and what it found is written
    pace.stage("evaluate: c")
    assert pace.run_left() == pytest.approx(6.0 + 1.0 + 3.0)
    clock.now += 4.0
    assert pace.run_left() == pytest.approx(6.0)  # also before anything is heard of it
    pace.progress("load", 0, 1)
    assert pace.step_left() == pytest.approx(2.0)


def test_what_is_left_shrinks_between_two_words_of_progress(pace: Pace, clock: Clock) -> None:
    pace.stage("x")
    steps(pace, clock, "block", 10, 10.0, upto=2)
    clock.now += 4.0
    assert pace.step_left() == pytest.approx(76.0)


def test_a_stage_that_nobody_expected_changes_nothing(pace: Pace, clock: Clock) -> None:
    pace.expect(evaluation("a"))
    pace.stage("install: something")
    steps(pace, clock, "load", 1, 500.0)
    assert pace.run_left() == pytest.approx(75.0)


def test_plain_lines_tell_the_step_and_the_run(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr(display, "Pace", lambda: Pace(clock))
    stream = io.StringIO()
    with display.Display(Console(file=stream, width=200)) as shown:
        tell_ahead(Several(Silent(), shown), [*evaluation("a"), *evaluation("b")])
        shown.stage("evaluate: a")
        for step, each in (("load", 10.0), ("prose", 100.0), ("answers", 6.0)):
            for done in range(5):
                shown.progress(step, done, 4)
                clock.now += each
    lines = stream.getvalue().splitlines()
    assert lines[0].strip() == "very roughly 2 min left of the run"
    answers = next(line for line in lines if "answers 1/4" in line)
    assert "about 20 s left of this step" in answers
    assert "min left of the run" in answers


def test_the_bar_tells_them_too() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    shown = display.Display(console)
    shown.expect(evaluation("a"))
    shown.stage("evaluate: a")
    shown.progress("load", 0, 1)
    with console.capture() as drawn:
        console.print(shown._bars.get_renderable())
    assert "left of this step, very roughly 75 s left of the run" in drawn.get()


def test_events_have_the_seconds(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = EventLog(stream)
    log.expect(evaluation("a"))
    log.stage("evaluate: a")
    log.progress("load", 0, 1)
    told = json.loads(stream.getvalue().splitlines()[-1])
    assert told["step_left"] == pytest.approx(10.0, abs=0.5)
    assert told["run_left"] == pytest.approx(75.0, abs=0.5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1, "5 s"), (33, "35 s"), (100, "2 min"), (4000, "67 min"), (7800, "2 h 10 min"), (7100, "2 h")],
)
def test_times_to_come_have_few_digits(seconds: float, words: str) -> None:
    assert about(seconds) == words
