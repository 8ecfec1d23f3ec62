"""What SECURITY.md promises, held to it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import QuantkitError, SourceError
from quantkit.exports.manifest import write_manifest
from quantkit.merging.check import _load
from quantkit.publishing.card import write_card
from quantkit.publishing.push import files_to_push
from quantkit.records.sandbox import SECONDS, TemplateFailure, _Renderer, render_chat
from quantkit.runtimes._decoded import load_decoded
from quantkit.runtimes._packed import load_packed
from quantkit.runtimes.base import LoadOptions
from quantkit.system.patterns import why_refused
from quantkit.system.redaction import HIDDEN, redacted
from tests.test_source import TOKEN, Hub, hub, resolved
from tests.tiny import CHAT_TEMPLATE, make_model, tiny_tokenizer

__all__ = ["hub"]  # the fixture: a stand-in for the hub on loopback

PACKAGE = Path(quantkit.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "pickle.load", "pickle.loads", "os.system", "eval", "exec", "yaml.unsafe_load"}
SIGNED_LETTERS = PACKAGE / "system" / "post.py"
"""Pickles what the processes of one walk tell each other, signed by a key that no other user can read; never a file."""
MOVED_PATHS = PACKAGE / "pipeline" / "moved_paths.py"
"""Pickles what a command and a task of its cluster tell each other by Ray, which pickles all itself; never a file, and
nothing that lies in a store."""
SAFE_LOADERS = {"StrictLoader", "_loader(path, code)"}
"""Subclasses of ``yaml.SafeLoader``; see the tests of recipes and of task files."""
CHAT = [{"role": "user", "content": "Hellö"}, {"role": "assistant", "content": 'say "hi"'}]


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


# --- pickles, code


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of the package's code, with its file."""
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file, node


def test_nothing_unpickles_or_runs_text() -> None:
    for file, node in nodes():
        if file in (SIGNED_LETTERS, MOVED_PATHS):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in FORBIDDEN_CALLS, file
        assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("shell", "False") == "False"
        assert keywords.get("weights_only", "True") == "True"
        if called == "yaml.load":
            assert keywords["Loader"] in SAFE_LOADERS, file
        if called.rpartition(".")[2] == "load" and called.rpartition(".")[0] in ("np", "numpy"):
            assert keywords["allow_pickle"] == "False"


def test_every_model_is_loaded_from_safetensors_alone() -> None:
    loads = []
    for file, node in nodes():
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("from_pretrained"):
            continue
        name = ast.unparse(node.func).removesuffix(".from_pretrained")
        if name.endswith(("Config", "Tokenizer", "TokenizerFast", "Processor")):
            continue
        if name in ("PeftModel", "AutoAWQForCausalLM"):
            continue  # of adapters the safetensors are checked before, and AutoAWQ has a default of its own
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("use_safetensors") == "True", file
        loads.append(name)
    assert len(loads) >= 5


class Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_beside_the_weights_or_in_their_place_is_never_loaded(export: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    places = {"model": export.parent / "model", "packed": export, "decoded": export}
    for name, origin in places.items():
        shutil.copytree(origin, tmp_path / name)
        (tmp_path / name / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(canary)))
    assert _load(tmp_path / "model", trust_remote_code=False).num_parameters() > 0
    load_packed(tmp_path / "packed", LoadOptions(device="cpu"))
    load_decoded(tmp_path / "decoded", LoadOptions(device="cpu"))
    assert not canary.exists()
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        _load(tmp_path / "model", trust_remote_code=False)


def test_foreign_code_is_never_trusted_by_a_constant() -> None:
    for file, node in nodes():
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) != "True", file
        if isinstance(node, ast.arg) and node.arg == "trust_remote_code":
            assert node.annotation is not None


# --- chat templates


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{%- for m in messages %}\n  {{- m.content | tojson }}{{ m | tojson(indent=2) }}\n{%- endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k ~ bos_token }}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{{ dict(a=1)['a'] }}{{ tools is none }}",
        "{{ documents is none }}{{ messages | map(attribute='content') | join('|') }}{{ add_generation_prompt }}",
    ],
)
def test_a_template_gives_what_transformers_gives(template: str) -> None:
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=True)
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": True}
    assert render_chat(template, CHAT, variables) == wanted


