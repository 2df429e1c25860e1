"""Sampling until a target is met: when it is, what it does not depend on, and what a user sees."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
from conftest import start_cli, write_tiny
from rich.console import Console
from scipy.special import logsumexp
from test_processes import both
from test_resume import all_draws, assert_equal_runs, stop_in

import bnnmcmc
from bnnmcmc import targets
from bnnmcmc.config import parse, read_config
from bnnmcmc.diagnostics import prediction_ess
from bnnmcmc.errors import InputError
from bnnmcmc.inputs import read_dataset
from bnnmcmc.pipeline import start_run
from bnnmcmc.targets import Checks, Target, check_target, is_met, next_check, say_progress

# ------------------------------------------------------------------------------- the rules


def test_checks_follow_one_another_and_then_grow_rarer():
    at, seen = 0, []
    while at < 5000:
        at = next_check(50, at)
        seen.append(at)
    assert seen[:12] == [50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600]
    assert len(seen) < 45
    gaps = np.diff(seen)
    assert np.all(gaps[10:] <= np.maximum(np.array(seen[10:-1]) // 10, 50))
    # Wherever a run goes on, the next check is one of these.
    assert all(next_check(50, done) in seen for done in range(4000))


def checks(*lppds, ess=100.0):
    return [{"draw": 50, "ess": ess, "lppd": value} for value in lppds]


def test_a_target_is_met_by_the_last_check():
    assert not is_met(Target(), checks(1.0))
    assert not is_met(Target(ess=100), [])
    assert is_met(Target(ess=100), checks(None))
    assert not is_met(Target(ess=101), checks(None))
    assert not is_met(Target(ess=1), checks(None, ess=math.nan))
    settled = Target(lppd=0.01, checks=3)
    assert not is_met(settled, checks(0.5, 0.5, 0.5))  # too few
    assert is_met(settled, checks(0.1, 0.5, 0.508, 0.5, 0.505))
    assert not is_met(settled, checks(0.5, 0.512, 0.5, 0.5))
    assert not is_met(settled, checks(0.5, math.nan, 0.5, 0.5))
    assert not is_met(settled, checks(None, 0.5, 0.5, 0.5))
    assert not is_met(settled, checks(math.nan, math.nan, math.nan, math.nan))
    both_of_them = Target(ess=100, lppd=0.01)
    assert is_met(both_of_them, checks(0.5, 0.5, 0.5, 0.5))
    assert not is_met(both_of_them, checks(0.5, 0.5, 0.5, 0.5, ess=99.0))
    assert not is_met(both_of_them, checks(0.4, 0.5, 0.5, 0.5))


def test_progress_is_never_rounded_up():
    said = say_progress(Target(ess=400), checks(None, ess=399.9))
    assert said == "function-space ESS 399 of 400"
    said = say_progress(Target(lppd=0.01), checks(0.5, 0.5, 0.52, 0.5))
    assert said == "validation LPPD 0.5, within 0.02 over 4 checks (to settle: 0.01)"
    assert say_progress(Target(lppd=0.01), checks(0.5)) == "validation LPPD 0.5, 1 of 4 checks"
    assert say_progress(Target(), []) == ""


@pytest.mark.parametrize(
    ("target", "rows", "validation", "message"),
    [
        (Target(ess=-1), "train", 9, "stop.ess: found -1"),
        (Target(ess=math.nan), "train", 9, "stop.ess: found nan"),
        (Target(ess=5, every=9), "train", 9, "stop.every: found 9"),
        (Target(lppd=0.1, checks=1), "train", 9, "stop.checks: found 1"),
        (Target(lppd=0.1), "train+validation", 9, 'stop.lppd: needs sampler.rows = "train"'),
        (Target(lppd=0.1), "train", 0, "stop.lppd: there are no validation rows"),
    ],
)
def test_targets_that_cannot_be_are_named(target, rows, validation, message):
    with pytest.raises(InputError, match=message):
        check_target(target, rows=rows, validation=validation)


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        ({"lppd": 0.01}, 'stop: lppd needs sampler.rows = "train", found "train+validation"'),
        ({"every": 20}, "stop.every: needs a target, stop.ess or stop.lppd"),
        ({"ess": 10, "checks": 5}, "stop.checks: needs stop.lppd"),
        ({"ess": -1}, "stop.ess: found -1, but it should be greater than or equal to 0"),
        ({"ess": 10, "every": 5}, "stop.every: found 5, but it should be greater than or equal"),
    ],
)
def test_a_config_says_what_is_wrong_with_its_target(stop, line):
    with pytest.raises(InputError) as caught:
        parse({"data": {"path": "t.csv"}, "stop": stop}, "e.toml")
    assert line in str(caught.value)


# ------------------------------------------------------------------------------- the checks


def series(chains=3, draws=120, rows=4, seed=0):
    """Return autocorrelated predictions (chain, draw, row) and log-densities of targets."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(chains, draws, rows)).astype(np.float32)
    for t in range(1, draws):
        noise[:, t] += np.float32(0.7) * noise[:, t - 1]
    return noise, rng.normal(-1.0, 0.5, (chains, draws, rows + 3)).astype(np.float32)


