"""A chain that fails repeatedly is stopped, not the run; what it drew is kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_tiny
from test_processes import both
from test_resume import all_draws, assert_equal_runs

import bnnmcmc
from bnnmcmc import health, trees
from bnnmcmc.errors import InputError
from bnnmcmc.health import STOP_AFTER, look, nothing_seen
from bnnmcmc.placement import place
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.sampling import (
    build_program,
    finish_warmup,
    join_stats,
    run_blocks,
    sample_density,
    start_chains,
)

THIN = 3

# --------------------------------------------------------------------------------- the rule


def healthy(draws=300, chains=4):
    rng = np.random.default_rng(0)
    return {
        "log_density": rng.normal(size=(chains, draws)).astype(np.float32),
        "diverging": np.full((chains, draws), THIN - 1),
        "acceptance_rate": np.full((chains, draws), 1e-3),
        "step_size": np.full((chains, draws), 0.1, np.float32),
    }


FAILURES = {
    "not finite": {"log_density": np.nan},
    "infinite": {"log_density": -np.inf},
    "diverged": {"diverging": THIN},
    "refused": {"acceptance_rate": 0.0},
    "unknown acceptance": {"acceptance_rate": np.nan},
    "no step size": {"step_size": 0.0},
    "collapsed": {"log_density": 7.0, "step_size": 1e-9},
}


def watched(stats, pieces, watch=None):
    watch, at = watch or nothing_seen(len(stats["log_density"])), 0
    for count in pieces:
        part = {name: values[:, at : at + count] for name, values in stats.items()}
        watch, at = look(watch, part, at, THIN), at + count
    return watch


@pytest.mark.parametrize("kind", FAILURES)
def test_a_chain_is_stopped_after_a_hundred_failures_in_a_row(kind):
    stats = healthy()
    for name, value in FAILURES[kind].items():
        stats[name][1, 50:] = value
        stats[name][2, 50 : 50 + STOP_AFTER - 1] = value
    # Of a chain that stands still, the first draw that does so is one that it moved to.
    expected = [-1, 150 + (kind == "collapsed"), -1, -1]
    for pieces in ([300], [1] * 300, [7] * 42 + [6], [149, 1, 150]):
        assert watched(stats, pieces).stopped.tolist() == expected
    # What counts at draw 140 can be told from the last hundred and one draws before it.
    late = {name: values[:, 39:140] for name, values in stats.items()}
    watch = look(nothing_seen(4), late, 39, THIN)
    later = look(watch, {name: values[:, 140:] for name, values in stats.items()}, 140, THIN)
    assert later.stopped.tolist() == expected


def test_a_density_that_is_flat_is_no_failure():
    stats = healthy()
    stats["log_density"][:] = 0.0
    assert watched(stats, [300]).stopped.tolist() == [-1] * 4


def test_a_stopped_chain_stays_stopped():
    watch = watched(healthy(), [300], nothing_seen(4, {2: 17}))
    assert health.stopped_chains(watch.stopped, first=10) == {12: 17}


# ------------------------------------------------------------------------------- the engine


def density(x):
    """A standard Gaussian, and far from it a spike that no step of these sizes can follow."""
    spike = -0.5e10 * jnp.sum(jnp.square(x - 100.0))
    return jnp.where(x[0] > 50, spike, -0.5 * jnp.sum(jnp.square(x)))


STARTS = np.array([[0.1, 0.2], [-0.3, 0.4], [100.1, 100.2], [0.5, -0.1]], np.float32)
KERNELS = {
    "hmc": hmc(num_leapfrog=3, initial_step_size=0.5),
    "nuts": nuts(initial_step_size=0.5),
    "mclmc": mclmc(initial_step_size=0.5),
}
PLACEMENTS = {"map": ("map", 1), "groups": ("map", 2), "vmap": ("vmap", 1)}


def build(kernel, placement, draws=130):
    mode, group = PLACEMENTS[placement]
    return build_program(
        density,
        KERNELS[kernel],
        trees.layout(STARTS[0]),
        place(4, jax.devices()[:2], mode, group),
        warmup=0,
        draws=draws,
        thin=2,
    )


def through(program, max_count=None, starts=STARTS):
    carry = finish_warmup(program, start_chains(program, jnp.asarray(starts), 0, ()))
    return list(run_blocks(program, "sampling", carry, 0, (), max_count=max_count))


def draws_of(blocks):
    return np.concatenate([block.draws for block in blocks], axis=1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_chain_is_stopped_and_the_others_draw_the_same(kernel, placement):
    program = build(kernel, placement)
    blocks = through(program)
    draws, stats = draws_of(blocks), join_stats(blocks)
    assert blocks[-1].stopped.tolist() == [-1, -1, STOP_AFTER, -1]
    assert np.isfinite(draws[:, :STOP_AFTER]).all()
    assert np.isnan(draws[2, STOP_AFTER:]).all()
    assert np.isnan(stats["log_density"][2, STOP_AFTER:]).all()
    assert (stats["gradients"][2, :STOP_AFTER] > 0).all()
    assert (stats["gradients"][2, STOP_AFTER:] == 0).all()
    assert np.isfinite(draws[[0, 1, 3]]).all()
    # With a healthy chain in its place, the others draw the same.
    starts = STARTS.copy()
    starts[2] = 0.3
    other = draws_of(through(program, starts=starts))
    np.testing.assert_array_equal(other[[0, 1, 3]], draws[[0, 1, 3]])
    assert np.isfinite(other).all()
    # And blocks make no difference.
    np.testing.assert_array_equal(draws_of(through(program, max_count=9)), draws)
    assert program.traces["draw"] == 1


def test_chains_side_by_side_do_not_wait_for_one_that_was_stopped():
    program = build("nuts", "groups", draws=300)
    starts = STARTS[[0, 1, 2, 2]] + np.array([[0, 0], [0, 0], [0, 0], [0.01, 0]], np.float32)
    blocks = through(program, max_count=20, starts=starts)
    assert blocks[-1].stopped.tolist() == [-1, -1, STOP_AFTER, STOP_AFTER]
    after = [block.ticks for block in blocks if block.start > 150]
    assert after
    assert all((ticks[2:] == 0).all() and (ticks[:2] > 0).all() for ticks in after)
    mixed = through(build("nuts", "groups", draws=300), max_count=20, starts=STARTS)
    last = [block for block in mixed if block.start > 200]
    made = sum(block.stats["gradients"][3].sum() for block in last)
    # All that chain 3 could have made while chain 2, beside it, does not exist any more.
    assert made >= 0.8 * sum(block.ticks[3] for block in last)


def test_in_python_the_status_says_it_and_the_pool_is_without_it():
    samples = sample_density(density, STARTS, kernel=KERNELS["hmc"], warmup=0, draws=130)
    assert samples.stopped == {2: STOP_AFTER}
    with pytest.raises(InputError, match=r"every chain was stopped.*4 chains: every step of the"):
        sample_density(density, STARTS[[2, 2, 2, 2]], kernel=KERNELS["hmc"], warmup=0, draws=500)


# ---------------------------------------------------------------------------------- a run

NETWORK = """
import jax, jax.numpy as jnp, bnnmcmc

