from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "numpy", "safetensors", "tokenizers", "matplotlib", "pyarrow", "jinja2")
SNAPSHOT = """
import json, logging, os, sys, warnings
def state():
    loggers = {name: (logger.level, len(logger.handlers), logger.disabled)
               for name, logger in logging.Logger.manager.loggerDict.items()
               if isinstance(logger, logging.Logger) and name.partition('.')[0] != 'quantkit'}
    root = logging.getLogger()
    return {"environment": dict(os.environ), "filters": [str(each) for each in warnings.filters], "cwd": os.getcwd(),
            "root": [root.level, len(root.handlers)], "loggers": sorted(map(str, loggers.items())),
            "recursion": sys.getrecursionlimit(), "hook": repr(sys.excepthook)}
before = state()
"""


def last_line(code: str) -> list[str]:
    """The list that ``code`` prints, as JSON on its last line, in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def loaded_after(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of ``names`` are imported when ``code`` has run."""
    return last_line(
        f"{code}\nimport json, sys\nprint()\nprint(json.dumps([n for n in {names!r} if n in sys.modules]))"
    )


def command(arguments: list[str]) -> str:
    return (
        f"import sys\nsys.argv = ['quantkit', *{arguments!r}]\nimport quantkit.cli\n"
        "try:\n    quantkit.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
    )


def changed_by(imports: str) -> set[str]:
    compared = "print(json.dumps([key for key, value in state().items() if value != before[key]]))"
    return set(last_line(f"{SNAPSHOT}{imports}\n{compared}"))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import quantkit", (*HEAVY, "pydantic", "yaml", "typer", "rich")) == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["quantize", "--help"], ["run", "--help"], ["estimate", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_after(command(arguments), (*HEAVY, "yaml", "quantkit.recipe")) == []


@pytest.mark.parametrize("name", ["methods", "formats", "validate"])
def test_commands_that_load_no_model_import_nothing_heavy(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "demo.yaml"
    recipe.write_text("name: demo\nmodel: {source: some/model}\nvariants: [{name: a, method: gptq, damping: 0.1}]\n")
    assert loaded_after(command([name, str(recipe)] if name == "validate" else [name])) == []


def test_importing_the_package_changes_nothing_outside() -> None:
    assert changed_by("import quantkit") == set()


def test_importing_its_modules_changes_no_more_than_their_libraries_do() -> None:
    # Loggers that a library makes for itself are its own matter.
    assert changed_by("import quantkit.api.recipes, quantkit.cli, quantkit.recipe") <= {"loggers"}
    libraries = changed_by("import torch, transformers, rich, yaml, pydantic, jinja2, psutil")
    assert changed_by("import quantkit.pipeline, quantkit.pipeline.plan, quantkit.pipeline.single") <= libraries


def test_the_environment_of_llama_cpp_needs_no_torch_to_write_a_file() -> None:
    """The plugin runs with the packages xllamacpp and gguf, and what these bring, alone."""
    code = (
        "import quantkit.gguf.writer, quantkit.llama_cpp.library\n"
        "from quantkit.libraries.llama_cpp import type_for\n"
        "type_for('q4_k_m', 'model.layers.0.mlp.up_proj', 1, (256, 256))"
    )
    assert loaded_after(code, ("torch", "transformers", "safetensors", "tokenizers", "filelock", "pydantic")) == []
