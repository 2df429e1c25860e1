"""Does a kernel keep the protocol? Asked of kernels that users bring, before any long work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.samplers.kernel import REDUCTIONS, Kernel, MinibatchKernel, RowTarget, Warmup


def check_kernel(kernel: Kernel | MinibatchKernel, size: int, num_warmup: int, called: str) -> None:
    """Trace a kernel's functions on a normal density and check what they return.

    Nothing is computed.

    Parameters
    ----------
    kernel : Kernel or MinibatchKernel
    size : int
        Number of parameters sampled.
    num_warmup : int
        Warm-up steps.
    called : str
        What messages call the kernel.

    Raises
    ------
    InputError
        Says which function failed, or which part of its result is not as `Kernel` or
        `MinibatchKernel` says.
    """

    def traced(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except InputError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise InputError(f"{called}: {what} failed: {type(error).__name__}: {error}") from error

    def made(what: str, function: Callable[..., Any]) -> Any:
        try:
            return function(num_warmup)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{called}: {what} failed: {type(error).__name__}: {error}") from error

    def normal(position):
        return -0.5 * jnp.sum(jnp.square(position))

    density: Any = normal
    step: Callable[..., Any]
    if isinstance(kernel, MinibatchKernel):
        batch_size = kernel.batch_size
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(
                f"{called}: found batch_size {batch_size!r}, expected a whole number, at least 1"
            )
        density = RowTarget(batch_size, normal, lambda position, batch: normal(position))
        step = made("sampling", kernel.sampling)
        if not callable(step):
            raise InputError(
                f"{called}: sampling returned a {type(step).__name__}, expected the function "
                "step(key, state, params, t, target)"
            )
    else:
        of_all_rows = kernel.step

        def step(key, state, params, t, density):
            return of_all_rows(key, state, params, density)

    key = jax.eval_shape(lambda: jax.random.key(0))
    position = jax.ShapeDtypeStruct((size,), jnp.result_type(float))
    count = jax.ShapeDtypeStruct((), jnp.int32)

    state = traced("init", lambda k, p: kernel.init(k, p, density), key, position)
    _check_state(state, position, called)
    rules = made("warmup", kernel.warmup)
    if not isinstance(rules, Warmup):
        raise InputError(
            f"{called}: warmup returned a {type(rules).__name__}, expected a "
            "bnnmcmc.Warmup(init, step, finish)"
        )
    adaptation = traced("the warm-up's init", rules.init, position)
    warmed = traced(
        "the warm-up's step",
        lambda k, s, a, t: rules.step(k, s, a, t, density),
        *(key, state, adaptation, count),
    )
    _check_tuple(warmed, 3, "the warm-up's step", "(state, adaptation, Info)", called)
    _check_same(warmed[0], state, "the warm-up's step", "state", called)
    _check_same(warmed[1], adaptation, "the warm-up's step", "adaptation", called)
    _check_info(warmed[2], "the warm-up's step", called)
    params = traced("the warm-up's finish", rules.finish, adaptation)
    stepped = traced(
        "step", lambda k, s, p, t: step(k, s, p, t, density), key, state, params, count
    )
    _check_tuple(stepped, 2, "step", "(state, Info)", called)
    _check_same(stepped[0], state, "step", "state", called)
    _check_info(stepped[1], "step", called)
    if (rules.in_use is None) != (rules.adapt is None):
        raise InputError(f"{called}: a Warmup has both of in_use and adapt, or neither")


def _check_state(state: Any, position: Any, called: str) -> None:
    fields = getattr(state, "_fields", ())
    missing = [name for name in ("position", "logdensity") if name not in fields]
    if missing:
        raise InputError(
            f"{called}: init returned a {type(state).__name__} without {' and '.join(missing)}, "
            "expected a NamedTuple with the fields position and logdensity"
        )
    for name, shape in (("position", position.shape), ("logdensity", ())):
        leaf = getattr(state, name)
        found = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if found != (shape, position.dtype):
            raise InputError(
                f"{called}: init returned {name} of shape {found[0]} and type {found[1]}, "
                f"expected {shape} and {position.dtype}"
            )


def _check_tuple(found: Any, length: int, what: str, expected: str, called: str) -> None:
    if not isinstance(found, tuple) or hasattr(found, "_fields") or len(found) != length:
        raise InputError(f"{called}: {what} returned a {type(found).__name__}, expected {expected}")


def _check_same(after: Any, before: Any, what: str, part: str, called: str) -> None:
    """Check that a part of the carry keeps its structure: it goes through a compiled loop."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (after, before)]
    if structures[0] != structures[1]:
        found, given = (", ".join(trees.leaf_names(tree)) for tree in (after, before))
        raise InputError(
            f"{called}: {what} returned a {part} of another structure than it was given: a "
            f"{type(after).__name__} with {found} for a {type(before).__name__} with {given}"
        )
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    for name, (new, old) in zip(trees.leaf_names(before), pairs, strict=True):
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise InputError(
                f"{called}: {what} returned {part}.{name} of shape {new.shape} and type "
                f"{new.dtype}, but was given {old.shape} and {old.dtype}"
            )


def _check_info(info: Any, what: str, called: str) -> None:
    fields = getattr(info, "_fields", ())
    if "log_density" not in fields:
        raise InputError(
            f"{called}: {what} returned statistics without log_density ({type(info).__name__}), "
            "expected a NamedTuple with at least the field log_density"
        )
    for name in fields:
        if name not in REDUCTIONS:
            raise InputError(
                f"{called}: {what} returned the statistic {name!r}; it must have one of the names "
                "in bnnmcmc.samplers.kernel.REDUCTIONS, which say how the values of several steps "
                f"become the value of a draw: {', '.join(REDUCTIONS)}"
            )
        shape = getattr(getattr(info, name), "shape", None)
        if shape != ():
            raise InputError(
                f"{called}: {what} returned the statistic {name} of shape {shape}, expected a "
                "scalar"
            )