def added(values, log_density, pieces, chains=None, share=None, ess=10.0):
    """Return `Checks` that were given the draws in pieces of these lengths."""
    # A draw is its prediction, then the log-densities.
    flat, width = np.concatenate([values, log_density], axis=2), values.shape[2]
    options = {} if share is None else {"share": share}
    found = Checks(
        Target(ess=ess, lppd=0.1),
        lambda draws: (draws[..., :width], draws[..., width:]),
        chains or len(values),
        **options,
    )
    for low, high in zip(np.cumsum([0, *pieces[:-1]]), np.cumsum(pieces), strict=True):
        found.add(flat[:, low:high])
    return found


def test_a_check_is_what_its_definition_says():
    values, log_density = series()
    found = added(values, log_density, [120]).check()
    assert found["draw"] == 120
    assert found["chains"] == 3
    assert found["ess"] == pytest.approx(np.median(prediction_ess(values).sum(axis=0)))
    assert 40 < found["ess"] < 200  # of 360; (1 - .7) / (1 + .7) = 0.18 of them: 64
    pooled = logsumexp(log_density.astype(float), axis=(0, 1)) - math.log(360)
    assert found["lppd"] == pytest.approx(pooled.mean(), rel=1e-12)


@pytest.mark.parametrize("most", [10**9, 3 * 4 * 30])
def test_a_check_does_not_depend_on_blocks(monkeypatch, most):
    monkeypatch.setattr(targets, "MAX_KEPT", most)
    monkeypatch.setattr(targets, "MIN_KEPT_DRAWS", 10)
    values, log_density = series()
    whole = added(values, log_density, [120]).check()
    for pieces in ([1] * 120, [7] * 17 + [1], [100, 20]):
        one = added(values, log_density, pieces).check()
        assert {n: one[n] for n in ("draw", "ess", "lppd")} == {
            n: whole[n] for n in ("draw", "ess", "lppd")
        }
    if most < 10**9:  # every fourth draw is left
        thin = prediction_ess(values[:, ::4]).sum(axis=0)
        assert whole["ess"] == pytest.approx(np.median(thin))


def test_processes_find_together_what_one_finds():
    values, log_density = series(chains=5)
    whole = added(values, log_density, [120]).check()
    said = []
    for part in (slice(0, 3), slice(3, 5)):
        added(values[part], log_density[part], [120], 5, lambda v: said.append(v) or [v]).check()
    said = json.loads(json.dumps(said))
    for part in (slice(0, 3), slice(3, 5)):
        one = added(values[part], log_density[part], [120], 5, lambda v: said).check()
        assert one["chains"] == 5
        for name in ("ess", "lppd"):
            assert one[name] == pytest.approx(whole[name], rel=1e-12)


def test_chains_that_are_not_finite_do_not_count_and_are_counted():
    values, log_density = series(chains=4)
    whole = added(values[1:], log_density[1:], [120]).check()
    values[0, 100] = np.nan
    found = added(values, log_density, [60, 60]).check()
    assert (found["chains"], found["ess"], found["lppd"]) == (3, whole["ess"], whole["lppd"])
    lost = added(values[:1], log_density[:1], [120])
    assert lost.check()["chains"] == 0
    assert not lost.met


def test_predictions_that_stand_still_are_worth_nothing():
    values, log_density = series()
    values[:] = 1.0
    found = added(values, log_density, [120])
    assert math.isnan(found.check()["ess"])
    assert not found.met


# --------------------------------------------------------------------------------- a run

STOP = ["stop.every=20", "sampler.draws=400"]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def done(folder):
    return sum(block["count"] for block in manifest_of(folder)["blocks"])


