"""Throughput of the gradient of the ensemble's log-density, over the GEMM peak.

Airfoil, MLP 5-16-16-16-16-2, the rows sampled on, Gaussian likelihood with predicted scale, N(0, 1)
prior. Counted are the floating-point operations of matrix products only: 2 x rows x weights
forward, the same again for the weights' gradients, and the same less the first layer's for the
gradients of layers' inputs. Activations, likelihood and prior are work too, but not counted, so
the share of the peak is a lower bound of what the processor does.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bnnmcmc import trees
from bnnmcmc.likelihoods import gaussian
from bnnmcmc.models.mlp import ACTIVATIONS, mlp
from bnnmcmc.models.network import Network
from bnnmcmc.placement import Placement, over_chains, place, replicate, spread
from bnnmcmc.posterior import Posterior
from bnnmcmc.priors import normal
from experiments.benchmarks.ceiling import copy_bandwidth, gemm_peak
from experiments.benchmarks.settings import Settings, airfoil
from experiments.benchmarks.timing import count_for, in_turns

HIDDEN = (16, 16, 16, 16)
CPU_CHAINS, GPU_CHAINS = (1, 10, 64, 256), (1, 10, 64, 256, 1000, 10_000)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure gradients per activation and number of chains, beside a vmapped row-major MLP."""
    data = airfoil(settings)
    x, y = jnp.asarray(data["x"], jnp.float32), jnp.asarray(data["y"], jnp.float32)
    on_cpu = jax.devices()[0].platform == "cpu"
    hidden = (4, 4) if settings.quick else HIDDEN
    chains = (1, 3) if settings.quick else CPU_CHAINS if on_cpu else GPU_CHAINS
    # Many short repeats: the least of them finds a quiet moment on a busy machine.
    wanted, repeats = (0.01, 1) if settings.quick else (0.1, 5 * settings.repeats)
    peak = gemm_peak(settings.repeats, settings.quick)
    flops = gradient_flops(len(x), (x.shape[1], *hidden, 2))
    rows = []
    for activation in ("silu",) if settings.quick else ("silu", "relu", "tanh"):
        ours = posterior(mlp(x.shape[1], hidden, 2, activation))
        plain = posterior(row_major_mlp((x.shape[1], *hidden, 2), activation))
        for number in chains:
            calls = {
                "ours": library_gradients(ours, number, x, y),
                "vmap row-major": vmapped_gradients(plain, number, x, y),
                # On CPUs a vmap uses the cores only within its products: spread it over them too.
                "vmap row-major, sharded": sharded_gradients(plain, number, x, y),
            }
            counts = {name: count_for(call, wanted) for name, call in calls.items()}
            taken = in_turns(
                {name: functools.partial(call, counts[name]) for name, call in calls.items()},
                repeats,
            )
            rates = {
                name: (flops * number * counts[name] / each["seconds"] / 1e9, each["spread"])
                for name, each in taken.items()
            }
            beside = max(rates["vmap row-major"][0], rates["vmap row-major, sharded"][0])
            rows.append(
                {
                    "activation": activation,
                    "chains": number,
                    "gflops": rates["ours"][0],
                    "spread": rates["ours"][1],
                    "vmap_gflops": rates["vmap row-major"][0],
                    "vmap_sharded_gflops": rates["vmap row-major, sharded"][0],
                    "over_vmap": rates["ours"][0] / beside,
                    "microseconds_per_gradient": flops / rates["ours"][0] / 1e3,
                }
            )
    # Once more: on a machine that is disturbed one of both may be too small.
    again = gemm_peak(settings.repeats, settings.quick)
    peak = max(peak, again, key=lambda found: found["peak"])
    for row in rows:
        row["of_peak"] = row["gflops"] / peak["peak"]
    return {
        "rows": rows,
        "gemm_peak_gflops": peak["peak"],
        "peak": peak,
        "copy_gb_per_second": copy_bandwidth(settings.repeats, settings.quick),
        "flops_per_gradient": flops,
        "data_rows": len(x),
        "layers": [x.shape[1], *hidden, 2],
        "placement": place(max(chains)).describe(),
        "device": jax.devices()[0].device_kind,
    }


def gradient_flops(rows: int, sizes: tuple[int, ...]) -> int:
    """Return the matrix-product operations of one gradient (see the module's docstring)."""
    weights = [a * b for a, b in itertools.pairwise(sizes)]
    return 2 * rows * (3 * sum(weights) - weights[0])


def posterior(network: Network) -> Posterior:
    """Return the posterior with the Gaussian likelihood and the N(0, 1) prior."""
    return Posterior(network, gaussian(), normal())


def row_major_mlp(sizes: tuple[int, ...], activation: str) -> Network:
    """Build the MLP as most people write it: activations (rows, width), ``h @ W``."""
    phi = ACTIVATIONS[activation]

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"bias": jnp.zeros(b), "weight": jax.random.normal(k, (a, b)) / jnp.sqrt(a)}
            for (a, b), k in zip(itertools.pairwise(sizes), keys, strict=True)
        ]

    def apply(params, x):
        h = x
        for layer in params[:-1]:
            h = phi(h @ layer["weight"] + layer["bias"])
        return h @ params[-1]["weight"] + params[-1]["bias"]

    return Network(init, apply)


def chain_of_gradients(log_density: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return ``f(position, count, x, y)``: so many gradients in a row, each at a new position."""

    def chain(position, count, x, y):
        def one(_, carry):
            position, total = carry
            value, gradient = jax.value_and_grad(log_density)(position, x, y)
            position = jax.tree.map(lambda p, g: p + 1e-9 * g, position, gradient)
            return position, total + value

        return jax.lax.fori_loop(0, count, one, (position, jnp.zeros(())))

    return chain


def start(of: Posterior, chains: int) -> Any:
    """Return start positions (chain, *leaf)."""
    return jax.vmap(of.init)(jax.random.split(jax.random.key(0), chains))


def library_gradients(of: Posterior, chains: int, x, y, placement: Placement | None = None):
    """Return ``f(count)`` for gradients as samplers take them: flat positions, placed chains."""
    placement = placement or place(chains)
    positions = start(of, chains)
    unravel = trees.unraveler(trees.first(positions))
    compiled = over_chains(
        chain_of_gradients(lambda flat, x, y: of.log_density(unravel(flat), x, y)), placement
    )
    flat = spread(trees.flatten_stacked(positions), placement)
    shared = replicate((x, y), placement)
    return lambda count: jax.block_until_ready(compiled(flat, jnp.int32(count), *shared))


def vmapped_gradients(of: Posterior, chains: int, x, y):
    """Return ``f(count)`` for a plain ``jax.vmap`` over chains on one device."""
    compiled = jax.jit(jax.vmap(chain_of_gradients(of.log_density), (0, None, None, None)))
    positions = start(of, chains)
    return lambda count: jax.block_until_ready(compiled(positions, jnp.int32(count), x, y))


def sharded_gradients(of: Posterior, chains: int, x, y):
    """Return ``f(count)`` for a vmap on every device, chains spread over the devices."""
    placement = place(chains, mode="vmap")
    compiled = over_chains(chain_of_gradients(of.log_density), placement)
    positions = spread(start(of, chains), placement)
    shared = replicate((x, y), placement)
    return lambda count: jax.block_until_ready(compiled(positions, jnp.int32(count), *shared))
