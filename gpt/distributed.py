"""Several processes that train one model: how they find each other, agree, and end together.

jax.distributed does the work, with its coordination service and its heartbeats. A process that
trains alone passes through every function here at no cost, and never calls jax.distributed at all.
JAX is imported inside the functions because the command line reads its flags from this module, and
`--help` should not have to wait for JAX.
"""

import contextlib
import hashlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg as flag

from gpt.errors import Failed, UserError, positive, require

JOIN_SECONDS = 300  # how long a process waits for the others to start
TPU_HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Words in XLA's errors when another process of the run is gone.
LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "oordination")


@dataclass(frozen=True)
class Processes:
    """How this process meets the others of its run: by flags, or from what a launcher has set.

    SLURM, Open MPI, Kubernetes and Cloud TPU are recognized.
    """

    coordinator: Annotated[str | None, flag(metavar="HOST:PORT", help_behavior_hint="")] = None
    """Where the first of several processes listens; not needed under a launcher."""
    num_processes: Annotated[int | None, flag(metavar="INT", help_behavior_hint="")] = None
    """How many processes train together; 1: this one alone, whatever the environment says."""
    process_id: Annotated[int | None, flag(metavar="INT", help_behavior_hint="")] = None
    """Which of them this one is, from 0; the first one writes logs and checkpoint metadata."""
    heartbeat: int = 60
    """Seconds without a sign of life after which a process counts as dead and all others end."""

    def __post_init__(self):
        positive("heartbeat", self.heartbeat)
        if self.num_processes is not None:
            positive("num_processes", self.num_processes)
        given = [x is not None for x in (self.coordinator, self.num_processes, self.process_id)]
        alone = self.num_processes == 1 and self.coordinator is None
        require(
            alone or all(given) or not any(given),
            "--coordinator HOST:PORT, --num-processes N and --process-id I belong together: give "
            "all three, or none under a launcher (SLURM, Open MPI, Kubernetes, Cloud TPU), or "
            "--num-processes 1 to train in this process alone",
        )
        require(
            self.process_id is None or 0 <= self.process_id < self.num_processes,
            f"--process-id is {self.process_id}: expected 0 to {(self.num_processes or 1) - 1}, "
            f"since --num-processes is {self.num_processes}",
        )
        if self.coordinator is not None:
            parse_address(self.coordinator)


FROM_ENVIRONMENT = Processes()


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; UserError for anything else."""
    host, _, port = coordinator.rpartition(":")
    good = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
    require(good, f"--coordinator is {coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


# Finding and meeting the other processes


@dataclass(frozen=True)
class Cluster:
    """A launcher that has started this process as one of several."""

    launcher: str
    variable: str
    """Where that was read."""
    n_processes: int | None = None
    """None where only the launcher's own service knows."""


def find_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """The launcher that started this process as one of several; None if it trains alone.

    An allocation is not yet a launch: inside `salloc`, in a batch script, and in an interactive
    `srun --pty` shell SLURM_NTASKS may be 4, but only one process of the step runs. Likewise every
    Kubernetes pod sees KUBERNETES_SERVICE_HOST, but only an indexed Job has several alike.
    """
    counts = (("Open MPI", "OMPI_COMM_WORLD_SIZE"), ("SLURM", "SLURM_STEP_NUM_TASKS"))
    for launcher, variable in counts:
        value = environ.get(variable, "")
        if value.isdecimal() and int(value) > 1:
            return Cluster(launcher, variable, int(value))
    if any(variable in environ for variable in TPU_HOST_LISTS):  # on Kubernetes or elsewhere
        return find_tpu_slice(environ)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster("Kubernetes", "JOB_COMPLETION_INDEX")
    if "JAX_COORDINATOR_ADDRESS" in environ:
        return Cluster("JAX", "JAX_COORDINATOR_ADDRESS")
    return find_tpu_slice(environ)


