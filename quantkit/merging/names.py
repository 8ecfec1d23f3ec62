"""Whether an adapter belongs to the base that it is to be merged into."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.system.artifacts import read_json

_CACHE = re.compile(r"(?:^|/)models--[^/]+?--([^/]+)(?:/snapshots/[^/]+)?$")
_NF4_COPY = re.compile(r"(-unsloth)?-bnb-4bit$")
_QUANTIZED = re.compile(r"(gptq|awq|bnb|[48]-?bit|int[48]|fp8|hqq|gguf)", re.IGNORECASE)


def check_base(origin: str, trained_on: str, reference: str, folder: Path) -> tuple[str, ...]:
    """Check that an adapter was trained on the base that is given, by name.

    Names are alike if their last parts are, whatever their case: an organization, the folders above, and the suffix
    with which 4-bit copies are published for QLoRA do not count.

    Args:
        origin: what messages call the adapter.
        trained_on: ``base_model_name_or_path`` of the adapter; may be empty.
        reference: what the user calls the base.
        folder: where the base lies, whose config may tell its name.

    Returns:
        What the user should know.

    Raises:
        SourceError: the names differ.
    """
    if not trained_on:
        return (f"adapter {origin} does not name the base that it was trained on; shapes alone were compared",)
    wanted = tail(trained_on)
    given = {tail(name) for name in _names(reference, folder)}
    if wanted in given:
        return ()
    if _NF4_COPY.sub("", wanted) in given:
        return (
            f"adapter {origin} was trained on {trained_on}, a 4-bit copy of the base: "
            "merge.base: nf4 merges into weights like those",
        )
    way_out = "give its float original, and" if _QUANTIZED.search(wanted) else "give that base, or"
    raise SourceError(
        f"adapter {origin} was trained on '{trained_on}', and the base is '{reference}'",
        f"{way_out} set merge.any_base: true if the base holds the same weights",
    )


def tail(name: str) -> str:
    """The last part of a model's name or path in lower case; of a folder of the hub's cache the model's own name."""
    plain = name.replace("\\", "/").rstrip("/").partition("@")[0]
    cached = _CACHE.search(plain)
    return (cached[1] if cached else plain.rpartition("/")[2]).casefold()


def _names(reference: str, folder: Path) -> Iterator[str]:
    yield reference
    path = Path(reference).expanduser()
    if path.exists():
        yield str(path.resolve())
    config = folder / "config.json"
    named = read_json(config).get("_name_or_path") if config.is_file() else None
    if isinstance(named, str) and named:
        yield named
