"""Tokenizers that are sentencepiece's, tiktoken's or tekken's file alone: read, or refused with the package's name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.calibration.model import load_tokenizer as tokenizer_of_calibration
from quantkit.checkpoint.tokenizer_files import lacks_chat_template_for, missing_package, read_tokenizer
from quantkit.errors import QuantkitError
from quantkit.recipe import ModelSpec
from quantkit.runtimes._checkpoint import load_tokenizer as tokenizer_of_runtimes
from quantkit.source import resolve
from tests.tiny import make_model

SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
PATTERN = (
    rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(folder: Path) -> str:
    """The first bytes of a protocol buffer; what follows is not read here."""
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0a")
    return "tokenizer.model"


def tiktoken(folder: Path) -> str:
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (folder / "tiktoken.model").write_text("\n".join(lines))
    return "tiktoken.model"


def tekken(folder: Path) -> str:
    vocabulary = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    special = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIAL)]
    config = {
        "pattern": PATTERN, "num_vocab_tokens": 256, "default_vocab_size": 256 + len(SPECIAL),
        "default_num_special_tokens": len(SPECIAL), "version": "v7",
    }  # fmt: skip
    content = {"config": config, "vocab": vocabulary, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(content))
    return "tekken.json"


def model_with(tokenizer: Callable[[Path], str], folder: Path) -> tuple[Path, str]:
    """A tiny Mistral with one file of a tokenizer, and its name."""
    made = make_model(folder, "mistral", chat_template=None, vocab_size=300)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return made, tokenizer(folder)


@pytest.mark.parametrize(("tokenizer", "package"), [(sentencepiece, "sentencepiece"), (tiktoken, "tiktoken")])
def test_a_vocabulary_that_needs_a_package_names_it(
    tokenizer: Callable[[Path], str], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = model_with(tokenizer, tmp_path / "model")
    monkeypatch.setattr("quantkit.checkpoint.tokenizer_files.find_spec", lambda name: None)
    for load in (tokenizer_of_calibration, tokenizer_of_runtimes):
        with pytest.raises(QuantkitError, match=rf"tokenizer in {file} alone \(pip install {package}\)"):
            load(folder, trust_remote_code=False)
    monkeypatch.setattr("quantkit.checkpoint.tokenizer_files.find_spec", lambda name: object())
    assert missing_package(folder) is None


@pytest.mark.parametrize("tokenizer", [sentencepiece, tiktoken, tekken])
def test_the_file_goes_wherever_the_model_goes(tokenizer: Callable[[Path], str], tmp_path: Path) -> None:
    folder, file = model_with(tokenizer, tmp_path / "model")
    source = resolve(ModelSpec(source=str(folder), dtype="bfloat16"), tmp_path / "work")
    assert file in source.sha256
    assert (source.folder / file).read_bytes() == (folder / file).read_bytes()
    out = quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32)
    assert (out / file).read_bytes() == (folder / file).read_bytes()


def test_a_tekken_is_enough_to_calibrate_with(tmp_path: Path) -> None:
    folder, _ = model_with(tekken, tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": "The quick brown fox. " * 8}) for _ in range(4))
    )
    calibration = {"dataset": str(tmp_path / "texts.jsonl"), "samples": 4, "max_length": 64}
    out = quantkit.quantize(folder, out=tmp_path / "out", group_size=32, calibration=calibration)
    read = tokenizer_of_runtimes(out, trust_remote_code=False)
    assert read.decode(read("a fox").input_ids, skip_special_tokens=True) == "a fox"


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "quantkit.checkpoint.tokenizer_files.find_spec", lambda name: None if name == package else object()
    )


def test_a_tekken_begins_a_text_with_bos_and_knows_its_special_tokens(tmp_path: Path) -> None:
    folder, _ = model_with(tekken, tmp_path / "model")
    found = read_tokenizer(folder)
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    assert found.pad_token is None  # the file has none, and a new one would be no row of the embedding
    count = len(SPECIAL)
    assert len(found) == 256 + count
    assert found("a").input_ids == [1, ord("a") + count]


def test_a_tekken_without_its_special_tokens_needs_mistral_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = model_with(tekken, tmp_path / "model")
    content = json.loads((folder / file).read_text())
    del content["special_tokens"]
    (folder / file).write_text(json.dumps(content))
    hide("mistral_common", monkeypatch)
    with pytest.raises(QuantkitError, match=r"tokenizer in tekken.json alone \(pip install mistral-common\)"):
        tokenizer_of_calibration(folder)


def test_conversations_without_the_package_of_the_template_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = model_with(tekken, tmp_path / "model")
    turns = [{"role": "user", "content": "Hi " * 9}, {"role": "assistant", "content": "Ho " * 9}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(4)))
    calibration = {"dataset": str(tmp_path / "chat.jsonl"), "samples": 4, "max_length": 64}
    hide("mistral_common", monkeypatch)
    quantkit.quantize(folder, out=tmp_path / "out", group_size=32, calibration=calibration)
    warnings = json.loads((tmp_path / "out" / "calibration.json").read_text())["warnings"]
    assert any("mistral-common would write it (pip install mistral-common)" in line for line in warnings)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert lacks_chat_template_for(folder) is None


def test_with_mistral_common_a_tekken_is_the_tokenizer_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    from transformers import AutoTokenizer

    folder, _ = model_with(tekken, tmp_path / "model")
    theirs: Any = AutoTokenizer.from_pretrained(folder, mistral_format=True)
    found = read_tokenizer(folder)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "X"}]
    assert found("Hélló 12").input_ids == theirs("Hélló 12").input_ids
    assert found.apply_chat_template(talk, return_dict=False) == theirs.apply_chat_template(talk, return_dict=False)


def test_a_tekken_becomes_gguf(tmp_path: Path) -> None:
    folder, _ = model_with(tekken, tmp_path / "model")
    quantkit.convert(folder, "gguf", out=tmp_path / "out")
    out = tmp_path / "out"
    read, found = tokenizer_of_runtimes(out, trust_remote_code=False), read_tokenizer(folder)
    for text in ("Hello, wörld 12", "\n\n x"):
        assert read(text).input_ids == found(text).input_ids
