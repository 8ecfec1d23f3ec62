"""What is fuzzed: each target takes bytes and gives them to one reader, in a folder that is made anew.

A target ends well if the reader gives a value or raises a :class:`~quantkit.errors.QuantkitError`; anything else that
it raises is a finding. Each has a few sound inputs, from which the fuzzers begin.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import yaml

from quantkit import report
from quantkit.checkpoint.header import DTYPES, read_header, read_index
from quantkit.checkpoint.sizes import check_sizes
from quantkit.errors import QuantkitError
from quantkit.evaluation.task_files import read_task
from quantkit.exports import open_export
from quantkit.exports.folder import read_config
from quantkit.exports.manifest import read_manifest
from quantkit.gates.syntax import parse_gate
from quantkit.gguf.config import generation_config, model_config
from quantkit.gguf.head import read_head
from quantkit.inspection import inspect
from quantkit.merging.archives import unpack
from quantkit.merging.config import AdapterConfig
from quantkit.publishing.push import files_to_push
from quantkit.publishing.signature_keys import public_key
from quantkit.publishing.signatures import check_files, verify_signature
from quantkit.recipe import Recipe
from quantkit.recipe.llamafactory import import_recipe
from quantkit.records import read_file
from quantkit.records.sandbox import TemplateFailure, render_chat
from quantkit.schemes import scheme_from_json
from quantkit.system.patterns import why_refused
from tests.fuzz.mutation import Mutate, in_json, in_lines, in_text, in_yaml, words_in

Read = Callable[[Path, bytes], object]
TEMPLATE_SECONDS = 2.0
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Target:
    """A reader.

    Attributes:
        read: gives it the bytes; the path is of an empty folder.
        sound: inputs that it takes.
        words: what its grammar is made of, as far as that stands in the code.
        shape: makes mutations that keep the shape of its inputs; None where these are no text.
    """

    read: Read
    sound: tuple[bytes, ...]
    words: tuple[str, ...] = ()
    shape: Callable[[Sequence[str]], Mutate] | None = None

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

    def mutated(self, data: bytes, draw: random.Random) -> bytes | None:
        """The input changed in its shape; None where it has none."""
        if self.shape is None:
            return None
        try:
            return self.shape(self.words)(data, draw)
        except (ValueError, RecursionError, OverflowError, yaml.YAMLError):
            return None


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


MOST_BYTES = 1 << 20


def _export(folder: Path, data: bytes) -> object:
    """A checkpoint as described: its config, its manifest, and the names, types, shapes and bytes of its tensors."""
    try:
        given = json.loads(data)
        _write_export(folder, given["config"], given["manifest"], given["tensors"], given["bytes"])
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError):
        return None  # no such description
    export = open_export(folder)
    for layer in export.schemes:
        export.decodable(layer).dequantize(torch.float32)
    return inspect(folder, deep=False)


def _write_export(folder: Path, config: Any, manifest: Any, tensors: Any, given: Any) -> None:
    header: dict[str, Any] = {}
    body = bytearray()
    for name, (dtype, shape) in _entries(tensors):
        count = math.prod(max(0, int(size)) for size in shape) * SIZES.get(dtype, 1)
        if count > MOST_BYTES - len(body):
            raise ValueError("too large to be tried")
        content = bytes.fromhex(given.get(name, ""))
        content += bytes((3 * place + 1) % 251 for place in range(min(count, 2048) - len(content)))
        content = (content * (count // max(1, len(content)) + 1))[:count]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + count]}
        body += content
    head = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))


def _gguf_export(folder: Path, data: bytes) -> object:
    """A quantized GGUF file as described: its metadata, and the names, types and shapes of its tensors."""
    try:
        given = json.loads(data)
        content = _described_gguf(given["metadata"], given["tensors"])
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError, struct.error):
        return None  # no such description
    (folder / "model.gguf").write_bytes(content)
    export = open_export(folder / "model.gguf")
    for layer in export.schemes:
        export.decodable(layer).dequantize(torch.float32)
    return inspect(folder / "model.gguf", deep=False), export.tokenizer_folder()


def _entries(tensors: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, list[int]]]]:
    """The tensors whose descriptions say a type and a shape."""
    for name, each in tensors.items():
        match each:
            case [kind, [*shape]] if all(type(size) is int and 0 <= size < MOST_BYTES for size in shape):
                yield name, (kind, shape)


def _described_gguf(metadata: Any, tensors: Any) -> bytes:
    rows, keys, body = [], [], bytearray()
    for name, (kind, shape) in _entries(tensors):
        block, nbytes = gguf.GGML_QUANT_SIZES.get(kind, (1, 4))
        count = math.prod(max(0, int(size)) for size in shape) // block * nbytes
        if count > MOST_BYTES - len(body):
            raise ValueError("too large to be tried")
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        rows.append(_text(name) + sizes + struct.pack("<IQ", kind, len(body)))
        content = bytes((3 * place + 1) % 59 for place in range(59))  # no NaN, in whatever type
        body += (content * (count // len(content) + 1))[:count]
        body += bytes(-len(body) % 32)
    for key, value in metadata.items():
        with suppress(TypeError, struct.error):
            keys.append(_text(key) + _value(value))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(keys)) + b"".join(keys + rows)
    return head + bytes(-len(head) % 32) + body


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value of the metadata: its type and its bytes."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case list():
            items = [_value(each) for each in value] or [struct.pack("<I", 4)]
            return (
                struct.pack("<I", 9)
                + items[0][:4]
                + struct.pack("<Q", len(value))
                + b"".join(each[4:] for each in items)
            )
    raise TypeError("no value of GGUF")


def _gate(_folder: Path, data: bytes) -> object:
    return parse_gate(data.decode("utf-8", "replace"))


def _report(folder: Path, data: bytes) -> object:
    """A report that is read is written again, in every format."""
    (folder / "report.json").write_bytes(data)
    return report.render_again(folder, folder / "again", ["html", "md"])


def _task(folder: Path, data: bytes) -> object:
    (folder / "data.jsonl").write_text('{"question": "a"}\n')
    (folder / "task.yaml").write_bytes(data)
    task = read_task(folder / "task.yaml")
    task.check(trusted=False)
    return task.name, task.identity()


def _files(folder: Path, data: bytes) -> object:
    (folder / "manifest.json").write_bytes(data)
    (folder / "a.txt").write_bytes(b"a")
    found = []
    for read in (check_files, files_to_push):
        try:
            found.append(read(folder))
        except QuantkitError as error:
            refused = error
    if len(found) < 2:
        raise refused
    return found


def _signature(folder: Path, data: bytes) -> object:
    (folder / "manifest.json").write_bytes(MANIFEST)
    (folder / "manifest.json.minisig").write_bytes(data)
    (folder / "a.txt").write_bytes(b"a")
    return verify_signature(folder, KEY.decode().splitlines()[1])


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
    """A Llama of one block without tensors of it: what its config needs, and an embedding."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    counts = {b"embedding_length": 4, b"feed_forward_length": 8, b"attention.head_count": 2, b"context_length": 16}
    keys = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")]
    keys += [text(b"llama." + name) + struct.pack("<II", 4, count) for name, count in counts.items()]
    keys += [text(b"llama.block_count") + struct.pack("<II", 4, 1)]
    keys += [text(b"llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    keys += [text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")]
    keys += [text(b"tokenizer.ggml.eos_token_id") + struct.pack("<II", 4, 1)]
    names = (b"token_embd.weight", b"blk.0.attn_q.weight")
    rows = [text(name) + struct.pack("<IQQIQ", 2, 4, 4, 0, 64 * place) for place, name in enumerate(names)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(keys)) + b"".join(keys + rows)
    return head + bytes(-len(head) % 32 + 128)


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
    b'{"format": "gptq", "layers": {"a": {"kind": "int"}}, "files": {"a.txt": {"bytes": 1, "sha256": "%s"}}}'
    % hashlib.sha256(b"a").hexdigest().encode()
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
KEY = (
    b"untrusted comment: minisign public key 5732A44849C6FBCC\nRWRXMqRIScb7zL6pnsFKwBy1RDaqOIsbnEIjF320avzd0PvwPzgEJk3m"
)
GATE = b"kl_divergence.prose.mean <= 0.05"
TASK = b"""task: demo
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [a, b]
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
"""
SIGNATURE = (
    b"untrusted comment: signature from minisign secret key\n"
    b"RURXMqRIScb7zBIW4dBOZMyeJyBUmUFmunc97EFCoPupGIyKF6gVEI7MKpJba0SskduP/QlM+Ql3Ln52uF0UIPDZAcQqq3+r+wU=\n"
    b"trusted comment: a file\n"
    b"aSJvH5H61gBgnczkvDL9zVpqiQDCRkuA4Uyn6tYgbaBCaiRnbIEVkUo9LwEYvnb2fIUmEubH4Qn07od4/RlMDw=="
)
EXPORT = json.dumps(
    {
        "config": {
            "model_type": "llama",
            "dtype": "float16",
            "quantization_config": {
                "quant_method": "gptq",
                "checkpoint_format": "gptq",
                "bits": 4,
                "group_size": 32,
                "sym": False,
                "desc_act": False,
            },
        },
        "manifest": None,
        "tensors": {
            "model.layers.0.mlp.up_proj.qweight": ["I32", [8, 32]],
            "model.layers.0.mlp.up_proj.qzeros": ["I32", [2, 4]],
            "model.layers.0.mlp.up_proj.scales": ["F16", [2, 32]],
            "model.layers.0.mlp.up_proj.g_idx": ["I32", [64]],
            "model.norm.weight": ["F16", [64]],
        },
        "bytes": {"model.layers.0.mlp.up_proj.g_idx": "00000000" * 32 + "01000000" * 32},
    }
).encode()
PROJECTIONS = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 64, "ffn_up": 64}
GGUF_EXPORT = json.dumps(
    {
        "metadata": {
            "general.architecture": "llama",
            "llama.embedding_length": 32,
            "llama.feed_forward_length": 64,
            "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 1,
            "llama.context_length": 64,
            "llama.block_count": 1,
            "llama.attention.layer_norm_rms_epsilon": 0.5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
            "tokenizer.ggml.token_type": [1, 1, 1, 3],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 3,
            "tokenizer.ggml.eos_token_id": 3,
            "tokenizer.chat_template": "{{ messages }}",
        },
        "tensors": {
            "token_embd.weight": [8, [4, 32]],
            "output_norm.weight": [0, [32]],
            "blk.0.attn_norm.weight": [0, [32]],
            "blk.0.ffn_norm.weight": [0, [32]],
            **{f"blk.0.{name}.weight": [2, [rows, 32]] for name, rows in PROJECTIONS.items()},
            "blk.0.ffn_down.weight": [1, [32, 64]],
        },
    }
).encode()
GGUF_SENTENCEPIECE = json.dumps(
    {
        **json.loads(GGUF_EXPORT),
        "metadata": {
            **json.loads(GGUF_EXPORT)["metadata"],
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
            "tokenizer.ggml.token_type": [2, 1, 1, 1],
            "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -0.5],
        },
    }
).encode()
JINJA = (
    "{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", "for", "in", "endfor", "if", "elif", "else", "endif",
    "set", "endset", "macro", "endmacro", "call", "endcall", "filter", "endfilter", "block", "endblock",
    "include", "import", "from", "extends", "generation", "endgeneration", "break", "continue", "recursive",
    "not", "and", "or", "is", "defined", "none", "true", "namespace(", "range(", "dict(", "cycler(", "joiner(",
    "lipsum(", "raise_exception(", "strftime_now(", "tojson", "trim", "join", "map", "select", "selectattr",
    "groupby", "batch", "slice", "format", "replace", "indent", "center", "sort", "unique", "sum", "list",
    "string", "length", "first", "last", "random", "messages", "message", "role", "content", "loop",
    "loop.index0", "loop.changed", "self", "caller", "varargs", "kwargs", "__class__", "__globals__",
    "__init__", "__subclasses__", "attr(", "~", "|", ".", "[", "]", "(", ")", ",", ":", "=", "==", "**", "*",
    "//", "%", "+", "-", "<", "9", "99999999", "'a'", '"%s"', "'%999999999d'",
)  # fmt: skip
REGEX = (
    "(", ")", "(?:", "(?=", "(?!", "(?<=", "(?P<a>", "(?P=a)", "\\1", "(?i)", "[a-z]", "[^.]", ".", ".*", ".+",
    "?", "*?", "{0,9}", "{9}", "|", "^", "$", "a", "_proj", "\\d", "\\b",
)  # fmt: skip

