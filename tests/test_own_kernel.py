"""A kernel of the user's own: the one in the README, by name in a config and as a value."""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, write_tiny
from moments import MIXTURE, failures

from bnnmcmc.build import make_kernel
from bnnmcmc.config import parse, read_config, to_toml
from bnnmcmc.errors import InputError
from bnnmcmc.preflight import check_model, gradient_counts
from bnnmcmc.run import Run
from bnnmcmc.sampling import sample_density
from bnnmcmc.store import read_manifest

README = Path(__file__).parent.parent / "README.md"
# The module walk.py as users read it.
WALK = next(
    block
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    if "def random_walk" in block
)
SECTION = """
[sampler]
kernel = "walk:random_walk"
warmup = 300
draws = 40
thin = 5

[sampler.options]
target_acceptance = 0.3

[run]"""
OWN = re.sub(r"\n\[sampler\].*?\n\[run\]", SECTION, TINY, flags=re.DOTALL)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "readme_walk.py").write_text(WALK)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("readme_walk")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def ran(tmp_path_factory, cli):
    folder = write_tiny(tmp_path_factory.mktemp("own"), text=OWN)
    (folder / "walk.py").write_text(WALK)
    code, out, err = cli("run", "tiny.toml", "--out", "run", cwd=folder)
    assert code == 0, err
    (folder / "stdout.txt").write_text(out)
    return folder


@pytest.mark.slow
def test_a_whole_run_from_the_command_line(ran):
    folder, out = ran / "run", (ran / "stdout.txt").read_text()
    assert "walk:random_walk, 300 warm-up steps, 40 draws per chain (one every 5 steps)" in out
    manifest = read_manifest(folder)
    assert (manifest["kernel"], manifest["stage"]) == ("walk:random_walk", "done")
    assert manifest["statistics"] == ["acceptance_rate", "log_density"]
    assert "walk:random_walk" in (folder / "report.html").read_text(encoding="utf-8")
    run = Run.open(folder)
    assert run.draws.draws == 40
    assert np.isfinite(
        json.loads((folder / "metrics.json").read_text())["test"]["posterior"]["lppd"]
    )
    # It walks, and accepts about as often as it was told to.
    assert np.ptp(run.load_draws()["network"]["layer0"]["weight"], axis=1).min() > 0
    assert 0.15 < run.stats["acceptance_rate"].mean() < 0.5
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[1, 7]), run.load_draws())
    density = run.posterior.log_density(one, *run.posterior.arrays(run.x, run.y))
    assert run.stats["log_density"][1, 7] == pytest.approx(float(density), rel=1e-4)


def test_more_draws_are_those_of_a_longer_run(ran, here, monkeypatch):
    monkeypatch.delitem(sys.modules, "walk", raising=False)
    settings = ["--quiet", "--set", "sampler.draws=25"]
    code, _, err = here("run", "tiny.toml", "--out", "part", *settings, cwd=ran)
    assert code == 0, err
    code, _, err = here("resume", "part", "--draws", "15", "--quiet", cwd=ran)
    assert code == 0, err
    whole, part = (Run.open(ran / name).load_draws() for name in ("run", "part"))
    jax.tree.map(np.testing.assert_array_equal, whole, part)


def test_check_says_what_it_can_about_the_cost(ran, here, monkeypatch):
    """Without a number of gradients a step, only the least time can be said."""
    monkeypatch.delitem(sys.modules, "walk", raising=False)
    (ran / "unknown.py").write_text(WALK.replace("gradients_per_step=0", "gradients_per_step=None"))
    setting = "sampler.kernel=unknown:random_walk"
    code, out, err = here("check", "tiny.toml", "--set", setting, cwd=ran)
    assert code == 0, err
    assert re.search(r"at least .* \(500 unknown:random_walk steps per chain", out)
    for known, least in (("0", 500), ("3", 1500)):
        text = WALK.replace("gradients_per_step=0", f"gradients_per_step={known}")
        (ran / f"known{known}.py").write_text(text)
        config = read_config(ran / "tiny.toml", [f"sampler.kernel=known{known}:random_walk"])
        assert gradient_counts(config) == (least, least)


@pytest.mark.parametrize(
    "options", [{"initial_step_size": 0.5}, {"target_acceptance": 0.9}], ids=lambda o: next(iter(o))
)
def test_options_reach_the_kernel(walk, options):
    def draws(**options):
        tables = {"kernel": "readme_walk:random_walk", "options": options}
        kernel = make_kernel(parse({"data": {"path": "t.csv"}, "sampler": tables}, ""))
        found = sample_density(MIXTURE[0], np.ones((2, 2)), kernel=kernel, warmup=20, draws=20)
        return found.draws[:, -1]

    assert not np.any(draws() == draws(**options))


