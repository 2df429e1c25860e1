"""Priors over network parameters, on numpyro.distributions.

A prior can have parameters of its own that are sampled with the network's, such as a scale for each
layer (`hierarchical`). Such priors are non-centred: chains walk in raw parameters, which are
independent of the scales under the prior, and the network computes with raw times scale.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bnnmcmc import trees
from bnnmcmc.errors import InputError

FAMILIES = ("normal", "laplace", "student_t")


# Half-distributions by their whole ones: numpyro's own check their values, and take no NaN.
SCALE_FAMILIES = {"half_normal": dist.Normal, "half_cauchy": dist.Cauchy}
# Where a chain starts, no scale is below this part of its prior's: weights may all be zero there.
LEAST_SCALE = 1e-3
# Nor is the scale of an input's weights beyond this part of the slab, which bounds it.
MOST_OF_SLAB = 0.9


class Hierarchy(NamedTuple):
    """How a prior with parameters of its own goes between these and the network's parameters.

    Parameters
    ----------
    start : callable
        ``start(params) -> (raw, own)`` with ``network(raw, own) == params`` to rounding: where a
        chain begins that shall begin at ``params``. ``raw`` has the structure of ``params``.
    network : callable
        ``network(raw, own) -> params``.
    input_scales : callable, optional
        ``input_scales(own) -> (features,)``: the scale of each input's weights.
    """

    start: Callable[[Any], tuple[Any, Any]]
    network: Callable[[Any, Any], Any]
    input_scales: Callable[[Any], jax.Array] | None = None


class Prior(NamedTuple):
    """A prior as pure functions over a network's parameters.

    Parameters
    ----------
    log_density : callable
        ``log_density(params) -> scalar``, normalised (a constant may be left out). With a
        hierarchy, ``log_density(raw, own) -> scalar``: of the raw parameters and the prior's own
        unconstrained ones together, Jacobians included.
    sample : callable, optional
        ``sample(key, params) -> params``: one draw with the structure of ``params``.
    hierarchy : Hierarchy, optional
        For a prior with parameters of its own.
    """

    log_density: Callable[..., jax.Array]
    sample: Callable[[jax.Array, Any], Any] | None = None
    hierarchy: Hierarchy | None = None


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


def _chosen(
    params: Any,
    weight: LeafPrior,
    bias: LeafPrior,
    layers: Mapping[str, Mapping[str, LeafPrior]],
) -> list[tuple[LeafPrior, str]]:
    """Return the prior of every leaf, and where it is from: "weight", "bias" or "layers"."""
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
        own = layers.get(name.split(".", 1)[0], {}).get(part)
        if own is not None:
            found.append((own, "layers"))
        else:
            found.append((bias if part == "bias" else weight, part))
    return found


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
        chosen = _chosen(params, weight, bias, layers)
        leaves = jax.tree.leaves(params)
        return [
            leaf_prior.distribution(jnp.shape(leaf))
            for (leaf_prior, _), leaf in zip(chosen, leaves, strict=True)
        ]

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


class Horseshoe(NamedTuple):
    """A horseshoe over the inputs: the weights of an input share a scale, most are shrunk to zero.

    Parameters
    ----------
    global_scale : float
        Scale of the half-Cauchy prior of the global scale; less expects fewer relevant inputs.
    slab_scale : float or None
        Standard deviation that no weight's scale goes beyond (regularised horseshoe); None for the
        horseshoe without a bound.
    leaf : str
        The leaf with the weights of the inputs, (features, ...).
    """

    global_scale: float = 1.0
    slab_scale: float | None = 2.0
    leaf: str = "layer0.weight"


def _input_log_scales(own: Any, horseshoe: Horseshoe) -> jax.Array:
    """Return the logarithm of each input's scale, (features,)."""
    unbounded = own["log_global"] + own["log_local"]
    if horseshoe.slab_scale is None:
        return unbounded
    log_slab = math.log(horseshoe.slab_scale)
    # tau^2 c^2 lambda^2 / (c^2 + tau^2 lambda^2), without a square that could overflow.
    return log_slab - 0.5 * jax.nn.softplus(2.0 * (log_slab - unbounded))


def _log_half(family: str, scale: float, log_value: jax.Array) -> jax.Array:
    """Return the log-density of the logarithm of a half-normal or half-Cauchy variable, summed."""
    whole = SCALE_FAMILIES[family](0.0, scale, validate_args=False)
    return (math.log(2.0) + whole.log_prob(jnp.exp(log_value)) + log_value).sum()


