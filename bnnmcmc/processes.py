"""Several processes on one run: which chains are whose, and the few words they exchange.

Chains never look at each other, so each process advances its own chains with a JAX of its own, and
writes them to disk itself. What they must agree on is small: how long the next block is, that its
parts are on disk, whether to stop. These words go over one connection from each process to process
0, so the loss of a process is seen at once, as the end of its connection.

The processes find each other by the rules of ``jax.distributed``, but are not made one JAX by
``jax.distributed.initialize``: in that one, the loss of process 0 aborts every other process inside
XLA, another loss shows only after a timeout, and compiled programs are kept for process 0 alone.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bnnmcmc.errors import InputError

# As long as jax.distributed waits for all processes to come.
JOIN_SECONDS = 300.0
# A first word of a connection is short and comes at once.
HELLO_SECONDS, HELLO_BYTES = 10.0, 1000
# The system asks a silent peer for a sign of life; one whose machine is dead is lost after this.
SILENT_SECONDS = 60
# So long a process that stops waits for process 0 to have heard why.
LEAVE_SECONDS = 30.0

# Variables in which a launcher says how many processes it started; for MPI without Open MPI's own
# variables, JAX must be told to ask mpi4py.
LAUNCHED = {
    "SLURM_STEP_NUM_TASKS": None,
    "OMPI_COMM_WORLD_SIZE": None,
    "PMI_SIZE": "mpi4py",
}


class LostProcessError(Exception):
    """Another process is gone, or has stopped.

    Attributes
    ----------
    code : int
        Exit status that fits.
    """

    def __init__(self, text: str, code: int = 3):
        super().__init__(text)
        self.code = code


class Group:
    """The processes of one run, as seen by one of them. Made by `join`; alone without arguments.

    Attributes
    ----------
    index, count : int
        Number of this process, and of all.
    hosts : list of str
        The name of each process's machine.
    cores : int or None
        How many CPU cores are for this process to use, where it shares them with others.
    gpus : list of int or None
        Which of the visible GPUs are, where it shares them with others.
    """

    def __init__(self, index: int = 0, count: int = 1, sockets: list[socket.socket] | None = None):
        self.index, self.count = index, count
        self.hosts = ["?"] * count
        self.cores: int | None = None
        self.gpus: list[int] | None = None
        # Process 0 has a connection to every other one, in their order; each of them to it.
        self._sockets = sockets or []
        self._files = [one.makefile("rb") for one in self._sockets]
        self._turn, self._told = 0, False

    @property
    def lead(self) -> bool:
        """Whether this is process 0, which decides, talks to the user and commits."""
        return self.index == 0

    def share(self, value: Any) -> list[Any]:
        """Give a value to all processes and get theirs, in their order.

        All processes call this at the same point, and none goes on before all have.

        Parameters
        ----------
        value
            What JSON can hold.

        Raises
        ------
        LostProcessError
            A process is gone or has stopped.
        """
        if self.count == 1:
            return [value]
        self._turn += 1
        if not self.lead:
            # If process 0 is gone, its last words may still be there to be read.
            with contextlib.suppress(OSError):
                _send(self._sockets[0], {"turn": self._turn, "value": value})
            return self._receive(0)
        values = [value, *(self._receive(other) for other in range(1, self.count))]
        for one in self._sockets:
            # Who is gone is found out when its next word is due.
            with contextlib.suppress(OSError):
                _send(one, {"turn": self._turn, "value": values})
        return values

    def first(self, value: Any = None) -> Any:
        """Return process 0's value; a meeting point of all processes, as `share`."""
        return self.share(value if self.lead else None)[0]

    def least(self, value: int) -> int:
        """Return the least value of all processes; a meeting point of all, as `share`."""
        return min(self.share(int(value)))

    def leave(self, reason: str | None = None, code: int = 0) -> bool:
        """Part from the others.

        Parameters
        ----------
        reason : str
            Why, if the others cannot go on without this process.
        code : int
            The exit status that they take then.

        Returns
        -------
        bool
            Whether process 0 has told the user, so that this process need not.
        """
        bye = {"bye": reason, "code": code}
        for one in self._sockets:
            with contextlib.suppress(OSError):
                _send(one, bye)
                one.shutdown(socket.SHUT_WR)
        if reason is not None:
            # Closing with words unread would cut off those that are still on their way.
            wait = 0.0 if code == 130 else 2.0 if self.lead else LEAVE_SECONDS
            for one, file in zip(self._sockets, self._files, strict=True):
                one.settimeout(wait)
                with contextlib.suppress(OSError, ValueError):
                    self._told |= any(json.loads(line).get("bye") for line in file)
        for one, file in zip(self._sockets, self._files, strict=True):
            file.close()
            one.close()
        self._sockets, self._files, self.count = [], [], 1
        return self._told and not self.lead

    def _receive(self, other: int) -> Any:
        try:
            line = self._files[other - 1 if self.lead else 0].readline()
        except OSError:
            line = b""
        who = f"process {other} on {self.hosts[other]}"
        if not line.endswith(b"\n"):
            raise LostProcessError(
                f"{who} is gone. Everything committed is kept; to go on, start all processes again "
                "with `bnnmcmc resume` and the run folder"
            )
        word = json.loads(line)
        if "bye" in word:
            self._told = word["bye"] is not None
            reason = word["bye"] or "has finished; were all started with the same command?"
            raise LostProcessError(f"{who}: {reason}", word["code"] or 2)
        if word["turn"] != self._turn:
            raise RuntimeError(f"{who} is at turn {word['turn']}, this process at {self._turn}")
        return word["value"]


