"""Verdicts on runs that are as they should be, and on such as are not."""

import json

import numpy as np
import pytest

from bnnmcmc.diagnostics import chain_table, run_summary
from bnnmcmc.exploration import (
    as_json,
    explore,
    superchains_of,
    weight_agreement,
)
from bnnmcmc.health import ChainStatus
from bnnmcmc.models.network import Layers
from bnnmcmc.symmetry import group
from bnnmcmc.verdict import verdict

CHAINS, DRAWS, INPUTS = 10, 200, 12


def settled(labels=(0,) * CHAINS, draws=DRAWS, gap=4.0, seed=0):
    """Return predictions (chain, draw, input), independent draws about the place of each mode."""
    rng = np.random.default_rng(seed)
    places = gap * np.random.default_rng(99).normal(size=(20, INPUTS))
    places[0] = 0
    return places[list(labels)][:, None] + rng.normal(size=(len(labels), draws, INPUTS))


def judge(functions, log_density=None, rows=True, superchains=None):
    """Return the verdict's sentences as one text, and what it rests on."""
    chains, draws, _ = functions.shape
    rng = np.random.default_rng(5)
    if log_density is None:
        log_density = rng.normal(size=(chains, draws))
    table = chain_table(
        log_density=log_density,
        positions=functions,
        functions=functions,
        stats={"gradients": np.full((chains, draws), 10)},
        statuses=[ChainStatus("ok", "No rule fired.")] * chains,
    )
    summary = run_summary(functions, log_density, table)
    # The outcome is that of mode 0 at each input, with noise of variance 4.
    scores = -0.5 * (0.3 - functions) ** 2 / 4 - 0.5 * np.log(8 * np.pi)
    found = explore(
        functions,
        np.full((chains, functions.shape[2]), 4.0),
        log_density=scores if rows else None,
        superchains=superchains,
    )
    said = json.loads(json.dumps(as_json(found)))  # as the report reads it
    return verdict(summary, table, said), said, table


def test_a_settled_run_needs_nothing():
    sentences, said, table = judge(settled())
    assert sentences[0] == (
        "Verdict: converged: all 10 chains have settled, and they agree. Nothing more is needed: "
        "neither more draws nor more chains would change much."
    )
    assert said["modes"]["counts"] == [10]
    assert "1 functional mode seen in 10 chains" in sentences[1]
    assert table[0]["ess_per_gradient"] == pytest.approx(0.1, rel=0.3)
    assert table[0]["ess_function_tail"] == pytest.approx(DRAWS, rel=0.4)


def test_a_frozen_chain():
    functions = settled()
    functions[3] = functions[3, :1]
    sentences, said, _ = judge(functions)
    assert sentences[0].startswith("Verdict: not converged: 1 of 10 chains have not settled.")
    assert "a smaller step size, or another kernel; 1 of 10 chains never move." in sentences[0]
    assert said["frozen"] == [3]
    assert any(s.startswith("Chain 3 stands still: no prediction ever changes") for s in sentences)
    assert said["modes"]["counts"] == [9, 1]


def test_what_is_not_settled_is_never_told_to_need_nothing():
    functions = settled([0] * 20)
    functions[3] = 0.3  # in the midst of the others
    assert "Nothing more" not in judge(functions)[0][0]
    functions = settled([0] * 20)
    functions[3] += np.linspace(-2, 2, DRAWS)[:, None]
    sentences, _, _ = judge(functions)
    assert sentences[0].startswith("Verdict: nearly converged: 19 of 20 chains have settled")
    assert "more draws, for the chains that drift" in sentences[0]


@pytest.mark.parametrize("rising", [True, False])
def test_drifting_chains(rising):
    functions = settled()
    functions[2:6] += np.linspace(0, 6, DRAWS)[:, None]
    log_density = np.random.default_rng(0).normal(size=(CHAINS, DRAWS))
    if rising:
        log_density[2:6] += np.linspace(0, 30, DRAWS)
    sentences, _, _ = judge(functions, log_density)
    assert sentences[0].startswith("Verdict: not converged: 4 of 10 chains have not settled. ")
    if rising:
        assert "a longer warm-up" in sentences[0]
        assert "log-density still rises, by 2." in sentences[0]
    else:
        assert "What helps: more draws" in sentences[0]
        assert "the log-density has no trend" in sentences[0]


def test_two_chains_in_different_modes():
    sentences, said, _ = judge(settled((0, 1)))
    assert sentences[0].startswith(
        "Verdict: converged within each chain, but not across them: they sit in different places. "
        "What helps: more chains"
    )
    assert said["modes"]["counts"] == [1, 1]
    assert "each by a single one: no two chains predict alike" in sentences[1]


