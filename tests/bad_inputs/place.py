"""Where a case is made: a folder of its own, and sound things to copy and break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import quantkit
from tests.adapters import make_adapter
from tests.gguf_models import byte_level_tokenizer, model_with
from tests.runs import recipe_data, write_records
from tests.test_source_gguf import write_gguf
from tests.tiny import make_model

INSIDE, OUTSIDE = "inside", "outside"
CANARY = "canary"
"""What code that an input brings would make in the folder outside."""


@dataclass(frozen=True, slots=True)
class Kit:
    """Sound things on disk, which no case changes."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Kit:
        """Make them all, once."""
        make_model(folder / "model", shards=3, dtype=torch.bfloat16)
        make_model(folder / "single", dtype=torch.bfloat16)
        make_adapter(folder / "adapter", folder / "single")
        write_records(folder / "data.jsonl")
        options: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32}
        quantkit.quantize(folder / "single", out=folder / "export", **options)
        quantkit.quantize(folder / "single", out=folder / "packed-gguf", **{**options, "format": "gguf"})
        write_gguf(folder / "float.gguf")
        model_with(folder / "merges", byte_level_tokenizer())
        return cls(folder)


@dataclass(frozen=True, slots=True)
class Place:
    """A fresh folder for one case: ``inside`` is where the command runs, ``outside`` is where nothing may change."""

    root: Path
    kit: Kit

    @classmethod
    def make(cls, root: Path, kit: Kit) -> Place:
        """Make the two folders."""
        (root / INSIDE).mkdir(parents=True)
        (root / OUTSIDE).mkdir()
        (root / OUTSIDE / "secret.txt").write_text("nobody may read or write here")
        return cls(root, kit)

    @property
    def inside(self) -> Path:
        return self.root / INSIDE

    @property
    def outside(self) -> Path:
        return self.root / OUTSIDE

    @property
    def canary(self) -> Path:
        """A file that only code of the input would make."""
        return self.outside / CANARY

    @property
    def out(self) -> str:
        """Where the command is told to write."""
        return str(self.root / "out")

    def copy(self, name: str) -> Path:
        """A copy of a sound thing of the kit, to be broken."""
        source, target = self.kit.folder / name, self.inside / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    def sound(self, name: str) -> str:
        """A sound thing itself, for what a case leaves whole."""
        return str(self.kit.folder / name)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file inside."""
        path = self.inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, edit: Callable[[dict[str, Any]], object] | None = None, **changes: Any) -> str:
        """A recipe file of the sound model, edited."""
        folder = self.kit.folder
        data = recipe_data(folder / "single", folder / "data.jsonl", Path(self.out), [{"name": "a", "method": "rtn"}])
        data |= changes
        if edit is not None:
            edit(data)
        return str(self.write("recipe.yaml", yaml.safe_dump(data, sort_keys=False)))

    def quantize(self, model: Path | str) -> list[str]:
        """The command that quantizes a model."""
        return ["quantize", str(model), "-o", self.out, "--method", "rtn", "--group-size", "32"]

    def merge(self, adapter: Path | str, base: str | None = None, *further: str) -> list[str]:
        """The command that merges an adapter into the sound model."""
        return ["merge", base or self.sound("single"), str(adapter), self.out, *further]


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` takes a key away."""
    content = json.loads(file.read_text())
    content |= changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def nan_tensor(*shape: int) -> torch.Tensor:
    """A tensor whose first number is not one."""
    tensor = torch.zeros(shape)
    tensor.view(-1)[0] = float("nan")
    return tensor
