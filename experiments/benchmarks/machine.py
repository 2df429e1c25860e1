"""What the figures were measured on."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("bnnmcmc", "jax", "jaxlib", "blackjax", "numpyro", "optax", "numpy", "scipy")


def describe() -> dict[str, Any]:
    """Return CPU, caches, memory, GPUs, operating system, Python and package versions.

    The load average tells whether other work disturbed the figures. JAX is not started.
    """
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "numpy_blas": _blas(),
        "commit": _said(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        ),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        return _said(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Return the sizes that core 0 sees, such as {"L1 Data": "48K"}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (folder / name).read_text().strip() for name in ("level", "type", "size")
        )
        found[f"L{level}" if kind == "Unified" else f"L{level} {kind}"] = size
    return found


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "memory.total", "driver_version")
    if shutil.which("nvidia-smi") is None:
        return []
    said = _said(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    return [
        dict(zip(fields, (part.strip() for part in line.split(",")), strict=False))
        for line in (said or "").splitlines()
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas() -> str:
    import numpy as np

    found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{found.get('name')} {found.get('version')}"


def _said(words: list) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