@contextmanager
def together(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[Group]:
    """Join the other processes, and tell them if this one stops early.

    Parameters
    ----------
    coordinator : str
        HOST:PORT of process 0.
    num_processes, process_id : int
        What is not given is found as ``jax.distributed`` does; without any, and outside a job of
        more than one process, this process is alone.

    Raises
    ------
    InputError
        Options that do not fit together, or processes that did not come.
    SystemExit
        This process stopped, and process 0 has told the user why.
    """
    place = _whereabouts(coordinator, num_processes, process_id)
    group = Group() if place is None else join(*place)
    try:
        yield group
    except BaseException as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, InputError):
            code, reason = 2, str(error)
        elif isinstance(error, LostProcessError):
            code, reason = error.code, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, reason = 130, "was interrupted"
        told = group.leave(reason, code)
        if told and isinstance(error, InputError | LostProcessError):
            raise SystemExit(code) from error
        raise
    else:
        group.leave()


def share_of(chains: int, index: int, count: int) -> tuple[int, int]:
    """Return the first chain of a process and the number of its chains.

    All shares have the length of the first, except the last one, which may be shorter.

    Raises
    ------
    InputError
        There would be nothing left for the last process.
    """
    length = -(-chains // count)
    useful = -(-chains // length)
    if useful < count:
        raise InputError(
            f"ensemble.members: found {chains}, too few to keep {count} processes busy (in equal "
            f"shares of {length} at the most); start {useful} processes, or raise it"
        )
    first = index * length
    return first, min(length, chains - first)


# ---------------------------------------------------------------------------- who is where


def _whereabouts(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int, int] | None:
    """Return host, port, number of processes and number of this one; None if alone."""
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    if num_processes is not None and num_processes < 1:
        raise InputError(f"--num-processes: found {num_processes}, expected at least 1")
    if num_processes == 1 and process_id in (None, 0):
        return None
    if launched_processes() > 1 and None in given.values():
        coordinator, num_processes, process_id = _found_by_jax(
            coordinator, num_processes, process_id
        )
    elif any(value is not None for value in given.values()):
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise InputError(
                f"{' and '.join(missing)}: missing; --coordinator HOST:PORT (of process 0), "
                "--num-processes and --process-id belong together, unless a launcher says the rest "
                "(SLURM, Kubernetes, MPI)"
            )
    else:
        return None
    assert coordinator is not None and num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process-id: found {process_id}, expected a number from 0 to {num_processes - 1} "
            f"(--num-processes is {num_processes})"
        )
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator: found {coordinator!r}, expected HOST:PORT of process 0, such as "
            "node1:4321"
        )
    return None if num_processes == 1 else (host.strip("[]"), int(port), num_processes, process_id)


