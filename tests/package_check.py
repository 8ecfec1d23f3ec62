"""``python -m tests.package_check``: build the sdist and the wheel, look at what they hold, try the wheel.

The wheel is made from the sdist. It is installed into an empty environment, whose command is then used on a tiny model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from email import message_from_string
from pathlib import Path, PurePosixPath

from tests.large_files import LIMIT, ROOT, tracked

SDIST_TOP = {
    "hatch_build.py",
    "CHANGELOG.md",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "calib_data",
    "pyproject.toml",
    "quantkit",
    ".gitignore",
}
"""Tests, documents and reports stay in the checkout: they read each other there."""
FALLBACK = "0.1.0.dev0"
"""The version of files without git, as pyproject.toml has it."""
COMMANDS = (
    ("--help",),
    ("models",),
    ("matrix",),
    ("methods",),
    ("formats",),
    ("quantize", "model", "--out", "out", "--group-size", "32", "--calibration", "instructions_mini", "--samples", "4"),
    ("verify", "out"),
)


class RefusedError(Exception):
    """What was built is not what it should be."""


def main(out: Path) -> None:
    """Build into ``out``, and check."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)])
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {str(PurePosixPath(*PurePosixPath(each.name).parts[1:])): each.size for each in archive.getmembers()}
    with zipfile.ZipFile(wheel) as packed:
        in_wheel = {each.filename: each.file_size for each in packed.infolist()}
        (metadata,) = (packed.read(name).decode() for name in in_wheel if name.endswith(".dist-info/METADATA"))
    version = message_from_string(metadata)["Version"]
    refuse(sdist_faults(in_sdist) + wheel_faults(in_wheel, [path.relative_to(ROOT) for path in tracked(ROOT)]))
    refuse(readme_faults())
    say(f"{sdist.name} of {len(in_sdist)} files and {wheel.name} of {len(in_wheel)} files hold what they should")
    with tempfile.TemporaryDirectory() as folder:
        refuse(version_faults(Path(folder)))
    say("the version is that of a tag, of commits since, or the fallback's, in a clone, a shallow clone and an archive")
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel, version, Path(folder))
    say(f"quantkit {version} works in an empty environment")


def sdist_faults(files: dict[str, int]) -> list[str]:
    """What is wrong with the files, by path and size, of a source distribution."""
    foreign = sorted({PurePosixPath(name).parts[0] for name in files} - SDIST_TOP)
    missing = sorted(name for name in SDIST_TOP if not any(PurePosixPath(file).parts[0] == name for file in files))
    large = [name for name, size in files.items() if size > LIMIT]
    return [f"the sdist {what}: {', '.join(names)}"
            for what, names in (("also holds", foreign), ("lacks", missing), ("holds files over 1 MB", large))
            if names]  # fmt: skip


def wheel_faults(files: dict[str, int], tracked_files: Iterable[Path]) -> list[str]:
    """What is wrong with the files of a wheel, beside those that git tracks."""
    wanted = {str(path) for path in tracked_files if path.parts[0] == "quantkit"}
    wanted |= {str(Path("quantkit") / path) for path in tracked_files if path.parts[0] == "calib_data"}
    wanted |= {"quantkit/py.typed"}
    held = {name for name in files if ".dist-info/" not in name}
    return [f"the wheel {what}: {', '.join(sorted(names))}"
            for what, names in (("also holds", held - wanted), ("lacks", wanted - held))
            if names]  # fmt: skip


def version_faults(folder: Path) -> list[str]:
    """Versions that are not as docs/install.md says, in copies of this repository made in ``folder``."""
    shallow, archive = folder / "shallow", folder / "archive"
    run(["git", "clone", "--quiet", "--depth", "1", "--no-tags", f"file://{ROOT}", str(shallow)])
    found = [("a shallow clone without tags", r"0\.1\.0?\.?dev1\+g[0-9a-f]+", told_version(shallow))]
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(shallow)]
    run([*git, "tag", "v7.8.9"])
    found.append(("a tag", r"7\.8\.9", told_version(shallow)))
    run([*git, "commit", "--quiet", "--allow-empty", "--message", "more"])
    found.append(("a commit after a tag", r"7\.8\.10\.dev1\+g[0-9a-f]+", told_version(shallow)))
    archive.mkdir()
    packed = subprocess.run([*git, "archive", "v7.8.9"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", "--directory", str(archive)], input=packed, check=True)
    found.append(("an archive of a tag", r"7\.8\.9", told_version(archive)))
    (archive / ".git_archival.txt").unlink()
    found.append(("files alone", re.escape(FALLBACK), told_version(archive)))
    return [f"the version of {what} is {told}" for what, form, told in found if not re.fullmatch(form, told)]


def readme_faults() -> list[str]:
    """Links of the README on PyPI that lead nowhere, where the repository is named as it is in a release."""
    address = "https://example.org/owner/name"
    told = json.loads(run([sys.executable, "-m", "hatchling", "metadata"], REPOSITORY_URL=address))
    links = re.findall(r"\]\(([^)\s]+)", told["readme"]["text"])
    if told["urls"]["Source"] != address or not any(link.startswith(f"{address}/raw/") for link in links):
        return ["the metadata does not name the repository"]
    return [f"the README on PyPI links to '{link}'" for link in links if not link.startswith(("https://", "#"))]


def told_version(folder: Path) -> str:
    """The version that hatchling gives a folder."""
    return run([sys.executable, "-W", "ignore", "-m", "hatchling", "version"], folder).strip()


def try_out(wheel: Path, version: str, folder: Path) -> None:
    """Install a wheel, without the extras, into an empty environment in ``folder``, and use its command there."""
    from tests.tiny import make_model

    make_model(folder / "model")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])
    binaries = folder / "venv" / "bin"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(binaries / "python")]
    run([*pip, "install", "--no-compile", *constraints, str(wheel)])
    run([*pip, "check"])
    asked = "import quantkit; print(quantkit.__version__, quantkit.__file__)"
    told, place = run([str(binaries / "python"), "-c", asked], folder).strip().split(" ", 1)
    if told != version or not Path(place).resolve().is_relative_to(binaries.parent.resolve()):
        raise RefusedError(f"the package is {told}, read from {place}, and the wheel is {version}")
    for command in ([str(binaries / "quantkit")], [str(binaries / "python"), "-m", "quantkit"]):
        told = run([*command, "--version"], folder).strip()
        if told != f"quantkit {version}":
            raise RefusedError(f"{command} says '{told}', and the wheel is {version}")
    for arguments in COMMANDS:
        run([str(binaries / "quantkit"), *arguments], folder)
    manifest = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))
    if manifest["created_by"] != f"quantkit {version}":
        raise RefusedError(f"a checkpoint says that '{manifest['created_by']}' made it")


def run(command: Sequence[str], folder: Path = ROOT, **variables: str) -> str:
    """What a command prints; it sees neither this checkout's packages nor its environment's.

    Raises:
        RefusedError: it fails.
    """
    left_out = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def refuse(faults: Sequence[str]) -> None:
    """Stop where there are faults."""
    if faults:
        raise RefusedError("\n".join(faults))


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"package: {text}\n")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    try:
        main(place)
    except RefusedError as error:
        sys.exit(f"package: {error}")
