"""The values that commands take, and how a wrong one is answered."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

__all__ = ["Parser", "mesh_sizes", "positive_number", "whole_number"]


class Parser(argparse.ArgumentParser):
    """Answers a wrong value with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""
    wanted = f"of {least} or more" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
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
    wanted = f"expected sizes such as {','.join(f'{axis}=2' for axis in axes)}"

    def parse(text: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.partition("=")
            if axis not in axes or axis in sizes or not size.isdecimal() or int(size) < 1:
                raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
            sizes[axis] = int(size)
        return sizes

    return parse
