"""``python -m tests.fuzz TARGET --seconds 600``: fuzz one reader, led by what its code has not done yet (atheris).

The kept corpus of the target is read first and what is new is kept beside it, in ``--corpus``. A finding is written
there as ``crash-...`` or ``timeout-...`` and ends the run with exit code 77 or 70.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

KEPT = Path(__file__).parent / "corpus"
SLOWEST = 20
"""Seconds that one input may take."""
LONGEST = 1 << 14
"""Bytes of an input."""
SHAPED = 0.7
"""The share of mutations that keep the shape of a text."""


def main() -> None:
    """Fuzz."""
    import atheris

    with atheris.instrument_imports(include=["quantkit", "json", "yaml", "zipfile", "tarfile", "minisign"]):
        from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz one reader.")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=None, help="a folder for what is found; a new one by default")
    given = parser.parse_args()
    found = given.corpus or Path("reports") / "fuzz" / given.target
    found.mkdir(parents=True, exist_ok=True)
    target = TARGETS[given.target]
    for number, sound in enumerate(target.sound):
        (found / f"sound-{number}").write_bytes(sound)
    folders = [str(found), *(str(path) for path in [KEPT / given.target] if path.is_dir())]
    options = [f"-max_total_time={given.seconds}", f"-timeout={SLOWEST}", f"-max_len={LONGEST}", "-rss_limit_mb=4096"]
    if target.words:
        words = found.with_name(f"{found.name}.dict")
        words.write_bytes(b"".join(b'"%s"\n' % _quoted(word) for word in target.words))
        options.append(f"-dict={words}")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        made = target.mutated(data, draw) if draw.random() < SHAPED else None
        return atheris.Mutate(data, most) if made is None or len(made) > most else made

    given_to = {} if target.shape is None else {"custom_mutator": mutate}
    arguments = [sys.argv[0], *folders, *options, f"-artifact_prefix={found}/"]
    atheris.Setup(arguments, lambda data: target(data), **given_to)
    atheris.Fuzz()


def _quoted(word: str) -> bytes:
    """A word of libFuzzer's dictionaries."""
    return b"".join(
        b"%c" % byte if 32 <= byte < 127 and byte not in b'"\\' else b"\\x%02x" % byte for byte in word.encode()
    )


if __name__ == "__main__":
    main()
