"""The block loop: draws depend on the seed, and not on blocks, restarts, devices or neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_thinned

from bnnmcmc import likelihoods, priors, trees
from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import mlp
from bnnmcmc.placement import gather, place, replicate, spread
from bnnmcmc.posterior import Posterior
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.sampling import (
    Block,
    build_program,
    finish_warmup,
    join_stats,
    run_blocks,
    sample_density,
    start_chains,
)

KERNELS = {"mclmc": mclmc(), "nuts": nuts(max_depth=4), "hmc": hmc(num_leapfrog=4)}
POSITIONS = {
    "w": jax.random.normal(jax.random.key(7), (5, 2, 2)),
    "b": jax.random.normal(jax.random.key(8), (5, 1)),
}
LAYOUT = trees.layout(trees.first(POSITIONS))
DATA = (np.array([1.0, 4.0], np.float32),)
WARMUP, DRAWS = 230, 12


def log_density(position, precision):
    return -0.5 * (
        precision[0] * jnp.sum(jnp.square(position["w"]))
        + precision[1] * jnp.sum(position["b"] ** 2)
    )


def build(kernel, chains=3, *, mode=None, devices=None, draws=DRAWS, thin=1, warmup=WARMUP):
    return build_program(
        log_density,
        KERNELS[kernel],
        LAYOUT,
        place(chains, devices, mode),
        warmup=warmup,
        draws=draws,
        thin=thin,
    )


def begin(program, seed=0, data=DATA):
    data = replicate(data, program.placement)
    positions = trees.flatten_stacked(POSITIONS)[: program.placement.chains]
    return start_chains(program, positions, seed, data), data


def through(program, max_count=None, seed=0, data=DATA, interrupt=False):
    """Run both stages; ``interrupt`` takes every carry to the host and starts again from there."""
    carry, data = begin(program, seed, data)
    blocks = {"warmup": [], "sampling": []}
    for stage, schedule in (("warmup", program.warmup), ("sampling", program.sampling)):
        if stage == "sampling":
            carry = finish_warmup(program, carry)
        first = 0
        while first < schedule.records:
            for block in run_blocks(
                program, stage, carry, seed, data, first=first, max_count=max_count
            ):
                blocks[stage].append(block._replace(carry=None))
                carry, first = block.carry, block.start + block.count
                if interrupt:
                    saved = jax.tree.map(np.array, gather(carry, program.placement))
                    carry = spread(saved, program.placement)
                    break
    return blocks, gather(carry, program.placement)


def draws_of(blocks):
    return np.concatenate([b.draws for b in blocks["sampling"]], axis=1)


def same_run(a, b):
    (blocks_a, carry_a), (blocks_b, carry_b) = a, b
    np.testing.assert_array_equal(draws_of(blocks_a), draws_of(blocks_b))
    for stage in ("warmup", "sampling"):
        stats_a, stats_b = join_stats(blocks_a[stage]), join_stats(blocks_b[stage])
        assert stats_a.keys() == stats_b.keys()
        for name in stats_a:
            np.testing.assert_array_equal(stats_a[name], stats_b[name])
    for x, y in zip(jax.tree.leaves(carry_a), jax.tree.leaves(carry_b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module", params=sorted(KERNELS))
def reference(request):
    """Three chains on two devices: one share holds a padding chain."""
    program = build(request.param)
    return request.param, program, through(program)


def test_draws_do_not_depend_on_blocks_or_interruptions(reference):
    _, program, expected = reference
    for max_count in (1, 5, 7):
        same_run(through(program, max_count), expected)
    same_run(through(program, 5, interrupt=True), expected)
    # One trace each, whatever the number of blocks, their sizes, and where a carry came from.
    assert program.traces == {"start": 1, "warm": 1, "finish": 1, "draw": 1}


def test_blocks_are_consecutive_and_no_larger_than_asked(reference):
    _, program, _ = reference
    blocks, _ = through(program, 5)
    for stage, schedule in (("warmup", program.warmup), ("sampling", program.sampling)):
        assert [b.start for b in blocks[stage]] == list(
            np.cumsum([0] + [b.count for b in blocks[stage]])[:-1]
        )
        assert sum(b.count for b in blocks[stage]) == schedule.records
        assert max(b.count for b in blocks[stage]) <= 5
    assert program.warmup.records == 230  # one record per step, at most about 200 to 400
    assert all(b.draws is None for b in blocks["warmup"])
    for block in blocks["sampling"]:
        assert block.draws.shape == (3, block.count, 5)
        assert block.draws.base is None  # not a window on the whole buffer


def test_a_range_of_records(reference):
    _, program, (blocks, _) = reference
    carry, data = begin(program)
    for block in run_blocks(program, "warmup", carry, 0, data):
        carry = block.carry
    carry = finish_warmup(program, carry)
    part = list(run_blocks(program, "sampling", carry, 0, data, last=4))
    part += list(run_blocks(program, "sampling", part[-1].carry, 0, data, first=4, last=9))
    np.testing.assert_array_equal(
        np.concatenate([b.draws for b in part], 1), draws_of(blocks)[:, :9]
    )


def test_the_seed_decides(reference):
    _, program, (blocks, _) = reference
    other, _ = through(program, seed=1)
    assert not np.any(draws_of(other) == draws_of(blocks))


def test_other_data_need_no_new_trace(reference):
    _, program, (blocks, _) = reference
    other, _ = through(program, data=(np.array([100.0, 400.0], np.float32),))
    assert program.traces == {"start": 1, "warm": 1, "finish": 1, "draw": 1}
    assert draws_of(other).std() < draws_of(blocks).std() / 3


def test_statistics_belong_to_the_draws(reference):
    _, _, (blocks, _) = reference
    draws = draws_of(blocks)
    stats = join_stats(blocks["sampling"])
    expected = -0.5 * (
        4.0 * draws[..., 0] ** 2 + np.sum(draws[..., 1:] ** 2, axis=-1)
    )  # leaves in flattening order: b, then w
    np.testing.assert_allclose(stats["log_density"], expected, rtol=1e-4, atol=1e-5)


def test_a_chain_does_not_depend_on_its_neighbours_or_the_devices(reference):
    kernel, _, (blocks, _) = reference
    more, _ = through(build(kernel, chains=5, devices=jax.devices()[:1]))
    np.testing.assert_array_equal(draws_of(more)[:3], draws_of(blocks))


# The kernel whose trajectories differ in length says most.
@pytest.mark.parametrize(
    "kernel",
    [pytest.param(k, marks=pytest.mark.slow if k != "nuts" else []) for k in sorted(KERNELS)],
)
def test_groups_on_one_device_and_on_two_draw_the_same(kernel):
    """XLA compiles programs for one device and for several in other ways; rounding must not show.

    It did, where the tuning divided by what chains have in common.
    """
    rng = np.random.default_rng(0)
    data = tuple(rng.normal(size=(48, size)).astype(np.float32) for size in (4, 1))
    prior = priors.independent(priors.LeafPrior())
    posterior = Posterior(mlp(4, (6,), 2, "tanh"), likelihoods.gaussian(), prior)
    positions = jax.vmap(posterior.init)(jax.random.split(jax.random.key(0), 4))
    found = [
        sample_density(
            posterior.log_density,
            jax.tree.map(lambda leaf, count=2 * count: leaf[:count], positions),
            kernel=KERNELS[kernel],
            warmup=200,
            draws=10,
            data=data,
            placement=place(2 * count, jax.devices()[:count], "map", 2),
        )
        for count in (1, 2)
    ]
    for one, two in zip(*(jax.tree.leaves(samples.draws) for samples in found), strict=True):
        np.testing.assert_array_equal(one, two[:2])


def test_a_chain_alone():
    alone, _ = through(build("hmc", chains=1))
    three, _ = through(build("hmc"))
    np.testing.assert_array_equal(draws_of(alone), draws_of(three)[:1])


def test_thinning_keeps_every_fifth_draw_and_reduces_the_rest():
    every, _ = through(build("nuts", draws=20))
    fifth, _ = through(build("nuts", draws=4, thin=5))
    np.testing.assert_array_equal(draws_of(fifth), draws_of(every)[:, 4::5])
    assert_thinned(join_stats(fifth["sampling"]), join_stats(every["sampling"]), 5)


@pytest.mark.parametrize("kernel", ["mclmc", "hmc"])
def test_side_by_side_and_one_by_one_agree(kernel):
    """Over a short run: rounding grows along a trajectory."""
    one_by_one, _ = through(build(kernel, warmup=0, draws=3))
    side_by_side, _ = through(build(kernel, warmup=0, draws=3, mode="vmap"))
    np.testing.assert_allclose(draws_of(side_by_side), draws_of(one_by_one), rtol=1e-4, atol=1e-5)


def test_long_warm_ups_are_recorded_at_even_steps():
    program = build("hmc", warmup=450)
    assert (program.warmup.thin, program.warmup.records) == (2, 225)
    stats = join_stats(through(program)[0]["warmup"])
    assert stats["gradients"].shape == (3, 225)
    assert stats["gradients"].min() >= 2 * 2  # two trajectories of at least two leapfrogs


@pytest.mark.parametrize(("mode", "devices"), [("map", 2), ("vmap", 1)])
def test_samples_and_the_users_own_arrays(mode, devices):
    """Nothing the user gave is given away, and equal calls give equal samples."""
    positions = {"x": jax.device_put(jnp.ones((2, 3)), jax.devices()[0])}
    placement = place(2, jax.devices()[:devices], mode)
    seen = []

    def run():
        return sample_density(
            lambda p: -0.5 * jnp.sum(p["x"] ** 2),
            positions,
            kernel=KERNELS["hmc"],
            warmup=20,
            draws=6,
            thin=2,
            placement=placement,
            on_block=lambda stage, block, schedule: seen.append((stage, block, schedule)),
        )

    samples = run()
    assert samples.draws["x"].shape == (2, 6, 3)
    assert isinstance(samples.draws["x"], np.ndarray)
    assert samples.draws["x"].dtype == np.float32
    assert samples.kernel == "hmc"
    assert samples.params.inverse_mass_matrix.shape == (2, 3)
    assert {v.shape for v in samples.stats.values()} == {(2, 6)}
    assert {v.shape for v in samples.warmup_stats.values()} == {(2, 20)}
    assert all(isinstance(block, Block) for _, block, _ in seen)
    assert sum(b.count for stage, b, _ in seen if stage == "sampling") == 6
    assert sum(b.count for stage, b, _ in seen if stage == "warmup") == 20
    # Chains from one start, and still each has random numbers of its own, in both stages.
    assert not np.any(samples.draws["x"][0] == samples.draws["x"][1])
    assert not np.any(
        samples.warmup_stats["log_density"][0, 3:] == samples.warmup_stats["log_density"][1, 3:]
    )
    again = run()
    np.testing.assert_array_equal(again.draws["x"], samples.draws["x"])
    assert not positions["x"].is_deleted()
    np.testing.assert_array_equal(positions["x"], 1.0)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_no_warm_up_samples_with_the_first_parameters(kernel):
    samples = sample_density(
        lambda x: -0.5 * jnp.sum(x**2), np.ones((2, 3)), kernel=kernel, warmup=0, draws=3
    )
    assert samples.warmup_stats == {}
    assert not np.any(samples.draws[0] == samples.draws[1])  # from one start, with own keys
    np.testing.assert_allclose(
        samples.stats["step_size"], 0.005 if kernel == "mclmc" else 0.01, rtol=1e-6
    )


def test_double_precision():
    with jax.enable_x64(True):
        samples = sample_density(
            lambda x: -0.5 * jnp.sum(x**2), np.ones((2, 3)), kernel="hmc", warmup=30, draws=3
        )
    assert samples.draws.dtype == np.float64
    assert samples.stats["log_density"].dtype == np.float64


def flat(x):
    return -0.5 * jnp.sum(x**2)


def flat_tree(p):
    return flat(p["a"]) + flat(p["b"])


@pytest.mark.parametrize(
    ("density", "positions", "options", "message"),
    [
        (lambda x: jnp.log(x[0]) + flat(x), [[1, 1], [1, 1], [-1, 1]], {}, "chain 2: .* is nan"),
        (lambda x: jnp.log(x[0]) + flat(x), [[1, 1], [0, 1]], {}, "chain 1: .* is -inf"),
        (
            flat_tree,
            {"a": np.ones((2, 3)), "b": np.ones((3, 3))},
            {},
            r"positions: leaves have leading axes \[\(2,\), \(3,\)\]",
        ),
        (
            flat_tree,
            {"a": np.ones((2, 3)), "b": np.float32(1)},
            {},
            "positions: leaves have leading axes",
        ),
        (flat, np.float32(1.0), {}, "positions: leaves have leading axes"),
        (flat, np.ones((0, 3)), {}, "chains: found 0"),
        (flat, np.ones((2, 3)), {"placement": place(3)}, "placement is for 3 chains, .* hold 2"),
        (flat, np.ones((2, 3)), {"warmup": -1}, "warmup: found -1, expected at least 0"),
        (flat, np.ones((2, 3)), {"draws": 0}, "draws: found 0, expected at least 1"),
        (flat, np.ones((2, 3)), {"thin": 0}, "thin: found 0, expected at least 1"),
        (flat, np.ones((2, 3)), {"kernel": "gibbs"}, "kernel: found 'gibbs'"),
        (flat, np.ones((2, 1)), {"kernel": "mclmc"}, "microcanonical kernels need at least 2"),
    ],
)
def test_errors(density, positions, options, message):
    if isinstance(positions, list):
        positions = np.array(positions, np.float32)
    with pytest.raises(InputError, match=message):
        sample_density(density, positions, **{"kernel": "hmc", **options})


def test_a_density_that_is_no_scalar_is_refused():
    with pytest.raises(InputError, match=r"log_density: returns .*expected a scalar"):
        sample_density(lambda p: -0.5 * p**2, jnp.zeros((2, 3)), warmup=10, draws=10)
