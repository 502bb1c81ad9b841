"""Settings that every test runs under, and the collection of the README's code."""

from collections.abc import Iterator

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md"], path=".."
).pytest()


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
