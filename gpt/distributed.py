"""Several processes training one model: how they find each other, agree, and end together.

jax.distributed does the work, with its coordination service and heartbeats. For a process that
trains alone, every function here costs nothing and jax.distributed is never started.
"""

import contextlib
import hashlib
import importlib.util
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec

from gpt.errors import Failed, UserError

JOIN_SECONDS = 300  # how long a process waits for the others to start
TPU_HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Words in XLA's errors when another process of the run is gone.
LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "oordination")


# Finding and meeting the other processes


def find_cluster(environ: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The launcher's variable that makes this process one of several, in words, and their number
    (None if only the launcher's own service knows it); None if the process trains alone.

    An allocation is not yet a launch: inside `salloc`, in a batch script, and in an interactive
    `srun --pty` shell, SLURM_NTASKS may be 4 although the step runs only one process. Likewise,
    every Kubernetes pod sees KUBERNETES_SERVICE_HOST, but only an indexed Job's pods run one
    program together.
    """
    for launcher, variable in (
        ("Open MPI", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM", "SLURM_STEP_NUM_TASKS"),
    ):
        value = environ.get(variable, "")
        if value.isdecimal() and int(value) > 1:
            return f"{launcher}'s {variable}", int(value)

    n_slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    for variable in TPU_HOST_LISTS:  # as Google Kubernetes Engine sets them
        if variable in environ:
            n_processes = len(environ[variable].split(",")) * n_slices
            return (f"Cloud TPU's {variable}", n_processes) if n_processes > 1 else None

    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes's JOB_COMPLETION_INDEX", None
    if "JAX_COORDINATOR_ADDRESS" in environ:
        return "JAX's JAX_COORDINATOR_ADDRESS", None

    # A TPU VM has a metadata server to ask (cloud.google.com/compute/docs/metadata).
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
    return ("Cloud TPU's worker-network-endpoints", n_processes) if n_processes > 1 else None


def has_tpu_chips() -> bool:
    """Whether there is a device that may be a TPU, and the library to drive it."""
    devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def connect(processes: Any, environ: Mapping[str, str], log: Callable[[str], None]) -> None:
    """Connect to the other processes, if any; call this before anything uses a device.

    `processes`: the flags of that name in gpt/train_flags.py. UserError if connecting fails. If the
    others do not join within JOIN_SECONDS, this logs one error line and ends the process with exit
    code 2. Until then, Ctrl-C ends it immediately.
    """
    if processes.num_processes == 1:
        return
    if processes.coordinator:
        require_reachable(processes.coordinator, listens=processes.process_id == 0)
        expected = f"{processes.num_processes} processes"
        found = f"at {processes.coordinator}"
        arguments = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.num_processes,
            "process_id": processes.process_id,
        }
    else:
        cluster = find_cluster(environ)
        if cluster is None:
            return
        variable, n_processes = cluster
        if variable.startswith("Kubernetes") and not importlib.util.find_spec("kubernetes"):
            raise UserError(
                "this is an indexed Kubernetes Job, whose pods JAX joins with a package that is "
                "not installed: pip install 'jax[k8s]', or give --num-processes 1 to train in "
                "each pod alone"
            )
        expected = f"{n_processes or 'several'} processes"
        found = f"found by {variable}"
        arguments = {"num_processes": n_processes} if n_processes else {}
    log(
        f"waiting        for the {expected} of this run, {found}; --num-processes 1 trains in this "
        "process alone"
    )

    # JAX aborts the process with a stack trace if its own timeout runs out, so ours is shorter.
    def give_up():
        log(
            f"error: the {expected} of this run, {found}, did not all connect within "
            f"{JOIN_SECONDS} seconds: start them all, or give --num-processes 1 to train in this "
            "process alone"
        )
        os._exit(2)

    deadline = threading.Timer(JOIN_SECONDS, give_up)
    deadline.daemon = True
    deadline.start()
    # Python would delay Ctrl-C until the call returns; the system's handler does not.
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=processes.heartbeat,
            shutdown_timeout_seconds=JOIN_SECONDS,
            initialization_timeout=2 * JOIN_SECONDS,
        )
    except Exception as error:  # whatever the launcher's interface raises
        raise UserError(
            f"cannot join the processes of this run: {' '.join(str(error).split())[:300]}; "
            "give --coordinator, --num-processes and --process-id, or --num-processes 1 to train "
            "in this process alone"
        ) from None
    finally:
        signal.signal(signal.SIGINT, previous_handler)
        deadline.cancel()


def require_reachable(coordinator: str, listens: bool) -> None:
    """Raise UserError if the port is taken or the host unknown; JAX would crash or wait forever."""
    host, _, port = coordinator.rpartition(":")
    try:
        if listens:
            socket.create_server(("", int(port))).close()
        else:
            socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        problem = "cannot listen there" if listens else "no such host"
        raise UserError(f"--coordinator {coordinator}: {problem}: {error}") from None


def disconnect() -> None:
    """Disconnect from the other processes, which must do the same now; each may then exit."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


# Who is who, and what all agree on. Functions that communicate must be called by all processes in
# the same order, and while no training step is running.


def is_multi_process() -> bool:
    """Whether more than one process trains this run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process does the writing that is done only once; true if it trains alone."""
    return not is_multi_process() or jax.process_index() == 0


def agree_on_code(code: int) -> int:
    """One exit code for all processes: the smallest nonzero one, or 0 if all are 0."""
    if not is_multi_process():
        return code
    codes = process_allgather(np.uint32(code)).ravel().tolist()
    return min((c for c in codes if c), default=0)


def require_same(values: Mapping[str, object]) -> None:
    """UserError in every process, naming what differs, unless each `repr` is the same in all."""
    if not is_multi_process():
        return
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
    own = np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), -1)
    same = (process_allgather(own) == own).all(axis=(0, 2)).tolist()
    differing = [name for name, equal in zip(values, same, strict=True) if not equal]
    if differing:
        disconnect()
        raise UserError(f"the processes of a run must agree on {' and '.join(differing)}")


