"""Programs are kept on disk, and compiled ahead, and no draw depends on it."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import CancelledError
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import bnnmcmc
from bnnmcmc import pipeline, trees
from bnnmcmc.ahead import Ahead
from bnnmcmc.compilation import cache_folder, tidy, use_compilation_cache
from bnnmcmc.placement import place, replicate
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.sampling import (
    at_rest,
    build_program,
    finish_warmup,
    join_stats,
    run_blocks,
    start_chains,
)

DATA = (np.array([1.0, 4.0, 9.0], np.float32),)
POSITIONS = jax.random.normal(jax.random.key(7), (3, 3))


def log_density(position, precision):
    return -0.5 * jnp.sum(precision * jnp.square(position))


def build(density=log_density, kernel=None, draws=6):
    of = trees.layout(POSITIONS[0])
    return build_program(
        density, kernel or hmc(num_leapfrog=3), of, place(3), warmup=30, draws=draws, thin=2
    )


def through(program):
    data = replicate(DATA, program.placement)
    carry, blocks = start_chains(program, POSITIONS, 0, data), {}
    for stage in ("warmup", "sampling"):
        carry = finish_warmup(program, carry) if stage == "sampling" else carry
        blocks[stage] = list(run_blocks(program, stage, carry, 0, data, max_count=4))
        carry = blocks[stage][-1].carry
    return blocks


@pytest.fixture
def own_config():
    """JAX's cache as a user's process finds it; put back afterwards."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (True, None, 1.0, 0), strict=True):
        jax.config.update(name, value)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


# ------------------------------------------------------------------------------- on disk


SCRIPT = """
import hashlib, json, sys
import numpy as np
import bnnmcmc
bnnmcmc.use_all_cores(2)
folder = bnnmcmc.use_compilation_cache()
import jax, jax.numpy as jnp
compiling, hits = [], []
def listen(event, seconds, **_):
    compiling.append(seconds if event.endswith("backend_compile_duration") else 0.0)
jax.monitoring.register_event_duration_secs_listener(listen)
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
samples = bnnmcmc.sample_density(
    lambda p, x: -0.5 * jnp.sum(x * jnp.square(p["w"])), {"w": np.ones((3, 2))},
    kernel="nuts", warmup=100, draws=20, data=(np.array([1.0, 9.0], np.float32),),
)
digest = hashlib.sha256(samples.draws["w"].tobytes()).hexdigest()
missed = sum(hit.endswith("cache_misses") for hit in hits)
print(json.dumps([str(folder), sum(compiling), missed, digest]))
"""


