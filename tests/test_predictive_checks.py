"""Data sets from prior and posterior: against closed forms, and where the model is wrong."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, write_tiny
from scipy.stats import gamma, halfnorm, kstest, norm
from test_report import make_run

import bnnmcmc
from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.predictive import Draws, data_sets, pool
from bnnmcmc.predictive_checks import (
    check_classes,
    check_numbers,
    judged,
    prior_range,
    statistics,
    unusual,
)
from bnnmcmc.replicates import SETS, from_posterior, prior_draws
from bnnmcmc.report.page import write_report
from bnnmcmc.report.sections.predictive_checks import allowed, allowed_classes, predicted
from bnnmcmc.store import write_json

NOISE = 0.5
# y = x w + noise of a known size: everything is known in closed form.
LINEAR = bnnmcmc.Posterior(
    bnnmcmc.Network(
        lambda key: {"weight": jax.random.normal(key, (2,))},
        lambda params, x: (x @ params["weight"])[:, None],
    ),
    bnnmcmc.gaussian(scale=NOISE),
    bnnmcmc.Prior(
        lambda params: -0.5 * jnp.square(params["weight"]).sum(),
        lambda key, params: {"weight": jax.random.normal(key, (2,))},
    ),
)


def flat_draws(weights):
    """Wrap weights (chain, draw, 2) of the linear model."""
    of = trees.layout({"likelihood": {}, "network": {"weight": jnp.zeros(2)}})
    return Draws(of, *weights.shape[:2], lambda: [weights])


def exact(x, y):
    """Return mean and covariance of the weights given rows."""
    covariance = np.linalg.inv(x.T @ x / NOISE**2 + np.eye(2))
    return covariance @ x.T @ y / NOISE**2, covariance


def wrapped(found, rows, of="test", missing=""):
    return {"rows": rows, "of": of, "prior_missing": missing, "posterior_sets": 400, **found}


def test_the_p_value_is_that_of_the_closed_form():
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(30, 2)), rng.normal(size=(40, 2)) + 0.3
    truth = rng.normal(size=2)
    y, fresh = (a @ truth + NOISE * rng.normal(size=len(a)) for a in (x, new))
    mean, covariance = exact(x, y)
    weights = rng.multivariate_normal(mean, covariance, (4, 5000)).astype(np.float32)
    sets = data_sets(LINEAR, flat_draws(weights), new, fresh[:, None])
    assert sets.shape == (20_000, 40, 1)
    found = check_numbers(fresh[:, None], sets, None, ["y"])["targets"][0]["statistics"]["mean"]
    centre = new.mean(axis=0) @ mean
    spread = math.sqrt(new.mean(axis=0) @ covariance @ new.mean(axis=0) + NOISE**2 / 40)
    # Four Monte Carlo standard errors of a share of 20 000.
    assert found["p"] == pytest.approx(norm.sf(fresh.mean(), centre, spread), abs=4 * 0.0036)
    assert found["observed"] == pytest.approx(fresh.mean())
    ends = norm.ppf([0.05, 0.5, 0.95], centre, spread)
    np.testing.assert_allclose([found[k] for k in ("low", "median", "high")], ends, atol=0.01)


def test_p_values_are_uniform_if_the_model_is_right():
    rng = np.random.default_rng(1)
    x, new = rng.normal(size=(20, 2)), rng.normal(size=(15, 2))
    values = {"mean": [], "standard deviation": [], "largest": []}
    for _ in range(300):
        truth = rng.normal(size=2)
        y, fresh = (a @ truth + NOISE * rng.normal(size=len(a)) for a in (x, new))
        weights = rng.multivariate_normal(*exact(x, y), 300)
        sets = weights @ new.T + NOISE * rng.normal(size=(300, 15))
        of_data, of_sets = statistics(fresh), statistics(sets)
        for name, seen in values.items():
            seen.append(judged(float(of_data[name]), of_sets[name]).p)
    for name, seen in values.items():
        assert kstest(seen, "uniform").pvalue > 0.001, name


def test_what_a_gaussian_cannot_make_is_found_and_what_it_can_is_not():
    rng = np.random.default_rng(2)
    shown = {}
    for name, y in (("right", rng.normal(size=300)), ("wrong", rng.standard_t(1.5, 300))):
        # The Gaussian that fits best, and knows its parameters well.
        location = y.mean() + y.std() / math.sqrt(300) * rng.normal(size=(1000, 1))
        sets = location + y.std() * rng.normal(size=(1000, 300))
        shown[name] = wrapped(check_numbers(y[:, None], sets[..., None], None, ["y"]), 300)
    assert unusual(shown["right"]) == []
    good = predicted(shown["right"])
    assert good.level == "good"
    assert "of 5 statistics none is unusual" in good.text
    off = {name for _, name, _ in unusual(shown["wrong"])}
    assert off & {"largest", "smallest", "skewness"}
    assert "mean" not in off
    bad = predicted(shown["wrong"])
    assert bad.level == "note"
    assert "does not make data like the 300 test rows" in bad.text


def test_false_alarms_are_as_rare_as_said():
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(200):
        y, sets = rng.normal(size=(50, 1)), rng.normal(size=(400, 50, 1))
        alarms += bool(unusual(check_numbers(y, sets, None, ["y"])))
    assert alarms <= 20  # 10 of 200 are expected at most; this is 3 standard deviations more


def test_counts_have_their_zeros_looked_at():
    rng = np.random.default_rng(4)
    y = (rng.poisson(4, 200) * rng.binomial(1, 0.6, 200))[:, None]
    sets = rng.poisson(y.mean(), (500, 200, 1))
    found = check_numbers(y, sets, None, ["visits"], "count")
    zeros = found["targets"][0]["statistics"]["share of zeros"]
    assert zeros["observed"] == pytest.approx((y == 0).mean())
    assert zeros["p"] == 0
    assert "share of zeros" in {name for _, name, _ in unusual(found)}
    assert "share of zeros (4" in predicted(wrapped(found, 200)).text
    assert "share of zeros" not in check_numbers(y, sets, None, ["y"])["targets"][0]["statistics"]


def test_a_nan_is_never_skipped():
    y, sets = np.zeros((4, 1)), np.random.default_rng(0).normal(size=(9, 4, 1))
    sets[3, 2] = np.nan
    found = check_numbers(y, sets, sets, ["y"])
    target = found["targets"][0]
    for part in (target["statistics"], target["prior_statistics"]):
        assert all(math.isnan(values["p"]) for values in part.values())
    assert np.isnan(target["posterior"]["median"]).all()
    assert math.isnan(target["prior_range"]["outside"])
    assert len(unusual(found)) == 5
    assert predicted(wrapped(found, 4)).level == "bad"
    assert allowed(target).level == "bad"
    classes = check_classes(np.array([0, 1]), np.array([[0, np.nan], [1, 1]]), None, ["a", "b"])
    assert math.isnan(classes["classes"][0]["statistics"]["frequency"]["p"])


def test_what_the_prior_allows():
    rng = np.random.default_rng(5)
    y = rng.normal(size=200)

    def said(prior, values=y):
        found = prior_range(values, prior)
        rows = [float(values.min()), float(values.max())]
        return allowed({"name": "y", "rows": rows, "prior_range": found})

    holds = said(2 * rng.normal(size=(400, 200)))
    assert holds.level == "good"
    low, high = norm.ppf([0.05, 0.95], scale=2)
    found = prior_range(y, 2 * rng.normal(size=(400, 200)))
    np.testing.assert_allclose([found["low"], found["high"]], [low, high], atol=0.05)
    assert said(500 * rng.normal(size=(400, 200))).level == "info"
    conflict = said(0.2 * rng.normal(size=(400, 200)))
    assert conflict.level == "note"
    assert "hardly any" in conflict.text


def test_classes_by_their_frequencies():
    rng = np.random.default_rng(6)
    y = rng.binomial(1, 0.3, 100)
    right, wrong = (rng.binomial(1, p, (500, 100)).astype(float) for p in (0.3, 0.7))
    fits = check_classes(y, right, right, ["no", "yes"])
    assert predicted(wrapped(fits, 100)).level == "good"
    assert allowed_classes(fits["classes"], 500).level == "good"
    assert "too few to tell" in allowed_classes(fits["classes"], 20).text
    off = check_classes(y, wrong, wrong, ["no", "yes"])
    assert predicted(wrapped(off, 100)).level == "note"
    assert "the frequency of no" in predicted(wrapped(off, 100)).text
    assert allowed_classes(off["classes"], 500).level == "note"
    p = off["classes"][1]["statistics"]["frequency"]
    assert p["p"] == pytest.approx(1 - (wrong.mean(axis=1) <= y.mean()).mean(), abs=0.01)


def test_rows_that_were_seen_are_said_to_be():
    y, sets = np.arange(9.0)[:, None], np.arange(9.0)[None, :, None].repeat(50, 0)
    found = wrapped(check_numbers(y, sets, None, ["y"]), 9, of="sampled on")
    assert "9 rows sampled on" in predicted(found).text
    assert "weaker test" in predicted(found).text


def test_the_prior_predictive_is_that_of_the_closed_form():
    x = np.array([[1.0, 2.0], [0.5, 0.0], [0.0, 0.0]])
    draws = prior_draws(LINEAR, 4000, seed=3)
    sets = data_sets(LINEAR, draws, x, np.zeros((3, 1)))[..., 0]
    expected = x @ x.T + NOISE**2 * np.eye(3)
    np.testing.assert_allclose(np.cov(sets.T), expected, atol=0.35)
    np.testing.assert_allclose(np.diag(np.cov(sets.T)), np.diag(expected), rtol=0.1)
    for row in range(3):
        assert kstest(sets[:, row], norm(scale=math.sqrt(expected[row, row])).cdf).pvalue > 0.001
    # A draw depends on seed and number alone.
    few = np.asarray(next(iter(prior_draws(LINEAR, 10, seed=3).blocks())))
    np.testing.assert_array_equal(few[0], np.asarray(next(iter(draws.blocks())))[0, :10])


@pytest.mark.parametrize("like", [7, 50, 600])
def test_data_sets_do_not_depend_on_the_batch(like):
    weights = np.random.default_rng(0).normal(size=(2, 300, 2)).astype(np.float32)
    draws, x, y = flat_draws(weights), np.ones((5, 2)), np.zeros((5, 1))
    others = flat_draws(weights[:1, :like] if like < 600 else weights)
    found = data_sets(LINEAR, draws, x, y, seed=1, like=others)
    np.testing.assert_allclose(found, data_sets(LINEAR, draws, x, y, seed=1)[: len(found)])


def test_of_the_posterior_nothing_is_computed_twice_and_no_chain_left_out():
    weights = np.zeros((10, 1000, 2), np.float32) + np.arange(10)[:, None, None]
    draws, x, y = flat_draws(weights), np.full((2, 2), 50.0), np.zeros((2, 1))
    run = SimpleNamespace(posterior=LINEAR, seed=0)
    sets = from_posterior(run, draws, x, y, pool(LINEAR, draws, x, y))
    assert len(sets) == 1000
    counts = np.bincount(np.round(sets[:, 0, 0] / 100).astype(int), minlength=10)
    assert (counts > 60).all()
    # Weighted chains come in proportion.
    shares = np.array([0.5, 0.5, *[0.0] * 8])
    sets = from_posterior(run, draws._replace(weights=shares), x, y, None)
    assert set(np.round(sets[:, 0, 0] / 100)) == {0, 1}


def test_parameters_of_the_likelihood_are_drawn_from_their_prior():
    keys = jax.random.split(jax.random.key(0), 4000)
    sampled = bnnmcmc.student_t(2, scale="sampled", scale_prior=0.7, df="sampled")
    found = jax.vmap(sampled.sample)(keys)
    assert jax.tree.map(jnp.shape, found) == {"log_scale": (4000, 2), "log_df": (4000, 2)}
    for k in range(2):
        scale, df = (np.exp(np.asarray(found[name][:, k])) for name in ("log_scale", "log_df"))
        assert kstest(scale, halfnorm(scale=0.7).cdf).pvalue > 0.001
        assert kstest(df, gamma(2, scale=10).cdf).pvalue > 0.001
    assert bnnmcmc.gaussian().sample(keys[0]) == {}


def test_what_cannot_be_drawn_from_is_said():
    unknown = bnnmcmc.Posterior(
        LINEAR.network, LINEAR.likelihood, bnnmcmc.Prior(lambda params: jnp.zeros(()))
    )
    with pytest.raises(InputError, match="log-density alone"):
        prior_draws(unknown, 5)
    own = bnnmcmc.gaussian(scale="sampled")._replace(sample=None)
    with pytest.raises(InputError, match="likelihood: "):
        prior_draws(bnnmcmc.Posterior(LINEAR.network, own, LINEAR.prior), 5)


def test_parameters_that_are_not_sampled_stay_as_they_are():
    network = bnnmcmc.mlp(2, [3], 1, "tanh")
    posterior = bnnmcmc.Posterior(network, bnnmcmc.gaussian(scale=1.0), bnnmcmc.normal_prior())
    of = trees.layout(jax.eval_shape(posterior.init, jax.random.key(0)))
    weights = np.full((2, 8, of.size), 7.0, np.float32)
    around = Draws(of, 2, 8, lambda: [weights])
    chosen = trees.chosen_leaves(["bias"], of)
    (drawn,) = prior_draws(posterior, 16, sampled=chosen, around=around).blocks()
    assert drawn.shape == (1, 16, of.size)
    fixed = trees.part(drawn, of, [not use for use in chosen])
    assert (fixed == 7).all()
    assert (trees.part(drawn, of, chosen) != 7).all()


def test_a_page_without_a_prior_and_with_several_targets(tmp_path):
    folder = make_run(tmp_path / "run", targets=("first", "<b>second"))
    page = write_report(folder).read_text()
    section = page[page.index('id="predictive-checks"') :].partition("</section>")[0]
    assert section.count("<svg") == 4
    assert "first: The prior puts 90 % of targets between" in section
    assert "<b>second" not in section
    rng = np.random.default_rng(0)
    y, sets = rng.normal(size=(30, 2)), rng.normal(size=(90, 30, 2))
    found = check_numbers(y, sets, None, ["first", "second"])
    about = wrapped(found, 30, of="sampled on", missing="prior: its log-density alone")
    about |= {"prior_sets": 0, "prior_of_some": False}
    write_json(folder / "predictive_checks.json", about)
    page = write_report(folder).read_text()
    section = page[page.index('id="predictive-checks"') :].partition("</section>")[0]
    assert "What the prior predicts is not known: prior: its log-density alone." in section
    assert section.count("<svg") == 2
    assert "prior: 5 %" not in section
    assert "rows that the posterior conditions on" in section


def checks_of(folder, of="test"):
    """Return what a run has written, with what all runs have in common checked."""
    found = json.loads((folder / "predictive_checks.json").read_text())
    run = bnnmcmc.Run.open(folder)
    assert found["of"] == of
    assert found["prior_missing"] == ""
    assert found["rows"] == len(run.dataset.test if of == "test" else run.x)
    page = (folder / "report.html").read_text()
    assert "Prior and posterior predictive checks" in page
    assert ("Parameters that are not sampled" in page) == found["prior_of_some"]
    return run, found


def test_a_run_writes_its_checks(finished):
    run, found = checks_of(finished / "run")
    assert not found["prior_of_some"]
    (target,) = found["targets"]
    y = run.dataset.y[run.dataset.test][:, 0] * run.encoding.target_scale[0]
    assert target["statistics"]["standard deviation"]["observed"] == pytest.approx(y.std())
    assert target["prior_range"]["high"] > target["prior_range"]["low"]


def test_a_run_without_test_rows_of_which_only_some_parameters_are_sampled(tmp_path, here):
    text = TINY.replace("draws = 40", 'draws = 40\nleaves = ["layer1"]')
    text = text.replace("[model]", "[data.split]\ntest = 0.0\n\n[model]")
    folder = write_tiny(tmp_path, text=text)
    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", cwd=folder)
    assert code == 0, err
    assert checks_of(folder / "run", of="sampled on")[1]["prior_of_some"]


def test_a_run_with_classes_a_hierarchical_prior_and_weighted_chains(tmp_path, here):
    text = TINY.replace('target = "y"', 'target = "kind"')
    text = text.replace("draws = 40", 'draws = 40\nrows = "train"')
    text += '\n[likelihood]\nkind = "bernoulli"\n\n[pool]\nweights = "stacking"\n'
    folder = write_tiny(tmp_path, text=f"{text}\n[prior]\nhierarchical = true\n")
    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", cwd=folder)
    assert code == 0, err
    run, found = checks_of(folder / "run")
    shares = [part["statistics"]["frequency"] for part in found["classes"]]
    y = run.dataset.y[run.dataset.test]
    assert [v["observed"] for v in shares] == [(y == c).mean() for c in range(2)]
    mean = np.load(folder / "run" / "predictions.npz")["probabilities"].mean(axis=0)
    assert [v["median"] for v in shares] == pytest.approx(list(mean), abs=0.15)


def test_too_few_data_sets_are_never_called_good():
    # All sets are far off, but so few that a twentieth shared among six statistics is not reached.
    y = np.random.default_rng(0).poisson(3, (100, 1)).astype(float)
    sets = np.random.default_rng(1).poisson(30, (200, 100, 1)).astype(float)
    found = check_numbers(y, sets, None, ["y"], "count")
    said = predicted({**wrapped(found, 100), "posterior_sets": 200})
    assert said.level == "note"
    assert "200 data sets from the posterior are too few to tell" in said.text
    enough = check_numbers(y, np.tile(sets, (5, 1, 1)), None, ["y"], "count")
    said = predicted({**wrapped(enough, 100), "posterior_sets": 1000})
    assert said.level == "note"
    assert "the mean (" in said.text


def test_few_draws_make_several_data_sets_each():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(12, 2))
    draws = flat_draws(rng.normal(size=(2, 30, 2)).astype(np.float32))

    run = SimpleNamespace(posterior=LINEAR, seed=0)
    sets = from_posterior(run, draws, x, np.zeros((12, 1)))
    assert len(sets) == SETS
    # As many as there are, and no two alike.
    assert len(np.unique(sets[:, 0, 0])) == SETS
    first = data_sets(LINEAR, draws, x, np.zeros((12, 1)))
    again = data_sets(LINEAR, draws, x, np.zeros((12, 1)), repeat=1)
    assert not np.any(first == again)
