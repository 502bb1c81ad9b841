"""The command line: `python -m benchmarks --help`."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from benchmarks.arguments import Parser, UsageError

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
    # Shells make what they start in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    about = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser("python -m benchmarks", description="Experiments with unit_scale.", **about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Figures go to files; a desktop's windows would come between.
    importlib.import_module("matplotlib").use("Agg")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"benchmarks.commands.{name}")
        about |= {"description": module.__doc__, "epilog": getattr(module, "EPILOG", None)}
        command = commands.add_parser(name, help=summary, **about)
        module.add_arguments(command)
        command.set_defaults(error=command.error, run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (UsageError, OSError) as error:
        return options.error(str(error))
    except KeyboardInterrupt:
        print("Stopped. To go on, where there is --resume, repeat the command with it.")
        # As shells say that Ctrl-C ended a command.
        return 130


if __name__ == "__main__":
    sys.exit(main())
