"""NUTS as a state machine: the law of a recursive reference and of blackjax, and no lockstep."""

import functools

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_thinned
from scipy import stats

from bnnmcmc import trees
from bnnmcmc.placement import Placement, gather, place, spread
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.samplers.window import HamiltonianParams
from bnnmcmc.sampling import (
    at_rest,
    build_program,
    finish_warmup,
    join_stats,
    run_blocks,
    sample_density,
    start_chains,
)

SIZE = 4
SCALES = np.geomspace(0.3, 3.0, SIZE)
COVARIANCE = np.outer(SCALES, SCALES) * 0.8 ** np.abs(np.subtract.outer(range(SIZE), range(SIZE)))
PRECISION = np.linalg.inv(COVARIANCE)


def gaussian(x):
    return -0.5 * x @ jnp.asarray(PRECISION, x.dtype) @ x


def funnel(x):
    """Log-scale from N(0, 1.5^2), the others given it from N(0, e^v): trees are uneven."""
    v, rest = x[0], x[1:]
    return -0.5 * ((v / 1.5) ** 2 + jnp.sum(rest**2) * jnp.exp(-v) + rest.shape[0] * v)


# ------------------------------------------------------------------------- one trajectory, exactly


class Reference:
    """The tree by recursion, in NumPy: every point is kept, and its probability of being drawn."""

    def __init__(self, density, state, momentum, step_size, metric):
        self.gradient = jax.jit(jax.value_and_grad(density))
        self.step_size, self.metric = step_size, metric
        start = tuple(np.asarray(part) for part in (state.position, momentum, state.gradient))
        self.first = self.last = start
        self.start_energy = self.energy(momentum, float(state.logdensity))
        self.acceptance, self.gradients = 0.0, 0

    def energy(self, momentum, log_density):
        return 0.5 * momentum @ (self.metric * momentum) - log_density

    def turning(self, points):
        momenta = np.array([momentum for _, momentum, _ in points])
        rho = momenta.sum(0) - 0.5 * (momenta[0] + momenta[-1])
        return bool(min((self.metric * momenta[[0, -1]]) @ rho) <= 0)

    def leapfrog(self, point, forwards):
        position, momentum, gradient = point
        step = self.step_size if forwards else -self.step_size
        momentum = momentum + 0.5 * step * gradient
        position = position + step * self.metric * momentum
        log_density, gradient = map(np.asarray, self.gradient(position))
        momentum = momentum + 0.5 * step * gradient
        return (position, momentum, gradient), float(log_density)

    def subtree(self, point, depth, forwards):
        """Return the points in time order, with weights, and "turning", "diverging" or None."""
        if depth == 0:
            new, log_density = self.leapfrog(point, forwards)
            self.gradients += 1
            gain = self.start_energy - self.energy(new[1], log_density)
            gain = -np.inf if np.isnan(gain) else gain
            self.acceptance += np.exp(min(gain, 0.0))
            return [new], [np.exp(gain)], "diverging" if gain < -1000 else None
        points, weights, stopped = self.subtree(point, depth - 1, forwards)
        if stopped:
            return points, weights, stopped
        edge = points[-1] if forwards else points[0]
        more, more_weights, stopped = self.subtree(edge, depth - 1, forwards)
        pair = [(points, weights), (more, more_weights)]
        (a, wa), (b, wb) = pair if forwards else pair[::-1]
        if not stopped and self.turning(a + b):
            stopped = "turning"
        return a + b, wa + wb, stopped

    def grow(self, directions, max_depth):
        """Return depth, why it stopped, and {position of a point: probability}."""
        points, total, stopped, depth = [self.first], 1.0, None, 0
        probabilities = {tuple(self.first[0]): 1.0}
        while depth < max_depth and not stopped:
            forwards = bool(directions >> depth & 1)
            edge = points[-1] if forwards else points[0]
            new, weights, stopped = self.subtree(edge, depth, forwards)
            depth += 1
            if stopped:
                break
            weight = sum(weights)
            move = min(1.0, weight / total)
            probabilities = {p: (1 - move) * q for p, q in probabilities.items()}
            for point, own in zip(new, weights, strict=True):
                probabilities[tuple(point[0])] = move * own / weight if own else 0.0
            total += weight
            points = points + new if forwards else new + points
            stopped = "turning" if self.turning(points) else None
        return depth, stopped, probabilities


def begun(density, key, position, params):
    """A trajectory before its first step."""
    kernel = nuts()
    noise = kernel.trajectories.randomise(key, position)
    return kernel.trajectories.begin(noise, kernel.init(key, position, density), params)


