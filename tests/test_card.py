"""Model cards: a head that the hub reads, figures as measured, snippets that fit, and nothing that breaks out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quantkit
from quantkit.errors import CheckpointError
from quantkit.exports.manifest import is_whole
from quantkit.publishing import CardFacts, card, write_card
from quantkit.publishing.front_matter import stated
from quantkit.publishing.markdown import code, fenced, plain
from quantkit.system.artifacts import read_json, write_json
from tests.tiny import make_model

SCORES = {
    "metrics": {
        "perplexity": {"prose": 42.508},
        "kl_divergence": {"prose": {"mean": 0.001475}},
        "top1_agreement": {"prose": 0.97383},
    },
    "size_bytes": 3 * 2**20,
    "loaded_by": "transformers",
}
BASELINE = {"metrics": {"perplexity": {"prose": 42.2974}}, "size_bytes": 5 * 2**20}
HEAD = "license: llama3.1\nlanguage: [en, de]\nbase_model: some/parent\ntags: [a]\nextra: 1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp("exports") / "tiny-int4")


def exported(model: Path, out: Path, **keys: Any) -> Path:
    given = {"method": "rtn", "bits": 4, "group_size": 32, **keys}
    return quantkit.quantize(model, out=out, **{key: value for key, value in given.items() if value is not None})


def head(text: str) -> dict[str, Any]:
    """The front matter as the hub parses it: what lies between the first two lines of dashes."""
    opening, content, _ = re.split(r"^---$\n", text, maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    found = yaml.safe_load(content)
    assert isinstance(found, dict)
    return found


def section(text: str, title: str) -> str:
    return next(part for part in re.split(r"^##+ ", text, flags=re.MULTILINE) if part.startswith(f"{title}\n"))


def test_the_head_says_what_the_hub_asks(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{HEAD}\n---\n# Tiny\n")
    assert head(card(folder, CardFacts(base_model="org/tiny", source=tmp_path))) == {
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "llama3.1",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["quantkit", "compressed-tensors", "rtn", "4-bit"],
    }
    assert "base_model" not in head(card(folder))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", f"---\n{HEAD}\n---\n", {"license": "llama3.1", "language": ["en", "de"]}),
        ("README.md", "---\r\nlicense: mit\r\n---\r\nx", {"license": "mit"}),
        ("README.md", "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---",
         {"license": "other", "license_name": "x", "license_link": "LICENSE"}),
        ("README.md", "no head\n---\nlicense: mit\n---\n", {}),
        ("README.md", "---\nlicense: mit\n", {}),
        ("README.md", "---\nlicense: [unclosed\n---\n", {}),
        ("README.md", "---\nlicense: {a: b}\nlanguage: ['x\\n---\\nfoo']\n---\n", {}),
        ("LICENSE", "   Apache License\n            Version 2.0, January 2004\n", {"license": "apache-2.0"}),
        ("LICENSE.txt", "MIT License\n\nCopyright", {"license": "mit"}),
        ("LICENSE.md", "You may do this and that", {"license": "other", "license_link": "LICENSE.md"}),
    ],
)  # fmt: skip
def test_licence_and_languages_are_carried_over(name: str, text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert stated(tmp_path) == expected


def test_figures_are_those_that_were_measured(folder: Path) -> None:
    assert "Not measured." in section(card(folder), "Measured")
    found = section(card(folder, CardFacts(scores=SCORES, baseline=BASELINE)), "Measured")
    assert "| prose | 42.2974 | 42.5080 | 0.00147 | 97.38% |" in found
    assert "- float model: 5.0 MiB" in found
    assert "- this checkpoint: 3.0 MiB" in found
    assert "through transformers" in found
    alone = section(card(folder, CardFacts(scores={"metrics": {"perplexity": {"prose": 2.0}}})), "Measured")
    assert "| prose | - | 2.0000 | - | - |" in alone


def test_what_it_was_made_of_is_all_there(folder: Path) -> None:
    text = card(folder, CardFacts(base_model="org/tiny", revision="abc"))
    made = section(text, "How it was made")
    fence = re.search(r"```yaml\n(.*?)```", made, re.DOTALL)
    assert fence is not None
    assert yaml.safe_load(fence[1]) == yaml.safe_load((folder / "recipe.yaml").read_text())
    assert "`org/tiny` at commit `abc`" in made
    assert "no calibration data" in made
    manifest = read_json(folder / "manifest.json")
    assert all(f"{name} {plain(number)}" in made for name, number in manifest["versions"].items())
    files = section(text, "Files")
    for name, facts in manifest["files"].items():
        assert f"| {code(name)} | `{facts['sha256']}` | {facts['bytes']:,} |" in files


def test_the_calibration_set_is_named_with_its_hash(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", read_json(folder / "manifest.json") | {"calibration_sha256": "f00"})
    audit = {"dataset": {"name": "alpaca"}, "rows": 12, "tokens": 345}
    made = section(card(tmp_path, CardFacts(calibration=audit)), "How it was made")
    assert "`alpaca`, 12 rows, 345 tokens, SHA-256 of its token ids `f00`" in made
    assert "calibration set: SHA-256 of its token ids `f00`" in card(tmp_path)


def test_writing_the_card_leaves_the_export_whole(folder: Path) -> None:
    write_card(folder)
    first = (folder / "README.md").read_text()
    write_card(folder, CardFacts(scores=SCORES))
    assert (folder / "README.md").read_text() != first
    assert is_whole(folder)
    assert "README.md" not in read_json(folder / "manifest.json")["files"]


# --- how to load it


@pytest.mark.parametrize(
    ("keys", "transformers", "vllm", "llama_cpp"),
    [
        ({}, "pip install transformers compressed-tensors\n", "vllm serve out", "does not load compressed-tensors"),
        ({"symmetric": False}, "'compressed-tensors<0.18'", "vllm serve out", "does not load"),
        ({"bits": 3}, "pip install transformers compressed-tensors\n", "vllm serve out", "does not load"),
        ({"bits": 1, "symmetric": False}, "compressed-tensors<0.18", "integers of 2 to 8 bits", "does not load"),
        ({"format": "gptq"}, "gptqmodel", "vllm serve out", "does not load gptq"),
        ({"format": "gptq", "symmetric": False}, "gptqmodel", "and this one is not", "does not load"),
        ({"format": "awq"}, "gptqmodel", "vllm serve out", "does not load awq"),
        ({"format": "hqq"}, "'transformers<5' hqq", "vLLM does not load hqq", "does not load hqq"),
        ({"format": "bitsandbytes", "scheme": "nf4", "bits": None, "group_size": None},
         "accelerate bitsandbytes", "vLLM 0.32 does not", "does not load"),
        ({"format": "gguf"}, "transformers does not compute from gguf", "vLLM does not load gguf", "llama-server -m "),
    ],
)  # fmt: skip
def test_snippets_suit_the_format(
    keys: dict[str, Any], transformers: str, vllm: str, llama_cpp: str, model: Path, tmp_path: Path
) -> None:
    text = card(exported(model, tmp_path / "out", **keys))
    for title, expected in (("transformers", transformers), ("vLLM", vllm), ("llama.cpp", llama_cpp)):
        assert expected in section(text, title)
    assert ("library_name" in head(text)) is (keys.get("format") != "gguf")


def test_the_snippet_for_transformers_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = section(card(folder, CardFacts(repository="org/tiny-int4")), "transformers")
    fence = re.search(r"```python\n(.*?)```", found, re.DOTALL)
    assert fence is not None
    assert 'name = "org/tiny-int4"' in fence[1]
    exec(compile(fence[1].replace("org/tiny-int4", str(folder)), "card", "exec"), {})
    assert "The capital of France is" in capsys.readouterr().out


def test_a_dtype_that_the_format_needs_is_asked_for(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    folder = exported(source, tmp_path / "out", scheme="mxfp4", bits=None, group_size=None, dtype="own")
    found = section(card(folder), "transformers")
    assert "import torch\n" in found
    assert "dtype=torch.bfloat16)" in found
    assert "torch.bfloat16" in section(card(folder), "Worth knowing")


def test_the_file_of_a_gguf_export_is_named(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out", format="gguf")
    (file,) = folder.glob("*.gguf")
    assert f"llama-server -m {file.name}" in section(card(folder), "llama.cpp")


# --- hostile texts

HOSTILE = "evil/x\n---\nlicense: mit\n---\n```\n# Owned\n<script>|`a`[b](http://c)"


def test_a_hostile_name_stays_a_text(folder: Path, tmp_path: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    facts = {"created_by": HOSTILE, "versions": {HOSTILE: HOSTILE}, "calibration_sha256": HOSTILE}
    files = {HOSTILE: {"sha256": HOSTILE, "bytes": 1}}
    verified = {HOSTILE: {"passed": False, "reason": HOSTILE, "device": HOSTILE, "dtype": HOSTILE}}
    write_json(tmp_path / "manifest.json", manifest | facts | {"files": files, "verified": verified})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": HOSTILE, "method": HOSTILE}))
    scores = {"metrics": {"perplexity": {HOSTILE: 1.0}}, "loaded_by": HOSTILE}
    audit = {"dataset": {"name": HOSTILE}, "rows": 1, "tokens": 1}
    text = card(tmp_path, CardFacts(HOSTILE, HOSTILE, None, HOSTILE, scores, None, audit))
    assert head(text)["base_model"] == HOSTILE
    assert "license" not in head(text)
    body = text.split("\n---\n", 1)[1]
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(# Owned|---|```)", outside, re.MULTILINE)
    assert "<script>" not in re.sub(r"(`+).*?\1", "", outside)
    for block in re.findall(r"^(`{3,})python\n(.*?)^\1$", body, re.MULTILINE | re.DOTALL):
        ast.parse(block[1])
    assert not [line for line in outside.splitlines() if line.startswith("|") and len(split_cells(line)) not in (3, 5)]


def split_cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_pieces_of_markdown_hold_any_text() -> None:
    assert plain("a|b\n<c>*d*") == r"a\|b \<c\>\*d\*"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a") == "`` `a ``"
    assert fenced("x\n````\ny", "sh") == "`````sh\nx\n````\ny\n`````"


def test_a_folder_without_a_manifest_is_one_line(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest of quantkit.*exported checkpoint"):
        card(model)
