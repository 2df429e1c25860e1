"""From a config to the objects it describes: posterior, kernel, optimiser, placement."""

import importlib
import inspect
import os
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from bnnmcmc import likelihoods, priors, trees
from bnnmcmc.calibration import calibrate, choose
from bnnmcmc.config import (
    Config,
    HMCConfig,
    LeafPriorConfig,
    MAMSConfig,
    MCLMCConfig,
    NUTSConfig,
    OwnKernelConfig,
)
from bnnmcmc.data import Dataset, Encoding
from bnnmcmc.ensemble import make_optimiser
from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import mlp
from bnnmcmc.models.network import Network
from bnnmcmc.placement import Placement
from bnnmcmc.posterior import Posterior, activation_bytes, position_shapes
from bnnmcmc.processes import Group, share_of
from bnnmcmc.samplers.contract import check_kernel
from bnnmcmc.samplers.kernel import Kernel, MinibatchKernel
from bnnmcmc.samplers.kronecker import elements, matrices
from bnnmcmc.samplers.mass import MAX_WINDOW_DRAWS
from bnnmcmc.samplers.table import KERNELS

# Of a chain on a device: position, gradient, momentum, moments, metric, and their next values.
CHAIN_VECTORS = 16


def make_likelihood(config: Config, encoding: Encoding) -> likelihoods.Likelihood:
    """Build the likelihood for the targets or classes of a data set.

    Raises
    ------
    InputError
        A Bernoulli likelihood for other than two classes.
    """
    chosen, targets = config.likelihood, len(encoding.targets)
    level = [target.level for target in encoding.targets]
    match chosen.kind:
        case "gaussian":
            return likelihoods.gaussian(targets, chosen.scale, chosen.scale_prior)
        case "laplace":
            return likelihoods.laplace(targets, chosen.scale, chosen.scale_prior)
        case "student_t":
            return likelihoods.student_t(targets, chosen.scale, chosen.scale_prior, chosen.df)
        case "gaussian_mixture":
            return likelihoods.gaussian_mixture(targets, chosen.components)
        case "poisson":
            return likelihoods.poisson(targets, level)
        case "zero_inflated_poisson":
            return likelihoods.zero_inflated_poisson(targets, level)
        case "negative_binomial":
            options = (chosen.concentration, level, chosen.scale_prior)
            return likelihoods.negative_binomial(targets, *options)
        case "beta":
            return likelihoods.beta(targets, chosen.concentration, level, chosen.scale_prior)
        case "categorical":
            return likelihoods.categorical(len(encoding.classes or ()))
        case "bernoulli":
            classes = encoding.classes or ()
            if len(classes) != 2:
                raise InputError(
                    f"likelihood.kind: 'bernoulli' is for two classes, but the target "
                    f"{encoding.targets[0].name!r} has {len(classes)}; use 'categorical'"
                )
            return likelihoods.bernoulli()


def make_network(config: Config, features: int, outputs: int) -> Network:
    """Build the MLP, or call the user's ``module:function(features, outputs)``.

    Raises
    ------
    InputError
        The function cannot be imported or called, or does not return a `Network`.
    """
    model = config.model
    if model.network is None:
        return mlp(features, model.hidden, outputs, model.activation, model.skip)
    function = import_object("model.network", model.network)
    try:
        network = function(features, outputs)
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"model.network: {model.network}({features}, {outputs}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, Network):
        raise InputError(
            f"model.network: {model.network} returned a {type(network).__name__}, expected a "
            "bnnmcmc.Network(init, apply)"
        )
    return network


