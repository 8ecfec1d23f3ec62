"""What is copied into an export, and what happens to files that people put there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantkit
from quantkit.checkpoint.companions import code_files, licence_files, model_files
from quantkit.errors import OutputError
from quantkit.publishing.push import files_to_push
from quantkit.system.artifacts import new_folder, write_stage
from tests.tiny import make_model

NEEDED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3",
    "spiece.model", "qwen.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "1_Pooling/config.json", "spk_dict.pt",
)  # fmt: skip
LICENCES = ("LICENSE", "LICENCE.md", "license.txt", "NOTICE", "Notice.txt", "USE_POLICY.md", "COPYING")
NOT_NEEDED = (
    "train.json", "alpaca_data.json", "trainer_state.json", "all_results.json", "adapter_config.json",
    "adapter_model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "train.py",
    "README.md", "quantize_config.json", "model.safetensors.index.json", "params.json", "tokenizer_data.json",
    "checkpoint-10/config.json", "checkpoint-10/tokenizer.json", "consolidated.safetensors", "pytorch_model.bin",
    ".env", "wandb/run.json", "latest", "notes.txt", "dataset_info.json", "preference_processor.json",
)  # fmt: skip


def put(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def relative(files: list[Path], folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in files}


def test_what_a_model_needs_is_a_list(tmp_path: Path) -> None:
    put(tmp_path, *NEEDED, *LICENCES, *NOT_NEEDED)
    assert relative(model_files(tmp_path), tmp_path) == set(NEEDED)
    assert relative(licence_files(tmp_path), tmp_path) == set(LICENCES)


def test_a_vocabulary_that_the_tokenizer_names_goes_along(tmp_path: Path) -> None:
    put(tmp_path, "words.lst", "other.lst")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_file": "words.lst", "emoji_file": "../x"}))
    assert relative(model_files(tmp_path), tmp_path) == {"tokenizer_config.json", "words.lst"}


def test_code_is_what_the_configs_name_and_what_that_imports(tmp_path: Path) -> None:
    put(
        tmp_path, "train.py", "secret.py", "helper.py", "deep/part.py", "deep/beside.py", "tokenization_own.py", text=""
    )
    (tmp_path / "modeling_own.py").write_text(
        "from .helper import a\nfrom . import deep\ndef f():\n from .deep.part import b"
    )
    (tmp_path / "deep" / "part.py").write_text("from .beside import c\nimport train")
    maps = {"AutoModel": "modeling_own.Model", "AutoConfig": "org/else--secret.Config"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": maps}))
    tokens = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    expected = {"modeling_own.py", "helper.py", "deep/part.py", "deep/beside.py", "tokenization_own.py"}
    assert relative(code_files(tmp_path), tmp_path) == expected


def test_every_command_leaves_training_data_behind_and_keeps_what_people_put_there(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    put(source, *NOT_NEEDED, "USE_POLICY.md", "preprocessor_config.json")
    (source / "model.safetensors.index.json").unlink()
    (source / "adapter_config.json").unlink()
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    for made in ("quantize", "convert"):
        out = tmp_path / made
        for _ in range(2):
            if made == "quantize":
                quantkit.quantize(source, out=out, method="rtn", group_size=32, symmetric=bool((out / "mine").exists()))
            else:
                quantkit.convert(tmp_path / "quantize", "gptq", out=out)
            found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
            assert not found & ({*NOT_NEEDED} - {"README.md", "quantize_config.json"})
            assert {"USE_POLICY.md", "preprocessor_config.json"} <= found
            assert set(files_to_push(out)) <= found - {"mine/plan.txt", "extra.json"}
            put(out, "mine/plan.txt", "extra.json", text="mine")
        assert (out / "mine" / "plan.txt").read_text() == (out / "extra.json").read_text() == "mine"


def test_guests_of_a_folder_stay_and_its_own_files_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for names in (("a", "b"), ("a", "taken")):
        with new_folder(out, guests=True) as folder:
            put(folder, *names, text="ours")
            write_stage(folder, "demo", {"names": names})
        put(out, "taken", "sub/deep", "verified.json", text="yours")
        (out / "empty").mkdir(exist_ok=True)
    aside = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert aside == {"a", "taken", "taken.kept", "sub", "sub/deep", "empty", "stage.json", "verified.json"}
    assert (out / "taken.kept").read_text() == "yours"


def test_guests_survive_a_kill_between_the_two_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, guests=True) as folder:
        write_stage(folder, "demo", {})
    put(out, "mine")
    out.rename(tmp_path / "was")
    with new_folder(out, guests=True) as folder:
        write_stage(folder, "demo", {"new": True})
    (tmp_path / ".out.old-x").mkdir()
    (tmp_path / "was").rename(tmp_path / ".out.old-x" / "folder")
    with new_folder(out, guests=True) as folder:
        write_stage(folder, "demo", {"new": 2})
    assert (out / "mine").exists()
    assert not (tmp_path / ".out.old-x").exists()


def test_neither_the_source_nor_what_another_command_wrote_is_replaced(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    write_stage(source, "merge", {})
    for out, message in ((source, "is the model that is read"), (tmp_path / "other", "another command wrote")):
        if out != source:
            out.mkdir()
            write_stage(out, "merge", {})
        with pytest.raises(OutputError, match=message):
            quantkit.quantize(source, out=out, method="rtn", group_size=32)
    assert (source / "model.safetensors").exists()
