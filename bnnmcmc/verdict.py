"""The verdict on a run in plain sentences: what converged, what did not, and what would help."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bnnmcmc.modes import UNSEEN_GOAL, Unseen, say_unseen

RHAT_LIMIT = 1.1
# A pool that gains less than this from twice its size is large enough, in nats per row.
SMALL_GAIN = 0.005
# With so many draws R-hat can be computed, if they are finite.
ENOUGH_DRAWS = 40
# A typical prediction's mean and spread want so many independent draws.
ENOUGH_ESS = 100
# A trend of the log-density, in its standard deviations within the chain; a straight climb is 2.6.
TREND = 1.0
# If the chains agree with each other, such a share of them may be above the limit on their own.
NEARLY = 0.25


def verdict(
    summary: Mapping[str, Any], table: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> list[str]:
    """Say whether a run has converged, and whether draws, warm-up, chains or another model help.

    Parameters
    ----------
    summary : mapping
        From `diagnostics.run_summary`.
    table : sequence of mappings
        From `diagnostics.chain_table`.
    found : mapping
        From `exploration.as_json`.

    Returns
    -------
    list of str
        The first begins with "Verdict:"; each has the numbers it rests on.
    """
    parts = [_judge(summary, table, found), *_faults(found)]
    if found["modes"] is not None and len(found["modes"]["chains"]) > 1:
        parts.append(say_unseen(Unseen(**found["modes"]["unseen"])))
    parts += _within_modes(found)
    parts += _running(found["running_lppd"])
    parts += _weights(found["weights"])
    return parts


def _going(summary: Mapping[str, Any]) -> int:
    return summary["chains"] - len(summary["chains_stopped"])


def _judge(summary, table, found) -> str:
    """Return the verdict in two sentences: has it converged, and what to do."""
    going = _going(summary)
    if not going:
        return "Verdict: there is nothing to judge, every chain was stopped."
    undefined = set(summary["chains_undefined"]) - set(found["frozen"])
    drifting = summary["chains_drifting"]
    judged = going - len(undefined) - len(found["frozen"])
    if judged <= 0 and not found["frozen"]:
        if summary["draws"] >= ENOUGH_DRAWS:
            return "Verdict: there is nothing to judge, no chain has finite draws that change."
        return (
            f"Verdict: {summary['draws']} draws per chain are too few to say whether the chains "
            "have settled; draw 100 or more."
        )
    helps = _advice(summary, table, found)
    few = len(drifting) <= NEARLY * going and _agree(summary, found)
    if drifting and few and not found["frozen"]:
        head = f"nearly converged: {judged - len(drifting)} of {going} chains have settled, and "
        head += "all agree"
    elif drifting or found["frozen"]:
        bad = len(drifting) + len(found["frozen"])
        head = f"not converged: {bad} of {going} chains have not settled"
    elif undefined:
        return (
            f"Verdict: {judged} of {going} chains have settled; of {len(undefined)} nothing can be "
            "said (see their status), nor whether the chains agree. What helps: a smaller step "
            "size, or a prior and scaling with which every chain stays finite and moves."
        )
    elif _agree(summary, found):
        head = f"converged: all {judged} chains have settled, and they agree"
        if going == 1:
            head = "converged within its one chain, which sees one mode only"
    else:
        head = "converged within each chain, but not across them: they sit in different places"
    return f"Verdict: {head}. {helps}"


def _agree(summary, found) -> bool:
    across = summary["rhat_function_across_median"]
    if across is None:
        across = summary["rhat_log_density_across"]
    return _going(summary) == 1 or (not math.isnan(across) and across <= RHAT_LIMIT)


def _advice(summary, table, found) -> str:
    """Say what would help most."""
    draws, worth = summary["draws"], summary["ess_function_total_median"]
    frozen, drifting = found["frozen"], summary["chains_drifting"]
    going = _going(summary)
    if frozen:
        return (
            f"What helps: a smaller step size, or another kernel; {len(frozen)} of {going} chains "
            "never move."
        )
    if len(drifting) > 0.1 * going:
        trends = [table[c]["log_density_drift"] for c in drifting]
        rising = sorted(t for t in trends if t is not None and not math.isnan(t))
        middle = rising[len(rising) // 2] if rising else 0.0
        if abs(middle) > TREND:
            word = "rises" if middle > 0 else "falls"
            return (
                f"What helps: a longer warm-up, at least twice as long; in the chains that drift "
                f"the log-density still {word}, by {abs(middle):.1f} standard deviations over the "
                "draws."
            )
        return (
            f"What helps: more draws, {_times(table, drifting)} or more; the log-density has no "
            "trend, but the predictions move slowly."
        )
    if going == 1:
        return "What helps: more chains, 10 or so; one chain cannot show what it does not visit."
    running = found["running_lppd"]
    gains = (math.nan, math.nan)
    if running is not None:
        gains = running["gain_draws"], running["gain_chains"]
    if worth is not None and worth <= 1:
        return "What helps: many more draws, or another kernel; the predictions hardly move."
    if worth is not None and worth < ENOUGH_ESS:
        return (
            f"What helps: more draws, {math.ceil(ENOUGH_ESS / worth)} times as many; all "
            f"{going * draws} together are worth {worth:.0f} independent ones."
        )
    alone = found["modes"] is not None and max(found["modes"]["counts"]) == 1
    if gains[1] > SMALL_GAIN and gains[1] >= gains[0]:
        text = f"What helps: more chains; their last doubling gained {gains[1]:.3f} nats per row"
        if alone:
            text += ", and no two predict alike, so a model that the data determine better may, too"
        return text + "."
    if gains[0] > SMALL_GAIN:
        return f"What helps: more draws; their last doubling gained {gains[0]:.3f} nats per row."
    if _agree(summary, found) and drifting:
        return "What helps: more draws, for the chains that drift; the pool would change little."
    if _agree(summary, found):
        return "Nothing more is needed: neither more draws nor more chains would change much."
    if running is None:
        return "What helps: more chains, and held-out rows to see when there are enough."
    if found["modes"] is not None and found["modes"]["unseen"]["share"] > UNSEEN_GOAL:
        return (
            "For the pooled predictions there are enough chains and draws, their last doublings "
            f"gained {gains[1]:.3f} and {gains[0]:.3f} nats per row; not for counting modes."
        )
    return (
        "The chains cover the modes there seem to be; the last doubling of chains gained "
        f"{gains[1]:.3f} nats per row, of draws {gains[0]:.3f}."
    )


def _times(table, drifting) -> str:
    worst = max(table[c]["rhat_function_median"] or table[c]["rhat_log_density"] for c in drifting)
    # R-hat - 1 falls in proportion to the draws.
    if not math.isfinite(worst):
        return "many times as many"
    return f"{max(2, math.ceil((worst**2 - 1) / (RHAT_LIMIT**2 - 1)))} times as many"


def _faults(found) -> list[str]:
    parts = []
    if found["frozen"]:
        one = len(found["frozen"]) == 1
        parts.append(
            f"{_chains(found['frozen'])} {'stands' if one else 'stand'} still: no prediction ever "
            "changes; the step size is too large for every proposal, or the kernel is broken."
        )
    for group in found["copies"]:
        parts.append(
            f"{_chains(group)} have the very same draws and count once: they began alike and took "
            "the same random numbers, so give them different seeds."
        )
    return parts


def _chains(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" and more" if len(numbers) > 8 else "")
    return f"Chain{'s' if len(numbers) > 1 else ''} {shown}"


def _within_modes(found) -> list[str]:
    parts = []
    within, modes = found["rhat_function_within_modes"], found["modes"]
    if within is not None and modes is not None and len(modes["counts"]) > 1:
        parts.append(
            f"Within modes chains agree: R-hat of predictions is at most {within:.2f}; the largest "
            f"mode has {modes['counts'][0]} chains, worth {modes['ess'][0]:.0f} independent draws."
            if within <= RHAT_LIMIT
            else f"Within a mode R-hat of predictions is up to {within:.2f}: chains that are close "
            "still differ."
        )
    if found["rhat_function_nested"] is not None:
        nested = found["rhat_function_nested"]
        said = "still matters" if nested > RHAT_LIMIT else "no longer matters"
        parts.append(
            f"Where a chain began {said}: nested R-hat of predictions over chains from the same "
            f"member is {nested:.2f}."
        )
    return parts


def _running(running) -> list[str]:
    if running is None:
        return []
    draws, chains = running["gain_draws"], running["gain_chains"]
    said = []
    if not math.isnan(draws):
        said.append(f"the last doubling of draws gained {_gain(draws)}")
    if not math.isnan(chains):
        said.append(f"the last doubling of chains {'' if said else 'gained '}{_gain(chains)}")
    if not said:
        return []
    text = " and ".join(said)
    return [f"In nats per held-out row, {text}."]


def _gain(value: float) -> str:
    """Write nats; what is nothing to three digits has no sign."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _weights(weights) -> list[str]:
    if weights is None or math.isnan(weights["after_median"]):
        return []
    whose = "of the largest mode" if weights["mode"] else "of all modes"
    before, after = weights["before_median"], weights["after_median"]
    head = (
        f"In weight space, across {weights['chains']} chains {whose}, R-hat is {before:.2f} "
        f"(median) as the weights are and {after:.2f} once equal networks lie on each other"
    )
    if after > RHAT_LIMIT:
        return [f"{head}: what is left is not symmetry."]
    return [f"{head}." if before <= RHAT_LIMIT else f"{head}: the difference was symmetry."]
