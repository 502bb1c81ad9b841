"""What the leaves of a Flax model are, by path and shape: kernels, embeddings or vectors."""

import re
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

__all__ = ["are_kernels", "are_vectors", "inputs", "kinds", "matrices", "outputs", "rows"]


def kinds(tree: Any) -> Any:
    """What each leaf is: "kernel", "embedding" or "vector", as biases and gains are."""

    def kind(keys: Any, x: jax.Array) -> str:
        name = _path(keys).rpartition("/")[2]
        return name if x.ndim > 1 and name in ("kernel", "embedding") else "vector"

    return jax.tree.map_with_path(kind, tree)


def are_kernels(tree: Any) -> Any:
    """True at kernels."""
    return jax.tree.map(lambda kind: kind == "kernel", kinds(tree))


def are_vectors(tree: Any) -> Any:
    """True at vectors, which always move by all that a norm allows (`scale_by_shape`)."""
    return jax.tree.map(lambda kind: kind == "vector", kinds(tree))


def matrices(tree: Any) -> Any:
    """The axes of every kernel as a matrix, those of attention and convolutions too, else None."""

    def of_leaf(keys: Any, x: jax.Array) -> MuonDimensionNumbers | None:
        path = _path(keys)
        if not path.endswith("kernel"):
            return None
        return MuonDimensionNumbers(inputs(path, x), outputs(path, x))

    return jax.tree.map_with_path(of_leaf, tree)


def inputs(path: str, x: jax.Array) -> tuple[int, ...]:
    """The axes of a matrix's inputs: first where attention projects to heads, else all but last."""
    projects = re.search("(query|key|value)/kernel$", path) is not None
    return tuple(range(1 if projects else max(1, x.ndim - 1))) if x.ndim else ()


def outputs(path: str, x: jax.Array) -> tuple[int, ...]:
    """The other axes; all of a vector."""
    return tuple(range(len(inputs(path, x)) if x.ndim > 1 else 0, x.ndim))


def rows(path: str, x: jax.Array) -> int | None:
    """The axis of each row of an embedding, all axes of anything else."""
    del x
    return -1 if path.endswith("embedding") else None


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")
