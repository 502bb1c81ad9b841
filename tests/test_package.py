"""What the package imports, and what its metadata say."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

import optax_unitscale

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "optax_unitscale").glob("*.py"))
NEEDED = {"jax", "numpy", "optax", "optax_unitscale"}
# The extra `plot`, where a function needs it.
WITHIN_FUNCTIONS = {"matplotlib", "rich"}
# What reaches beyond the process, or runs what it reads.
REFUSED = {"ctypes", "http", "importlib", "marshal", "multiprocessing", "os", "pickle", "shelve",
           "shutil", "socket", "ssl", "subprocess", "tempfile", "urllib", "webbrowser"}  # fmt: skip


def imported(nodes):
    """The first names of all modules that some nodes of a syntax tree import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_module_imports_what_the_package_needs_and_nothing_that_reaches_out(source):
    tree = ast.parse(source.read_text())
    everywhere = imported(ast.walk(tree)) - NEEDED
    assert not everywhere & REFUSED
    assert everywhere - sys.stdlib_module_names <= WITHIN_FUNCTIONS
    assert imported(tree.body) - NEEDED <= sys.stdlib_module_names
    called = {node.func.id for node in ast.walk(tree)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not called & {"eval", "exec", "open", "__import__", "compile"}


def test_every_public_name_has_an_annotated_signature_and_a_docstring_of_all_parts():
    for name in optax_unitscale.__all__:
        function = getattr(optax_unitscale, name)
        parts = re.findall(r"^ {4}(\w+):$", function.__doc__, re.MULTILINE)
        assert {"Args", "Returns", "Raises", "Examples"} <= set(parts), name
        assert {"return", *function.__code__.co_varnames[: len(function.__annotations__) - 1]} == (
            set(function.__annotations__)
        )


def test_the_version_is_the_newest_of_the_changelog():
    newest = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert optax_unitscale.__version__ == newest


def test_the_oldest_python_is_the_first_that_is_named():
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r" 3\.\d+$", c)]
    assert named == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_core_depends_on_jax_and_optax_only():
    assert [re.split(r"[^\w-]", x)[0] for x in PROJECT["dependencies"]] == ["jax", "optax"]