@pytest.fixture(scope="module")
def met(tmp_path_factory, cli):
    """A run that met its target: function-space ESS 40."""
    folder = write_tiny(tmp_path_factory.mktemp("met"))
    code, out, err = cli(
        "run", "tiny.toml", "--out", "run", "--set", "stop.ess=40", *STOP, cwd=folder
    )
    assert code == 0, err
    (folder / "stdout.txt").write_text(out)
    (folder / "stderr.txt").write_text(err)
    return folder


def test_a_run_ends_when_its_target_is_met_and_says_so(met):
    run, manifest = met / "run", manifest_of(met / "run")
    last = manifest["checks"][-1]
    assert done(run) == last["draw"] < 400
    assert last["draw"] % 20 == 0
    assert last["ess"] >= 40
    assert all(check["ess"] < 40 for check in manifest["checks"][:-1])
    assert manifest["stage"] == "done"
    assert manifest["stopped"] is None
    said = f"target met at draw {last['draw']} of at most 400: function-space ESS "
    assert said in (met / "stdout.txt").read_text()
    assert said in (met / "stderr.txt").read_text()
    assert said in (run / "report.html").read_text()
    assert "Stopped early" not in (run / "report.html").read_text()
    assert "bnnmcmc resume run --ess 80" in (met / "stdout.txt").read_text()
    assert f"function-space ESS {math.floor(last['ess'])} of 40" in (met / "stderr.txt").read_text()
    opened = bnnmcmc.Run.open(run)
    assert opened.target == Target(ess=40, every=20)
    assert [check["draw"] for check in opened.checks] == [c["draw"] for c in manifest["checks"]]
    assert opened.draws.draws == last["draw"]


@pytest.mark.slow
def test_where_a_run_ends_does_not_depend_on_its_blocks(met, tiny, here):
    settings = ["stop.ess=40", *STOP, "run.block_draws=7"]
    code, _, err = here("run", "tiny.toml", "--out", "run", "--set", *settings, cwd=tiny)
    assert code == 0, err
    # Arrays are as long as the cap: what was not drawn is not there.
    assert_equal_runs(met / "run", tiny / "run")
    assert [(c["draw"], c["ess"]) for c in manifest_of(tiny / "run")["checks"]] == [
        (c["draw"], c["ess"]) for c in manifest_of(met / "run")["checks"]
    ]


@pytest.mark.slow
def test_a_higher_target_goes_on_as_if_it_had_been_the_first(met, tiny, here):
    shutil.copytree(met / "run", tiny / "run")
    code, out, err = here("resume", "run", "--draws", "100", cwd=tiny)
    assert code == 2
    assert "--draws: the target is met (function-space ESS" in err
    assert "--ess" in err
    code, out, err = here("resume", "run", cwd=tiny)
    assert code == 0
    assert "This run was complete already; add draws with --ess or --lppd." in out
    before = done(tiny / "run")
    code, out, err = here("resume", "run", "--ess", "70", cwd=tiny)
    assert code == 0, err
    assert before < done(tiny / "run") < 400
    assert "target met at draw" in out
    settings = ["stop.ess=70", *STOP]
    code, _, err = here("run", "tiny.toml", "--out", "at-once", "--set", *settings, cwd=tiny)
    assert code == 0, err
    assert_equal_runs(tiny / "at-once", tiny / "run")
    # No target any more: up to the cap.
    code, out, err = here("resume", "run", "--ess", "0", cwd=tiny)
    assert code == 0, err
    assert done(tiny / "run") == 400
    assert "target" not in out.replace("standardised target", "")


@pytest.mark.slow
def test_the_cap_ends_a_run_and_says_what_is_missing(tiny, here):
    settings = ["stop.ess=5000", "stop.every=20", "sampler.draws=50"]
    code, out, err = here("run", "tiny.toml", "--out", "run", "--set", *settings, cwd=tiny)
    assert code == 0, err
    manifest = manifest_of(tiny / "run")
    assert [check["draw"] for check in manifest["checks"]] == [20, 40, 50]
    said = "cap of 50 draws reached before the target, more draws are needed: function-space ESS "
    assert said + f"{math.floor(manifest['checks'][-1]['ess'])} of 5000" in out
    assert said in (tiny / "run" / "report.html").read_text()
    code, out, err = here("resume", "run", "--draws", "30", cwd=tiny)
    assert code == 0, err
    # What an earlier cap had looked at is not one of the checks of a run that goes on.
    assert [c["draw"] for c in manifest_of(tiny / "run")["checks"]] == [20, 40, 60, 80]