def one_trajectory(density, max_depth, tree, params):
    """Run a begun trajectory to its end."""
    parts = nuts(max_depth=max_depth).trajectories
    tree, _ = jax.lax.while_loop(
        lambda loop: ~parts.finished(loop[0]),
        lambda loop: parts.advance(*loop, params, density),
        (tree, parts.scratch(tree.whole.state.position)),
    )
    return tree, *parts.end(tree, params)


@pytest.mark.parametrize(
    ("density", "step_size"), [(gaussian, 0.15), (gaussian, 0.3), (funnel, 0.3), (funnel, 3.0)]
)
def test_a_tree_is_the_one_built_by_recursion(density, step_size):
    """Depth, gradients, acceptance and divergence agree for every momentum and direction."""
    max_depth, metric = 6, np.array([0.5, 1.0, 2.0, 1.0])
    found = []
    with jax.enable_x64(True):
        params = HamiltonianParams(jnp.asarray(step_size), jnp.asarray(metric))
        grow = jax.jit(lambda tree: one_trajectory(density, max_depth, tree, params))
        start = jax.jit(lambda key, x: begun(density, key, x, params))
        for i in range(40):
            key = jax.random.key(i)
            tree = start(key, jax.random.normal(key, (SIZE,)))
            ended, state, info = grow(tree)
            reference = Reference(
                density, tree.whole.state, np.asarray(tree.whole.momentum_sum), step_size, metric
            )
            depth, stopped, probabilities = reference.grow(int(tree.directions), max_depth)
            assert int(info.tree_depth) == depth
            assert int(info.gradients) == reference.gradients
            assert bool(info.diverging) == (stopped == "diverging")
            assert bool(ended.turning & ~ended.diverging) == (stopped == "turning")
            np.testing.assert_allclose(
                info.acceptance_rate, reference.acceptance / reference.gradients, rtol=1e-6
            )
            nearest = min(probabilities, key=lambda p: np.abs(np.array(p) - state.position).max())
            np.testing.assert_allclose(state.position, nearest, rtol=1e-6, atol=1e-8)
            assert probabilities[nearest] > 0
            np.testing.assert_allclose(
                [state.logdensity, *state.gradient],
                [density(state.position), *jax.grad(density)(state.position)],
                rtol=1e-6,
                atol=1e-8,
            )
            found.append((depth, stopped))
    assert len(set(found)) > 2  # not one case again and again


def test_states_are_drawn_with_their_probabilities():
    """One trajectory again and again, with other random numbers for the choice of the state."""
    repeats, step_size, found = 20_000, 0.25, 0
    with jax.enable_x64(True):
        params = HamiltonianParams(jnp.asarray(step_size), jnp.ones(SIZE))

        def position(key, tree):
            tree = tree._replace(key=jax.random.key_data(key))
            return one_trajectory(gaussian, 6, tree, params)[1].position

        draw = jax.jit(jax.vmap(position, in_axes=(0, None)))
        root = jnp.asarray(np.linalg.cholesky(COVARIANCE))
        for seed in range(8):
            key = jax.random.key(seed)
            # A typical start and a coarse step: weights differ, and not only in the first's favour.
            tree = begun(gaussian, key, root @ jax.random.normal(key, (SIZE,)), params)
            state = tree.whole.state
            momentum = np.asarray(tree.whole.momentum_sum)
            reference = Reference(gaussian, state, momentum, step_size, np.ones(SIZE))
            probabilities = reference.grow(int(tree.directions), 6)[2]
            if len(probabilities) < 8:
                continue
            found += 1
            points = np.array(list(probabilities))
            positions = np.asarray(draw(jax.random.split(key, repeats), tree))
            nearest = np.abs(positions[:, None] - points).max(-1).argmin(1)
            counts = np.bincount(nearest, minlength=len(points))
            expected = repeats * np.array(list(probabilities.values()))
            assert np.all(counts[expected < 1e-9] == 0)
            often = expected > 5
            assert often.sum() >= 4
            counts, expected = counts[often], expected[often]
            assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
    assert found >= 3


# ------------------------------------------------------------------------------- against blackjax

CHAINS = 3000


