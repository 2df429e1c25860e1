"""The seed paper's study: ``uv run python -m experiments.symmetry study``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter
from rich.console import Console

from experiments.symmetry import picture as pictures
from experiments.symmetry import study as studies
from experiments.symmetry import table as tables

app = cyclopts.App(name="python -m experiments.symmetry", result_action="return_value")
console = Console(highlight=False, soft_wrap=True)
Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]


@app.command
def study(
    *,
    networks: Names = None,
    data_sets: Names = None,
    data: Path | None = None,
    out: Path = Path("runs/symmetry"),
    full: Annotated[bool, Parameter(negative=())] = False,
    chains: int | None = None,
    warmup: int | None = None,
    long_draws: int | None = None,
    part: int = 0,
    seed: int = 0,
) -> None:
    """Sample what is missing, and write table.md and table.json.

    Parameters
    ----------
    networks
        f1, f2; both if not given.
    data_sets
        diabetes, airfoil, energy; the first two if not given.
    data
        Folder with airfoil.data and energy.data; fetched from OpenML without it.
    out
        Where the parts are; a study that was interrupted goes on there.
    full
        As in the paper: 1274 chains after 1024 steps of warm-up, and one chain of 1274 draws. Hours
        for f1, days for f2 on two cores.
    chains
        Of one draw; 200 of f1 and 16 of f2 if not given.
    warmup
        Steps; 1024 for f1 and 256 for f2 if not given.
    long_draws
        Draws of the one long chain; as many as chains if not given, 0 for none.
    part
        Chains in a part; 50 of f1 and 2 of f2 if not given.
    seed
        Of the starts and the chains.
    """
    import bnnmcmc

    bnnmcmc.use_all_cores()
    for network in networks or ["f1", "f2"]:
        for name in data_sets or ["diabetes", "airfoil"]:
            problem = studies.read_problem(network, name, data)
            everything = problem.config.ensemble.members
            count = chains or (everything if full else studies.FEW_CHAINS[network])
            steps = warmup
            if steps is None:
                shrunken = studies.FEW_STEPS[network]
                steps = problem.config.sampler.warmup if full else shrunken
            studies.run_study(
                network,
                name,
                out,
                data=data,
                chains=count,
                long_draws=count if long_draws is None else long_draws,
                warmup=steps,
                part=part,
                seed=seed,
                say=console.print,
            )
    table(out=out)


@app.command
def table(*, out: Path = Path("runs/symmetry")) -> None:
    """Write and print the table of the parts that are there.

    Parameters
    ----------
    out
        Where the parts are.
    """
    found = tables.rows(out)
    if not found:
        console.print(f"{out}: no parts yet; make some with: python -m experiments.symmetry study")
        return
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(tables.as_markdown(found))
    console.print(tables.as_markdown(found))


@app.command
def picture(
    *,
    out: Path = Path("runs/symmetry"),
    chains: int = 32,
    warmup: int = 1000,
    draws: int = 300,
    seed: int = 0,
) -> None:
    """Sample a 1 x 3 tanh network; R-hat of its weights before and after alignment, and a picture.

    Parameters
    ----------
    out
        Where picture.png and picture.json are written.
    chains, warmup, draws, seed
        Of NUTS.
    """
    import bnnmcmc

    bnnmcmc.use_all_cores()
    found = pictures.compare(chains, warmup, draws, seed)
    out.mkdir(parents=True, exist_ok=True)
    pictures.draw(found.pop("clouds"), out / "picture.png")
    (out / "picture.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print_json(json.dumps(found))


if __name__ == "__main__":
    sys.exit(app())