def test_several_modes_with_several_chains():
    sentences, said, _ = judge(settled([0] * 6 + [1] * 3 + [2]))
    assert said["modes"]["counts"] == [6, 3, 1]
    assert (
        "3 functional modes seen in 10 chains, 1 of them once: the unseen share is about 10 %"
        in (sentences[1])
    )
    assert said["rhat_function_within_modes"] < 1.1
    assert any(s.startswith("Within modes chains agree: R-hat") for s in sentences)
    assert said["modes"]["ess"][0] == pytest.approx(6 * DRAWS, rel=0.3)
    labels = np.array(said["modes"]["shown_labels"])
    distances = np.array(said["modes"]["distances"])
    assert (np.diff(labels) >= 0).all()
    assert distances[np.ix_(labels == 0, labels == 0)].max() < 1
    assert distances[np.ix_(labels == 0, labels == 1)].min() > 1


def test_copied_chains_count_once():
    functions = settled([0] * 4 + [1] * 2)
    functions[[4, 5]] = functions[4]
    sentences, said, _ = judge(functions)
    assert said["copies"] == [[4, 5]]
    assert said["modes"]["counts"] == [4, 1]
    assert any(
        s.startswith("Chains 4, 5 have the very same draws and count once") for s in sentences
    )


def test_few_effective_draws_and_too_few_draws():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 400, INPUTS))
    for t in range(1, 400):
        values[:, t] = 0.97 * values[:, t - 1] + 0.243 * values[:, t]
    sentences, _, _ = judge(values)
    assert "more draws" in sentences[0]
    sentences, said, _ = judge(settled(draws=3))
    assert sentences[0].startswith("Verdict: 3 draws per chain are too few to say")
    assert said["modes"] is None


def test_chains_that_are_not_finite():
    functions = settled()
    functions[3] = np.nan
    sentences, said, _ = judge(functions)
    assert said["modes"]["counts"] == [9]
    assert 3 not in said["modes"]["chains"]
    # The pool leaves it out, and so does what the pool gains.
    assert np.isfinite(said["running_lppd"]["gain_draws"])
    assert sentences[0].startswith("Verdict: 9 of 10 chains have settled; of 1 nothing can be said")
    sentences, said, _ = judge(np.full_like(functions, np.nan))
    assert sentences[0].startswith("Verdict: there is nothing to judge, no chain has finite draws")
    assert said["modes"] is None


def test_one_chain_and_no_held_out_rows():
    assert "What helps: more chains, 10 or so" in judge(settled((0,)))[0][0]
    sentences, said, _ = judge(settled((0, 1, 2)), rows=False)
    assert said["running_lppd"] is None
    assert "and held-out rows to see when there are enough" in sentences[0]


def test_superchains_say_whether_the_start_still_matters():
    members = np.repeat(np.random.default_rng(0).normal(size=(3, 5)), 2, axis=0)
    superchains = superchains_of(members)
    assert sorted(np.bincount(superchains).tolist()) == [2, 2, 2]
    assert superchains_of(members[::2]) is None
    same = judge(settled([0] * 6), superchains=superchains)
    assert any("Where a chain began no longer matters" in s for s in same[0])
    apart = judge(settled(superchains), superchains=superchains)
    assert apart[1]["rhat_function_nested"] > 1.5
    assert any("Where a chain began still matters" in s for s in apart[0])


def test_stopped_chains_are_left_out():
    functions = settled()
    functions[7] = np.nan
    found = explore(functions, np.full((CHAINS, INPUTS), 4.0), stopped=[7])
    assert found.chains.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert found.modes.counts.tolist() == [9]


def test_weights_agree_once_symmetries_are_taken_out():
    layers, rng = Layers((2, 3, 1), "tanh"), np.random.default_rng(0)
    centre = {
        "layer0": {"bias": np.array([1.0, -2, 3]), "weight": rng.normal(size=(2, 3)) * 3},
        "layer1": {"bias": np.zeros(1), "weight": rng.normal(size=(3, 1)) * 3},
    }
    draws = {
        n: {k: v + 0.2 * rng.normal(size=(8, 50, *v.shape)) for k, v in leaves.items()}
        for n, leaves in centre.items()
    }
    elements = group.random_element(layers, rng, (8,))
    scrambled = group.apply(layers, group.at(elements, np.s_[:, None]), draws)
    found = weight_agreement(layers, scrambled, True)
    assert found.before_median > 2
    assert found.after_max < 1.05
    assert (found.chains, found.draws) == (8, 50)
