import numpy as np
import pytest

from bnnmcmc.errors import InputError
from bnnmcmc.health import ChainStatus, chain_statuses, say_now
from bnnmcmc.samplers.mclmc import mclmc

THIN = 5


def ordinary(kernel="mclmc", chains=8, draws=200, seed=0):
    """Statistics of chains in modes of their own: levels differ by 20, each chain moves by 15."""
    rng = np.random.default_rng(seed)
    level = rng.normal(1300.0, 20.0, (chains, 1))
    steps = rng.normal(size=(chains, draws))
    stats = {
        "log_density": (level + 15.0 * steps).astype(np.float32),
        "diverging": np.zeros((chains, draws), np.int32),
        "step_size": np.full((chains, draws), 0.0123, np.float32),
    }
    if kernel == "mclmc":
        stats["energy_error_squared"] = rng.uniform(0, 0.1, (chains, draws)).astype(np.float32)
    else:
        stats["acceptance_rate"] = rng.uniform(0.5, 1, (chains, draws)).astype(np.float32)
    return stats


def judge(stats, finite=None, steps_per_draw=THIN):
    chains = len(stats["log_density"])
    finite = np.ones(chains, bool) if finite is None else finite
    return chain_statuses(stats, finite, steps_per_draw=steps_per_draw)


def names(statuses):
    return [status.status for status in statuses]


def only(chain, status, chains=8):
    return [status if c == chain else "ok" for c in range(chains)]


@pytest.mark.parametrize("kernel", ["mclmc", "nuts"])
@pytest.mark.parametrize("chains", [1, 2, 5, 8, 50])
def test_ordinary_chains_raise_no_alarm(kernel, chains):
    for seed in range(20):
        statuses = judge(ordinary(kernel, chains, seed=seed))
        assert names(statuses) == ["ok"] * chains
    assert statuses[0].sentence.startswith("Median log-density 1")
    assert isinstance(statuses[0], ChainStatus)


def test_chains_in_one_mode_raise_no_alarm():
    # Medians agree far better than chains move, so their own spread is no measure.
    for seed in range(20):
        stats = ordinary(chains=6, draws=50, seed=seed)
        stats["log_density"] -= np.median(stats["log_density"], axis=1, keepdims=True)
        stats["log_density"][2] -= 30.0
        assert names(judge(stats)) == ["ok"] * 6


def test_a_log_density_alone_is_enough():
    stats = {"log_density": ordinary()["log_density"]}
    assert names(judge(stats)) == ["ok"] * 8


def test_refused_proposals_of_a_healthy_chain_raise_no_alarm():
    stats = ordinary("hmc", draws=10)
    stats["log_density"][1, 2:] = stats["log_density"][1, 2]  # eight equal draws of ten
    assert names(judge(stats)) == ["ok"] * 8
    short = ordinary("hmc", draws=3)
    short["log_density"][:] = short["log_density"][:, :1]  # too few to say
    assert names(judge(short)) == ["ok"] * 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_density_that_is_not_finite(value):
    stats = ordinary()
    stats["log_density"][2, 150:170] = value
    statuses = judge(stats)
    assert names(statuses) == only(2, "nonfinite")
    assert "log-density is not finite in 20 of 200 draws, first in draw 150" in statuses[2].sentence
    assert "sampler.energy_variance_end" in statuses[2].sentence


def test_draws_that_are_not_finite():
    statuses = judge(ordinary(), np.arange(8) != 4)
    assert names(statuses) == only(4, "nonfinite")
    assert "Some draws hold a NaN" in statuses[4].sentence


def test_an_unknown_acceptance_rate_is_not_passed_over():
    stats = ordinary("nuts")
    stats["acceptance_rate"][3, 0] = np.nan
    statuses = judge(stats)
    assert names(statuses) == only(3, "nonfinite")
    assert "acceptance rate is not finite in 1 of 200 draws" in statuses[3].sentence


def test_a_chain_that_never_moves_is_stuck():
    stats = ordinary()
    stats["log_density"][0] = 1311.0
    statuses = judge(stats)
    assert names(statuses) == only(0, "stuck")
    assert "stayed at 1311 over the last 100 of 200 draws at step size 0.012" in (
        statuses[0].sentence
    )


def test_a_chain_that_froze_on_its_way_is_stuck():
    stats = ordinary()
    stats["log_density"][0, 99:] = stats["log_density"][0, 99]
    stats["log_density"][1, 102:] = stats["log_density"][1, 102]
    assert names(judge(stats)) == only(0, "stuck")


def test_a_chain_that_accepts_nothing_is_stuck():
    stats = ordinary("hmc")
    stats["acceptance_rate"][5] = 0.04
    stats["acceptance_rate"][6] = 0.06
    statuses = judge(stats)
    assert names(statuses) == only(5, "stuck")
    assert "mean acceptance rate is 0.04, less than 0.05" in statuses[5].sentence
    assert "sampler.target_acceptance = 0.9" in statuses[5].sentence


