"""How many chains advance together, and how many rows go through the network at a time.

A rule from the sizes of the problem and of the caches (or a GPU's memory) chooses; on CPUs a quick
measurement can overrule it. The same machine should make the same choice each time, for equal
seeds give equal draws only with equal choices: rounding differs, and grows along a chain.

The rule for CPUs rests on these measurements: microseconds of CPU time of a gradient per chain, the
least of many turns, silu MLPs in float32, 1 MB of second-level cache and 32 MB of third-level
cache for two cores. Bytes are those of `activation_bytes`. Groups of chains, all rows at once:

======  ======  =======  ====  ====  ====  ====  ====
rows    hidden  bytes    1     2     4     8     16
======  ======  =======  ====  ====  ====  ====  ====
60      2 x 8   0.01 MB  3.7   2.6   1.8   1.6   1.5
300     1 x 4   0.03 MB  4.2   3.5   2.6   4.1   7.0
1200    1 x 4   0.09 MB  8.9   7.7   17.8  18.6  18.6
300     2 x 16  0.11 MB  11.8  13.0  11.9  13.1  15.9
300     2 x 64  0.39 MB  63    74    71    75    81
1200    4 x 16  0.69 MB  85    94    101   106   111
4000    3 x 16  1.82 MB  264   286   299   358   423
======  ======  =======  ====  ====  ====  ====  ====

So groups pay for tiny problems only, where an operation costs more to begin than to do. Steps of
MCLMC show the same (60 rows: 7.5, 6.2, 4.6, 3.9, 3.8). One chain at a time, rows in chunks:

======  ======  =======  =====  ====  ====  ====  ====
rows    hidden  bytes    whole  64    128   256   512
======  ======  =======  =====  ====  ====  ====  ====
4000    3 x 32  3.5 MB   540                      503
14000   3 x 16  6.4 MB   1170   1658  1178  916   800
14000   3 x 32  12 MB    2352   2706  2076  1840  1801
20000   2 x 64  25 MB    6282   5599  5015  4705  4699
======  ======  =======  =====  ====  ====  ====  ====
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.placement import Placement, over_chains, place, replicate, spread
from bnnmcmc.posterior import Posterior, activation_bytes, position_shapes

# On CPUs a group's activations take at most this part of the second-level cache.
GROUP_SHARE, MAX_GROUP = 1 / 8, 16
# Rows go in chunks if a chain's activations take more than this part of a core's third-level cache
# (and twice the second-level cache); a chunk's then take at most half of the second-level cache.
WHOLE_SHARE, CHUNK_SHARE = 1 / 4, 1 / 2
MIN_CHUNK, MAX_CHUNK = 128, 512
# Where the operating system does not say how large the caches are.
UNKNOWN_CACHE = 2**20
# Of the memory of a GPU that JAX manages, chains at work and at rest get this part.
GPU_SHARE = 0.5
UNKNOWN_GPU = 8 * 2**30
# So many chains keep a GPU busy: below, rows in chunks are better than fewer chains.
BUSY_CHAINS = 64
# A measurement overrules the rule if the other candidate is faster by this factor. It costs about
# half a second, most of it compiling, so it is made only if sampling will take this many seconds.
CLEAR_GAIN, WORTH_MEASURING = 1.2, 20.0
# Cost of a gradient on one core, for that estimate alone: a start, and bytes per second.
GRADIENT_SECONDS, BYTES_PER_SECOND = 5e-6, 8e9
MEASURING_SECONDS = 0.2
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Fast(NamedTuple):
    """The memory that a chain at work should fit into, in bytes.

    Parameters
    ----------
    near : int
        Second-level cache of a CPU core; all memory that JAX manages on a GPU.
    far : int
        A core's part of the third-level cache (0 without one); not used on a GPU.
    """

    near: int
    far: int = 0


def choose(
    chains: int,
    rows: int,
    activations: int,
    *,
    chain_bytes: int = 0,
    devices: Sequence[Any] | None = None,
    mode: Literal["map", "vmap"] | None = None,
    group: int | None = None,
    row_chunk: int | None = None,
    fast: Fast | None = None,
) -> Placement:
    """Choose a placement by rule; nothing is measured.

    On CPUs chains are mapped, tiny ones in groups, and rows go in chunks if the activations of one
    chain leave the cache. On GPUs, all chains of a device advance side by side; in batches, if
    they do not fit into its memory; with rows in chunks, if no batch fits that keeps it busy.

    Parameters
    ----------
    chains, rows : int
    activations : int
        Bytes that the gradient of one chain keeps (`activation_bytes`).
    chain_bytes : int
        Bytes of a chain's state; on a GPU they lie beside the batch at work.
    devices : sequence of jax.Device, optional
        All devices of the default backend if not given.
    mode, group, row_chunk : optional
        What is set by hand stays as it is. A ``row_chunk`` of at least ``rows`` means all at once.
    fast : Fast, optional
        Asked for if not given.

    Returns
    -------
    Placement
        With ``row_chunk``, and the reason in words.

    Raises
    ------
    InputError
        As `place`, or a chunk below one row.
    """
    if row_chunk is not None and row_chunk < 1:
        raise InputError(f"row_chunk: found {row_chunk}, expected at least 1")
    used = place(chains, devices, mode, group or 1).devices
    cpu, per_device = used[0].platform == "cpu", -(-chains // len(used))
    fast = fast or (caches(len(used)) if cpu else Fast(gpu_bytes(used[0])))
    by_hand = (mode == "vmap" or group) and row_chunk
    mode = "map" if group else mode
    # Chains that will be at work on a device at once, if that is settled already.
    settled = per_device if mode == "vmap" else group and min(group, per_device)
    per_row = max(1, activations // max(rows, 1))
    if cpu:
        whole = max(WHOLE_SHARE * fast.far, 2 * fast.near)
        room, least, most_rows = CHUNK_SHARE * fast.near, 1, MAX_CHUNK
    else:
        whole = room = max(1.0, GPU_SHARE * fast.near - per_device * chain_bytes)
        least, most_rows = min(BUSY_CHAINS, per_device), rows
    if row_chunk is None:
        row_chunk, together = rows, settled or least
        if together * activations > whole:
            fitting = int(room / (together * per_row))
            row_chunk = int(np.clip(_power_below(fitting), MIN_CHUNK, max(MIN_CHUNK, most_rows)))
    row_chunk = min(row_chunk, rows)
    at_work = per_row * row_chunk
    grouped = min(MAX_GROUP, GROUP_SHARE * fast.near / at_work)
    batch = int(np.clip(grouped if cpu else whole / at_work, 1, per_device))
    if mode is None:
        mode = "map" if cpu or batch < per_device else "vmap"
    if mode == "vmap":
        group = 1
    elif not group:
        # As even as can be: the last group would be filled up with copies.
        group = -(-per_device // -(-per_device // batch))
    sizes = f"caches of {fast.near / 2**20:.3g} and {fast.far / 2**20:.3g} MB a core"
    reason = f"chosen by {sizes if cpu else f'{fast.near / 2**30:.3g} GB of GPU memory'}"
    return Placement(
        chains,
        used,
        mode,
        group,
        row_chunk=row_chunk if row_chunk < rows else None,
        reason="as set in [run]" if by_hand else reason,
    )


def _power_below(value: int) -> int:
    return 1 << max(0, value.bit_length() - 1)


def caches(cores: int) -> Fast:
    """Return the caches of a core, with ``cores`` of them at work.

    The third-level cache is divided among those that share it. One megabyte of second-level cache
    is assumed, and none of the third level, where the operating system does not say (Linux does).
    """
    sizes: dict[int, tuple[int, int]] = {}
    for path in CPU_CACHES.glob("index*"):
        try:
            if (path / "type").read_text().strip() == "Instruction":
                continue
            text = (path / "size").read_text().strip()
            size = int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
            shared = _count_cpus((path / "shared_cpu_list").read_text())
            sizes[int((path / "level").read_text())] = size, shared
        except (OSError, ValueError):
            continue
    third, sharing = sizes.get(3, (0, 1))
    return Fast(sizes.get(2, (UNKNOWN_CACHE, 1))[0], third // min(cores, sharing))


def _count_cpus(text: str) -> int:
    """Count the CPUs of a list such as ``0-3,8``."""
    ranges = [part.partition("-") for part in text.strip().split(",")]
    return sum(int(high or low) - int(low) + 1 for low, _, high in ranges)


def gpu_bytes(device: Any) -> int:
    """Return the bytes of a device that JAX manages; 8 GiB if it does not say."""
    return int((device.memory_stats() or {}).get("bytes_limit", UNKNOWN_GPU))


def calibrate(posterior: Posterior, x: Any, y: Any, placement: Placement, steps: int) -> Placement:
    """Let a measurement overrule the rule where that is clearly wrong; on CPUs.

    The rule's choice and the plain one (a chain at a time, all rows at once) take gradients in
    turns, on all devices. The plain one wins if it is faster by more than 20 %: timings are noisy,
    and the choice should be the same the next time.

    Parameters
    ----------
    posterior : Posterior
    x, y : arrays
        The rows that will be sampled on.
    placement : Placement
        From `choose`.
    steps : int
        Gradients that every chain will take, at least. Nothing is measured if there is no long
        work ahead, or if the rule's choice is the plain one.

    Returns
    -------
    Placement
        The one to use.
    """
    devices, group, chunk = placement.devices, placement.group, placement.row_chunk
    one = GRADIENT_SECONDS + activation_bytes(posterior, x, y) / BYTES_PER_SECOND
    expected = steps * one * -(-placement.chains // len(devices))
    plain = placement.mode == "vmap" or (group == 1 and chunk is None)
    if devices[0].platform != "cpu" or plain or expected < WORTH_MEASURING:
        return placement
    some = replace(placement, chains=group * len(devices))
    ruled = _walker(replace(posterior, row_chunk=chunk), x, y, some)
    other = _walker(replace(posterior, row_chunk=None), x, y, replace(some, group=1))
    best, counts, until = [np.inf, np.inf], [1, 1], time.monotonic() + MEASURING_SECONDS
    while time.monotonic() < until or np.inf in best:
        for i, walk in enumerate((ruled, other)):
            begun = time.monotonic()
            walk(counts[i])
            seconds = time.monotonic() - begun
            best[i] = min(best[i], seconds / counts[i])
            # Other work disturbs the fastest of many short turns least.
            counts[i] = int(np.clip(counts[i] * 0.01 / seconds, 1, 1000))
    micros = [1e6 * value / group for value in best]
    found = f"{micros[0]:.3g} us a gradient, {micros[1]:.3g} us one by one"
    if best[0] > CLEAR_GAIN * best[1]:
        return replace(placement, group=1, row_chunk=None, reason=f"measured: {found}")
    return replace(placement, reason=f"{placement.reason}; measured: {found}")


def _walker(posterior: Posterior, x, y, placement: Placement) -> Callable[[int], None]:
    """Return what takes so many gradients of all chains; it is compiled already."""
    of = trees.layout(position_shapes(posterior))
    data = replicate((x, y), placement)
    # Small weights: no activation saturates, whatever the network.
    flat = spread(np.full((placement.chains, of.size), 0.1, jnp.result_type(float)), placement)
    compiled = gradient_walk(posterior, of, placement)

    def walk(count: int) -> None:
        jax.block_until_ready(compiled(flat, np.int32(count), *data))

    walk(1)
    return walk


def gradient_walk(posterior: Posterior, of: trees.Layout, placement: Placement) -> Callable:
    """Compile ``walk(flat, count, x, y)``: ``count`` gradients of every chain, one after another.

    Parameters
    ----------
    posterior : Posterior
    of : trees.Layout
        Of one position.
    placement : Placement

    Returns
    -------
    callable
        Takes positions (chain, size) as made by `spread`, and returns others.
    """

    def walk(flat, count, x, y):
        unravel = trees.unraveler(trees.unflatten(jnp.zeros((of.size,)), of))
        density = jax.value_and_grad(lambda flat: posterior.log_density(unravel(flat), x, y))

        def step(_, inner):
            # Each gradient feeds the next, and each value the result, so that none is left out.
            flat, total = inner
            value, gradient = density(flat)
            return flat + 1e-9 * gradient, total + value

        flat, total = jax.lax.fori_loop(0, count, step, (flat, jnp.zeros(())))
        return flat, total

    return over_chains(walk, placement)
