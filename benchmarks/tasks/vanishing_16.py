"""The task `vanishing` at 16 hidden layers."""

import functools

from benchmarks.tasks.vanishing import load as load_depth

load = functools.partial(load_depth, 16)
