"""`unit_sgd` and `unit_muon`: chains of this package's transformations and Optax's."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_unitscale import parameters
from optax_unitscale.groups import check_scalar
from optax_unitscale.layers import Layers, layers_in
from optax_unitscale.mesh import reduced_as, varying_axes, without_reduced
from optax_unitscale.observe import gradient_norms
from optax_unitscale.orthogonal import orthogonalize
from optax_unitscale.paths import check_names, flatten, is_childless, is_tree, some
from optax_unitscale.shape import scale_by_shape
from optax_unitscale.transform import unit_scale

__all__ = ["unit_muon", "unit_sgd"]

# Where its momentum has a smaller norm, a vector or a row of an embedding takes a shorter step, a
# kernel none. Where gradients are noise, the row of a token that occurs once in a million has it.
RARE = 1e-3


def unit_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    scope: Literal["leaf", "layer", "global"] | Any = "layer",
    axis: Any = None,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any = None,
    layers: Layers | Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on gradients of unit norm, layer by layer.

    .. math:: m_t = \mu m_{t-1} + g_t / \|g_t\|, \quad
              \theta_{t+1} = \theta_t - \alpha (m_t + \lambda \theta_t)

    with the norm of the gradient of each layer, its kernel and bias together.

    Args:
      learning_rate: the length of a layer's step before momentum, which makes it up to 1 / (1 - μ)
        times longer: a number or a schedule, best one that ends at zero. Begin with 0.03.
      momentum: as in `optax.sgd`; None for none.
      nesterov: as in `optax.sgd`.
      accumulator_dtype: the dtype of the momentum, as in `optax.sgd`.
      scope: which leaves share a norm, as in `unit_scale`. Per layer a bias whose gradient is
        noise, such as one before BatchNorm, takes a small step; with "leaf" it takes a full one.
      axis: the axes that a norm runs over, as in `unit_scale`: ``stacked("blocks/**")`` for layers
        stacked by a scan, which else share one.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: what decays, as in `optax.adamw`: by default kernels only.
      layers: what each leaf is, as in `unit_muon`. Only the default of `mask` needs it.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      NameError, TypeError, ValueError: as `unit_scale`; as `layers_of`, if weights decay.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_unitscale import unit_sgd
      >>> optimizer = unit_sgd(0.1, momentum=None)
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> [f"{x:.2f}" for x in updates["kernel"].ravel()]
      ['-0.06', '-0.08']

    Source:
      Yu et al. 2017, "Block-Normalized Gradient Method", https://arxiv.org/abs/1707.04822.
    """
    dtype = accumulator_dtype
    decay = None if momentum is None else check_scalar("unit_sgd", "momentum", momentum)

    def chain(_: Any, tree: Any) -> optax.GradientTransformationExtraArgs:
        return optax.chain(
            unit_scale(scope=scope, axis=axis),
            optax.identity() if decay is None else optax.trace(decay, nesterov, dtype),
            _decay("unit_sgd", weight_decay, mask, layers, tree),
            optax.scale_by_learning_rate(learning_rate),
        )

    return _for_each_tree(chain)


