"""The metric of networks: its matrices, the dynamics in it, and what it is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import failures
from scipy.linalg import fractional_matrix_power

from bnnmcmc import mams, mclmc, sample_density, trees
from bnnmcmc.convergence import mean_ess
from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import mlp
from bnnmcmc.samplers import kronecker
from bnnmcmc.samplers.kronecker import Factors, Matrix
from bnnmcmc.samplers.mclmc import INTEGRATORS, isokinetic_step, renewal_steps

LAYERS = (Matrix(0, 4, 2), Matrix(8, 3, 1), Matrix(11, 1, 1))
SIZE = 12


def layout_of(position):
    return trees.layout(jax.eval_shape(lambda: position))


def symmetric(key, n):
    a = jax.random.normal(key, (n, n))
    return a @ a.T + jnp.eye(n)


def factors(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(LAYERS)))
    return Factors(
        tuple(symmetric(next(keys), part.rows) for part in LAYERS),
        tuple(symmetric(next(keys), part.columns) for part in LAYERS),
    )


def dense(of: Factors):
    """Return the matrix that `kronecker.scale` multiplies a vector with."""
    whole = np.zeros((SIZE, SIZE))
    for part, rows, columns in zip(LAYERS, *of, strict=True):
        where = slice(part.start, part.start + part.rows * part.columns)
        whole[where, where] = np.kron(rows, columns)
    return whole


# ------------------------------------------------------------------------------------ the matrices


def test_a_network_is_its_layers_each_with_its_bias():
    network = mlp(3, [5, 4], 2, "tanh", "none")
    of = layout_of(network.init(jax.random.key(0)))
    assert of.names[:2] == ("layer0.bias", "layer0.weight")
    assert kronecker.matrices(of) == (Matrix(0, 4, 5), Matrix(20, 6, 4), Matrix(44, 5, 2))
    assert kronecker.elements(kronecker.matrices(of)) == 16 + 25 + 36 + 16 + 25 + 4
    assert of.size == 44 + 5 * 2


def test_what_is_not_sampled_is_in_no_matrix():
    of = layout_of(mlp(3, [5, 4], 2, "tanh", "none").init(jax.random.key(0)))
    assert kronecker.matrices(of, [False, True, True, True, False, False]) == (
        Matrix(0, 3, 5),
        Matrix(15, 6, 4),
    )


def test_leaves_of_any_shape():
    position = {
        "a": jnp.zeros((2, 3, 4)),
        "b": {"bias": jnp.zeros(3), "weight": jnp.zeros((2, 4))},  # does not fit
        "c": jnp.zeros(()),
        "d": jnp.zeros(7),
    }
    assert kronecker.matrices(layout_of(position)) == (
        Matrix(0, 6, 4),
        Matrix(24, 3, 1),
        Matrix(27, 2, 4),
        Matrix(35, 1, 1),
        Matrix(36, 7, 1),
    )


def test_vectors_alone_are_no_network():
    assert kronecker.matrices(layout_of({"a": jnp.zeros(3), "b": jnp.zeros(())})) == ()
    assert kronecker.matrices(layout_of(jnp.zeros(3))) == ()


def test_scaling_is_a_kronecker_product():
    vector = jax.random.normal(jax.random.key(1), (SIZE,))
    found = kronecker.scale(factors(), LAYERS, vector)
    np.testing.assert_allclose(found, dense(factors()) @ np.asarray(vector), rtol=1e-4)
    same = kronecker.scale(kronecker.identity(LAYERS, vector.dtype), LAYERS, vector)
    np.testing.assert_array_equal(same, vector)


def test_roots_are_those_of_the_formula():
    gradients = 30 * jax.random.normal(jax.random.key(2), (50, SIZE)) * jnp.linspace(0.1, 3, SIZE)
    sums = jax.tree.map(jnp.zeros_like, factors())
    for gradient in gradients:
        sums = kronecker.add_moments(sums, LAYERS, gradient)
    delta = 20.0
    there, back = kronecker.roots(sums, jnp.asarray(50.0), delta)

    G = np.asarray(gradients[:, :8], np.float64).reshape(50, 4, 2)
    L, R = (G @ G.swapaxes(1, 2)).mean(0), (G.swapaxes(1, 2) @ G).mean(0)
    t = np.square(G).sum(axis=(1, 2)).mean()
    A, B = L / np.sqrt(t), R / np.sqrt(t)
    pi = np.sqrt(np.trace(A) / 4 / (np.trace(B) / 2))
    for found, matrix in (
        (there.rows[0], np.eye(4) + A / (pi * np.sqrt(delta))),
        (there.columns[0], np.eye(2) + pi * B / np.sqrt(delta)),
    ):
        np.testing.assert_allclose(found, fractional_matrix_power(matrix, -0.5), rtol=1e-3)
    # Of a column, the whole matrix.
    g = np.asarray(gradients[:, 8:11], np.float64)
    whole = np.eye(3) + (g[:, :, None] * g[:, None]).mean(0) / delta
    np.testing.assert_allclose(there.rows[1], fractional_matrix_power(whole, -0.5), rtol=1e-3)
    np.testing.assert_array_equal(there.columns[1], [[1.0]])

    np.testing.assert_allclose(dense(there) @ dense(back), np.eye(SIZE), atol=1e-5)
    for matrix in jax.tree.leaves((there, back)):
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-5, atol=1e-6)


def test_a_long_side_keeps_its_scale(monkeypatch):
    monkeypatch.setattr(kronecker, "MAX_SIDE", 3)
    sums = kronecker.add_moments(factors(), LAYERS, jnp.ones(SIZE))
    there, back = kronecker.roots(sums, jnp.asarray(1.0), 1.0)
    for found in (there, back):
        np.testing.assert_array_equal(found.rows[0], np.eye(4))
    assert not np.array_equal(there.columns[0], np.eye(2))


# ------------------------------------------------------------------------------------ the dynamics


def density(x):
    return -0.5 * jnp.sum(jnp.square(x) * jnp.linspace(1, 5, SIZE)) - jnp.sum(jnp.cosh(x[:3]))


@pytest.mark.parametrize("integrator", sorted(INTEGRATORS))
def test_steps_in_a_metric_are_plain_steps_in_its_coordinates(integrator):
    matrix = jnp.asarray(dense(factors()), jnp.float32) / 10
    metric = factors()._replace(rows=tuple(rows / 10 for rows in factors().rows))
    z = 0.1 * jax.random.normal(jax.random.key(3), (SIZE,))
    momentum = jnp.ones(SIZE) / SIZE**0.5
    states = []
    for log_density, at, arguments in (
        (density, matrix @ z, (metric, LAYERS)),
        (lambda z: density(matrix @ z), z, ()),
    ):
        state = mclmc().init(jax.random.key(0), at, log_density)._replace(momentum=momentum)
        step = isokinetic_step(integrator, log_density, *arguments)
        total = 0.0
        for _ in range(5):
            state, energy = step(state, 0.05)
            total += energy
        states.append((state, total))
    (found, energy), (plain, plain_energy) = states
    np.testing.assert_allclose(found.position, matrix @ plain.position, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.momentum, plain.momentum, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(matrix.T @ found.logdensity_grad, plain.logdensity_grad, rtol=1e-2)
    np.testing.assert_allclose(energy, plain_energy, rtol=1e-3)
    assert np.linalg.norm(plain.position - z) > 0.1


def test_the_metric_is_renewed_less_and_less_often():
    assert renewal_steps(1000) == [100, 150, 225, 338, 506, 759]
    assert renewal_steps(126) == [100]
    assert renewal_steps(125) == []


# ------------------------------------------------------------------------- what it is good for


SCALES = np.geomspace(1e-2, 1.0, 4)[:, None] * np.geomspace(1e-1, 1.0, 5)
TURN_ROWS, TURN_COLUMNS = (
    np.linalg.qr(np.random.default_rng(i).normal(size=(n, n)))[0] for i, n in ((0, 4), (1, 5))
)


def layer(position):
    """A turned normal of 20 dimensions: scales from 1e-3 to 1, condition 1e6."""
    turned = TURN_ROWS.T.astype(np.float32) @ position["weight"] @ TURN_COLUMNS.astype(np.float32)
    return -0.5 * jnp.sum(jnp.square(turned / SCALES.astype(np.float32)))


def run(kernel, warmup=4000, draws=1000, thin=10):
    starts = {"weight": 0.1 * jax.random.normal(jax.random.key(0), (4, 4, 5))}
    return sample_density(layer, starts, kernel=kernel, warmup=warmup, draws=draws, thin=thin)


def axes_of(samples):
    return np.einsum("ji,cdjk,kl->cdil", TURN_ROWS, samples.draws["weight"], TURN_COLUMNS)


def wrong(samples):
    return failures(axes_of(samples).reshape(4, -1, 20), np.zeros(20), SCALES.ravel() ** 2)


def least_ess(samples):
    values = axes_of(samples).reshape(4, -1, 20).transpose(2, 0, 1)
    return min(mean_ess(x) for x in (*values, *np.square(values)))


def test_mclmc_sees_a_layer_of_a_million_to_one():
    with_metric = run(mclmc(energy_variance_end=1e-4), thin=20)
    without = run(mclmc(energy_variance_end=1e-4, metric="identity"), thin=20)
    assert least_ess(with_metric) > 10 * least_ess(without)
    assert wrong(with_metric) == []  # also the bias is no longer to be seen
    assert with_metric.params.metric.rows[0].shape == (4, 4, 4)
    assert without.params.metric is None


def test_lengths_are_those_of_the_metric_s_coordinates():
    """With a damping of one, every coordinate of z has a variance of one or a little more."""
    samples = run(mclmc(energy_variance_end=1e-4, damping=1.0), warmup=8000, draws=5)
    found = samples.warmup_stats["decoherence_length"][:, -1]  # from the moments, in this phase
    rows, columns = samples.params.metric
    turn = np.kron(TURN_ROWS, TURN_COLUMNS)
    covariance = turn * SCALES.ravel() ** 2 @ turn.T
    for chain in range(4):
        inverse = np.linalg.inv(np.kron(rows[0][chain], columns[0][chain]).astype(np.float64))
        expected = np.sqrt(np.trace(inverse @ covariance @ inverse))
        assert expected > 3 * np.sqrt(np.trace(covariance))
        assert 0.8 < found[chain] / expected < 1.25


@pytest.mark.slow
def test_mams_is_exact_in_the_metric():
    samples = run(mams(), warmup=3000, draws=2000, thin=1)
    assert wrong(samples) == []
    assert least_ess(samples) > 3 * least_ess(
        run(mams(metric="identity"), warmup=3000, draws=2000, thin=1)
    )
    assert abs(samples.stats["acceptance_rate"].mean() - 0.9) < 0.08


def test_published_tuning_has_no_metric():
    assert mclmc(tuning="mile").for_matrices is None
    with pytest.raises(
        InputError, match=r'sampler\.metric: found "kronecker" with tuning = "mile"'
    ):
        mclmc(tuning="mile", metric="kronecker")
