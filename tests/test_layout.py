"""The house: who may name a framework, imports without a circle, and examples that hold."""

import ast
import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from data.trajectory import Codec

FOLDERS = (
    "backends",
    "common",
    "data",
    "environments",
    "evaluation",
    "nano",
    "services",
    "speed",
    "tasks",
    "workflows",
)
PATHS = sorted(ROOT.glob("*.py")) + sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
)


def module_name(path: Path) -> Any:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}


def imported_names(tree: Any) -> Any:
    """Return what a file imports, at its top or inside a function, as dotted names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_the_backends_name_a_framework() -> None:
    """Guards: a script that grows a dependence on torch. speed/ compares with other libraries."""
    for name, tree in TREES.items():
        frameworks = {part for imported in imported_names(tree) for part in imported.split(".")}
        if name == "model" or name.startswith("speed."):
            continue
        allowed = {name.split(".")[1]} if name.startswith("backends.") and "." in name else set()
        assert frameworks & {"torch", "mlx"} <= allowed, name


def test_no_script_waits_for_slow_libraries() -> None:
    """Guards: --help and a mistyped setting that wait seconds for transformers."""
    slow = {"huggingface_hub", "mlx", "torch", "transformers"}
    for name, tree in TREES.items():
        # What names a framework is imported where it is chosen.
        if name.startswith(
            (
                "backends.torch",
                "backends.mlx",
                "speed.beside_",
                "speed.gpu_check",
                "speed.metal_check",
            )
        ):
            continue
        at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = imported_names(ast.Module(at_the_top, []))
        assert not slow & {found.split(".")[0] for found in imported}, name


def test_only_model_chooses_a_backend() -> None:
    """The choice is made at one place, model.choose_backend."""
    for name, tree in TREES.items():
        if name == "model" or name.startswith("backends."):
            continue
        chosen = {"backends.torch", "backends.mlx"} & imported_names(tree)
        assert not chosen, name
    for name in ("torch", "mlx"):
        other = {"torch": "mlx", "mlx": "torch"}[name]
        for file, tree in TREES.items():
            if file.startswith(f"backends.{name}"):
                assert not any(f"backends.{other}" in found for found in imported_names(tree))


def test_imports_have_no_circle() -> None:
    """Follow all imports, those inside functions too: none comes back to where it began."""
    imports = {name: imported_names(tree) & set(TREES) for name, tree in TREES.items()}
    finished = set()

    def visit(name: str, path: Path) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in finished:
            return
        for other in sorted(imports[name] - {name}):
            visit(other, [*path, name])
        finished.add(name)

    for name in imports:
        visit(name, [])


def test_twins_have_the_same_names_in_the_same_order() -> None:
    """Guards: a function of one backend that the other lacks, or has elsewhere."""
    of_cuda_alone = ["fixed_slots.py", "PackedTexts"]
    for path in sorted((ROOT / "backends" / "torch").glob("*.py")):
        if path.name in of_cuda_alone:
            continue
        names = {
            backend: [
                node.name
                for node in ast.parse((ROOT / "backends" / backend / path.name).read_text()).body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
            ]
            for backend in ("torch", "mlx")
        }
        # MLX keeps the parameters of a network in a tree, torch in a list.
        in_mlx = [name for name in names["mlx"] if name != "flat"]
        in_torch = [name for name in names["torch"] if name not in of_cuda_alone]
        assert in_torch == in_mlx, path.name


def test_tests_that_the_docs_name() -> None:
    """Guards: a row of docs/faults.md whose test has another name by now.

    The docs write `folder/test_x.py::test_a`, and `::test_b` for another one of the same file.
    """
    for page in (ROOT / "docs").glob("*.md"):
        if page.name == "log.md":
            # It says what was true on its day.
            continue
        file = ""
        named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)?::(test_\w+)`", page.read_text())
        for new_file, test in named:
            file = new_file or file
            (path,) = (ROOT / "tests").glob(f"**/{file}")
            assert f"def {test}(" in path.read_text(), f"{page.name}: {file}::{test}"


@pytest.mark.parametrize(
    "name", sorted(module_name(path) for path in PATHS if ">>>" in path.read_text())
)
def test_examples_in_docstrings(codec: Codec, name: Any) -> None:
    """They say what the code does."""
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    variables = {**vars(module), "codec": codec}
    for example in doctest.DocTestFinder().find(module, globs=variables):
        runner.run(example)
    assert runner.tries
    assert not runner.failures
