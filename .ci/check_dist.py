"""Checks what `python -m build` made, in an environment into which only the wheel was installed.

    python -I .ci/check_dist.py FOLDER/*.whl FOLDER/*.tar.gz

It uses nothing but the standard library and what the wheel brings.
"""

import doctest
import importlib
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
# All but those of plot.py and table.py, which need the extra `plot`.
DOCTESTS = [
    "clip",
    "history",
    "layers",
    "observe",
    "optimizers",
    "orthogonal",
    "overrides",
    "parameters",
    "ratios",
    "shape",
    "transform",
]
TIMED = """
import time, jax, optax
start = time.perf_counter()
import optax_unitscale
print(time.perf_counter() - start)
"""


def sources(include: list[str]) -> set[str]:
    """The files of the checkout under some of its paths, but for those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *include]
    return set(subprocess.check_output(command, cwd=ROOT, text=True).splitlines())


def check_wheel(path: str) -> None:
    """It holds the package, what the format demands, and the licence."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    about = "-".join(pathlib.Path(path).name.split("-")[:2]) + ".dist-info"
    parts = ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    expected = sources(["optax_unitscale"]) | {f"{about}/{part}" for part in parts}
    assert names == expected, names ^ expected
    assert "optax_unitscale/py.typed" in names


def check_sdist(path: str) -> None:
    """It holds what pyproject.toml declares, and what Hatchling adds to build from it."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    include = [name.lstrip("/") for name in hatch["build"]["targets"]["sdist"]["include"]]
    expected = sources(include) | {"pyproject.toml", ".gitignore", "PKG-INFO"}
    assert names == expected, names ^ expected


def check_doctests() -> None:
    """The examples of the docstrings run."""
    for name in DOCTESTS:
        result = doctest.testmod(importlib.import_module(f"optax_unitscale.{name}"))
        assert result.attempted > 0, name
        assert result.failed == 0, name


def import_seconds() -> float:
    """What the import takes once JAX and Optax are there: to be read, not asserted.

    That nothing slow is imported is what tests/test_package.py asserts.
    """
    command = [sys.executable, "-I", "-c", TIMED]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(3))


if __name__ == "__main__":
    wheel, sdist = sys.argv[1:]
    check_wheel(wheel)
    check_sdist(sdist)
    check_doctests()
    print(f"import optax_unitscale: {import_seconds():.3f} s after jax and optax")
