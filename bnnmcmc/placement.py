"""Which chain runs where: devices, sharding, one by one or side by side."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bnnmcmc.errors import InputError

AXIS = "chain"
# Name of the axis of chains that advance together, inside of `over_chains`.
TOGETHER = "together"

# LLVM's higher levels make loops no faster here, and take up to four times as long to compile what
# draws random numbers.
QUICK = {"xla_backend_optimization_level": 1}
# Half of XLA's CPU code is activations and random numbers, which whole AVX-512 registers halve
# where there are any; elsewhere the option has no effect.
COMPILER_OPTIONS = {**QUICK, "xla_cpu_prefer_vector_width": "512"}


@dataclass(frozen=True)
class Placement:
    """How chains are spread.

    Parameters
    ----------
    chains : int
        Number of chains asked for.
    devices : tuple of jax.Device
        The chain axis is split evenly over them; the last shares are filled up with copies of
        the last chain, whose results are discarded.
    mode : "map" or "vmap"
        On each device, run groups of chains one after the other, or all chains side by side.
    group : int
        In mode "map", how many chains advance together; the last group is filled up too.
    first : int
        Number of the first of these chains, where other processes hold those before it.
    room : int
        Make the chain axis as long as for this many chains, so that a process with fewer chains
        than others compiles the same program.
    row_chunk : int, optional
        How many rows of the data go through the network at a time (`Posterior`); all if not given.
    reason : str
        How it was chosen, in a few words.
    """

    chains: int
    devices: tuple[Any, ...]
    mode: Literal["map", "vmap"]
    group: int = 1
    first: int = 0
    room: int = 0
    row_chunk: int | None = None
    reason: str = field(default="", compare=False)

    @property
    def padded(self) -> int:
        """Length of the chain axis on the devices."""
        return -(-self._per_device // self.batch) * self.batch * len(self.devices)

    @property
    def batch(self) -> int:
        """How many chains advance together on one device."""
        return self._per_device if self.mode == "vmap" else min(self.group, self._per_device)

    @property
    def together(self) -> bool:
        """Whether chains advance side by side, and not each in a program of its own."""
        return self.mode == "vmap" or self.group > 1

    @property
    def _per_device(self) -> int:
        return -(-max(self.chains, self.room) // len(self.devices))

    def describe(self) -> str:
        """Say it in words, for the summary."""
        kinds = sorted({d.device_kind for d in self.devices})
        n = len(self.devices)
        platform = {"cpu": "CPU core", "gpu": "GPU"}.get(self.devices[0].platform, "device")
        per = -(-self.chains // n)
        how = "side by side" if self.mode == "vmap" else "one after the other"
        if self.mode == "map" and self.group > 1:
            how = f"in groups of {self.group}"
        plural = "s" if n > 1 else ""
        name = "" if platform == "CPU core" else f" ({', '.join(kinds)})"
        chains = "1 chain" if self.chains == 1 else f"{self.chains} chains"
        each = f"{per} each" if self.chains % n == 0 else f"up to {per} each"
        rows = f", rows in chunks of {self.row_chunk}" if self.row_chunk else ""
        return f"{chains} on {n} {platform}{plural}{name}, {each}, {how}{rows}"

    @property
    def for_training(self) -> "Placement":
        """Where the ensemble trains: on CPUs one member after the other.

        In groups of 4 to 16 an epoch is a quarter faster (airfoil and diabetes, two cores), but a
        group goes on until its last member stops, which costs as much.
        """
        alone = self.devices[0].platform == "cpu" and self.mode == "map"
        return replace(self, group=1) if alone else self


def use_all_cores(cores: int | None = None) -> None:
    """Make every CPU core a JAX device. To be called before JAX is first used.

    Parameters
    ----------
    cores : int
        Number of CPU devices; the cores this process may use if not given.

    Raises
    ------
    RuntimeError
        JAX is in use already, with another number of CPU devices.
    """
    count = cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    jax.config.update("jax_num_cpu_devices", count)


def use_cores_if_new() -> None:
    """Make every CPU core a JAX device, unless JAX is in use already or was told how many."""
    if jax.config.jax_num_cpu_devices == -1:
        with suppress(RuntimeError):
            use_all_cores()


def use_gpus(indices: list[int]) -> None:
    """Let JAX see only these of the visible GPUs. To be called before JAX is first used."""
    jax.config.update("jax_cuda_visible_devices", ",".join(map(str, indices)))


def use_precision(precision: Literal["float32", "float64"]) -> None:
    """Compute in this precision from now on. To be called before anything else is made."""
    jax.config.update("jax_enable_x64", precision == "float64")


def place(
    chains: int,
    devices: Sequence[Any] | None = None,
    mode: Literal["map", "vmap"] | None = None,
    group: int = 1,
) -> Placement:
    """Choose where chains run.

    Parameters
    ----------
    chains : int
        Number of chains.
    devices : sequence of jax.Device
        All devices of the default backend if not given; never more than there are chains.
    mode : "map" or "vmap"
        "map" on CPUs (a chain's working set stays in cache and no chain waits for another's
        longer trajectory), "vmap" elsewhere, if not given.
    group : int
        See `Placement`.

    Returns
    -------
    Placement

    Raises
    ------
    InputError
        No chains, no devices, an unknown mode, or a group below one.
    """
    if chains < 1:
        raise InputError(f"chains: found {chains}, expected at least 1")
    if mode not in (None, "map", "vmap"):
        raise InputError(f"mode: found {mode!r}, expected 'map' or 'vmap'")
    if group < 1:
        raise InputError(f"group: found {group}, expected at least 1")
    found = tuple(devices if devices is not None else jax.devices())
    if not found:
        raise InputError("devices: found none, expected at least one")
    used = found[: min(chains, len(found))]
    chosen = mode or ("map" if used[0].platform == "cpu" else "vmap")
    return Placement(chains, used, chosen, group)


def over_chains(function: Callable[..., Any], placement: Placement, donate: bool = False) -> Any:
    """Compile ``function(chain_values, *shared)`` so that it runs for all chains.

    Parameters
    ----------
    function : callable
        Acts on one chain: a pytree without chain axis, and shared arguments (data, keys, counts).
        Chains that advance together are vectorised over an axis named ``TOGETHER``.
    placement : Placement
    donate : bool
        Give the buffers of the chain values away to the result.

    Returns
    -------
    callable
        Compiled; takes and returns pytrees with leading axis ``placement.padded``, as made by
        `spread`. A result can be the next call's argument without another compilation.
    """
    mesh = _mesh(placement)
    function = _fenced(function)

    def on_device(chain_values, *shared):
        def alone(one):
            return function(one, *shared)

        if not placement.together:
            return jax.lax.map(alone, chain_values)
        side_by_side = jax.vmap(alone, axis_name=TOGETHER)
        if placement.mode == "vmap":
            return side_by_side(chain_values)
        groups = jax.tree.map(
            # Sizes in full: of an empty array, a -1 would be anything.
            lambda leaf: leaf.reshape(
                len(leaf) // placement.batch, placement.batch, *leaf.shape[1:]
            ),
            chain_values,
        )
        result = jax.lax.map(side_by_side, groups)
        return jax.tree.map(
            lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), result
        )

    def sharded(chain_values, *shared):
        result = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P(AXIS), *(P() for _ in shared)),
            out_specs=P(AXIS),
            check_vma=False,
        )(chain_values, *shared)
        # A weakly typed result (from a Python scalar) would be another type to the next call.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), result)

    return jax.jit(
        sharded, donate_argnums=(0,) if donate else (), compiler_options=COMPILER_OPTIONS
    )


def _fenced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep XLA from fusing a function with what is around it.

    How that is done depends on the number of devices, and with it the rounding.
    """

    def fenced(chain_values, *shared):
        chain_values, shared = jax.lax.optimization_barrier((chain_values, shared))
        return jax.lax.optimization_barrier(function(chain_values, *shared))

    return fenced


