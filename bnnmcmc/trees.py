"""Pytrees of arrays: leaf names, flat vectors, stacking, finite checks."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bnnmcmc.errors import InputError


class Layout(NamedTuple):
    """How one position (a pytree of floating-point arrays) lies in a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    treedef: Any

    @property
    def size(self) -> int:
        """Number of scalars in one position."""
        return sum(int(np.prod(shape)) for shape in self.shapes)


def leaf_names(tree: Any) -> tuple[str, ...]:
    """Return the dotted path of every leaf, in flattening order.

    Examples
    --------
    >>> leaf_names({"layer0": {"bias": 0.0, "weight": 1.0}})
    ('layer0.bias', 'layer0.weight')
    """
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator=".") or "position" for path, _ in paths
    )


def layout(position: Any) -> Layout:
    """Return the layout of one position (no chain axis).

    Raises
    ------
    InputError
        Two leaves have the same dotted name, so their draws could not be told apart.
    """
    leaves, treedef = jax.tree.flatten(position)
    names = leaf_names(position)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"position: {len(twice)} names stand for more than one leaf, such as {twice[0]!r}; "
            "rename the keys of the tree so that their dotted paths differ"
        )
    return Layout(names, tuple(tuple(np.shape(leaf)) for leaf in leaves), treedef)


def split_flat(flat: Any, of: Layout) -> list[Any]:
    """Split ``(..., size)`` into one array ``(..., *leaf)`` per leaf, in the layout's order."""
    leaves, start = [], 0
    for shape in of.shapes:
        stop = start + int(np.prod(shape))
        leaves.append(flat[..., start:stop].reshape(flat.shape[:-1] + shape))
        start = stop
    return leaves


def chosen_leaves(patterns: Sequence[str], of: Layout) -> tuple[bool, ...] | None:
    """Return for every leaf whether one of the patterns is found in its name.

    Parameters
    ----------
    patterns : sequence of str
        Regular expressions (`re.search`), such as ``"bias"`` or ``"layer3|likelihood"``. None at
        all chooses every leaf.
    of : Layout

    Returns
    -------
    tuple of bool, or None
        None if every leaf is chosen.

    Raises
    ------
    InputError
        No regular expression, or one that is found in no name.
    """
    chosen = [False] * len(of.names)
    for pattern in patterns:
        try:
            found = [re.search(pattern, name) is not None for name in of.names]
        except re.error as error:
            raise InputError(
                f"sampler.leaves: {pattern!r} is no regular expression: {error}"
            ) from error
        if not any(found):
            raise InputError(
                f"sampler.leaves: {pattern!r} is found in no leaf's name; there are "
                f"{', '.join(of.names)}"
            )
        chosen = [a or b for a, b in zip(chosen, found, strict=True)]
    return None if all(chosen) or not patterns else tuple(chosen)


def chosen_size(chosen: Sequence[bool] | None, of: Layout) -> int:
    """Return the number of scalars in the chosen leaves (None: all)."""
    uses = [True] * len(of.shapes) if chosen is None else chosen
    return sum(int(np.prod(shape)) for shape, use in zip(of.shapes, uses, strict=True) if use)


def part(flat: Any, of: Layout, chosen: Sequence[bool]) -> Any:
    """Return the chosen leaves' part of ``(..., size)``, as one array."""
    xp = np if isinstance(flat, np.ndarray) else jnp
    pieces, start = [flat[..., :0]], 0
    for shape, use in zip(of.shapes, chosen, strict=True):
        stop = start + int(np.prod(shape))
        pieces += [flat[..., start:stop]] if use else []
        start = stop
    return xp.concatenate(pieces, axis=-1)


def join(free: Any, fixed: Any, of: Layout, chosen: Sequence[bool]) -> Any:
    """Return ``(..., size)`` from the part that is chosen and the part that is not."""
    xp = np if isinstance(free, np.ndarray) else jnp
    pieces, at = [], [0, 0]
    for shape, use in zip(of.shapes, chosen, strict=True):
        start = at[use]
        at[use] = stop = start + int(np.prod(shape))
        pieces.append((free if use else fixed)[..., start:stop])
    return xp.concatenate(pieces, axis=-1)


def unflatten(flat: Any, of: Layout) -> Any:
    """Turn ``(..., size)`` into the pytree with leaves ``(..., *leaf)``."""
    return jax.tree.unflatten(of.treedef, split_flat(flat, of))


def flatten_stacked(tree: Any, leading: int = 1) -> jax.Array:
    """Turn a pytree with leaves ``(*lead, *leaf)`` into one array ``(*lead, size)``.

    Parameters
    ----------
    tree : pytree
        Leaves share their first ``leading`` axes (chain, or chain and draw).
    leading : int
        Number of shared leading axes.

    Returns
    -------
    jax.Array
        ``(*lead, size)``, leaves in flattening order.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    lead = leaves[0].shape[:leading]
    return jnp.concatenate([leaf.reshape(*lead, -1) for leaf in leaves], axis=-1)


def unraveler(position: Any):
    """Return the function from a flat vector ``(size,)`` to one position, for use under jit."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.result_type(float)), position)
    return ravel_pytree(zeros)[1]


def first(tree: Any) -> Any:
    """Return the first element along the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def stack(trees: Sequence[Any]) -> Any:
    """Stack pytrees of equal structure along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def nonfinite_leaves(tree: Any) -> list[str]:
    """Return the names of the leaves that hold a NaN or an infinity."""
    return [
        name
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
        if not np.all(np.isfinite(np.asarray(leaf)))
    ]
