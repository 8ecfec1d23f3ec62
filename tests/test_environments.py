"""Environments of libraries: made by uv from a lock, without a network, whole or not used."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import MissingDependencyError, OutputError, QuantkitError
from quantkit.exports import open_export
from quantkit.isolation import install as installing
from quantkit.isolation.attempt import Attempt
from quantkit.isolation.environments import MARKER, cache_folder, environment_of, folders, listed, remove
from quantkit.isolation.install import announcement, install, uv_command
from quantkit.isolation.lockfile import read_lock
from quantkit.isolation.stage import quantize_by_library
from quantkit.libraries import LIBRARIES, Library
from quantkit.quantization import Job
from quantkit.recipe import LibrarySpec
from quantkit.system.locks import held
from quantkit.system.validation import parse_section
from tests.runs import Notebook

pytest.importorskip("uv")

PLUGIN = '''
"""Rounds to 8 bits with nothing but the standard library."""

import json
import struct
import sys

from quantkit.libraries.base import CODES, Library, Offer, Request, Used


class Bare(Library):
    name = "bare"
    summary = "needs nothing"
    distribution = "quantkit-bare"
    requirements = ("quantkit-bare==1.0",)
    offers = (Offer("rtn", (8,), CODES, grouped=False),)

    def quantize(self, request: Request) -> Used:
        import quantkit_bare

        strangers = [name for name in ("torch", "numpy", "pydantic") if seen(name)]
        if strangers or not sys.prefix.endswith(quantkit_bare.HOME):
            raise RuntimeError(f"not alone: {strangers} in {sys.prefix}")
        data = (request.model / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        arrays = {}
        for name, facts in header.items():
            if name.endswith("_proj.weight"):
                rows, columns = facts["shape"]
                values = struct.unpack(f"<{rows * columns}f", body[slice(*facts["data_offsets"])])
                layer = name.removesuffix(".weight")
                arrays |= rounded(layer, [values[row * columns : (row + 1) * columns] for row in range(rows)])
        save(request.out / "codes.safetensors", arrays)
        scheme = {"scheme": "int", "bits": 8, "group_size": -1, "symmetric": True}
        layers = {name.rpartition(".")[0] for name in arrays}
        (request.out / "schemes.json").write_text(json.dumps(dict.fromkeys(layers, scheme)))
        return Used()


def seen(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def rounded(layer, rows):
    scales = [max(map(abs, row)) / 127 for row in rows]
    codes = [round(value / scale) + 128 for row, scale in zip(rows, scales) for value in row]
    return {
        f"{layer}.codes": ("U8", [len(rows), len(rows[0])], bytes(codes)),
        f"{layer}.scales": ("F32", [len(rows), 1], struct.pack(f"<{len(scales)}f", *scales)),
    }


def save(file, arrays):
    header, start = {}, 0
    for name, (dtype, shape, data) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in arrays.values()))
'''


def write_wheel(folder: Path, version: str, text: str) -> str:
    """A wheel of one module; its line of a lock."""
    info, wheel = f"quantkit_bare-{version}.dist-info", folder / f"quantkit_bare-{version}-py3-none-any.whl"
    content = {
        "quantkit_bare.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: quantkit-bare\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"quantkit_bare.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, each in content.items():
            archive.writestr(name, each)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"# download: {wheel.stat().st_size} bytes for 1 package\nquantkit-bare=={version} --hash=sha256:{digest}\n"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Library]]:
    """A plugin with a lock, whose one package lies in a folder; there is no index."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    file = tmp_path / "bare_plugin.py"
    file.write_text(PLUGIN, encoding="utf-8")
    home = f"HOME = '-py{sys.version_info.major}.{sys.version_info.minor}'"
    (tmp_path / "bare.lock").write_text(write_wheel(tmp_path / "wheels", "1.0", home))
    spec = importlib.util.spec_from_file_location("bare_plugin", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bare_plugin", module)
    spec.loader.exec_module(module)
    LIBRARIES.names()
    monkeypatch.setattr(LIBRARIES, "_entries", {**LIBRARIES._entries, "bare": module.Bare})
    yield module.Bare
    assert not [name for name, _ in folders() if name != "bare"]


def command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_an_environment_is_made_listed_and_removed(bare: type[Library]) -> None:
    assert environment_of(bare).state == "absent"
    assert "bare 1.0 (1 package, " in announcement(bare)
    notes = Notebook()
    found = install(bare, notes)
    assert found.state == "ready"
    assert found.facts["packages"] == {"quantkit-bare": "1.0"}
    assert found.facts["size_bytes"] > 0
    assert notes.stages == [f"install: {announcement(bare)}"]
    assert install(bare, notes) == found
    assert len(notes.stages) == 1
    code, text = command("env", "list")
    assert code == 0
    assert "bare" in text
    assert "ready" in text
    code, text = command("env", "list", "--json")
    (row,) = [each for each in json.loads(text) if each["library"] == "bare"]
    assert row["state"] == "ready"
    assert row["packages"] == {"quantkit-bare": "1.0"}
    assert command("env", "remove", "bare")[0] == 0
    assert environment_of(bare).state == "absent"
    assert folders() == []
    code, text = command("env", "remove", "bare")
    assert code == 2
    assert "there is no environment of 'bare'" in text


def test_a_library_runs_in_its_environment_alone(bare: type[Library], float_model: Path, tmp_path: Path) -> None:
    """The worker has no package but the library's: what quantkit brings there needs the standard library alone."""
    variant = parse_section(LibrarySpec, {"name": "v", "library": "bare"}, "test")
    job = Job(float_model, {"reference": "tiny"}, "float32", device="cpu")
    done = quantize_by_library(Attempt(job, variant, tmp_path / "out", tmp_path / "log", Notebook()))
    assert environment_of(bare).state == "ready"
    assert {scheme.describe() for scheme in open_export(done.folder).schemes.values()} == {"int8 channel sym"}
    assert done.facts["library"]["versions"]["quantkit-bare"] == "1.0"
    again = quantize_by_library(Attempt(job, variant, tmp_path / "out", tmp_path / "log", Notebook()))
    assert again.reused


def test_an_environment_in_use_is_not_removed(bare: type[Library]) -> None:
    folder = install(bare, Notebook()).folder
    with subprocess.Popen([str(folder / "bin" / "python"), "-c", "input()"], stdin=subprocess.PIPE) as user:
        deadline = time.monotonic() + 30
        while (
            psutil.Process(user.pid).cmdline()[:1] != [str(folder / "bin" / "python")] and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        with pytest.raises(OutputError, match=f"is in use by process {user.pid}"):
            remove("bare")
        assert folder.exists()
    assert remove("bare") == [folder]


def test_another_lock_is_another_environment(bare: type[Library], tmp_path: Path) -> None:
    first = install(bare, Notebook())
    lock = tmp_path / "bare.lock"
    lock.write_text(f"# only said otherwise\n{lock.read_text()}")
    assert environment_of(bare) == first
    lock.write_text(write_wheel(tmp_path / "wheels", "1.1", "HOME = 1"))
    assert environment_of(bare).state == "outdated"
    assert read_lock(bare).packages == {"quantkit-bare": "1.1"}
    second = install(bare, Notebook())
    assert second.facts["packages"] == {"quantkit-bare": "1.1"}
    assert second.folder != first.folder
    assert [each.state for each in listed() if each.library == "bare"].count("outdated") == 1
    assert len(remove("bare")) == 2


def test_what_was_not_finished_is_broken_and_made_again(bare: type[Library]) -> None:
    found = install(bare, Notebook())
    (found.folder / MARKER).unlink()
    assert (environment_of(bare).state, environment_of(bare).why) == (
        "broken",
        "its installation did not come to its end",
    )
    assert install(bare, Notebook()).state == "ready"
    found.python.unlink()
    assert environment_of(bare).why.startswith("its interpreter does not start")
    assert install(bare, Notebook()).state == "ready"


def test_an_installation_that_is_cut_short_leaves_nothing(bare: type[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(installing, "size_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(bare, Notebook())
    assert folders() == []


def test_two_do_not_make_one_environment(bare: type[Library]) -> None:
    """Another thread is told what another process would be."""
    with held(environment_of(bare).folder, "installing bare"), ThreadPoolExecutor(1) as other:
        refused = other.submit(install, bare, Notebook()).exception()
    assert isinstance(refused, OutputError)
    assert "(installing bare)" in str(refused)


def test_a_file_of_another_hash_is_refused(bare: type[Library], tmp_path: Path) -> None:
    lock = tmp_path / "bare.lock"
    lock.write_text(f"quantkit-bare==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(QuantkitError, match=r"a file that was fetched is not the one that bare.lock names"):
        install(bare, Notebook())
    assert environment_of(bare).state == "absent"


def test_a_network_that_is_not_there_is_one_line(
    bare: type[Library], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UV_NO_INDEX", "UV_OFFLINE", "UV_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(QuantkitError, match="the package index cannot be reached") as caught:
        install(bare, Notebook())
    assert "\n" not in str(caught.value)


def test_what_else_uv_says_is_passed_on(bare: type[Library], tmp_path: Path) -> None:
    (tmp_path / "bare.lock").write_text("this is no requirement at all\n")
    with pytest.raises(QuantkitError, match="the environment of bare cannot be installed: "):
        install(bare, Notebook())


def test_a_full_disk_is_told(bare: type[Library], tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: failed to write `x`: No space left on device (os error 28)\n")
    found = installing._translated(bare, log)
    assert isinstance(found, OutputError)
    assert "the disk is full" in found.problem


def test_a_library_without_a_lock_says_so(bare: type[Library], tmp_path: Path) -> None:
    (tmp_path / "bare.lock").unlink()
    with pytest.raises(QuantkitError, match="library 'bare' has no environment of its own"):
        environment_of(bare)
    assert "bare" not in [each.library for each in listed()]


def test_uv_that_is_not_installed_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match=r"pip install 'quantkit-ptq\[libraries\]'"):
        uv_command()


def test_the_cache_is_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("QUANTKIT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "quantkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(os.environ["HOME"]) / ".cache" / "quantkit"
