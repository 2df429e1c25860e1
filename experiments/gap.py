"""Uncertainty away from the data: ``uv run python -m experiments.gap``, a picture in a minute.

A network is sampled on a curve with a gap in x. The picture shows the mean, the noise and what
the draws do not agree on; that grows in the gap and outside of the data.
"""

from pathlib import Path

import cyclopts
import numpy as np

import bnnmcmc

PICTURE = Path(__file__).with_name("gap.png")

app = cyclopts.App(name="python -m experiments.gap")


@app.default
def main(*, out: Path = PICTURE, members: int = 10):
    """Draw the picture.

    Parameters
    ----------
    out
        Where it goes.
    members
        Members of the ensemble, and chains.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-2, -0.7, (60, 1)), rng.uniform(0.7, 2, (60, 1))])
    y = np.sin(2 * x) + 0.15 * rng.normal(size=x.shape)
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(1, [16, 16], 2, "tanh"), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    rows = (x[:90], y[:90], x[90:], y[90:])
    ensemble = bnnmcmc.fit_ensemble(posterior, *rows, members=members)
    run = bnnmcmc.sample(posterior, ensemble.positions, x, y, warmup=10_000, draws=300)

    grid = np.linspace(-3.2, 3.2, 200)[:, None]
    found = run.predict(grid)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 4.6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    for level, shade in ((0.95, 0.18), (0.5, 0.3)):
        low, high = found.interval(level)
        name = f"{100 * level:.0f} % interval"
        above.fill_between(
            grid[:, 0], low[:, 0], high[:, 0], color="C0", alpha=shade, lw=0, label=name
        )
    above.plot(grid, found.mean, color="C0", label="mean")
    above.plot(x, y, ".", color="0.2", ms=3, label="data")
    above.set(ylim=(-3.5, 3.5), ylabel="y")
    above.legend(ncols=4, loc="upper center", frameon=False, fontsize=8)
    below.plot(grid, found.aleatoric_sd, color="C2", label="aleatoric")
    below.plot(grid, found.epistemic_sd, color="C1", label="epistemic")
    below.set(xlabel="x", ylabel="sd", ylim=(0, None))
    below.legend(ncols=2, loc="upper center", frameon=False, fontsize=8)
    figure.savefig(out, dpi=80)
    print(f"wrote {out}")


if __name__ == "__main__":
    bnnmcmc.use_all_cores()
    app()
