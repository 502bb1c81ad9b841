"""What is installed: it says what it is, and has no use for the network, pickles or processes."""

import ast
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from typing import get_args

import pytest

import optax_unitscale
from optax_unitscale import gradient_norms, scale_by_shape, unit_scale
from optax_unitscale.groups import NORMS, SCOPES
from optax_unitscale.shape import RULES

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "optax_unitscale").rglob("*.py"))
# Of the standard library, what cannot reach outside the process.
INSIDE = {
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "operator",
    "re",
    "sys",
    "typing",
}
DEPENDENCIES = {"jax", "numpy", "optax", "optax_unitscale"}
# Of the extra `plot`, and only imported when called.
PLOT = {"matplotlib", "rich"}
EXTRA = ("plot.py", "table.py")
# NumPy and JAX reach files and pickles by some of these, Python by the others.
REFUSED = {"__import__", "eval", "exec", "open", "load", "loads", "save", "savez", "fromfile"}

# Python tells a hook of all that could leave the process, also what JAX does on the package's
# behalf. Prints the packages that come beyond those of JAX and Optax.
IMPORT = """
import sys
def refuse(event, args):
    if event.startswith(("socket.", "urllib.", "pickle.", "subprocess.", "os.system", "os.exec")):
        raise RuntimeError(f"{event}{args}")
sys.addaudithook(refuse)
import jax, optax
packages = lambda: {name.partition(".")[0] for name in sys.modules}
before = packages()
import optax_unitscale
optax_unitscale.unit_scale().update([jax.numpy.ones(3)], optax.EmptyState())
optax_unitscale.norm_ratios([{"a": 1.0}])
print(*packages() - before)
"""


def imported(nodes):
    """The packages that some syntax imports."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_a_module_imports_nothing_that_reaches_outside(module):
    tree = ast.parse(module.read_text())
    allowed = INSIDE | DEPENDENCIES
    assert set(imported(tree.body)) <= allowed
    assert set(imported(ast.walk(tree))) <= allowed | (PLOT if module.name in EXTRA else set())
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(tree)}
    assert not names & REFUSED


def test_import_and_use_need_no_network_and_no_more_than_jax_and_optax_import():
    # Where JAX has a TPU to look for, it asks the network for it.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["optax_unitscale"]


def test_the_version_is_the_changelogs_first():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == optax_unitscale.__version__


def test_the_metadata_name_python_3_11_to_3_13_and_two_dependencies():
    prefix = "Programming Language :: Python :: "
    pythons = [name for name in PROJECT["classifiers"] if name.startswith(prefix)]
    assert pythons == [f"{prefix}3.{minor}" for minor in (11, 12, 13)]
    assert PROJECT["requires-python"] == ">=3.11"
    assert [re.split("[>=]", name)[0] for name in PROJECT["dependencies"]] == ["jax", "optax"]


@pytest.mark.parametrize(
    ("function", "argument", "names"),
    [
        (unit_scale, "norm", NORMS),
        (unit_scale, "scope", SCOPES),
        (gradient_norms, "norm", NORMS),
        (gradient_norms, "scope", SCOPES),
        (scale_by_shape, "rule", tuple(RULES)),
    ],
)
def test_editors_complete_all_names(function, argument, names):
    literal, _ = get_args(inspect.signature(function).parameters[argument].annotation)
    assert get_args(literal) == names
