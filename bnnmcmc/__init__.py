"""Sampling-based inference for Bayesian neural networks.

Many chains, each started by an optimiser in a posterior mode of its own, advance together; the
pooled draws give the posterior predictive. Names load on first use, so that importing the package
costs nothing.

Examples
--------
>>> import bnnmcmc
>>> posterior = bnnmcmc.Posterior(
...     bnnmcmc.mlp(2, [8, 8], 2), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
... )
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnnmcmc.compilation import use_compilation_cache as use_compilation_cache
    from bnnmcmc.data import Dataset as Dataset
    from bnnmcmc.data import Split as Split
    from bnnmcmc.data import prepare as prepare
    from bnnmcmc.data import read_table as read_table
    from bnnmcmc.data import table_from_arrays as table_from_arrays
    from bnnmcmc.ensemble import Ensemble as Ensemble
    from bnnmcmc.ensemble import fit_ensemble as fit_ensemble
    from bnnmcmc.ensemble import make_optimiser as make_optimiser
    from bnnmcmc.errors import InputError as InputError
    from bnnmcmc.errors import UnseenWarning as UnseenWarning
    from bnnmcmc.estimators import BNNClassifier as BNNClassifier
    from bnnmcmc.estimators import BNNRegressor as BNNRegressor
    from bnnmcmc.exported import export as export
    from bnnmcmc.likelihoods import Likelihood as Likelihood
    from bnnmcmc.likelihoods import bernoulli as bernoulli
    from bnnmcmc.likelihoods import beta as beta
    from bnnmcmc.likelihoods import categorical as categorical
    from bnnmcmc.likelihoods import gaussian as gaussian
    from bnnmcmc.likelihoods import gaussian_mixture as gaussian_mixture
    from bnnmcmc.likelihoods import laplace as laplace
    from bnnmcmc.likelihoods import negative_binomial as negative_binomial
    from bnnmcmc.likelihoods import poisson as poisson
    from bnnmcmc.likelihoods import student_t as student_t
    from bnnmcmc.likelihoods import zero_inflated_poisson as zero_inflated_poisson
    from bnnmcmc.models.mlp import mlp as mlp
    from bnnmcmc.models.network import Layers as Layers
    from bnnmcmc.models.network import Network as Network
    from bnnmcmc.modes import chains_needed as chains_needed
    from bnnmcmc.placement import place as place
    from bnnmcmc.placement import use_all_cores as use_all_cores
    from bnnmcmc.placement import use_precision as use_precision
    from bnnmcmc.posterior import Posterior as Posterior
    from bnnmcmc.prediction import Prediction as Prediction
    from bnnmcmc.predictor import Predictor as Predictor
    from bnnmcmc.predictor import load as load
    from bnnmcmc.priors import Hierarchy as Hierarchy
    from bnnmcmc.priors import Horseshoe as Horseshoe
    from bnnmcmc.priors import LeafPrior as LeafPrior
    from bnnmcmc.priors import Prior as Prior
    from bnnmcmc.priors import hierarchical as hierarchical_prior  # noqa: F401
    from bnnmcmc.priors import independent as independent_prior  # noqa: F401
    from bnnmcmc.priors import normal as normal_prior  # noqa: F401
    from bnnmcmc.run import Run as Run
    from bnnmcmc.run import sample as sample
    from bnnmcmc.samplers.hmc import hmc as hmc
    from bnnmcmc.samplers.kernel import Kernel as Kernel
    from bnnmcmc.samplers.kernel import MinibatchKernel as MinibatchKernel
    from bnnmcmc.samplers.kernel import RowDensity as RowDensity
    from bnnmcmc.samplers.kernel import Warmup as Warmup
    from bnnmcmc.samplers.mams import mams as mams
    from bnnmcmc.samplers.mclmc import mclmc as mclmc
    from bnnmcmc.samplers.nuts import nuts as nuts
    from bnnmcmc.samplers.sghmc import sghmc as sghmc
    from bnnmcmc.samplers.sgld import sgld as sgld
    from bnnmcmc.samplers.smile import smile as smile
    from bnnmcmc.sampling import Samples as Samples
    from bnnmcmc.sampling import sample_density as sample_density
    from bnnmcmc.symmetry.canonical import canonicalize as canonicalize
    from bnnmcmc.symmetry.group import group_order as group_order
    from bnnmcmc.targets import Target as Target

_HOMES = {
    "BNNClassifier": "estimators.BNNClassifier",
    "BNNRegressor": "estimators.BNNRegressor",
    "Dataset": "data.Dataset",
    "Ensemble": "ensemble.Ensemble",
    "Hierarchy": "priors.Hierarchy",
    "Horseshoe": "priors.Horseshoe",
    "InputError": "errors.InputError",
    "Kernel": "samplers.kernel.Kernel",
    "Layers": "models.network.Layers",
    "LeafPrior": "priors.LeafPrior",
    "Likelihood": "likelihoods.Likelihood",
    "MinibatchKernel": "samplers.kernel.MinibatchKernel",
    "Network": "models.network.Network",
    "Posterior": "posterior.Posterior",
    "Prediction": "prediction.Prediction",
    "Predictor": "predictor.Predictor",
    "Prior": "priors.Prior",
    "RowDensity": "samplers.kernel.RowDensity",
    "Run": "run.Run",
    "Samples": "sampling.Samples",
    "Split": "data.Split",
    "Target": "targets.Target",
    "UnseenWarning": "errors.UnseenWarning",
    "Warmup": "samplers.kernel.Warmup",
    "bernoulli": "likelihoods.bernoulli",
    "beta": "likelihoods.beta",
    "canonicalize": "symmetry.canonical.canonicalize",
    "categorical": "likelihoods.categorical",
    "chains_needed": "modes.chains_needed",
    "fit_ensemble": "ensemble.fit_ensemble",
    "gaussian": "likelihoods.gaussian",
    "gaussian_mixture": "likelihoods.gaussian_mixture",
    "group_order": "symmetry.group.group_order",
    "hierarchical_prior": "priors.hierarchical",
    "hmc": "samplers.hmc.hmc",
    "independent_prior": "priors.independent",
    "laplace": "likelihoods.laplace",
    "export": "exported.export",
    "load": "predictor.load",
    "make_optimiser": "ensemble.make_optimiser",
    "mams": "samplers.mams.mams",
    "mclmc": "samplers.mclmc.mclmc",
    "mlp": "models.mlp.mlp",
    "negative_binomial": "likelihoods.negative_binomial",
    "normal_prior": "priors.normal",
    "nuts": "samplers.nuts.nuts",
    "place": "placement.place",
    "poisson": "likelihoods.poisson",
    "prepare": "data.prepare",
    "read_table": "data.read_table",
    "sample": "run.sample",
    "sample_density": "sampling.sample_density",
    "sghmc": "samplers.sghmc.sghmc",
    "sgld": "samplers.sgld.sgld",
    "smile": "samplers.smile.smile",
    "student_t": "likelihoods.student_t",
    "table_from_arrays": "data.table_from_arrays",
    "use_all_cores": "placement.use_all_cores",
    "use_compilation_cache": "compilation.use_compilation_cache",
    "use_precision": "placement.use_precision",
    "zero_inflated_poisson": "likelihoods.zero_inflated_poisson",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bnnmcmc' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(importlib.import_module(f"bnnmcmc.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