def test_a_template_that_never_ends_is_ended_in_any_thread_and_the_next_one_is_rendered() -> None:
    told: list[str] = []

    def ask() -> None:
        try:
            render_chat("{{ 9 ** (9 ** (9 ** 9)) }}", CHAT, {}, 0.5)
        except TemplateFailure as error:
            told.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == ["it takes more than 0.5 seconds"] * 2
    assert render_chat("{{ messages | length }}", CHAT, {}) == "2"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must take turns') }}", "roles must take turns"),
        ("{% for m in messages %}{{ m.content.nothing.at_all }}{% endfor %}", "has no attribute 'nothing'"),
        ("{% macro m(x) %}{{ x / 0 }}{% endmacro %}{{ m(1) }}", "ZeroDivisionError: division by zero"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages | nothing }}", "No filter named 'nothing'."),
        ("{{ 'x'.encode('nothing') }}", "LookupError: unknown encoding: nothing"),
    ],
)
def test_a_template_that_fails_is_told_by_its_own_error_and_not_by_a_limit(template: str, told: str) -> None:
    fresh = _Renderer()  # Jinja imports some of its modules when they are first used, and so opens files
    try:
        answer = fresh.ask({"kind": "chat", "template": template, "given": {"messages": CHAT}}, SECONDS)
    finally:
        fresh.close()
    assert told in answer["error"]
    assert "OSError" not in answer["error"]


@pytest.mark.parametrize("kind", ["chat", "task"])
def test_what_jinja_and_python_import_late_is_there_for_a_template(kind: str) -> None:
    late = (
        "{{ messages | pprint | length > 9 }}|{{ '%d' | format(3) }}|{{ 'a b' | urlencode }}|{{ 'www.a.de' | urlize }}"
        "|{{ 'x'.encode('punycode') | length }}|{{ lipsum(n=1, html=false) | length > 9 }}|{{ [3] | random }}"
        "|{{ 'a b' | wordwrap(1) | length }}|{{ 1000 | filesizeformat }}"
    )
    fresh = _Renderer()
    try:
        answer = fresh.ask({"kind": kind, "template": late, "given": {"messages": CHAT}}, SECONDS)
    finally:
        fresh.close()
    link = '<a href="https://www.a.de" rel="noopener">www.a.de</a>'
    assert answer == {"text": f"True|3|a%20b|{link}|2|True|3|3|1.0 kB"}


def test_a_template_sees_no_secret_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for template in (
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ strftime_now.__globals__['sys'].modules }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ dict.__class__.__mro__[-1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        f"{{% include '{tmp_path}' %}}",
    ):
        with pytest.raises(TemplateFailure):
            render_chat(template, CHAT, {})


# --- patterns


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "(.*)+", "((x+)+)+$", "(a{1,9}){1,9}", "a*" * 9, "a?" * 40, "(", "x" * 20_000]
)
def test_a_pattern_that_may_never_end_is_refused(pattern: str) -> None:
    assert why_refused(pattern) is not None


@pytest.mark.parametrize(
    "pattern",
    [r".*self_attn\.(q|k|v|o)_proj$", r"model\.layers\.(0|1|23)\.mlp\..*", "q_proj", r"^(?!.*lm_head).*[0-9]+$"],
)
def test_usual_patterns_of_layers_are_not(pattern: str) -> None:
    assert why_refused(pattern) is None


# --- secrets


