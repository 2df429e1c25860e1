"""PRNG keys by stage, chain and step.

A random number depends on the seed, the stage, the chain and the step alone, so a result does
not depend on block sizes, on the number of devices, or on how often a run was interrupted.
"""

import zlib

import jax

STAGES = (
    "ensemble-init",
    "ensemble-shuffle",
    "sampler-init",
    "warmup",
    "sampling",
    "prediction",
    "mixture",
    "prior-draws",
    "class-draws",
)


def stage_key(seed: int, stage: str) -> jax.Array:
    """Return the key of one stage of a run with this seed.

    Parameters
    ----------
    seed : int
        The run's seed, 0 <= seed < 2**32.
    stage : str
        One of ``STAGES``.

    Returns
    -------
    jax.Array
        A scalar typed PRNG key.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; one of {', '.join(STAGES)}")
    # A label's checksum, not its place in a list: adding a stage later changes no old stream.
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