def moments(kernel):
    density, mean, second = MIXTURE
    starts = jax.random.normal(jax.random.key(1), (4, 2))
    samples = sample_density(density, starts, kernel=kernel, warmup=1000, draws=3000, thin=15)
    return failures(samples.draws, mean, second)


def test_as_a_value_in_python_it_finds_a_known_posterior(walk):
    assert moments(walk.random_walk()) == []


def test_one_that_accepts_everything_fails_the_same_test(walk):
    kernel = walk.random_walk(initial_step_size=0.5)

    def step(key, state, size, log_density):
        there = state.position + size * jax.random.normal(key, state.position.shape)
        new = walk.State(there, log_density(there))
        return new, walk.Info(new.logdensity, jnp.ones(()))

    assert moments(kernel._replace(step=step))


BROKEN = (
    WALK
    + """

import numpy as np

GOOD = random_walk()
VALUE = GOOD

def without_a_kernel():
    return 5

def raises(size=1.0):
    raise RuntimeError(f"no walk of size {size}")

def named_badly():
    class Wrong(NamedTuple):
        log_density: jax.Array
        accepted: jax.Array

    def step(key, state, size, log_density):
        new, info = GOOD.step(key, state, size, log_density)
        return new, Wrong(*info)
    return GOOD._replace(step=step)

def silent():
    class Wrong(NamedTuple):
        energy: jax.Array

    def step(key, state, size, log_density):
        new, info = GOOD.step(key, state, size, log_density)
        return new, Wrong(info.log_density)
    return GOOD._replace(step=step)

def vector():
    def step(key, state, size, log_density):
        new, info = GOOD.step(key, state, size, log_density)
        return new, info._replace(acceptance_rate=jnp.ones(3))
    return GOOD._replace(step=step)

def stateless():
    return GOOD._replace(init=lambda key, position, log_density: position)

def flat_density():
    def init(key, position, log_density):
        return State(position, jnp.zeros(2))
    return GOOD._replace(init=init)

def half():
    def step(key, state, size, log_density):
        new, info = GOOD.step(key, state, size, log_density)
        return new._replace(position=new.position.astype(jnp.float16)), info
    return GOOD._replace(step=step)

def other_structure():
    def step(key, state, size, log_density):
        new, info = GOOD.step(key, state, size, log_density)
        return (new, 1.0), info
    return GOOD._replace(step=step)

def on_the_host():
    def step(key, state, size, log_density):
        return np.asarray(state.position) + 1, None
    return GOOD._replace(step=step)

def one_result():
    return GOOD._replace(step=lambda key, state, size, log_density: state)

def untuned():
    return GOOD._replace(warmup=lambda num_steps: None)

def tuned_badly():
    rules = GOOD.warmup(1)
    return GOOD._replace(
        warmup=lambda num_steps: rules._replace(step=lambda k, s, a, t, d: (s, jnp.ones(2), 0))
    )

def cannot_tune():
    def warmup(num_steps):
        raise ValueError("steps")
    return GOOD._replace(warmup=warmup)
"""
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("broken"), text=OWN)
    (folder / "broken_walks.py").write_text(BROKEN)
    (folder / "walk_in_error.py").write_text("import jax\n1 / 0\n")
    return folder


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ("broken_walks:absent", {}, r"sampler\.kernel: the module 'broken_walks' has no 'absent'"),
        ("no_walks:x", {}, r"sampler\.kernel: cannot import 'no_walks'"),
        ("walk_in_error:x", {}, r"importing 'walk_in_error' failed: ZeroDivisionError"),
        (":x", {}, r"sampler\.kernel: found ':x', expected module:object"),
        ("broken_walks:VALUE", {}, r"VALUE is a Kernel, expected a function that returns a bnnmc"),
        ("broken_walks:without_a_kernel", {}, r"without_a_kernel returned a int, expected a bnn"),
        (
            "broken_walks:random_walk",
            {"target": 0.3},
            r"sampler\.options: found target, but broken_walks:random_walk takes "
            r"initial_step_size, target_acceptance \(got an unexpected keyword argument 'target'\)",
        ),
        ("broken_walks:untuned", {"a": 1}, r"sampler\.options: found a, .* takes nothing"),
        ("broken_walks:raises", {"size": 2}, r"raises\(size=2\) failed: RuntimeError: no walk of"),
        (
            "broken_walks:named_badly",
            {},
            r"named_badly: step returned the statistic 'accepted'; it must have one of the names "
            r"in bnnmcmc\.samplers\.kernel\.REDUCTIONS, .*: log_density, energy, step_size",
        ),
        ("broken_walks:silent", {}, r"silent: step returned statistics without log_density"),
        ("broken_walks:vector", {}, r"statistic acceptance_rate of shape \(3,\), expected a sc"),
        ("broken_walks:stateless", {}, r"without position and logdensity, expected a NamedTuple"),
        ("broken_walks:flat_density", {}, r"init returned logdensity of shape \(2,\) and type"),
        ("broken_walks:half", {}, r"step returned state\.position of shape .*float16, but was"),
        ("broken_walks:other_structure", {}, r"step returned a state of another structure"),
        ("broken_walks:on_the_host", {}, r"on_the_host: step failed: TracerArrayConversionError"),
        ("broken_walks:one_result", {}, r"step returned a State, expected \(state, Info\)"),
        ("broken_walks:untuned", {}, r"warmup returned a NoneType, expected a bnnmcmc\.Warmup"),
        ("broken_walks:tuned_badly", {}, r"warm-up's step returned adaptation\.position of shape"),
        ("broken_walks:cannot_tune", {}, r"cannot_tune: warmup failed: ValueError: steps"),
    ],
)
def test_one_that_does_not_fit_is_refused_before_any_work(
    broken, here, monkeypatch, kernel, options, message
):
    settings = [f"sampler.kernel={kernel}", "sampler.options={}"]
    settings += [f"sampler.options.{name}={value}" for name, value in options.items()]
    code, _, err = here("run", "tiny.toml", "--out", "r", "--quiet", "--set", *settings, cwd=broken)
    assert code == 2
    assert re.search(message, err), err
    assert not (broken / "r").exists()


