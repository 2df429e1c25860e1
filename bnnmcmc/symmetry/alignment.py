r"""Weights moved, within their orbit, as close as they come to a reference.

With :math:`T` an equi-output transformation,

.. math:: \max_T \langle T(\theta), \theta^* \rangle

is a linear assignment in each hidden layer when the others are held fixed; layers are solved one
after the other until none changes. For one hidden layer the result is the closest point of the
orbit; for more it is a local optimum.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnnmcmc.errors import InputError
from bnnmcmc.models.network import Layers
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
    names,
)

MAX_SWEEPS = 50


def aligning_transformation(
    network: Any, params: Mapping[str, Any], reference: Mapping[str, Any]
) -> Transformation:
    """Find the transformation that takes weights closest to a reference.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights with any leading axes, all finite. To move whole chains, pass one position of each
        and apply the result with `at(transformation, np.s_[:, None])` to all its draws.
    reference : mapping
        Weights of one network. With a homogeneous activation, balanced ones (`exact.balance`):
        the weights are balanced too.

    Returns
    -------
    Transformation

    Raises
    ------
    InputError
        Weights that are not finite, or not those of the network.

    References
    ----------
    Ainsworth, Hayase and Srinivasa (2023), 2209.04836 (permutations, layer by layer).
    """
    layers = layers_of(network)
    lead = lead_of(layers, params)
    if lead_of(layers, reference):
        raise InputError("reference: found weights of several networks, expected those of one")
    total = balance(layers, params) if layers.activation in HOMOGENEOUS else identity(layers, lead)
    balanced = apply(layers, total, params)
    flat = {
        name: {
            leaf: np.asarray(balanced[name][leaf], np.float64).reshape(
                -1, *np.shape(reference[name][leaf])
            )
            for leaf in ("bias", "weight")
        }
        for name in names(layers)
    }
    fixed = {
        name: {leaf: np.asarray(reference[name][leaf], np.float64) for leaf in ("bias", "weight")}
        for name in names(layers)
    }
    if not all(
        np.isfinite(a).all() for tree in (flat, fixed) for b in tree.values() for a in b.values()
    ):
        raise InputError("params: found a NaN or an infinity; weights to align must be finite")
    # From a single start, assignments of deep networks end in a worse optimum now and then.
    alone = len(blocks(layers)) == 1 and len(blocks(layers)[0]) == 1
    found = _assign_in_turn(layers, flat, fixed, "all")
    if not alone:
        best = _product(apply(layers, found, flat), fixed)
        for first in ("incoming", "outgoing"):
            other = _assign_in_turn(layers, flat, fixed, first)
            product = _product(apply(layers, other, flat), fixed)
            better = product > best
            for old, new in zip((*found[0], *found[1]), (*other[0], *other[1]), strict=True):
                old[better] = new[better]
            best = np.maximum(best, product)
    shaped = Transformation(
        tuple(p.reshape(*lead, p.shape[-1]) for p in found.permutations),
        tuple(s.reshape(*lead, s.shape[-1]) for s in found.scales),
    )
    return compose(shaped, total)


def _assign_in_turn(layers: Layers, flat: dict, fixed: dict, first: str) -> Transformation:
    """Assign one block of layers after the other until nothing changes.

    ``first``: which weights the first sweep looks at. Going forwards by the incoming weights, or
    backwards by the outgoing ones, it sees only weights whose other end is settled.
    """
    count = len(flat["layer0"]["bias"])
    found, groups = identity(layers, (count,)), blocks(layers)
    for sweep in range(MAX_SWEEPS):
        sides = first if sweep == 0 else "all"
        changed = sides != "all"
        for block in reversed(groups) if sides == "outgoing" else groups:
            step = identity(layers, (count,))
            similarity = _similarity(flat, fixed, block, sides)
            permutation, sign = _assign(similarity, layers.activation in ODD)
            if len(block) > 1 and sides == "all":
                # Their units are on both sides of a weight: an assignment may go too far.
                for i in block:
                    step.permutations[i][...], step.scales[i][...] = permutation, sign
                worse = _product(apply(layers, step, flat), fixed) < _product(flat, fixed)
                permutation[worse], sign[worse] = np.arange(permutation.shape[-1]), 1.0
            for i in block:
                step.permutations[i][...], step.scales[i][...] = permutation, sign
            if (permutation != np.arange(permutation.shape[-1])).any() or (sign != 1).any():
                changed = True
                flat = apply(layers, step, flat)
                found = compose(step, found)
        # Of a single layer, the first assignment is the best there is.
        if not changed or (sides == "all" and len(groups) == 1 and len(groups[0]) == 1):
            break
    return found


def _similarity(params: dict, reference: dict, block: list[int], sides: str) -> Any:
    """Return (n, reference unit, unit): products of the weights that move with the units."""
    result: Any = 0.0
    for i in block:
        if sides != "outgoing" or i > block[0]:
            ours, theirs = params[f"layer{i}"], reference[f"layer{i}"]
            result = result + theirs["weight"].T @ ours["weight"]
        bias = params[f"layer{i}"]["bias"], reference[f"layer{i}"]["bias"]
        result = result + bias[1][None, :, None] * bias[0][:, None, :]
        if i + 1 not in block and sides != "incoming":
            ours, theirs = params[f"layer{i + 1}"], reference[f"layer{i + 1}"]
            result = result + theirs["weight"] @ np.swapaxes(ours["weight"], -1, -2)
    return result


def _product(params: Mapping[str, Any], reference: Mapping[str, Any]) -> np.ndarray:
    """Return the inner product (n,) of weights with a reference."""
    total: Any = 0.0
    for name, leaves in reference.items():
        for leaf, value in leaves.items():
            ours = params[name][leaf]
            total = total + (ours * value).reshape(len(ours), -1).sum(axis=1)
    return total


def _assign(similarity: np.ndarray, odd: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return permutation and signs (n, width) that make the sum of similarities largest."""
    from scipy.optimize import linear_sum_assignment

    worth = np.abs(similarity) if odd else similarity
    permutation = np.array([linear_sum_assignment(one, maximize=True)[1] for one in worth])
    permutation = permutation.reshape(similarity.shape[:2])
    chosen = np.take_along_axis(similarity, permutation[..., None], axis=-1)[..., 0]
    return permutation, np.where(odd & (chosen < 0), -1.0, 1.0)


