"""What the library should compute, in NumPy's widest floating type."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

__all__ = ["epsilon", "norm_of", "unit", "widen"]


def norm_of(arrays: Sequence[np.ndarray], norm: str) -> np.longdouble:
    """The norm of all elements of some arrays together."""
    sizes = np.concatenate([np.abs(widen(array)).ravel() for array in arrays])
    largest = sizes.max()
    if norm == "linf" or largest == 0:
        return np.longdouble(largest)
    if norm == "l1":
        return np.longdouble(sizes.sum())
    # Scaled, for platforms on which longdouble is no wider than float64.
    mean = np.mean(np.square(sizes / largest))
    return largest * np.sqrt(mean * (sizes.size if norm == "l2" else 1))


def unit(arrays: Sequence[np.ndarray], norm: str) -> list[np.ndarray]:
    """The arrays over their common norm."""
    by = norm_of(arrays, norm)
    return [widen(array) / by for array in arrays]


def epsilon(dtype: np.typing.DTypeLike) -> float:
    """The relative spacing of a dtype's numbers, bfloat16's and complex ones' too."""
    return float(jnp.finfo(dtype).eps)


def widen(array: np.typing.ArrayLike) -> np.ndarray:
    """The same numbers in the widest type."""
    array = np.asarray(array)
    if np.iscomplexobj(array):
        return array.astype(np.clongdouble)
    # NumPy does not know how to make longdouble of bfloat16.
    return array if array.dtype == np.longdouble else array.astype(np.float64).astype(np.longdouble)
