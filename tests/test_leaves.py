"""Some leaves are sampled, the others stay where each chain starts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from conftest import TINY

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.placement import place
from bnnmcmc.run import Run
from bnnmcmc.sampling import sample_density
from bnnmcmc.store import read_manifest

OF = trees.layout({"a": jnp.zeros(2), "b": {"c": jnp.zeros((2, 2)), "d": jnp.zeros(1)}})


def test_leaves_are_chosen_by_name():
    assert trees.chosen_leaves(["b.", "nothing|c"], OF) == (False, True, True)
    assert trees.chosen_leaves(["a", "b"], OF) is None
    assert trees.chosen_leaves([], OF) is None
    with pytest.raises(InputError, match=r"'e' is found in no leaf's name; there are a, b.c, b.d"):
        trees.chosen_leaves(["a", "e"], OF)
    with pytest.raises(InputError, match=r"'\(' is no regular expression"):
        trees.chosen_leaves(["("], OF)


@pytest.mark.parametrize("xp", [np, jnp])
def test_parts_go_together_again(xp):
    flat, chosen = xp.arange(14.0).reshape(2, 7), (False, True, False)
    free = trees.part(flat, OF, chosen)
    fixed = trees.part(flat, OF, [not use for use in chosen])
    np.testing.assert_array_equal(free, flat[:, 2:6])
    np.testing.assert_array_equal(fixed, flat[:, [0, 1, 6]])
    np.testing.assert_array_equal(trees.join(free, fixed, OF, chosen), flat)


def dependent(position):
    """Given a, the mean of b is a: a normal density with unit scales."""
    return -0.5 * (jnp.sum(position["a"] ** 2) + jnp.sum((position["b"] - position["a"]) ** 2))


@pytest.mark.parametrize(("kernel", "mode"), [("nuts", "map"), ("nuts", "vmap"), ("mclmc", "map")])
def test_the_rest_is_conditioned_on(kernel, mode):
    starts = {"a": np.array([[0.0, 0.0], [5.0, -3.0]]), "b": np.zeros((2, 2))}
    found = sample_density(
        dependent,
        starts,
        kernel=kernel,
        warmup=500,
        draws=1000,
        leaves=["b"],
        placement=place(2, mode=mode),
    )
    a, b = found.draws["a"], found.draws["b"]
    assert a.shape == b.shape == (2, 1000, 2)
    np.testing.assert_array_equal(a, np.broadcast_to(starts["a"][:, None], a.shape))
    if kernel == "nuts":
        np.testing.assert_allclose(b.mean(1), starts["a"], atol=0.2)
        np.testing.assert_allclose(b.std(1), 1.0, atol=0.15)
    densities = jax.vmap(jax.vmap(dependent))(found.draws)
    np.testing.assert_allclose(found.stats["log_density"], densities, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_last_layer_of_a_run(tiny, here):
    leaves = "sampler.leaves=['layer1']"
    code, out, err = here("check", "tiny.toml", "--set", leaves, cwd=tiny)
    assert code == 0, err
    assert "44 parameters, 14 of them sampled" in out
    settings = ["--quiet", "--set", leaves, "sampler.draws=20"]
    code, out, err = here("run", "tiny.toml", "--out", "run", *settings, cwd=tiny)
    assert code == 0, err
    assert "44 parameters each, 14 of them sampled" in out
    draws = zarr.open_group(tiny / "run" / "draws", mode="r")
    members = Run.open(tiny / "run").members["network"]["layer0"]
    for name in ("weight", "bias"):
        fixed, free = (draws[f"network.layer{i}.{name}"][:] for i in (0, 1))
        there = np.asarray(members[name])[:, None]
        np.testing.assert_array_equal(fixed, np.broadcast_to(there, fixed.shape))
        assert np.all(np.ptp(free, axis=1) > 0)
    assert read_manifest(tiny / "run")["sampled"] == 14
    # It goes on where it was.
    code, out, err = here("resume", "run", "--draws", "10", "--quiet", cwd=tiny)
    assert code == 0, err
    assert json.loads((tiny / "run" / "metrics.json").read_text())


def test_a_pattern_without_a_leaf_is_refused_before_any_work(tiny, here):
    assert "leaves" not in TINY
    code, _, err = here("run", "tiny.toml", "--set", "sampler.leaves=['layer7']", cwd=tiny)
    assert code == 2
    assert "sampler.leaves: 'layer7' is found in no leaf's name" in err
    assert not (tiny / "runs").exists()
