from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnmcmc.errors import InputError
from bnnmcmc.placement import Placement, gather, over_chains, place, replicate, spread


def tree(chains):
    return {
        "a": np.arange(chains * 2, dtype=np.float32).reshape(chains, 2),
        "n": np.arange(chains, dtype=np.int32),
    }


@pytest.mark.parametrize("chains", [1, 2, 3, 4, 5])
def test_spread_and_gather_are_inverse_and_padding_copies_the_last_chain(chains):
    placement = place(chains)
    there = spread(tree(chains), placement)
    assert placement.padded == there["n"].shape[0]
    assert placement.padded % len(placement.devices) == 0
    assert placement.padded - chains < len(placement.devices)
    np.testing.assert_array_equal(np.asarray(there["n"])[chains:], chains - 1)
    assert {s.device for s in there["a"].addressable_shards} == set(placement.devices)
    back = gather(there, placement)
    for name, leaf in tree(chains).items():
        np.testing.assert_array_equal(back[name], leaf)
        assert back[name].dtype == leaf.dtype


def test_chains_lie_on_devices_in_equal_shares():
    shards = spread(np.arange(6.0), place(6)).addressable_shards
    assert [s.data.shape for s in shards] == [(3,), (3,)]


@pytest.mark.parametrize("chains", [1, 3, 4, 5])
@pytest.mark.parametrize(
    ("mode", "group"), [("map", 1), ("map", 2), ("map", 3), ("map", 7), ("vmap", 1)]
)
def test_every_mode_gives_the_same_results(chains, mode, group):
    placement = place(chains, mode=mode, group=group)

    def function(one, scale, offset):
        return {"sum": one["a"].sum() * scale + offset["b"], "n": one["n"] + 1}

    compiled = over_chains(function, placement)
    shared = replicate((np.float32(2.0), {"b": np.float32(1.0)}), placement)
    result = gather(compiled(spread(tree(chains), placement), *shared), placement)
    np.testing.assert_array_equal(result["sum"], tree(chains)["a"].sum(1) * 2 + 1)
    np.testing.assert_array_equal(result["n"], np.arange(chains) + 1)


def test_the_mode_says_how_many_chains_advance_together():
    """Seen from inside: the batch size that a custom batching rule is given."""
    seen = []

    @jax.custom_batching.custom_vmap
    def spy(x):
        return x

    @spy.def_vmap
    def rule(axis_size, in_batched, x):
        seen.append(axis_size)
        return x, True

    expected = {("map", 1): set(), ("map", 2): {2}, ("vmap", 1): {4}}
    for (mode, group), sizes in expected.items():
        seen.clear()
        placement = place(8, mode=mode, group=group)
        over_chains(spy, placement)(spread(np.arange(8.0), placement))
        assert set(seen) == sizes


def test_donated_values_are_given_away_and_others_are_not():
    placement = place(4)
    for donate in (False, True):
        values = spread(np.arange(4.0), placement)
        over_chains(lambda x: x + 1, placement, donate=donate)(values)
        assert values.is_deleted() is donate


@pytest.mark.parametrize("devices", [1, 2])
def test_what_was_gathered_outlives_the_donation_of_its_source(devices):
    placement = place(4, jax.devices()[:devices])
    advance = over_chains(lambda x: x + 1, placement, donate=True)
    values = advance(spread(np.zeros((4, 1000), np.float32), placement))
    host = gather(values, placement)
    for _ in range(3):
        values = advance(values)
    jax.block_until_ready(values)
    np.testing.assert_array_equal(host, 1.0)


def test_a_result_goes_round_without_another_compilation():
    """Also where a Python scalar makes a weakly typed leaf."""
    traces = []

    def advance(x):
        traces.append(1)
        return {"value": x["value"] + 1, "weak": jnp.asarray(0.5)}

    placement = place(2)
    compiled = over_chains(advance, placement)
    start = {"value": np.zeros(2, np.float32), "weak": np.zeros(2, np.float32)}
    x = spread(start, placement)
    for _ in range(3):
        x = compiled(x)
    compiled(spread(gather(x, placement), placement))
    assert len(traces) == 1


def test_defaults():
    assert place(8).mode == "map"  # CPU
    assert len(place(8).devices) == 2
    assert len(place(1).devices) == 1  # never more devices than chains
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    assert place(8, [gpu]).mode == "vmap"
    assert place(8, [gpu], mode="map").mode == "map"


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (place(10), "10 chains on 2 CPU cores, 5 each, one after the other"),
        (place(3), "3 chains on 2 CPU cores, up to 2 each, one after the other"),
        (place(1), "1 chain on 1 CPU core, 1 each, one after the other"),
        (place(8, mode="map", group=4), "8 chains on 2 CPU cores, 4 each, in groups of 4"),
        (place(8, mode="vmap"), "8 chains on 2 CPU cores, 4 each, side by side"),
        (
            Placement(8, (SimpleNamespace(platform="gpu", device_kind="NVIDIA H100"),) * 2, "vmap"),
            "8 chains on 2 GPUs (NVIDIA H100), 4 each, side by side",
        ),
    ],
)
def test_describe(placement, text):
    assert placement.describe() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chains": 0}, "chains: found 0, expected at least 1"),
        ({"chains": 2, "devices": []}, "devices: found none"),
        ({"chains": 2, "mode": "pmap"}, "mode: found 'pmap', expected 'map' or 'vmap'"),
        ({"chains": 2, "group": 0}, "group: found 0, expected at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        place(**arguments)