def transitions(density, kernel):
    """The function of a step size and a seed that makes one transition from each of many starts.

    It returns depths, acceptance rates, gradients and energies.
    """

    def ours(key, x, params):
        _, info = nuts().step(key, nuts().init(key, x, density), params, density)
        return info.tree_depth, info.acceptance_rate, info.gradients, info.energy

    def theirs(key, x, params):
        state = blackjax.nuts.init(x, density)
        _, info = blackjax.nuts.build_kernel()(key, state, density, *params)
        return (
            info.num_trajectory_expansions,
            info.acceptance_rate,
            info.num_integration_steps,
            info.energy,
        )

    transition = {"ours": ours, "theirs": theirs}[kernel]

    @jax.jit
    def run(step_size, seed):
        keys = jax.random.split(jax.random.key(seed), CHAINS)
        # Not from the target: the law of a transition is to be the same from anywhere.
        starts = jax.random.normal(jax.random.key(seed + 1), (CHAINS, SIZE))
        params = HamiltonianParams(step_size, jnp.linspace(0.5, 2.0, SIZE))
        depth, rate, gradients, energy = jax.vmap(transition, (0, 0, None))(keys, starts, params)
        # Rounded, or else a rate of one and its neighbours in the last bit were unlike.
        return depth, jnp.round(rate, 4), gradients, energy

    return lambda step_size, seed: [np.asarray(a) for a in run(jnp.float32(step_size), seed)]


def p_values(a, b):
    """Of two samples of transitions: depths by chi-square, the rest by Kolmogorov-Smirnov."""
    table = np.array([np.bincount(x[0], minlength=11) for x in (a, b)])
    table = table[:, table.sum(0) > 20]
    return [stats.chi2_contingency(table).pvalue] + [
        stats.ks_2samp(x, y, method="asymp").pvalue for x, y in zip(a[1:], b[1:], strict=True)
    ]


@pytest.mark.parametrize(("density", "step_size"), [(gaussian, 0.2), (funnel, 0.3)])
def test_depth_acceptance_and_energy_have_the_law_of_blackjax(density, step_size):
    theirs = transitions(density, "theirs")(step_size, 10)
    assert len(np.unique(theirs[0])) >= 4
    ours = transitions(density, "ours")
    assert min(p_values(ours(step_size, 20), theirs)) > 1e-3
    # A step size of a tenth more is told apart.
    assert min(p_values(ours(1.1 * step_size, 20), theirs)) < 1e-6


# ------------------------------------------------------------------------------------ no lockstep

LAYOUT = trees.layout(jnp.zeros(SIZE))
STARTS = jnp.asarray(np.random.default_rng(0).normal(size=(16, SIZE)))
KERNEL = nuts(max_depth=5, initial_step_size=0.2)


@functools.cache
def build(mode="vmap", group=1, chains=5, **options):
    chosen = {"warmup": 60, "draws": 24, "thin": 1, **options}
    return build_program(funnel, KERNEL, LAYOUT, place(chains, mode=mode, group=group), **chosen)


def through(program, max_count=None, restart=None):
    """Run both stages; after every block, ``restart`` says what carry to go on with."""
    carry = start_chains(program, STARTS[: program.placement.chains], 3, ())
    blocks = {"warmup": [], "sampling": []}
    for stage, schedule in (("warmup", program.warmup), ("sampling", program.sampling)):
        if stage == "sampling":
            carry = finish_warmup(program, carry)
        first = 0
        while first < schedule.records:
            for block in run_blocks(program, stage, carry, 3, (), first=first, max_count=max_count):
                blocks[stage].append(block._replace(carry=None))
                carry, first = block.carry, block.start + block.count
                if restart:
                    carry = restart(program, carry)
                    break
    return blocks


def from_disk(program, carry):
    saved = jax.tree.map(np.array, gather(at_rest(carry), program.placement))
    return spread(saved, program.placement)


def values(blocks):
    """Everything that was recorded, name -> (chain, record, ...)."""
    found = {f"warmup/{n}": v for n, v in join_stats(blocks["warmup"]).items()}
    found |= join_stats(blocks["sampling"])
    return found | {"draws": np.concatenate([b.draws for b in blocks["sampling"]], axis=1)}


def assert_same(a, b, **tolerance):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(("mode", "group", "warmup"), [("vmap", 1, 30), ("map", 2, 0)])
def test_chains_alone_and_together_agree(mode, group, warmup):
    """Over a short run: rounding grows along trajectories."""
    with jax.enable_x64(True):
        short = {"warmup": warmup, "draws": 6, "thin": 2}
        alone = through(build("map", **short))
        assert len(np.unique(values(alone)["gradients"])) > 3
        assert_same(through(build(mode, group, **short)), alone, rtol=1e-6, atol=1e-8)


