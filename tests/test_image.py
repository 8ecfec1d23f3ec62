"""The Dockerfile: what it copies is there and in the context, and what runs is not root."""

from __future__ import annotations

import re
import tomllib

from tests.large_files import ROOT

TEXT = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
CONTEXT = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def stages() -> dict[str, list[str]]:
    """The instructions of each stage by its name, the first of them what it begins from."""
    found: dict[str, list[str]] = {}
    for line in TEXT.replace("\\\n", " ").splitlines():
        if begun := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[begun[2]] = [f"FROM {begun[1]}"]
        elif line.strip() and found:
            found[list(found)[-1]].append(line)
    return found


def test_what_is_copied_is_there_and_in_the_context() -> None:
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--)(.*)$", TEXT, re.MULTILINE)]
    names = {name for each in copied for name in each}
    assert {name for name in names if not (ROOT / name).exists()} == set()
    assert "*" in CONTEXT
    assert names == {line.removeprefix("!") for line in CONTEXT if line.startswith("!")}
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert set(built["sdist"]["only-include"]) < names, "a wheel is built from what the source distribution holds"


def test_stages_begin_from_a_release_of_python_or_from_each_other() -> None:
    named = stages()
    bases = {lines[0].removeprefix("FROM ") for lines in named.values()}
    assert bases <= {"${BASE}", *named}
    (base,) = re.findall(r"^ARG BASE=(.*)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base), (
        "by Python and Debian release; a digest is given when building"
    )
    for place in re.findall(r"^COPY --from=(\S+)", TEXT, re.MULTILINE):
        assert place in named


def test_images_run_the_command_as_a_user_and_the_last_is_the_one_without_a_gpu() -> None:
    named = stages()
    assert list(named)[-1] == "cpu"
    for target, begun in (("cpu", "runtime"), ("cuda", "runtime-cuda")):
        first, *rest = named[target]
        assert first == f"FROM {begun}"
        assert not any(line.startswith(("USER", "RUN", "ENTRYPOINT")) for line in rest)
        assert f"COPY --from={target}-packages /opt/quantkit /opt/quantkit" in rest
    assert "USER 1000" in named["runtime"]
    assert named["runtime-cuda"][0] == "FROM runtime"
    assert named["runtime-cuda"][-1] == "USER 1000"
    assert any("gcc libc6-dev" in line for line in named["runtime-cuda"]), "triton has its launchers compiled"
    assert any("libgomp1" in line for line in named["runtime"]), "llama.cpp does not load without it"
    assert 'ENTRYPOINT ["quantkit"]' in named["runtime"]


def test_extras_of_images_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    given = re.findall(r"^ARG EXTRAS=(.*)$", TEXT, re.MULTILINE)
    assert len(set(given)) == 1
    assert set(given[0].split(",")) <= set(project["project"]["optional-dependencies"])
    assert f"ARG VERSION={project['tool']['hatch']['version']['fallback-version']}" in TEXT
