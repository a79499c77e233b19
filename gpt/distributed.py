"""Several processes that train one model: how they meet, agree and part. Knows no model, no files.

All is JAX's own: jax.distributed with its coordination service and its heartbeats. A process that
is alone passes through every function here without cost. JAX is imported where it is needed: the
command line reads its flags here, and `--help` is quick.
"""

import contextlib
import hashlib
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from gpt.errors import Failed, UserError, positive, require

JOIN_SECONDS = 300  # for which a process waits for the others to start
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "oordination")


@dataclass(frozen=True)
class Processes:
    """How this process meets the others of its run: by flags, or as JAX finds in the environment.

    JAX knows SLURM, Open MPI, Kubernetes and Cloud TPU.
    """

    coordinator: str | None = None
    """HOST:PORT where the first of several processes listens; needless where JAX finds them."""
    num_processes: int | None = None
    """How many processes train together; 1: this one alone, whatever the environment says."""
    process_id: int | None = None
    """Which of them this one is, from 0; the first one writes logs and checkpoints' records."""
    heartbeat: int = 60
    """Seconds without a sign of life after which a process is given up, and the others end too."""

    def __post_init__(self):
        positive("heartbeat", self.heartbeat)
        if self.num_processes is not None:
            positive("num_processes", self.num_processes)
        given = [x is not None for x in (self.coordinator, self.num_processes, self.process_id)]
        require(
            given in ([False] * 3, [True] * 3) or (not given[0] and self.num_processes == 1),
            "--coordinator HOST:PORT, --num-processes N and --process-id I belong together: give "
            "all three, or none where the environment tells (SLURM, Open MPI, Kubernetes, Cloud "
            "TPU), or --num-processes 1 to train in this process alone",
        )
        require(
            self.process_id is None or 0 <= self.process_id < self.num_processes,
            f"--process-id is {self.process_id}: expected 0 to {(self.num_processes or 1) - 1}, "
            f"since --num-processes is {self.num_processes}",
        )
        if self.coordinator is not None:
            address(self.coordinator)


FROM_ENVIRONMENT = Processes()


