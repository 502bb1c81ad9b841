"""What XLA makes of it: memory, reads of the gradient, the size of the program."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from common import LARGE, NORMS, exported_for, scaled

from optax_unitscale import gradient_norms


def leaf(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def gpt(layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    """The shapes of a GPT's parameters."""

    def block() -> dict[str, Any]:
        return {
            "norms": [leaf(width) for _ in range(2)],
            "qkv": leaf(width, 3 * width),
            "up": leaf(width, 4 * width),
            "down": leaf(4 * width, width),
        }

    return {"embed": leaf(vocabulary, width), "blocks": [block() for _ in range(layers)]}


def compiled(function: Any, tree: Any) -> Any:
    return jax.jit(function, donate_argnums=0).lower(tree).compile()


def by_row(path: str, leaf: jax.Array) -> int | None:
    return 1 if leaf.ndim == 2 else None


def by_block(tree: Any) -> dict[str, Any]:
    return {"embed": "embed", "blocks": [f"block {i}" for i in range(len(tree["blocks"]))]}


OPTIONS = {
    "leaf": {},
    "global": {"scope": "global"},
    "rows": {"axis": by_row},
    "blocks": {"scope": by_block},
}


def naive(tree: Any) -> Any:
    def divide(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.sum(wide * wide))).astype(x.dtype)

    return jax.tree.map(divide, tree)


@pytest.mark.parametrize(("norm", "scope"), [*zip(NORMS, OPTIONS, strict=True)])
def test_donated_parameters_need_hardly_any_memory_beside_them(norm, scope):
    tree = gpt(2, 512, 20000)
    options = OPTIONS[scope]
    memory = compiled(lambda tree: scaled(tree, norm, **options), tree).memory_analysis()
    # Old versions of XLA hold the squares that they sum; nobody's formula is spared that. The
    # largest that keeps a NaN is two reductions there.
    least = compiled(naive, tree).memory_analysis().temp_size_in_bytes
    assert memory.temp_size_in_bytes < (2 if norm == "linf" else 1) * least + 1e6
    donated = sum(4 * x.size for x in jax.tree.leaves(tree))
    assert memory.alias_size_in_bytes == donated > 5e7


@pytest.mark.parametrize(("norm", "scope"), [("l2", "leaf"), ("linf", "global")])
def test_bfloat16_leaves_are_not_held_in_float32_too(norm, scope):
    tree = [leaf(1024, 1024, dtype=jnp.bfloat16)] * 3
    ours = compiled(lambda tree: scaled(tree, norm, scope=scope), tree).memory_analysis()
    assert compiled(naive, tree).memory_analysis().temp_size_in_bytes > 4e6
    assert ours.temp_size_in_bytes < 1e5 or jax.__version_info__ < (0, 9)


def reads(program: str) -> int:
    """How often the program's top level reads a parameter as a whole, branches left out."""
    entry = program[program.index("ENTRY") :]
    parameters = re.findall(r"(%[\w.]+) = \S+ parameter\(", entry)
    lines = [line for line in entry.splitlines() if " tuple(" not in line and "ROOT" not in line]
    return sum(
        bool(re.search(re.escape(name) + r"[,)]", line)) for line in lines for name in parameters
    )


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_each_leaf_is_read_once_for_its_norm_recorded_or_not_and_once_to_be_scaled(scope):
    tree = [leaf(256, 300 + i) for i in range(3)]

    def both(tree):
        return scaled(tree, scope=scope), gradient_norms(tree, scope=scope)

    for function in (lambda tree: scaled(tree, scope=scope), both):
        assert reads(compiled(function, tree).as_text()) == 2 * len(tree)


def test_the_program_grows_no_faster_than_the_number_of_leaves():
    def size(leaves: int) -> int:
        tree = [leaf(8, 4 + i) for i in range(leaves)]
        return jax.jit(lambda t: scaled(t, scope="global")).lower(tree).as_text().count("\n")

    assert size(40) < 2.1 * size(20)


def test_leaves_of_one_shape_are_traced_once():
    def multiplications(leaves: int) -> int:
        return jax.jit(scaled).lower([leaf(64, 16)] * leaves).as_text().count("multiply")

    assert multiplications(40) == multiplications(20)


def test_nothing_on_gpu_and_tpu_and_no_small_leaf_on_cpu_depends_on_a_branch():
    tree = [leaf(64, 16), leaf(*LARGE)]
    for platform in ("cuda", "tpu"):
        program = exported_for(scaled, tree, platform).lower(tree).compile()
        assert "conditional(" not in program.as_text()
    assert "conditional(" not in compiled(scaled, tree[:1]).as_text()
    # Where there is one, this is what it looks like.
    assert "conditional(" in compiled(scaled, tree[1:]).as_text()