def align(
    network: Any,
    params: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    rounds: int = 3,
) -> Transformation:
    """Align weights with each other: with their own mean, found by turns.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights with at least one leading axis.
    reference : mapping, optional
        Weights of one network; the first of ``params`` if not given. The first round aligns with
        it, each later one with the mean of the round before.
    rounds : int
        At least 1; with 1, the reference is never moved.

    Returns
    -------
    Transformation

    Raises
    ------
    InputError
        As `aligning_transformation`.
    """
    layers = layers_of(network)
    lead = lead_of(layers, params)
    if reference is None:
        if not lead:
            raise InputError("params: found one network; expected several, or a reference")
        first = (0,) * len(lead)
        reference = {
            n: {k: np.asarray(v)[first] for k, v in params[n].items()} for n in names(layers)
        }
    if layers.activation in HOMOGENEOUS:
        reference = apply(layers, balance(layers, reference), reference)
    found = aligning_transformation(layers, params, reference)
    for _ in range(rounds - 1):
        moved = apply(layers, found, params)
        axes = tuple(range(len(lead)))
        mean = {n: {k: v.mean(axis=axes) for k, v in moved[n].items()} for n in names(layers)}
        again = aligning_transformation(layers, params, mean)
        same = all(
            (p == q).all() for p, q in zip(found.permutations, again.permutations, strict=True)
        )
        same &= all(
            (np.sign(s) == np.sign(t)).all()
            for s, t in zip(found.scales, again.scales, strict=True)
        )
        found = again
        if same:
            break
    return found