def test_a_value_that_does_not_fit_is_refused_too(walk):
    kernel = walk.random_walk()
    wrong = kernel._replace(init=lambda key, position, log_density: position)
    with pytest.raises(InputError, match=r"kernel 'random walk': init returned a .* without posit"):
        sample_density(lambda x: -jnp.sum(x**2), jnp.zeros((2, 3)), kernel=wrong)


def test_the_check_has_the_number_of_sampled_parameters(broken, monkeypatch):
    """A kernel that is made for so many parameters, and no other number."""
    from bnnmcmc.inputs import read_dataset

    (broken / "fourteen.py").write_text(
        WALK
        + """

def fourteen():
    kernel = random_walk()
    def init(key, position, log_density):
        assert position.shape == (14,), position.shape
        return kernel.init(key, position, log_density)
    return kernel._replace(init=init)
"""
    )
    monkeypatch.chdir(broken)
    settings = ["sampler.kernel=fourteen:fourteen", "sampler.options={}"]
    config = read_config("tiny.toml", [*settings, "sampler.leaves=['layer1']"])
    dataset = read_dataset(config, broken)
    check_model(config, dataset)
    with pytest.raises(InputError, match=r"init failed: AssertionError: \(44,\)"):
        check_model(read_config("tiny.toml", settings), dataset)


def test_in_a_config():
    tables = {"data": {"path": "t.csv"}, "sampler": {"kernel": "a:b", "options": {"x": [1, 2.5]}}}
    config = parse(tables, "e.toml")
    assert config.sampler.kernel == "a:b"
    assert (config.sampler.warmup, config.sampler.draws, config.sampler.thin) == (1000, 1000, 1)
    import tomllib

    assert parse(tomllib.loads(to_toml(config)), "") == config
    for section, line in (
        ({"kernel": "a:b", "x": 1}, r"sampler\.x: unknown key; "),
        ({"kernel": "a:b", "drws": 1}, r"sampler\.drws: unknown key; did you mean 'draws'"),
        ({"kernel": "a:b", "options": 5}, r"sampler\.options: found 5, but it should be a table"),
        ({"kernel": "a:b", "thin": 0}, r"sampler\.thin: found 0, but it should be greater"),
        ({"kernel": "nuts", "options": {}}, r"sampler\.options: unknown key"),
        ({"kernel": "ab"}, r"found 'ab', expected one of mclmc, .*, smile, module:function"),
    ):
        with pytest.raises(InputError, match=line):
            parse({"data": {"path": "t.csv"}, "sampler": section}, "e.toml")


def test_our_own_are_made_as_before():
    tables = {"data": {"path": "t.csv"}, "sampler": {"kernel": "hmc", "num_leapfrog": 7}}
    kernel = make_kernel(parse(tables, ""))
    assert (kernel.name, kernel.exact) == ("hmc", True)
