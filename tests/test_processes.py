"""Several processes give the draws of one, and what they have survives the loss of any of them."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import zarr
from conftest import start_cli, write_tiny
from test_resume import STAGES, assert_equal_runs, committed, stop_in

from bnnmcmc import processes, store
from bnnmcmc.errors import InputError
from bnnmcmc.processes import Group, LostProcessError, join, share_of, together
from bnnmcmc.stopping import Stop


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# -- The command line --------------------------------------------------------------------------


def start_both(*arguments, cwd, count=2, **options):
    """Start the command line in several processes, which share the cores of this machine."""
    port = free_port()
    return [
        start_cli(
            *arguments,
            *("--coordinator", f"127.0.0.1:{port}", "--num-processes", count, "--process-id", i),
            cwd=cwd,
            **options,
        )
        for i in range(count)
    ]


def end_all(started):
    """Wait for processes; return their exit statuses and what each has said."""
    said = [process.communicate(timeout=300) for process in started]
    assert "Traceback" not in "".join(out + err for out, err in said)
    return [process.returncode for process in started], said


def both(*arguments, cwd, **options):
    return end_all(start_both(*arguments, cwd=cwd, **options))


def lose(victim, stage, arguments, cwd, number=signal.SIGKILL):
    """Start two processes and send a signal to one of them in a stage; return what comes of it."""
    started = start_both(*arguments, cwd=cwd)
    assert stop_in(started[victim], cwd / "run", stage, 0.02, number), "the signal came too late"
    return end_all(started)


def test_two_processes_give_what_one_gives(finished, tiny):
    codes, said = both("run", "tiny.toml", "--out", "two", cwd=tiny)
    assert codes == [0, 0], said
    assert_equal_runs(finished / "run", tiny / "two")
    assert said[1] == ("", "")  # process 0 alone talks
    assert "3 chains in 2 processes; process 0: 2 chains on" in said[0][0]
    manifest = json.loads((tiny / "two" / "manifest.json").read_text())
    assert [len(block["draws"]) for block in manifest["blocks"]] == [2] * len(manifest["blocks"])
    # Each process has written files of its own.
    arrays = [path for path in (tiny / "two" / "draws").iterdir() if path.is_dir()]
    assert {tuple(sorted(p.name for p in (a / "c").iterdir())) for a in arrays} == {("0", "1")}


@pytest.mark.slow
def test_the_loss_of_a_process_is_told_and_the_others_draws_survive(finished, tiny, cli):
    quick = ["--quiet", "--set", "run.block_draws=1"]
    codes, said = lose(1, "sampling", ["run", "tiny.toml", "--out", "run", *quick], cwd=tiny)
    assert codes == [3, -signal.SIGKILL], said
    assert "error: process 1 on " in said[0][1]
    assert "is gone. Everything committed is kept; to go on, start all" in said[0][1]
    done = committed(tiny / "run")
    assert done[0] == STAGES.index("sampling")
    assert 0 < done[1] < 40
    shutil.copytree(tiny / "run", tiny / "by-one")
    codes, said = both("resume", "run", "--quiet", cwd=tiny)
    assert codes == [0, 0], said
    assert_equal_runs(finished / "run", tiny / "run")
    code, _, err = cli("resume", "by-one", "--quiet", cwd=tiny)
    assert code == 0, err
    assert_equal_runs(finished / "run", tiny / "by-one")


# Slow enough that every stage has commits to be killed between.
LONGER = [
    "ensemble.max_epochs=1000",
    "ensemble.patience=1000",
    "sampler.warmup=20000",
    "sampler.draws=200",
    "sampler.thin=50",
    "run.block_draws=5",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cli):
    folder = write_tiny(tmp_path_factory.mktemp("undisturbed"))
    code, _, err = cli("run", "tiny.toml", "--out", "run", "--quiet", "--set", *LONGER, cwd=folder)
    assert code == 0, err
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "victim", "then"),
    [
        ("ensemble", 0, 2),
        ("ensemble", 1, 1),
        ("warmup", 0, 2),
        ("warmup", 1, 2),
        ("sampling", 0, 1),
        ("sampling", 1, 2),
    ],
)
def test_either_process_lost_in_any_stage(tiny, undisturbed, cli, stage, victim, then):
    arguments = ["run", "tiny.toml", "--out", "run", "--quiet", "--set", *LONGER]
    codes, said = lose(victim, stage, arguments, cwd=tiny)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 3
    assert f"process {victim} on {socket.gethostname()} is gone" in said[1 - victim][1]
    if then == 1:
        code, _, err = cli("resume", "run", "--quiet", cwd=tiny)
        assert code == 0, err
    else:
        codes, said = both("resume", "run", "--quiet", cwd=tiny)
        assert codes == [0, 0], said
    assert_equal_runs(undisturbed, tiny / "run")
    left = [p.name for p in (tiny / "run").rglob("*") if p.name.endswith((".tmp", ".partial"))]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_run_of_one_process_goes_on_in_two(tiny, undisturbed, stage):
    arguments = ["run", "tiny.toml", "--out", "run", "--quiet", "--set", *LONGER]
    process = start_cli(*arguments, cwd=tiny)
    assert stop_in(process, tiny / "run", stage, 0.02, signal.SIGKILL)
    process.communicate()
    codes, said = both("resume", "run", "--quiet", cwd=tiny)
    assert codes == [0, 0], said
    assert_equal_runs(undisturbed, tiny / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_in_one_process_stops_both_and_all_is_saved(tiny, undisturbed, victim):
    arguments = ["run", "tiny.toml", "--out", "run", "--set", *LONGER]
    codes, said = lose(victim, "warmup", arguments, tiny, signal.SIGINT)
    assert codes == [130, 130], said
    assert "bnnmcmc resume run" in said[0][0]
    assert json.loads((tiny / "run" / "manifest.json").read_text())["stopped"] == "interrupted"
    codes, said = both("resume", "run", cwd=tiny)
    assert codes == [0, 0], said
    assert_equal_runs(undisturbed, tiny / "run")


@pytest.mark.slow
def test_a_time_budget_is_kept_by_both(tiny):
    begun = time.monotonic()
    codes, said = both(
        *("run", "tiny.toml", "--out", "run", "--time-budget", "40s", "--set"),
        *("sampler.warmup=10000000", "sampler.draws=1000000", "ensemble.max_epochs=100000"),
        cwd=tiny,
    )
    assert codes == [0, 0], said
    assert time.monotonic() - begun < 80
    assert "planned for the time budget" in said[0][0]
    assert json.loads((tiny / "run" / "manifest.json").read_text())["stage"] == "done"


@pytest.mark.slow
def test_draws_are_added_by_two_processes_to_a_run_of_one(finished, tmp_path, here):
    for name in ("one", "two"):
        shutil.copytree(finished / "run", tmp_path / name)
    code, _, err = here("resume", "one", "--draws", "7", "--quiet", cwd=tmp_path)
    assert code == 0, err
    codes, said = both("resume", "two", "--draws", "7", "--quiet", cwd=tmp_path)
    assert codes == [0, 0], said
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def test_a_mistake_is_said_once(tiny):
    codes, said = both("run", "tiny.toml", "--out", "r", "--set", "data.targt=y", cwd=tiny)
    assert codes == [2, 2]
    assert "data.targt" in said[0][1]
    assert said[1] == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "a:1"], "--num-processes and --process-id: missing; --coordinator"),
        (["--num-processes", "2"], "--coordinator and --process-id: missing"),
        (["--process-id", "0"], "--coordinator and --num-processes: missing"),
        (["--num-processes", "0"], "--num-processes: found 0, expected at least 1"),
        (["--num-processes", "1", "--process-id", "1"], "--coordinator: missing"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id: found 2, expected a number from 0 to 1",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "-1"],
            "--process-id: found -1, expected a number from 0 to 1",
        ),
        *(
            (
                ["--coordinator", wrong, "--num-processes", "2", "--process-id", "0"],
                "expected HOST:PORT of process 0, such as node1:4321",
            )
            for wrong in ("node1", ":4321", "node1:", "node1:x", "node1:70000")
        ),
    ],
)
def test_options_that_do_not_fit_together(tiny, here, options, message):
    for command in (["run", "tiny.toml"], ["resume", "run"]):
        code, _, err = here(*command, *options, cwd=tiny)
        assert code == 2
        assert message in err
    assert not (tiny / "runs").exists()


# -- Shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chains", "count"), [(1, 1), (3, 2), (10, 4), (12, 4), (5, 5), (7, 3)])
def test_shares_cover_all_chains_in_order_and_none_is_longer_than_the_first(chains, count):
    shares = [share_of(chains, index, count) for index in range(count)]
    held = [chain for first, length in shares for chain in range(first, first + length)]
    assert held == list(range(chains))
    assert max(length for _, length in shares) == shares[0][1] == -(-chains // count)


@pytest.mark.parametrize(("chains", "count", "useful"), [(3, 4, 3), (1, 2, 1), (5, 4, 3)])
def test_more_processes_than_can_be_kept_busy(chains, count, useful):
    with pytest.raises(InputError, match=rf"ensemble\.members: found {chains}, too few to keep"):
        share_of(chains, 0, count)
    assert share_of(chains, useful - 1, useful)[1] > 0


def seat(**changes):
    return {"host": "h", "machine": "m", "cores": [0, 1, 2, 3, 4], "gpus": [], **changes}


def test_processes_that_see_the_same_cores_share_them():
    same = [seat(), seat(), seat(machine="other"), seat(cores=[5, 6])]
    cores = [processes._own_cores(same, index) for index in range(4)]
    assert cores == [3, 2, None, None]
    assert processes._own_cores([seat(cores=[0])] * 3, 2) == 1


def test_processes_that_see_the_same_gpus_share_them():
    gpus = ["a", "b", "c", "d"]
    assert [processes._own_gpus([seat(gpus=gpus)] * 2, index) for index in (0, 1)] == [
        [0, 1],
        [2, 3],
    ]
    bound = [seat(gpus=["a"]), seat(gpus=["b"])]  # each its own, by the launcher
    assert processes._own_gpus(bound, 1) is None
    assert processes._own_gpus([seat()] * 2, 1) is None
    with pytest.raises(InputError, match="processes 0, 1 on h see the same 1 GPU; start at most"):
        processes._own_gpus([seat(gpus=["a"])] * 2, 0)


def test_the_gpus_that_jax_would_see(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '0, GPU-a'\necho '1, GPU-b'\necho '2, GPU-c'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes, "find_spec", lambda name: True)
    assert processes._visible_gpus() == ["GPU-a", "GPU-b", "GPU-c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-a")
    assert processes._visible_gpus() == ["GPU-c", "GPU-a"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert processes._visible_gpus() == []


# -- The launcher ------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_VERSION": "4.1.6",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def launched(monkeypatch):
    """Set the variables that a launcher sets, and no others of the kind."""

    def launch(variables):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_COMPLETION")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_a_job_of_slurm_or_mpi_is_found(launched):
    launched(SLURM)
    host, port, count, index = processes._whereabouts(None, None, None)
    assert (host, count, index) == ("node003", 4, 2)
    assert 1024 < port < 2**16
    assert processes._whereabouts("other:4321", None, None) == ("other", 4321, 4, 2)
    launched(OPEN_MPI)
    host, _, count, index = processes._whereabouts(None, None, None)
    assert (host, count, index) == ("10.96.0.1", 3, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # The script of a batch job, outside any step, and a step of one task.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        # Without the package that asks the cluster, a pod is a run of its own.
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_a_single_process_stays_alone(launched, variables):
    launched(variables)
    assert processes._whereabouts(None, None, None) is None
    launched(SLURM)
    assert processes._whereabouts(None, 1, None) is None  # if the user says so


def test_a_launcher_that_jax_does_not_know_is_said(launched):
    launched({"PMI_SIZE": "2", "PMI_RANK": "1"})
    with pytest.raises(InputError, match=r"JAX cannot tell which one.*give --coordinator HOST:"):
        processes._whereabouts(None, None, None)


def test_a_sweep_is_made_by_one(launched, tiny, here):
    launched(SLURM)
    code, _, err = here("sweep", "tiny.toml", "--grid", "run.seed=1,2", cwd=tiny)
    assert code == 2
    assert "a sweep is made by one" in err


# -- What processes say to each other ----------------------------------------------------------


def in_threads(*functions):
    """Run functions side by side; return their results, or what they raised."""

    def caught(function):
        try:
            return function()
        except (Exception, SystemExit) as error:
            return error

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(caught, functions))


def meet(*works):
    """Let groups of as many processes as there are functions run these in threads."""
    port = free_port()

    def run(index):
        with together(f"127.0.0.1:{port}", len(works), index) as group:
            return works[index](group)

    return in_threads(*(lambda i=i: run(i) for i in range(len(works))))


def test_values_reach_all_processes_in_order():
    def work(group):
        values = [group.share({"n": group.index, "x": float("nan")}) for _ in range(3)][-1]
        return [v["n"] for v in values], group.first(group.index + 5), group.least(9 - group.index)

    assert meet(work, work, work) == [([0, 1, 2], 5, 7)] * 3
    assert (Group().share(3), Group().first("a"), Group().least(4)) == ([3], "a", 4)


def test_all_stop_or_none():
    def work(group):
        stop = Stop(group=group)
        found = [stop.at(), stop.at(None if group.lead else 0.0)]  # only process 0's time counts
        found.append(stop.at(0.0 if group.lead else None))
        stop.asked = group.index == 1
        return [*found, stop.at(), stop.interrupted]

    assert meet(work, work) == [[False, False, True, True, True]] * 2


def test_a_process_that_stops_says_why_and_process_0_tells_it():
    def fail(group):
        raise InputError("its disk is full")

    first, second, third = meet(lambda g: g.share(1), fail, lambda g: g.share(1))
    assert isinstance(first, LostProcessError)
    assert "process 1 on " in str(first)
    assert str(first).endswith(": its disk is full")
    assert first.code == 2
    # Process 0 has told the user: these two keep quiet.
    assert [type(second), second.code] == [SystemExit, 2]
    assert [type(third), third.code] == [SystemExit, 2]


def test_an_error_of_process_0_ends_the_others_quietly():
    def fail(group):
        raise InputError("no such table")

    first, second = meet(fail, lambda group: group.share(1))
    assert isinstance(first, InputError)
    assert [type(second), second.code] == [SystemExit, 2]


def test_a_connection_that_ends_without_a_word_is_a_loss():
    def vanish(group):
        for one in group._sockets:  # as the system does for a process that is killed
            one.shutdown(socket.SHUT_RDWR)
        return "gone"

    for works in ((vanish, lambda g: g.share(1)), (lambda g: g.share(1), vanish)):
        found = meet(*works)
        lost = found[1 - found.index("gone")]
        assert isinstance(lost, LostProcessError)
        assert lost.code == 3
        assert "is gone. Everything committed is kept" in str(lost)


def test_processes_that_do_not_come_or_do_not_fit():
    port = free_port()
    with pytest.raises(InputError, match=r"process 1, 2 of 3 did not come to 127\.0\.0\.1"):
        join("127.0.0.1", port, 3, 0, seconds=0.2)
    with pytest.raises(InputError, match="process 0 is not to be reached at 127"):
        join("127.0.0.1", port, 2, 1, seconds=0.2)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(InputError, match=r"cannot listen at 127.*take another port"),
    ):
        join("127.0.0.1", port, 2, 0, seconds=0.2)


def test_strangers_and_wrong_numbers_are_turned_away():
    port = free_port()

    def first():
        group = join("127.0.0.1", port, 2, 0, seconds=20)
        answer = group.share("first")
        group.leave()
        return answer

    def others():
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                time.sleep(0.01)
        with stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        with pytest.raises(InputError, match="--num-processes: found 3, but process 0 has 2"):
            join("127.0.0.1", port, 3, 1, seconds=20)
        group = join("127.0.0.1", port, 2, 1, seconds=20)
        answer = group.share("second")
        group.leave()
        return answer

    assert in_threads(first, others) == [["first", "second"]] * 2


def test_the_same_number_twice_is_turned_away():
    port, refused = free_port(), threading.Event()

    def first():
        group = join("127.0.0.1", port, 3, 0, seconds=20)
        group.share(0)
        group.leave()

    def member(index):
        try:
            group = join("127.0.0.1", port, 3, index, seconds=20)
        except InputError as error:
            refused.set()
            return str(error)
        group.share(index)
        group.leave()
        return None

    def last():
        assert refused.wait(20)
        return member(2)

    found = in_threads(first, lambda: member(1), lambda: member(1), last)
    texts = [text for text in found if text]
    assert len(texts) == 1
    assert "--process-id: found 1, which another process has already" in texts[0]


# -- The store of several processes ------------------------------------------------------------

SHAPES = {"w": (2, 3), "net/b": ()}


def values(chains, draws):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=(chains, draws, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def write_shares(path, whole, sizes, share):
    """Write what several processes would, the last one first; return the blocks' records."""
    chains, draws = whole["w"].shape[:2]
    types = dict.fromkeys(SHAPES, np.float32)
    store.create_arrays(path, SHAPES, types, chains, draws, share)
    blocks, start = [], 0
    for size in sizes:
        crc = [
            store.append(
                path,
                start,
                {n: v[first : first + share, start : start + size] for n, v in whole.items()},
                first,
            )
            for first in reversed(range(0, chains, share))
        ]
        record = {"start": start, "count": size, "draws": crc[::-1], "share": share}
        blocks.append(record if share < chains else {**record, "draws": crc[0]})
        start += size
    return blocks


