"""The head of a model card, which the hub reads: https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.companions import licence_files
from quantkit.formats.base import Format
from quantkit.schemes import Scheme

CARRIED = ("license", "license_name", "license_link", "language")
LONGEST = 1 << 20
"""Bytes of a source's card that are read at most."""
LICENCES = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"\bMIT License\b|Permission is hereby granted, free of charge, to any person obtaining a copy",
    "bsd-3-clause": r"Redistribution and use in source and binary forms(?s:.*)Neither the name",
}
"""What the text of a licence begins with or holds, by the hub's name of it."""
SHORT_TEXT = re.compile(r"[\w .:/#+()-]{1,200}", re.ASCII)


def front_matter(
    store: type[Format],
    schemes: Mapping[str, Scheme],
    method: str | None,
    base_model: str | None,
    source: Path | None,
) -> str:
    """The YAML between the lines of dashes, these included.

    Args:
        store: the checkpoint's format.
        schemes: of its layers.
        method: that quantized it.
        base_model: ``org/name`` of the float model on the hub.
        source: folder of the float model, whose card or licence file tells the licence and the languages.
    """
    content: dict[str, Any] = {}
    if base_model is not None:
        content["base_model"] = base_model
        content |= {"base_model_relation": "quantized"} if schemes else {}
    if any(runtime.startswith("transformers") for runtime in store.runtimes):
        content["library_name"] = "transformers"
    content |= stated(source) if source is not None else {}
    content["pipeline_tag"] = "text-generation"
    content["tags"] = tags(store.name, list(schemes.values()), method)
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def tags(form: str, schemes: Sequence[Scheme], method: str | None) -> list[str]:
    """What the hub's search finds the model by: the tool, the format, the method, the commonest bits."""
    found = ["quantkit", form, *([method] if method else [])]
    if schemes:
        bits = Counter(scheme.bits for scheme in schemes).most_common(1)[0][0]
        found.append(f"{bits}-bit")
    return list(dict.fromkeys(found))


def stated(source: Path) -> dict[str, Any]:
    """Licence and languages as the source's card states them, or its licence file; what is not stated is absent.

    A card whose head is no YAML states nothing.
    """
    found = {key: value for key, value in _head(source / "README.md").items() if key in CARRIED and _is_plain(value)}
    if "license" in found:
        return found
    file = next(
        (path for path in licence_files(source) if re.match("licen[cs]e|copying", path.name, re.IGNORECASE)), None
    )
    if file is None:
        return found
    text = _read(file)
    known = next((name for name, pattern in LICENCES.items() if re.search(pattern, text)), None)
    return found | ({"license": known} if known else {"license": "other", "license_link": file.name})


def _head(card: Path) -> dict[str, Any]:
    opening, _, rest = _read(card).replace("\r\n", "\n").partition("---\n")
    end = f"\n{rest}".find("\n---")
    if opening.strip() or end < 0:
        return {}
    try:
        content = yaml.safe_load(rest[:end])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return stream.read(LONGEST).decode("utf-8", errors="replace")


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 200 and all(isinstance(each, str) and _is_plain(each) for each in value)
    return isinstance(value, str) and SHORT_TEXT.fullmatch(value) is not None
