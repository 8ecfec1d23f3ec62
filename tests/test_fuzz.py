"""Any bytes give a value or an error of quantkit, in every reader; and so does all that the fuzzers have kept."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
TAKES_ALMOST_ALL = ("index", "records", "records-json", "template", "report", "config", "pattern")
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A sound input with some of its bytes changed, taken out or put in, or cut."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("change", "insert", "remove", "cut"))):
            case "change" if data:
                data[place] = draw(st.integers(0, 255))
            case "insert":
                data[place:place] = draw(st.binary(max_size=12))
            case "remove":
                del data[place : place + draw(st.integers(1, 12))]
            case "cut" if draw(st.booleans()):
                del data[place:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_every_sound_input_is_read(name: str) -> None:
    assert all(TARGETS[name](data) for data in TARGETS[name].sound)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_refused(name: str) -> None:
    @QUICK
    @given(st.binary(max_size=200))
    def reading(data: bytes) -> None:
        TARGETS[name](data)

    reading()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_or_refused(name: str) -> None:
    @QUICK
    @given(st.one_of([damaged(sound) for sound in TARGETS[name].sound]))
    def reading(data: bytes) -> None:
        TARGETS[name](data)

    reading()


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.shape])
def test_inputs_changed_in_their_shape_are_read_or_refused(name: str) -> None:
    target, draw = TARGETS[name], random.Random(0)
    read = []
    for _ in range(10 if name == "template" else 60):
        data = draw.choice(target.sound)
        for _ in range(draw.randint(1, 3)):
            data = target.mutated(data, draw) or data
        read.append(target(data))
    assert target.mutated(target.sound[0], random.Random(1)) == target.mutated(target.sound[0], random.Random(1))
    assert not all(read) or name in TAKES_ALMOST_ALL


@pytest.mark.parametrize("file", sorted(CORPUS.rglob("*.bin")), ids=lambda file: f"{file.parent.name}-{file.stem[:12]}")
def test_what_the_fuzzers_kept_is_read_or_refused(file: Path) -> None:
    TARGETS[file.parent.name](file.read_bytes())
