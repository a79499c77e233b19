"""How a process finds out whether it trains alone, and what happens if the others never come."""

import io

import jax
import pytest
from programs import free_port, run_python

from gpt import distributed
from gpt.distributed import connect, find_cluster
from gpt.errors import UserError
from gpt.train_flags import Processes

FROM_ENVIRONMENT = Processes()

INTERACTIVE = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
ALONE = {
    "no launcher": {},
    "salloc or sbatch": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "srun --pty": INTERACTIVE | {"SLURM_STEP_NUM_TASKS": "1"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1"},
    "a Kubernetes pod": POD,
    "one TPU host": POD | {"TPU_WORKER_HOSTNAMES": "localhost", "JOB_COMPLETION_INDEX": "0"},
}
LAUNCHED = {
    "srun -n 4": (INTERACTIVE | {"SLURM_STEP_NUM_TASKS": "4"}, "SLURM", 4),
    "mpirun in a SLURM step": (INTERACTIVE | {"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI", 2),
    "an indexed Job": (POD | {"JOB_COMPLETION_INDEX": "0"}, "Kubernetes", None),
    "a TPU pod": (POD | {"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU", 2),
    "two slices": ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, "Cloud TPU", 4),
    "an address for JAX": ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX", None),
}


@pytest.fixture
def initialized(monkeypatch):
    """The arguments of each call of jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("environ", ALONE.values(), ids=ALONE)
def test_a_process_without_peers_never_waits(environ, initialized):
    connect(FROM_ENVIRONMENT, environ, pytest.fail)
    assert not initialized


@pytest.mark.parametrize(("environ", "launcher", "n_processes"), LAUNCHED.values(), ids=LAUNCHED)
def test_a_launcher_is_recognized_and_named(
    environ, launcher, n_processes, initialized, monkeypatch
):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    lines = []
    connect(FROM_ENVIRONMENT, environ, lines.append)
    (line,) = lines
    assert f"{n_processes or 'several'} processes" in line and f"found by {launcher}'s" in line
    assert "--num-processes 1" in line
    (arguments,) = initialized
    assert arguments.get("num_processes") == n_processes

    connect(Processes(num_processes=1), environ, pytest.fail)
    assert len(initialized) == 1


def test_a_job_that_jax_cannot_join_is_refused_not_trained_alone():
    with pytest.raises(UserError, match=r"jax\[k8s\].*--num-processes 1"):
        connect(FROM_ENVIRONMENT, LAUNCHED["an indexed Job"][0], lambda line: None)
    with pytest.raises(UserError, match=r"cannot join .* --num-processes 1"):
        connect(FROM_ENVIRONMENT, {"OMPI_COMM_WORLD_SIZE": "2"}, lambda line: None)


@pytest.mark.parametrize(("hosts", "n_processes"), [("10.0.0.1", None), ("a:1:b,c:2:d", 2)])
def test_a_tpu_vm_asks_its_metadata_server_if_there_is_one(hosts, n_processes, monkeypatch):
    def urlopen(request, timeout):
        assert request.full_url.endswith("/attributes/worker-network-endpoints")
        return io.BytesIO(hosts.encode())

    monkeypatch.setattr(distributed, "has_tpu_chips", lambda: True)
    assert find_cluster({"GCE_METADATA_IP": f"localhost:{free_port()}"}) is None
    monkeypatch.setattr(distributed.urllib.request, "urlopen", urlopen)
    found = find_cluster({})
    assert (found and found[1]) == n_processes


NEVER_COME = """
import sys
from gpt import cli, distributed, train_flags
distributed.JOIN_SECONDS = 2
processes = train_flags.Processes("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
cli.run(lambda _: distributed.connect(processes, {}, lambda line: print(line, file=sys.stderr)))
"""


def test_if_the_others_never_come_the_first_says_so_at_once_and_ends_with_one_error():
    port = free_port()
    done = run_python("-c", NEVER_COME, port, 0)
    waiting, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert waiting == (
        f"waiting        for the 2 processes of this run, at localhost:{port}; --num-processes 1 "
        "trains in this process alone"
    )
    assert error.startswith(
        f"error: the 2 processes of this run, at localhost:{port}, did not all "
    )
    assert "all connect within 2 seconds" in error and "--num-processes 1" in error


def test_a_taken_port_and_an_unknown_host_are_refused():
    with distributed.socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--coordinator {address}: cannot listen there"):
            connect(Processes(address, 2, 0), {}, pytest.fail)
    with pytest.raises(UserError, match="no such host"):
        connect(Processes("no.such.host.invalid:1", 2, 1), {}, pytest.fail)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"coordinator": "localhost:1234"}, "belong together"),
        ({"process_id": 0, "num_processes": 2}, "belong together"),
        ({"num_processes": 0}, "num_processes is 0: expected at least 1"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({"coordinator": "h:x", "num_processes": 2, "process_id": 1}, "HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, reason):
    with pytest.raises(UserError, match=reason):
        Processes(**flags)
