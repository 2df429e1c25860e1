"""Priors over network parameters, on numpyro.distributions."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bnnmcmc import trees
from bnnmcmc.errors import InputError

FAMILIES = ("normal", "laplace", "student_t")


class Prior(NamedTuple):
    """A prior as two pure functions over a network's parameters.

    Parameters
    ----------
    log_density : callable
        ``log_density(params) -> scalar``, normalised.
    sample : callable
        ``sample(key, params) -> params``: one draw with the structure of ``params``.
    """

    log_density: Callable[[Any], jax.Array]
    sample: Callable[[jax.Array, Any], Any]


class LeafPrior(NamedTuple):
    """The distribution of the scalars in one parameter array.

    Parameters
    ----------
    family : str
        ``"normal"``, ``"laplace"`` or ``"student_t"``, centred at zero.
    scale : float
        Standard deviation (normal) or scale parameter (Laplace, Student-t).
    fan_in : bool
        Divide the scale by ``sqrt(fan_in)``, the number of inputs of the array's units.
    df : float
        Degrees of freedom of the Student-t.
    """

    family: str = "normal"
    scale: float = 1.0
    fan_in: bool = False
    df: float = 3.0

    def distribution(self, shape: tuple[int, ...]) -> dist.Distribution:
        """Return the distribution of one scalar of an array with this shape."""
        scale = self.scale / math.sqrt(np.prod(shape[:-1])) if self.fan_in else self.scale
        # Without numpyro's checks, which outside jit turn a NaN into an error or a warning.
        match self.family:
            case "normal":
                return dist.Normal(0.0, scale, validate_args=False)
            case "laplace":
                return dist.Laplace(0.0, scale, validate_args=False)
            case "student_t":
                return dist.StudentT(self.df, 0.0, scale, validate_args=False)
        raise ValueError(f"unknown family {self.family!r}")


def _check(field: str, part: str, prior: LeafPrior) -> None:
    if part not in ("weight", "bias"):
        raise InputError(f"{field}: found {part!r}, expected weight or bias")
    if prior.family not in FAMILIES:
        raise InputError(
            f"{field}.family: found {prior.family!r}, expected one of {', '.join(FAMILIES)}"
        )
    for name, value in (("scale", prior.scale), ("df", prior.df)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{field}.{name}: found {value}, expected a positive number")
    if part == "bias" and prior.fan_in:
        raise InputError(f"{field}.fan_in: a bias has no fan-in; remove it")


def is_bias(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a leaf is a bias: its name ends in "bias", or it has fewer than two axes."""
    return name.rsplit(".", 1)[-1] == "bias" or len(shape) < 2


def independent(
    weight: LeafPrior | None = None,
    bias: LeafPrior | None = None,
    layers: Mapping[str, Mapping[str, LeafPrior]] | None = None,
) -> Prior:
    r"""Build a prior under which all parameters are independent.

    .. math:: \log p(\theta) = \sum_i \log p_i(\theta_i)

    Parameters
    ----------
    weight : LeafPrior
        Prior of weights; N(0, 1) if not given.
    bias : LeafPrior
        Prior of biases; as ``weight``, without the fan-in scaling, if not given.
    layers : mapping
        ``{layer name: {"weight": LeafPrior, "bias": LeafPrior}}``, either part optional: replaces
        the above in that layer. A layer's name is the first part of its leaf names ("layer0").

    Returns
    -------
    Prior

    Raises
    ------
    InputError
        Unknown family, a scale or df that is not positive, fan-in scaling of a bias, a part other
        than "weight" and "bias"; or, when the density is first used, a layer the network does not
        have.
    """
    weight = weight or LeafPrior()
    bias = bias or weight._replace(fan_in=False)
    layers = layers or {}
    _check("prior", "weight", weight)
    _check("prior.bias", "bias", bias)
    for layer, parts in layers.items():
        for part, leaf_prior in parts.items():
            _check(f"prior.layers.{layer}.{part}", part, leaf_prior)

    def distributions(params) -> list[dist.Distribution]:
        names = trees.leaf_names(params)
        known = {name.split(".", 1)[0] for name in names}
        for layer in layers:
            if layer not in known:
                raise InputError(
                    f"prior.layers.{layer}: the network has no such layer; "
                    f"its layers are {', '.join(sorted(known))}"
                )
        found = []
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
            part = "bias" if is_bias(name, jnp.shape(leaf)) else "weight"
            default = bias if part == "bias" else weight
            chosen = layers.get(name.split(".", 1)[0], {}).get(part, default)
            found.append(chosen.distribution(jnp.shape(leaf)))
        return found

    def log_density(params) -> jax.Array:
        return sum(
            (
                d.log_prob(leaf).sum()
                for d, leaf in zip(distributions(params), jax.tree.leaves(params), strict=True)
            ),
            start=jnp.zeros(()),
        )

    def sample(key: jax.Array, params):
        leaves, treedef = jax.tree.flatten(params)
        drawn = [
            d.sample(jax.random.fold_in(key, i), jnp.shape(leaf))
            for i, (d, leaf) in enumerate(zip(distributions(params), leaves, strict=True))
        ]
        return jax.tree.unflatten(treedef, drawn)

    return Prior(log_density, sample)


def normal(scale: float = 1.0, fan_in: bool = False) -> Prior:
    """Build the prior N(0, scale^2) on every parameter (weights by fan-in if asked)."""
    return independent(LeafPrior("normal", scale, fan_in))