def network(features, outputs):
    inner = bnnmcmc.mlp(features, [3], outputs, "tanh")

    def init(key):
        # The ensemble hardly trains, so that a chain starts where its member began: one far out.
        scale = jnp.where(jax.random.uniform(jax.random.fold_in(key, 7)) < {share}, 1e5, 1.0)
        return jax.tree.map(lambda leaf: scale * leaf, inner.init(key))

    return bnnmcmc.Network(init, inner.apply)
"""
SETTINGS = [
    "model.network=far:network",
    "ensemble.learning_rate=1e-12",
    "ensemble.max_epochs=1",
    "sampler.kernel=hmc",
    "sampler.num_leapfrog=3",
    "sampler.initial_step_size=0.01",
    "sampler.warmup=0",
    "sampler.thin=1",
    "run.seed=8",
    "run.arviz=netcdf",
]


def prepared(folder, share=0.5):
    config = (folder / "tiny.toml").read_text()
    config = config.replace('hidden = [6]\nactivation = "tanh"\n', "")
    (folder / "tiny.toml").write_text(config)
    (folder / "far.py").write_text(NETWORK.replace("{share}", str(share)))
    return folder


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def one_stopped(tmp_path_factory, cli):
    folder = prepared(write_tiny(tmp_path_factory.mktemp("stopped")))
    code, out, err = cli(
        "run", "tiny.toml", "--out", "run", "--set", *SETTINGS, "sampler.draws=160", cwd=folder
    )
    assert code == 0, err
    (folder / "stdout.txt").write_text(out)
    (folder / "stderr.txt").write_text(err)
    return folder


def test_a_run_goes_on_without_a_chain_and_says_so(one_stopped, monkeypatch):
    monkeypatch.syspath_prepend(str(one_stopped))
    run, manifest = one_stopped / "run", manifest_of(one_stopped / "run")
    stopped = manifest["stopped_chains"]
    assert list(stopped.values()) == [STOP_AFTER]
    chain = int(next(iter(stopped)))
    others = [c for c in range(3) if c != chain]
    said = f"Stopped after draw {STOP_AFTER}: every step of the last {STOP_AFTER} draws diverged"
    out, err = ((one_stopped / f"std{name}.txt").read_text() for name in ("out", "err"))
    assert f"chain {chain}: stopped: {said}" in out
    assert f"failed repeatedly and were stopped (chain {chain} after draw {STOP_AFTER})" in (
        " ".join(out.split())
    )
    assert "chains: 1 stopped" in err
    html = (run / "report.html").read_text()
    assert said in html
    assert "The scores pool 2 of 3 chains." in html
    assert json.loads((run / "metrics.json").read_text())["pooled_chains"] == others
    assert np.isfinite(json.loads((run / "metrics.json").read_text())["test"]["posterior"]["lppd"])
    diagnostics = json.loads((run / "diagnostics.json").read_text())
    assert diagnostics["chains_stopped"] == [chain]
    assert np.isfinite(diagnostics["rhat_function_across_median"])
    opened = bnnmcmc.Run.open(run)
    assert opened.stopped == {chain: STOP_AFTER}
    assert opened.status[chain].status == "stopped"
    assert opened.pooled_chains == others
    found = all_draws(run)
    for name, values in found.items():
        if name.startswith("draws/"):
            assert np.isfinite(values[others]).all()
            assert np.isfinite(values[chain, :STOP_AFTER]).all()
            assert np.isnan(values[chain, STOP_AFTER:]).all()
    tree = opened.to_arviz()
    assert tree["posterior"].coords["chain"].values.tolist() == others
    assert json.loads(tree.attrs["stopped_chains"]) == {str(chain): STOP_AFTER}
    assert all(np.isfinite(v).all() for v in tree["posterior"].data_vars.values())


@pytest.mark.slow
def test_resumed_in_pieces_it_is_the_same_run(one_stopped, tiny, here, monkeypatch):
    monkeypatch.syspath_prepend(str(prepared(tiny)))
    settings = [*SETTINGS, "sampler.draws=90", "run.block_draws=7"]
    code, _, err = here("run", "tiny.toml", "--out", "run", "--set", *settings, cwd=tiny)
    assert code == 0, err
    assert manifest_of(tiny / "run")["stopped_chains"] == {}
    for draws in (30, 40):
        code, _, err = here("resume", "run", "--draws", draws, cwd=tiny)
        assert code == 0, err
    assert (
        manifest_of(tiny / "run")["stopped_chains"]
        == (manifest_of(one_stopped / "run")["stopped_chains"])
    )
    assert_equal_runs(one_stopped / "run", tiny / "run")


@pytest.mark.slow
def test_two_processes_stop_what_one_stops(one_stopped, tiny):
    prepared(tiny)
    codes, said = both(
        "run", "tiny.toml", "--out", "run", "--set", *SETTINGS, "sampler.draws=160", cwd=tiny
    )
    assert codes == [0, 0], said
    manifest = manifest_of(tiny / "run")
    assert manifest["stopped_chains"] == manifest_of(one_stopped / "run")["stopped_chains"]
    assert_equal_runs(one_stopped / "run", tiny / "run")


@pytest.mark.slow
def test_without_any_chain_left_the_run_ends_with_an_error(tiny, cli):
    prepared(tiny, share=2.0)
    settings = [*SETTINGS, "sampler.draws=400"]
    code, _, err = cli("run", "tiny.toml", "--out", "run", "--set", *settings, cwd=tiny)
    assert code == 2
    assert "Traceback" not in err
    said = " ".join(err.split())
    assert f"every chain was stopped, the last one after draw {STOP_AFTER}: 3 chains: every" in said
    assert "lower the step size" in said
    assert "What was drawn is kept in run" in said
    manifest = manifest_of(tiny / "run")
    assert len(manifest["stopped_chains"]) == 3
    assert STOP_AFTER <= sum(block["count"] for block in manifest["blocks"]) < 400
    code, out, err = cli("diagnose", "run", cwd=tiny)
    assert code == 0, err
    assert "0 of 3 chains ok" in out
    code, _, err = cli("report", "run", cwd=tiny)
    assert code == 0, err
    assert "There is no chain left to go on with" in (tiny / "run" / "report.html").read_text()
    code, _, err = cli("resume", "run", "--draws", 50, cwd=tiny)
    assert code == 2
    assert "every chain was stopped" in err
