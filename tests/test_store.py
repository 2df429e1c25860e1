import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from bnnmcmc import store
from bnnmcmc.errors import InputError

SHAPES = {"network.w": (2, 3), "network.b": (3,), "scale": ()}
CHAINS = 2


def values(draws, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(CHAINS, draws, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def create(folder, draws, chunk, monkeypatch, shapes=SHAPES):
    """Make arrays whose chunks hold this many draws."""
    per_draw = sum(CHAINS * int(np.prod(shape)) * 4 for shape in shapes.values())
    monkeypatch.setattr(store, "CHUNK_BYTES", chunk * per_draw)
    path = folder / "draws"
    store.create_arrays(path, shapes, dict.fromkeys(shapes, np.float32), CHAINS, draws)
    assert {
        a.chunks[1] for _, a in zarr.open_group(path).members(None) if hasattr(a, "chunks")
    } == {chunk}
    return path


def write(path, whole, sizes):
    blocks, start = [], 0
    for size in sizes:
        block = {name: v[:, start : start + size] for name, v in whole.items()}
        crc = store.append(path, start, block)
        blocks.append({"start": start, "count": size, "draws": crc})
        start += size
    return blocks


def read(path, blocks, names=tuple(SHAPES)):
    parts = list(store.read_blocks(path, names, blocks))
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in names}


# -- Draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 5, 2], [3, 4, 5], [4, 8]])
@pytest.mark.parametrize("chunk", [1, 4, 5, 12])
def test_what_was_appended_is_read_whatever_the_blocks(sizes, chunk, tmp_path, monkeypatch):
    whole = values(12)
    path = create(tmp_path, 12, chunk, monkeypatch)
    blocks = write(path, whole, sizes)
    found = read(path, blocks)
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])
        # As any other reader of Zarr sees it.
        array = zarr.open_group(path, mode="r")[name]
        np.testing.assert_array_equal(array[:], whole[name])
        assert array.metadata.dimension_names[:2] == ("chain", "draw")
    assert [part["scale"].shape[1] for part in store.read_blocks(path, SHAPES, blocks)] == sizes


def test_a_block_written_again_after_a_kill_replaces_what_was_half_written(tmp_path, monkeypatch):
    whole = values(8)
    path = create(tmp_path, 8, 5, monkeypatch)
    blocks = write(path, whole, [3])
    store.append(path, 3, {name: v + 1 for name, v in values(5).items()})  # never committed
    crc = store.append(path, 3, {name: v[:, 3:] for name, v in whole.items()})
    found = read(path, [*blocks, {"start": 3, "count": 5, "draws": crc}])
    np.testing.assert_array_equal(found["network.w"], whole["network.w"])


def test_only_committed_draws_are_read(tmp_path, monkeypatch):
    whole = values(8)
    path = create(tmp_path, 8, 3, monkeypatch)
    blocks = write(path, whole, [2, 2, 4])
    np.testing.assert_array_equal(read(path, blocks[:2])["scale"], whole["scale"][:, :4])
    assert list(store.read_blocks(path, SHAPES, [])) == []


def test_a_chunk_of_nothing_but_nan_is_kept_bit_for_bit(tmp_path, monkeypatch):
    whole = values(6)
    # The NaN that x86 computes, 0/0, is not the one that NumPy and Zarr write.
    whole["network.b"].view(np.uint32)[:] = 0xFFC00000
    path = create(tmp_path, 6, 3, monkeypatch)
    found = read(path, write(path, whole, [3, 3]))
    np.testing.assert_array_equal(found["network.b"].view(np.uint32), 0xFFC00000)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8, np.float32, np.float64])
def test_every_type_of_statistic(dtype, tmp_path):
    path = tmp_path / "stats"
    store.create_arrays(path, {"a": ()}, {"a": dtype}, CHAINS, 4)
    stats = {"a": np.array([[0, 1, 1, 0], [1, 0, 0, 0]]).astype(dtype)}
    blocks = [{"start": 0, "count": 4, "stats": store.append(path, 0, stats)}]
    found = next(store.read_blocks(path, ["a"], blocks))["a"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, stats["a"])


@pytest.mark.parametrize("shapes", [SHAPES, {"linear/w": (3,), "b": ()}])
def test_resize_makes_room_and_keeps_what_is_there(shapes, tmp_path, monkeypatch):
    whole = values(10, shapes=shapes)
    path = create(tmp_path, 4, 4, monkeypatch, shapes)
    blocks = write(path, {n: v[:, :4] for n, v in whole.items()}, [4])
    store.resize_arrays(path, 10)
    crc = store.append(path, 4, {n: v[:, 4:] for n, v in whole.items()})
    found = read(path, [*blocks, {"start": 4, "count": 6, "draws": crc}], tuple(shapes))
    for name in shapes:
        np.testing.assert_array_equal(found[name], whole[name])


