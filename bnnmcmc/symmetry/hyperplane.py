r"""The reference set of Wiese et al.: hyperplanes for the signs, neighbours for the places.

Layer by layer, from the output backwards, each hidden unit of each draw is a vector
:math:`v = (b, w_\text{out})` of its bias and outgoing weights, whose order the layer above has
settled.

- Signs (odd activations): a hyperplane through zero with normal u, with a large margin on both
  sides; every v with :math:`u \cdot v < 0` is flipped. u starts at the leading direction of the
  vectors and is then a linear support vector machine's, with the sides it implies, until these
  stay.
- Places: a unit's neighbours among the units of other draws say which label it should have;
  in each draw the labels are given out without repetition, so that as many neighbours as possible
  agree. It starts with the order along u.

Unlike the exact representative, this one depends on all draws that are passed together.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnnmcmc.errors import InputError
from bnnmcmc.symmetry.exact import balance
from bnnmcmc.symmetry.group import (
    HOMOGENEOUS,
    ODD,
    Transformation,
    apply,
    blocks,
    compose,
    identity,
    layers_of,
    lead_of,
)

# Hyperplanes and neighbours are found among so many units at the most, of evenly spaced draws.
MAX_UNITS = 20_000
NEIGHBOURS = 15
MAX_ROUNDS = 30


def hyperplane_transformation(network: Any, params: Mapping[str, Any]) -> Transformation:
    """Find the transformation of each draw into a common reference set.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights with at least one leading axis, all finite.

    Returns
    -------
    Transformation

    Raises
    ------
    InputError
        Weights of a single network, or weights that are not finite.

    References
    ----------
    Wiese et al. (2023), 2304.02902, section 5 and algorithm 1. The paper asks for the hyperplane
    of the largest margin, which is a search over all sides; this is a local one.
    """
    layers = layers_of(network)
    lead = lead_of(layers, params)
    count = int(np.prod(lead, dtype=int))
    if count < 2:
        raise InputError("params: found one network, expected draws to compare with each other")
    total = balance(layers, params) if layers.activation in HOMOGENEOUS else identity(layers, lead)
    current = apply(layers, total, params)
    for block in reversed(blocks(layers)):
        vectors = _vectors(current, block).reshape(count, layers.sizes[block[0] + 1], -1)
        if not np.isfinite(vectors).all():
            raise InputError("params: found a NaN or an infinity; weights must be finite")
        every = -(-vectors.shape[0] * vectors.shape[1] // MAX_UNITS)
        normal = _normal(vectors[::every].reshape(-1, vectors.shape[2]), layers.activation in ODD)
        along = vectors @ normal
        sign = np.ones_like(along)
        if layers.activation in ODD:
            sign = np.where(along < 0, -1.0, 1.0)
        labels = _labels(vectors * sign[..., None], along * sign, every)
        permutation = np.argsort(labels, axis=-1)
        step = identity(layers, lead)
        for i in block:
            step.permutations[i][...] = permutation.reshape(*lead, -1)
            chosen = np.take_along_axis(sign, permutation, axis=-1)
            step.scales[i][...] = chosen.reshape(*lead, -1)
        total = compose(step, total)
        current = apply(layers, step, current)
    return total


def _vectors(params: Mapping[str, Any], block: list[int]) -> np.ndarray:
    """Return bias and outgoing weights of each unit, (*lead, width, 1 + outputs).

    The outgoing weights are those of the last of tied layers, whose targets are settled; biases
    are those of all.
    """
    biases = [np.asarray(params[f"layer{i}"]["bias"], np.float64)[..., None] for i in block]
    outgoing = np.asarray(params[f"layer{block[-1] + 1}"]["weight"], np.float64)
    return np.concatenate([*biases, outgoing], axis=-1)


def _normal(vectors: np.ndarray, odd: bool) -> np.ndarray:
    """Return the normal of a hyperplane through zero that keeps away from the vectors."""
    from sklearn.svm import LinearSVC

    # Vectors and their opposites are the same units where signs can be flipped.
    centred = vectors if odd else vectors - vectors.mean(axis=0)
    normal = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    if not odd:
        return normal * np.sign(normal[np.argmax(np.abs(normal))])
    sides = np.where(vectors @ normal < 0, -1, 1)
    # A machine needs two classes; a unit and its opposite are the same to it, so any two will do.
    classes = np.where(np.arange(len(vectors)) % 2, 1, -1)
    for _ in range(MAX_ROUNDS):
        machine = LinearSVC(fit_intercept=False, dual=False, C=10.0, tol=1e-8, max_iter=10_000)
        machine.fit(vectors * (sides * classes)[:, None], classes)
        normal = machine.coef_[0] / np.linalg.norm(machine.coef_[0])
        before, sides = sides, np.where(vectors @ normal < 0, -1, 1)
        if (before == sides).all():
            break
    return normal * np.sign(normal[np.argmax(np.abs(normal))])


def _labels(vectors: np.ndarray, along: np.ndarray, every: int) -> np.ndarray:
    """Return a label for each unit (draw, width), without repetition within a draw."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial import cKDTree

    draws, width, size = vectors.shape
    labels = np.argsort(np.argsort(along, axis=1), axis=1)
    if width == 1:
        return labels
    few = vectors[::every]
    # More neighbours than asked for: those of the same draw do not count.
    wanted = min(NEIGHBOURS + width, len(few) * width)
    near = cKDTree(few.reshape(-1, size)).query(vectors.reshape(-1, size), k=wanted)[1]
    near = near.reshape(draws, width, wanted)
    own = (near // width) * every == np.arange(draws)[:, None, None]
    for _ in range(MAX_ROUNDS):
        said = np.where(own, -1, labels[::every].reshape(-1)[near])
        votes = (said[..., None] == np.arange(width)).sum(axis=2)
        # Ties are decided by the distance to the label's middle.
        spread = float(np.square(few - few.mean(axis=(0, 1))).sum(axis=-1).mean()) or 1.0
        flat, of = few.reshape(-1, size), labels[::every].reshape(-1)
        middle = np.array([flat[of == label].mean(axis=0) for label in range(width)])
        distance = np.square(vectors[:, :, None] - middle).sum(axis=-1) / spread
        worth = votes - 0.5 * distance / (1 + distance)
        found = np.array([linear_sum_assignment(one, maximize=True)[1] for one in worth])
        if (found == labels).all():
            break
        labels = found
    # Labels in the order of their middles along the normal.
    order = np.argsort([along[labels == label].mean() for label in range(width)])
    return np.argsort(order)[labels]
