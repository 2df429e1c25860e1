r"""The No-U-Turn sampler, one leapfrog step at a time.

A trajectory grows by doublings, forwards or backwards in time at random, until its ends turn
towards each other. Between any two leapfrog steps all there is to know is in a `Tree` and its
`Checkpoints`, so chains that advance side by side need not be at the same point of their
trajectories (Dance, Glaser, Orbanz and Adams 2025, 2503.17405).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bnnmcmc.errors import InputError
from bnnmcmc.samplers import mass
from bnnmcmc.samplers.kernel import Kernel, Trajectories, trajectory_step
from bnnmcmc.samplers.network import network_warmup
from bnnmcmc.samplers.options import check_acceptance, check_positive
from bnnmcmc.samplers.window import window_warmup

# A point whose energy is above that of the start by more than this ends the trajectory (the limit
# of Stan).
MAX_ENERGY_ERROR = 1000.0
ADAPTATIONS = ("window", "network")
# Trees in the first half of the tuning after a walk: the step size is not known yet.
SHORT_DEPTH = 5


class NUTSState(NamedTuple):
    """Position (size,), its log-density (scalar) and gradient (size,)."""

    position: jax.Array
    logdensity: jax.Array
    gradient: jax.Array


class NUTSInfo(NamedTuple):
    """Statistics of one NUTS transition."""

    log_density: jax.Array
    energy: jax.Array
    acceptance_rate: jax.Array
    tree_depth: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array


class Noise(NamedTuple):
    """A standard normal (size,), 32 random bits, and the data of a key."""

    momentum: jax.Array
    directions: jax.Array
    key: jax.Array


class Ends(NamedTuple):
    """The earliest and the latest point of a trajectory, (2, size) each."""

    position: jax.Array
    momentum: jax.Array
    gradient: jax.Array


class Part(NamedTuple):
    r"""A part of a trajectory: the state drawn from its points, and sums over them.

    Points have weight :math:`e^{H_0 - H}`, with the energy :math:`H_0` of the trajectory's start.
    """

    state: NUTSState
    energy: jax.Array
    log_weight: jax.Array
    momentum_sum: jax.Array


class Tree(NamedTuple):
    r"""A trajectory under construction.

    Parameters
    ----------
    key : array of uint32
        Key data, for the random numbers of the leapfrog steps.
    directions : uint32
        Bit j says whether doubling j goes forwards in time.
    start_energy : scalar
        :math:`H_0`.
    depth, leaf, gradients : int32
        Doublings done; points of the doubling under way; leapfrog steps in all.
    ends : Ends
    whole, new : Part
        All up to the last doubling; the doubling under way.
    acceptance : scalar
        Sum of :math:`\min(1, e^{H_0 - H})` over all points but the start.
    diverging, turning : bool
        Why the trajectory ended, if it did.
    """

    key: jax.Array
    directions: jax.Array
    start_energy: jax.Array
    depth: jax.Array
    leaf: jax.Array
    gradients: jax.Array
    ends: Ends
    whole: Part
    new: Part
    acceptance: jax.Array
    diverging: jax.Array
    turning: jax.Array


class Checkpoints(NamedTuple):
    r"""First points of the subtrees of a doubling that are not complete, one a row.

    With momentum :math:`p_i` and the sum :math:`S_i` of momenta from the doubling's first point to
    this one: :math:`p_i` (rows, size), :math:`A_i = S_i - p_i / 2` (rows, size), and
    :math:`p_i^\top M^{-1} A_i` (rows,).
    """

    momentum: jax.Array
    middle: jax.Array
    product: jax.Array


def nuts(
    max_depth: int = 10,
    target_acceptance: float = 0.8,
    initial_step_size: float = 0.01,
    metric: str = "diagonal",
    max_rank: int = 20,
    cutoff: float = 2.0,
    adaptation: str = "window",
) -> Kernel:
    """Build the No-U-Turn sampler.

    The multinomial variant with biased progressive sampling and the generalised U-turn
    criterion: draws have the law of ``blackjax.nuts``.

    The warm-up is Stan's (``adaptation="window"``: step size by dual averaging, metric from
    windows of draws), or, for networks that start at an optimiser's weights, a walk of cheap
    steps and a short tuning after it (``"network"``: `network_warmup`).

    Parameters
    ----------
    max_depth : int
        Largest number of doublings: a draw costs at most ``2**max_depth - 1`` gradients.
    target_acceptance : float
        Mean acceptance statistic the warm-up aims at, in (0, 1).
    initial_step_size : float
        Step size at the first warm-up step; of ``adaptation="network"``, of the walk.
    metric : str
        ``"diagonal"``: variances. ``"low_rank"``: a diagonal, and variances in the directions
        that differ most from it, from draws and gradients (`mass.low_rank`). ``"dense"``:
        covariances.
    max_rank : int
        Most directions of a low-rank metric. A draw costs two products with a matrix
        (size, max_rank) for each gradient, and two more now and then.
    cutoff : float
        Directions whose variance is within this factor of the diagonal's are left out of a
        low-rank metric.
    adaptation : str
        ``"window"`` or ``"network"``.

    Returns
    -------
    Kernel

    Raises
    ------
    InputError
        An argument out of range.

    References
    ----------
    Hoffman and Gelman (2014), JMLR 15; multinomial variant and criterion of Betancourt (2017),
    1701.02434, appendix A; tree without recursion of Phan, Pradhan and Jankowiak (2019),
    1912.11554.
    """
    if not 1 <= max_depth <= 20:
        raise InputError(f"sampler.max_depth: found {max_depth}, expected 1 to 20")
    check_acceptance(target_acceptance)
    check_positive(initial_step_size=initial_step_size)
    mass.check_metric(metric, max_rank, cutoff)
    if adaptation not in ADAPTATIONS:
        raise InputError(
            f"sampler.adaptation: found {adaptation!r}, expected one of {', '.join(ADAPTATIONS)}"
        )

    def init(key, position, log_density):
        return NUTSState(position, *jax.value_and_grad(log_density)(position))

    trajectories = _trajectories(max_depth)
    step = trajectory_step(trajectories)

    def warmup(num_steps: int):
        options = initial_step_size, target_acceptance, metric, max_rank, cutoff
        if adaptation == "network":
            short = trajectory_step(_trajectories(min(max_depth, SHORT_DEPTH)))
            return network_warmup(step, short, NUTSState, _walked, num_steps, *options)
        return window_warmup(step, lambda state: state.gradient, num_steps, *options)

    return Kernel(
        "nuts",
        init,
        warmup,
        step,
        exact=True,
        gradients_per_step=None,
        trajectories=trajectories,
        wanted={"acceptance_rate": target_acceptance, "tree_depth": max_depth},
    )


def _trajectories(max_depth: int) -> Trajectories:
    def scratch(position: jax.Array) -> Checkpoints:
        rows = jnp.zeros((max_depth, *position.shape), position.dtype)
        return Checkpoints(rows, rows, rows[:, 0])

    def finished(tree: Tree) -> jax.Array:
        return tree.diverging | tree.turning | (tree.depth == max_depth)

    return Trajectories(scratch, randomise, begin, advance, finished, end)


def _walked(info) -> NUTSInfo:
    """Return the statistics of a step of the walk: no tree, and nothing turned down."""
    log_density = info.log_density
    return NUTSInfo(
        log_density,
        -log_density,
        jnp.where(info.diverging, 0.0, 1.0).astype(log_density.dtype),
        jnp.zeros((), jnp.int32),
        info.diverging,
        info.gradients,
        info.step_size,
    )


def randomise(key, position: jax.Array) -> Noise:
    """Draw the random numbers of a trajectory."""
    key_momentum, key_directions, key_leaves = jax.random.split(key, 3)
    return Noise(
        jax.random.normal(key_momentum, position.shape, position.dtype),
        jax.random.bits(key_directions, (), jnp.uint32),
        jax.random.key_data(key_leaves),
    )


def begin(noise: Noise, state: NUTSState, params) -> Tree:
    """Return a trajectory of one point."""
    metric = params.inverse_mass_matrix
    momentum = mass.momentum(metric, noise.momentum)
    energy = mass.kinetic(metric, momentum) - state.logdensity
    nought, no = jnp.zeros((), jnp.int32), jnp.asarray(False)
    start = Part(state, energy, jnp.zeros_like(energy), momentum)
    ends = (state.position, momentum, state.gradient)
    return Tree(
        noise.key,
        noise.directions,
        energy,
        depth=nought,
        leaf=nought,
        gradients=nought,
        ends=Ends(*(jnp.stack([point, point]) for point in ends)),
        whole=start,
        new=start,
        acceptance=jnp.zeros_like(energy),
        diverging=no,
        turning=no,
    )


def advance(tree: Tree, checkpoints: Checkpoints, params, log_density) -> tuple[Tree, Checkpoints]:
    """Make one leapfrog step: the next point of the doubling, and its end if it is the last."""
    metric = params.inverse_mass_matrix
    forwards = (tree.directions >> tree.depth.astype(jnp.uint32)) & 1 == 1
    at = jax.tree.map(lambda both: jnp.where(forwards, both[1], both[0]), tree.ends)
    step_size = jnp.where(forwards, params.step_size, -params.step_size)
    momentum = at.momentum + 0.5 * step_size * at.gradient
    position = at.position + mass.displacement(metric, step_size, momentum)
    state = NUTSState(position, *jax.value_and_grad(log_density)(position))
    momentum = momentum + 0.5 * step_size * state.gradient
    there = jnp.stack([~forwards, forwards])[:, None]
    # Moved also where the doubling comes to nothing: the trajectory is then over.
    ends = jax.tree.map(
        lambda new, old: jnp.where(there, new, old),
        Ends(position, momentum, state.gradient),
        tree.ends,
    )
    energy = mass.kinetic(metric, momentum) - state.logdensity
    gain = tree.start_energy - energy
    gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
    diverging = gain < -MAX_ENERGY_ERROR

    key = jax.random.fold_in(jax.random.wrap_key_data(tree.key), tree.gradients)
    log_uniform = jnp.log(jax.random.uniform(key, (2,), gain.dtype))
    # Within a doubling, a point is drawn in proportion to the weights.
    first, so_far = tree.leaf == 0, tree.new
    log_weight = jnp.where(first, gain, jnp.logaddexp(so_far.log_weight, gain))
    take = first | (log_uniform[0] < gain - log_weight)
    momentum_sum = jnp.where(first, 0.0, so_far.momentum_sum) + momentum
    drawn, drawn_energy = _choose(take, (state, energy), (so_far.state, so_far.energy))
    new = Part(drawn, drawn_energy, log_weight, momentum_sum)
    checkpoints, turning = _check(checkpoints, tree.leaf, momentum, momentum_sum, metric)

    last = tree.leaf + 1 == jnp.left_shift(1, tree.depth)
    over = last | turning | diverging
    whole, turning = jax.lax.cond(
        last & ~turning & ~diverging,
        lambda: _join(tree.whole, new, ends.momentum, log_uniform[1], metric),
        lambda: (tree.whole, turning),
    )
    tree = tree._replace(
        depth=tree.depth + over,
        leaf=jnp.where(over, 0, tree.leaf + 1),
        gradients=tree.gradients + 1,
        ends=ends,
        whole=whole,
        new=new,
        acceptance=tree.acceptance + jnp.exp(jnp.minimum(gain, 0.0)),
        diverging=diverging,
        turning=turning,
    )
    return tree, checkpoints


def end(tree: Tree, params) -> tuple[NUTSState, NUTSInfo]:
    """Return the state drawn from a finished trajectory."""
    state = tree.whole.state
    return state, NUTSInfo(
        state.logdensity,
        tree.whole.energy,
        tree.acceptance / tree.gradients.astype(tree.acceptance.dtype),
        tree.depth,
        tree.diverging,
        tree.gradients,
        params.step_size,
    )


def _join(whole: Part, new: Part, ends: jax.Array, log_uniform, metric) -> tuple[Part, jax.Array]:
    """Add a complete doubling: the joint part, and whether its ends (2, size) turn.

    The new part's state is preferred to one in proportion to the weights.
    """
    take = log_uniform < new.log_weight - whole.log_weight
    momentum_sum = whole.momentum_sum + new.momentum_sum
    log_weight = jnp.logaddexp(whole.log_weight, new.log_weight)
    state, energy = _choose(take, (new.state, new.energy), (whole.state, whole.energy))
    towards = mass.velocity(metric, momentum_sum - 0.5 * (ends[0] + ends[1]))
    return Part(state, energy, log_weight, momentum_sum), jnp.any(ends @ towards <= 0)


def _check(
    checkpoints: Checkpoints, leaf, momentum, momentum_sum, metric
) -> tuple[Checkpoints, jax.Array]:
    r"""Note a point of a doubling, and check whether a subtree that ends with it turns.

    Subtrees are complete where an odd leaf ends them: as many as its binary number ends in ones.
    The sum of their momenta is :math:`S - S_i + p_i`, so the criterion (sum, less half of the
    first and the last momentum, against either of these) needs :math:`B - A_i` with
    :math:`B = S - p / 2`.
    """
    row = jax.lax.population_count(leaf >> 1)
    odd = leaf & 1
    middle = momentum_sum - 0.5 * momentum
    velocity = mass.velocity(metric, momentum)
    product = jnp.dot(velocity, middle)
    # An odd leaf begins no subtree; the row above those in use takes what is not needed.
    checkpoints = jax.tree.map(
        lambda rows, value: rows.at[row + odd].set(value),
        checkpoints,
        Checkpoints(momentum, middle, product),
    )

    def turns():
        complete = jax.lax.population_count(((leaf + 1) & ~leaf) - 1)
        rows = jnp.arange(len(checkpoints.product))
        at_last = product - checkpoints.middle @ velocity
        at_first = checkpoints.momentum @ mass.velocity(metric, middle) - checkpoints.product
        ends_here = (row - complete < rows) & (rows <= row)
        return jnp.any(ends_here & ((at_last <= 0) | (at_first <= 0)))

    return checkpoints, jax.lax.cond(odd == 1, turns, lambda: jnp.asarray(False))


def _choose(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