TARGETS: dict[str, Target] = {
    "safetensors": Target(_file("model.safetensors", read_header), (_safetensors(),), words_in("checkpoint")),
    "index": Target(
        _file("model.safetensors.index.json", read_index),
        (b'{"weight_map": {"a": "b.safetensors"}}',),
        words_in("checkpoint"),
        in_json,
    ),
    "gguf": Target(_file("model.gguf", _gguf), (_gguf_bytes(),), words_in("gguf")),
    "config": Target(
        _in_folder("config.json", _config), (CONFIG,), words_in("checkpoint", "exports", "estimation"), in_json
    ),
    "export": Target(
        _export, (EXPORT,), words_in("exports", "formats", "schemes", "inspection", "checkpoint"), in_json
    ),
    "gguf-export": Target(
        _gguf_export, (GGUF_EXPORT, GGUF_SENTENCEPIECE), words_in("gguf", "exports", "schemes"), in_json
    ),
    "recipe": Target(_file("recipe.yaml", Recipe.load), (RECIPE,), words_in("recipe", "gates"), in_yaml),
    "llamafactory": Target(
        _file("export.yaml", import_recipe), (FACTORY,), words_in("recipe/llamafactory.py"), in_yaml
    ),
    "records": Target(_file("data.jsonl", read_file), (RECORDS,), words_in("records"), in_lines),
    "records-json": Target(
        _file("data.json", read_file), (b'[{"text": "a"}]', b'{"data": [{"text": "a"}]}'), words_in("records"), in_json
    ),
    "parquet": Target(_file("data.parquet", read_file), (_parquet(),)),
    "adapter": Target(
        _in_folder("adapter_config.json", lambda folder: AdapterConfig(folder, "x")),
        (ADAPTER,),
        words_in("merging"),
        in_json,
    ),
    "zip": Target(_archive(".zip"), (_zip(),)),
    "tar": Target(_archive(".tar"), (_tar(),)),
    "template": Target(_template, (TEMPLATE,), JINJA, in_text),
    "pattern": Target(
        _pattern,
        (rb"re:.*layers\.(1|2)\..*_proj$", rb"[^\].]+(?:a|b)?"),
        REGEX,
        in_text,
    ),
    "scheme": Target(_scheme, (SCHEME, b'{"kind": "nf4"}'), words_in("schemes"), in_json),
    "manifest": Target(_in_folder("manifest.json", read_manifest), (MANIFEST,), words_in("exports"), in_json),
    "files": Target(_files, (MANIFEST,), words_in("exports"), in_json),
    "report": Target(_report, (REPORT,), words_in("report", "pipeline"), in_json),
    "gate": Target(_gate, (GATE,), words_in("gates"), in_text),
    "task": Target(_task, (TASK,), words_in("evaluation/task_files.py"), in_yaml),
    "key": Target(_file("key.pub", lambda path: public_key(str(path))), (KEY,)),
    "signature": Target(_signature, (SIGNATURE,)),
}
"""By name, for the command line."""
