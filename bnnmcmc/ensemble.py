"""The deep ensemble: all members trained at once, each one the start of a chain.

Training runs in blocks of epochs. Inside a block there is no host; members are spread over the
devices like chains, and on CPUs a member that stopped early costs nothing more.
"""

import difflib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.placement import Placement, gather, indices, over_chains, place, replicate

# A block of epochs takes about this long, for the progress bar and Ctrl-C; saving it takes about
# 20 ms, so short blocks would cost time.
TARGET_SECONDS = 1.0
MAX_BLOCK_EPOCHS = 1000


class Member(NamedTuple):
    """The training state of one member.

    Parameters
    ----------
    position, best : pytree
        Weights now, and those with the lowest validation loss so far.
    optimiser : pytree
        The optax state.
    best_loss : scalar
        Mean validation loss (negative log-likelihood per row) of ``best``.
    best_epoch, epoch : int
        Epochs done when ``best`` was found, and by now.
    stopped : bool
        Whether the member has stopped early.
    """

    position: Any
    optimiser: Any
    best: Any
    best_loss: jax.Array
    best_epoch: jax.Array
    epoch: jax.Array
    stopped: jax.Array


class Ensemble(NamedTuple):
    """Trained members.

    Parameters
    ----------
    positions : pytree
        The best weights of every member, leaves (member, *leaf).
    validation_loss : numpy array (member,)
        Mean negative log-likelihood per validation row of those weights (of the training rows
        if there is no validation part).
    best_epoch, epochs : numpy arrays (member,)
        Epochs after which the best weights were found, and epochs trained.
    history : numpy array (member, epoch, 2)
        Mean loss of the epoch's minibatches (each before its step), and validation loss after
        the epoch; NaN after a member stopped.
    """

    positions: Any
    validation_loss: np.ndarray
    best_epoch: np.ndarray
    epochs: np.ndarray
    history: np.ndarray

    def __repr__(self) -> str:
        best = float(np.min(self.validation_loss))
        return f"<Ensemble: {len(self.epochs)} members, best validation loss {best:.4g}>"


class EpochBlock(NamedTuple):
    """What one call computed: losses (member, count, 2) and the members' state, on devices."""

    start: int
    count: int  # type: ignore[assignment]
    history: np.ndarray
    members: Any
    seconds: float


