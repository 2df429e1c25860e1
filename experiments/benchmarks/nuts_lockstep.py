"""NUTS without lockstep against ``jax.vmap(blackjax.nuts)``.

Comparisons, each at equal numbers of draws, from the same starts, without compilation:

- funnel: 256 chains side by side on a funnel (log-scale v from N(0, 1), nine variables from
  N(0, e^v)), one step size for all, no warm-up. Trees differ between chains and from draw to draw.
  The gradient costs next to nothing, so this is about utilisation; its speed is that of the
  bookkeeping.
- regression, regression_large: the same funnel as the prior of a linear regression with 1000 and
  10 000 rows and so much noise that they say little: trees as uneven, at the cost of a gradient
  that is one.
- airfoil: 10 chains of an MLP 5-16-16-16-16-2 (SiLU, Gaussian likelihood with predicted scale,
  N(0, 1) prior) on the airfoil data, each with its own warm-up. Ours runs as it does by default
  on these devices (on CPUs: chain by chain, on every core); blackjax runs once on the same
  log-density and once on that of an MLP written in the usual way, ``h @ W``.
- small_networks: 256 chains side by side, MLP 5-8-2 on 300 rows of the same data, trees to depth
  8, each chain with its own warm-up, so that step sizes and trees differ. Settings were fixed
  before the first measurement, and not changed after it.

Seconds are wall time and, where a machine has other things to do, CPU time of this process.

Call: ``python experiments/benchmarks/nuts_lockstep.py path/to/airfoil.data``.
"""

import argparse
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bnnmcmc import likelihoods, priors, trees
from bnnmcmc.models.mlp import mlp
from bnnmcmc.placement import place, replicate, use_all_cores
from bnnmcmc.posterior import Posterior

# blackjax, and what uses it, is imported late: it wakes JAX, which must know its devices by then.

CHAINS, SIZE, STEP_SIZE = 256, 10, 0.3
HIDDEN = (16, 16, 16, 16)


def measure(
    data: Path,
    *,
    draws: int = 8000,
    regression_draws: int = 2000,
    mlp_draws: int = 50,
    max_depth: int = 7,
) -> dict:
    """Run the comparisons.

    Parameters
    ----------
    data : Path
        The airfoil table: five features and the target, separated by blanks.
    draws, regression_draws : int
        Draws per chain on the funnel and of the regression.
    mlp_draws : int
        Draws per chain of the MLP, after 100 warm-up steps.
    max_depth : int
        Largest tree depth for the MLP.

    Returns
    -------
    dict
        "funnel", "regression", "regression_large", "airfoil", "small_networks": draws per second
        over all chains, speedup by wall time and by CPU time, and the utilisation (gradients made /
        gradients possible, from the first tick to the last).
    """
    return {
        "funnel": side_by_side(funnel, (), draws),
        "regression": side_by_side(regression, regression_data(1000), regression_draws),
        "regression_large": side_by_side(regression, regression_data(10_000), regression_draws),
        "airfoil": measure_mlp(data, mlp_draws, max_depth),
        "small_networks": measure_mlp(
            data, 50, 8, chains=256, warmup=100, hidden=(8,), most_rows=300, mode="vmap"
        ),
    }


def funnel(x: jax.Array) -> jax.Array:
    v, rest = x[0], x[1:]
    return -0.5 * (v**2 + jnp.sum(rest**2) * jnp.exp(-v) + rest.shape[0] * v)


def regression(x: jax.Array, features: jax.Array, y: jax.Array) -> jax.Array:
    # Noise of this variance makes the information on a coefficient about that of its prior.
    return funnel(x) - 0.5 * jnp.sum((y - features @ x[1:]) ** 2) / len(y)


def regression_data(rows: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, SIZE - 1))
    y = features @ rng.normal(size=SIZE - 1) + np.sqrt(rows) * rng.normal(size=rows)
    return jnp.asarray(features, jnp.float32), jnp.asarray(y, jnp.float32)


def side_by_side(density, data: tuple, draws: int) -> dict:
    from bnnmcmc.samplers.nuts import nuts

    starts = 0.5 * jax.random.normal(jax.random.key(0), (CHAINS, SIZE))
    kernel = nuts(initial_step_size=STEP_SIZE)
    placement = place(CHAINS, mode="vmap")  # side by side on each device, as blackjax on its one
    ours = run_ours(density, kernel, starts, data, 0, draws, placement)
    reference = run_blackjax(density, starts, data, 0, draws, 10, STEP_SIZE)
    return {
        "chains": CHAINS,
        "draws": draws,
        "utilisation": ours["utilisation"],
        "lockstep_utilisation": reference["utilisation"],
        "gradients_per_draw": ours["gradients"] / (CHAINS * draws),
        "blackjax_gradients_per_draw": reference["gradients"] / (CHAINS * draws),
        "draws_per_second": CHAINS * draws / ours["seconds"],
        "blackjax_draws_per_second": CHAINS * draws / reference["seconds"],
        "speedup": reference["seconds"] / ours["seconds"],
        "speedup_cpu": reference["cpu_seconds"] / ours["cpu_seconds"],
    }