def test_a_small_block_rewrites_its_own_chunk_and_nothing_else(tmp_path, monkeypatch):
    """So that many small blocks cost the same each, however many came before."""
    path = create(tmp_path, 60, 20, monkeypatch)
    whole, blocks, before = values(60), [], {}
    for start in range(60):
        crc = store.append(path, start, {n: v[:, start : start + 1] for n, v in whole.items()})
        blocks.append({"start": start, "count": 1, "draws": crc})
        # A file that is written anew by renaming has a new inode.
        after = {p: p.stat().st_ino for name in SHAPES for p in chunk_files(path, name)}
        changed = [p for p in after if after[p] != before.get(p)]
        assert len(changed) == len(SHAPES), changed
        before = after
    assert len(before) == len(SHAPES) * 3
    np.testing.assert_array_equal(read(path, blocks)["network.w"], whole["network.w"])


def chunk_files(path, name="network.w"):
    return sorted(p for p in (path / name / "c").rglob("*") if p.is_file())


def flip(path):
    file = chunk_files(path)[1]
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


def truncate(path):
    file = chunk_files(path)[1]
    file.write_bytes(file.read_bytes()[:-7])


def spoil(file, text="{"):
    return lambda path: (path / file).write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, id="a flipped bit"),
        pytest.param(truncate, id="a chunk cut short"),
        pytest.param(lambda path: chunk_files(path)[1].write_bytes(b""), id="an empty chunk"),
        pytest.param(lambda path: chunk_files(path)[1].unlink(), id="a chunk gone"),
        pytest.param(lambda path: (path / "scale" / "zarr.json").unlink(), id="an array gone"),
        pytest.param(lambda path: (path / "zarr.json").unlink(), id="the group gone"),
        pytest.param(spoil("zarr.json"), id="the group's metadata spoilt"),
        pytest.param(spoil("scale/zarr.json"), id="an array's metadata spoilt"),
        pytest.param(spoil("scale/zarr.json", '{"zarr_format": 3}'), id="metadata incomplete"),
        pytest.param(lambda path: store.resize_arrays(path, 5), id="draws cut off"),
    ],
)
def test_damage_is_found_and_says_what_to_do(damage, tmp_path, monkeypatch):
    path = create(tmp_path, 9, 3, monkeypatch)
    blocks = write(path, values(9), [3, 3, 3])
    damage(path)
    with pytest.raises(
        InputError, match=r"Restore it from a copy, or start the run again"
    ) as caught:
        read(path, blocks)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_names_the_draws(tmp_path, monkeypatch):
    path = create(tmp_path, 9, 3, monkeypatch)
    blocks = write(path, values(9), [3, 3, 3])
    flip(path)
    with pytest.raises(
        InputError, match=r"draws 3 to 5 do not match their checksum in manifest\.json"
    ):
        read(path, blocks)
    read(path, blocks[:1])  # what is sound can be read


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"draws": 1}, "do not match their checksum"),
        ({"count": 2}, "do not match their checksum"),
        ({"start": 1}, "do not match their checksum"),
        ({"count": "three"}, r"manifest\.json: no valid block record"),
        ({"draws": None}, r"manifest\.json: no valid block record"),
    ],
)
def test_an_edited_block_record(edit, message, tmp_path, monkeypatch):
    path = create(tmp_path, 6, 3, monkeypatch)
    blocks = write(path, values(6), [3, 3])
    with pytest.raises(InputError, match=message):
        read(path, [{**blocks[0], **edit}, blocks[1]])
    with pytest.raises(InputError, match="no valid block record"):
        read(path, [{"start": 0, "count": 3}])


def test_the_checksum_sees_names_and_order():
    whole = values(2, shapes={"a": (), "b": ()})
    swapped = {"a": whole["b"], "b": whole["a"]}
    assert store.checksum(whole) == store.checksum(dict(reversed(whole.items())))
    assert store.checksum(whole) != store.checksum(swapped)
    assert store.checksum({"a": whole["a"][:, ::-1]}) == store.checksum(
        {"a": np.ascontiguousarray(whole["a"][:, ::-1])}
    )


