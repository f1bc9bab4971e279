"""The layout: one file names the framework, and imports at the top of files have no circle; and examples in docstrings hold."""
import ast
import doctest
import importlib

import pytest
from conftest import ROOT

FILES = {p.stem: ast.parse(p.read_text()) for p in ROOT.glob("*.py")}
BACKENDS = {"model_torch": "torch", "model_mlx": "mlx"}


def imported(tree, everywhere):
    """Names of the modules that a file imports, part by part (safetensors.torch needs torch): at its top, or also inside functions."""
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (part for a in node.names for part in a.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            yield from node.module.split(".")


def test_only_the_twins_name_a_framework():
    """Guards: a script that grows a dependence on torch. bench.py compares with other libraries and may name them."""
    for name, tree in FILES.items():
        if name != "bench":
            assert set(imported(tree, True)) & {"torch", "mlx"} <= {BACKENDS.get(name)}, name


def test_only_model_names_a_backend():
    """The choice is made at one place, model.backend."""
    for name, tree in FILES.items():
        assert not set(imported(tree, True)) & set(BACKENDS) or name in ("model", "bench"), name


def test_imports_have_no_circle():
    """Follow the imports at the top of each file: none comes back to where it began."""
    graph = {name: [m for m in imported(tree, False) if m in FILES] for name, tree in FILES.items()}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)
    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(p.stem for p in ROOT.glob("*.py") if ">>>" in p.read_text()))
def test_examples_in_docstrings(codec, name):
    """They say what the code does."""
    module, runner = importlib.import_module(name), doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(module, globs={**vars(module), "codec": codec}):
        runner.run(example)
    assert runner.tries and not runner.failures
