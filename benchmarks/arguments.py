"""The values that commands take, and how a wrong one is answered."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong value with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def count(least: int = 1, most: int = 10**9) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 12 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least} to {most}, got {text!r}"
            )
        return int(text)

    return parse


def add(
    parser: argparse.ArgumentParser,
    option: str,
    what: str,
    kind: Callable[[str], Any] = str,
    *,
    several: str = "",
    default: Any = None,
    **more: Any,
) -> None:
    """Declares an option, such as "--steps N"; `several` is the default of one that is repeated."""
    name, _, metavar = option.partition(" ")
    if several:
        more["action"], what = "append", f"{what}; repeat it for several (default: {several})"
    elif default is not None:
        what += f" (default: {default})"
    more |= {"type": kind, "default": default, "metavar": metavar or None}
    parser.add_argument(name, help=what.replace("%", "%%"), **more)


def add_out(parser: argparse.ArgumentParser, what: str, resumed: str = "") -> None:
    """Declares --out, the folder of `what`, and for what can go on, such as "run", --resume."""
    add(parser, "--out DIR", f"folder for {what} (default: a new one under runs/)", pathlib.Path)
    if resumed:
        text = f"continue the {resumed} in --out, or the newest under runs/"
        parser.add_argument("--resume", action="store_true", help=text)
