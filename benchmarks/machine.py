"""What computes: Python, packages and device, for the files that hold results."""

import contextlib
import importlib.metadata
import platform
from typing import Any

import jax


def about(*packages: str) -> dict[str, Any]:
    """Python's version, those of packages, and the device."""
    return {
        "python": platform.python_version(),
        "versions": versions(*packages),
        "device": jax.devices()[0].device_kind,
    }


def versions(*packages: str) -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
