"""Builds the wheel and the sdist, and checks what they hold and what the wheel does by itself.

`python .ci/check_dist.py FOLDER` builds into a folder, which must be new.
"""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
# Run where the wheel, JAX and Optax are all there is.
ALONE = """
import doctest, socket, sys, time
import jax, optax
def connect(*_):
    raise RuntimeError("the package connects to something")
socket.socket.connect = connect
before, start = set(sys.modules), time.perf_counter()
import optax_unitscale
seconds = time.perf_counter() - start
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
others = sorted(tops - {"optax_unitscale"} - sys.stdlib_module_names)
if others:
    sys.exit(f"importing the package imports {others} too")
for function in (optax_unitscale.unit_scale, optax_unitscale.scale_by_shape):
    for test in doctest.DocTestFinder().find(function, function.__name__, globs={}):
        doctest.DebugRunner(verbose=False).run(test)
if optax_unitscale.__file__.startswith(sys.argv[1]):
    sys.exit("that was the working tree, not the wheel")
print(f"imported in {seconds:.2f} s beyond jax and optax")
"""


def run(*command: object) -> None:
    """Runs a command, which must succeed."""
    subprocess.run([str(part) for part in command], check=True)


def check_wheel(path: pathlib.Path) -> None:
    """It holds the package, its licence, its marker of types, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    strangers = [x for x in names if not x.startswith(("optax_unitscale/", "optax_unitscale-"))]
    sources = {f"optax_unitscale/{x.name}" for x in (ROOT / "optax_unitscale").glob("*.py")}
    missing = (sources | {"optax_unitscale/py.typed"}) - set(names)
    if strangers or missing or not any(name.endswith("/LICENSE") for name in names):
        sys.exit(f"{path.name} holds {names}; not wanted: {strangers}, missing: {missing}")


def check_sdist(path: pathlib.Path) -> None:
    """It holds the whole project, so that the tests can run from it, but no workplace."""
    with tarfile.open(path) as sdist:
        tops = {name.split("/")[1] for name in sdist.getnames() if "/" in name}
    wanted = {"optax_unitscale", "tests", "benchmarks", "notebooks"}
    wanted |= {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    if not wanted <= tops <= wanted | {"PKG-INFO", ".gitignore"}:
        sys.exit(f"{path.name} holds {sorted(tops)}, expected {sorted(wanted)}")


def main() -> None:
    """Builds and checks."""
    out = pathlib.Path(sys.argv[1])
    run(sys.executable, "-m", "build", "--installer", "uv", "--outdir", out, ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    check_wheel(wheel)
    check_sdist(sdist)
    empty = out / "empty"
    python = empty / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", empty)
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, wheel)
    # From another folder, where the working tree is not in the way.
    run(python, "-P", "-W", "error", "-c", ALONE, ROOT / "optax_unitscale")


if __name__ == "__main__":
    main()
