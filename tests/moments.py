"""First and second moments of draws against the truth, in units of their Monte Carlo errors."""

import jax
import jax.numpy as jnp
import numpy as np
from arviz_stats.base import array_stats

MIN_ESS = 300
ERRORS = 4.5


def failures(draws, mean, second):
    """Return what is wrong with draws (chain, draw, size), given E[x] and E[x^2]."""
    found = []
    for moment, values, truth in (
        ("mean", draws, mean),
        ("second moment", np.square(draws), second),
    ):
        for i, expected in enumerate(truth):
            x = values[..., i].astype(np.float64)
            if not np.all(np.isfinite(x)):
                found.append(f"not finite: {moment} of {i}")
                continue
            ess = array_stats.ess(x, chain_axis=0, draw_axis=1, method="mean")
            if not ess > MIN_ESS:
                found.append(f"ess {ess:.0f}: {moment} of {i}")
                continue
            error = array_stats.mcse(x, chain_axis=0, draw_axis=1, method="mean")
            z = (x.mean() - expected) / error
            if not abs(z) < ERRORS:
                found.append(f"{moment} of {i}: {x.mean():.4g} is not {expected:.4g} (z = {z:.1f})")
    return found


CENTRE = np.array([1.5, 0.5])


def mixture(x):
    """Weights 0.3 and 0.7 at minus and plus the centre, unit scales: two modes, well connected."""
    logits = jnp.log(jnp.array([0.3, 0.7]))
    centres = jnp.stack([-CENTRE, CENTRE]).astype(jnp.float32)
    return jax.nn.logsumexp(logits - 0.5 * jnp.sum(jnp.square(x - centres), axis=1))


MIXTURE = (mixture, 0.4 * CENTRE, 1.0 + CENTRE**2)
