r"""Equi-output transformations of a multilayer perceptron, as a group.

Each hidden unit of a layer can change places with another (any activation), and can be scaled, with
its outgoing weights divided by the same number, wherever the activation :math:`\phi` allows it:

.. math:: \phi(-z) = -\phi(z) \text{ (odd)}, \qquad \phi(s z) = s \phi(z), \; s > 0
          \text{ (homogeneous)}

Permutations and sign flips are orthogonal: an isotropic prior does not see them. Rescaling is not:
it changes the density under any proper prior.

Other symmetries exist that are not in this group, because they are no permutation or scaling of
units: :math:`\sigma(-z) = 1 - \sigma(z)` moves a constant into the next bias, sin has shifts of the
bias by pi, and a linear layer has every invertible matrix.

Everything here is NumPy, with any leading axes: weights ``(*lead, *leaf)``, such as one network's,
``(chain, *leaf)`` or ``(chain, draw, *leaf)``.

References
----------
Wiese et al. (2023), 2304.02902, section 3; Chen, Lu and Hecht-Nielsen (1993), Neural Computation 5.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnnmcmc.errors import InputError
from bnnmcmc.models.network import Layers

ODD = frozenset({"tanh", "sin", "erf", "identity"})
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "identity"})


class Transformation(NamedTuple):
    """An element of the group, or one for each of the leading axes.

    Unit i of hidden layer l becomes ``scales[l][i]`` times what was unit ``permutations[l][i]``.

    Parameters
    ----------
    permutations : tuple of int arrays (*lead, width)
        One for each hidden layer.
    scales : tuple of arrays (*lead, width)
        -1 flips a sign.
    """

    permutations: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]


def at(transformation: Transformation, index: Any) -> Transformation:
    """Return the elements at an index of the leading axes, such as ``np.s_[:, None]``."""
    if not isinstance(index, tuple):
        index = (index,)
    full = (*index, slice(None))
    return Transformation(
        tuple(p[full] for p in transformation.permutations),
        tuple(s[full] for s in transformation.scales),
    )


def layers_of(network: Any) -> Layers:
    """Return what a network is built of.

    Parameters
    ----------
    network : Network or Layers

    Raises
    ------
    InputError
        A network of one's own that does not say it.
    """
    if isinstance(network, Layers):
        return network
    found = getattr(network, "layers", None)
    if not isinstance(found, Layers):
        raise InputError(
            "network: its symmetries are not known, because it does not say what it is built of; "
            "give it layers=Layers(sizes, activation) if its parameters are those of bnnmcmc.mlp"
        )
    return found


def names(layers: Layers) -> list[str]:
    """Return the names of all layers, the output layer's last."""
    return [f"layer{i}" for i in range(len(layers.sizes) - 1)]


def blocks(layers: Layers) -> list[list[int]]:
    """Return the hidden layers whose units must move together, as lists of layer numbers.

    A skip connection adds a layer's input to its output unit by unit: both layers then have the
    same transformation. Layers that are tied to the features in this way have none, and are left
    out.
    """
    found: list[list[int]] = []
    fixed = layers.skip  # the features cannot move
    for i in range(len(layers.sizes) - 2):
        tied = layers.skip and layers.sizes[i] == layers.sizes[i + 1]
        if i == 0:
            fixed = tied
            if not tied:
                found.append([i])
        elif tied and not fixed:
            found[-1].append(i)
        elif not tied:
            fixed = False
            found.append([i])
    return found


def group_order(network: Any) -> int:
    r"""Return the number of permutations and sign flips, exactly.

    .. math:: \prod_l M_l! \, 2^{M_l}

    over hidden layers of :math:`M_l` units (layers that a skip connection ties count once, those
    tied to the features not at all), without the factor :math:`2^{M_l}` if the activation is not
    odd. Rescalings, which are infinitely many, are not counted.

    Parameters
    ----------
    network : Network or Layers

    Returns
    -------
    int

    Examples
    --------
    >>> group_order(Layers((5, 3, 1), "tanh"))
    48
    """
    layers = layers_of(network)
    flips = 2 if layers.activation in ODD else 1
    widths = [layers.sizes[block[0] + 1] for block in blocks(layers)]
    return math.prod(math.factorial(width) * flips**width for width in widths)


def log_group_order(network: Any) -> float:
    """Return the natural logarithm of `group_order`, without computing that."""
    layers = layers_of(network)
    flips = math.log(2) if layers.activation in ODD else 0.0
    widths = [layers.sizes[block[0] + 1] for block in blocks(layers)]
    return math.fsum(math.lgamma(width + 1) + width * flips for width in widths)