def read_back(path, blocks):
    parts = list(store.read_blocks(path, list(SHAPES), blocks))
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in SHAPES}


@pytest.mark.parametrize("share", [1, 2, 3, 5])
def test_parts_of_several_processes_are_read_as_one(share, tmp_path):
    whole = values(5, 6)
    blocks = write_shares(tmp_path / "draws", whole, [1, 3, 2], share)
    found = read_back(tmp_path / "draws", blocks)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], whole[name])
    spoilt = sorted((tmp_path / "draws" / "w" / "c").rglob("*"))[-1]
    content = bytearray(spoilt.read_bytes())
    content[3] ^= 1
    spoilt.write_bytes(content)
    with pytest.raises(InputError, match=r"do not match their checksum in manifest\.json"):
        read_back(tmp_path / "draws", blocks)


def chunks(path):
    return {name: zarr.open_group(path, mode="r")[name].chunks[0] for name in SHAPES}


@pytest.mark.parametrize(
    ("before", "after", "chunk"), [(6, 3, 3), (3, 2, 2), (2, 3, 3), (2, 4, 2), (3, 6, 3), (3, 3, 3)]
)
def test_another_number_of_processes_never_meets_in_a_chunk(before, after, chunk, tmp_path):
    path, whole = tmp_path / "draws", values(6, 8)
    blocks = write_shares(path, whole, [1, 3], before)
    store.settle_shares(path, after, blocks)
    assert set(chunks(path).values()) == {chunk}
    assert zarr.open_group(path, mode="r")["w"].shape == (6, 8, 2, 3)
    found = read_back(path, blocks)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], whole[name][:, :4])
    assert [p.name for p in tmp_path.iterdir()] == ["draws"]