def in_process(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.alone
def test_a_second_process_compiles_nothing_and_draws_the_same(tmp_path):
    """On two devices, with donated buffers; the draws of executables from disk, bit for bit."""
    runs = []
    for _ in range(3):
        done = in_process(SCRIPT, XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    (folder, cold, missed, digest), (_, warm, missed_again, digest_again), (_, again, _, _) = runs
    assert folder == str(tmp_path / "bnnmcmc" / "jax")
    assert missed > 4
    assert missed_again == 0
    assert min(warm, again) < 0.1 * cold
    assert digest_again == digest


def test_the_folder_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "bnnmcmc" / "jax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "bnnmcmc" / "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / "bnnmcmc" / "jax"


def test_the_command_line_turns_it_on(own_config, monkeypatch, tmp_path, here):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    code, _, err = here("diagnose", "nothing", cwd=tmp_path)
    assert code == 2, err
    assert own_config.jax_compilation_cache_dir is None  # nothing to compute, so nothing to keep
    from bnnmcmc.cli import _use_cache

    _use_cache()
    assert own_config.jax_compilation_cache_dir == str(tmp_path / "caches" / "bnnmcmc" / "jax")
    assert own_config.jax_persistent_cache_min_compile_time_secs == 0
    assert own_config.jax_persistent_cache_min_entry_size_bytes == -1


def test_what_the_user_set_in_jax_stays(own_config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    own = tmp_path / "own"
    own_config.update("jax_compilation_cache_dir", str(own))
    own_config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    assert use_compilation_cache() == own
    assert own_config.jax_compilation_cache_dir == str(own)
    assert own_config.jax_persistent_cache_min_compile_time_secs == 5.0
    assert not own.exists()  # JAX makes it, and looks after it
    own_config.update("jax_enable_compilation_cache", False)
    assert use_compilation_cache() is None
    assert not (tmp_path / "caches").exists()


def test_importing_changes_nothing_in_jax(tmp_path):
    script = (
        "import bnnmcmc; bnnmcmc.mlp; bnnmcmc.sample; import bnnmcmc.pipeline, jax;"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    done = in_process(script, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.strip() == "None", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_not_used(own_config, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert use_compilation_cache(tmp_path / "file" / "cache") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert use_compilation_cache() is None
    assert own_config.jax_compilation_cache_dir is None

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert use_compilation_cache(tmp_path / "full") is None
    assert list((tmp_path / "full").iterdir()) == []


def test_a_folder_that_jax_has_opened_already_is_changed(own_config, tmp_path):
    for name in ("one", "two"):
        assert use_compilation_cache(tmp_path / name) == tmp_path / name
        jax.jit(lambda x, name=name: x + len(name))(jnp.ones(17)).block_until_ready()
    assert any(path.name.endswith("-cache") for path in (tmp_path / "two").iterdir())


def test_the_cache_is_bounded_and_loses_what_was_not_used_for_longest(tmp_path):
    now = time.time()
    for i in range(5):
        path = tmp_path / f"program{i}-cache"
        path.write_bytes(zlib.compress(os.urandom(1000)))
        os.utime(path, (now - 100 * i, now - 1000))
    size = path.stat().st_size
    tidy(tmp_path, 3 * size)
    left = sorted(path.name for path in tmp_path.glob("program*"))
    assert left == ["program0-cache", "program1-cache", "program2-cache"]


def test_damaged_programs_are_removed_once(tmp_path):
    whole = zlib.compress(bytes(5000))
    contents = {
        "whole-cache": whole,
        "cut-cache": whole[:-5],
        "empty-cache": b"",
        "zstandard-cache": b"\x28\xb5\x2f\xfd and more",
        "other": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    tidy(tmp_path, 10**6)
    left = {path.name for path in tmp_path.iterdir()} - {".checked"}
    assert left == {"whole-cache", "zstandard-cache", "other"}


# --------------------------------------------------------------------------------- ahead


@pytest.fixture(scope="module")
def reference():
    return through(build())


def test_compiled_ahead_the_draws_are_the_same(reference):
    program = build()
    sampler = Ahead(program, replicate(DATA, program.placement))
    blocks = through(sampler.program)
    for stage in ("warmup", "sampling"):
        a, b = join_stats(blocks[stage]), join_stats(reference[stage])
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_array_equal(
        np.concatenate([b.draws for b in blocks["sampling"]], 1),
        np.concatenate([b.draws for b in reference["sampling"]], 1),
    )
    # By the thread and by the calls together, one trace each.
    assert program.traces == {"start": 1, "warm": 1, "finish": 1, "draw": 1}


def test_nothing_is_left_to_compile_for_the_first_call():
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            compiled.append(event)

    program = build(draws=7)
    data = replicate(DATA, program.placement)
    sampler = Ahead(program, data)
    assert sampler.cold_seconds() > 0
    carry = start_chains(sampler.program, POSITIONS, 0, data)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        carry = next(iter(run_blocks(sampler.program, "warmup", carry, 0, data))).carry
        carry = finish_warmup(sampler.program, carry)
        next(iter(run_blocks(sampler.program, "sampling", carry, 0, data)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_shapes_are_those_of_the_arrays(reference):
    program = build()
    shapes = Ahead(program, replicate(DATA, program.placement), ("draw",)).shapes
    first = reference["sampling"][0]
    carry = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), at_rest(first.carry))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes.sampling) == carry
    assert {n: s.dtype for n, s in shapes.sampling_stats.items()} == {
        n: s.dtype for n, s in first.stats.items()
    }


def test_an_error_comes_where_the_function_is_used():
    def broken(position, precision):
        raise ZeroDivisionError("of the user's own")

    program = build(broken)
    sampler = Ahead(program, replicate(DATA, program.placement))
    with pytest.raises(ZeroDivisionError, match="of the user's own") as caught:
        through(sampler.program)
    assert "broken" in [entry.name for entry in caught.traceback]
    with pytest.raises(ZeroDivisionError):
        _ = sampler.shapes


def test_it_computes_in_the_precision_of_the_caller():
    with jax.enable_x64(True):
        program = build()
        sampler = Ahead(program, replicate((np.ones(3),), program.placement), ("start",))
        leaves = jax.tree.leaves(sampler.shapes.sampling)
        assert jnp.float64 in [leaf.dtype for leaf in leaves]
        sampler.cancel()


def test_cancelled_it_compiles_no_more(monkeypatch):
    program = build()
    begun = []
    lower = jax.stages.Traced.lower

    def slowly(traced):
        begun.append(traced)
        sampler.cancel()
        return lower(traced)

    monkeypatch.setattr(jax.stages.Traced, "lower", slowly)
    sampler = Ahead(program, replicate(DATA, program.placement))
    with pytest.raises(CancelledError):
        sampler.cold_seconds()
    assert len(begun) == 1


STOPPED = """
import sys, numpy as np, jax, jax.numpy as jnp
from bnnmcmc import trees
from bnnmcmc.ahead import Ahead
from bnnmcmc.placement import place
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.sampling import build_program
of = trees.layout(jnp.ones(40))
program = build_program(lambda p: -jnp.sum(p**2), nuts(), of, place(2), warmup=9, draws=9, thin=1)
sampler = Ahead(program, ())
try:
    sampler.shapes
    raise KeyboardInterrupt
finally:
    sampler.cancel()
"""


def test_a_process_ends_in_the_middle_of_a_compilation():
    """Python waits for the one at hand: XLA aborts when a thread of it is cut off."""
    done = in_process(STOPPED)
    assert "Fatal" not in done.stderr
    assert done.returncode == -signal.SIGINT, done.stderr


def test_a_run_traces_and_compiles_each_function_once(tiny, here, monkeypatch):
    programs = []

    def build_and_keep(*arguments, **options):
        programs.append(build_program(*arguments, **options))
        return programs[-1]

    monkeypatch.setattr(pipeline, "build_program", build_and_keep)
    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", cwd=tiny)
    assert code == 0, err
    assert [program.traces for program in programs] == [
        {"start": 1, "warm": 1, "finish": 1, "draw": 1}
    ]
    assert bnnmcmc.Run.open("run").draws.draws == 40
