"""Data sets drawn from prior and posterior against the one that was observed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnnmcmc.predictive_checks import ALARM, can_tell, unusual
from bnnmcmc.report.drawing import COLOURS, Plot
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.text import listed, number, percent, plural, same_decimals

# A prior whose draws spread so many times as wide as the data says little of them.
WIDE = 20.0
# More rows than this outside of what the prior allows are no chance: it holds 99 %.
OUTSIDE = 0.05
# More statistics that are off than this are counted.
MAX_SAID = 3
EXPLAINED = (
    Explanation(
        "Posterior predictive p-value",
        "Whole data sets are drawn from the posterior, each with the parameters of one draw. p is "
        "the share of them in which a statistic T is larger than in the data, half of those where "
        "it is the same. Near 0 or 1 the model does not make data like these. On rows that it has "
        "not seen, p of a right model is close to uniform; on rows that it was fitted to it is "
        f"nearer to ½. A statistic is called unusual at a level of {ALARM:g} over the number of "
        "statistics, both sides taken together.",
        "p = Pr( T(yʳᵉᵖ) > T(y) ) + ½ Pr( T(yʳᵉᵖ) = T(y) ),  yʳᵉᵖ ~ p(y | x, θ),  θ ~ p(θ | data)",
        "Rubin (1984), Annals of Statistics 12; Gelman, Meng and Stern (1996), Statistica Sinica 6",
    ),
    Explanation(
        "Prior predictive",
        "The same with parameters drawn from the prior: what the model thought possible before it "
        "saw any data. It should hold the data, and little that cannot be.",
        "yʳᵉᵖ ~ p(y | x, θ),  θ ~ p(θ)",
        "Box (1980), JRSS A 143; Gabry et al. (2019), JRSS A 182",
    ),
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None if no data sets were drawn."""
    found = run.predictive_checks
    if found is None:
        return None
    takeaways = [predicted(found)]
    if found["prior_missing"]:
        takeaways.append(
            Sentence("info", f"What the prior predicts is not known: {found['prior_missing']}.")
        )
    if "classes" in found:
        plots = [frequencies(found["classes"])]
        if not found["prior_missing"]:
            takeaways.append(allowed_classes(found["classes"], found["prior_sets"]))
    else:
        plots = []
        for target in found["targets"]:
            plots += distributions(target, found["levels"], found["rows"])
            if not found["prior_missing"]:
                takeaways.append(allowed(target, several=len(found["targets"]) > 1))
    return Section(
        "predictive-checks",
        "Prior and posterior predictive checks",
        takeaways=takeaways,
        plots=plots,
        tables=[_table(found)],
        explained=EXPLAINED,
    )