# -- Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_writing_leaves_the_old_file(moment, tmp_path):
    path = tmp_path / "manifest.json"
    store.write_atomic(path, b"old")
    code = f"""
        import os, pathlib, signal
        from bnnmcmc import store
        os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.write_atomic(pathlib.Path({str(path)!r}), b"new" * 10000)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert path.read_bytes() == b"old"
    store.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_readable_and_keeps_what_was_committed(tmp_path, monkeypatch):
    whole = values(6)
    path = create(tmp_path, 6, 4, monkeypatch)
    run = store.new_store(tmp_path, {"blocks": []})
    run.commit(blocks=write(path, whole, [3]))

    monkeypatch.setattr(os, "fsync", no_space)
    expected = (
        r"cannot write: No space left on device\. Everything committed before is kept; make room "
        r".* `bnnmcmc resume`"
    )
    with pytest.raises(InputError, match=expected):
        store.append(path, 3, {name: v[:, 3:] for name, v in whole.items()})
    with pytest.raises(InputError, match=expected):
        run.checkpoint("sampling", 6, {"x": np.zeros(3)})
    with pytest.raises(InputError, match=expected):
        run.commit(blocks=[])
    monkeypatch.undo()

    assert [p.name for p in (tmp_path / "state").iterdir()] == []  # nothing left that takes room
    blocks = store.read_manifest(tmp_path)["blocks"]
    np.testing.assert_array_equal(read(path, blocks)["scale"], whole["scale"][:, :3])


def test_a_write_that_the_system_cuts_short(tmp_path, monkeypatch):
    """A limit on file sizes makes the write itself fail half-way, inside Zarr too."""
    shapes = {"w": (5000,)}
    whole = values(4, shapes=shapes)
    path = create(tmp_path, 4, 4, monkeypatch, shapes)
    blocks = write(path, whole, [2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write: File too large"):
            store.append(path, 2, {name: v[:, 2:] for name, v in whole.items()})
        with pytest.raises(InputError, match="cannot write: File too large"):
            store.write_arrays(tmp_path / "state.npz", whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "state.npz").exists()
    np.testing.assert_array_equal(read(path, blocks, ("w",))["w"], whole["w"][:, :2])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/x\.json: cannot write: "):
        store.write_json(tmp_path / "file" / "x.json", {})


# -- Manifest and checkpoints ------------------------------------------------------------------


def test_the_manifest_is_what_was_committed_last(tmp_path):
    run = store.new_store(tmp_path / "run", {"seed": 3})
    run.commit(blocks=[{"start": 0}])
    run.commit(status="done", loss=float("nan"))
    found = store.read_manifest(tmp_path / "run")
    assert np.isnan(found.pop("loss"))
    assert found == {"schema": 1, "seed": 3, "blocks": [{"start": 0}], "status": "done"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 1', r"manifest\.json: damaged .* Restore it from a copy"),
        (b"\xff\xfe", r"manifest\.json: damaged .* Restore it from a copy"),
        (b"[]", r"manifest\.json: damaged .* Restore it from a copy"),
        (b"{}", r"manifest\.json: damaged .* Restore it from a copy"),
        (
            b'{"schema": 2, "bnnmcmc": "9.1"}',
            r"schema version 2, this version of bnnmcmc reads 1; .* written by bnnmcmc 9\.1",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        store.read_manifest(tmp_path)


def test_not_a_run_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such run folder"):
        store.read_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        store.read_manifest(tmp_path)


STATE = {
    "position": np.arange(12, dtype=np.float32).reshape(2, 6),
    "steps": (np.array([3, 4], np.int32), jnp.array([True, False])),
}


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    run = store.new_store(tmp_path, {})
    old = run.checkpoint("warmup", 5, STATE)
    run.commit(checkpoint=run.checkpoint("sampling", 7, STATE))
    (tmp_path / "state" / ".sampling-000000009.npz.99.tmp").write_bytes(b"half")
    run.drop_old_checkpoints()
    assert [p.name for p in (tmp_path / "state").iterdir()] == [run.manifest["checkpoint"]["file"]]
    assert old["file"] != run.manifest["checkpoint"]["file"]
    assert (old["stage"], old["position"]) == ("warmup", 5)

    opened = store.Store(tmp_path, store.read_manifest(tmp_path))
    padded = {"position": np.zeros((4, 6), np.float32), "steps": STATE["steps"]}
    found = opened.restore(padded)
    np.testing.assert_array_equal(found["position"], STATE["position"])
    np.testing.assert_array_equal(found["steps"][0], STATE["steps"][0])
    assert found["steps"][1].dtype == bool


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"position": STATE["position"]}, r"found 3, expected 1\. It was written for another"),
        (
            {**STATE, "position": np.zeros((2, 5), np.float32)},
            r"for position found float32 of shape \(2, 6\), expected float32 of shape \(2, 5\)",
        ),
        (
            {**STATE, "steps": (np.zeros(2, np.int64), STATE["steps"][1])},
            r"for steps\.0 found int32 of shape \(2,\), expected int64 of shape \(2,\)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(template, message, tmp_path):
    store.save_tree(tmp_path / "x.npz", STATE)
    with pytest.raises(InputError, match=message):
        store.load_tree(tmp_path / "x.npz", template)


def test_a_damaged_or_missing_checkpoint(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match=r"x\.npz: missing; .* start the run again"):
        store.load_tree(path, STATE)
    sha256 = store.save_tree(path, STATE)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-40])
    with pytest.raises(InputError, match=r"x\.npz: damaged: .* Restore it from a copy"):
        store.load_tree(path, STATE)
    content[-60] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"does not match its checksum in manifest\.json"):
        store.load_tree(path, STATE, sha256)


def test_json_is_plain(tmp_path):
    store.write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
