"""The command line: `python -m benchmarks --help`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks import interrupt
from benchmarks.arguments import Parser, UsageError

__all__ = ["main"]

# Each is a module of benchmarks.commands, with `add_arguments` and `run`.
COMMANDS = {
    "train": "train a model with several optimizers and compare them",
    "compare": "tune many optimizers alike on every task and compare them",
    "transfer": "find the best learning rate at every size of a model",
    "range": "show at which magnitudes normalised gradients have norm 1",
    "speed": "time unit_scale against its alternatives and what memory allows",
    "lower": "compile unit_scale and Optax for TPUs and GPUs that are not there",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2, after one line, where it cannot be done."""
    parser = Parser(
        prog="python -m benchmarks",
        description="Experiments with unit_scale.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Importing a command takes seconds, in which Ctrl-C must work too.
    with interrupt.immediate():
        for name, summary in COMMANDS.items():
            module = importlib.import_module(f"benchmarks.commands.{name}")
            subparser = commands.add_parser(
                name,
                help=summary,
                description=module.__doc__,
                epilog=getattr(module, "EPILOG", None),
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
            module.add_arguments(subparser)
            subparser.set_defaults(error=subparser.error, run=module.run)
        options = parser.parse_args(arguments)
        try:
            return options.run(options)
        except (UsageError, OSError) as error:
            return options.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