@pytest.mark.slow
def test_the_lppd_of_the_validation_rows_settles(tiny, here):
    settings = ["stop.lppd=0.3", "stop.checks=2", "sampler.rows=train", *STOP]
    code, out, err = here("run", "tiny.toml", "--out", "run", "--set", *settings, cwd=tiny)
    assert code == 0, err
    run, manifest = bnnmcmc.Run.open(tiny / "run"), manifest_of(tiny / "run")
    last = [check["lppd"] for check in manifest["checks"][-3:]]
    assert np.ptp(last) <= 0.3
    assert done(tiny / "run") < 400
    assert "target met at draw" in out
    assert "validation LPPD" in out
    rows = run.dataset.validation
    by_hand = bnnmcmc.predictive.pool(
        run.posterior, run.pooled_draws, run.dataset.x[rows], run.dataset.y[rows]
    ).log_density.mean()
    assert last[-1] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.slow
def test_test_rows_have_no_say(tiny):
    found = []
    for spoilt in (False, True):
        config = read_config(
            tiny / "tiny.toml",
            ["stop.ess=30", "stop.lppd=1.0", "sampler.rows=train", *STOP, "sampler.draws=100"],
        )
        dataset = read_dataset(config, tiny)
        if spoilt:
            dataset.x[dataset.test], dataset.y[dataset.test] = 7.0, 1e6
        folder = tiny / f"run{spoilt}"
        start_run(config, dataset, folder, name="t", command="-", console=Console(quiet=True))
        found.append([(c["draw"], c["ess"], c["lppd"]) for c in manifest_of(folder)["checks"]])
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_interrupted_run_stops_where_an_undisturbed_one_does(met, tiny, cli):
    quick = ["--quiet", "--set", "stop.ess=40", *STOP, "run.block_draws=1"]
    process = start_cli("run", "tiny.toml", "--out", "run", *quick, cwd=tiny)
    hit = stop_in(process, tiny / "run", "sampling", 0.0, signal.SIGKILL)
    process.communicate(timeout=60)
    assert hit, "the kill came too late"
    code, _, err = cli("resume", "run", "--quiet", cwd=tiny)
    assert code == 0, err
    assert_equal_runs(met / "run", tiny / "run")


@pytest.mark.slow
def test_two_processes_stop_where_one_does(met, tiny):
    codes, said = both("run", "tiny.toml", "--out", "run", "--set", "stop.ess=40", *STOP, cwd=tiny)
    assert codes == [0, 0], said
    assert "target met at draw" in said[0][0]
    a, b = all_draws(met / "run"), all_draws(tiny / "run")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------------------- in Python


def test_sample_until_a_target():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 2))
    y = np.sin(x[:, :1]) + 0.1 * rng.normal(size=(60, 1))
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(2, [4], 2, "tanh"), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    positions = bnnmcmc.fit_ensemble(
        posterior, x[:40], y[:40], x[40:50], y[40:50], members=2, max_epochs=30
    ).positions
    blocks = []

    def sample(**options):
        return bnnmcmc.sample(
            posterior, positions, x[:40], y[:40], warmup=200, draws=300, thin=2, **options
        )

    until = Target(ess=25, every=10)
    run = sample(until=until, on_block=lambda stage, *_: blocks.append(stage))
    assert run.draws.draws == run.checks[-1]["draw"] < 300
    assert run.checks[-1]["ess"] >= 25
    assert all(check["ess"] < 25 for check in run.checks[:-1])
    assert {"warmup", "sampling"} == set(blocks)
    whole = sample()
    np.testing.assert_array_equal(
        whole.stats["log_density"][:, : run.draws.draws], run.stats["log_density"]
    )
    assert whole.checks == ()
    held_out = (x[50:], y[50:])
    run = sample(until=Target(lppd=0.5, every=10, checks=2), held_out=held_out)
    assert [check["draw"] for check in run.checks][:3] == [10, 20, 30]
    assert np.ptp([check["lppd"] for check in run.checks[-3:]]) <= 0.5
    with pytest.raises(InputError, match=r"stop\.lppd: there are no validation rows"):
        sample(until=Target(lppd=0.5))
