"""A representative of each orbit, in one of three ways, and what that does to the density."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from bnnmcmc.errors import InputError
from bnnmcmc.symmetry.alignment import align
from bnnmcmc.symmetry.exact import exact_transformation
from bnnmcmc.symmetry.group import Transformation, apply, layers_of, lead_of, log_volume
from bnnmcmc.symmetry.hyperplane import hyperplane_transformation

Method = Literal["exact", "hyperplane", "alignment"]
METHODS = ("exact", "hyperplane", "alignment")


class Canonical(NamedTuple):
    """Representatives, and how they were reached.

    Parameters
    ----------
    params : dict
        Weights with the same leading axes; the same functions as before.
    transformation : Transformation
        From the weights to these.
    log_volume : numpy array (*lead)
        By how much it stretches the space of weights; 0 unless units were rescaled.
    log_prior_change : numpy array (*lead) or None
        The log prior density here minus that before: 0 to rounding for an isotropic prior, unless
        units were rescaled. None if no density was given.
    """

    params: dict
    transformation: Transformation
    log_volume: np.ndarray
    log_prior_change: np.ndarray | None


def canonicalize(
    network: Any,
    params: Mapping[str, Any],
    method: Method = "exact",
    *,
    log_prior: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Canonical:
    """Replace weights by a representative of their orbit under equi-output transformations.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights with any leading axes: the "network" part of positions, such as
        ``(chain, draw, *leaf)`` draws.
    method : "exact", "hyperplane" or "alignment"
        `exact.exact_transformation` (from each draw alone), `hyperplane.hyperplane_transformation`
        (the paper's), or `alignment.align` (as close to each other as can be).
    log_prior : callable, optional
        ``log_prior(params) -> scalar`` for one network: its change is then reported.
    **options
        Of the method: ``order`` of the first, ``reference`` and ``rounds`` of the last.

    Returns
    -------
    Canonical

    Raises
    ------
    InputError
        A network that does not say what it is built of, weights that do not fit it, or an unknown
        method.
    """
    layers = layers_of(network)
    methods = {
        "exact": exact_transformation,
        "hyperplane": hyperplane_transformation,
        "alignment": align,
    }
    if method not in methods:
        raise InputError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    found = methods[method](layers, params, **options)
    result = apply(layers, found, params)
    change = None
    if log_prior is not None:
        lead = lead_of(layers, params)
        change = np.empty(lead)
        for index in np.ndindex(*lead):
            before, after = (
                {n: {k: np.asarray(v)[index] for k, v in leaves.items()} for n, leaves in t.items()}
                for t in (params, result)
            )
            change[index] = float(log_prior(after)) - float(log_prior(before))
    return Canonical(result, found, log_volume(layers, found), change)