def test_draws_do_not_depend_on_blocks_restarts_or_the_room_to_run_ahead():
    wide, narrow, groups = build(), build(capacity=3), build("map", 2, warmup=0, thin=3)
    assert wide.capacity == 24
    expected = through(wide)
    assert_same(through(wide, 5, from_disk), expected)
    assert_same(through(wide, 1, lambda program, carry: carry), expected)
    assert_same(through(narrow), expected)
    assert_same(through(narrow, 1, from_disk), expected)
    assert_same(through(groups, 3, from_disk), through(groups))
    for program in (wide, narrow):
        assert program.traces == {"start": 1, "warm": 1, "finish": 1, "draw": 1}


def test_chains_do_not_wait_for_longer_trajectories():
    """And the more room there is, the fewer ticks are idle."""
    ticks = {}
    for program in (build(chains=16, draws=96, capacity=3), build(chains=16, draws=96)):
        blocks = through(program)["sampling"]
        gradients = join_stats(blocks)["gradients"]
        per_chain = sum(block.ticks for block in blocks)
        assert np.all(gradients.sum(1) <= per_chain)
        ticks[program.capacity] = per_chain
    assert np.all(ticks[3] >= ticks[96])
    assert ticks[3].sum() > ticks[96].sum()
    for share, found in zip(np.split(gradients, 2), np.split(ticks[96], 2), strict=True):
        # No tick of the chain with most gradients is idle.
        assert set(found) == {share.sum(1).max()}
        lockstep = share.max(axis=0).sum()
        assert found[0] < 0.9 * lockstep


def test_no_tick_copies_the_draws():
    """The loop's condition is one for all chains; else each tick would select every buffer."""
    program = build(capacity=7, draws=20)
    key, count, placement = jax.random.key(0), np.int32(1), program.placement
    chains = spread((np.arange(5, dtype=np.int32), np.asarray(STARTS[:5], np.float32)), placement)

    carry = program.finish(program.start(chains, key, ()))
    carry = (*carry[:4], program.depart(carry[1:3]))
    text = str(program.draw.trace(carry, key, count, count, ()).jaxpr)
    room = f"f32[3,8,{SIZE}]"  # three chains a device, seven draws and the waste bin
    lines = [line for line in text.splitlines() if f":{room} = " in line]
    assert any("scatter" in line for line in lines)
    assert not any("select_n" in line for line in lines)


def test_thinning_side_by_side():
    every, third = (values(through(build(draws=d, thin=t))) for d, t in ((24, 1), (8, 3)))
    np.testing.assert_array_equal(third["draws"], every["draws"][:, 2::3])
    names = ("gradients", "diverging", "tree_depth", "energy", "acceptance_rate")
    assert_thinned(third, {name: every[name] for name in names}, 3)
    densities = jax.vmap(jax.vmap(funnel))(third["draws"])
    np.testing.assert_allclose(third["log_density"], densities, rtol=1e-4, atol=1e-5)


def test_a_warm_up_that_ends_early_hands_over():
    """Chains are at different steps then, in the midst of trajectories."""
    program = build()
    carry = start_chains(program, STARTS[: program.placement.chains], 3, ())
    for block in run_blocks(program, "warmup", carry, 3, (), last=20):
        carry = block.carry
    steps = gather(carry[3].steps, program.placement)
    assert steps.min() == 20
    assert steps.max() > 20
    densities = gather(carry[1].logdensity, program.placement)
    carry = finish_warmup(program, carry)
    np.testing.assert_array_equal(gather(carry[1].logdensity, program.placement), densities)
    assert np.all(gather(carry[3].steps, program.placement) == 0)
    blocks = list(run_blocks(program, "sampling", carry, 3, ()))
    draws = np.concatenate([block.draws for block in blocks], axis=1)
    assert draws.shape == (5, 24, SIZE)
    assert np.all(np.isfinite(draws))


def test_a_chain_that_meets_no_number_does_not_trouble_its_neighbours():
    def hole(x):
        return jnp.where(x[0] > 0.5, jnp.nan, gaussian(x))

    starts = np.zeros((4, SIZE), np.float32)
    placement = Placement(4, tuple(jax.devices()[:1]), "vmap")
    found = sample_density(hole, starts, kernel=KERNEL, warmup=0, draws=50, placement=placement)
    assert found.stats["diverging"].sum() > 0
    assert np.all(np.isfinite(found.draws))
    assert found.draws[..., 0].max() <= 0.5
    assert all(np.all(np.isfinite(v)) for v in found.stats.values())
    assert all(len(np.unique(chain[:, 1])) > 10 for chain in found.draws)
