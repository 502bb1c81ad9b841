"""The coefficients of `orthogonalize`: published sets, and those of users."""

import operator
from typing import Any, NamedTuple

import jax

__all__ = ["COEFFICIENTS", "Steps", "Triple", "steps_of"]

Triple = tuple[float, float, float]

# Amsel et al. 2025, https://arxiv.org/abs/2505.16932, algorithm 1, before its safety factor.
_MINIMAX: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def _safer(triple: Triple, factor: float) -> Triple:
    """The same polynomial of a matrix that is divided by a factor first."""
    a, b, c = triple
    return a / factor, b / factor**3, c / factor**5


# The last triple of each is used again where there are more steps.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # As there: 1.01 for all but the last, and for the input.
    "polar_express": (
        _safer(_MINIMAX[0], 1.01**2),
        *(_safer(triple, 1.01) for triple in _MINIMAX[1:]),
        (1.875, -1.25, 0.375),
    ),
    # Jordan 2024, https://kellerjordan.github.io/posts/muon.
    "muon": ((3.4445, -4.7750, 2.0315),),
    # Boissin et al. 2025, https://arxiv.org/abs/2512.04632, as its repository has had them since
    # September 2025, https://github.com/thib-s/flash-newton-schulz. Its first four, which other
    # packages have, begin with (4.0098, -7.0585, 2.4635). That makes singular values above 0.88
    # negative, and of a matrix of rank one its opposite.
    "aol": (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
}


class Steps(NamedTuple):
    """The triple of each step, and whether rows are scaled first."""

    triples: tuple[Triple, ...]
    scales_rows: bool


def steps_of(coefficients: Any, steps: Any) -> Steps:
    """What `orthogonalize` does for its arguments."""
    try:
        if isinstance(steps, jax.Array | bool):
            raise TypeError
        count = operator.index(steps)
    except TypeError:
        raise TypeError(
            f"orthogonalize: steps is {steps!r}, expected an int that is known when the update is "
            'traced. Under optax.inject_hyperparams name it: static_args=("steps",).'
        ) from None
    if count < 1:
        raise ValueError(f"orthogonalize: steps is {count}, expected at least 1.")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"orthogonalize: coefficients is {coefficients!r}, expected one of "
                f"{list(COEFFICIENTS)}, or a triple (a, b, c) for each step."
            )
        own = COEFFICIENTS[coefficients]
        return Steps((own + own[-1:] * count)[:count], coefficients == "aol")
    try:
        triples = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise TypeError(
            f"orthogonalize: coefficients is {coefficients!r}, expected one of "
            f"{list(COEFFICIENTS)}, or a tuple with a triple (a, b, c) of numbers for each step."
        ) from None
    if len(triples) != count:
        raise ValueError(
            f"orthogonalize: coefficients has {len(triples)} triples for {count} steps, expected "
            f"one for each. Give steps={len(triples)}."
        )
    return Steps(triples, False)
