"""Members reach the optimum, stop one by one, and do not depend on blocks or on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnnmcmc.ensemble import (
    build_training,
    finish_ensemble,
    fit_ensemble,
    make_optimiser,
    run_epochs,
    start_members,
)
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.likelihoods import gaussian
from bnnmcmc.models.mlp import mlp
from bnnmcmc.models.network import Network
from bnnmcmc.placement import gather, place, replicate, spread
from bnnmcmc.posterior import Posterior
from bnnmcmc.priors import independent

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 2)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0]) + 0.5 + 0.3 * RNG.normal(size=40)).astype(np.float32)[:, None]
TRAIN, VALID = (X[:28], Y[:28]), (X[28:], Y[28:])
LINEAR = Posterior(mlp(2, (), 1), gaussian(scale=0.5), independent())
# Overfits 28 rows soon, so members stop early and at different times.
WIGGLY = Posterior(mlp(2, (24,), 2), gaussian(), independent())


def train(
    posterior=WIGGLY,
    members=3,
    seed=0,
    max_count=None,
    interrupt=False,
    batch_size=8,
    max_epochs=120,
    patience=8,
    placement=None,
    optimiser=None,
    data=(*TRAIN, *VALID),
    training=None,
):
    """Return an ensemble and the training it came from, with blocks under control."""
    placement = placement or place(members)
    training = training or build_training(
        posterior,
        optimiser or make_optimiser("adam", 2e-2),
        placement,
        rows=len(data[0]),
        validation_rows=len(data[2]),
        batch_size=batch_size,
        max_epochs=max_epochs,
        patience=patience,
    )
    state, data = start_members(training, seed), replicate(data, placement)
    history, first, running = [], 0, True
    while running:
        running = False
        for block in run_epochs(training, state, seed, data, first=first, max_count=max_count):
            history.append(block.history)
            state, first = block.members, block.start + block.count
            if interrupt:
                state, running = spread(gather(state, placement), placement), True
                break
    return finish_ensemble(gather(state[1], placement), np.concatenate(history, axis=1)), training


@pytest.fixture(scope="module")
def reference():
    return train()


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def member(ensemble, i):
    return jax.tree.map(lambda leaf: leaf[i], ensemble.positions)


def test_members_reach_the_least_squares_optimum():
    ensemble = fit_ensemble(
        LINEAR,
        X,
        Y,
        members=3,
        batch_size=None,
        max_epochs=400,
        optimiser=make_optimiser("adam", 5e-2),
    )
    design = np.column_stack([X, np.ones(len(X))])
    optimum = np.linalg.lstsq(design, Y[:, 0], rcond=None)[0]
    for i in range(3):
        layer = member(ensemble, i)["network"]["layer0"]
        found = np.append(layer["weight"][:, 0], layer["bias"])
        np.testing.assert_allclose(found, optimum, atol=2e-3)
    residual = Y[:, 0] - design @ optimum
    loss = np.mean(0.5 * (residual / 0.5) ** 2) + np.log(0.5 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(ensemble.validation_loss, loss, rtol=1e-4)
    assert list(ensemble.epochs) == [400] * 3  # no validation part: no early stopping


def test_members_stop_one_by_one_and_keep_their_best_weights(reference):
    ensemble, _ = reference
    assert len(set(ensemble.epochs)) > 1
    assert np.all(ensemble.epochs < 120)
    np.testing.assert_array_equal(ensemble.epochs, ensemble.best_epoch + 8)
    assert ensemble.history.shape == (3, ensemble.epochs.max(), 2)
    for i in range(3):
        validation = ensemble.history[i, :, 1]
        assert np.all(np.isfinite(validation[: ensemble.epochs[i]]))
        assert np.all(np.isnan(validation[ensemble.epochs[i] :]))
        assert np.nanargmin(validation) + 1 == ensemble.best_epoch[i]
        assert np.nanmin(validation) == ensemble.validation_loss[i]
        recomputed = -WIGGLY.pointwise_log_likelihood(member(ensemble, i), *VALID).mean()
        np.testing.assert_allclose(ensemble.validation_loss[i], recomputed, rtol=1e-5)


def test_blocks_and_interruptions_change_nothing(reference):
    ensemble, training = reference
    assert_same(train(max_count=1, training=training)[0], ensemble)
    assert_same(train(max_count=7, interrupt=True, training=training)[0], ensemble)
    assert training.traces == {"start": 1, "advance": 1}


def test_a_member_does_not_depend_on_the_others_or_the_devices(reference):
    ensemble, _ = reference
    more, _ = train(members=5, placement=place(5, jax.devices()[:1]))
    for a, b in zip(jax.tree.leaves(more), jax.tree.leaves(ensemble), strict=True):
        if a.ndim == 3 and a.shape[1:] == more.history.shape[1:]:
            a, b = a[:, : ensemble.epochs[:3].max()], b[:, : more.epochs.max()]
        np.testing.assert_array_equal(a[:3], b)


def test_side_by_side_is_the_same_training():
    kwargs = {"posterior": LINEAR, "max_epochs": 5, "patience": 5}
    one_by_one, _ = train(**kwargs)
    side_by_side, _ = train(**kwargs, placement=place(3, mode="vmap"))
    np.testing.assert_allclose(side_by_side.history, one_by_one.history, rtol=1e-4)


def test_the_seed_decides(reference):
    ensemble, training = reference
    other, _ = train(seed=1, training=training)
    assert not np.any(other.validation_loss == ensemble.validation_loss)
    assert len(set(ensemble.validation_loss)) == 3


def test_all_have_stopped_then_nothing_is_done(reference):
    ensemble, training = reference
    state = start_members(training, 0)
    data = replicate((*TRAIN, *VALID), training.placement)
    for block in run_epochs(training, state, 0, data):
        state = block.members
    assert list(run_epochs(training, state, 0, data, first=block.start + block.count)) == []
    member = gather(state[1], training.placement)
    assert_same(finish_ensemble(member, ensemble.history), ensemble)


def test_patience_and_epochs(reference):
    patient, _ = train(patience=20)
    np.testing.assert_array_equal(patient.epochs, np.minimum(patient.best_epoch + 20, 120))
    assert patient.epochs.sum() > reference[0].epochs.sum()
    short, _ = train(max_epochs=4)
    assert list(short.epochs) == [4] * 3
    assert short.history.shape == (3, 4, 2)


def sgd_by_hand(position, order, size, rate=0.1):
    def loss(position, x, y):
        return -LINEAR.pointwise_log_likelihood(position, x, y).mean()

    losses = []
    for i in range(len(order) // size):
        rows = order[i * size : (i + 1) * size]
        value, gradient = jax.value_and_grad(loss)(position, TRAIN[0][rows], TRAIN[1][rows])
        position = jax.tree.map(lambda p, g: p - rate * g, position, gradient)
        losses.append(value)
    return position, np.mean(losses)


@pytest.mark.parametrize("batch_size", [None, 28, 10, 1])
def test_an_epoch_is_minibatch_gradient_descent(batch_size):
    """Against a plain loop; with batches of ten, eight of 28 rows are left out."""
    ensemble, _ = train(
        posterior=LINEAR,
        members=1,
        batch_size=batch_size,
        max_epochs=1,
        optimiser=make_optimiser("sgd", 0.1),
    )
    start = LINEAR.init(jax.random.fold_in(stage_key(0, "ensemble-init"), 0))
    key = jax.random.fold_in(jax.random.fold_in(stage_key(0, "ensemble-shuffle"), 0), 0)
    expected, loss = sgd_by_hand(start, jax.random.permutation(key, 28), batch_size or 28)
    for a, b in zip(jax.tree.leaves(member(ensemble, 0)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ensemble.history[0, 0, 0], loss, rtol=1e-5)


def test_a_member_that_fails_stops_and_keeps_its_best_weights():
    """The model is w^2 x with no value beyond w = 2: positive w run into it, negative w do not."""

    def apply(params, x):
        w = params["w"]
        return jnp.where(w > 2.0, jnp.nan, w**2) * x

    network = Network(lambda key: {"w": jax.random.normal(key) + 0.01}, apply)
    posterior = Posterior(network, gaussian(scale=1.0), independent())
    x = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    ensemble, _ = train(
        posterior,
        members=6,
        batch_size=None,
        max_epochs=100,
        patience=100,
        optimiser=make_optimiser("sgd", 0.02),
        data=(x, 9 * x, x, 9 * x),
    )
    w = ensemble.positions["network"]["w"]
    fails = w > 0
    assert 0 < fails.sum() < 6
    assert np.all(np.isfinite(ensemble.validation_loss))
    assert np.all((w[fails] > 1.0) & (w[fails] <= 2.0))
    np.testing.assert_array_equal(ensemble.epochs[fails], ensemble.best_epoch[fails] + 2)
    np.testing.assert_array_equal(ensemble.epochs[~fails], 100)
    np.testing.assert_allclose(w[~fails], -3.0, atol=0.05)
    last = ensemble.history[fails, ensemble.epochs[fails] - 1]
    assert np.all(np.isnan(last))  # and the history says so


def test_fit_is_the_same_as_its_parts(reference):
    ensemble, _ = reference
    seen = []
    fitted = fit_ensemble(
        WIGGLY,
        *TRAIN,
        *VALID,
        members=3,
        optimiser=make_optimiser("adam", 2e-2),
        batch_size=8,
        max_epochs=120,
        patience=8,
        on_block=seen.append,
    )
    assert_same(fitted, ensemble)
    assert sum(block.count for block in seen) >= ensemble.epochs.max()
    assert all(block.members is None for block in seen)


def losses(optimiser, epochs=3):
    ensemble, _ = train(
        posterior=LINEAR, members=1, batch_size=None, max_epochs=epochs, optimiser=optimiser
    )
    return ensemble.history[0, :, 1]


def test_optimisers_and_schedules_by_name():
    sgd = losses(make_optimiser("sgd", 0.05))
    np.testing.assert_array_equal(losses(optax.sgd(0.05)), sgd)
    assert losses(make_optimiser("sgd", 0.1))[-1] < sgd[-1]  # learning_rate
    momentum = losses(make_optimiser("sgd", 0.05, {"momentum": 0.9}))  # options
    assert momentum[0] == sgd[0]
    assert momentum[-1] < sgd[-1]
    decayed = losses(make_optimiser("sgd", 0.05, None, "cosine_decay_schedule", {"decay_steps": 1}))
    np.testing.assert_allclose(decayed, sgd[0], rtol=1e-6)  # the rate is zero after one step
    slower = losses(make_optimiser("sgd", 0.05, None, "cosine_decay_schedule", {"decay_steps": 9}))
    assert sgd[-1] < slower[-1] < decayed[-1]
    # One that looks at the loss itself: Newton-like, so at the optimum within a few epochs.
    lbfgs = losses(make_optimiser("lbfgs", None), epochs=10)
    assert lbfgs[-1] < sgd[-1]
    assert abs(lbfgs[-1] - lbfgs[-2]) < 1e-4  # it has arrived


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adamm"}, "ensemble.optimizer: optax has no 'adamm'; did you mean adam"),
        ({"name": "_src"}, "ensemble.optimizer: optax has no '_src'"),
        ({"name": "chain"}, "ensemble.optimizer_options"),
        ({"options": {"weight_dekay": 1.0}}, "ensemble.optimizer_options: .*weight_dekay"),
        (
            {"schedule": "cosine_decay"},
            "ensemble.schedule: optax has no 'cosine_decay'; did you mean cosine_decay_schedule",
        ),
        ({"schedule": "cosine_decay_schedule"}, "ensemble.schedule_options: .*decay_steps"),
        (
            {"schedule": "cosine_decay_schedule", "schedule_options": {"decay_steps": 0}},
            "ensemble.schedule_options: .*positive decay_steps",
        ),
        ({"schedule": "adam"}, "ensemble.schedule: optax.adam does not build a schedule"),
        ({"schedule_options": {"decay_steps": 3}}, "schedule_options: found decay_steps, but no"),
    ],
)
def test_optimiser_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        make_optimiser(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 29}, "ensemble.batch_size: found 29, .* only 28 rows"),
        ({"batch_size": 0}, "ensemble.batch_size: found 0, expected at least 1"),
        ({"max_epochs": 0}, "ensemble.max_epochs: found 0, expected at least 1"),
        ({"patience": 0}, "ensemble.patience: found 0, expected at least 1"),
        ({"members": 0}, "chains: found 0, expected at least 1"),
    ],
)
def test_fit_errors(options, message):
    with pytest.raises(InputError, match=message):
        fit_ensemble(LINEAR, *TRAIN, *VALID, **options)
