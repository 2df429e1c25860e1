"""The study of Wiese et al. (2023): many chains of one draw against one chain of many draws.

Chains are made in parts, each written to a file of its own once it is there: a study that was
interrupted goes on with the parts that are missing. A chain's draws depend on the seed and its
number alone, so they are the same however the chains are cut into parts.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnnmcmc.config import Config, read_config
from bnnmcmc.errors import InputError

HERE = Path(__file__).parent
# Name -> settings of [data]. Energy's second target is not in our table.
TABLES = {
    "diabetes": {"source": "sklearn:diabetes"},
    "airfoil": {"path": "airfoil.data", "source": "openml:44957"},
    "energy": {"path": "energy.data", "source": "openml:44960"},
}
# LPPD of the paper: 1274 chains of one draw, one chain of 1274 draws.
PAPER = {
    ("f1", "airfoil"): (-0.74, -0.80),
    ("f2", "airfoil"): (0.92, 0.72),
    ("f1", "diabetes"): (-1.20, -1.20),
    ("f2", "diabetes"): (-1.18, -1.22),
    ("f1", "energy"): (0.92, 0.69),
    ("f2", "energy"): (2.07, 2.38),
}
# Of the shrunken study, unless the command line says otherwise: chains, and steps of warm-up.
FEW_CHAINS = {"f1": 200, "f2": 16}
FEW_STEPS = {"f1": 1024, "f2": 256}
# Chains in a part.
PART = {"f1": 50, "f2": 2}


class Problem(NamedTuple):
    """One network on one table: what is sampled, and the rows it is scored on."""

    config: Config
    posterior: Any
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def read_problem(network: str, table: str, data: Path | None) -> Problem:
    """Read a network's config and a table, split and scaled."""
    from bnnmcmc import build
    from bnnmcmc.inputs import read_dataset
    from bnnmcmc.posterior import Posterior

    for name, value, known in (("network", network, PART), ("table", table, TABLES)):
        if value not in known:
            raise InputError(f"{name}: found {value!r}, expected one of {', '.join(known)}")
    settings = [f'data.{key}="{value}"' for key, value in TABLES[table].items()]
    config = read_config(HERE / f"{network}.toml", settings)
    dataset = read_dataset(config, data or HERE.parent)
    likelihood = build.make_likelihood(config, dataset.encoding)
    mlp = build.make_network(config, dataset.x.shape[1], likelihood.num_outputs)
    posterior = Posterior(mlp, likelihood, build.make_prior(config))
    train, test = dataset.train, dataset.test
    return Problem(
        config, posterior, dataset.x[train], dataset.y[train], dataset.x[test], dataset.y[test]
    )


def starts(problem: Problem, seed: int, chains: np.ndarray) -> Any:
    """Return a draw from the prior for each chain number, (chain, *leaf)."""
    import jax

    key = jax.random.key(seed)

    def one(chain):
        member = problem.posterior.init(key)
        weights = problem.posterior.prior.sample(jax.random.fold_in(key, chain), member["network"])
        return {**member, "network": weights}

    return jax.vmap(one)(chains)


def sample_part(
    problem: Problem, chains: np.ndarray, warmup: int, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Sample some chains; return their draws and what these say of the test rows."""
    import jax

    import bnnmcmc
    from bnnmcmc import predictive, trees
    from bnnmcmc.placement import place
    from bnnmcmc.samplers.nuts import nuts

    begun = time.monotonic()
    sampler = problem.config.sampler
    placement = replace(place(len(chains)), first=int(chains[0]))
    run = bnnmcmc.sample(
        problem.posterior,
        starts(problem, seed, chains),
        problem.x,
        problem.y,
        kernel=nuts(sampler.max_depth, sampler.target_acceptance, sampler.initial_step_size),
        warmup=warmup,
        draws=draws,
        seed=seed,
        placement=placement,
    )
    found = predictive.per_draw(problem.posterior, run.draws, problem.x_test, problem.y_test)
    return {
        "chains": chains,
        "flat": np.concatenate(list(run.draws.blocks()), axis=1),
        "log_likelihood": found["log_density"],
        "mean": found["mean"][..., 0],
        "variance": found["variance"][:, :, 0, 0],
        "log_density": run.stats["log_density"],
        "gradients": run.stats["gradients"],
        "warmup_gradients": run.warmup_stats["gradients"].sum(axis=1),
        "diverging": run.stats["diverging"],
        "seconds": np.array(time.monotonic() - begun),
        "parameters": np.array(run.draws.layout.size),
        "names": np.array(trees.leaf_names(trees.first(jax.tree.map(lambda a: a, run.members)))),
    }


def run_study(
    network: str,
    table: str,
    folder: Path,
    *,
    data: Path | None = None,
    chains: int,
    long_draws: int,
    warmup: int,
    part: int = 0,
    seed: int = 0,
    say=print,
) -> None:
    """Make the parts that are missing: the chains of one draw, then the long chain."""
    problem = read_problem(network, table, data)
    folder = folder / f"{network}-{table}-{warmup}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    size = part or PART[network]
    plan = [(first, min(size, chains - first), 1) for first in range(0, chains, size)]
    if long_draws:
        plan.insert(min(1, len(plan)), (-1, 1, long_draws))
    for first, count, draws in plan:
        name = f"long-{draws}" if first < 0 else f"chains-{first:05d}-{count}"
        path = folder / f"{name}.npz"
        if path.exists():
            continue
        # The long chain's number is beyond all others.
        numbers = np.arange(count) + (first if first >= 0 else 1_000_000)
        found = sample_part(problem, numbers, warmup, draws, seed)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, **found)
        partial.rename(path)
        say(f"{folder.name}/{name}: {float(found['seconds']):.1f} s")
