"""Trees of NUTS on a network from an ensemble's weights: our warm-ups beside blackjax's default.

Airfoil, MLP 5-16-16-16-16-2 (SiLU), N(0, 1) prior, as many chains as members. All aim at the same
acceptance rate and have the same largest depth unless a row says otherwise. Gradients are those of
one chain; the LPPD is pooled over the chains, standardised, of the draws after the warm-up.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.ensemble import fit_ensemble
from bnnmcmc.likelihoods import gaussian
from bnnmcmc.models.mlp import mlp
from bnnmcmc.posterior import Posterior
from bnnmcmc.priors import normal
from bnnmcmc.sampling import sample_density
from experiments.benchmarks.gradients import HIDDEN
from experiments.benchmarks.settings import Settings, airfoil

TARGET = 0.8


class Size(NamedTuple):
    """Chains, warm-up steps with trees, steps of the walk, draws, and the largest depth."""

    chains: int
    trees: int
    walk: int
    draws: int
    depth: int


def measure(settings: Settings) -> dict[str, Any]:
    """Measure tree sizes, acceptance, and what the gradients bought."""
    from bnnmcmc.samplers.nuts import nuts

    data = airfoil(settings)
    x, y, x_test, y_test = (
        jnp.asarray(data[n], jnp.float32) for n in ("x", "y", "x_test", "y_test")
    )
    quick = settings.quick
    size = Size(2, 20, 80, 4, 4) if quick else Size(2, 100, 5000, 40, 10)
    hidden = (4, 4) if quick else HIDDEN
    posterior = Posterior(mlp(x.shape[1], hidden, 2, "silu"), gaussian(), normal())
    held = len(x) // 5
    members = fit_ensemble(
        posterior,
        x[held:],
        y[held:],
        x[:held],
        y[:held],
        members=size.chains,
        max_epochs=5 if quick else 1000,
    )
    starts = trees.flatten_stacked(members.positions)
    unravel = trees.unraveler(trees.first(members.positions))

    def log_density(flat, x, y):
        return posterior.log_density(unravel(flat), x, y)

    def lppd(draws) -> float:
        def pointwise(flat):
            outputs = posterior.network.apply(unravel(flat)["network"], x_test)
            params = unravel(flat).get("likelihood", {})
            return posterior.likelihood.distribution(params, outputs).log_prob(y_test).reshape(-1)

        each = jax.lax.map(pointwise, jnp.asarray(draws.reshape(-1, draws.shape[-1])))
        return float(np.mean(jax.nn.logsumexp(each, axis=0) - jnp.log(len(each))))

    rows = [{"what": "blackjax, window_adaptation", **of_blackjax(log_density, starts, x, y, size)}]
    shallow = {"adaptation": "network", "max_depth": size.depth - 2}
    ours: list[tuple[str, int, dict[str, Any]]] = [
        ("window, diagonal", size.trees, {}),
        ("network, diagonal", size.walk + size.trees, {"adaptation": "network"}),
        (
            "network, low_rank",
            size.walk + size.trees,
            {"adaptation": "network", "metric": "low_rank", "max_rank": 3 if quick else 100},
        ),
        ("network, diagonal, depth - 2", size.walk + size.trees, shallow),
        (
            "network, diagonal, depth - 2, acceptance of blackjax",
            size.walk + size.trees,
            shallow | {"target_acceptance": float(np.mean(rows[0]["acceptance"]))},
        ),
    ]
    for name, warmup, options in ours:
        kernel = nuts(
            **{
                "max_depth": size.depth,
                "target_acceptance": TARGET,
                "initial_step_size": 0.005,
                **options,
            }
        )
        found = sample_density(
            log_density, starts, kernel=kernel, warmup=warmup, draws=size.draws, data=(x, y)
        )
        rows.append(
            {
                "what": name,
                "draws": found.draws,
                "tree": found.stats["gradients"],
                "acceptance": found.stats["acceptance_rate"],
                "divergences": found.stats["diverging"],
                # A record of several steps holds their sum.
                "warmup_gradients": found.warmup_stats["gradients"].sum(axis=1),
            }
        )
    largest = 2**size.depth - 1
    for row in rows:
        draws, tree = row.pop("draws"), row["tree"]
        row["at_the_largest"] = float(np.mean(tree >= largest))
        row["tree"] = float(np.mean(tree))
        row["over_blackjax"] = row["tree"] / rows[0]["tree"]
        row["acceptance"] = float(np.mean(row["acceptance"]))
        row["divergences"] = int(np.sum(row["divergences"]))
        row["warmup_gradients"] = float(np.mean(row["warmup_gradients"]))
        row["gradients"] = row["warmup_gradients"] + size.draws * row["tree"]
        row["lppd"] = lppd(draws)
    return {
        "rows": rows,
        "target_acceptance": TARGET,
        **size._asdict(),
        "parameters": len(starts.T),
    }


def of_blackjax(log_density, starts, x, y, size: Size) -> dict[str, Any]:
    """Run ``blackjax.window_adaptation`` and ``blackjax.nuts``, chain by chain."""
    import blackjax

    def chain(key, start):
        def density(flat):
            return log_density(flat, x, y)

        adaptation = blackjax.window_adaptation(
            blackjax.nuts, density, target_acceptance_rate=TARGET, max_num_doublings=size.depth
        )
        (state, params), warm = adaptation.run(jax.random.fold_in(key, 0), start, size.trees)
        kernel = blackjax.nuts(density, **params).step

        def step(state, t):
            state, info = kernel(jax.random.fold_in(key, t), state)
            found = info.num_integration_steps, info.acceptance_rate, info.is_divergent
            return state, (state.position, *found)

        _, drawn = jax.lax.scan(step, state, 1 + jnp.arange(size.draws))
        return (*drawn, warm.info.num_integration_steps)

    keys = jax.random.split(jax.random.key(0), len(starts))
    found = jax.jit(lambda *given: jax.lax.map(lambda one: chain(*one), given))(keys, starts)
    draws, tree, acceptance, divergences, warm = map(np.asarray, found)
    return {
        "draws": draws,
        "tree": tree,
        "acceptance": acceptance,
        "divergences": divergences,
        "warmup_gradients": warm.sum(axis=1),
    }