def launched_processes() -> int:
    """Return how many processes a launcher says it started: 1 without one."""
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(os.environ)
    # An indexed job may as well be many separate runs; what JAX needs to ask the cluster is
    # installed only where one means to use it.
    if kubernetes and find_spec("kubernetes"):
        return 2  # or more: only the cluster knows
    counts = [os.environ.get(name, "") for name in LAUNCHED]
    return max([int(count) for count in counts if count.isdigit()], default=1)


def _found_by_jax(coordinator, num_processes, process_id) -> tuple[Any, ...]:
    from jax._src.clusters import ClusterEnv

    method = next((LAUNCHED[name] for name in LAUNCHED if name in os.environ), None)
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, [], method, int(JOIN_SECONDS)
        )
        reason = ""
    except Exception as error:
        reason = f" ({error})"
    if reason or None in found[:3]:
        raise InputError(
            "this looks like one of several processes of a job (SLURM, Kubernetes or MPI), but "
            f"JAX cannot tell which one{reason}; give --coordinator HOST:PORT, --num-processes and "
            "--process-id, or --num-processes 1 if it is to run alone"
        )
    return found[:3]


def join(host: str, port: int, count: int, index: int, seconds: float = JOIN_SECONDS) -> Group:
    """Meet the other processes at process 0, and share out cores and GPUs.

    Parameters
    ----------
    host, port
        Where process 0 is.
    count, index : int
        Number of processes, and of this one.
    seconds : float
        How long to wait for all.

    Raises
    ------
    InputError
        Not all have come in time, or they do not fit together.
    """
    until = time.monotonic() + seconds
    meet = _await_others if index == 0 else _reach_first
    group = Group(index, count, meet(host, port, count, index, until))
    try:
        seats = group.share(_seat())
        group.hosts = [seat["host"] for seat in seats]
        group.cores = _own_cores(seats, index)
        group.gpus = _own_gpus(seats, index)
    except LostProcessError as error:
        raise InputError(str(error)) from error
    return group