def unit_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    layers: Layers | Mapping[str, Any] | None = None,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any = None,
    keep_norm: bool = False,
    mu_dtype: Any = None,
    nesterov: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with unit scale for every leaf: one learning rate for kernels of any width.

    For a kernel with :math:`n_{in}` inputs and :math:`n_{out}` outputs

    .. math:: M_t = \mu M_{t-1} + G_t / \|G_t\|, \quad
              W_{t+1} = W_t - \alpha \sqrt{n_{out} / n_{in}} \,
              \mathrm{orthogonal}(\mu M_t + G_t / \|G_t\|)

    so that all singular values of its step are nearly equal, and an input of RMS 1 changes the
    output by an RMS of about the rate at most. Each row of an embedding takes a step whose RMS is
    at most the rate, and each vector, such as a bias or a gain, one whose RMS is a tenth of it.

    For deep networks that it does not train, such as 32 sigmoid layers without residual
    connections, make gradients orthogonal before the momentum, too:
    ``optax.chain(orthogonalize(layers=layers), unit_muon(0.03, layers=layers))``. On text that is a
    little worse.

    The gradient of every leaf has norm 1 before the momentum, that of each stacked layer by itself.
    So one batch counts as much as another, however long its gradient is. Where the norm of the
    momentum is below 0.001, rows and vectors take shorter steps, and kernels none. So a row of an
    embedding comes to rest within 100 steps after its token was last seen, where there are many
    rows: it moves by up to 76 times the rate, with Adam by 31. So does an expert that is used no
    more.

    Steps are not shorter where rows are short, as those of pretrained models often are. There
    freeze the embeddings, or give them to Adam. Find the layers from the whole tree, for a part of
    it shows less:

    .. code-block:: python

        layers = layers_of(params)
        tx = unit_muon(0.003, layers=layers)
        optax.partition(
            {"embedding": optax.adam(1e-4), "kernel": tx, "vector": tx},
            lambda tree: layers.map(lambda layer: layer.kind, tree),
        )

    Args:
      learning_rate: a number or a schedule, best one that ends at zero. Begin with 0.03. The best
        rate was 0.02 to 0.06 on small GPTs of any width, depth, batch size and length of training,
        lower on larger ones and in longer runs; at 0.03 losses were within 3.3 % of the best. On
        small MLPs it was 0.06 to 0.25.
      momentum: how much of the momentum is kept at each step. 0.95, Muon's, was a little worse on
        a small GPT, in runs of up to 1600 steps.
      layers: what each leaf is: what `layers_of` returned, overrides for it, such as
        ``{"**/qkv/kernel": Kernel(inputs=0, outputs=(1, 2))}``, or None to find it from the names
        and shapes of the parameters. `layers_of(model)` reads the types of modules, which says
        more. `layers_table` shows the result.
      weight_decay: decoupled, as in `optax.adamw`. On text 0.1 was level with none or ahead on
        the test split, and a little behind in training; where gradients explode, it helped.
      mask: what decays, as in `optax.adamw`: by default kernels only.
      keep_norm: whether each kernel keeps the norm that it has at `init`, as by `keep_norm`.
      mu_dtype: the dtype of the momentum; by default that of the parameters, or from the first step
        on that of the gradients if it is wider. `jax.lax.scan` over such steps needs it set.
      nesterov: whether the momentum is Nesterov's.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: as `layers_of`; a leaf of the updates holds integers; `momentum` is no number.
      ValueError: as `layers_of`, at `init`: what some leaves are cannot be told; as
        `orthogonalize`; the updates have leaves that `params` have not; in `jax.shard_map` a leaf
        varies over a mesh axis, so that it may be a part.

    Numerics:
      As `unit_scale`, `orthogonalize` and, with `keep_norm`, as `keep_norm`: gradients that are
      all longer or shorter by one factor give the same steps.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_unitscale import unit_muon
      >>> optimizer = unit_muon(0.03)
      >>> params = {"kernel": jnp.eye(4, 16), "bias": jnp.ones(16)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> print(f"{jnp.linalg.norm(updates['kernel'], 2):.3f}")  # About 0.03 * sqrt(16 / 4).
      0.066

    Source:
      Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon; the shares of layers
      from Yang, Simon, Bernstein 2023, "A Spectral Condition for Feature Learning",
      https://arxiv.org/abs/2310.17813.
    """
    decay = check_scalar("unit_muon", "momentum", momentum)

    def chain(updates: Any, tree: Any) -> optax.GradientTransformationExtraArgs:
        check_names("unit_muon", updates, tree)
        leaves = layers_in("unit_muon", layers, tree)
        shapes = {path.name: x.shape for path, x, _ in leaves}
        found = Layers({path.name: layer for path, _, layer in leaves}, shapes)
        _check_whole(updates, found)

        def whole(name: str, x: Any) -> tuple[int, ...]:
            return found[name].inputs + found[name].outputs

        rows = unit_scale(axis=lambda name, x: found[name].outputs, min_norm=RARE)
        return optax.chain(
            unit_scale(axis=whole),
            optax.trace(decay, nesterov, mu_dtype),
            _where({"kernel"}, found, _rest(whole)),
            orthogonalize(layers=found),
            _where({"embedding", "vector"}, found, rows),
            _where({"vector"}, found, optax.scale(0.1)),
            scale_by_shape(layers=found),
            _decay("unit_muon", weight_decay, mask, found, tree),
            optax.scale_by_learning_rate(learning_rate),
            parameters.keep_norm(layers=found) if keep_norm else optax.identity(),
        )

    return _for_each_tree(chain)


def _for_each_tree(
    chain: Callable[[Any, Any], optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """The transformation that `chain` makes of the updates, and of a tree that shows the layers.

    The parameters show more of them: some updates may be missing.
    """

    def init(params):
        return chain(params, params).init(params)

    def update(updates, state, params=None, **extra_args):
        tx = chain(updates, updates if params is None else params)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _rest(axes: Callable[[str, Any], tuple[int, ...]]) -> optax.GradientTransformation:
    """Zeroes the momentum of kernels that have had no gradient for long.

    Made orthogonal, it would still give full steps.
    """

    def update(updates: Any, params: Any = None) -> Any:
        del params
        norms = gradient_norms(updates, axis=axes)
        leaves = []
        for path, x in flatten(updates):
            is_moving = jnp.expand_dims(norms[path.name] >= RARE, axes(path.name, x))
            leaves.append(reduced_as(x, without_reduced(x) * is_moving.astype(x.dtype)))
        return jax.tree.unflatten(jax.tree.structure(updates), leaves)

    return optax.stateless(update)


def _check_whole(updates: Any, layers: Layers) -> None:
    """Refuses parts of leaves: their rows and shapes are not those of the whole ones."""
    leaves = flatten(updates)
    if parts := [path.name for path, x in leaves if path.name in layers and varying_axes(x)]:
        raise ValueError(
            f"unit_muon: in jax.shard_map {some(parts)} vary over mesh axes: they may be parts of "
            "leaves, expected whole ones. Call the optimizer outside, under jax.jit; or, where "
            "every device has whole leaves, in jax.shard_map(check_vma=False)."
        )


def _where(
    kinds: set[str], layers: Layers, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """A transformation of the leaves of some kinds, which leaves the others as they are."""
    names = {name for name, layer in layers.items() if layer.kind in kinds}

    def mask(tree: Any) -> Any:
        is_one = [path.name in names for path, _ in flatten(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), is_one)

    # A function, for Optax would call an Equinox model.
    return _masked(inner, mask)


def _masked(inner: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`optax.masked`, where parameters may have leaves that updates have not, as in Equinox."""
    tx = optax.masked(inner, mask)

    def update(updates, state, params=None, **extra_args):
        if params is not None:
            params = jax.tree.map(
                lambda x, p: None if x is None else p, updates, params, is_leaf=lambda x: x is None
            )
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _decay(
    caller: str,
    weight_decay: optax.ScalarOrSchedule | None,
    mask: Any,
    layers: Layers | Mapping[str, Any] | None,
    tree: Any,
) -> optax.GradientTransformation:
    if weight_decay is None or (isinstance(weight_decay, float | int) and weight_decay == 0):
        # Needs neither parameters nor layers; its state has the structure of that of what decays.
        return optax.masked(optax.identity(), False)
    decay = optax.add_decayed_weights(weight_decay)
    if mask is not None and not callable(mask) and is_childless(mask):
        raise ValueError(
            f"{caller}: mask is {mask!r}, expected a tree of booleans or a callable that returns "
            "one. Under optax.inject_hyperparams name it in static_args=('mask',)."
        )
    if mask is not None:
        return _masked(decay, (lambda _: mask) if is_tree(mask) else mask)
    found = {path.name: layer for path, _, layer in layers_in(caller, layers, tree)}
    return _where({"kernel"}, Layers(found, {}), decay)
