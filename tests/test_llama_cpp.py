"""llama.cpp: its library found and loaded, what it says when something is wrong, its logits beside transformers'."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.errors import EvaluationError, MissingDependencyError, QuantkitError
from quantkit.llama_cpp import library as module
from quantkit.llama_cpp.library import Library, library
from quantkit.llama_cpp.model import PIECE
from quantkit.llama_cpp.packages import CARRIERS, Carrier, Found, installed
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions
from tests.tiny import VOCABULARY, make_model

BLOCKS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDE = 2, 4, 2, 16, 64, 128
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LLAMA_CPP = RUNTIMES.get("llama.cpp")
CONTEXT = 1024


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF, from that of transformers."""
    layer, _, kind = name.rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{kind}"
    _, _, block, rest = layer.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.{kind}"


def write_llama(path: Path, tensors: dict[str, torch.Tensor], *, architecture: str = "llama") -> None:
    """A float32 GGUF file of a llama, without a tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors.items():
        values = tensor
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring rows of a head, transformers its halves.
            values = tensor.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(gguf_name(name), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as transformers keeps it."""
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The same as a GGUF file."""
    path = folder / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    write_llama(path, dict(AutoModelForCausalLM.from_pretrained(folder).state_dict()))
    return path


@pytest.fixture(scope="module")
def loaded(file: Path) -> LoadedModel:
    return LLAMA_CPP.load(file, LoadOptions(context_length=CONTEXT))


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again, in the test and after it."""
    library.cache_clear()
    yield
    library.cache_clear()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def reference(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of transformers."""
    with torch.inference_mode():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(ids.unsqueeze(0)).logits[0]
    return found


@pytest.mark.parametrize("count", [1, 40, PIECE + 88])
def test_logits_are_those_of_transformers(loaded: LoadedModel, folder: Path, count: int) -> None:
    ids = tokens(count)
    found, wanted = loaded.logits(ids), reference(folder, ids)
    assert (found.dtype, found.shape) == (torch.float32, (count, VOCABULARY))
    assert loaded.vocabulary == VOCABULARY
    # Keys and values lie in float16 in llama.cpp's cache: a relative error of 2**-11.
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_a_text_is_read_without_what_came_before_it(loaded: LoadedModel) -> None:
    ids = tokens(30)
    first = loaded.logits(ids)
    loaded.logits(tokens(50, seed=1))
    loaded.prefill(tokens(20, seed=2))
    assert torch.equal(loaded.logits(ids), first)


def test_a_text_in_pieces_is_the_text(loaded: LoadedModel) -> None:
    ids = tokens(PIECE + 200)
    whole = loaded.logits(ids)
    torch.testing.assert_close(whole[:100], loaded.logits(ids[:100]), rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[3] = (changed[3] + 1) % VOCABULARY
    assert not torch.allclose(loaded.logits(changed)[PIECE:], whole[PIECE:], atol=1e-4)


def test_greedy_continuation_takes_the_largest_logit(loaded: LoadedModel) -> None:
    prompt = tokens(PIECE + 10)
    ids, seconds = loaded.decode(prompt, 6)
    assert len(ids) == len(seconds) == 6
    assert all(second > 0 for second in seconds)
    text = torch.cat([prompt, torch.tensor(ids)])
    assert loaded.logits(text)[len(prompt) - 1 : -1].argmax(-1).tolist() == ids


def test_it_says_what_it_computes_in_and_with(loaded: LoadedModel, file: Path) -> None:
    stored = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    assert loaded.weights_bytes() == stored
    assert "float32" in loaded.dtype
    assert "8 bits" in loaded.dtype
    assert loaded.device == "cpu"
    facts = loaded.facts()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["package"].startswith("xllamacpp 20")
    assert facts["model"].startswith("llama")


def test_a_folder_with_one_file_names_it(loaded: LoadedModel, file: Path) -> None:
    ids = tokens(8)
    found = LLAMA_CPP.load(file.parent, LoadOptions(context_length=64))
    torch.testing.assert_close(found.logits(ids), loaded.logits(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("count", "words"), [(0, "has no GGUF file"), (2, "holds 2 GGUF files")])
def test_a_folder_without_or_with_several_files_is_refused(tmp_path: Path, count: int, words: str) -> None:
    for index in range(count):
        (tmp_path / f"{index}.gguf").write_bytes(b"GGUF")
    with pytest.raises(EvaluationError, match=words):
        LLAMA_CPP.load(tmp_path, LoadOptions())
    with pytest.raises(EvaluationError, match=r"none\.gguf has no GGUF file"):
        LLAMA_CPP.load(tmp_path / "none.gguf", LoadOptions())


def test_a_text_longer_than_the_context_is_refused(file: Path) -> None:
    short = LLAMA_CPP.load(file, LoadOptions(context_length=256))
    assert short.logits(tokens(256)).shape[0] == 256
    with pytest.raises(EvaluationError, match=r"longer than the 256 tokens .*raise context_length"):
        short.logits(tokens(257))
    with pytest.raises(EvaluationError, match="longer than the 256 tokens"):
        short.decode(tokens(250), 10)


def test_a_token_that_there_is_not_is_refused_in_llama_cpps_words(loaded: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match=f"invalid token.*{VOCABULARY}"):
        loaded.logits(torch.tensor([3, VOCABULARY]))
    assert loaded.logits(tokens(3)).shape == (3, VOCABULARY)


def test_a_broken_file_is_refused_in_llama_cpps_words_and_nothing_else_is_printed(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    capfd.readouterr()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_llama(tmp_path / "short.gguf", tensors)
    with pytest.raises(EvaluationError, match=r"cannot load .*short\.gguf: .*blk\.1\.ffn_up\.weight"):
        LLAMA_CPP.load(tmp_path / "short.gguf", LoadOptions())
    write_llama(tmp_path / "odd.gguf", tensors, architecture="oddity")
    with pytest.raises(EvaluationError, match=r"cannot load .*oddity"):
        LLAMA_CPP.load(tmp_path / "odd.gguf", LoadOptions())
    (tmp_path / "text.gguf").write_text("no model at all, but a text that is long enough to have a head")
    with pytest.raises(EvaluationError, match=r"cannot load .*text\.gguf: .*magic"):
        LLAMA_CPP.load(tmp_path / "text.gguf", LoadOptions())
    assert capfd.readouterr() == ("", "")


def test_a_gpu_that_is_not_there_is_refused(file: Path) -> None:
    there = len(library().gpus())
    with pytest.raises(EvaluationError, match=rf"cannot compute on cuda:{there}.*use device cpu"):
        LLAMA_CPP.load(file, LoadOptions(device=f"cuda:{there}"))


def test_model_and_context_are_given_back_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    call = Library.call

    def counted(self: Library, name: str, *arguments: object) -> object:
        calls.append(name)
        return call(self, name, *arguments)

    monkeypatch.setattr(Library, "call", counted)
    model = LLAMA_CPP.load(file, LoadOptions(context_length=64))
    del model
    gc.collect()
    assert calls[-2:] == ["llama_free", "llama_model_free"]
    assert (calls.count("llama_free"), calls.count("llama_model_free")) == (1, 1)


def test_a_model_that_lives_to_the_end_of_the_process_goes_in_silence(file: Path) -> None:
    code = (
        "import sys, weakref, torch\nfrom pathlib import Path\nfrom quantkit.runtimes import RUNTIMES\n"
        "from quantkit.runtimes.base import LoadOptions\nweakref.finalize(Path, print, 'the end')\n"
        "model = RUNTIMES.get('llama.cpp').load(Path(sys.argv[1]), LoadOptions(context_length=64))\n"
        "model.logits(torch.arange(9))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


def test_importing_loads_nothing() -> None:
    code = (
        "import json, sys\nimport quantkit.llama_cpp, quantkit.llama_cpp.model, quantkit.runtimes.llama_cpp\n"
        "from quantkit.llama_cpp.packages import installed\nfound = [each.path.name for each in installed()]\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "print(json.dumps([found, [name for name in found if name in maps],"
        " [name for name in ('xllamacpp', 'torch', 'numpy', 'gguf') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, mapped, imported = json.loads(done.stdout)
    assert found
    assert (mapped, imported) == ([], [])


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "installed", lambda: iter(()))
    with pytest.raises(MissingDependencyError, match=r"pip install 'quantkit-ptq\[llama-cpp\]'"):
        LLAMA_CPP.load(tmp_path, LoadOptions())
    missing = LLAMA_CPP.missing()
    assert missing is not None
    assert "\n" not in missing
    assert LLAMA_CPP.install not in missing  # whoever shows the reason adds it


def test_a_library_for_a_newer_system_is_refused_with_the_reason(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "/lib/libc.so.6: version `GLIBC_2.99' not found (required by /somewhere/libllama.so)"

    def refuse(_: str) -> None:
        raise OSError(words)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    missing = LLAMA_CPP.missing()
    assert missing is not None
    assert "built for a newer Linux, with glibc 2.99" in missing
    assert "\n" not in missing


def test_a_library_that_does_not_work_gives_way_to_one_that_does(
    anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libllama.so"
    broken.write_text("no library")
    good = next(installed())
    monkeypatch.setattr(module, "installed", lambda: iter([Found(broken, "broken 1.0"), good]))
    assert library().found == good
    library.cache_clear()
    monkeypatch.setattr(module, "installed", lambda: iter([Found(broken, "broken 1.0")]))
    with pytest.raises(QuantkitError, match=r"llama\.cpp of broken 1\.0 cannot be used here"):
        library()


def test_a_library_of_the_system_that_is_not_there_is_named_in_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("quantkit.llama_cpp.library.ctypes.CDLL", refuse)
    with pytest.raises(QuantkitError, match="cannot be used here") as caught:
        Library(Found(Path("xllamacpp.so"), "xllamacpp 1.0"))
    assert caught.value.remedy == "install the system's package that has libgomp.so.1, on Debian and Ubuntu libgomp1"


def test_a_library_without_the_functions_is_refused_by_the_first_of_them() -> None:
    other = Path(str(torch._C.__file__))
    with pytest.raises(QuantkitError, match=r"other 2\.0 cannot be used here: it has no function llama_log_set"):
        Library(Found(other, "other 2.0"))


@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda carrier: carrier.module)
def test_each_package_is_found_by_its_files(carrier: Carrier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"xllamacpp": "xllamacpp.abi3.so", "llama_cpp": "lib/libllama.so", "llama_cpp_py_sync": "libllama.so"}
    name = carrier.module
    library_file = tmp_path / name / inside[name]
    library_file.parent.mkdir(parents=True)
    library_file.write_bytes(b"")
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for each in CARRIERS:  # what was imported is found before any path is looked at
        monkeypatch.delitem(sys.modules, each.module, raising=False)
    assert [found.path for found in installed()] == [library_file]
