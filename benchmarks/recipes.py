"""Published optimizers that are a chain of `unit_scale` and Optax's own parts.

Each is tested against its paper's equations. Where a paper treats vectors differently, its matrices
are meant: give the vectors to another optimizer by `optax.partition`.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_unitscale import unit_scale

Rate = optax.ScalarOrSchedule
Recipe = optax.GradientTransformationExtraArgs


def normalized_sgd(learning_rate: Rate, momentum: float = 0.9) -> Recipe:
    r"""Momentum, then the whole of it to unit norm: provably good with small batches.

    .. math:: m_1 = g_1, \quad m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad
              \theta_{t+1} = \theta_t - \alpha m_t / \|m_t\|

    Source: Cutkosky, Mehta 2020, "Momentum Improves Normalized SGD",
    https://arxiv.org/abs/2002.03305.
    """

    # Optax's average starts at zero and would count the first gradient by 1 - momentum.
    def in_full(count):
        return jnp.where(count == 0, 1 / (1 - momentum), 1.0)

    return optax.chain(
        optax.scale_by_schedule(in_full),
        optax.ema(momentum, debias=False),
        unit_scale(scope="global"),
        optax.scale_by_learning_rate(learning_rate),
    )


def sngm(learning_rate: Rate, momentum: float = 0.9) -> Recipe:
    r"""The whole gradient to unit norm, then momentum: for large batches.

    .. math:: u_t = \beta u_{t-1} + g_t / \|g_t\|, \quad \theta_{t+1} = \theta_t - \alpha u_t

    Source: Zhao, Xie, Li 2020, "Stochastic Normalized Gradient Descent with Momentum for
    Large-Batch Training", https://arxiv.org/abs/2007.13985.
    """
    return optax.chain(unit_scale(scope="global"), optax.sgd(learning_rate, momentum))


def block_normalized_sgd(learning_rate: Rate, layers: Any, momentum: float = 0.9) -> Recipe:
    r"""Each layer's gradient, its kernel and bias together, to unit norm, then momentum.

    .. math:: u_t^i = \beta u_{t-1}^i + g_t^i / \|g_t^i\|, \quad
              \theta_{t+1} = \theta_t - \alpha u_t

    `layers` labels the layers i as `unit_scale`'s scope does, such as
    `lambda updates: {layer: layer for layer in updates}`.

    Source: Yu et al. 2017, "Block-Normalized Gradient Method: An Empirical Study for Training Deep
    Neural Network", https://arxiv.org/abs/1707.04822.
    """
    return optax.chain(unit_scale(scope=layers), optax.sgd(learning_rate, momentum))


def sinkhorn_sgd(learning_rate: Rate, iterations: int = 5) -> Recipe:
    r"""SinkGD: rows and columns of each matrix in turn to one norm. For matrices only.

    .. math:: X \leftarrow \sqrt n \, Q(X)^{-1} X, \quad X \leftarrow \sqrt m \, X R(X)^{-1}

    from the gradient :math:`X \in R^{m \times n}` on, several times; the diagonals Q and R hold the
    Euclidean norms of rows and columns, so that either factor makes an RMS of 1. Then
    :math:`\theta_{t+1} = \theta_t - \alpha X`. No state.

    Source: Scetbon, Ma, Gong, Meeds 2025, "Gradient Multi-Normalization for Stateless and Scalable
    LLM Training", algorithm 3, https://arxiv.org/abs/2502.06742.
    """
    rows_and_columns = [unit_scale("rms", axis=1), unit_scale("rms", axis=0)]
    return optax.chain(*rows_and_columns * iterations, optax.scale_by_learning_rate(learning_rate))


def column_normalized_sgd(learning_rate: Rate, labels: Any, momentum: float = 0.9) -> Recipe:
    r"""SCALE: what leads to each output to unit norm, momentum for the last layer only.

    .. math:: m_t = \beta m_{t-1} + (1 - \beta) g_t \text{ in the last layer, else } g_t, \quad
              \theta_{t+1} = \theta_t - \alpha\, [m_{t,j} / \|m_{t,j}\|]_j

    over the columns j of matrices of shape (in, out), embeddings too. `labels` says "last" or
    "rest" as in `optax.partition`. The authors' code has an RMS of 1 instead; give `unit_scale`
    the norm "rms" for that.

    Source: Glentis, Li, Han, Hong 2025, "A Minimalist Optimizer Design for LLM Pretraining",
    https://arxiv.org/abs/2506.16659.
    """
    average = optax.ema(momentum, debias=False)
    return optax.chain(
        optax.partition({"last": average, "rest": optax.identity()}, labels),
        unit_scale(axis=0),
        optax.scale_by_learning_rate(learning_rate),
    )


def lars(learning_rate: Rate, momentum: float = 0.9, trust: float = 1e-3) -> Recipe:
    r"""LARS without weight decay: each step in proportion to the parameter's norm.

    .. math:: v_t = \beta v_{t-1} + \alpha \eta \|\theta_t\| \, g_t / \|g_t\|, \quad
              \theta_{t+1} = \theta_t - v_t

    As `optax.lars`, and exact where the gradient vanishes. Where the parameter is 0 the step has
    length :math:`\alpha`; that of `optax.lars` is :math:`\alpha \|g_t\|` there.

    Source: You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks",
    https://arxiv.org/abs/1708.03888.
    """
    return optax.chain(
        unit_scale(),
        optax.scale_by_trust_ratio(trust_coefficient=trust),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum),
    )
