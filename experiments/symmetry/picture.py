"""A posterior with known symmetries: a 1 x 3 tanh network, before and after alignment."""

from pathlib import Path
from typing import Any

import numpy as np


def sample_known(chains: int, warmup: int, draws: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Sample a 1 x 3 tanh network on data that three neurons made, from draws of the prior."""
    import jax

    import bnnmcmc
    from bnnmcmc.samplers.nuts import nuts

    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, size=(300, 1))
    f = 1.5 * np.tanh(2 * x + 3) - np.tanh(1.5 * x) + 1.2 * np.tanh(2.5 * x - 4)
    y = f + 0.05 * rng.normal(size=f.shape)
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(1, [3], 1, "tanh"), bnnmcmc.gaussian(1, 0.05), bnnmcmc.normal_prior(2.0)
    )
    key = jax.random.key(seed)

    def start(chain):
        member = posterior.init(key)
        weights = posterior.prior.sample(jax.random.fold_in(key, chain), member["network"])
        return {**member, "network": weights}

    run = bnnmcmc.sample(
        posterior,
        jax.vmap(start)(np.arange(chains)),
        x,
        y,
        kernel=nuts(),
        warmup=warmup,
        draws=draws,
        seed=seed,
    )
    return posterior, run, (x, y, f)


def compare(chains: int = 32, warmup: int = 1000, draws: int = 300, seed: int = 0) -> dict:
    """Return R-hat in function and weight space, before and after each kind of representative.

    All figures are of the chains in the largest functional mode.
    """
    from bnnmcmc import trees
    from bnnmcmc.diagnostics import rhat_across
    from bnnmcmc.exploration import explore
    from bnnmcmc.symmetry.canonical import METHODS, canonicalize

    posterior, run, _ = sample_known(chains, warmup, draws, seed)
    held = run.held_out_draws()
    found = explore(held.values, held.noise)
    assert found.modes is not None
    assert found.unseen is not None
    mode = found.chains[found.modes.labels == 0]
    flat = np.concatenate(list(run.draws.blocks()), axis=1)[mode]
    params = trees.unflatten(flat, run.draws.layout)["network"]
    params = {n: {k: np.asarray(v) for k, v in leaves.items()} for n, leaves in params.items()}

    def of(tree) -> np.ndarray:
        leaves = [v for name in sorted(tree) for v in tree[name].values()]
        return np.concatenate([v.reshape(*v.shape[:2], -1) for v in leaves], axis=-1)

    result: dict[str, Any] = {
        "chains": chains,
        "modes": found.modes.counts.tolist(),
        "unseen share": [found.unseen.share, found.unseen.low, found.unseen.high],
        "R-hat of predictions in the largest mode": _two(rhat_across(held.values[mode])),
        "R-hat of predictions across all chains": _two(rhat_across(held.values[found.chains])),
        "R-hat of weights, as they are": _two(rhat_across(of(params))),
    }
    clouds = {"as they are": of(params)}
    for method in METHODS:
        representative = canonicalize(posterior.network, params, method).params
        clouds[method] = of(representative)
        result[f"R-hat of weights, {method}"] = _two(rhat_across(clouds[method]))
    return {**result, "clouds": clouds}


def _two(rhats: np.ndarray) -> list[float]:
    return [float(np.median(rhats)), float(rhats.max())]


def draw(clouds: dict[str, np.ndarray], path: Path) -> None:
    """Draw bias against incoming weight of the three units, a colour for each chain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for ax, (name, values) in zip(
        figure.subplots(1, len(clouds), sharex=True, sharey=True), clouds.items(), strict=True
    ):
        few = values[:12, ::5]
        for chain in few:
            # Leaves in order: layer0's bias and weight, three each.
            ax.plot(chain[:, 3:6].ravel(), chain[:, :3].ravel(), ".", ms=2, alpha=0.4)
        ax.set(title=name, xlabel="incoming weight")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("bias")
    figure.savefig(path, dpi=150)