def address(coordinator: str) -> tuple[str, int]:
    """Host and port; UserError unless `coordinator` is of that form."""
    host, _, port = coordinator.rpartition(":")
    good = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
    require(good, f"--coordinator is {coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def join(processes: Processes) -> None:
    """Meet the other processes, if there are any; call it before anything asks for a device.

    UserError if they cannot be met. Ctrl-C ends the process at once meanwhile.
    """
    import jax

    if processes.num_processes == 1:
        return
    given: dict[str, Any] = {}
    if processes.coordinator:
        require_reachable(processes)
        given = {"coordinator_address": processes.coordinator}
        given |= {"num_processes": processes.num_processes, "process_id": processes.process_id}
    limits = {"heartbeat_timeout_seconds": processes.heartbeat}
    limits |= {"shutdown_timeout_seconds": JOIN_SECONDS, "initialization_timeout": JOIN_SECONDS}
    with ctrl_c_ends(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Kubernetes without its package: docs/parallelism.md
        try:
            jax.distributed.initialize(**given, **limits)
        except Exception as error:  # whatever a cluster's own interface raises
            if not given and "coordinator_address should be defined" in str(error):
                return  # no environment of several processes: the usual case
            raise UserError(
                f"cannot join the processes of this run: {' '.join(str(error).split())[:300]}; "
                "--num-processes 1 trains in this process alone"
            ) from None


def require_reachable(processes: Processes) -> None:
    """UserError where JAX would crash: the first one's port is taken, or nobody listens there."""
    host, port = address(processes.coordinator)
    try:
        if processes.process_id == 0:
            socket.create_server(("", port)).close()
        else:
            await_listener(host, port)
    except OSError as error:
        what = "this process cannot listen" if processes.process_id == 0 else "nobody listens"
        raise UserError(f"--coordinator {processes.coordinator}: {what} there: {error}") from None


def await_listener(host: str, port: int) -> None:
    """Return when somebody listens there; OSError if nobody does in time, or there is no host."""
    until = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=10).close()
        except socket.gaierror:
            raise
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


@contextlib.contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """Inside, Ctrl-C ends the process as the system does: Python would wait for what it called."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def joined() -> bool:
    """Whether this process has joined others and not parted: leaving waits for them then."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def several() -> bool:
    """Whether more than one process trains."""
    import jax

    return joined() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    import jax

    return not several() or jax.process_index() == 0


def gather(value: Any) -> Any:
    """`value`, an array or a number of at most 32 bits, of each process: [n, ...], in their order.

    All must call it, in the same order of calls, when no step is under way.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value)


def all_agree(good: bool) -> bool:
    """Whether `good` is true in every process; each of them asks at the same point."""
    import numpy as np

    return bool(np.all(gather(np.uint32(good)))) if several() else good


def agree_on_code(code: int) -> int:
    """The exit code of all: the smallest one of any process that is not 0."""
    import numpy as np

    codes = gather(np.uint32(code)).ravel().tolist() if several() else [code]
    return min(filter(None, codes), default=0)


def preempted(count: int) -> bool:
    """Whether all processes are to stop now, since one of them has got a SIGTERM.

    `count` steps were made since they met; each process asks after each step. JAX's service lets
    all of them go on to one step that none has passed. Costs some 20 microseconds.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(count)


@contextlib.contextmanager
def refused_alike(otherwise: Exception) -> Iterator[None]:
    """All processes get through what is inside or none: where it is refused in one, the others
    raise `otherwise`. What is inside must not wait for another process.
    """
    refused: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        refused = error
    if not all_agree(refused is None):
        raise refused or otherwise


@contextlib.contextmanager
def together() -> Iterator[None]:
    """As `refused_alike`, where a refusal ends the run: the processes part."""
    try:
        with refused_alike(UserError("another process of this run was refused: it says why")):
            yield
    except (UserError, OSError):
        part()
        raise


@contextlib.contextmanager
def by_first(context: AbstractContextManager) -> Iterator[None]:
    """`context`, entered by the first process for all; where it is refused all are."""
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                stack.enter_context(context)
        yield


def require_same(values: dict[str, object]) -> None:
    """UserError in all processes, naming what differs, unless each `repr` is the same in all."""
    import numpy as np

    if several():
        digests = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
        own = np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), -1)
        same = (gather(own) == own).all(axis=(0, 2))
        differ = [name for name, equal in zip(values, same.tolist(), strict=True) if not equal]
        if differ:
            part()
            raise UserError(f"the processes of a run must agree on {' and '.join(differ)}")


def part() -> None:
    """Part from the others, who do the same now: afterwards each may leave as it likes."""
    import jax

    if joined():
        jax.distributed.shutdown()


def copy_for_first(tree: Any) -> Any:
    """The arrays of `tree` whole, on the first process's first device; None in the others.

    One array after another: no other device holds more than one of them besides its part. For a
    process alone `tree` itself.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    if not several():
        return tree

    def whole(x: jax.Array) -> jax.Array | None:
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        copy = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=everywhere)(x))
        return copy.addressable_data(0) if is_first() else None

    copies = jax.tree.map(whole, tree)
    return copies if is_first() else None


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """How a run ends badly: what all find out alike parts them; that another one is gone is told.

    Failed, in one sentence, for a collective that could not be completed.
    """
    import jax

    try:
        yield
    except Failed:
        part()
        raise
    except jax.errors.JaxRuntimeError as error:
        if not several() or not any(word in str(error) for word in LOST):
            raise
        raise Failed(
            "another process of this run has ended or cannot be reached "
            f"({str(error).splitlines()[0][:200]}); the same commands continue the run from its "
            "last checkpoint"
        ) from None