def optax_named(field: str, name: str) -> Callable[..., Any]:
    """Return optax's function of this name.

    Raises
    ------
    InputError
        optax has none; the message names the nearest.
    """
    found = getattr(optax, name, None)
    if not callable(found) or name.startswith("_"):
        near = difflib.get_close_matches(name, [n for n in dir(optax) if n.islower()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"{field}: optax has no {name!r}{hint}")
    return found


def make_optimiser(
    name: str = "adamw",
    learning_rate: float = 5e-3,
    options: dict | None = None,
    schedule: str | None = None,
    schedule_options: dict | None = None,
) -> optax.GradientTransformation:
    """Build any optax optimiser by name, with any optax schedule by name.

    Parameters
    ----------
    name : str
        Name in ``optax``, e.g. "adamw", "sgd", "lbfgs".
    learning_rate : float
        Constant rate, or the schedule's initial value.
    options : dict
        Further arguments of the optimiser, e.g. ``{"weight_decay": 1e-4}``.
    schedule : str
        Name in ``optax``, e.g. "cosine_decay_schedule"; its steps are minibatches.
    schedule_options : dict
        Further arguments of the schedule, e.g. ``{"decay_steps": 5000}``.

    Returns
    -------
    optax.GradientTransformation

    Raises
    ------
    InputError
        Unknown name, options the function does not take, or a schedule's options without it.
    """
    rate: Any = learning_rate
    if schedule is None and schedule_options:
        raise InputError(
            f"ensemble.schedule_options: found {', '.join(schedule_options)}, but no schedule; "
            "set ensemble.schedule or leave the options out"
        )
    if schedule is not None:
        make = optax_named("ensemble.schedule", schedule)
        try:
            rate = make(learning_rate, **(schedule_options or {}))
        except (TypeError, ValueError) as error:
            raise InputError(f"ensemble.schedule_options: {error}") from error
        if not callable(rate):
            raise InputError(f"ensemble.schedule: optax.{schedule} does not build a schedule")
    make = optax_named("ensemble.optimizer", name)
    try:
        optimiser = make(learning_rate=rate, **(options or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"ensemble.optimizer_options: {error}") from error
    if not isinstance(optimiser, optax.GradientTransformation):
        raise InputError(f"ensemble.optimizer: optax.{name} does not build an optimiser")
    return optimiser


class Training(NamedTuple):
    """The compiled functions of one training problem (see `build_training`)."""

    placement: Placement
    start: Any
    advance: Any
    max_epochs: int
    traces: dict[str, int]


def build_training(
    posterior,
    optimiser: optax.GradientTransformation,
    placement: Placement,
    *,
    rows: int,
    validation_rows: int,
    batch_size: int | None,
    max_epochs: int,
    patience: int,
) -> Training:
    """Compile (on first use) the training of all members.

    Parameters
    ----------
    posterior : Posterior
        Members minimise the mean negative log-likelihood; the prior does not enter.
    optimiser : optax.GradientTransformation
    placement : Placement
        One chain stands for one member.
    rows, validation_rows : int
        Sizes of the training and validation part (0 validation rows: no early stopping).
    batch_size : int or None
        Rows per step; None for all. The rest of an epoch that does not fill a batch is left out,
        another one each epoch.
    max_epochs, patience : int
        Most epochs; epochs without a better validation loss before a member stops.

    Returns
    -------
    Training

    Raises
    ------
    InputError
        Fewer training rows than a batch, or a count below one.
    """
    counts = {"batch_size": batch_size, "max_epochs": max_epochs, "patience": patience}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"ensemble.{name}: found {value}, expected at least 1")
    if batch_size is not None and rows < batch_size:
        raise InputError(
            f"ensemble.batch_size: found {batch_size}, but the training part has only {rows} "
            "rows; give a batch size of at most that"
        )
    size = batch_size or rows
    batches = rows // size
    traces = {"start": 0, "advance": 0}
    # Some optimisers (line searches, Polyak steps) look at the loss as well.
    update = optax.with_extra_args_support(optimiser).update

    def loss(position, x, y, weights=None):
        return -posterior.log_likelihood(position, x, y, weights) / x.shape[0]

    def start_member(index, key):
        traces["start"] += 1
        position = posterior.init(jax.random.fold_in(key, index))
        return index, Member(
            position,
            optimiser.init(position),
            position,
            jnp.asarray(jnp.inf),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
        )

    def one_epoch(member: Member, key, data) -> tuple[Member, jax.Array]:
        half = len(data) // 2
        training_rows, held_out = data[:half], data[half:]
        order = jax.random.permutation(jax.random.fold_in(key, member.epoch), rows)

        def one_batch(i, inner):
            position, state, total = inner
            batch = training_rows
            if batches > 1 or size < rows:
                chosen = jax.lax.dynamic_slice(order, (i * size,), (size,))
                batch = tuple(values[chosen] for values in training_rows)
            value, gradient = jax.value_and_grad(loss)(position, *batch)
            updates, state = update(
                gradient,
                state,
                position,
                value=value,
                grad=gradient,
                value_fn=lambda p: loss(p, *batch),
            )
            return optax.apply_updates(position, updates), state, total + value

        position, state, total = jax.lax.fori_loop(
            0, batches, one_batch, (member.position, member.optimiser, jnp.zeros(()))
        )
        train_loss = total / batches
        val_loss = loss(position, *(held_out if validation_rows else training_rows))
        better = val_loss < member.best_loss  # False for NaN: the best weights stay
        epoch = member.epoch + 1
        best_epoch = jnp.where(better, epoch, member.best_epoch)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), position, member.best)
        waited = (epoch - best_epoch >= patience) if validation_rows else jnp.zeros((), bool)
        member = Member(
            position,
            state,
            best,
            jnp.where(better, val_loss, member.best_loss),
            best_epoch,
            epoch,
            waited | ~jnp.isfinite(train_loss),
        )
        return member, jnp.stack([train_loss, val_loss])

    def advance_member(indexed, key, last, data):
        traces["advance"] += 1
        index, member = indexed
        member_key = jax.random.fold_in(key, index)
        first = member.epoch
        history = jnp.full((MAX_BLOCK_EPOCHS, 2), jnp.nan)

        def go_on(loop):
            member, _ = loop
            return (member.epoch < last) & ~member.stopped

        def body(loop):
            member, history = loop
            slot = member.epoch - first
            member, losses = one_epoch(member, member_key, data)
            return member, history.at[slot].set(losses)

        member, history = jax.lax.while_loop(go_on, body, (member, history))
        return (index, member), history

    return Training(
        placement,
        over_chains(start_member, placement),
        over_chains(advance_member, placement, donate=True),
        max_epochs,
        traces,
    )


def start_members(training: Training, seed: int) -> Any:
    """Return the indexed training state of all members before the first epoch."""
    return training.start(indices(training.placement), stage_key(seed, "ensemble-init"))


