"""The most the machine can do: matrix products, and copies in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc.placement import over_chains, place, spread
from experiments.benchmarks.timing import repeated

# On a GPU, float32 products may run in reduced precision: each kind has its own ceiling.
PRECISIONS = {
    "float32": (jnp.float32, jax.lax.Precision.HIGHEST),
    "tf32": (jnp.float32, jax.lax.DotAlgorithmPreset.TF32_TF32_F32),
    "bf16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),
}


def gemm_peak(repeats: int, quick: bool = False) -> dict[str, Any]:
    """Return the GFLOP/s of a large product of square matrices.

    On CPUs through JAX (one product spread over all cores, and one per core at a time) and NumPy's
    BLAS, float32; the largest counts. On a GPU in float32, TF32 and bf16; float32 counts.

    Returns
    -------
    dict
        "gflops" by kind, "peak" of float32, "size" of the matrices.
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    sizes = (128,) if quick else (2048, 4096) if on_cpu else (8192, 16384)
    found: dict[str, float] = {}

    def rate(kind: str, product: Callable[..., Any], a: Any, products: int = 1) -> None:
        def call():
            jax.block_until_ready(product(a, a))

        call()
        seconds = repeated(call, repeats)["seconds"]
        found[kind] = max(found.get(kind, 0.0), products * 2 * a.shape[-1] ** 3 / seconds / 1e9)

    for n in sizes:
        for kind in ("float32",) if on_cpu else tuple(PRECISIONS):
            dtype, precision = PRECISIONS[kind]
            a = jax.random.normal(jax.random.key(0), (n, n), dtype)
            rate(f"jax {kind}", jax.jit(functools.partial(jnp.matmul, precision=precision)), a)
        if on_cpu:
            placement = place(len(jax.devices()), mode="vmap")
            each = over_chains(lambda a: a @ a, placement)
            stack = spread(jnp.stack([a] * placement.chains), placement)
            rate("jax float32, one product per core", lambda a, _, f=each: f(a), stack, len(stack))
            rate("numpy float32", np.matmul, np.asarray(a))
    peak = max(value for kind, value in found.items() if "float32" in kind)
    return {"gflops": found, "peak": peak, "sizes": list(sizes)}


def copy_bandwidth(repeats: int, quick: bool = False) -> float:
    """Return GB/s of a large copy on one device, bytes read plus bytes written."""
    count = 2**16 if quick else 2**28
    values = jnp.zeros(count, jnp.float32)
    copy = jax.jit(lambda v: v + 1.0)
    copy(values).block_until_ready()
    seconds = repeated(lambda: copy(values).block_until_ready(), repeats)["seconds"]
    return 2 * values.nbytes / seconds / 1e9
