"""The seed paper's study: its configs, its parts, its table."""

import json

import numpy as np
import pytest

from bnnmcmc.errors import InputError
from experiments.symmetry import study, table


def fake_part(first, count, draws=1, rows=20):
    """Return a part as `sample_part` does, with log-likelihoods that depend on the chain alone."""
    chains = np.arange(first, first + count)
    values = np.stack(
        [np.random.default_rng(c + 2_000_000).normal(size=(draws, rows)) for c in chains]
    )
    return {
        "chains": chains,
        "log_likelihood": values.astype(np.float32),
        "flat": np.zeros((count, draws, 3), np.float32),
        "warmup_gradients": np.full(count, 100),
        "gradients": np.full((count, draws), 7),
        "seconds": np.array(2.0),
    }


def test_configs_are_the_papers():
    f1 = study.read_problem("f1", "diabetes", None)
    assert f1.config.model.hidden == [3]
    assert f1.posterior.network.layers.sizes == (10, 3, 1)
    f2 = study.read_problem("f2", "diabetes", None)
    assert f2.posterior.network.layers == ((10, 16, 16, 16, 1), "tanh", False)
    for problem in (f1, f2):
        sampler = problem.config.sampler
        assert (sampler.kernel, sampler.warmup, problem.config.ensemble.members) == (
            "nuts",
            1024,
            1274,
        )
        assert problem.posterior.likelihood.num_outputs == 1
        assert len(problem.x) + len(problem.x_test) == 442
        assert len(problem.x_test) == 89
    with pytest.raises(InputError, match="expected one of diabetes, airfoil, energy"):
        study.read_problem("f1", "boston", None)


def test_starts_depend_on_the_chains_number_alone():
    problem = study.read_problem("f1", "diabetes", None)
    both = study.starts(problem, 0, np.array([3, 4]))["network"]["layer0"]["weight"]
    alone = study.starts(problem, 0, np.array([4]))["network"]["layer0"]["weight"]
    np.testing.assert_array_equal(both[1], alone[0])


def test_a_study_goes_on_with_the_missing_parts(tmp_path, monkeypatch):
    made = []

    def sample_part(problem, chains, warmup, draws, seed):
        made.append((int(chains[0]), len(chains), draws))
        if len(made) == 3:
            raise KeyboardInterrupt
        return fake_part(int(chains[0]), len(chains), draws)

    monkeypatch.setattr(study, "sample_part", sample_part)
    options = {"chains": 10, "long_draws": 30, "warmup": 64, "part": 4, "say": lambda text: None}
    with pytest.raises(KeyboardInterrupt):
        study.run_study("f1", "diabetes", tmp_path, **options)
    assert made == [(0, 4, 1), (1_000_000, 1, 30), (4, 4, 1)]
    made.clear()
    made += [None] * 3
    study.run_study("f1", "diabetes", tmp_path, **options)
    assert made[3:] == [(4, 4, 1), (8, 2, 1)]
    (row,) = table.rows(tmp_path)
    assert (row["network"], row["table"], row["warm-up"]) == ("f1", "diabetes", 64)
    assert (row["chains"], row["draws"]) == (10, 30)
    whole = fake_part(0, 10)["log_likelihood"][:, 0].astype(float)
    assert row["LPPD, chains"] == pytest.approx(np.log(np.exp(whole).mean(axis=0)).mean())
    assert row["gradients per chain"] == 107
    assert row["paper, chains"] == -1.20
    assert "| f1 | diabetes | 64 | 0 | 10 |" in table.as_markdown([row])
    json.dumps(row)
    # Parts of another size, with chains that are there already, change nothing.
    np.savez(tmp_path / "f1-diabetes-64-0" / "chains-00002-6.npz", **fake_part(2, 6))
    assert table.rows(tmp_path)[0]["LPPD, chains"] == pytest.approx(row["LPPD, chains"])


@pytest.mark.slow
def test_a_part_is_sampled_alike_however_it_is_cut():
    problem = study.read_problem("f1", "diabetes", None)
    whole = study.sample_part(problem, np.arange(2), 30, 2, 0)
    half = study.sample_part(problem, np.arange(1, 2), 30, 2, 0)
    np.testing.assert_allclose(whole["flat"][1], half["flat"][0], rtol=1e-5)
    assert whole["log_likelihood"].shape == (2, 2, 89)


def test_the_lppd_of_many_chains_is_seen_from_few():
    # Densities exp(z): many draws pool to ln E exp(z) = sd^2 / 2.
    rng = np.random.default_rng(0)
    sd = 0.8
    few = sd * rng.normal(size=(400, 20, 200))
    own = np.array([table.pooled(draws) for draws in few])
    seen = np.array([table.of_many(draws) for draws in few])
    exact = sd**2 / 2
    assert own.mean() < exact - 10 * own.std() / np.sqrt(400)
    assert abs(seen.mean() - exact) < 0.2 * abs(own.mean() - exact)
