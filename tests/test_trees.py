from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnmcmc import trees
from bnnmcmc.errors import InputError


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


def tree(*lead):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return rng.normal(size=(*lead, *shape)).astype(np.float32)

    return {
        "net": [{"weight": leaf(2, 3), "bias": leaf(3)}, {"weight": leaf(3, 1)}],
        "pair": Pair(leaf(), leaf(2, 1, 2)),
    }


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_names_are_dotted_paths_in_flattening_order():
    assert trees.leaf_names(tree()) == (
        "net.0.bias",
        "net.0.weight",
        "net.1.weight",
        "pair.left",
        "pair.right",
    )
    assert trees.leaf_names(np.zeros(3)) == ("position",)


def test_layout_holds_shapes_and_size():
    of = trees.layout(tree())
    assert of.shapes == ((3,), (2, 3), (3, 1), (), (2, 1, 2))
    assert of.size == 3 + 6 + 3 + 1 + 4
    assert hash(of) == hash(trees.layout(tree()))


def test_equal_names_are_refused():
    with pytest.raises(InputError, match=r"position: 1 names stand for more .* such as 'a\.b'"):
        trees.layout({"a": {"b": 1.0}, "a.b": 2.0})


@pytest.mark.parametrize("lead", [(), (4,), (4, 5)])
def test_flatten_and_unflatten_are_inverse(lead):
    whole, of = tree(*lead), trees.layout(tree())
    flat = trees.flatten_stacked(whole, leading=len(lead))
    assert flat.shape == (*lead, of.size)
    assert_same(trees.unflatten(flat, of), whole)
    assert_same(trees.unflatten(np.asarray(flat), of), whole)  # on the host too


def test_flat_order_is_that_of_names_and_of_unraveler():
    one, of = tree(), trees.layout(tree())
    flat = trees.flatten_stacked(one, leading=0)
    for leaf, part in zip(jax.tree.leaves(one), trees.split_flat(flat, of), strict=True):
        np.testing.assert_array_equal(leaf, part)
    assert_same(trees.unraveler(one)(flat), one)
    assert_same(jax.jit(trees.unraveler(one))(flat), one)


def test_stack_and_first():
    one = tree()
    other = jax.tree.map(lambda leaf: leaf + 1, one)
    stacked = trees.stack([other, one])
    assert_same(trees.first(stacked), other)
    assert_same(jax.tree.map(lambda leaf: leaf[1], stacked), one)


def test_nonfinite_leaves_are_named():
    broken = tree()
    assert trees.nonfinite_leaves(broken) == []
    broken["net"][0]["weight"][1, 2] = np.inf
    broken["pair"] = Pair(jnp.array(jnp.nan), broken["pair"].right)
    assert trees.nonfinite_leaves(broken) == ["net.0.weight", "pair.left"]