def _await_others(host, port, count, index, until) -> list[socket.socket]:
    """Let the others connect; return their connections in their order."""
    local = host in ("localhost", "::1") or host.startswith("127.")
    # The name of this machine may stand for an address that others do not reach.
    address = host if local else ""
    both = not local and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        server = socket.create_server((address, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InputError(
            f"--coordinator: cannot listen at {host}:{port}: {error.strerror or error}; take "
            "another port, the same for all processes"
        ) from error
    found: dict[int, socket.socket] = {}
    with server:
        while len(found) < count - 1:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                one, _ = server.accept()
            except TimeoutError as error:
                missing = [str(i) for i in range(1, count) if i not in found]
                text = (
                    f"process {', '.join(missing)} of {count} did not come to {host}:{port} within "
                    "the waiting time; are all processes started, and do they reach this machine?"
                )
                for one in found.values():
                    _refuse(one, text)
                raise InputError(text) from error
            hello = _hello(one)
            number = hello.get("process", 0)
            wrong = None
            if hello.get("processes") != count:
                wrong = (
                    f"--num-processes: found {hello.get('processes')}, but process 0 has {count}"
                )
            elif number in found:
                wrong = f"--process-id: found {number}, which another process has already"
            if wrong is None:
                found[number] = one
            elif hello:
                _refuse(one, wrong)
            else:  # not one of ours
                one.close()
    for one in found.values():
        _keep_alive(one)
        with contextlib.suppress(OSError):  # gone already: found out at the first exchange
            _send(one, {"welcome": True})
    return [found[number] for number in sorted(found)]


def _refuse(one: socket.socket, reason: str) -> None:
    with contextlib.suppress(OSError):
        _send(one, {"bye": reason})
    one.close()


def _reach_first(host, port, count, index, until) -> list[socket.socket]:
    """Connect to process 0."""
    while True:
        try:
            one = socket.create_connection((host, port), timeout=HELLO_SECONDS)
            break
        except OSError as error:  # not started yet, as a rule
            if time.monotonic() > until:
                raise InputError(
                    f"--coordinator: process 0 is not to be reached at {host}:{port} "
                    f"({error.strerror or error}); is it started, and is the port free on its "
                    "machine?"
                ) from error
            time.sleep(0.2)
    try:
        _send(one, {"process": index, "processes": count})
        # Process 0 gives up first if the others do not come, and says so.
        one.settimeout(max(0.0, until - time.monotonic()) + HELLO_SECONDS)
        word = _line(one)
    except (OSError, ValueError):
        word = {"bye": "does not speak as bnnmcmc does; take another port"}
    if not isinstance(word, dict) or not word.get("welcome"):
        one.close()
        reason = (word or {}).get("bye") or "closed the connection"
        raise InputError(f"--coordinator: process 0 at {host}:{port}: {reason}")
    one.settimeout(None)
    _keep_alive(one)
    return [one]


def _hello(one: socket.socket) -> dict[str, Any]:
    """Return the first word of a connection, empty if it is none of ours."""
    one.settimeout(HELLO_SECONDS)
    try:
        word = _line(one)
    except (OSError, ValueError):
        return {}
    one.settimeout(None)
    return word if isinstance(word, dict) and isinstance(word.get("process"), int) else {}


def _line(one: socket.socket) -> dict[str, Any]:
    """Read one short word, byte by byte: what follows it is for another reader."""
    line = b""
    while not line.endswith(b"\n") and len(line) < HELLO_BYTES:
        byte = one.recv(1)
        if not byte:
            break
        line += byte
    return json.loads(line) if line else {}


def _send(one: socket.socket, word: dict[str, Any]) -> None:
    one.sendall(json.dumps(word).encode() + b"\n")


def _keep_alive(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": SILENT_SECONDS // 10 - 1}
    options["TCP_USER_TIMEOUT"] = 1000 * SILENT_SECONDS
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# -------------------------------------------------------------------- cores and GPUs of one host


def _seat() -> dict[str, Any]:
    """Say on which machine this process is, and which of its cores and GPUs it sees."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # names may be the same on two machines
    machine = boot.read_text().strip() if boot.is_file() else socket.gethostname()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "host": socket.gethostname(),
        "machine": machine,
        "cores": cores or list(range(os.cpu_count() or 1)),
        "gpus": _visible_gpus(),
    }


def _visible_gpus() -> list[str]:
    """Return the identifiers of the NVIDIA GPUs that JAX would see, without waking JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if platforms.startswith("cpu") or not any(map(find_spec, plugins)):
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(
            query, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = dict(line.split(", ", 1) for line in listed.splitlines())
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(names.values())
    return [names.get(name.strip(), name.strip()) for name in wanted.split(",") if name.strip()]


def _neighbours(seats: list[dict[str, Any]], index: int, what: str) -> list[int]:
    """Return the processes that see the same cores, or GPUs, of the same machine."""
    mine = seats[index]
    same = [s["machine"] == mine["machine"] and s[what] == mine[what] for s in seats]
    return [number for number, found in enumerate(same) if found]


def _own_cores(seats: list[dict[str, Any]], index: int) -> int | None:
    others = _neighbours(seats, index, "cores")
    cores, position = len(seats[index]["cores"]), others.index(index)
    return None if len(others) == 1 else max(1, (cores + len(others) - 1 - position) // len(others))


def _own_gpus(seats: list[dict[str, Any]], index: int) -> list[int] | None:
    others, gpus = _neighbours(seats, index, "gpus"), len(seats[index]["gpus"])
    if len(others) == 1 or not gpus:
        return None
    if gpus < len(others):
        raise InputError(
            f"processes {', '.join(map(str, others))} on {seats[index]['host']} see the same "
            f"{gpus} GPU{'s' if gpus > 1 else ''}; start at most one process per GPU, or give each "
            "its own (CUDA_VISIBLE_DEVICES, or --gpus-per-task in SLURM)"
        )
    share, position = gpus // len(others), others.index(index)
    return list(range(position * share, (position + 1) * share))