def find_tpu_slice(environ: Mapping[str, str]) -> Cluster | None:
    """The Cloud TPU slice of several hosts that this process is part of, if it is.

    Google Kubernetes Engine says so in the environment, a TPU VM by its metadata server
    (cloud.google.com/compute/docs/metadata).
    """
    n_slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    for variable in TPU_HOST_LISTS:
        if variable in environ:
            n_processes = len(environ[variable].split(",")) * n_slices
            return Cluster("Cloud TPU", variable, n_processes) if n_processes > 1 else None

    if "TPU_SKIP_MDS_QUERY" in environ or not has_tpu_chips():
        return None
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            n_processes = len(answer.read().decode().split(",")) * n_slices
    except OSError:  # no such server: some other cloud's TPU, or none
        return None
    if n_processes > 1:
        return Cluster("Cloud TPU", "worker-network-endpoints", n_processes)
    return None


def has_tpu_chips() -> bool:
    """Whether there is a device that may be a TPU, and the library that drives one."""
    devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def connect(processes: Processes, environ: Mapping[str, str], log: Callable[[str], None]) -> None:
    """Meet the other processes, if there are any; call it before anything asks for a device.

    UserError if they cannot be met. If they do not come within JOIN_SECONDS this logs one error
    line and ends the process with exit code 2. Ctrl-C ends it at once meanwhile.
    """
    if processes.num_processes == 1:
        return
    arguments: dict[str, Any] = {}
    if processes.coordinator:
        require_reachable(processes)
        expected = f"{processes.num_processes} processes at {processes.coordinator}"
        arguments["coordinator_address"] = processes.coordinator
        arguments["num_processes"] = processes.num_processes
        arguments["process_id"] = processes.process_id
    else:
        cluster = find_cluster(environ)
        if cluster is None:
            return
        if cluster.launcher == "Kubernetes" and not importlib.util.find_spec("kubernetes"):
            raise UserError(
                "this is an indexed Kubernetes Job, whose pods JAX joins with a package that is "
                "not installed: pip install 'jax[k8s]', or give --num-processes 1 to train in "
                "each pod alone"
            )
        expected = f"{cluster.n_processes or 'several'} processes"
        log(
            f"waiting        for the {expected} of this run, found by {cluster.launcher}'s "
            f"{cluster.variable}; --num-processes 1 trains in this process alone"
        )
        if cluster.n_processes:
            arguments["num_processes"] = cluster.n_processes

    import jax

    # JAX aborts the process with a stack trace if its own timeout runs out, so ours is shorter.
    def give_up():
        log(
            f"error: the {expected} of this run did not all come within {JOIN_SECONDS} seconds: "
            "start them all, or give --num-processes 1 to train in this process alone"
        )
        os._exit(2)

    deadline = threading.Timer(JOIN_SECONDS, give_up)
    deadline.daemon = True
    deadline.start()
    # Python would hold Ctrl-C back until the call returns; the system's handler does not.
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=processes.heartbeat,
            shutdown_timeout_seconds=JOIN_SECONDS,
            initialization_timeout=2 * JOIN_SECONDS,
        )
    except Exception as error:  # whatever a launcher's own interface raises
        raise UserError(
            f"cannot join the processes of this run: {' '.join(str(error).split())[:300]}; "
            "give --coordinator, --num-processes and --process-id, or --num-processes 1 to train "
            "in this process alone"
        ) from None
    finally:
        signal.signal(signal.SIGINT, previous_handler)
        deadline.cancel()


def require_reachable(processes: Processes) -> None:
    """Raise UserError if the port is taken or the host unknown: JAX would crash or wait forever."""
    host, port = parse_address(processes.coordinator)
    try:
        if processes.process_id == 0:
            socket.create_server(("", port)).close()
        else:
            socket.getaddrinfo(host, port)
    except OSError as error:
        problem = "cannot listen there" if processes.process_id == 0 else "no such host"
        raise UserError(f"--coordinator {processes.coordinator}: {problem}: {error}") from None


