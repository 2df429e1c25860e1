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
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from bnnmcmc.errors import InputError
from bnnmcmc.processes import Group

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
    group : Group
        The processes that write it together: each its own chains, process 0 the manifest.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], group: Group | None = None):
        self.folder = folder
        self.manifest = manifest
        self.group = group or Group()

    def commit(self, **changes: Any) -> None:
        """Write the manifest with these entries changed: the moment from which they count.

        Only process 0 does; the others get to know with `follow`.
        """
        if self.group.lead:
            self.manifest = {**self.manifest, **changes}
            write_json(self.folder / "manifest.json", self.manifest)

    def follow(self) -> None:
        """Take over what process 0 committed; a meeting point of all processes."""
        self.manifest = self.group.first(self.manifest)

    def checkpoint(self, stage: str, position: int, tree: Any) -> dict[str, Any]:
        """Write the state of a stage; return its entry for the manifest.

        With several processes, each writes the state of its own chains, and all of it is on disk
        when this returns.
        """
        name = f"{stage}-{position:09d}"
        if self.group.count > 1:
            name += f".part{self.group.index}"
        sha256 = save_tree(self.folder / "state" / f"{name}.npz", tree)
        parts = self.group.share({"file": f"{name}.npz", "sha256": sha256})
        entry = {"stage": stage, "position": position}
        return entry | (parts[0] if len(parts) == 1 else {"parts": parts})

    def drop_old_checkpoints(self) -> None:
        """Remove every checkpoint but the committed one, and what a killed process half wrote."""
        entry = self.manifest.get("checkpoint") or {}
        keep = {part.get("file") for part in entry.get("parts", [entry])}
        folder = self.folder / "state"
        for path in list(folder.iterdir()) if folder.is_dir() and self.group.lead else ():
            if path.name not in keep and path.suffix in (".npz", ".tmp"):
                path.unlink(missing_ok=True)

    def restore(self, template: Any) -> Any:
        """Read the committed checkpoint of all chains, whatever processes wrote it."""
        import jax

        entry = self.manifest["checkpoint"]
        parts = [
            load_tree(self.folder / "state" / part["file"], template, part["sha256"])
            for part in entry.get("parts", [entry])
        ]
        return (
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts) if parts[1:] else parts[0]
        )


