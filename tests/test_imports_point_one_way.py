"""The packages of quantkit in one order: each imports only from those before it, in functions and for types too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import quantkit

FLOORS = (
    "system.redaction", "errors", "system",
    "schemes", "checkpoint", "numerics", "gguf", "llama_cpp",
    "formats", "methods", "transforms", "libraries", "engine", "exports", "inspection", "runtimes",
    "gates", "recipe", "source", "records", "report",
    "calibration", "merging", "quantization", "recovery", "estimation", "allocation", "evaluation", "publishing",
    "run_history", "isolation", "verification",
    "pipeline", "regression", "api", "cli", "__main__",
)  # fmt: skip
"""From the ground up."""
ROOT = Path(quantkit.__file__).parent


def floor_of(module: str) -> str:
    """The floor of ``quantkit.…``: the longest name in the order that it begins with."""
    name = module.removeprefix("quantkit.")
    found = [floor for floor in FLOORS if name == floor or name.startswith(f"{floor}.")]
    assert found, f"{module} is on no floor: put its package into the order"
    return max(found, key=len)


def imported(source: str) -> Iterator[str]:
    """Modules of quantkit that a source names: by an import anywhere, or as a public name such as ``quantkit.run``."""
    homes: dict[str, str] = quantkit._HOMES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("quantkit."))
        elif isinstance(node, ast.ImportFrom) and node.module == "quantkit":
            yield from (homes.get(alias.name, f"quantkit.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantkit."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "quantkit":
            yield from [homes[node.attr]] if node.attr in homes else []


def upward(importer: str, source: str) -> set[tuple[str, str]]:
    """The edges of a module that do not point downwards, as floors."""
    here = floor_of(importer)
    edges = {(here, floor_of(module)) for module in imported(source)}
    return {(low, high) for low, high in edges if FLOORS.index(high) > FLOORS.index(low)}


def test_imports_point_downwards() -> None:
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "__init__":
            for edge in upward(f"quantkit.{module}", path.read_text()):
                found.setdefault(edge, []).append(module)
    assert found == {}


def test_every_package_is_on_a_floor() -> None:
    packages = {
        path.name.removesuffix(".py")
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert packages - {"__init__"} == {floor.partition(".")[0] for floor in FLOORS}


def test_an_import_that_points_upwards_would_be_seen() -> None:
    inside = "def late() -> None:\n    from quantkit.pipeline.run import run\n"
    typing = "if TYPE_CHECKING:\n    from quantkit import api\n"
    assert upward("quantkit.engine.walk", inside) == {("engine", "pipeline")}
    assert upward("quantkit.engine.walk", typing) == {("engine", "api")}
    assert upward("quantkit.engine.walk", "import quantkit\nquantkit.run\n") == {("engine", "api")}
    assert upward("quantkit.errors", "from quantkit.system.redaction import redacted\n") == set()
    assert upward("quantkit.errors", "from quantkit.system import locks\n") == {("errors", "system")}
    assert upward("quantkit.api", "from quantkit.engine.walk import walk\n") == set()
