"""Data of which the truth is known, and small networks sampled on them."""

import numpy as np

import bnnmcmc


def heteroscedastic(x, rng):
    return np.sin(2 * x) + (0.1 + 0.3 * np.abs(x)) * rng.normal(size=x.shape)


def skewed(x, rng):
    return np.sin(2 * x) + 0.5 * np.exp(0.6 * rng.normal(size=x.shape))


def counts(x, rng):
    return rng.poisson(np.exp(1 + np.sin(2 * x))).astype(float)


# Name -> how targets come about, and the likelihood of the model.
TRUTHS = {
    "heteroscedastic": (heteroscedastic, bnnmcmc.gaussian()),
    "skewed": (skewed, bnnmcmc.gaussian_mixture()),
    "counts": (counts, bnnmcmc.poisson(level=3.0)),
}
POSTERIORS = {
    name: bnnmcmc.Posterior(
        bnnmcmc.mlp(1, [8], likelihood.num_outputs, "tanh"), likelihood, bnnmcmc.normal_prior()
    )
    for name, (_, likelihood) in TRUTHS.items()
}


def sampled(posterior, x, y, seed=0, members=2, warmup=1500, draws=100, max_epochs=100):
    """Train a small ensemble on three quarters of the rows, sample on all of them."""
    cut = 3 * len(x) // 4
    ensemble = bnnmcmc.fit_ensemble(
        posterior,
        *(x[:cut], y[:cut], x[cut:], y[cut:]),
        members=members,
        batch_size=16,
        max_epochs=max_epochs,
        seed=seed,
    )
    return bnnmcmc.sample(
        posterior, ensemble.positions, x, y, warmup=warmup, draws=draws, thin=10, seed=seed
    )


def fitted(name, rows, seed):
    """Return a run on rows of a truth, and what was observed at 200 others."""
    rng = np.random.default_rng(seed)
    truth, _ = TRUTHS[name]
    x = rng.uniform(-2, 2, (rows + 200, 1))
    y = truth(x, rng)
    run = sampled(POSTERIORS[name], x[:rows], y[:rows], seed)
    return run, x[rows:], y[rows:]
