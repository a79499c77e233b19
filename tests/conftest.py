"""The conditions under which every test runs, set before anything can import JAX."""

import os
import shutil
import signal
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import settings

# One cache of compiled programs for all workers, and for the processes that tests start: the first
# process makes it, and those that it starts find it in their environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    caches = tempfile.TemporaryDirectory(prefix="gpt-jax-tests-")
    os.environ["XDG_CACHE_HOME"] = caches.name
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["MPLBACKEND"] = "agg"
for name in ("JAX_COMPILATION_CACHE_DIR", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "XLA_FLAGS"):
    os.environ.pop(name, None)

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine, however slow it is: a red suite means a changed program.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

sys.path.append(str(Path(__file__).parent))  # for programs.py, numpy_transformer.py


def pytest_xdist_auto_num_workers(config):
    """Two processes run the whole suite; what is named on the command line runs in this one."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_configure(config):
    """Without optimization XLA compiles in half the time. Tests marked `exact` compare bits or
    rounding, so where they are asked for all is compiled as users compile it: by default that is
    in a process of its own, see test_exact.py."""
    if "not exact" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        if metadata.version("jaxlib").startswith("0.10."):  # later ones know of no other emitters
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


# Each compiled program takes a few dozen memory maps, and Linux allows a process 65,530 of them: a
# worker that keeps the programs of hundreds of tests would crash.
MAX_MAPS = 40_000
tests_run = 0


@pytest.fixture(autouse=True)
def forget_programs_in_time():
    """Drop compiled programs when there are too many; looked at after every tenth test."""
    global tests_run
    yield
    tests_run += 1
    maps = Path("/proc/self/maps")
    if tests_run % 10 == 0 and "jax" in sys.modules and maps.exists():
        with maps.open("rb") as lines:
            n_maps = sum(1 for _ in lines)
        if n_maps > MAX_MAPS:
            sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of text."""
    import programs

    return programs.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """How a run of twelve steps ended, and its folder: to read from or to copy."""
    import programs

    folder = tmp_path_factory.mktemp("runs") / "trained"
    done = programs.call("train", *programs.TINY, "--data", text, "--out", folder)
    assert done.code == 0, done.err
    return done, folder


@pytest.fixture(scope="session")
def folder(trained):
    """The folder of that run, to read from."""
    return trained[1]


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, name): the arguments of every call of a function, which does what it did."""

    def watch_calls(owner, name):
        calls, honest = [], getattr(owner, name)

        def watched(*args, **options):
            calls.append(args)
            return honest(*args, **options)

        monkeypatch.setattr(owner, name, watched)
        return calls

    return watch_calls


@pytest.fixture
def before_step(monkeypatch):
    """before_step(action): runs call action(step, state) before each step, counted from 1."""
    import programs  # which keeps the steps that it has compiled

    honest = programs.step_functions.compile_steps

    def plan(action):
        def compile_steps(config, mesh):
            train_step, eval_step = honest(config, mesh)

            def watched(state, tokens):
                action(int(state.step) + 1, state)
                return train_step(state, tokens)

            return watched, eval_step

        monkeypatch.setattr(programs.step_functions, "compile_steps", compile_steps)

    return plan


@pytest.fixture
def finished(trained, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(trained[1], tmp_path / "run")
