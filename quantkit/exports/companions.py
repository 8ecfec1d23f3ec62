"""What goes along with the weights: tokenizer, chat templates, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantkit.exports.manifest import MANIFEST
from quantkit.system.artifacts import STAGE_FILE, translated_os_errors

VOICES = "spk_dict.pt"
"""Tensors of the voices of models that speak, without which transformers does not load these; read as tensors alone."""
COMPANIONS = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "merges.txt", "vocab.*", "*.tiktoken",
    VOICES, "LICENSE*", "NOTICE*",
)  # fmt: skip
LEFT_OUT = {"config.json", "quantize_config.json", STAGE_FILE, MANIFEST}
LICENCES = ("LICENSE*", "NOTICE*")


def copy_companions(origin: Path, folder: Path, *, runs_code: bool = False, patterns: tuple[str, ...] = ()) -> None:
    """Copy from a model's folder what loaders need beside the weights and the config.

    Args:
        origin: the model.
        folder: where to.
        runs_code: the model's Python files go along too.
        patterns: which files; by default all that transformers may ask for, and the licence.

    Raises:
        OutputError: the folder cannot be written.
    """
    wanted = patterns or ((*COMPANIONS, "*.py") if runs_code else COMPANIONS)
    for path in sorted({path for pattern in wanted for path in origin.glob(pattern)}):
        if path.is_file() and path.name not in LEFT_OUT and not path.name.endswith(".index.json"):
            target = folder / path.relative_to(origin)
            with translated_os_errors(target):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