def test_a_chain_whose_steps_are_too_short_is_not_told_to_shorten_them():
    stats = ordinary("nuts")
    stats["log_density"][1] = 1290.0
    stats["acceptance_rate"][1] = 1.0
    stats["step_size"][1] = 1e-12
    statuses = judge(stats)
    assert names(statuses) == only(1, "stuck")
    assert "step size 1e-12: the steps are accepted but too short" in statuses[1].sentence
    assert "lower the step size" not in statuses[1].sentence


@pytest.mark.parametrize(
    ("kernel", "advice"),
    [("nuts", "sampler.target_acceptance = 0.9"), ("mclmc", "sampler.energy_variance_end = 0.01")],
)
def test_more_than_one_step_in_a_hundred_diverged(kernel, advice):
    stats = ordinary(kernel)
    stats["diverging"][6, :23] = 1  # of 200 draws of 5 steps
    stats["diverging"][7, :10] = 1
    statuses = judge(stats)
    assert names(statuses) == only(6, "diverging")
    assert statuses[6].sentence == (
        "2.3 % of the steps diverged (23 of 1000) at step size 0.012: lower the step size, e.g. "
        f"{advice}."
    )


def test_divergences_are_counted_per_step_not_per_draw():
    stats = ordinary()
    stats["diverging"][6] = THIN  # every step
    assert judge(stats)[6].sentence.startswith("100.0 % of the steps diverged (1000 of 1000)")
    stats["diverging"][6] = 0
    stats["diverging"][6, :9] = 1  # 0.9 % of the steps, 4.5 % of the draws
    assert names(judge(stats)) == ["ok"] * 8
    assert names(judge(stats, steps_per_draw=1)) == only(6, "diverging")


def test_a_chain_far_below_the_others_is_low():
    stats = ordinary()
    stats["log_density"][3] -= 2000.0
    statuses = judge(stats)
    assert names(statuses) == only(3, "low")
    assert "robust standard deviations" in statuses[3].sentence
    assert "hint" in statuses[3].sentence


def test_the_threshold_of_low_is_ten_deviations_and_one_sided():
    medians = np.array([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 0.0]) * 20
    still = np.tile([-1.0, 0.0, 1.0], 20)  # spread 1.48 within a chain, 29.7 between chains
    for shift, expected in ((-290.0, "ok"), (-300.0, "low"), (300.0, "ok"), (3e5, "ok")):
        levels = np.append(medians, shift)
        statuses = judge({"log_density": levels[:, None] + still})
        assert names(statuses) == only(7, expected)
    assert "10 robust standard deviations (29.7) below the chains' median 0" in (
        judge({"log_density": np.append(medians, -300.0)[:, None] + still})[7].sentence
    )


def test_chains_less_than_ten_nats_apart_are_never_low():
    still = np.tile([-1e-6, 0.0, 1e-6], 20)
    for shift, expected in ((-9.0, "ok"), (-11.0, "low")):
        levels = np.append(np.zeros(7), shift)
        assert names(judge({"log_density": levels[:, None] + still})) == only(7, expected)


def test_low_needs_five_finite_chains():
    stats = ordinary(chains=5)
    stats["log_density"][1] -= 2000.0
    assert names(judge(stats)) == only(1, "low", 5)
    assert names(judge(stats, np.array([True, True, True, True, False]))) == [
        *["ok"] * 4,
        "nonfinite",
    ]
    four = {name: values[:4] for name, values in stats.items()}
    assert names(judge(four)) == ["ok"] * 4


def test_a_broken_chain_does_not_hide_a_low_one():
    stats = ordinary()
    stats["log_density"][0] = np.nan
    stats["log_density"][3] -= 2000.0
    assert names(judge(stats)) == ["nonfinite", "ok", "ok", "low", "ok", "ok", "ok", "ok"]


def test_the_worst_status_wins():
    stats = ordinary("hmc")
    finite = np.ones(8, bool)
    stats["log_density"][:4] -= 2000.0
    stats["log_density"][:4] += np.array([0, 10, -10, 20], np.float32)[:, None]
    low = [*["low"] * 3, *["ok"] * 5]
    stats["log_density"][3] += 2000.0
    assert names(judge(stats)) == low
    stats["diverging"][:2] = 1
    assert names(judge(stats))[:3] == ["diverging", "diverging", "low"]
    stats["acceptance_rate"][0] = 0.0
    stats["acceptance_rate"][4] = 0.0
    assert names(judge(stats))[:5] == ["stuck", "diverging", "low", "ok", "stuck"]
    finite[0] = False
    assert names(judge(stats, finite))[:3] == ["nonfinite", "diverging", "low"]


WANTED = {"energy_error_squared": 0.05, "acceptance_rate": 0.8, "tree_depth": 10}


def wanting(stats):
    return chain_statuses(stats, np.ones(len(stats["log_density"]), bool), THIN, wanted=WANTED)


@pytest.mark.parametrize("kernel", ["mclmc", "nuts"])
def test_ordinary_chains_that_reach_what_was_wanted_raise_no_alarm(kernel):
    for seed in range(20):
        stats = ordinary(kernel, seed=seed)
        stats["tree_depth"] = np.full((8, 200), 9)
        assert names(wanting(stats)) == ["ok"] * 8
        assert say_now(stats, THIN, wanted=WANTED) == ""


