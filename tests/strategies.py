"""Random gradients and groups, for Hypothesis.

Elements are zero or in their dtype's normal range, around powers of two of which the outermost, and
those whose squares are, are drawn as often as all others together.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

__all__ = ["Case", "case", "cases", "gradients", "groups", "spec"]

SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0, 3), (2, 1, 3), (17,)]


class Case(NamedTuple):
    """The leaves' shapes and dtypes in their tree, and for each leaf its group and its axes."""

    tree: Any
    labels: tuple[Hashable, ...]
    axes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]


def case(tree: Any, scope: str = "leaf", labels: Any = None, axes: Any = None) -> Case:
    """A case from its tree and, where they are not the default, labels and axes of every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    options: dict[str, Any] = {"scope": scope}
    if labels is None:
        labels = range(len(leaves)) if scope == "leaf" else ["all"] * len(leaves)
    else:
        options["scope"] = jax.tree.unflatten(structure, labels)
    if axes is None:
        axes = [tuple(range(leaf.ndim)) for leaf in leaves]
    else:
        options["axis"] = jax.tree.unflatten(structure, axes)
    return Case(tree, tuple(labels), tuple(axes), options)


def spec(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """A leaf of a case's tree."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Real numbers, zero or normal, around a power of two that is drawn for the whole array."""
    finfo = jnp.finfo(dtype)
    lowest, highest = int(finfo.minexp), int(finfo.maxexp) - 1
    ends = [lowest, lowest + 1, highest - 1, highest]
    # Half the exponent is where squares leave the range, and where some of a sum's are lost.
    squares = st.integers(lowest // 2, lowest // 2 + 12) | st.integers(
        highest // 2 - 4, highest // 2
    )
    middle = draw(st.sampled_from([0, *ends]) | squares | st.integers(lowest, highest))
    spread = draw(st.sampled_from([0, 1, 5, 12, 30, highest]))
    share_of_zeros = draw(st.sampled_from([0.0, 0.0, 0.5, 0.9, 1.0]))
    # Powers of two, numbers just below the next one, and all between.
    mantissa = draw(st.sampled_from([0.0, 1.0, None]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = middle + rng.integers(-spread, spread + 1, shape)
    if mantissa is None:
        fraction = rng.integers(0, 2**finfo.nmant, shape) / 2**finfo.nmant
    else:
        fraction = mantissa * (1 - float(finfo.eps))
    signs = rng.choice([-1.0, 1.0], shape) * (rng.random(shape) >= share_of_zeros)
    return (signs * np.ldexp(1 + fraction, np.clip(exponents, lowest, highest))).astype(dtype)


@st.composite
def arrays(draw: st.DrawFn, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """A leaf's elements; complex ones have parts of magnitudes of their own."""
    real = draw(parts(leaf.shape, jnp.finfo(leaf.dtype).dtype))
    if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return real
    return (real + 1j * draw(parts(leaf.shape, real.dtype))).astype(leaf.dtype)


def gradients(tree: Any) -> st.SearchStrategy[Any]:
    """NumPy arrays in the place of their shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = st.tuples(*map(arrays, leaves))
    return drawn.map(lambda values: jax.tree.unflatten(structure, values))


def trees(dtypes: Sequence[str]) -> st.SearchStrategy[Any]:
    """Dicts, lists, tuples, None and leaves in each other; any of them may be empty."""
    leaf = st.builds(spec, st.sampled_from(SHAPES), st.sampled_from(dtypes))
    return st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        ),
        max_leaves=6,
    )


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[str]) -> Case:
    """Any tree with any groups; axes only where every leaf is a group of its own."""
    tree = draw(trees(dtypes))
    leaves = jax.tree.leaves(tree)
    kind = draw(st.sampled_from(["leaf", "global", "labels", "axis"]))
    if kind == "labels":
        return case(tree, labels=[draw(st.integers(0, 2)) for _ in leaves])
    if kind == "axis":
        subsets = [
            st.sets(st.sampled_from(range(x.ndim))) if x.ndim else st.just(()) for x in leaves
        ]
        return case(tree, axes=[tuple(sorted(draw(axes))) for axes in subsets])
    return case(tree, kind)


def groups(tree: Any, of: Case) -> list[list[np.ndarray]]:
    """The rows that share a norm, by NumPy alone."""
    found = defaultdict(list)
    for x, label, axes in zip(jax.tree.leaves(tree), of.labels, of.axes, strict=True):
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        if not x.size:
            continue
        rows = np.moveaxis(np.asarray(x), kept, range(len(kept)))
        rows = rows.reshape(math.prod(x.shape[axis] for axis in kept), -1)
        for index, row in enumerate(rows):
            found[label, index].append(row)
    return list(found.values())