def _parts(found: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return found["classes"] if "classes" in found else found["targets"]


def predicted(found: Mapping[str, Any]) -> Sentence:
    """Say whether data sets drawn from the posterior look like the observed one.

    Parameters
    ----------
    found : mapping
        The content of predictive_checks.json.
    """
    every = [values for part in _parts(found) for values in part["statistics"].values()]
    off = unusual(found)
    rows = f"{plural(found['rows'], 'row')} sampled on"
    if found["of"] == "test":
        rows = plural(found["rows"], "test row")
    if any(not math.isfinite(values["tail"]) for values in every):
        return Sentence(
            "bad",
            "Data sets drawn from the posterior, or their statistics, are not finite: they cannot "
            "be compared with the data.",
        )
    if not can_tell(found["posterior_sets"], len(every)):
        return Sentence(
            "note",
            f"{plural(found['posterior_sets'], 'data set')} from the posterior are too few to tell "
            f"whether one of {plural(len(every), 'statistic')} is unusual.",
        )
    seen = ""
    if found["of"] != "test":
        seen = " There are no test rows; on rows that the model has seen this is a weaker test."
    if not off:
        smallest, largest = (f(v["p"] for v in every) for f in (min, max))
        return Sentence(
            "good",
            f"Data sets drawn from the posterior look like the {rows}: of "
            f"{plural(len(every), 'statistic')} none is unusual (p from {smallest:.2f} to "
            f"{largest:.2f}).{seen}",
        )
    names = [_said(found, part, name, v) for part, name, v in off[:MAX_SAID]]
    more = f" and {len(off) - MAX_SAID} more" if len(off) > MAX_SAID else ""
    return Sentence(
        "note",
        f"The posterior does not make data like the {rows}: unusual are {'; '.join(names)}{more}. "
        f"The likelihood, or the network, leaves something out.{seen}",
    )


def _said(found: Mapping[str, Any], part: str, name: str, values: Mapping[str, float]) -> str:
    at = f"the {name}"
    if len(_parts(found)) > 1:
        at += f" of {part}"
    write = percent if name in ("frequency", "share of zeros") else number
    return (
        f"{at} ({write(values['observed'])}, predicted {write(values['low'])} to "
        f"{write(values['high'])})"
    )


def allowed(target: Mapping[str, Any], several: bool = False) -> Sentence:
    """Say what targets the prior allows, and whether the observed ones are among them.

    Parameters
    ----------
    target : mapping
        A target's part of predictive_checks.json.
    several : bool
        Whether to name it.
    """
    low, high, outside = (target["prior_range"][key] for key in ("low", "high", "outside"))
    first, last = target["rows"]
    of = f"{target['name']}: " if several else ""
    if not all(map(math.isfinite, (low, high, outside, first, last))):
        return Sentence("bad", f"{of}What the prior predicts is not finite.")
    text = (
        f"{of}The prior puts 90 % of targets between {_short(low)} and {_short(high)}; the data go "
        f"from {_short(first)} to {_short(last)}"
    )
    if outside > OUTSIDE:
        return Sentence(
            "note", f"{text}, and {percent(outside)} of them are where it expects hardly any (1 %)."
        )
    if high - low > WIDE * (last - first):
        return Sentence(
            "info", f"{text}: it holds them, but says little, as it is far wider than they are."
        )
    return Sentence("good", f"{text}: it holds them.")


def allowed_classes(classes: Sequence[Mapping[str, Any]], sets: int) -> Sentence:
    """Say whether the frequencies of classes are such as the prior allows.

    Parameters
    ----------
    classes : sequence of mapping
        The classes' part of predictive_checks.json.
    sets : int
        Data sets that were drawn from the prior.
    """
    priors = {part["name"]: part["prior_statistics"]["frequency"] for part in classes}
    if any(not math.isfinite(values["tail"]) for values in priors.values()):
        return Sentence("bad", "What the prior predicts is not finite.")
    outside = [n for n, v in priors.items() if v["tail"] < ALARM / len(priors)]
    name, widest = max(priors.items(), key=lambda item: item[1]["high"] - item[1]["low"])
    text = (
        f"Before it saw data, the model would have had the class {name} in "
        f"{percent(widest['low'])} to {percent(widest['high'])} of the rows (90 % of data sets "
        f"drawn from the prior); it is in {percent(widest['observed'])}"
    )
    if outside:
        return Sentence(
            "note",
            f"{text}. The prior hardly allows as many, or as few, of {listed(outside, 3)}.",
        )
    if not can_tell(sets, len(priors)):
        few = f"{plural(sets, 'data set')} are too few to tell whether the prior allows it"
        return Sentence("info", f"{text}; {few}.")
    return Sentence("good", f"{text}. The prior allows all classes as often as they were observed.")


def _short(value: float) -> str:
    """Write a number with three digits: that is all that so few draws tell."""
    return f"{float(f'{value:.3g}'):,.10g}".replace("-", "−") if abs(value) < 1e7 else number(value)


def distributions(target: Mapping[str, Any], levels: Sequence[float], rows: int) -> list[Plot]:
    """Draw a target's distribution in the data and in data sets of posterior and prior.

    Parameters
    ----------
    target : mapping
        Its part of predictive_checks.json.
    levels : sequence of float
        Of the quantiles.
    rows : int
    """
    plots = []
    for kind, title, colour in (
        ("posterior", "Data sets from the posterior", "posterior"),
        ("prior", "Data sets from the prior", "member"),
    ):
        if kind in target:
            plots.append(_distribution(target, levels, rows, kind, title, colour))
    return plots


def _distribution(target, levels, rows, kind, title, colour) -> Plot:
    observed = np.asarray(target["observed"])
    bands = {name: np.asarray(values) for name, values in target[kind].items()}
    upto = np.asarray(levels)
    inside = float(((observed >= bands["low"]) & (observed <= bands["high"])).mean())
    finite = all(np.isfinite(v).all() for v in (observed, *bands.values()))

    def draw(ax):
        if finite:
            band = (bands["low"], bands["high"])
            ax.fill_betweenx(
                upto, *band, color=COLOURS[colour], alpha=0.25, lw=0, label="90 % of data sets"
            )
        ax.plot(bands["median"], upto, color=COLOURS[colour], lw=1.6, label="their median")
        ax.plot(observed, upto, color=COLOURS["ensemble"], lw=2, ls=(0, (4, 2)), label="observed")
        ax.set(xlabel=target["name"], ylabel="share of rows below", ylim=(0, 1))
        ax.legend(loc="upper left")

    said = (
        f"{percent(inside)} of the observed quantiles are within the band."
        if finite
        else "Some of the data sets are not finite, so there is no band."
    )
    alt = (
        f"Share of rows up to a value of {target['name']}: the median and the 90 % band over data "
        f"sets drawn from the {kind}, and the {plural(rows, 'row')} observed."
    )
    return Plot(f"{title}: {target['name']}", said, alt, f"{kind}-sets-{target['name']}", draw)


def frequencies(classes: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw how frequent each class is in the data and in data sets of posterior and prior.

    Parameters
    ----------
    classes : sequence of mapping
        The classes' part of predictive_checks.json.
    """
    names = [part["name"] for part in classes]
    y = np.arange(len(names))[::-1]

    def draw(ax):
        for key, shift, colour, label in (
            ("statistics", 0.12, "posterior", "90 % of data sets from the posterior"),
            ("prior_statistics", -0.12, "member", "of data sets from the prior"),
        ):
            ends = [part[key]["frequency"] for part in classes if key in part]
            if ends:
                low, high = ([v[end] for v in ends] for end in ("low", "high"))
                ax.hlines(y + shift, low, high, color=COLOURS[colour], lw=5, alpha=0.6, label=label)
        seen = [part["statistics"]["frequency"]["observed"] for part in classes]
        ax.plot(seen, y, "D", ms=6, color=COLOURS["ensemble"], label="observed")
        short = [name if len(name) < 25 else f"{name[:24]}…" for name in names]
        ax.set(xlabel="share of rows", yticks=y, yticklabels=short, ylim=(-0.6, len(y) - 0.4))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)

    inside = sum(
        v["low"] <= v["observed"] <= v["high"]
        for v in (part["statistics"]["frequency"] for part in classes)
    )
    takeaway = f"{inside} of {len(names)} observed frequencies are within the posterior's interval."
    alt = (
        f"Share of rows of each of {len(names)} classes: observed, and 90 % intervals over data "
        "sets from posterior and prior."
    )
    height = 2.4 + 0.32 * len(names)
    return Plot("Frequencies of classes", takeaway, alt, "class-frequencies", draw, True, height)


def _table(found: Mapping[str, Any]) -> Table:
    parts, classes = _parts(found), "classes" in found
    off = {(part, name) for part, name, _ in unusual(found)}
    columns = [Column("class" if classes else "statistic", text=True)]
    if not classes and len(parts) > 1:
        columns.insert(0, Column("target", text=True))
    columns += [
        Column("observed", "in the data"),
        Column("predicted", "median over data sets drawn from the posterior"),
        Column("5 %", "of these data sets have less"),
        Column("95 %", "of these data sets have less"),
        Column("p", "share of these data sets with more"),
        Column("prior: 5 %", "of data sets drawn from the prior have less"),
        Column("prior: 95 %", "of data sets drawn from the prior have less"),
    ]
    if found["prior_missing"]:
        del columns[-2:]
    rows = []
    for part in parts:
        for name, values in part["statistics"].items():
            prior = part.get("prior_statistics", {}).get(name)
            numbers = [values[key] for key in ("observed", "median", "low", "high")]
            shown = same_decimals(numbers)
            if classes or name == "share of zeros":
                shown = _share
            p = "–" if not math.isfinite(values["p"]) else f"{values['p']:.3f}"
            mark = "bad" if (part["name"], name) in off else ""
            row = [Cell(part["name"] if classes else name, classes="text")]
            if not classes and len(parts) > 1:
                row.insert(0, Cell(part["name"], classes="text"))
            row += [Cell(shown(v), str(v)) for v in numbers]
            row.append(Cell(p, str(values["p"]), mark))
            if not found["prior_missing"]:
                ends = [math.nan] * 2 if prior is None else [prior["low"], prior["high"]]
                wide = shown if classes or name == "share of zeros" else same_decimals(ends)
                row += [Cell(wide(v), str(v)) for v in ends]
            rows.append(row)
    of = "test rows" if found["of"] == "test" else "rows that the posterior conditions on"
    note = f"{found['posterior_sets']:,} data sets from the posterior"
    if not found["prior_missing"]:
        note += f" and {found['prior_sets']:,} from the prior"
    note += f", each of the same {plural(found['rows'], 'row')} ({of})."
    if found["prior_of_some"] and not found["prior_missing"]:
        note += " Parameters that are not sampled are as in the posterior in both."
    return Table(columns, rows, title="Statistics of data sets", note=note, sortable=True)


def _share(value: float) -> str:
    return percent(value) if math.isfinite(value) else number(value)