def hierarchical(
    weight: LeafPrior | None = None,
    bias: LeafPrior | None = None,
    layers: Mapping[str, Mapping[str, LeafPrior]] | None = None,
    *,
    scales: Literal["half_normal", "half_cauchy"] | None = "half_normal",
    inputs: Horseshoe | None = None,
) -> Prior:
    r"""Build a prior whose scales are sampled: one for each layer, one for each input, or both.

    Layers: every layer l has a scale :math:`s_l`, and its parameters (weights divided by
    :math:`\sqrt{\text{fan-in}}` if asked) are

    .. math:: \theta = s_l z, \quad z \sim p(z), \quad s_l \sim \mathrm{HalfNormal}(\sigma)

    with p the family of ``weight`` at scale 1 and :math:`\sigma` its ``scale``. Inputs: the weights
    of feature j to the units k of the first layer have a (regularised) horseshoe prior in common,

    .. math:: w_{jk} = \tau \tilde\lambda_j z_{jk}, \quad
              \tilde\lambda_j^2 = \frac{c^2 \lambda_j^2}{c^2 + \tau^2 \lambda_j^2}, \quad
              \lambda_j \sim C^+(0, 1), \; \tau \sim C^+(0, \tau_0), \; z \sim N(0, 1)

    Chains walk in z and in the logarithms of all scales (non-centred).

    Parameters
    ----------
    weight : LeafPrior
        Family, fan-in scaling and df of z; its scale is that of the prior of :math:`s_l`.
        A standard normal and a half-normal of scale 1 if not given.
    bias : LeafPrior
        A fixed prior of biases; in the hierarchy of their layer, without the fan-in scaling, if not
        given.
    layers : mapping
        As in `independent`: fixed priors of single layers, out of the hierarchy.
    scales : "half_normal", "half_cauchy" or None
        Prior of the layers' scales; None for none, the parameters then have fixed priors.
    inputs : Horseshoe
        In the place of any other prior of that leaf.

    Returns
    -------
    Prior
        Its own parameters are ``{layer: {"log_scale": ()}}`` and
        ``{"inputs": {"log_global": (), "log_local": (features,)}}``.

    Raises
    ------
    InputError
        As `independent`; neither layers' nor inputs' scales; an unknown family of scales, a scale
        that is not positive; or, when the density is first used, a leaf the network does not have.

    References
    ----------
    Neal (1996), Bayesian Learning for Neural Networks (scales of layers and of inputs); Piironen
    and Vehtari (2017), 1707.01694, section 2.3, with a slab of fixed width; Ghosh, Yao and
    Doshi-Velez (2019), JMLR 20 (horseshoe priors of networks, non-centred).
    """
    independent(weight, bias, layers)  # for its checks
    weight, own_bias = weight or LeafPrior(), bias is not None
    bias = bias or weight._replace(fan_in=False)
    layers = layers or {}
    if scales is None and inputs is None:
        raise InputError(
            "prior: neither scales of layers nor of inputs are sampled; use independent"
        )
    if scales is not None and scales not in SCALE_FAMILIES:
        raise InputError(
            f"prior.scales: found {scales!r}, expected one of {', '.join(SCALE_FAMILIES)}"
        )
    if inputs is not None:
        for field in ("global_scale", "slab_scale"):
            value = getattr(inputs, field)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"prior.{field}: found {value}, expected a positive number")
    unit = dist.Normal(0.0, 1.0, validate_args=False)

    def plan(params) -> list[tuple[str, str, dist.Distribution, float]]:
        """Return for every leaf: its group, its layer, the distribution of raw, raw's factor."""
        names, leaves = trees.leaf_names(params), jax.tree.leaves(params)
        if inputs is not None:
            tables = [n for n, leaf in zip(names, leaves, strict=True) if jnp.ndim(leaf) > 1]
            if inputs.leaf not in tables:
                raise InputError(
                    f"prior.input_leaf: the network has no leaf {inputs.leaf!r} of weights "
                    f"(features, ...); it has {', '.join(tables)}"
                )
        found = []
        for name, leaf, (leaf_prior, source) in zip(
            names, leaves, _chosen(params, weight, bias, layers), strict=True
        ):
            layer, shape = name.split(".", 1)[0], jnp.shape(leaf)
            if inputs is not None and name == inputs.leaf:
                found.append(("inputs", layer, unit, 1.0))
            elif scales is None or source == "layers" or (source == "bias" and own_bias):
                found.append(("fixed", layer, leaf_prior.distribution(shape), 1.0))
            else:
                raw = leaf_prior._replace(scale=1.0, fan_in=False).distribution(shape)
                factor = 1 / math.sqrt(np.prod(shape[:-1])) if leaf_prior.fan_in else 1.0
                found.append(("scaled", layer, raw, factor))
        return found

    def with_scales(params, own, change):
        """Return the leaves with ``change(leaf, scale)`` done to those that have a scale."""
        leaves, treedef = jax.tree.flatten(params)
        changed = []
        for leaf, (group, layer, _, factor) in zip(leaves, plan(params), strict=True):
            if group == "scaled":
                leaf = change(leaf, factor * jnp.exp(own[layer]["log_scale"]))
            elif group == "inputs":
                assert inputs is not None
                scale = jnp.exp(_input_log_scales(own["inputs"], inputs))
                leaf = change(leaf, scale.reshape(-1, *[1] * (jnp.ndim(leaf) - 1)))
            changed.append(leaf)
        return jax.tree.unflatten(treedef, changed)

    def network(raw, own):
        return with_scales(raw, own, jnp.multiply)

    def start(params):
        own: dict[str, dict[str, jax.Array]] = {}
        squares: dict[str, list[jax.Array]] = {}
        for leaf, (group, layer, _, factor) in zip(
            jax.tree.leaves(params), plan(params), strict=True
        ):
            if group == "scaled":
                squares.setdefault(layer, []).append(jnp.square(leaf / factor).ravel())
            elif group == "inputs":
                assert inputs is not None
                size = jnp.sqrt(jnp.square(leaf).mean(axis=tuple(range(1, jnp.ndim(leaf)))))
                log_size = jnp.log(jnp.maximum(size, LEAST_SCALE * inputs.global_scale))
                if inputs.slab_scale is not None:
                    log_slab = math.log(inputs.slab_scale)
                    low = jnp.minimum(log_size - log_slab, math.log(MOST_OF_SLAB))
                    log_size = log_slab + low - 0.5 * jnp.log1p(-jnp.exp(2 * low))
                log_global = log_size.mean()
                own.setdefault("inputs", {}).update(
                    log_global=log_global, log_local=log_size - log_global
                )
        for layer, parts in squares.items():
            size = jnp.sqrt(jnp.concatenate(parts).mean())
            log_scale = jnp.log(jnp.maximum(size, LEAST_SCALE * weight.scale))
            own.setdefault(layer, {})["log_scale"] = log_scale
        return with_scales(params, own, jnp.divide), own

    def log_density(raw, own) -> jax.Array:
        total = jnp.zeros(())
        for leaf, (_, _, distribution, _) in zip(jax.tree.leaves(raw), plan(raw), strict=True):
            total += distribution.log_prob(leaf).sum()
        for values in own.values():
            if "log_scale" in values:
                assert scales is not None
                total += _log_half(scales, weight.scale, values["log_scale"])
            if "log_global" in values:
                assert inputs is not None
                total += _log_half("half_cauchy", inputs.global_scale, values["log_global"])
                total += _log_half("half_cauchy", 1.0, values["log_local"])
        return total

    def sample(key: jax.Array, params):
        raw, own = start(params)
        leaves, treedef = jax.tree.flatten(raw)
        drawn = [
            distribution.sample(jax.random.fold_in(key, i), jnp.shape(leaf))
            for i, (leaf, (_, _, distribution, _)) in enumerate(
                zip(leaves, plan(params), strict=True)
            )
        ]

        def draw(path, leaf):
            name = jax.tree_util.keystr(path[-1:], simple=True)
            family, scale = "half_cauchy", 1.0
            if name == "log_scale":
                assert scales is not None
                family, scale = scales, weight.scale
            elif name == "log_global":
                assert inputs is not None
                scale = inputs.global_scale
            key_here = jax.random.fold_in(key, len(leaves) + order.index(path))
            whole = SCALE_FAMILIES[family](0.0, scale)
            return jnp.log(jnp.abs(whole.sample(key_here, jnp.shape(leaf))))

        order = [path for path, _ in jax.tree_util.tree_flatten_with_path(own)[0]]
        own = jax.tree_util.tree_map_with_path(draw, own)
        return network(jax.tree.unflatten(treedef, drawn), own)

    input_scales = None
    if inputs is not None:

        def input_scales(own) -> jax.Array:
            return jnp.exp(_input_log_scales(own["inputs"], inputs))

    return Prior(log_density, sample, Hierarchy(start, network, input_scales))
