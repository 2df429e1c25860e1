"""NUTS without lockstep against ``jax.vmap(blackjax.nuts)``.

Two comparisons, both at equal numbers of draws, from the same starts, without compilation:

- funnel: 256 chains side by side on a funnel (log-scale v from N(0, 1), nine variables from
  N(0, e^v)), one step size for all, no warm-up. Trees differ between chains and from draw to draw.
- airfoil: 10 chains of an MLP 5-16-16-16-16-2 (SiLU, Gaussian likelihood with predicted scale,
  N(0, 1) prior) on the airfoil data, each with its own warm-up. Ours runs as it does by default
  on these devices (on CPUs: chain by chain, on every core); blackjax runs once on the same
  log-density and once on that of an MLP written in the usual way, ``h @ W``.

Call: ``python experiments/benchmarks/nuts_lockstep.py path/to/airfoil.data``.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bnnmcmc import likelihoods, priors, trees
from bnnmcmc.models.mlp import mlp
from bnnmcmc.placement import place, replicate, use_all_cores
from bnnmcmc.posterior import Posterior

# blackjax, and what uses it, is imported late: it wakes JAX, which must know its devices by then.

FUNNEL_STEP_SIZE = 0.3
HIDDEN = (16, 16, 16, 16)


def measure(data: Path, *, draws: int = 4000, mlp_draws: int = 50, max_depth: int = 7) -> dict:
    """Run both comparisons.

    Parameters
    ----------
    data : Path
        The airfoil table: five features and the target, separated by blanks.
    draws : int
        Draws per chain on the funnel.
    mlp_draws : int
        Draws per chain of the MLP, after 100 warm-up steps.
    max_depth : int
        Largest tree depth for the MLP.

    Returns
    -------
    dict
        "funnel" and "airfoil": draws per second over all chains, ratios, and for the funnel the
        utilisation (gradients made / gradients possible, from the first tick to the last).
    """
    return {"funnel": measure_funnel(draws), "airfoil": measure_mlp(data, mlp_draws, max_depth)}


def funnel(x: jax.Array) -> jax.Array:
    v, rest = x[0], x[1:]
    return -0.5 * (v**2 + jnp.sum(rest**2) * jnp.exp(-v) + rest.shape[0] * v)


def measure_funnel(draws: int, chains: int = 256, size: int = 10) -> dict:
    from bnnmcmc.samplers.nuts import nuts

    starts = 0.5 * jax.random.normal(jax.random.key(0), (chains, size))
    kernel = nuts(initial_step_size=FUNNEL_STEP_SIZE)
    placement = place(chains, jax.devices()[:1], mode="vmap")
    ours = ours_seconds(funnel, kernel, starts, (), 0, draws, placement)
    reference = blackjax_seconds(funnel, starts, (), 0, draws, 10, FUNNEL_STEP_SIZE)
    return {
        "chains": chains,
        "draws": draws,
        "utilisation": ours["utilisation"],
        "lockstep_utilisation": reference["utilisation"],
        "gradients_per_draw": ours["gradients"] / (chains * draws),
        "blackjax_gradients_per_draw": reference["gradients"] / (chains * draws),
        "draws_per_second": chains * draws / ours["seconds"],
        "blackjax_draws_per_second": chains * draws / reference["seconds"],
        "speedup": reference["seconds"] / ours["seconds"],
    }


def measure_mlp(path: Path, draws: int, max_depth: int, chains: int = 10, warmup: int = 100) -> dict:
    from bnnmcmc.samplers.nuts import nuts

    table = np.loadtxt(path)
    table = (table - table.mean(0)) / table.std(0)
    rows = np.random.default_rng(0).permutation(len(table))[: round(0.8 * len(table))]
    x, y = (jnp.asarray(part, jnp.float32) for part in (table[rows, :-1], table[rows, -1:]))
    posterior = Posterior(
        mlp(x.shape[1], HIDDEN, 2), likelihoods.gaussian(), priors.independent(priors.LeafPrior())
    )
    positions = jax.vmap(posterior.init)(jax.random.split(jax.random.key(0), chains))
    starts = trees.flatten_stacked(positions)
    unravel = ravel_pytree(trees.first(positions))[1]

    def ours_density(flat, x, y):
        return posterior.log_density(unravel(flat), x, y)

    def plain_density(flat, x, y):
        layers = unravel(flat)["network"]
        h = x
        for i in range(len(layers)):
            h = h @ layers[f"layer{i}"]["weight"] + layers[f"layer{i}"]["bias"]
            h = h if i == len(layers) - 1 else jax.nn.silu(h)
        sd = jax.nn.softplus(h[:, 1:]) + likelihoods.MIN_SCALE
        fit = jax.scipy.stats.norm.logpdf(y, h[:, :1], sd).sum()
        return fit + jax.scipy.stats.norm.logpdf(flat).sum()

    kernel, data = nuts(max_depth=max_depth), (x, y)
    ours = ours_seconds(ours_density, kernel, starts, data, warmup, draws, place(chains))
    results = {
        "chains": chains,
        "warmup": warmup,
        "draws": draws,
        "max_depth": max_depth,
        "parameters": starts.shape[1],
        "placement": place(chains).describe(),
        "gradients": ours["gradients"],
        "draws_per_second": chains * (warmup + draws) / ours["seconds"],
    }
    for name, density in (("blackjax", ours_density), ("blackjax_row_major", plain_density)):
        found = blackjax_seconds(density, starts, data, warmup, draws, max_depth, 0.01)
        results[f"{name}_gradients"] = found["gradients"]
        results[f"{name}_draws_per_second"] = chains * (warmup + draws) / found["seconds"]
        results[f"{name}_speedup"] = found["seconds"] / ours["seconds"]
    return results


def ours_seconds(density, kernel, starts, data, warmup, draws, placement) -> dict:
    from bnnmcmc.sampling import build_program, finish_warmup, run_blocks, start_chains

    of = trees.layout(starts[0])
    program = build_program(density, kernel, of, placement, warmup=warmup, draws=draws, thin=1)
    data = replicate(data, placement)
    for _ in range(2):  # the first time compiles
        begun = time.perf_counter()
        carry, gradients, ticks = start_chains(program, starts, 0, data), 0, 0
        for stage in ("warmup", "sampling"):
            if stage == "sampling":
                carry = finish_warmup(program, carry)
            for block in run_blocks(program, stage, carry, 0, data):
                carry = block.carry
                gradients += int(block.stats["gradients"].sum())
                ticks += 0 if block.ticks is None else int(block.ticks.sum())
        seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "gradients": gradients,
        "utilisation": gradients / ticks if ticks else 1.0,
    }


def blackjax_seconds(density, starts, data, warmup, draws, max_depth, step_size) -> dict:
    """Time jax.vmap over chains; with no warm-up, at this step size and the unit metric."""
    import blackjax

    kernel = blackjax.nuts.build_kernel()

    def chain(key, start, *data):
        def log_density(flat):
            return density(flat, *data)

        state = blackjax.nuts.init(start, log_density)
        used = {"step_size": jnp.asarray(step_size), "inverse_mass_matrix": jnp.ones_like(start)}
        early = jnp.zeros((0,), jnp.int32)
        if warmup:
            adaptation = blackjax.window_adaptation(
                blackjax.nuts, log_density, initial_step_size=step_size, max_num_doublings=max_depth
            )
            (state, used), info = adaptation.run(jax.random.fold_in(key, 0), start, warmup)
            early = info.info.num_integration_steps
        used = {name: used[name] for name in ("step_size", "inverse_mass_matrix")}

        def step(state, t):
            state, info = kernel(
                jax.random.fold_in(key, t), state, log_density, **used, max_num_doublings=max_depth
            )
            return state, (state.position, info.num_integration_steps)

        _, (positions, gradients) = jax.lax.scan(step, state, 1 + jnp.arange(draws))
        return positions, jnp.concatenate([early, gradients])

    keys = jax.random.split(jax.random.key(0), len(starts))
    over_data = (None,) * len(data)
    run = jax.jit(jax.vmap(chain, in_axes=(0, 0, *over_data))).lower(keys, starts, *data).compile()
    begun = time.perf_counter()
    _, gradients = jax.block_until_ready(run(keys, starts, *data))
    seconds = time.perf_counter() - begun
    gradients = np.asarray(gradients, np.int64)
    # In lockstep every draw takes as long as the chain with the longest trajectory.
    return {
        "seconds": seconds,
        "gradients": int(gradients.sum()),
        "utilisation": gradients.sum() / (len(starts) * gradients.max(axis=0).sum()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="airfoil.data")
    parser.add_argument("--draws", type=int, default=4000, help="per chain, on the funnel")
    parser.add_argument("--mlp-draws", type=int, default=50)
    parser.add_argument("--max-depth", type=int, default=7, help="for the MLP")
    given = parser.parse_args()
    use_all_cores()
    for part, found in measure(
        given.data, draws=given.draws, mlp_draws=given.mlp_draws, max_depth=given.max_depth
    ).items():
        print(part)
        for name, value in found.items():
            print(f"  {name:28} {value:.4g}" if isinstance(value, float) else f"  {name:28} {value}")
