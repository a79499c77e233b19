"""The part every entry point shares, in a process of its own: pipes, caches, memory, Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt import cli

ROOT = Path(__file__).parent.parent


SCRIPT = """
import sys
from gpt import cli

def main(argv):
    print("\\n".join(map(str, range(int(argv[0])))))

cli.run(main)
"""


def shell(command: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """A shell command in which $PROGRAM prints as many lines as it is told."""
    (tmp_path / "script.py").write_text(SCRIPT)
    program = f"{sys.executable} {tmp_path / 'script.py'}"
    buffered = {"PYTHONUNBUFFERED": ""}  # so that there is something left to write at the end
    environment = {**os.environ, "PROGRAM": program, "PYTHONPATH": str(ROOT), **buffered}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("lines", [1, 200_000])
def test_a_closed_pipe_is_no_error(lines, tmp_path):
    done = shell(f"$PROGRAM {lines} | (exec <&-; sleep 0.5)", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_under_standard_output(tmp_path):
    done = shell("$PROGRAM 3 > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def python(code: str, **environment: str | None) -> str:
    """Standard output of `code` in a process of its own, which must succeed."""
    wanted = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in wanted.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_the_parser_needs_neither_jax_nor_numpy():
    heavy = "{'jax', 'numpy', 'flax', 'optax', 'matplotlib'}"
    assert python(f"import sys, gpt.cli; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_without_the_environment_it_says_what_to_type(program):
    """With -S Python finds none of the packages."""
    words = [sys.executable, "-S", program, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "`make setup`" in done.stderr and "`source .venv/bin/activate`" in done.stderr


WHERE = "from gpt.cli import cache_folder; print(cache_folder(), cache_folder().is_dir())"


def test_the_cache_folder(tmp_path):
    """Without a home that can be written it lasts as long as the process."""
    folder, home = tmp_path / "own", str(tmp_path)
    assert python(WHERE, XDG_CACHE_HOME=str(folder)) == f"{folder / 'gpt-jax'} True"
    at_home = python(WHERE, HOME=home, XDG_CACHE_HOME="")
    assert at_home == f"{tmp_path / '.cache' / 'gpt-jax'} True"

    (tmp_path / "file").write_text("not a folder")
    said = python(WHERE, HOME=str(tmp_path / "file"), XDG_CACHE_HOME=None, TMPDIR=home)
    folder, existed = said.split()
    assert Path(folder).parent == tmp_path and existed == "True"
    assert not Path(folder).exists()


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    """Where the user wants them, else in the cache folder, unless that is turned off."""
    monkeypatch.setattr(cli, "_keep_freed_memory", lambda: None)
    monkeypatch.setattr(cli, "cache_folder", lambda: tmp_path)
    for environment, cache, kept, enabled in (
        ({"JAX_COMPILATION_CACHE_DIR": "mine"}, True, "mine", None),
        ({}, True, str(tmp_path / "xla"), None),
        ({}, False, None, "false"),
    ):
        monkeypatch.setattr(cli.os, "environ", environment)
        cli.prepare_jax(cache=cache)
        assert cli.os.environ.get("JAX_COMPILATION_CACHE_DIR") == kept
        assert cli.os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == enabled


@pytest.mark.parametrize(
    ("told", "plugin", "expected"),
    [
        ("cpu", "libtpu", True),
        ("cuda,cpu", None, False),
        (None, None, True),
        (None, "jax_plugins", False),
        (None, "libtpu", False),
    ],
)
def test_whether_jax_will_run_on_the_cpu(told, plugin, expected, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", {"JAX_PLATFORMS": told} if told else {})
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == plugin or None)
    assert cli._only_cpu() is expected


FAULTS = """
import ctypes, resource
from gpt.cli import prepare_jax
if {prepared}:
    prepare_jax(cache=False)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = c.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(cli.platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_kept():
    """Twenty blocks of 64 MiB: each is mapped anew, unless the allocator keeps the first."""
    mapped, kept = (int(python(FAULTS.format(prepared=p))) for p in (False, True))
    assert kept < mapped / 5


def test_ctrl_c_leaves_at_once_with_130():
    """A real process, which skips the end of the interpreter: a broken compilation crashes it."""
    script = (
        "import atexit, gpt.cli\natexit.register(print, 'torn down')\n"
        "def main(argv): raise KeyboardInterrupt\ngpt.cli.run(main)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_what_is_printed_to_be_pasted_names_an_environment_that_is_not_activated(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert cli.command("sample.py", "my run") == "python sample.py 'my run'"  # it lies elsewhere
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert cli.command("sample.py", "run") == ".venv/bin/python sample.py run"
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert cli.command("sample.py", "run") == "python sample.py run"