def run_epochs(
    training: Training,
    members: Any,
    seed: int,
    data: tuple,
    *,
    first: int = 0,
    max_count: int | None = None,
    least: Callable[[int], int] = int,
) -> Iterator[EpochBlock]:
    """Train all members, yielding a block of epochs at a time until all have stopped.

    Parameters
    ----------
    training : Training
    members : pytree
        From `start_members` or the last block. Its buffers are given away.
    seed : int
    data : tuple
        ``(x, y, x_validation, y_validation)`` on the devices; or, with row weights,
        ``(x, y, weights, x_validation, y_validation, weights_validation)``, each of mean 1.
    first : int
        Epochs already done.
    max_count : int
        Most epochs in one block; by time if not given.
    least : callable
        Returns the least of a number over all processes, which then advance by equal blocks until
        the members of all have stopped.

    Yields
    ------
    EpochBlock
        Nothing is yielded if all members have stopped already.
    """
    key = stage_key(seed, "ensemble-shuffle")
    limit = min(max_count or MAX_BLOCK_EPOCHS, MAX_BLOCK_EPOCHS)
    count, compiled = 1, False
    while first < training.max_epochs:
        if least(int(gather(members[1].stopped, training.placement).all())):
            return
        n = least(min(count, limit, training.max_epochs - first))
        begun = time.monotonic()
        members, history = training.advance(members, key, np.int32(first + n), data)
        history = gather(history, training.placement)
        seconds = time.monotonic() - begun
        yield EpochBlock(first, n, history[:, :n], members, seconds)
        first += n
        if compiled:
            count = int(np.clip(n * TARGET_SECONDS / max(seconds, 1e-6), max(1, n // 4), 4 * n))
        compiled = True


def finish_ensemble(member: Any, history: np.ndarray) -> Ensemble:
    """Return what training came to, from the state of all members (a `Member` of NumPy arrays).

    ``history`` (member, epoch, 2) ends with the last epoch that any member trained, whatever the
    blocks it came in.
    """
    history = history[:, : member.epoch.max()]
    return Ensemble(member.best, member.best_loss, member.best_epoch, member.epoch, history)


def mean_one(weights, rows: int) -> np.ndarray:
    """Return weights of rows (rows,) with mean 1; all equal if None."""
    if weights is None:
        return np.ones(rows)
    weights = np.asarray(weights, np.float64)
    return weights / weights.mean()


def fit_ensemble(
    posterior,
    x,
    y,
    x_validation=None,
    y_validation=None,
    *,
    members: int = 10,
    optimiser: optax.GradientTransformation | None = None,
    batch_size: int | None = 32,
    max_epochs: int = 1000,
    patience: int = 50,
    seed: int = 0,
    placement: Placement | None = None,
    on_block: Callable[[EpochBlock], None] | None = None,
    weights=None,
    weights_validation=None,
) -> Ensemble:
    """Train a deep ensemble, all members at once.

    Parameters
    ----------
    posterior : Posterior
    x, y : arrays
        Training rows: (rows, features) and (rows, targets) or (rows,) class indices.
    x_validation, y_validation : arrays
        Validation rows for early stopping; without them every member trains ``max_epochs``.
    members : int
    optimiser : optax.GradientTransformation
        AdamW with learning rate 5e-3 if not given.
    batch_size : int or None
        Rows per step, None for all rows.
    max_epochs, patience : int
        Most epochs; epochs without a better validation loss before a member stops.
    seed : int
    placement : Placement
    on_block : callable
        Called with each `EpochBlock`, for progress.
    weights, weights_validation : arrays (rows,), optional
        Weights of the rows in the losses, which are then weighted means; all equal if not given.

    Returns
    -------
    Ensemble

    Raises
    ------
    InputError
        Fewer rows than a batch, or data that do not fit the model.
    """
    placement = placement or place(members)
    validation = x_validation is not None and len(x_validation) > 0
    training_rows = posterior.arrays(x, y)
    held_out = posterior.arrays(x_validation, y_validation) if validation else training_rows
    training = build_training(
        posterior,
        optimiser or make_optimiser(),
        placement,
        rows=len(training_rows[0]),
        validation_rows=len(held_out[0]) if validation else 0,
        batch_size=batch_size,
        max_epochs=max_epochs,
        patience=patience,
    )
    if weights is not None:
        other = weights if not validation else weights_validation
        training_rows += (mean_one(weights, len(training_rows[0])),)
        held_out = (*held_out[:2], mean_one(other, len(held_out[0])))
    data = replicate((*training_rows, *held_out), placement)
    state = start_members(training, seed)
    history = []
    for block in run_epochs(training, state, seed, data):
        state = block.members
        history.append(block.history)
        if on_block:
            on_block(block._replace(members=None))
    return finish_ensemble(gather(state[1], placement), np.concatenate(history, axis=1))