@pytest.mark.parametrize("moment", ["rmtree", "rename", "append"])
@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_chunks_are_made_anew(moment, number, tmp_path, monkeypatch):
    path, whole, calls = tmp_path / "draws", values(6, 4), []
    blocks = write_shares(path, whole, [1, 1, 2], 6)
    home = {"rmtree": store.shutil, "rename": type(path), "append": store}[moment]
    real = getattr(home, moment)

    def kill(*arguments, **options):
        # Not in Zarr's own thread, which would be gone for the rest of the session.
        calls.extend([1] * (threading.current_thread() is threading.main_thread()))
        if len(calls) == number:
            raise SystemExit
        return real(*arguments, **options)

    monkeypatch.setattr(home, moment, kill)
    with suppress(SystemExit):
        store.settle_shares(path, 2, blocks)
    monkeypatch.undo()
    store.settle_shares(path, 2, blocks)
    assert set(chunks(path).values()) == {2}
    np.testing.assert_array_equal(read_back(path, blocks)["w"], whole["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["draws"]


def test_a_checkpoint_of_several_processes_is_read_as_one(tmp_path):
    state = {"x": np.arange(10.0).reshape(5, 2), "n": np.arange(5)}

    def work(group):
        first, length = share_of(5, group.index, 3)
        mine = store.Store(tmp_path, {"checkpoint": None}, group)
        own = {name: leaf[first : first + length] for name, leaf in state.items()}
        for position in (1, 2):
            entry = mine.checkpoint("sampling", position, own)
            mine.commit(checkpoint=entry)
            mine.drop_old_checkpoints()
            mine.follow()
        assert mine.manifest["checkpoint"] == entry
        return mine.restore(own)

    for found in meet(work, work, work):
        np.testing.assert_array_equal(found["x"], state["x"])
        np.testing.assert_array_equal(found["n"], state["n"])
    kept = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert kept == [f"sampling-000000002.part{i}.npz" for i in range(3)]
