r"""A metric for networks: a Kronecker product per layer, from the gradients of the walk.

The log-density of a network is up to a million times as curved in some directions as in others, and
the stiffest of them set the step size of all. Under the posterior, the covariance of gradients is
the mean curvature, :math:`E[g g^\top] = E[-\nabla^2 \log p]`. For a layer with gradient matrix G
(inputs, outputs) it is taken for a Kronecker product,

.. math:: E[g g^\top] \approx A \otimes B, \quad A = E[G G^\top] / \sqrt{t}, \quad
          B = E[G^\top G] / \sqrt{t}, \quad t = E \lVert G \rVert^2,

so it costs two small matrices per layer, has few numbers to estimate, and fits also far from where
it was estimated. Steps are then made in coordinates z with :math:`\Theta = R Z C`,

.. math:: R = (1 + A / (\pi \sqrt\delta))^{-1/2}, \quad C = (1 + \pi B / \sqrt\delta)^{-1/2},
          \quad \pi^2 = \frac{\operatorname{tr} A / n_A}{\operatorname{tr} B / n_B}.

Directions of a curvature well below the damping :math:`\delta` keep their scale.

References
----------
Martens and Grosse (2015), 1503.05671 (the product, and its damping in factors, section 6.3);
Gupta, Koren and Singer (2018), 1802.09568 (both factors from gradient matrices).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc.trees import Layout

# A side of a matrix that is longer keeps its scale: its factor would cost more than it gains.
MAX_SIDE = 256
# Of the square roots: each makes the least of the eigenvalues half as large again, so these are
# enough for a condition of 1e10.
ITERATIONS = 36


class Matrix(NamedTuple):
    """A part of the flat position that is a matrix: where it starts, its rows and columns."""

    start: int
    rows: int
    columns: int


class Factors(NamedTuple):
    """A pair of symmetric matrices, (rows, rows) and (columns, columns), for every matrix."""

    rows: tuple[jax.Array, ...]
    columns: tuple[jax.Array, ...]


def matrices(of: Layout, sampled: Sequence[bool] | None = None) -> tuple[Matrix, ...]:
    """Return the matrices in a position: every leaf, a bias together with its layer's weight.

    Parameters
    ----------
    of : Layout
    sampled : sequence of bool, optional
        Which leaves are in the flat vector; all if not given.

    Returns
    -------
    tuple of Matrix
        They follow one another and cover the vector. A bias is the row before the rows of its
        weight, for an input that is always one. Leaves of more than two axes are taken as (all but
        the last, last), those of fewer as one column. Empty if all are columns: such a position is
        no network's.
    """
    found: list[Matrix] = []
    start = 0
    before: tuple[str, tuple[int, ...]] = ("", ())
    for i, (name, shape) in enumerate(zip(of.names, of.shapes, strict=True)):
        if sampled is not None and not sampled[i]:
            before = ("", ())
            continue
        size = int(np.prod(shape))
        layer = name.rpartition(".")[0]
        if len(shape) < 2:
            found.append(Matrix(start, size, 1))
        elif before == (layer, (shape[-1],)):
            bias = found.pop()
            found.append(Matrix(bias.start, size // shape[-1] + 1, shape[-1]))
        else:
            found.append(Matrix(start, size // shape[-1], shape[-1]))
        start, before = start + size, (layer, tuple(shape))
    return tuple(found) if any(part.columns > 1 for part in found) else ()


def elements(parts: Sequence[Matrix]) -> int:
    """Return how many numbers all these pairs hold."""
    return sum(part.rows**2 + part.columns**2 for part in parts)


def identity(parts: Sequence[Matrix], dtype) -> Factors:
    """Return the factors that change nothing."""
    return Factors(
        tuple(jnp.eye(part.rows, dtype=dtype) for part in parts),
        tuple(jnp.eye(part.columns, dtype=dtype) for part in parts),
    )


def scale(factors: Factors, parts: Sequence[Matrix], vector: jax.Array) -> jax.Array:
    """Return the vector (size,) with every matrix M in it replaced by R M C."""
    return jnp.concatenate(
        [
            (rows @ _matrix(vector, part) @ columns).ravel()
            for rows, columns, part in zip(*factors, parts, strict=True)
        ]
    )


def add_moments(sums: Factors, parts: Sequence[Matrix], gradient: jax.Array) -> Factors:
    """Add G G^T and G^T G of a gradient (size,) to their sums."""
    layers = [_matrix(gradient, part) for part in parts]
    return Factors(
        tuple(s + m @ m.T for s, m in zip(sums.rows, layers, strict=True)),
        tuple(s + m.T @ m for s, m in zip(sums.columns, layers, strict=True)),
    )


def roots(sums: Factors, count: jax.Array, damping: float) -> tuple[Factors, Factors]:
    """Return R and C for every matrix, and their inverses.

    Parameters
    ----------
    sums : Factors
        Of `add_moments`.
    count : scalar
        Over how many gradients.
    damping : float
        The curvature from which on directions are scaled.

    Returns
    -------
    tuple of Factors, Factors
    """
    pairs = []
    for outer, inner in zip(sums.rows, sums.columns, strict=True):
        if len(inner) == 1:  # of a single column, the whole matrix is known
            pairs.append((_roots(outer, 1.0 / (count * damping)), (jnp.ones_like(inner),) * 2))
            continue
        tiny = jnp.finfo(outer.dtype).tiny
        per_gradient = 1.0 / count
        both = [jnp.maximum(jnp.trace(side) * per_gradient, tiny) for side in (outer, inner)]
        # A is the first of the means of products over this.
        size = jnp.sqrt(both[0])
        balance = jnp.sqrt(both[0] * (1.0 / len(outer)) / (both[1] * (1.0 / len(inner))))
        common = per_gradient / (size * damping**0.5)
        pairs.append((_roots(outer, common / balance), _roots(inner, common * balance)))
    rows, columns = ([pair[side] for pair in pairs] for side in (0, 1))
    there, back = (
        Factors(tuple(r[way] for r in rows), tuple(c[way] for c in columns)) for way in (0, 1)
    )
    return there, back


def _matrix(vector: jax.Array, part: Matrix) -> jax.Array:
    start, rows, columns = part
    return vector[start : start + rows * columns].reshape(rows, columns)


def _roots(matrix: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (1 + factor matrix)^(-1/2) and its inverse; symmetric, no negative eigenvalues.

    By Newton and Schulz's iteration: an eigendecomposition costs a GPU more. No product is added to
    anything unless it is exact: compilers make one rounding or two of that as they like, and draws
    would depend on how many devices there are.
    """
    one = jnp.eye(len(matrix), dtype=matrix.dtype)
    if len(matrix) > MAX_SIDE:
        return one, one
    whole = matrix + one * (1.0 / factor)
    size = jnp.trace(whole)

    def improve(_, pair):
        root, inverse = pair
        correction = 1.5 * one - 0.5 * (inverse @ root)
        return root @ correction, correction @ inverse

    pair = jax.lax.fori_loop(0, ITERATIONS, improve, (whole * (1.0 / size), one))
    root, inverse = (half + half.T for half in pair)
    stretch = jnp.sqrt(size) * jnp.sqrt(factor)
    return inverse * (0.5 / stretch), root * (0.5 * stretch)