def new_store(folder: Path, manifest: dict[str, Any], group: Group | None = None) -> Store:
    """Start a run folder with its first manifest."""
    store = Store(folder, {"schema": SCHEMA, **manifest}, group)
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
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, Any],
    chains: int,
    draws: int,
    share: int | None = None,
) -> None:
    """Make empty Zarr arrays ``path/NAME`` of shape (chain, draw, *shape).

    A chunk holds ``share`` chains, all if not given: two processes never write the same chunk.
    """
    share = share or chains
    with disk_errors(path):
        group = zarr.open_group(path, mode="w")
        per_draw = sum(
            share * int(np.prod(shapes[name])) * np.dtype(dtypes[name]).itemsize for name in shapes
        )
        chunk = int(np.clip(CHUNK_BYTES // max(per_draw, 1), 1, draws))
        for name, shape in shapes.items():
            dtype = np.dtype(dtypes[name])
            group.create_array(
                name,
                shape=(chains, draws, *shape),
                chunks=(share, chunk, *shape),
                dtype=dtype,
                fill_value=np.nan if dtype.kind == "f" else -1 if dtype.kind == "i" else 0,
                compressors=None,  # weights are noise to a compressor
                dimension_names=("chain", "draw", *(f"{name}_dim{i}" for i in range(len(shape)))),
            )


def resize_arrays(path: Path, draws: int) -> None:
    """Make room for ``draws`` draws per chain."""
    with disk_errors(path):
        for array in _arrays(path, "r+").values():
            array.resize((array.shape[0], draws, *array.shape[2:]))


def _arrays(path: Path, mode: Literal["r", "r+"]) -> dict[str, zarr.Array]:
    """Return all arrays of a group, also nested ones: a leaf's name may hold a slash."""
    members = zarr.open_group(path, mode=mode).members(max_depth=None)
    return {name: array for name, array in members if isinstance(array, zarr.Array)}


def settle_shares(path: Path, share: int, blocks: Sequence[dict[str, Any]]) -> None:
    """Write Zarr arrays anew if two processes would meet in a chunk.

    Also ends what an earlier call had begun when it was killed: at any moment, the whole arrays
    are there under one of two names.

    Parameters
    ----------
    path : Path
        The Zarr group.
    share : int
        Chains of each process but the last.
    blocks : sequence of dict
        The manifest's "blocks": only what they name is kept.
    """
    old, new = (path.with_name(f"{path.name}.{word}.tmp") for word in ("old", "new"))
    with disk_errors(path):
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (old, new):
            if left.exists():
                shutil.rmtree(left)
        arrays = _arrays(path, "r")
        chains, draws = next(iter(arrays.values())).shape[:2]
        if share >= chains or all(share % a.chunks[0] == 0 for a in arrays.values()):
            return
        shapes = {name: array.shape[2:] for name, array in arrays.items()}
        dtypes = {name: array.dtype for name, array in arrays.items()}
        create_arrays(new, shapes, dtypes, chains, draws, share)
        for block, found in zip(blocks, read_blocks(path, list(arrays), blocks), strict=True):
            append(new, int(block["start"]), found)
        path.rename(old)
        new.rename(path)
        _sync_folder(path.parent)
        shutil.rmtree(old)


def append(path: Path, start: int, arrays: dict[str, np.ndarray], first: int = 0) -> int:
    """Write draws ``start ..`` of some chains and flush them to disk.

    Parameters
    ----------
    path : Path
        The Zarr group.
    start : int
    arrays : dict
        name -> (chain, count, *shape)
    first : int
        Which chain the first one of the arrays is.

    Returns
    -------
    int
        The checksum of these arrays, for the manifest.
    """
    # Zarr would leave out a chunk that holds only NaN, and so lose the bits of the NaN.
    # And one chunk after the other: several at once take memory that is never given back.
    settings = {"array.write_empty_chunks": True, "async.concurrency": 1}
    with disk_errors(path), zarr.config.set(settings):
        group = zarr.open_group(path, mode="r+")
        for name, values in arrays.items():
            stored: Any = group[name]
            stop, last = start + values.shape[1], first + values.shape[0]
            stored[first:last, start:stop] = values
            share, chunk = stored.chunks[:2]
            for part in range(first // share, -(-last // share)):
                for index in range(start // chunk, -(-stop // chunk)):
                    parts = ("c", str(part), str(index), *("0" for _ in values.shape[2:]))
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
            low, crc = int(block["start"]), block[path.name]
            high = low + int(block["count"])
            # Several processes: one checksum each, of equal shares of the chains.
            expected = crc if isinstance(crc, list) else [int(crc)]
            share = int(block["share"]) if isinstance(crc, list) else None
        except (KeyError, TypeError, ValueError) as error:
            manifest = path.parent / "manifest.json"
            raise InputError(f"{manifest}: no valid block record: {block!r}. {ADVICE}") from error
        try:
            # Chunk after chunk: reading several at once takes memory that is never given back.
            with zarr.config.set({"async.concurrency": 1}):
                arrays = {name: np.asarray(stored[name][:, low:high]) for name in names}
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: damaged: {error}. {ADVICE}") from error
        if _checksums(arrays, share) != expected:
            raise InputError(
                f"{path}: draws {low} to {high - 1} do not match their checksum in manifest.json: "
                f"the store was cut short or changed. {ADVICE}"
            )
        yield arrays
        del arrays  # before the next block is read


def _checksums(arrays: dict[str, np.ndarray], share: int | None) -> list[int]:
    if share is None:
        return [checksum(arrays)]
    chains = next(iter(arrays.values())).shape[0]
    return [
        checksum({name: values[low : low + share] for name, values in arrays.items()})
        for low in range(0, chains, share)
    ]


def _sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
