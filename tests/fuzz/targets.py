"""What is fuzzed: each target takes bytes and gives them to one reader, in a folder that is made anew.

A target ends well if the reader gives a value or raises a :class:`~quantkit.errors.QuantkitError`; anything else that
it raises is a finding. Each has a few sound inputs, from which the fuzzers begin.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantkit import report
from quantkit.checkpoint.header import read_header, read_index
from quantkit.checkpoint.sizes import check_sizes
from quantkit.errors import QuantkitError
from quantkit.exports.folder import read_config
from quantkit.exports.manifest import read_manifest
from quantkit.importing import import_recipe
from quantkit.merging.archives import unpack
from quantkit.merging.config import AdapterConfig
from quantkit.patterns import why_refused
from quantkit.recipe import Recipe
from quantkit.records import read_file
from quantkit.records.sandbox import TemplateFailure, render_chat
from quantkit.schemes import scheme_from_json
from quantkit.signing.files import check_files
from quantkit.signing.keys import public_key
from quantkit.source.gguf_config import generation_config, model_config
from quantkit.source.gguf_head import read_head

Read = Callable[[Path, bytes], object]
TEMPLATE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """A reader.

    Attributes:
        read: gives it the bytes; the path is of an empty folder.
        sound: inputs that it takes.
    """

    read: Read
    sound: tuple[bytes, ...]

    def __call__(self, data: bytes) -> bool:
        """Whether the reader took the bytes; what it may not raise passes through."""
        with tempfile.TemporaryDirectory(prefix="quantkit-fuzz-") as folder:
            try:
                self.read(Path(folder), data)
            except QuantkitError as error:
                if "\n" in str(error) or not str(error):
                    raise ValueError(f"not one line: {error!r}") from error
                return False
            return True


def _file(name: str, read: Callable[[Path], object]) -> Read:
    """A reader of one file."""

    def reading(folder: Path, data: bytes) -> object:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return reading


def _in_folder(name: str, read: Callable[[Path], object]) -> Read:
    """A reader of a folder with one file."""
    return _file(name, lambda path: read(path.parent))


def _gguf(path: Path) -> object:
    import torch

    head = read_head(path)
    return model_config(head, torch.float16), generation_config(head)


def _config(folder: Path) -> object:
    found = read_config(folder)
    check_sizes(found, "config.json")
    return found


def _template(_folder: Path, data: bytes) -> object:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    try:
        return render_chat(data.decode("utf-8", "replace"), messages, {"bos_token": "<s>"}, TEMPLATE_SECONDS)
    except TemplateFailure:
        return None


def _scheme(_folder: Path, data: bytes) -> object:
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return scheme_from_json(given) if isinstance(given, dict) else None


def _pattern(_folder: Path, data: bytes) -> object:
    """A pattern that is not refused must end on a long name."""
    import re

    pattern = data.decode("utf-8", "replace")
    return why_refused(pattern) is None and re.match(pattern, "model.layers.11.self_attn.q_proj")


def _archive(suffix: str) -> Read:
    def reading(folder: Path, data: bytes) -> object:
        (folder / f"adapter{suffix}").write_bytes(data)
        (folder / "inside" / "target").mkdir(parents=True)
        try:
            return unpack(folder / f"adapter{suffix}", folder / "inside" / "target")
        finally:
            if sorted(path.name for path in folder.iterdir()) != [f"adapter{suffix}", "inside"]:
                raise ValueError("a file was written outside")

    return reading


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/adapter_config.json", "{}")
        archive.writestr("a/adapter_model.safetensors", b"\0" * 8)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a/adapter_config.json"))
    return stream.getvalue()


def _safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def _gguf_bytes() -> bytes:
    key = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    row = struct.pack("<Q", 17) + b"token_embd.weight" + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + row
    return head + bytes(-len(head) % 32 + 64)


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), stream)
    return stream.getvalue()


RECIPE = b"""name: demo
model: {source: ./m, adapter: [a, {source: b, weight: 0.5}]}
calibration: {dataset: x.jsonl, samples: 4}
defaults: {group_size: 32}
variants:
- {name: a, method: gptq, bits: 4}
- {name: b, method: rtn, bits: 8}
evaluation: {texts: [prose], metrics: [perplexity]}
gates: [perplexity.prose <= 10]
"""
FACTORY = b"model_name_or_path: org/name\nexport_dir: out\nexport_quantization_bit: 4\nadapter_name_or_path: lora\n"
ADAPTER = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}'
CONFIG = b'{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "text_config": {"vocab_size": 9}}'
MANIFEST = (
    b'{"format": "gptq", "layers": {"a": {"kind": "int"}}, "files": {"manifest.json": {"bytes": 2, "sha256": "0"}}}'
)
REPORT = b'{"schema": 1, "name": "x", "variants": [{"name": "a", "metrics": {}}], "baseline": {}}'
RECORDS = (
    b'{"instruction": "a", "input": "", "output": "b"}\n{"messages": [{"role": "user", "content": "x"}]}\n{"text": "y"}'
)
TEMPLATE = (
    b"{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}"
    b"{% if loop.last %}{{ bos_token }}{% endif %}{% endfor %}"
)
SCHEME = b'{"kind": "int", "bits": 4, "group_size": 32, "symmetric": true}'
KEY = b"untrusted comment: minisign public key\nRWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n"

TARGETS: dict[str, Target] = {
    "safetensors": Target(_file("model.safetensors", read_header), (_safetensors(),)),
    "index": Target(_file("model.safetensors.index.json", read_index), (b'{"weight_map": {"a": "b.safetensors"}}',)),
    "gguf": Target(_file("model.gguf", _gguf), (_gguf_bytes(),)),
    "config": Target(_in_folder("config.json", _config), (CONFIG,)),
    "recipe": Target(_file("recipe.yaml", Recipe.load), (RECIPE,)),
    "llamafactory": Target(_file("export.yaml", import_recipe), (FACTORY,)),
    "records": Target(_file("data.jsonl", read_file), (RECORDS,)),
    "records-json": Target(_file("data.json", read_file), (b'[{"text": "a"}]', b'{"data": [{"text": "a"}]}')),
    "parquet": Target(_file("data.parquet", read_file), (_parquet(),)),
    "adapter": Target(_in_folder("adapter_config.json", lambda folder: AdapterConfig(folder, "x")), (ADAPTER,)),
    "zip": Target(_archive(".zip"), (_zip(),)),
    "tar": Target(_archive(".tar"), (_tar(),)),
    "template": Target(_template, (TEMPLATE,)),
    "pattern": Target(_pattern, (rb"re:.*layers\.(1|2)\..*_proj$", rb"[^\].]+(?:a|b)?")),
    "scheme": Target(_scheme, (SCHEME, b'{"kind": "nf4"}')),
    "manifest": Target(_in_folder("manifest.json", read_manifest), (MANIFEST,)),
    "files": Target(_in_folder("manifest.json", check_files), (MANIFEST,)),
    "report": Target(_file("report.json", report.load), (REPORT,)),
    "key": Target(_file("key.pub", lambda path: public_key(str(path))), (KEY,)),
}
"""By name, for the command line."""