def measure_mlp(
    path: Path,
    draws: int,
    max_depth: int,
    chains: int = 10,
    warmup: int = 100,
    hidden: tuple[int, ...] = HIDDEN,
    most_rows: int | None = None,
    mode: Literal["map", "vmap"] | None = None,
) -> dict:
    from bnnmcmc.samplers.nuts import nuts

    table = np.loadtxt(path)
    table = (table - table.mean(0)) / table.std(0)
    rows = np.random.default_rng(0).permutation(len(table))[: round(0.8 * len(table))]
    rows = rows[:most_rows]
    x, y = (jnp.asarray(part, jnp.float32) for part in (table[rows, :-1], table[rows, -1:]))
    posterior = Posterior(
        mlp(x.shape[1], hidden, 2), likelihoods.gaussian(), priors.independent(priors.LeafPrior())
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

    kernel, data, placement = nuts(max_depth=max_depth), (x, y), place(chains, mode=mode)
    ours = run_ours(ours_density, kernel, starts, data, warmup, draws, placement)
    results = {
        "chains": chains,
        "warmup": warmup,
        "draws": draws,
        "max_depth": max_depth,
        "parameters": starts.shape[1],
        "placement": placement.describe(),
        "utilisation": ours["utilisation"],
        "gradients": ours["gradients"],
        "draws_per_second": chains * (warmup + draws) / ours["seconds"],
    }
    for name, density in (("blackjax", ours_density), ("blackjax_row_major", plain_density)):
        found = run_blackjax(density, starts, data, warmup, draws, max_depth, 0.01)
        results[f"{name}_utilisation"] = found["utilisation"]
        results[f"{name}_gradients"] = found["gradients"]
        results[f"{name}_draws_per_second"] = chains * (warmup + draws) / found["seconds"]
        results[f"{name}_speedup"] = found["seconds"] / ours["seconds"]
        results[f"{name}_speedup_cpu"] = found["cpu_seconds"] / ours["cpu_seconds"]
    return results


class Watch:
    """Wall seconds and CPU seconds of this process, since it was made."""

    def __init__(self):
        self.begun = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        wall, cpu = self.begun
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }


def run_ours(density, kernel, starts, data, warmup, draws, placement) -> dict:
    from bnnmcmc.sampling import build_program, finish_warmup, run_blocks, start_chains

    of = trees.layout(starts[0])
    program = build_program(density, kernel, of, placement, warmup=warmup, draws=draws, thin=1)
    data = replicate(data, placement)

    def run(last=None) -> dict:
        watch, carry = Watch(), start_chains(program, starts, 0, data)
        gradients, ticks = 0, 0
        for stage in ("warmup", "sampling"):
            if stage == "sampling":
                carry = finish_warmup(program, carry)
            records = {"warmup": program.warmup, "sampling": program.sampling}[stage].records
            end = min(records, last or records)
            for block in run_blocks(program, stage, carry, 0, data, last=end):
                carry = block.carry
                gradients += int(block.stats["gradients"].sum())
                ticks += 0 if block.ticks is None else int(block.ticks.sum())
        return {
            **watch.read(),
            "gradients": gradients,
            "utilisation": gradients / ticks if ticks else 1.0,
        }

    run(last=1)  # compiles
    return run()


def run_blackjax(density, starts, data, warmup, draws, max_depth, step_size) -> dict:
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
    watch = Watch()
    _, gradients = jax.block_until_ready(run(keys, starts, *data))
    taken = watch.read()
    gradients = np.asarray(gradients, np.int64)
    # In lockstep every draw takes as long as the chain with the longest trajectory.
    return {
        **taken,
        "gradients": int(gradients.sum()),
        "utilisation": gradients.sum() / (len(starts) * gradients.max(axis=0).sum()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="airfoil.data")
    parser.add_argument("--draws", type=int, default=8000, help="per chain, on the funnel")
    parser.add_argument("--regression-draws", type=int, default=2000)
    parser.add_argument("--mlp-draws", type=int, default=50)
    parser.add_argument("--max-depth", type=int, default=7, help="for the MLP")
    given = vars(parser.parse_args())
    use_all_cores()
    for part, found in measure(given.pop("data"), **given).items():
        print(part)
        for name, value in found.items():
            print(f"  {name:28}", f"{value:.4g}" if isinstance(value, float) else value)