def test_an_energy_variance_far_beyond_the_wanted_one():
    stats = ordinary()
    stats["energy_error_squared"][2] = 0.6
    stats["energy_error_squared"][3] = 0.4
    statuses = wanting(stats)
    assert names(statuses) == only(2, "biased")
    assert "(EEVPD) is 0.6, 12.0 times the wanted 0.05 (limit 10)" in statuses[2].sentence
    assert "sampler.energy_variance_end" in statuses[2].sentence
    assert names(judge(stats)) == ["ok"] * 8  # nobody said what was wanted


@pytest.mark.parametrize(("rate", "word"), [(0.5, "longer"), (0.54, None), (0.56, None)])
def test_an_acceptance_rate_far_from_its_target(rate, word):
    stats = ordinary("hmc")
    stats["acceptance_rate"][4] = rate
    statuses = wanting(stats)
    assert names(statuses) == (["ok"] * 8 if rate > 0.55 else only(4, "off target"))
    if word:
        assert "rate is 0.50, more than 0.25 from its target 0.80" in statuses[4].sentence
        assert f"steps are {word}" in statuses[4].sentence


def test_a_chain_of_mclmc_whose_steps_are_taken_back():
    stats = ordinary("mclmc") | {"acceptance_rate": np.full((8, 200), 0.99)}
    stats["acceptance_rate"][3] = 0.7
    stats["acceptance_rate"][5] = 0.01
    statuses = chain_statuses(stats, np.ones(8, bool), THIN, wanted=mclmc().wanted)
    assert names(statuses) == ["ok"] * 3 + ["off target", "ok", "stuck", "ok", "ok"]
    assert "rate is 0.70, more than 0.25 from its target 1.00" in statuses[3].sentence
    assert "sampler.energy_variance_end" in statuses[5].sentence  # its own option


def test_trees_of_the_greatest_depth():
    stats = ordinary("nuts")
    stats["tree_depth"] = np.full((8, 200), 9)
    stats["tree_depth"][1, :101] = 10
    stats["tree_depth"][2, :100] = 10
    statuses = wanting(stats)
    assert names(statuses) == only(1, "saturated")
    assert "50 % of the draws have a tree of the greatest depth, 10 (limit 50 %)" in (
        statuses[1].sentence
    )


def test_a_step_size_far_below_the_others():
    stats = ordinary()
    stats["step_size"][5] = 1e-4
    stats["step_size"][6] = 2e-4
    statuses = judge(stats)
    assert names(statuses) == only(5, "collapsed")
    assert "step size 0.0001 is 123 times below the chains' median 0.012 (limit 100)" in (
        statuses[5].sentence
    )
    four = {name: values[4:] for name, values in stats.items()}
    assert names(judge(four)) == ["ok"] * 4  # too few to compare


def test_a_log_density_that_falls():
    stats = ordinary()
    stats["log_density"][3] -= np.linspace(0, 400, 200)
    stats["log_density"][4] += np.linspace(0, 400, 200)  # it climbs: not arrived, but no fault
    statuses = judge(stats)
    assert names(statuses) == only(3, "sinking")
    assert "The log-density falls: its median is" in statuses[3].sentence
    assert "(limit 5)" in statuses[3].sentence


def test_few_draws_are_no_evidence():
    stats = ordinary(draws=19)
    stats["energy_error_squared"][:] = 9.0
    stats["log_density"] -= np.linspace(0, 9000, 19)
    assert names(wanting(stats)) == ["ok"] * 8


def test_progress_counts_troubles_worst_first():
    stats = ordinary()
    stats["log_density"][0] = np.nan
    stats["log_density"][1, 50] = np.nan
    stats["diverging"][2] = 1
    stats["energy_error_squared"][2:5] = 0.9
    stats["log_density"][5] -= 2000.0
    assert say_now(stats, THIN, wanted=WANTED, stopped=1) == (
        "chains: 1 stopped, 1 nonfinite, 1 diverging, 2 biased, 1 low"
    )


STATS = ordinary()
FINITE = np.ones(8, bool)


@pytest.mark.parametrize(
    ("stats", "finite", "steps", "message"),
    [
        ({}, FINITE, 1, "stats: found nothing, expected 'log_density'"),
        ({"diverging": STATS["diverging"]}, FINITE, 1, "stats: found diverging, expected"),
        ({"log_density": np.zeros((8, 0))}, FINITE, 1, r"found shape \(8, 0\)"),
        ({"log_density": np.zeros(8)}, FINITE, 1, r"expected \(chain, draw\)"),
        (STATS | {"diverging": np.zeros((8, 2))}, FINITE, 1, r"stats\['diverging'\]: found shape"),
        (STATS, FINITE[:3], 1, r"finite: found bool of shape \(3,\)"),
        (STATS, np.ones(8), 1, "finite: found float64"),
        (STATS, FINITE, 0, "steps_per_draw: found 0"),
    ],
)
def test_inputs_that_do_not_fit_are_named(stats, finite, steps, message):
    with pytest.raises(InputError, match=message):
        chain_statuses(stats, finite, steps)