def import_object(field: str, reference: str) -> Any:
    """Import ``module:object``, also from the working folder.

    Raises
    ------
    InputError
        No such module or object, the module fails, or the reference is not of that form.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise InputError(f"{field}: found {reference!r}, expected module:object")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{field}: cannot import {module_name!r}: {error}; the module must be installed, or "
            f"lie in the working folder {folder}"
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"{field}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise InputError(f"{field}: the module {module_name!r} has no {name!r}")
    return getattr(module, name)


def make_prior(config: Config) -> priors.Prior:
    """Build the prior over the network's parameters.

    Raises
    ------
    InputError
        The user's own log-density cannot be imported.
    """
    chosen = config.prior
    if chosen.log_density is not None:
        function = import_object("prior.log_density", chosen.log_density)
        if not callable(function):
            raise InputError(
                f"prior.log_density: {chosen.log_density} is a {type(function).__name__}, expected "
                "a function of the network's parameters"
            )
        return priors.Prior(function)

    def leaf(part: LeafPriorConfig) -> priors.LeafPrior:
        return priors.LeafPrior(part.family, part.scale, part.fan_in, part.df)

    layers = {
        name: {
            kind: leaf(part)
            for kind, part in (("weight", layer.weight), ("bias", layer.bias))
            if part is not None
        }
        for name, layer in chosen.layers.items()
    }
    parts = leaf(chosen), leaf(chosen.bias) if chosen.bias else None, layers
    inputs = None
    if chosen.inputs is not None:
        slab = chosen.slab_scale if chosen.inputs == "regularised_horseshoe" else None
        inputs = priors.Horseshoe(chosen.global_scale, slab, chosen.input_leaf)
    if inputs is None and not chosen.hierarchical:
        return priors.independent(*parts)
    scales = chosen.scales if chosen.hierarchical else None
    return priors.hierarchical(*parts, scales=scales, inputs=inputs)


def make_posterior(config: Config, encoding: Encoding) -> Posterior:
    """Build network, likelihood and prior for a data set with this encoding.

    Raises
    ------
    InputError
        Any of the three cannot be built.
    """
    likelihood = make_likelihood(config, encoding)
    network = make_network(config, len(encoding.feature_names), likelihood.num_outputs)
    return Posterior(network, likelihood, make_prior(config))


def make_kernel(config: Config) -> Kernel | MinibatchKernel:
    """Build the kernel with the options of [sampler].

    Raises
    ------
    InputError
        A kernel of the user's own cannot be imported or called with these options, or is no
        `Kernel` or `MinibatchKernel`.
    """
    sampler = config.sampler
    if isinstance(sampler, OwnKernelConfig):
        return _own_kernel(sampler.kernel, sampler.options)
    common = {"kernel", "rows", "leaves", "warmup", "draws", "thin"}
    return KERNELS[sampler.kernel](**sampler.model_dump(exclude=common))


def _own_kernel(reference: str, options: dict[str, Any]) -> Kernel | MinibatchKernel:
    """Call the user's ``module:function(**options)``."""
    function = import_object("sampler.kernel", reference)
    if not callable(function):
        raise InputError(
            f"sampler.kernel: {reference} is a {type(function).__name__}, expected a function "
            "that returns a bnnmcmc.Kernel or a bnnmcmc.MinibatchKernel"
        )
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(function).parameters) or "nothing"
        raise InputError(
            f"sampler.options: found {', '.join(options) or 'none'}, but {reference} takes {takes}"
            f" ({error})"
        ) from error
    try:
        kernel = function(**options)
    except Exception as error:  # the user's code may raise anything
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise InputError(
            f"sampler.kernel: {reference}({given}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(kernel, Kernel | MinibatchKernel):
        raise InputError(
            f"sampler.kernel: {reference} returned a {type(kernel).__name__}, expected a "
            "bnnmcmc.Kernel or a bnnmcmc.MinibatchKernel"
        )
    return kernel


def check_own_kernel(config: Config, of: trees.Layout) -> None:
    """Build the kernel and, if it is the user's own, check that it keeps the protocol.

    Raises
    ------
    InputError
        It does not (see `check_kernel`).
    """
    kernel, sampler = make_kernel(config), config.sampler
    if isinstance(sampler, OwnKernelConfig):
        called = f"sampler.kernel: {sampler.kernel}"
        check_kernel(kernel, sampled_size(config, of), sampler.warmup, called)


def make_ensemble_optimiser(config: Config) -> optax.GradientTransformation:
    """Build the optimiser of [ensemble]."""
    chosen = config.ensemble
    return make_optimiser(
        chosen.optimizer,
        chosen.learning_rate,
        chosen.optimizer_options,
        chosen.schedule,
        chosen.schedule_options,
    )


def make_placement(
    config: Config, posterior: Posterior, dataset: Dataset, group: Group | None = None
) -> Placement:
    """Place the chains of this process as [run] says, and choose what it leaves open.

    Raises
    ------
    InputError
        More devices than there are, or too few chains for the processes.
    """
    group = group or Group()
    members = config.ensemble.members
    first, chains = share_of(members, group.index, group.count)
    room = share_of(members, 0, group.count)[1]
    devices = jax.devices()
    wanted = config.run.devices or len(devices)
    if wanted > len(devices):
        raise InputError(
            f"run.devices: found {wanted}, but there are {len(devices)}; give 0 for all"
        )
    run, sampler = config.run, config.sampler
    x, y = posterior.arrays(*sampling_rows(config, dataset))
    layout = trees.layout(position_shapes(posterior))
    placed = choose(
        room,
        len(x),
        activation_bytes(posterior, x, y),
        chain_bytes=(CHAIN_VECTORS * layout.size + metric_numbers(config, layout))
        * x.dtype.itemsize,
        devices=devices[:wanted],
        mode=None if run.mode == "auto" else run.mode,
        group=run.group or None,
        row_chunk=run.row_chunk or None,
    )
    if not (run.group or run.row_chunk or run.mode == "vmap"):
        placed = calibrate(posterior, x, y, placed, sampler.warmup + sampler.draws * sampler.thin)
    return replace(placed, chains=chains, first=first, room=room)


def metric_numbers(config: Config, of: trees.Layout) -> int:
    """Return how many numbers a metric holds, with what its estimate needs."""
    sampler = config.sampler
    if isinstance(sampler, MCLMCConfig | MAMSConfig) and sampler.metric != "identity":
        # The factors, their inverses, the sums they come from, and their next values.
        return 6 * elements(matrices(of))
    if not isinstance(sampler, NUTSConfig | HMCConfig) or sampler.metric == "diagonal":
        return 0
    if sampler.metric == "dense":
        return 4 * of.size**2  # two matrices, the draws' squares, and their next values
    return 2 * (MAX_WINDOW_DRAWS + sampler.max_rank) * of.size


def chosen_fields(config: Config, dataset: Dataset, placement: Placement) -> dict[str, Any]:
    """Return the fields of [run] that stand for a placement."""
    return {
        "mode": placement.mode,
        "group": placement.group if placement.mode == "map" else 0,
        # As many rows as there are: all at once.
        "row_chunk": placement.row_chunk or len(sampling_rows(config, dataset)[0]),
    }


def sampled_size(config: Config, of: trees.Layout) -> int:
    """Return how many parameters are sampled; the others stay at the ensemble's values.

    Raises
    ------
    InputError
        sampler.leaves does not fit the leaves that there are.
    """
    return trees.chosen_size(trees.chosen_leaves(config.sampler.leaves, of), of)


def sampled_rows(config: Config, dataset: Dataset) -> np.ndarray:
    """Return the numbers of the rows that the posterior conditions on; train comes first."""
    if config.sampler.rows == "train+validation":
        return np.concatenate([dataset.train, dataset.validation])
    return dataset.train


def sampling_rows(config: Config, dataset: Dataset) -> tuple[Any, Any]:
    """Return x and y of the rows that the posterior conditions on."""
    rows = sampled_rows(config, dataset)
    return dataset.x[rows], dataset.y[rows]
