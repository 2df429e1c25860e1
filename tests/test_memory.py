from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bnnmcmc import build, memory
from bnnmcmc.config import parse
from bnnmcmc.data import prepare, table_from_arrays
from bnnmcmc.errors import InputError
from bnnmcmc.memory import Need, available_memory, check_memory
from bnnmcmc.preflight import need

GB = 1e9


def needed(rows=200, placement=None, **sections):
    rng = np.random.default_rng(0)
    table = table_from_arrays(rng.normal(size=(rows, 5)), rng.normal(size=rows))
    dataset = prepare(table, task="regression")
    config = parse({"data": {"source": "sklearn:diabetes"}, **sections}, "test")
    posterior = build.make_posterior(config, dataset.encoding)
    placed = placement or build.make_placement(config, posterior, dataset)
    posterior = replace(posterior, row_chunk=placed.row_chunk)
    return need(config, dataset, posterior, placed), placed


def test_what_costs_memory_is_counted():
    small = needed()[0].host
    assert set(small) == {"training", "sampling", "results"}
    assert all(0.2 * GB < size < 2 * GB for size in small.values())
    many = needed(ensemble={"members": 10_000})[0].host
    assert all(many[stage] > small[stage] for stage in small)
    wide = needed(model={"hidden": [2000, 2000]})[0].host
    # Ten chains, each with weights, gradients, moments and so on of 4 million parameters.
    assert wide["training"] > small["training"] + 10 * 4 * 4e6 * 4
    assert wide["sampling"] > small["sampling"] + 10 * 4 * 4e6 * 4
    long = needed(ensemble={"max_epochs": 10**7})[0].host
    assert long["training"] > small["training"] + 10 * 10**7 * 2 * 4
    assert long["sampling"] == small["sampling"]
    every = needed(run={"arviz": "netcdf"}, sampler={"draws": 20_000})[0].host
    assert every["results"] > small["results"] + 10 * 20_000 * 700 * 4


def test_chunks_and_groups_change_what_a_gradient_takes():
    whole, at_once = needed(rows=200_000, run={"row_chunk": 10**6})
    chunked, in_chunks = needed(rows=200_000)
    assert at_once.row_chunk is None
    assert in_chunks.row_chunk
    assert chunked.host["sampling"] < whole.host["sampling"] - 0.1 * GB
    together, _ = needed(rows=200_000, run={"row_chunk": 10**6, "mode": "map", "group": 5})
    assert together.host["sampling"] > whole.host["sampling"] + 0.5 * GB


def test_on_gpus_chains_share_out_the_memory():
    def on(count):
        card = SimpleNamespace(platform="gpu", device_kind="GPU", id=0)
        _, placed = needed(ensemble={"members": 2})
        cards = (card,) * count
        return replace(placed, chains=1000, devices=cards, mode="vmap", group=1)

    one, two = (
        needed(placement=on(n), ensemble={"members": 1000}, model={"hidden": [64, 64]})[0]
        for n in (1, 2)
    )
    assert set(one.device) == {"training", "sampling"}
    for stage in one.device:
        assert one.device[stage] / 2 < two.device[stage] < 0.6 * one.device[stage]


def test_what_cannot_fit_is_refused_with_the_numbers():
    found, placement = needed()
    check_memory(found, placement, available=3 * GB)
    with pytest.raises(InputError) as error:
        check_memory(Need({"training": 2 * GB, "sampling": 5.5 * GB}, {}), placement, 4 * GB)
    for part in ("5.50 GB of main memory", "training 2.00 GB", "4.00 GB are available"):
        assert part in str(error.value)
    assert "ensemble.members" in str(error.value)


def test_a_gpu_that_is_too_small_is_refused():
    _, placement = needed()
    card = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 10 * GB})
    on_gpu = replace(placement, devices=(card,))
    check_memory(Need({"sampling": GB}, {"sampling": 9 * GB}), on_gpu, 2 * GB)
    with pytest.raises(InputError, match=r"11.00 GB of the device's memory.*10.00 GB"):
        check_memory(Need({"sampling": GB}, {"sampling": 11 * GB}), on_gpu, 2 * GB)


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    whole = available_memory()
    assert whole is None or whole > 0
    group = tmp_path / "group"
    group.mkdir()
    files = (group / "memory.max", group / "memory.current")
    monkeypatch.setattr(memory, "_control_groups", lambda: [files])
    assert available_memory() == pytest.approx(whole, rel=0.2)  # no such files
    files[1].write_text("900000000\n")
    (group / "memory.stat").write_text("anon 500\ninactive_file 300000000\n")
    files[0].write_text("max\n")
    assert available_memory() == pytest.approx(whole, rel=0.2)
    files[0].write_text("1000000000\n")
    assert available_memory() == 400_000_000


def test_run_and_check_refuse_before_any_work(tiny, here, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 0.1 * GB)
    for command in (["check", "tiny.toml"], ["run", "tiny.toml", "--out", "run"]):
        code, _, err = here(*command, cwd=tiny)
        assert code == 2
        assert "0.10 GB are available" in err
    assert not (tiny / "run").exists()
