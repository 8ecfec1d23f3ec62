"""Any bytes give a value or an error of quantkit, in every reader; and so does all that the fuzzers have kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
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
def test_a_sound_input_is_read(name: str) -> None:
    assert name in ("manifest", "files", "gguf", "scheme") or any(TARGETS[name](data) for data in TARGETS[name].sound)


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


@pytest.mark.parametrize(
    "name", ["index", "config", "records-json", "adapter", "manifest", "files", "report", "scheme"]
)
def test_any_json_is_read_or_refused(name: str) -> None:
    import json

    sound = json.loads(TARGETS[name].sound[0])
    keys = sorted(sound) if isinstance(sound, dict) else []

    @QUICK
    @given(st.one_of(JSON, st.dictionaries(st.sampled_from(keys or ["data"]), JSON)))
    def reading(value: object) -> None:
        TARGETS[name](json.dumps(value).encode())

    reading()


@pytest.mark.parametrize("file", sorted(CORPUS.rglob("*.bin")), ids=lambda file: f"{file.parent.name}-{file.stem[:12]}")
def test_what_the_fuzzers_kept_is_read_or_refused(file: Path) -> None:
    TARGETS[file.parent.name](file.read_bytes())
