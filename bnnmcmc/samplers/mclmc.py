"""Microcanonical Langevin Monte Carlo (blackjax, unadjusted), tuned as in MILE, in a metric."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc import integrators

from bnnmcmc.errors import InputError
from bnnmcmc.samplers import kronecker
from bnnmcmc.samplers.kernel import Kernel, LogDensity, Warmup
from bnnmcmc.samplers.options import check_positive
from bnnmcmc.samplers.settled import until_settled

INTEGRATORS = {
    "leapfrog": (integrators.velocity_verlet_coefficients, 1),
    "minimal_norm": (integrators.mclachlan_coefficients, 2),
}

# A step with a larger energy error diverges, and is taken back (the limit of Stan for Hamiltonian
# Monte Carlo).
MAX_ENERGY_ERROR = 1000.0
# After the warm-up one is taken back already when the error is beyond so many of its standard
# deviations that are wanted, and beyond this itself. Errors are rarely large but then very large:
# of a network's posterior one step in ten thousand makes up most of the energy variance.
MAX_DEVIATIONS = 10.0
# So that a chain does not get stuck in a place too narrow for its steps, this share is shorter.
SHORT_SHARE, SHORT_FACTOR = 0.1, 0.25
# The running averages of the step size reach back over half of so many steps, or half of this share
# of the warm-up so far: rare large errors are in them then, not just behind or ahead of them.
REMEMBERED, REMEMBERED_SHARE = 100, 0.1
# After such a step the bound on the step size rises by this factor at each good one.
CAP_GROWTH = 1.02

# Phase 3 keeps at most this many draws and coordinates to estimate autocorrelation times.
MAX_TUNING_DRAWS = 1000
MAX_TUNING_COORDINATES = 200
# A phase with fewer draws than this says nothing about L, which then stays as it was.
MIN_TUNING_DRAWS = 10
# Relative energy errors below this are rounding, and say only that the step size is too small.
ROUNDING = 1e-6
# What a step size that has turned out too long is corrected by: at least this factor, and by this
# power of the energy variance. Of a network's posterior the squared error grows faster than with
# the sixth power of the step size: with about the 13th (2x16 tanh, 353 rows, steps that double).
MIN_CORRECTION, CORRECTION_POWER = 0.5, 1.0 / 12.0
TUNINGS = ("averaged", "mile")
METRICS = ("auto", "kronecker", "identity")
# The metric takes in the gradient of every so many warm-up steps. It is renewed first after so
# many, then whenever there are so many times as many, up to this share of the warm-up; what it saw
# before counts half from then on.
METRIC_EVERY, FIRST_RENEWAL, RENEWAL_GROWTH, RENEWED_SHARE = 5, 100, 1.5, 0.8
# The step size is a little shorter in a new metric, until its energy errors are known.
RENEWED_STEP = 0.7


class MCLMCParams(NamedTuple):
    """Step size and momentum decoherence length L (scalars), and the metric (None: identity)."""

    step_size: jax.Array
    decoherence_length: jax.Array
    metric: kronecker.Factors | None = None


class MetricEstimate(NamedTuple):
    """Sums over gradients, how many were seen, and the inverse of the metric in use."""

    sums: kronecker.Factors
    seen: jax.Array
    inverse: kronecker.Factors


class MCLMCInfo(NamedTuple):
    """Statistics of one MCLMC step.

    ``energy_error_squared`` is per dimension (EEVPD), and zero for a step that was taken back;
    ``acceptance_rate`` is zero then, and one for all others.
    """

    log_density: jax.Array
    acceptance_rate: jax.Array
    energy_error_squared: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array
    decoherence_length: jax.Array


class MILEState(NamedTuple):
    """Running estimates of the three phases."""

    params: MCLMCParams
    weight_sum: jax.Array
    weighted_error: jax.Array
    max_step_size: jax.Array
    moment_weight: jax.Array
    mean: jax.Array
    squares: jax.Array
    kept: jax.Array
    num_kept: jax.Array
    error_sum: jax.Array
    num_errors: jax.Array
    estimate: MetricEstimate | None


def isokinetic_step(
    integrator: str,
    log_density: LogDensity,
    metric: kronecker.Factors | None = None,
    matrices: Sequence[kronecker.Matrix] = (),
) -> Callable[[integrators.IntegratorState, jax.Array], tuple[integrators.IntegratorState, Any]]:
    r"""Return a step of the isokinetic dynamics: ``step(state, step_size) -> (state, energy)``.

    With a metric :math:`S`, the dynamics are those of :math:`z = S^{-1} \theta`: the gradient that
    turns the momentum is :math:`S \nabla \log p`, the velocity is S times the momentum.

    Parameters
    ----------
    integrator : str
        One of `INTEGRATORS`.
    log_density : callable
    metric, matrices
        See `kronecker.scale`; None is the identity.

    Returns
    -------
    callable
        The state's position and gradient are those of the parameters, its momentum is that of z.
        The energy is the change of the kinetic one.
    """
    turn = integrators.esh_dynamics_momentum_update_one_step(1.0)

    def scaled(vector):
        return vector if metric is None else kronecker.scale(metric, matrices, vector)

    def turn_in_metric(momentum, gradient, *arguments, **options):
        momentum, velocity, energy = turn(momentum, scaled(gradient), *arguments, **options)
        return momentum, scaled(velocity), energy

    return integrators.generalized_two_stage_integrator(
        turn_in_metric,
        integrators.euclidean_position_update_fn(log_density),
        INTEGRATORS[integrator][0],
        integrators.format_isokinetic_state_output,
    )


def mclmc(
    integrator: str = "leapfrog",
    energy_variance_start: float = 0.5,
    energy_variance_end: float = 0.02,
    initial_step_size: float = 0.005,
    tuning: str = "averaged",
    metric: str = "auto",
    damping: float = 1000.0,
    settle: bool = False,
) -> Kernel:
    r"""Build unadjusted MCLMC, tuned per chain as in MILE, or nearly so.

    A step moves position and direction :math:`u` along the isokinetic dynamics for :math:`\epsilon`
    (blackjax's integrators) and then turns the direction a little, with
    :math:`z \sim N(0, I_d)`:

    .. math:: u \leftarrow \frac{u + \nu z}{\lVert u + \nu z \rVert}, \quad
              \nu = \sqrt{(e^{2 \epsilon / L} - 1) / d}.

    The warm-up has three phases. In the first eight tenths the step size follows the energy
    error :math:`\Delta E`: with :math:`\xi = \Delta E^2 / (d v)`, weights
    :math:`w = \exp(-\tfrac12 (\ln \xi / 9)^2)` and memory :math:`\lambda`,

    .. math:: \bar x \leftarrow \lambda \bar x + w \xi v \epsilon^{-6}, \quad
              \tau \leftarrow \lambda \tau + w, \quad
              \epsilon = (v \tau / \bar x)^{1/6},

    where the wanted energy variance per dimension v falls linearly from
    ``energy_variance_start`` to ``energy_variance_end``; :math:`\lambda = (n - 1) / (n + 1)` with
    n = 100 or a tenth of the steps so far, if that is more. In the next tenth the moments of the
    position give :math:`L = \sqrt{\sum_i \mathrm{Var}[\theta_i]}` (the step size still adapts);
    in the last tenth :math:`L = 0.4\, \epsilon\, \mathrm{mean}_i(n / \mathrm{ESS}_i)`, and the mean
    :math:`\bar v` of :math:`\Delta E^2 / d` there, if it is beyond v, at last gives
    :math:`\epsilon \leftarrow \epsilon\, (v / \bar v)^{1/12}`: the step size so far was the last
    of a fluctuating sequence, too long in some chains. (A step taken back
    counts :math:`100 v`. A power of 1/6, right for small steps, overshoots: the error of large ones
    grows faster than their sixth power.) Starts at
    :math:`L = \max(\sqrt d, 15)`. A step that leaves the finite numbers, or
    whose energy error is beyond :math:`\max(1000, 30 \sqrt d)`, is taken back, counts as
    diverging, and caps the step size at 0.8 of what it was (the cap then rises by 2 % a step). As
    long as energy errors are no more than rounding, the step size doubles. A warm-up that ends
    early hands over the step size for ``energy_variance_end``, so its draws are not hotter. L and
    the step size stay as they are where a phase has fewer than ten draws.

    From the last tenth of the warm-up on, also a step with
    :math:`\lvert \Delta E \rvert > 10 \max(1, \sqrt{d v})` is taken back: of a network's posterior,
    errors are rarely large but then very large, and heat the chain. (The way back would be refused
    as well, so this has no bias of its own.) One step in ten, at random, is a quarter as long, by
    which a chain leaves places that are too narrow for the others.

    Metric. The posterior of a network is up to a million times as curved in some directions as in
    others. With ``metric="kronecker"`` the steps are made in coordinates z with
    :math:`\Theta = R Z C` for each layer; R and C are found from gradients of the walk (see
    `kronecker`) after 100 steps and whenever there are half as many again, up to eight tenths of
    the warm-up. L and :math:`\epsilon` are lengths in z. Positions without a matrix among their
    leaves, and warm-ups of no more than 125 steps, have none.

    Bias. There is no accept-reject step, so draws are spread too wide. With the leapfrog and
    :math:`x = 0.45\, (d v)^{1/3}`, v being ``energy_variance_end``, the variance of a parameter
    is too large by a factor of up to :math:`1 / (1 - x)`; its mean is off by up to
    :math:`x / 5` standard deviations and the probability below a quantile by up to :math:`x / 8`.
    This was measured, not proved: on known posteriors of 2 to 11 dimensions for v of 1e-4 and
    0.05 and on a normal of 100 dimensions and condition :math:`10^4` for 1e-4, and tests hold it
    there. It is the narrowest axes that are so wide: with scale :math:`\sigma` on an axis of a
    normal the factor is at most :math:`1 / (1 - \epsilon^2 / (4 d \sigma^2))`, and where all
    axes are alike, the excess is :math:`0.43\, v^{1/3}` whatever d (16 % for 0.05, 2 % for 1e-4).
    Where x comes near 1 nothing is promised: for 0.05 the narrowest of the hundred axes had 2.3 to
    2.8 times its variance.

    ``tuning="mile"`` is the published form, for comparison: n stays 100; it averages
    :math:`\xi \epsilon^{-6}`, which remembers v as well (while v falls, the step size lags behind,
    and the wanted end value is never reached); there is no metric, no correction by
    :math:`\bar v`, no bound on the energy error of a step, no shorter step, no doubling, and a cap
    on the step size stays. Published values
    are 0.5 and 0.1 for the energy variance.

    Parameters
    ----------
    integrator : str
        ``"leapfrog"`` (one gradient a step) or ``"minimal_norm"`` (two).
    energy_variance_start, energy_variance_end : float
        Wanted energy error variance per dimension, at the start and end of tuning. The end value
        sets the bias of the draws: there is no accept-reject step.
    initial_step_size : float
        Step size at the first warm-up step.
    tuning : str
        ``"averaged"`` or ``"mile"``.
    metric : str
        ``"kronecker"``, ``"identity"``, or ``"auto"``: Kronecker, but none with the published
        tuning.
    damping : float
        Curvature (of the log-density) from which on the metric scales directions. Those of the
        prior alone have one over the squared prior scale.
    settle : bool
        Whether a chain skips what is left of the first eight tenths of its warm-up once its
        log-density and step size have settled (`until_settled`). Not with the published tuning.

    Returns
    -------
    Kernel

    Raises
    ------
    InputError
        An argument out of range.

    References
    ----------
    Robnik and Seljak (2023), 2303.18221; Sommer et al. (2025), 2502.06335 (MILE), appendix; of the
    metric, see `kronecker`.
    """
    if integrator not in INTEGRATORS:
        raise InputError(
            f"sampler.integrator: found {integrator!r}, expected one of {', '.join(INTEGRATORS)}"
        )
    if tuning not in TUNINGS:
        raise InputError(f"sampler.tuning: found {tuning!r}, expected one of {', '.join(TUNINGS)}")
    published = tuning == "mile"
    check_positive(
        energy_variance_start=energy_variance_start,
        energy_variance_end=energy_variance_end,
        initial_step_size=initial_step_size,
        damping=damping,
    )
    if metric not in METRICS:
        raise InputError(f"sampler.metric: found {metric!r}, expected one of {', '.join(METRICS)}")
    if published and metric == "kronecker":
        raise InputError(
            'sampler.metric: found "kronecker" with tuning = "mile", which is as published and has '
            "none; remove one of the two"
        )
    if published and settle:
        raise InputError(
            'sampler.settle: found true with tuning = "mile", which runs its length; remove one of '
            "the two"
        )
    gradients = INTEGRATORS[integrator][1]

    def init(key, position, log_density):
        if position.shape[0] < 2:
            raise InputError(
                "microcanonical kernels need at least 2 parameters; use nuts for a single one"
            )
        return blackjax.mclmc.init(position, log_density, key)

    def for_matrices(matrices: tuple[kronecker.Matrix, ...]) -> Kernel:
        def step(key, state, params, log_density, settled=True):
            # The parts of blackjax's kernel, without the four vectors of random numbers that it
            # draws besides: they would cost half a gradient of a small network.
            dimension = state.position.shape[0]
            step_size, largest = params.step_size, jnp.inf
            limit: Any = jnp.inf
            if not published:
                # A larger error leaves the posterior for good: from there only tiny steps are
                # stable.
                largest = max(MAX_ENERGY_ERROR, 30.0 * dimension**0.5)
                deviations = max(1.0, (dimension * energy_variance_end) ** 0.5)
                limit = jnp.where(settled, MAX_DEVIATIONS * deviations, largest)
                short = jax.random.bernoulli(jax.random.fold_in(key, 1), SHORT_SHARE) & settled
                step_size = jnp.where(short, SHORT_FACTOR, 1.0).astype(step_size.dtype) * step_size
            move = isokinetic_step(integrator, log_density, params.metric, matrices)
            moved, kinetic_change = move(state, step_size)
            energy_change = kinetic_change - moved.logdensity + state.logdensity
            # Comparisons with NaN are false: a step out of the finite numbers is not kept either.
            gradient = moved.logdensity_grad
            finite = jnp.isfinite(gradient @ gradient)
            kept = (jnp.abs(energy_change) <= limit) & finite
            noise = jax.lax.optimization_barrier(
                jax.random.normal(key, state.position.shape, state.position.dtype)
            )
            # The bound keeps a step that is far too long in the finite numbers; noise prevails
            # anyway.
            turned = jnp.minimum(2 * step_size / params.decoherence_length, 40.0)
            spread = jnp.sqrt(jnp.expm1(turned) / dimension)
            # After a step that was taken back: a new direction, the noise alone.
            direction = jnp.where(kept, moved.momentum + spread * noise, noise)
            state = jax.tree.map(lambda new, old: jnp.where(kept, new, old), moved, state)
            state = state._replace(momentum=direction * jax.lax.rsqrt(direction @ direction))
            return state, MCLMCInfo(
                state.logdensity,
                kept.astype(state.logdensity.dtype),
                jnp.where(kept, jnp.square(energy_change) / dimension, 0.0),
                ~((jnp.abs(energy_change) <= largest) & finite),
                jnp.asarray(gradients, jnp.int32),
                params.step_size,
                params.decoherence_length,
            )

        def warmup(num_steps: int) -> Warmup:
            rules = mile_warmup(
                step,
                num_steps,
                energy_variance_start,
                energy_variance_end,
                initial_step_size,
                published,
                matrices,
                damping,
            )
            if not settle:
                return rules
            return until_settled(rules, num_steps, first_phase(num_steps), _no_info)

        return Kernel(
            "mclmc",
            init,
            warmup,
            step,
            exact=False,
            gradients_per_step=gradients,
            # Few steps are taken back: see `MAX_DEVIATIONS`.
            wanted={"energy_error_squared": energy_variance_end, "acceptance_rate": 1.0},
            for_matrices=None if published or metric == "identity" else for_matrices,
        )

    return for_matrices(())


def _no_info(position: jax.Array) -> MCLMCInfo:
    zero, nought = jnp.zeros((), position.dtype), jnp.zeros((), jnp.int32)
    return MCLMCInfo(zero, zero, zero, jnp.asarray(False), nought, zero, zero)


def first_phase(num_steps: int) -> int:
    """Return after how many steps of a warm-up the moments of the position are taken."""
    return round(0.8 * num_steps)


def renewal_steps(num_steps: int) -> list[int]:
    """Return after how many steps of a warm-up its metric is renewed."""
    steps, at = [], float(FIRST_RENEWAL)
    while at < RENEWED_SHARE * num_steps:
        steps.append(round(at))
        at *= RENEWAL_GROWTH
    return steps


def mile_warmup(
    step,
    num_steps,
    variance_start,
    variance_end,
    initial_step_size,
    published=False,
    matrices=(),
    damping=1.0,
    remembered_share=REMEMBERED_SHARE,
    short_share=SHORT_SHARE,
    refused=lambda info: info.acceptance_rate == 0,
) -> Warmup:
    """Build the three-phase MILE warm-up around an MCLMC ``step`` (see `mclmc`).

    Parameters
    ----------
    step : callable or None
        ``step(key, state, params, log_density, settled)``; None if only ``adapt`` is wanted.
    num_steps, variance_start, variance_end, initial_step_size, published
        See `mclmc`.
    matrices, damping
        Of the metric (see `kronecker`); without matrices there is none.
    remembered_share : float
        Share of the steps so far that the running averages reach back over (half of it).
    short_share : float
        Share of the steps after the warm-up that are so short that they hardly err.
    refused : callable
        ``refused(info) -> bool``: whether a step was taken back.
    """
    end_step_size = first_phase(num_steps)
    end_moments = round(0.9 * num_steps)
    tuning_draws = num_steps - end_moments
    every = max(1, -(-tuning_draws // MAX_TUNING_DRAWS))
    capacity = tuning_draws // every
    renewals = renewal_steps(num_steps) if matrices else []
    # What a step that was taken back counts for, at least.
    refused_error = MAX_DEVIATIONS**2 * variance_end
    cap_growth = 1.0 if published else CAP_GROWTH

    def coordinates(position: jax.Array) -> jax.Array:
        stride = max(1, -(-position.shape[0] // MAX_TUNING_COORDINATES))
        return position[::stride]

    def init(position: jax.Array) -> MILEState:
        dimension, dtype = position.shape[0], position.dtype
        zero = jnp.zeros((), dtype)
        unit = kronecker.identity(matrices, dtype) if renewals else None
        return MILEState(
            MCLMCParams(
                jnp.asarray(initial_step_size, dtype),
                jnp.asarray(max(dimension**0.5, 15.0), dtype),
                unit,
            ),
            zero,
            zero,
            jnp.asarray(jnp.inf, dtype),
            zero,
            jnp.zeros_like(position),
            jnp.zeros_like(position),
            jnp.zeros((capacity, *coordinates(position).shape), dtype),
            jnp.zeros((), jnp.int32),
            zero,
            jnp.zeros((), jnp.int32),
            unit and MetricEstimate(jax.tree.map(jnp.zeros_like, unit), zero, unit),
        )

    def step_size_for(variance, a: MILEState) -> jax.Array:
        growth = (variance * a.weight_sum / a.weighted_error) ** (1.0 / 6.0)
        growth = jnp.where(a.weight_sum > 0, growth, 1.0)
        return jnp.minimum(a.params.step_size * growth, a.max_step_size)

    def tune_step_size(a: MILEState, info: MCLMCInfo, t) -> MILEState:
        epsilon = a.params.step_size
        last = end_moments + 1 if published else max(end_moments - 1, 1)
        progress = jnp.minimum(jnp.asarray(t, epsilon.dtype) / last, 1.0)
        wanted = variance_start * (1 - progress) + variance_end * progress
        # Times the reciprocal, here and below: XLA makes this of a division by what chains have in
        # common, but not in programs for one device, whose draws would then differ.
        xi = info.energy_error_squared * (1.0 / wanted) + 1e-8
        # A step taken back, or an error whose square overflows, says only that epsilon was too
        # large.
        failed = info.diverging | ~jnp.isfinite(xi)
        # Such errors would be remembered for long, and hold a far too small step size back.
        tiny = ~failed & (xi < ROUNDING) & (a.weight_sum == 0) & (not published)
        # What is averaged, besides the step size: the energy variance, or its share of v.
        scale = jnp.ones_like(wanted) if published else wanted
        unused = failed | tiny
        reach = jnp.maximum(REMEMBERED, (0.0 if published else remembered_share) * t)
        memory = ((reach - 1) * (1.0 / (reach + 1))).astype(epsilon.dtype)
        xi = jnp.where(unused, 1.0, xi)
        weight = jnp.where(unused, 0.0, jnp.exp(-0.5 * jnp.square(jnp.log(xi) / (6.0 * 1.5))))
        # The average is kept times the sixth power of the step size in use, which alone would
        # leave the range of float32.
        a = a._replace(
            params=a.params._replace(step_size=jnp.where(tiny, 2.0 * epsilon, epsilon)),
            weighted_error=memory * a.weighted_error + weight * xi * scale,
            weight_sum=memory * a.weight_sum + weight,
            max_step_size=jnp.where(failed, 0.8 * epsilon, cap_growth * a.max_step_size),
        )
        step_size = step_size_for(scale, a)
        return a._replace(
            params=a.params._replace(step_size=step_size),
            weighted_error=a.weighted_error * (step_size / epsilon) ** 6,
        )

    def renew_metric(a: MILEState, gradient: jax.Array) -> MILEState:
        """Take the metric from what was seen; begin anew with the step size, from a guess."""
        known = a.estimate
        assert known is not None
        metric, inverse = kronecker.roots(known.sums, known.seen, damping)

        def steepness(metric):
            scaled = kronecker.scale(metric, matrices, gradient)
            return jnp.sqrt(scaled @ scaled)

        growth = RENEWED_STEP * steepness(a.params.metric) / steepness(metric)
        renewed = a._replace(
            params=a.params._replace(step_size=growth * a.params.step_size, metric=metric),
            weight_sum=jnp.zeros_like(a.weight_sum),
            weighted_error=jnp.zeros_like(a.weighted_error),
            max_step_size=jnp.full_like(a.max_step_size, jnp.inf),
            estimate=MetricEstimate(
                jax.tree.map(lambda s: 0.5 * s, known.sums), 0.5 * known.seen, inverse
            ),
        )
        # Gradients whose squares overflow give none; a gradient of zeros gives no step size.
        usable = jnp.isfinite(growth) & jnp.all(
            jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(metric)])
        )
        return jax.tree.map(lambda new, old: jnp.where(usable, new, old), renewed, a)

    def tune_metric(a: MILEState, gradient: jax.Array, t) -> MILEState:
        def see(known):
            return known._replace(
                sums=kronecker.add_moments(known.sums, matrices, gradient), seen=known.seen + 1
            )

        a = a._replace(
            estimate=jax.lax.cond(t % METRIC_EVERY == 0, see, lambda known: known, a.estimate)
        )
        due = jnp.any(t + 1 == jnp.asarray(renewals, jnp.int32))
        return jax.lax.cond(due, lambda a: renew_metric(a, gradient), lambda a: a, a)

    def add_moments(a: MILEState, position: jax.Array, info: MCLMCInfo) -> MILEState:
        # L is a length in the coordinates of the metric.
        if a.estimate is not None:
            position = kronecker.scale(a.estimate.inverse, matrices, position)
        weight = jnp.where(info.diverging, 0.0, info.step_size)
        total = a.moment_weight + weight
        share = jnp.where(total > 0, weight / total, 0.0)
        # Welford's recursion with weights: a mean far from zero costs no digits.
        mean = a.mean + share * (position - a.mean)
        squares = a.squares + weight * (position - a.mean) * (position - mean)
        return a._replace(moment_weight=total, mean=mean, squares=squares)

    def length_from_moments(a: MILEState) -> MILEState:
        if end_moments - end_step_size < MIN_TUNING_DRAWS:
            return a
        spread = jnp.sqrt(jnp.sum(a.squares) / a.moment_weight)
        length = jnp.where(
            (a.moment_weight > 0) & (spread > 0), spread, a.params.decoherence_length
        )
        return a._replace(params=a.params._replace(decoherence_length=length))

    def keep(a: MILEState, position: jax.Array, info: MCLMCInfo, t) -> MILEState:
        if capacity == 0:
            return a
        a = a._replace(
            error_sum=a.error_sum
            + jnp.where(refused(info), refused_error, info.energy_error_squared),
            num_errors=a.num_errors + 1,
        )
        since = t - end_moments
        slot = since // every
        use = (since % every == every - 1) & (slot < capacity)
        kept = jax.lax.cond(
            use,
            lambda kept: kept.at[slot].set(coordinates(position)),
            lambda kept: kept,
            a.kept,
        )
        return a._replace(kept=kept, num_kept=a.num_kept + use)

    def adapt(a: MILEState, state, info, t) -> MILEState:
        def first_phases(a):
            a = tune_step_size(a, info, t)
            if renewals:
                a = tune_metric(a, state.logdensity_grad, t)
            a = jax.lax.cond(
                t >= end_step_size, lambda a: add_moments(a, state.position, info), lambda a: a, a
            )
            return jax.lax.cond(t == end_moments - 1, length_from_moments, lambda a: a, a)

        def last_phase(a):
            return keep(a, state.position, info, t)

        return jax.lax.cond(t < end_moments, first_phases, last_phase, a)

    def warm(key, state, a: MILEState, t, log_density):
        state, info = step(key, state, a.params, log_density, t >= end_moments)
        return state, adapt(a, state, info, t), info

    def finish(a: MILEState) -> MCLMCParams:
        params = a.params
        if not published:
            corrected = jnp.where(
                (a.num_errors >= MIN_TUNING_DRAWS) & (a.error_sum > 0),
                # Never up: few errors can tell that a step is too long, but where rare ones
                # make up the mean, not that it is too short.
                jnp.clip(
                    (variance_end * a.num_errors / a.error_sum) ** CORRECTION_POWER,
                    MIN_CORRECTION,
                    1.0,
                ),
                1.0,
            )
            # The shorter steps hardly err.
            full = variance_end / (1 - short_share)
            params = params._replace(step_size=step_size_for(full, a) * corrected)
        if capacity < MIN_TUNING_DRAWS:
            return params
        # effective_sample_size wants (chain, draw, coordinate).
        ess = blackjax.diagnostics.effective_sample_size(a.kept[None])
        tau = every * capacity / ess
        length = 0.4 * a.params.step_size * jnp.mean(tau)
        usable = (a.num_kept == capacity) & jnp.isfinite(length) & (length > 0)
        return params._replace(
            decoherence_length=jnp.where(usable, length, params.decoherence_length)
        )

    return Warmup(init, warm, finish, lambda a: a.params, adapt)