def spread(tree: Any, placement: Placement) -> Any:
    """Put a pytree with leading axis ``chains`` on the devices, filled up to ``padded``."""
    extra = placement.padded - placement.chains
    sharding = NamedSharding(_mesh(placement), P(AXIS))

    def put(leaf):
        # NumPy for what is on the host: JAX would compile a concatenation for every shape.
        xp = np if isinstance(leaf, np.ndarray) else jnp
        if extra:
            leaf = xp.concatenate([leaf, xp.repeat(leaf[-1:], extra, axis=0)])
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree)


def replicate(tree: Any, placement: Placement) -> Any:
    """Put a copy of every array on every device."""
    sharding = NamedSharding(_mesh(placement), P())
    return jax.tree.map(lambda leaf: jax.device_put(jnp.asarray(leaf), sharding), tree)


def indices(placement: Placement) -> jax.Array:
    """Return the numbers of the chains, which their keys depend on, on the devices (``padded``)."""
    numbers = np.arange(placement.first, placement.first + placement.chains, dtype=np.int32)
    return spread(numbers, placement)


def gather(tree: Any, placement: Placement) -> Any:
    """Bring a pytree with leading axis ``padded`` to the host, ``chains`` entries long."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: placement.chains], tree)


def _mesh(placement: Placement) -> Mesh:
    return Mesh(np.array(placement.devices), (AXIS,), axis_types=(AxisType.Auto,))
