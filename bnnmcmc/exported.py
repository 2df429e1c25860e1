"""The pooled predictor as one function of JAX, in a file that JAX alone can read and call."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.data import Encoding
from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import class_probabilities
from bnnmcmc.predictive import thinned_to
from bnnmcmc.store import disk_errors

if TYPE_CHECKING:
    from bnnmcmc.predictor import Predictor
    from bnnmcmc.run import Run

# What the file can run on.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(file: str | Path, run: "Run | Predictor", draws: int | None = 1000) -> None:
    r"""Write the pooled predictor as a function of JAX (``jax.export``).

    The function takes the features (rows, columns), float32, any number of rows, and returns a
    dict of float32: "mean", "sd" and "epistemic_sd" (rows, targets) in target units, or
    "probabilities" (rows, classes). Columns are those of ``encoding.feature_names``, in their own
    units: numbers as in the table, 1 where a row is of the category, else 0. NaN is a missing
    number where `Run.predict` takes one, and sets the "is missing" column; else it stays NaN. With
    draws d of weights :math:`w_d`,

    .. math:: m = \sum_d w_d m_d, \quad s^2 = \sum_d w_d v_d + \sum_d w_d (m_d - m)^2.

    >>> predict = jax.export.deserialize(open("model.jax", "rb").read()).call  # doctest: +SKIP
    >>> predict(rows.astype("float32"))["mean"]  # doctest: +SKIP

    Parameters
    ----------
    file : path
        Written anew if it is there.
    run : Run or Predictor
    draws : int, optional
        About so many draws are kept, as many of each pooled chain, evenly spaced; all if None.

    Raises
    ------
    InputError
        A run on bare arrays, whose columns have no scale; a calibrated one; or a network that
        does not go with any number of rows.
    """
    file, encoding = Path(file), run.encoding
    if encoding is None:
        raise InputError("export: the run has no encoding of rows, so its columns have no units")
    if run.calibration != "none":
        raise InputError(
            'export: corrections are not exported; export run.calibrated("none"), the posterior '
            "alone, or use save"
        )
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    predict = jax.jit(pooled_function(run, encoding, draws))
    columns = len(encoding.feature_names)
    rows = jax.export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((*rows, columns), jnp.float32)
    try:
        exported = jax.export.export(predict, platforms=PLATFORMS)(shape)
    except Exception as error:  # what a network's own operations raise has no common base
        raise InputError(
            f"export: the network cannot be exported for any number of rows: {error}"
        ) from error
    with disk_errors(file.parent):
        file.write_bytes(exported.serialize())


def pooled_function(run: "Run | Predictor", encoding: Encoding, draws: int | None) -> Any:
    """Return the function that `export` writes: features in own units -> dict of predictions."""
    whole = run.pooled_draws
    kept = whole if draws is None else thinned_to(whole, draws)
    flat = np.concatenate(list(kept.blocks()), axis=1)
    shares = np.repeat(kept.shares, kept.draws)
    flat = flat.reshape(-1, flat.shape[-1])
    posterior, of = run.posterior, kept.layout
    likelihood = posterior.likelihood
    centre, scale = (jnp.asarray(each) for each in input_scales(encoding))
    fill, source = gaps(encoding)
    indicates = source != np.arange(len(source))
    offset = jnp.asarray([target.center for target in encoding.targets])
    unit = jnp.asarray([target.scale for target in encoding.targets])
    pool = jnp.asarray(flat), jnp.asarray(shares, jnp.result_type(float))

    def moments(x, one):
        position = trees.unflatten(one, of)
        outputs = posterior.network.apply(posterior.network_params(position), x)
        distribution = likelihood.distribution(position["likelihood"], outputs)
        if likelihood.task == "classification":
            return {"probabilities": class_probabilities(distribution)}
        return {"mean": distribution.mean, "variance": distribution.variance}

    def summed(x, term):
        shapes = jax.eval_shape(term, moments(x, pool[0][0]))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total, draw):
            found = term(moments(x, draw[0]))
            return jax.tree.map(lambda sum, part: sum + draw[1] * part, total, found), None

        return jax.lax.scan(add, zero, pool)[0]

    def singles(found):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    def predict(rows):
        rows = rows.astype(jnp.result_type(float))
        missing = jnp.isnan(rows)
        rows = jnp.where(missing, fill, rows)
        x = (jnp.where(indicates & missing[:, source], 1.0, rows) - centre) / scale
        mean = summed(x, lambda found: found)
        if likelihood.task == "classification":
            return singles(mean)
        # In a second pass, for the digits.
        spread = summed(x, lambda found: jnp.square(found["mean"] - mean["mean"]))
        found = {
            "mean": offset + unit * mean["mean"],
            "sd": unit * jnp.sqrt(mean["variance"] + spread),
            "epistemic_sd": unit * jnp.sqrt(spread),
        }
        return singles(found)

    return predict


def input_scales(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Return centre and scale of every encoded column; 0 and 1 for those of categories and gaps."""
    found = []
    for feature in encoding.features:
        if feature.categories is None:
            found.append((feature.center, feature.scale))
        else:
            found += [(0.0, 1.0)] * len(feature.categories)
        found += [(0.0, 1.0)] * feature.gaps
    centres, scales = zip(*found, strict=True)
    return np.array(centres), np.array(scales)


def gaps(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Return what stands for NaN in every encoded column, and whose NaN the column indicates.

    Returns
    -------
    fill : numpy array (columns,)
        NaN where a missing value stays one.
    source : numpy array (columns,) of int
        Of an "is missing" column of a number, the number's column; else the column itself.
    """
    fill: list[float] = []
    source: list[int] = []
    for feature in encoding.features:
        first = len(fill)
        if feature.categories is None:
            fill.append(np.nan if feature.fill is None else feature.fill)
            source.append(first)
        else:
            fill += [np.nan] * len(feature.categories)
            source += range(first, len(fill))
        if feature.gaps:
            fill.append(np.nan)
            source.append(first if feature.categories is None else len(source))
    return np.array(fill), np.array(source)