@pytest.mark.parametrize(
    "text",
    [
        "GET failed: Authorization: Bearer {}",
        "headers {{'authorization': 'Bearer {}'}}",
        "https://user:{}@example.org/x",
        "https://example.org/x?token={}&a=1",
        "the token hf_{} was refused",
        "plain {} in the environment",
    ],
)
def test_a_secret_is_taken_out(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "Sup3rS3cretValue42"
    monkeypatch.setenv("HF_TOKEN", secret)
    told = redacted(text.format(secret))
    assert secret not in told
    assert HIDDEN in told
    assert secret not in str(QuantkitError(text.format(secret), "try again"))


def test_plain_texts_stay_as_they_are() -> None:
    for text in (
        "model org/name@v1 has no safetensors",
        "https://example.org/a@b/c?page=2",
        "bearer of news",
        "a: b@c",
    ):
        assert redacted(text) == text


def test_a_token_reaches_the_hub_and_no_line_of_the_answer(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuse = (500, "")
    done = CliRunner().invoke(app, ["quantize", "org/tiny", "-o", str(tmp_path / "out"), "--method", "rtn"])
    assert done.exit_code == 2
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in done.output
    assert not any(TOKEN in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())


# --- what was trusted, and where it came from, is on record


def test_the_commit_of_a_download_is_recorded(tmp_path: Path, hub: Hub) -> None:
    found = resolved("org/tiny", tmp_path / "work")
    assert found.revision is not None
    assert len(found.revision) == 40
    assert set(found.sha256) >= {"config.json", "tokenizer.json"}


def test_a_download_that_is_cut_is_refused(tmp_path: Path, hub: Hub) -> None:
    whole = hub.read

    def torn(name: str) -> bytes:
        data = whole(name)
        return data[:-7] if name.endswith(".safetensors") else data

    sizes = {name: len(whole(name)) for name in hub.files()}
    entry = hub.entry
    hub.read = torn  # type: ignore[method-assign]  # the stand-in sends other bytes than it announces
    hub.entry = lambda name: entry(name) | {"size": sizes[name]}  # type: ignore[method-assign]
    with pytest.raises(QuantkitError):
        resolved("org/tiny", tmp_path / "work")


# --- signatures


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed")
    make_model(folder / "model")
    return quantkit.quantize(folder / "model", out=folder / "export", method="rtn", bits=4, group_size=32)


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


@pytest.fixture
def signed(export: Path, tmp_path: Path) -> Path:
    pytest.importorskip("minisign")
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    assert command("keygen", tmp_path / "mine")[0] == 0
    assert command("sign", folder, "--key", tmp_path / "mine.key")[0] == 0
    return folder


def test_a_signed_checkpoint_is_verified_with_every_file(signed: Path, tmp_path: Path) -> None:
    code, told = command("verify-signature", signed, "--key", tmp_path / "mine.pub")
    count = len(json.loads((signed / "manifest.json").read_text())["files"])
    assert (code, f"{count} files are as they were signed" in told) == (0, True)
    line = (tmp_path / "mine.pub").read_text().splitlines()[1]
    assert command("verify-signature", signed, "--key", line)[0] == 0


def test_the_secret_key_is_for_its_owner_alone(signed: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "mine.key").stat().st_mode) == 0o600
    assert command("keygen", tmp_path / "mine")[0] == 2


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "manifest.json.minisig").unlink(), "is not signed"),
        (lambda folder: (folder / "manifest.json.minisig").write_text("x"), "is no signature of minisign"),
        (lambda folder: flipped(folder / "model.safetensors"), "its hash differs"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
        (lambda folder: (folder / "evil.py").write_text("x"), "holds evil.py, which its manifest does not list"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json was changed since"),
    ],
)
def test_a_checkpoint_that_was_touched_is_one_line(
    signed: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(signed)
    code, told = command("verify-signature", signed, "--key", tmp_path / "mine.pub")
    assert code == 2
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    assert expected in told


def test_a_signature_survives_a_verdict_and_a_manifest_lists_no_signature(signed: Path, tmp_path: Path) -> None:
    assert quantkit.verify(signed, runtime="reference", device="cpu")["passed"]
    write_card(signed)
    assert {"verified.json", "README.md", "manifest.json.minisig"} <= {file.name for file in signed.iterdir()}
    assert {"verified.json", "README.md", "manifest.json.minisig"} <= files_to_push(signed).keys()
    assert command("verify-signature", signed, "--key", tmp_path / "mine.pub")[0] == 0
    write_manifest(signed, {})
    listed = set(json.loads((signed / "manifest.json").read_text())["files"])
    assert "model.safetensors" in listed
    assert not listed & {"verified.json", "README.md", "manifest.json.minisig", "manifest.json"}


def test_another_key_is_one_line(signed: Path, tmp_path: Path) -> None:
    command("keygen", tmp_path / "other")
    code, told = command("verify-signature", signed, "--key", tmp_path / "other.pub")
    assert (code, "is not by this key" in told) == (2, True)
    assert command("verify-signature", signed, "--key", tmp_path / "none.pub")[0] == 2
    assert command("verify-signature", signed, "--key", tmp_path / "mine.key")[0] == 2


def test_what_is_not_whole_is_not_signed(signed: Path, tmp_path: Path) -> None:
    flipped(signed / "model.safetensors")
    code, told = command("sign", signed, "--key", tmp_path / "mine.key")
    assert (code, "its hash differs" in told) == (2, True)
    assert command("sign", tmp_path, "--key", tmp_path / "mine.key")[0] == 2


def test_a_key_with_a_password_needs_it(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minisign")
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    monkeypatch.setattr("minisign.secret_key.OPSLIMIT", 1 << 15)
    monkeypatch.setattr("minisign.secret_key.MEMLIMIT", 1 << 24)
    monkeypatch.setenv("QUANTKIT_KEY_PASSWORD", "correct horse")
    assert command("keygen", tmp_path / "mine")[0] == 0
    assert command("sign", folder, "--key", tmp_path / "mine.key")[0] == 0
    for password, expected in (("wrong horse", "cannot be used"), (None, "has a password")):
        monkeypatch.delenv("QUANTKIT_KEY_PASSWORD", raising=False)
        if password:
            monkeypatch.setenv("QUANTKIT_KEY_PASSWORD", password)
        code, told = command("sign", folder, "--key", tmp_path / "mine.key")
        assert (code, expected in told) == (2, True), told
        assert "horse" not in told


# --- pages


def test_names_in_a_report_are_text_and_no_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    content = {"schema": 1, "name": evil, "variants": [{"name": evil, "metrics": {}}]}
    (tmp_path / "report.json").write_text(json.dumps(content))
    code, told = command("report", tmp_path)
    assert code == 0, told
    assert evil not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_python_that_comes_with_a_model_is_refused_without_a_flag(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(SourceError, match="trust_remote_code"):
        resolved(str(folder), tmp_path / "work")
