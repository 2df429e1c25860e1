"""The sampler is compiled in another thread, while the ensemble trains."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc.keys import stage_key
from bnnmcmc.placement import spread
from bnnmcmc.sampling import Program, departed, finish_warmup, start_chains

# In the order of their use.
FUNCTIONS = ("start", "warm", "finish", "draw")


class Shapes(NamedTuple):
    """What a sampler's functions take and return, as shapes (with the chain axis as on devices).

    Parameters
    ----------
    warmup, sampling : pytree
        The carry with which each stage begins.
    warmup_stats, sampling_stats : dict
        name -> statistics of a block.
    """

    warmup: Any
    warmup_stats: dict[str, jax.ShapeDtypeStruct]
    sampling: Any
    sampling_stats: dict[str, jax.ShapeDtypeStruct]


def trace(program: Program, data: tuple) -> tuple[Shapes, dict[str, Any]]:
    """Trace a sampler's functions with the shapes they will be called with; compute nothing.

    Parameters
    ----------
    program : Program
    data : tuple of arrays, or of shapes with shardings

    Returns
    -------
    Shapes
    dict
        Name of the function -> `jax.stages.Traced`.
    """
    placement = program.placement
    found: dict[str, Any] = {}
    positions = jnp.zeros((placement.chains, program.layout.size), jnp.result_type(float))
    chain_axis = spread(positions, placement).sharding

    def dry(name: str) -> Callable[..., Any]:
        def call(*arguments):
            found[name] = getattr(program, name).trace(*arguments)
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chain_axis),
                found[name].out_info,
            )

        return call

    dry_functions: dict[str, Any] = {name: dry(name) for name in (*FUNCTIONS, "depart")}
    shadow = program._replace(**dry_functions)
    none = np.int32(0)
    warmup = start_chains(shadow, positions, 0, data)
    warmed = shadow.warm(departed(shadow, warmup), stage_key(0, "warmup"), none, none, data)
    sampling = finish_warmup(shadow, warmup)
    drawn = shadow.draw(departed(shadow, sampling), stage_key(0, "sampling"), none, none, data)
    return Shapes(warmup, warmed[1][1], sampling, drawn[1][1]), found


class Ahead:
    """A sampler whose functions are compiled in a thread of its own, in the order of their use.

    The thread traces each function once and compiles it; a call waits for that, if need be, and
    then runs the very same program as without the thread. What goes wrong in the thread is raised
    by the first use of what it was to make.

    Parameters
    ----------
    program : Program
        As `build_program` returns it.
    data : tuple of arrays
        As it will be called with; only their shapes are kept.
    names : tuple of str
        The functions to compile; the others compile at their first call.
    """

    def __init__(self, program: Program, data: tuple, names: tuple[str, ...] = FUNCTIONS) -> None:
        self._shapes: Future[Shapes] = Future()
        self._seconds: dict[str, Future[float]] = {name: Future() for name in names}
        self._cancelled = False
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), data
        )
        # JAX's precision may be that of this thread alone.
        x64 = bool(jax.config.jax_enable_x64)
        waiting: dict[str, Any] = {
            name: _waiting(getattr(program, name), self._seconds[name]) for name in names
        }
        self.program = program._replace(**waiting)
        # Not a daemon: Python aborts if it ends while a thread of XLA's compiles.
        threading.Thread(
            target=self._work, args=(program, shapes, x64), name="compile-ahead"
        ).start()

    def _work(self, program: Program, data: tuple, x64: bool) -> None:
        try:
            with jax.enable_x64(x64):
                shapes, traced = trace(program, data)
                self._shapes.set_result(shapes)
                for name, future in self._seconds.items():
                    if self._cancelled:
                        break
                    with _cold_seconds() as seconds:
                        traced[name].lower().compile()
                    future.set_result(seconds())
        except Exception as error:
            if not self._shapes.done():
                self._shapes.set_exception(error)
            for future in self._seconds.values():
                if not future.done():
                    future.set_exception(error)
        for future in self._seconds.values():
            future.cancel()  # those that are not done

    @property
    def shapes(self) -> Shapes:
        """What the functions take and return; waits for the trace."""
        return self._shapes.result()

    @property
    def failed(self) -> bool:
        """Whether some function can no longer be called: it did not compile, or was cancelled."""
        done = [future for future in self._seconds.values() if future.done()]
        return self._cancelled or any(f.cancelled() or f.exception() is not None for f in done)

    def cancel(self) -> None:
        """Compile no more than what is being compiled; what is left can no longer be called."""
        self._cancelled = True

    def cold_seconds(self) -> float:
        """Return how long such functions compile if none is in the cache; waits for them."""
        return sum(future.result() for future in self._seconds.values())


def _waiting(jitted: Callable[..., Any], compiled: Future) -> Callable[..., Any]:
    def call(*arguments):
        compiled.result()
        return jitted(*arguments)

    return call


@contextmanager
def _cold_seconds() -> Iterator[Callable[[], float]]:
    """Measure a compilation in this thread, with what the cache on disk saved of it."""
    thread, saved, begun = threading.get_ident(), [0.0], time.monotonic()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/compile_time_saved_sec") and threading.get_ident() == thread:
            saved[0] += max(0.0, duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: time.monotonic() - begun + saved[0]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
