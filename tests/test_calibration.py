from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bnnmcmc import calibration
from bnnmcmc.calibration import Fast, caches, calibrate, choose, gpu_bytes
from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import gaussian
from bnnmcmc.models.mlp import mlp
from bnnmcmc.posterior import Posterior
from bnnmcmc.priors import normal

MB = 2**20
CPU = Fast(near=1 * MB, far=16 * MB)
CORES = [SimpleNamespace(platform="cpu", device_kind="cpu")] * 2
GPU = [SimpleNamespace(platform="gpu", device_kind="GPU")]


def chosen(chains, rows, activations, **options):
    found = choose(chains, rows, activations, **{"devices": CORES, "fast": CPU, **options})
    return found.mode, found.group, found.row_chunk


def test_tiny_chains_go_in_groups_that_stay_near():
    assert chosen(100, 60, 10_000) == ("map", 13, None)  # of 16 at most, evenly
    assert chosen(100, 60, 40_000) == ("map", 3, None)
    assert chosen(100, 300, MB // 8 + 1) == ("map", 1, None)
    assert chosen(1, 60, 1000) == ("map", 1, None)


def test_groups_are_even_so_that_few_places_are_filled_up():
    for chains in (5, 10, 33, 34, 35, 64, 1000, 10_000):
        _, group, _ = chosen(chains, 60, 1000)
        per_device = -(-chains // 2)
        batches = -(-per_device // group)
        assert group <= 16
        assert batches * group - per_device < batches  # not a place to spare in each


def test_rows_go_in_chunks_only_where_one_chain_leaves_the_cache():
    assert chosen(10, 14_000, 3 * MB) == ("map", 1, None)
    assert chosen(10, 14_000, 4 * MB + 1) == ("map", 1, 512)
    assert chosen(10, 50_000, 62 * MB) == ("map", 1, 256)
    assert chosen(10, 2_000, 600 * MB) == ("map", 1, 128)  # never smaller


def test_a_gpu_takes_all_chains_at_once_if_they_fit():
    card = {"devices": GPU, "fast": Fast(80 * 2**30)}
    assert chosen(10_000, 1000, MB, **card) == ("vmap", 1, None)
    mode, group, chunk = chosen(10_000, 100_000, 100 * MB, **card)
    assert (mode, chunk) == ("map", None)
    assert group * 100 * MB <= 40 * 2**30
    assert group > 200


def test_the_state_of_chains_at_rest_leaves_less_for_those_at_work():
    card = {"devices": GPU, "fast": Fast(80 * 2**30)}
    _, without, _ = chosen(10_000, 100_000, 100 * MB, **card)
    _, beside, _ = chosen(10_000, 100_000, 100 * MB, chain_bytes=2 * MB, **card)
    assert 1 < beside < 0.6 * without


def test_a_gpu_takes_rows_in_chunks_rather_than_too_few_chains():
    card = {"devices": GPU, "fast": Fast(8 * 2**30)}
    mode, group, chunk = chosen(500, 1_000_000, 1000 * MB, **card)
    assert mode == "map"
    assert chunk is not None
    assert group >= 64
    assert group * 1000 * MB * chunk / 1_000_000 <= 4 * 2**30


@pytest.mark.parametrize(
    ("by_hand", "expected"),
    [
        ({"mode": "map", "group": 7}, ("map", 7, None)),
        ({"mode": "vmap"}, ("vmap", 1, None)),
        ({"row_chunk": 10}, ("map", 8, 10)),
        ({"row_chunk": 60}, ("map", 4, None)),
        ({"row_chunk": 600}, ("map", 4, None)),
        ({"mode": "map", "group": 2, "row_chunk": 30}, ("map", 2, 30)),
    ],
)
def test_what_is_set_by_hand_stays(by_hand, expected):
    assert chosen(16, 60, 30_000, **by_hand) == expected


def test_a_choice_made_by_hand_says_so():
    whole = {"mode": "map", "group": 2, "row_chunk": 60}
    assert choose(8, 60, 1000, devices=CORES, fast=CPU, **whole).reason == "as set in [run]"
    assert "caches of 1 and 16 MB" in choose(8, 60, 1000, devices=CORES, fast=CPU).reason


def test_a_chosen_placement_set_by_hand_is_the_same_on_another_machine():
    for rows, activations in ((60, 10_000), (14_000, 8 * MB)):
        first = choose(20, rows, activations, devices=CORES, fast=CPU)
        again = choose(
            20,
            rows,
            activations,
            devices=CORES,
            fast=Fast(64 * MB, 512 * MB),
            mode=first.mode,
            group=first.group,
            row_chunk=first.row_chunk or rows,
        )
        assert again == first


def test_a_chunk_below_one_row_is_refused():
    with pytest.raises(InputError, match="row_chunk: found 0, expected at least 1"):
        choose(4, 60, 1000, row_chunk=0)


def test_caches_are_read_where_linux_tells_them(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CPU_CACHES", tmp_path)
    assert caches(4) == Fast(calibration.UNKNOWN_CACHE, 0)
    for index, (level, kind, size, cpus) in enumerate(
        [
            (1, "Data", "48K", "0,64"),
            (1, "Instruction", "32K", "0,64"),
            (2, "Unified", "2048K", "0,64"),
            (3, "Unified", "32M", "0-7,64-71"),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (
            ("level", level),
            ("type", kind),
            ("size", size),
            ("shared_cpu_list", cpus),
        ):
            (folder / name).write_text(f"{text}\n")
    assert caches(4) == Fast(2 * MB, 8 * MB)
    assert caches(128) == Fast(2 * MB, 2 * MB)  # 16 share one third-level cache
    (tmp_path / "index3" / "size").write_text("unreadable\n")
    assert caches(4) == Fast(2 * MB, 0)


def test_a_gpu_says_how_much_memory_jax_manages():
    assert gpu_bytes(SimpleNamespace(memory_stats=lambda: {"bytes_limit": 5 * MB})) == 5 * MB
    assert gpu_bytes(SimpleNamespace(memory_stats=lambda: None)) == calibration.UNKNOWN_GPU


@pytest.fixture
def problem():
    posterior = Posterior(mlp(3, [4], 2), gaussian(), normal())
    rng = np.random.default_rng(0)
    x, y = posterior.arrays(rng.normal(size=(64, 3)), rng.normal(size=(64, 1)))
    return posterior, x, y, choose(8, 64, 4000, mode=None, group=None, fast=CPU)


@pytest.mark.parametrize(("slow", "expected"), [("none", 4), ("ruled", 1), ("plain", 4)])
def test_only_a_clear_measurement_overrules_the_rule(problem, monkeypatch, slow, expected):
    """Timings by a clock that the candidates move, so that the machine's load is no matter."""
    posterior, x, y, placement = problem
    assert placement.group == 4
    now = [0.0]
    monkeypatch.setattr(calibration.time, "monotonic", lambda: now[0])

    def walker(posterior, x, y, placement):
        ruled = placement.group == 4
        factor = {"none": 1.1 if ruled else 1.0, "ruled": 2.0 if ruled else 1.0}.get(slow)

        def walk(count):
            now[0] += 1e-3 * count * (factor or (1.0 if ruled else 2.0))

        return walk

    monkeypatch.setattr(calibration, "_walker", walker)
    found = calibrate(posterior, x, y, placement, 10**9)
    assert found.group == expected
    assert "measured" in found.reason


def test_a_short_run_is_not_measured(problem, monkeypatch):
    monkeypatch.setattr(calibration, "_walker", None)
    assert calibrate(*problem, 1000) == problem[3]
    plain = replace(problem[3], group=1)
    assert calibrate(*problem[:3], plain, 10**9) == plain  # nothing to compare with


def test_a_long_run_is_measured_for_real(problem):
    found = calibrate(*problem, 10**9)
    assert found.group in (1, 4)
    assert "us a gradient" in found.reason
    assert {d.platform for d in found.devices} == {jax.devices()[0].platform}
