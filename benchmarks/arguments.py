"""The values that commands take, and how a wrong one is answered."""

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "UsageError", "add_out", "add_several", "count", "mesh_sizes", "positive"]

# More steps, examples or rounds than anyone waits for.
MOST = 10**9


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong value with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def count(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 12 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least} to {most}, got {text!r}"
            )
        return int(text)

    return parse


def positive(text: str) -> float:
    """A parser of finite numbers above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def mesh_sizes(axes: Sequence[str]) -> Callable[[str], dict[str, int]]:
    """A parser of the sizes of a mesh's axes, such as "data=2,fsdp=4", each at most once."""
    size = count()

    def parse(text: str) -> dict[str, int]:
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        try:
            sizes = {axis: size(number) for axis, number in pairs}
        except argparse.ArgumentTypeError:
            sizes = {}
        if len(sizes) < len(pairs) or not set(sizes) <= set(axes):
            example = ",".join(f"{axis}=2" for axis in axes)
            raise argparse.ArgumentTypeError(f"expected sizes such as {example}, got {text!r}")
        return sizes

    return parse


def add_several(
    parser: argparse.ArgumentParser, name: str, what: str, default: str, **more: Any
) -> None:
    """Declares an option that is repeated for several values."""
    text = f"{what}; repeat it for several (default: {default})"
    parser.add_argument(name, action="append", help=text, **more)


def add_out(parser: argparse.ArgumentParser, what: str, resumed: str = "") -> None:
    """Declares --out, the folder of `what`, and for what can go on, such as "run", --resume."""
    text = f"folder for {what} (default: a new one under runs/)"
    parser.add_argument("--out", type=_folder, metavar="DIR", help=text)
    if resumed:
        text = f"go on where the {resumed} in --out, or the newest under runs/, stopped"
        parser.add_argument("--resume", action="store_true", help=text)


def _folder(text: str) -> pathlib.Path:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected the name of a folder, got {text!r}")
    return pathlib.Path(text)