# Ending together


@contextlib.contextmanager
def all_or_none(otherwise: Exception) -> Iterator[None]:
    """Make the block succeed in all processes or in none.

    If it raises UserError or OSError in one process, the others raise `otherwise`. The block must
    not wait for another process.
    """
    failure: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    all_good = failure is None
    if is_multi_process():
        all_good = bool(np.all(process_allgather(np.uint32(all_good))))
    if not all_good:
        raise failure or otherwise


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Like `all_or_none`, for errors that end the run: the processes disconnect first."""
    try:
        with all_or_none(UserError("another process of this run reported an error")):
            yield
    except (UserError, OSError):
        disconnect()
        raise


def is_lost_peer(error: Exception) -> bool:
    """Whether an error from JAX or orbax means that another process of this run is gone."""
    return is_multi_process() and any(word in str(error) for word in LOST_PEER)


@contextlib.contextmanager
def report_lost_peer() -> Iterator[None]:
    """Raise a one-sentence Failed if a collective fails because another process is gone.

    If the block itself raises Failed, all processes do, and they disconnect first.
    """
    try:
        yield
    except Failed:
        disconnect()
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not is_lost_peer(error):
            raise
        raise Failed(
            "another process of this run has ended or cannot be reached "
            f"({str(error).splitlines()[0][:200]}); the same commands continue the run from its "
            "last checkpoint"
        ) from None


def copy_to_first_process(tree: Any) -> Any:
    """The unsharded arrays of `tree` on the first process's first device; None in the others.

    They are copied one at a time, so that no other device ever holds more than one of them on top
    of its own shards. A process that trains alone gets `tree` itself.
    """
    if not is_multi_process():
        return tree

    def copy(x: jax.Array) -> jax.Array | None:
        replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
        whole = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=replicated)(x))
        return whole.addressable_data(0) if is_first() else None

    copies = jax.tree.map(copy, tree)
    return copies if is_first() else None
