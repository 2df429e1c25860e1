"""The run folder: append-only draws, one atomic commit record, checkpoints.

A block counts once the manifest that names it is on disk. The order is: draws, statistics,
checkpoint (each flushed to disk), then the manifest, written beside the old one, flushed, and
renamed over it. A process killed at any moment leaves the last committed state, and whatever was
half-written beyond it is overwritten when the run goes on.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from bnnmcmc.errors import InputError

SCHEMA = 1
CHUNK_BYTES = 8 * 2**20
ADVICE = "Restore it from a copy, or start the run again in a new folder"


@contextmanager
def disk_errors(path: Path):
    """Turn an operating-system error (disk full, no permission) into a readable one."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot write: {error.strerror or error}. Everything committed before is "
            "kept; make room (or correct the permissions), then go on with `bnnmcmc resume` and "
            "the run folder"
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk, its bytes are needed
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write an npz atomically; return the SHA-256 of the file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    content = buffer.getvalue()
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def read_arrays(path: Path, sha256: str | None = None) -> dict[str, np.ndarray]:
    """Read an npz; raise InputError if it is missing, damaged or not the one expected."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; the run folder is incomplete. {ADVICE}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{path}: the file does not match its checksum in manifest.json; it was changed or "
            f"damaged. {ADVICE}"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {error}. {ADVICE}") from error


def save_tree(path: Path, tree: Any) -> str:
    """Write the leaves of a pytree in order; return the SHA-256 of the file."""
    import jax

    leaves = jax.tree.leaves(tree)
    return write_arrays(path, {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)})


def load_tree(path: Path, template: Any, sha256: str | None = None) -> Any:
    """Read a pytree written by `save_tree`, checked leaf by leaf against a template.

    Parameters
    ----------
    path : Path
    template : pytree
        Arrays or shapes; the first axis (chains, filled up on devices) may differ.
    sha256 : str
        Expected checksum.

    Raises
    ------
    InputError
        The file is missing, changed, or holds other arrays than the template.
    """
    import jax

    from bnnmcmc.trees import leaf_names

    arrays = read_arrays(path, sha256)
    leaves, treedef = jax.tree.flatten(template)
    stored = [arrays[name] for name in sorted(arrays)]
    start = f"{path}: holds other arrays than this run needs"
    advice = (
        "It was written for another model, sampler, precision or version; use those, or start "
        "the run again in a new folder"
    )
    if len(stored) != len(leaves):
        raise InputError(f"{start}: found {len(stored)}, expected {len(leaves)}. {advice}")
    for name, found, leaf in zip(leaf_names(template), stored, leaves, strict=True):
        if (found.shape[1:], found.dtype) != (tuple(leaf.shape)[1:], leaf.dtype):
            raise InputError(
                f"{start}: for {name} found {found.dtype} of shape {found.shape}, expected "
                f"{leaf.dtype} of shape {tuple(leaf.shape)}. {advice}"
            )
    return jax.tree.unflatten(treedef, stored)


class Store:
    """A run folder that is being written.

    Parameters
    ----------
    folder : Path
    manifest : dict
        The manifest as last committed.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest

    def commit(self, **changes: Any) -> None:
        """Write the manifest with these entries changed: the moment from which they count."""
        self.manifest = {**self.manifest, **changes}
        write_json(self.folder / "manifest.json", self.manifest)

    def checkpoint(self, stage: str, position: int, tree: Any) -> dict[str, Any]:
        """Write the state of a stage; return its entry for the manifest."""
        name = f"{stage}-{position:09d}.npz"
        sha256 = save_tree(self.folder / "state" / name, tree)
        return {"stage": stage, "position": position, "file": name, "sha256": sha256}

    def drop_old_checkpoints(self) -> None:
        """Remove every checkpoint but the committed one, and what a killed process half wrote."""
        keep = (self.manifest.get("checkpoint") or {}).get("file")
        folder = self.folder / "state"
        for path in list(folder.iterdir()) if folder.is_dir() else ():
            if path.name != keep and path.suffix in (".npz", ".tmp"):
                path.unlink(missing_ok=True)

    def restore(self, template: Any) -> Any:
        """Read the committed checkpoint."""
        entry = self.manifest["checkpoint"]
        return load_tree(self.folder / "state" / entry["file"], template, entry["sha256"])