def lead_of(network: Any, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the leading axes of weights, having checked their leaves.

    Raises
    ------
    InputError
        The weights are not those of the network.
    """
    layers = layers_of(network)
    lead: tuple[int, ...] | None = None
    for i, name in enumerate(names(layers)):
        shapes = {"bias": (layers.sizes[i + 1],), "weight": layers.sizes[i : i + 2]}
        for leaf, shape in shapes.items():
            try:
                found = np.shape(params[name][leaf])
            except (KeyError, TypeError, IndexError) as error:
                raise InputError(
                    f"params: there is no {name}.{leaf}, expected the parameters of a network with "
                    f"layers {layers.sizes}"
                ) from error
            here = found[: len(found) - len(shape)]
            lead = here if lead is None else lead
            if found[len(here) :] != tuple(shape) or here != lead:
                raise InputError(
                    f"params.{name}.{leaf}: found shape {found}, expected {(*lead, *shape)}"
                )
    assert lead is not None
    return lead


def identity(network: Any, lead: tuple[int, ...] = ()) -> Transformation:
    """Return the element that changes nothing, for each of the leading axes."""
    widths = layers_of(network).sizes[1:-1]
    return Transformation(
        tuple(np.broadcast_to(np.arange(width), (*lead, width)).copy() for width in widths),
        tuple(np.ones((*lead, width)) for width in widths),
    )


def random_element(
    network: Any, rng: np.random.Generator, lead: tuple[int, ...] = (), rescaling: float = 0.5
) -> Transformation:
    """Draw elements of the group: uniform permutations and signs, log-normal scales.

    Parameters
    ----------
    network : Network or Layers
    rng : numpy.random.Generator
    lead : tuple of int
        Leading axes: an element is drawn for each.
    rescaling : float
        Standard deviation of the logarithm of scales, if the activation is homogeneous; 0 leaves
        them out.

    Returns
    -------
    Transformation
    """
    layers = layers_of(network)
    result = identity(layers, lead)
    for block in blocks(layers):
        width = layers.sizes[block[0] + 1]
        permutation = np.argsort(rng.random((*lead, width)), axis=-1)
        scale: Any = np.ones((*lead, width))
        if layers.activation in ODD:
            scale = rng.choice([-1.0, 1.0], size=(*lead, width))
        if layers.activation in HOMOGENEOUS and rescaling:
            scale = scale * np.exp(rescaling * rng.normal(size=(*lead, width)))
        for i in block:
            result.permutations[i][...] = permutation
            result.scales[i][...] = scale
    return result


def check(network: Any, transformation: Transformation) -> None:
    """Check that a transformation leaves the network's function unchanged.

    Raises
    ------
    InputError
        Names the hidden layer at fault: something that is no permutation, a scale that the
        activation does not allow, or layers that a skip connection ties transformed apart.
    """
    layers = layers_of(network)
    free = {i: block[0] for block in blocks(layers) for i in block}
    for i, (p, s) in enumerate(zip(*transformation, strict=True)):
        width, name = layers.sizes[i + 1], f"hidden layer {i}"
        if p.shape[-1:] != (width,) or not (np.sort(p, axis=-1) == np.arange(width)).all():
            raise InputError(f"{name}: expected a permutation of its {width} units")
        if not (np.isfinite(s).all() and (s != 0).all()):
            raise InputError(f"{name}: a scale is zero or not finite")
        if layers.activation not in ODD and (s < 0).any():
            raise InputError(f"{name}: {layers.activation} is not odd, so no sign can be flipped")
        if layers.activation not in HOMOGENEOUS and (np.abs(s) != 1).any():
            raise InputError(
                f"{name}: {layers.activation} is not homogeneous, so its units cannot be rescaled"
            )
        first = free.get(i)
        still = first is None and ((p != np.arange(width)).any() or (s != 1).any())
        apart = first is not None and (
            (p != transformation.permutations[first]).any()
            or (s != transformation.scales[first]).any()
        )
        if still or apart:
            other = "the features" if first is None else f"hidden layer {first}"
            raise InputError(f"{name}: a skip connection ties its units to those of {other}")


def apply(network: Any, transformation: Transformation, params: Mapping[str, Any]) -> dict:
    """Transform weights; the network's function of its inputs is the same, to rounding.

    Parameters
    ----------
    network : Network or Layers
    transformation : Transformation
        Its leading axes are those of the weights, or broadcast against them.
    params : mapping
        ``{"layer0": {"bias": (*lead, width), "weight": (*lead, fan_in, width)}, ...}``.

    Returns
    -------
    dict
        Of NumPy arrays, in the weights' own precision. Permutations and flips are exact.

    Raises
    ------
    InputError
        The weights are not those of the network.
    """
    layers = layers_of(network)
    lead_of(layers, params)
    result = {}
    for i, name in enumerate(names(layers)):
        bias, weight = (np.asarray(params[name][leaf]) for leaf in ("bias", "weight"))
        if i > 0:
            p, s = (part[i - 1] for part in transformation)
            weight = _take(weight, p[..., :, None], -2) / s.astype(weight.dtype)[..., :, None]
        if i < len(layers.sizes) - 2:
            p, s = (part[i] for part in transformation)
            weight = _take(weight, p[..., None, :], -1) * s.astype(weight.dtype)[..., None, :]
            bias = _take(bias, p, -1) * s.astype(bias.dtype)
        result[name] = {"bias": bias, "weight": weight}
    return result


def _take(values: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """Take along an axis; leading axes of the index and of the values broadcast."""
    extra = values.ndim - index.ndim
    if extra > 0:
        index = index.reshape((1,) * extra + index.shape)
    elif extra < 0:
        values = values.reshape((1,) * -extra + values.shape)
    return np.take_along_axis(values, index, axis)


def compose(second: Transformation, first: Transformation) -> Transformation:
    """Return the transformation that applies ``first``, then ``second``."""
    permutations, scales = [], []
    for p, s, q, t in zip(*second, *first, strict=True):
        p, q = np.broadcast_arrays(p, q)
        permutations.append(np.take_along_axis(q, p, axis=-1))
        scales.append(s * np.take_along_axis(np.broadcast_to(t, p.shape), p, axis=-1))
    return Transformation(tuple(permutations), tuple(scales))


def invert(transformation: Transformation) -> Transformation:
    """Return the transformation that undoes this one."""
    back = tuple(np.argsort(p, axis=-1) for p in transformation.permutations)
    scales = zip(transformation.scales, back, strict=True)
    return Transformation(back, tuple(1 / np.take_along_axis(s, p, axis=-1) for s, p in scales))


def log_volume(network: Any, transformation: Transformation) -> np.ndarray:
    r"""Return how much a transformation stretches the space of weights, (*lead).

    .. math:: \log |\det \partial T / \partial \theta|
              = \sum_{l, i} (\text{inputs}_l + 1 - \text{outputs}_l) \log |s_{l, i}|

    0 for permutations and sign flips.
    """
    sizes = layers_of(network).sizes
    total: Any = 0.0
    for i, s in enumerate(transformation.scales):
        total = total + (sizes[i] + 1 - sizes[i + 2]) * np.log(np.abs(s)).sum(axis=-1)
    return np.asarray(total)


class Invariance(NamedTuple):
    """Which transformations leave a density unchanged; None where the network has none.

    Parameters
    ----------
    permutations, flips, rescaling : bool or None
    """

    permutations: bool | None
    flips: bool | None
    rescaling: bool | None


def invariance(
    network: Any,
    log_density: Callable[[Any], Any],
    params: Mapping[str, Any],
    *,
    seed: int = 0,
    trials: int = 5,
    tolerance: float = 1e-4,
) -> Invariance:
    """See by trial which equi-output transformations a density over the weights is invariant to.

    `priors.independent` and `priors.normal` are invariant to permutations (all units of a layer
    have the same prior) and to flips (all families are symmetric about zero); so are layers' own
    scales (``prior.hierarchical``) and a horseshoe over the inputs, which hidden units share. No
    proper prior is invariant to rescaling. A log-density of one's own may be anything.

    Parameters
    ----------
    network : Network or Layers
    log_density : callable
        ``log_density(params) -> scalar``, such as ``Prior.log_density``.
    params : mapping
        Weights of one network, none of them zero, at which it is tried.
    seed, trials : int
    tolerance : float
        Of the density, relative to its own size (float32 sums lose some digits).

    Returns
    -------
    Invariance
    """
    layers = layers_of(network)
    rng = np.random.default_rng(seed)
    before = float(log_density(params))

    def holds(part: str) -> bool | None:
        for _ in range(trials):
            found = random_element(layers, rng, rescaling=1.0 if part == "rescaling" else 0.0)
            plain = identity(layers)
            if part == "permutations":
                found = found._replace(scales=plain.scales)
            elif part == "flips":
                found = found._replace(permutations=plain.permutations)
            else:
                positive = tuple(np.abs(s) for s in found.scales)
                found = Transformation(plain.permutations, positive)
            after = float(log_density(apply(layers, found, params)))
            if not abs(after - before) <= tolerance * max(1.0, abs(before)):
                return False
        return True

    movable = bool(blocks(layers))
    return Invariance(
        holds("permutations") if movable else None,
        holds("flips") if movable and layers.activation in ODD else None,
        holds("rescaling") if movable and layers.activation in HOMOGENEOUS else None,
    )
