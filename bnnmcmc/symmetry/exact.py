r"""One representative of each orbit, found from the weights of a network alone.

Exact: weights that differ by a permutation or by sign flips have the same representative, bit for
bit (if no two units of a layer are equal, which has probability zero), and the representative is
its own. Chains that sit in the same mode can still get representatives far from each other: two
units whose biases cross change places. For comparisons in weight space see `alignment`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

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

Order = Literal["bias", "norm"]
# Balancing is a descent that contracts; deep networks with skip connections take some hundred.
MAX_SWEEPS = 2000


def exact_transformation(
    network: Any, params: Mapping[str, Any], order: Order = "bias"
) -> Transformation:
    r"""Find the transformation to the representative of each orbit.

    From the inputs to the outputs, each hidden layer's units get, in this order,

    - a scale (homogeneous activations): see `balance`;
    - a sign (odd activations): that of the bias becomes positive, or, of a unit without bias,
      that of its first weight that is not zero;
    - a place: by bias, or by the norm of bias and incoming weights, then by these weights one after
      the other.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights with any leading axes.
    order : "bias" or "norm"

    Returns
    -------
    Transformation

    References
    ----------
    Pourzanjani, Jiang and Petzold (2017), "Improving the identifiability of neural networks for
    Bayesian inference" (order and signs).
    """
    layers = layers_of(network)
    lead = lead_of(layers, params)
    total = balance(layers, params) if layers.activation in HOMOGENEOUS else identity(layers, lead)
    current = apply(layers, total, params)
    for block in blocks(layers):
        # Units of tied layers move together; the first of these layers decides.
        unit = _units(current, block[0])
        step = identity(layers, lead)
        if layers.activation in ODD:
            first = np.argmax(unit != 0, axis=-1)
            sign = np.where(np.take_along_axis(unit, first[..., None], -1)[..., 0] < 0, -1.0, 1.0)
            unit = unit * sign[..., None].astype(unit.dtype)
        else:
            sign = np.ones(unit.shape[:-1])
        keys = [unit[..., k] for k in range(unit.shape[-1])]
        if order == "norm":
            keys.insert(0, np.square(unit).sum(axis=-1))
        permutation = np.lexsort(keys[::-1], axis=-1)
        for i in block:
            step.permutations[i][...] = permutation
            step.scales[i][...] = np.take_along_axis(sign, permutation, axis=-1)
        total = compose(step, total)
        current = apply(layers, step, current)
    return total


def _units(params: Mapping[str, Any], layer: int) -> np.ndarray:
    """Return the bias and incoming weights of each unit, (*lead, width, 1 + fan_in)."""
    bias, weight = (np.asarray(params[f"layer{layer}"][leaf]) for leaf in ("bias", "weight"))
    return np.concatenate([bias[..., None], np.swapaxes(weight, -1, -2)], axis=-1)


def balance(network: Any, params: Mapping[str, Any]) -> Transformation:
    r"""Find the rescaling with the least sum of squared weights.

    .. math:: \min_s \sum_l \| s_l W_l / s_{l-1} \|^2 + \| s_l b_l \|^2, \quad s > 0

    It is convex in the logarithms of the scales, so there is one solution: where each unit's
    bias and incoming weights have the same norm as its outgoing weights. Of all weights with
    this function that rescaling gives, these have the highest density under N(0, 1). Units
    without incoming or without outgoing weights stay as they are.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights with any leading axes.

    Returns
    -------
    Transformation
        Of positive scales.
    """
    layers = layers_of(network)
    lead = lead_of(layers, params)
    total = identity(layers, lead)
    squares = [
        {leaf: np.square(np.asarray(params[name][leaf], np.float64)) for leaf in ("bias", "weight")}
        for name in names(layers)
    ]
    groups = blocks(layers)
    log_scale = [np.zeros((*lead, layers.sizes[block[0] + 1])) for block in groups]
    of_layer = {i: g for g, block in enumerate(groups) for i in block}

    def factor(i: int) -> Any:
        # Of hidden layer i's output; the features and what is tied to them have none.
        g = of_layer.get(i)
        return None if g is None else np.exp(2 * log_scale[g])

    for _ in range(MAX_SWEEPS):
        change = 0.0
        for g, block in enumerate(groups):
            # A layer between two tied ones is both incoming and outgoing: half a step each.
            step = 0.25 if len(block) == 1 else 0.125
            incoming: Any = 0.0
            outgoing: Any = 0.0
            for i in [*block, block[-1] + 1]:
                weight, bias = squares[i]["weight"], squares[i]["bias"]
                before, after = factor(i - 1), factor(i)
                if before is not None:
                    weight = weight / before[..., :, None]
                if after is not None:
                    weight, bias = weight * after[..., None, :], bias * after
                if i in block:
                    incoming = incoming + weight.sum(axis=-2) + bias
                if i - 1 in block:
                    outgoing = outgoing + weight.sum(axis=-1)
            usable = (incoming > 0) & (outgoing > 0)
            ratio = np.where(usable, outgoing, 1.0) / np.where(usable, incoming, 1.0)
            move = step * np.log(ratio)
            log_scale[g] = log_scale[g] + move
            change = max(change, float(np.abs(move).max(initial=0.0)))
        # NaN in a draw stays one, and ends nothing earlier for the others.
        if change < 1e-14:
            break
    for g, block in enumerate(groups):
        for i in block:
            total.scales[i][...] = np.exp(log_scale[g])
    return total