def new_store(folder: Path, manifest: dict[str, Any]) -> Store:
    """Start a run folder with its first manifest."""
    store = Store(folder, {"schema": SCHEMA, **manifest})
    store.commit()
    return store


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run folder.

    Raises
    ------
    InputError
        Not a run folder, a damaged manifest, or one of a newer version.
    """
    path = Path(folder) / "manifest.json"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such run folder")
    if not path.is_file():
        raise InputError(f"{folder}: not a run folder (it has no manifest.json)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}). {ADVICE}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    if schema != SCHEMA:
        raise InputError(
            f"{path}: schema version {schema}, this version of bnnmcmc reads {SCHEMA}; "
            f"the run was written by bnnmcmc {manifest.get('bnnmcmc')}"
        )
    return manifest


def create_arrays(
    path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, Any], chains: int, draws: int
) -> None:
    """Make empty Zarr arrays ``path/NAME`` of shape (chain, draw, *shape)."""
    with disk_errors(path):
        group = zarr.open_group(path, mode="w")
        per_draw = sum(
            chains * int(np.prod(shapes[name])) * np.dtype(dtypes[name]).itemsize for name in shapes
        )
        chunk = int(np.clip(CHUNK_BYTES // max(per_draw, 1), 1, draws))
        for name, shape in shapes.items():
            dtype = np.dtype(dtypes[name])
            group.create_array(
                name,
                shape=(chains, draws, *shape),
                chunks=(chains, chunk, *shape),
                dtype=dtype,
                fill_value=np.nan if dtype.kind == "f" else -1 if dtype.kind == "i" else 0,
                compressors=None,  # weights are noise to a compressor
                dimension_names=("chain", "draw", *(f"{name}_dim{i}" for i in range(len(shape)))),
            )


def resize_arrays(path: Path, draws: int) -> None:
    """Make room for ``draws`` draws per chain."""
    with disk_errors(path):
        # All members, also nested ones: a leaf's name may hold a slash.
        for _, array in zarr.open_group(path, mode="r+").members(max_depth=None):
            if isinstance(array, zarr.Array):
                array.resize((array.shape[0], draws, *array.shape[2:]))


def append(path: Path, start: int, arrays: dict[str, np.ndarray]) -> int:
    """Write draws ``start ..`` of all chains and flush them to disk.

    Parameters
    ----------
    path : Path
        The Zarr group.
    start : int
    arrays : dict
        name -> (chain, count, *shape)

    Returns
    -------
    int
        The block's checksum, for the manifest.
    """
    # Zarr would leave out a chunk that holds only NaN, and so lose the bits of the NaN.
    with disk_errors(path), zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(path, mode="r+")
        for name, values in arrays.items():
            stored: Any = group[name]
            stop = start + values.shape[1]
            stored[:, start:stop] = values
            chunk = stored.chunks[1]
            for index in range(start // chunk, -(-stop // chunk)):
                parts = ("c", "0", str(index), *("0" for _ in values.shape[2:]))
                with open(path / name / Path(*parts), "rb") as file:
                    os.fsync(file.fileno())
    return checksum(arrays)


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 over arrays in the order of their names."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]), crc)
    return crc


def read_blocks(
    path: Path, names: Sequence[str], blocks: Sequence[dict[str, int]]
) -> Iterator[dict[str, np.ndarray]]:
    """Read what was committed block by block, each checked against its checksum.

    Parameters
    ----------
    path : Path
        The Zarr group; its name is the key of the checksum in a block's record.
    names : sequence of str
        All arrays of the group.
    blocks : sequence of dict
        The manifest's "blocks".

    Yields
    ------
    dict
        name -> numpy array (chain, count, *shape)

    Raises
    ------
    InputError
        Something that was committed is missing or changed.
    """
    try:
        group = zarr.open_group(path, mode="r")
        stored: dict[str, Any] = {name: group[name] for name in names}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}. {ADVICE}") from error
    for block in blocks:
        try:
            low, expected = int(block["start"]), int(block[path.name])
            high = low + int(block["count"])
        except (KeyError, TypeError, ValueError) as error:
            manifest = path.parent / "manifest.json"
            raise InputError(f"{manifest}: no valid block record: {block!r}. {ADVICE}") from error
        try:
            # Chunk after chunk: reading several at once takes memory that is never given back.
            with zarr.config.set({"async.concurrency": 1}):
                arrays = {name: np.asarray(stored[name][:, low:high]) for name in names}
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: damaged: {error}. {ADVICE}") from error
        if checksum(arrays) != expected:
            raise InputError(
                f"{path}: draws {low} to {high - 1} do not match their checksum in manifest.json: "
                f"the store was cut short or changed. {ADVICE}"
            )
        yield arrays
        del arrays  # before the next block is read


def _sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
