"""What a sampler's step costs beyond its gradients.

The steps run in the library's own block loop (scan, thinning, statistics, hand-over to the host);
their time per gradient stands over the time of a gradient alone, at the same number of chains.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.models.mlp import mlp
from bnnmcmc.placement import place, replicate
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.sampling import build_program, finish_warmup, run_blocks, start_chains
from experiments.benchmarks.gradients import (
    GPU_CHAINS,
    HIDDEN,
    library_gradients,
    posterior,
    start,
)
from experiments.benchmarks.settings import Settings, airfoil
from experiments.benchmarks.timing import count_for, summary, timed

THIN = 10


def measure(settings: Settings) -> dict[str, Any]:
    """Measure MCLMC and HMC steps over their gradients."""
    data = airfoil(settings)
    x, y = jnp.asarray(data["x"], jnp.float32), jnp.asarray(data["y"], jnp.float32)
    on_cpu = jax.devices()[0].platform == "cpu"
    hidden = (4, 4) if settings.quick else HIDDEN
    chains = (2,) if settings.quick else (1, 10, 64) if on_cpu else GPU_CHAINS
    of = posterior(mlp(x.shape[1], hidden, 2, "silu"))
    kernels = {
        "mclmc leapfrog": mclmc(),
        "mclmc minimal_norm": mclmc(integrator="minimal_norm"),
        "hmc, 30 leapfrogs": hmc(num_leapfrog=30, jitter=0.0),
    }
    rows = []
    for number in chains:
        for name, kernel in kernels.items():
            steps, alone = _per_gradient(of, kernel, number, x, y, settings)
            rows.append(
                {
                    "kernel": name,
                    "chains": number,
                    "microseconds_per_gradient": steps["seconds"] * 1e6,
                    "gradient_alone": alone["seconds"] * 1e6,
                    "over_gradient": steps["seconds"] / alone["seconds"],
                    "spread": steps["spread"],
                    "spread_alone": alone["spread"],
                }
            )
    return {"rows": rows, "thin": THIN, "device": jax.devices()[0].device_kind}


def _per_gradient(of, kernel, chains: int, x, y, settings: Settings):
    """Return seconds per gradient of one chain, all chains running: in blocks, and alone.

    Both are taken in turns, so that other work on the machine disturbs both alike.
    """
    placement = place(chains)
    positions = start(of, chains)
    layout = trees.layout(trees.first(positions))
    program = build_program(
        of.log_density, kernel, layout, placement, warmup=0, draws=100_000, thin=THIN
    )
    data = replicate((x, y), placement)
    carry = start_chains(program, trees.flatten_stacked(positions), 0, data)
    blocks = run_blocks(program, "sampling", finish_warmup(program, carry), 0, data)
    settled = 0.01 if settings.quick else 0.5  # blocks grow from one draw to about a second
    call = library_gradients(of, chains, x, y, placement)
    count = count_for(call, settled)
    in_blocks, alone, first = [], [], True
    for block in blocks:
        if not first and block.seconds >= settled:
            taken = np.sum(block.stats["gradients"], axis=1).mean()
            in_blocks.append(block.seconds / taken / chains)
            alone.append(timed(lambda: call(count)) / count / chains)
        first = False
        if len(in_blocks) == settings.repeats:
            break
    return summary(in_blocks), summary(alone)
