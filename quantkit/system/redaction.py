"""Secrets out of texts that other people's code wrote, before they go to a log, a record, a report or the terminal."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SECRET_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "QUANTKIT_KEY_PASSWORD"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET"),
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN"),
)
FEWEST_CHARACTERS = 6
"""Of a secret that is looked for as it stands; a shorter one would hide words."""
_PATTERNS = (
    (re.compile(r"(?i)(authorization\s*[:=]\s*)(?:(?:bearer|basic|token)\s+)?[^\s,;'\"}\]]+"), r"\1" + HIDDEN),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{6,}"), r"\1" + HIDDEN),
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}"), HIDDEN),
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@'\"]+@"), r"\1" + HIDDEN + "@"),
    (re.compile(r"(?i)([?&](?:token|access_token|api_key|key|signature|x-amz-[a-z-]+)=)[^&\s'\"]+"), r"\1" + HIDDEN),
)
"""Headers, tokens of the hub, users and passwords in addresses, and signed addresses."""


def redacted(text: str) -> str:
    """The text with what may be a secret put out of sight.

    Tokens are known by their look and by the variables of the environment that hold them.
    """
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= FEWEST_CHARACTERS:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