def is_connected() -> bool:
    """Whether this process is connected to others, which it must not leave without notice."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def disconnect() -> None:
    """Disconnect from the other processes, which must do the same now; each may then exit."""
    import jax

    if is_connected():
        jax.distributed.shutdown()


# Who is who, and what all agree on


def is_multi_process() -> bool:
    """Whether more than one process trains this run."""
    import jax

    return is_connected() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once; true if it trains alone."""
    import jax

    return not is_multi_process() or jax.process_index() == 0


def gather(value: Any) -> Any:
    """`value` of every process, stacked in their order: [n_processes, ...].

    An array or a number of at most 32 bits. All processes must call this in the same order of
    calls, and when no training step is running.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value)


def all_agree(good: bool) -> bool:
    """Whether `good` is true in every process; all of them must ask at the same point."""
    import numpy as np

    return bool(np.all(gather(np.uint32(good)))) if is_multi_process() else good


def agree_on_code(code: int) -> int:
    """One exit code for all processes: the smallest that is not 0, or 0 if all are."""
    import numpy as np

    if not is_multi_process():
        return code
    codes = gather(np.uint32(code)).ravel().tolist()
    return min((c for c in codes if c), default=0)


def require_same(values: Mapping[str, object]) -> None:
    """UserError in every process, naming what differs, unless each `repr` is the same in all."""
    import numpy as np

    if not is_multi_process():
        return
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
    own = np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), -1)
    same = (gather(own) == own).all(axis=(0, 2)).tolist()
    differing = [name for name, equal in zip(values, same, strict=True) if not equal]
    if differing:
        disconnect()
        raise UserError(f"the processes of a run must agree on {' and '.join(differing)}")


def preempted(n_steps: int) -> bool:
    """Whether all processes must stop now because one of them received SIGTERM.

    Each process asks after each step, `n_steps` after they met. JAX's preemption service picks a
    step that none of them has passed, so all stop at the same one. Takes about 20 microseconds.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(n_steps)


# Ending together


@contextlib.contextmanager
def all_or_none(otherwise: Exception) -> Iterator[None]:
    """The block succeeds in all processes or in none.

    If it raises UserError or OSError in one process, the others raise `otherwise`. The block must
    not wait for another process.
    """
    failure: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    if not all_agree(failure is None):
        raise failure or otherwise


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """Like `all_or_none`, where an error ends the run: the processes disconnect first."""
    try:
        with all_or_none(UserError("another process of this run reported an error")):
            yield
    except (UserError, OSError):
        disconnect()
        raise


@contextlib.contextmanager
def on_first_process(context: AbstractContextManager) -> Iterator[None]:
    """Enter `context` in the first process only; if that fails there, all processes end."""
    with contextlib.ExitStack() as stack:
        with exit_together():
            if is_first():
                stack.enter_context(context)
        yield


@contextlib.contextmanager
def report_lost_peer() -> Iterator[None]:
    """Raise Failed, one sentence, if a collective fails because another process is gone.

    A Failed from inside is one that all processes raise alike: they disconnect first.
    """
    import jax

    try:
        yield
    except Failed:
        disconnect()
        raise
    except jax.errors.JaxRuntimeError as error:
        if not is_multi_process() or not any(word in str(error) for word in LOST_PEER):
            raise
        raise Failed(
            "another process of this run has ended or cannot be reached "
            f"({str(error).splitlines()[0][:200]}); the same commands continue the run from its "
            "last checkpoint"
        ) from None


def copy_to_first_process(tree: Any) -> Any:
    """The arrays of `tree` whole, on the first process's first device; None in the others.

    Copied one after another, so that no other device ever holds more than one of them besides its
    own part. A process that trains alone gets `tree` itself.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    if not is_multi_process():
        return tree

    def copy(x: jax.Array) -> jax.Array | None:
        replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
        whole = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=replicated)(x))
        return whole.addressable_data(0) if is_first() else None

    copies = jax.tree.map(copy, tree)
    return copies if is_first() else None
