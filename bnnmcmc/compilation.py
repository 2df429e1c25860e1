"""Compiled programs are kept on disk, so that the next run need not compile them again."""

import os
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# Some hundreds of experiments: a program is 10 to 300 kB, and a run has about a hundred.
MAX_CACHE_BYTES = 512 * 2**20
# What a folder must be able to take before it is used.
PROBE_BYTES = 2**20
# JAX's own defaults, by which a program that compiles in less than a second is not kept.
DEFAULTS = {
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


def cache_folder() -> Path:
    """Return where compiled programs are kept unless JAX is told otherwise.

    ``$XDG_CACHE_HOME/bnnmcmc/jax``, by default ``~/.cache/bnnmcmc/jax``; on macOS
    ``~/Library/Caches/bnnmcmc/jax``.

    Raises
    ------
    RuntimeError
        The user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if Path(given).is_absolute():  # others are to be ignored, says the XDG specification
        base = Path(given)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "bnnmcmc" / "jax"


def use_compilation_cache(folder: str | Path | None = None) -> Path | None:
    """Keep compiled programs on disk, for later processes that compile the same programs.

    The command line calls this; in Python it is yours to call, before anything is computed. A
    program is found again if it, its shapes, JAX's version and the kind of processor or GPU are the
    same. A folder set in JAX already (``JAX_COMPILATION_CACHE_DIR``, or
    ``jax.config.jax_compilation_cache_dir``) is used as it is, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off. A folder that cannot be written to
    is not used. No draw depends on any of this.

    Parameters
    ----------
    folder : path, optional
        `cache_folder` if not given, and JAX has none. It is kept below 512 MB: programs that were
        not used for longest go first. Whoever can write to it can make you run their code.

    Returns
    -------
    Path or None
        The folder in use; None if there is none.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    chosen: Any = jax.config.jax_compilation_cache_dir
    if folder is not None or not chosen:
        try:
            chosen = Path(folder) if folder is not None else cache_folder()
            _probe(chosen)
        except (OSError, RuntimeError):
            return None
        tidy(chosen, MAX_CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(chosen))
        reset_cache()  # JAX may have opened another folder, or none, already
    # A run has about a hundred small programs, which together take as long as the large ones.
    for name, default in DEFAULTS.items():
        if getattr(jax.config, name) == default and name.upper() not in os.environ:
            jax.config.update(name, -1 if name.endswith("bytes") else 0.0)
    return Path(chosen)


def _probe(folder: Path) -> None:
    """Raise OSError if the folder does not take a file: not ours, read-only, full, over quota."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    finally:
        with suppress(OSError):
            probe.unlink()


def tidy(folder: Path, limit: int) -> None:
    """Remove damaged files of a cache, and as many of the longest unused as are beyond a limit.

    JAX has a limit too (``jax_compilation_cache_max_size``), but reads the whole folder for every
    program it adds, and never repairs a file whose writing was cut off.

    Parameters
    ----------
    folder : Path
    limit : int
        Bytes.
    """
    mark = folder / ".checked"
    files, total = [], 0
    with suppress(OSError):
        checked = mark.stat().st_mtime if mark.exists() else 0.0
        mark.touch()
        for path in folder.rglob("*"):
            with suppress(OSError):  # another process may tidy too
                status = path.stat()
                if not path.is_file() or path == mark:
                    continue
                if status.st_mtime >= checked and _damaged(path):
                    path.unlink()
                    continue
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
                total += status.st_size
        for _, size, path in sorted(files):
            if total <= limit:
                break
            with suppress(OSError):
                path.unlink()
                total -= size


def _damaged(path: Path) -> bool:
    """Tell whether a program was written only in part (as far as that can be known)."""
    content = path.read_bytes()
    if not path.name.endswith("-cache") or (content and content[0] != 0x78):
        return False  # not zlib's, but another compression's of another Python
    try:
        zlib.decompress(content)
    except zlib.error:
        return True
    return False
