"""The layers of the package, held by reading the imports of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bnnmcmc

PACKAGE = Path(bnnmcmc.__file__).parent

# Which of our own modules a module may import, at any level of its file. `errors` is free to all.
# A folder stands for all modules in it. A module that is not listed is on top of these.
MAY_IMPORT = {
    "errors": set(),
    "keys": set(),
    "trees": set(),
    "metrics": set(),
    "health": {"metrics"},
    "config": set(),
    "compilation": set(),
    "ahead": {"sampling", "placement", "keys"},
    "progress": set(),
    "processes": set(),
    "data": {"keys"},
    "models": {"models", "keys", "trees"},
    "priors": {"trees"},
    "likelihoods": {"trees"},
    "posterior": {"models", "priors", "likelihoods", "trees"},
    "placement": {"trees"},
    "calibration": {"placement", "posterior", "trees"},
    "ensemble": {"keys", "trees", "placement"},
    "samplers": {"samplers", "keys", "trees"},
    "records": {"samplers", "placement"},
    "sampling": {"records", "samplers", "placement", "keys", "trees", "health"},
    "store": {"trees", "processes"},
    "symmetry": {"symmetry", "models", "trees"},
    "predictive": {"likelihoods", "trees", "placement", "keys"},
    "predictive_checks": set(),
    "replicates": {"predictive", "keys", "trees"},
    "pooling": set(),
    "recalibration": {"data", "prediction", "predictive"},
    "mixture": {"predictive", "likelihoods", "placement", "keys"},
    "convergence": set(),
    "modes": set(),
    "running": set(),
    "exploration": {"diagnostics", "modes", "running", "symmetry"},
    "verdict": {"modes"},
    "diagnostics": {"notebook", "convergence", "store", "metrics", "symmetry", "health", "trees"},
    "targets": {"diagnostics"},
    "comparison": {"metrics", "notebook", "store"},
    "live": {"store"},
    "notebook": set(),
    "report": {
        "report",
        "comparison",
        "diagnostics",
        "metrics",
        "modes",
        "health",
        "live",
        "predictive_checks",
        "store",
        "summary",
        "targets",
    },
}

# Who alone may import these, of ours and of others.
ONLY_IN = {
    "blackjax": {"samplers"},
    "arviz": {"diagnostics", "report"},
    "bnnmcmc.config": {
        "estimators",
        "fitting",
        "predictor",
        "inputs",
        "build",
        "memory",
        "preflight",
        "pipeline",
        "run",
        "sweep",
        "cli",
    },
    "bnnmcmc.pipeline": {"cli"},
    "bnnmcmc.cli": {"__main__"},
    "narwhals": {"estimators"},
}

# Importing these must not import JAX, directly or through another module.
WITHOUT_JAX = {
    "__init__",
    "cli",
    "comparison",
    "config",
    "convergence",
    "data",
    "errors",
    "health",
    "inputs",
    "live",
    "metrics",
    "pooling",
    "predictive_checks",
    "modes",
    "notebook",
    "processes",
    "progress",
    "report",
    "running",
    "starter",
    "summary",
    "sweep",
    "targets",
    "verdict",
}
JAX = {"jax", "jaxlib", "blackjax", "numpyro", "optax"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST, executed_only: bool = False) -> set[str]:
    """Return the full names of what a file imports; with ``executed_only``, when it is imported."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                ours = whole.removeprefix("bnnmcmc.")
                found.add(whole if ours in FILES else node.module)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not (executed_only and (function or typing)):
                found |= imports(node, executed_only)
    return found


def all_imports(executed_only: bool = False) -> dict[str, set[str]]:
    return {
        name: imports(ast.parse(path.read_text(encoding="utf-8")), executed_only)
        for name, path in FILES.items()
    }


def belongs(module: str, group: set[str]) -> bool:
    return module in group or module.split(".")[0] in group


def test_modules_import_only_what_is_below_them():
    wrong = []
    for module, found in all_imports().items():
        listed = MAY_IMPORT.get(module.split(".")[0])
        for name in found:
            ours = name.removeprefix("bnnmcmc.")
            restricted = listed is not None and ours in FILES and ours != "errors"
            if restricted and not belongs(ours, listed):
                wrong.append(f"{module} imports {name}, may import {sorted(listed)}")
            for guarded, homes in ONLY_IN.items():
                # arviz stands for arviz_base, arviz_stats and arviz_plots too.
                same = (
                    name == guarded if guarded.startswith("bnnmcmc.") else name.startswith(guarded)
                )
                if same and not belongs(module, homes):
                    wrong.append(f"{module} imports {name}, which only {sorted(homes)} may")
    assert not wrong, "\n".join(wrong)


def test_light_modules_do_not_import_jax():
    direct = all_imports(executed_only=True)

    def chains(module: str, seen: tuple[str, ...] = ()):
        """Yield every way from a module to a package of JAX's."""
        parents = [module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)]
        for name in direct[module] | {f"bnnmcmc.{parent}" for parent in parents}:
            ours = name.removeprefix("bnnmcmc.")
            if name.split(".")[0] in JAX:
                yield (*seen, module, name)
            elif ours in FILES and ours not in seen:
                yield from chains(ours, (*seen, module))

    wrong = [
        " -> ".join(way)
        for module in FILES
        if belongs(module, WITHOUT_JAX)
        for way in chains(module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["bnnmcmc", "bnnmcmc.config", "bnnmcmc.data"])
def test_importing_stays_light(module):
    code = (
        f"import sys, {module}; heavy = ('jax', 'pandas', 'arviz', 'matplotlib', 'sklearn');"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
