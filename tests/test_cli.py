"""The part every entry point shares: flags, errors, exit codes, caches, JAX's surroundings."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT, program, run_python

from gpt import cli, sample_flags, train_flags
from gpt.errors import Failed, UserError
from gpt.presets import PRESETS


def read(*argv: str):
    """The flags of train.py."""
    return train_flags.parse_args(list(argv), program("train").__doc__)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as refused:
        read(*argv)
    return str(refused.value)


def test_the_first_word_may_be_a_preset():
    args = read("gpt2", "--steps", "5")
    assert (args.preset, args.config.steps, args.config.model.n_layers) == ("gpt2", 5, 12)
    assert read("--tokenizer", "gpt2").config.model == PRESETS["tiny"].model
    assert refusal("--steps", "5", "gpt2") == "gpt2 must come first: train.py gpt2 ..."
    assert "'gpt-2'" in refusal("gpt-2") and "shakespeare-char" in refusal("gpt-2")
    # Settings are checked against the chosen one.
    assert read("gpt2", "--model.n-heads", "6").config.model.head_width == 128
    assert "model.d_model 768 is not divisible" in refusal("gpt2", "--model.n-heads", "5")


def test_hyphens_and_underscores_are_one():
    assert read("--batch-size", "64") == read("--batch_size", "64")
    assert read("--model.n_layers", "2", "--mesh.data", "4").config.mesh.data == 4
    assert read("--data", "x", "y", "--overwrite").data == (Path("x"), Path("y"))
    argv = ["gpt2", "--model.n-layers", "2", "--steps=5", "--no-overwrite", "--model.no-bias"]
    assert cli.flags_given(argv) == {"model.n_layers", "steps", "overwrite", "model.bias"}


UNREADABLE = {
    "--steps many": "--steps is 'many': expected an integer;",
    "--minutes 1m": "--minutes is '1m': expected a number;",  # may be left out
    "--grad-accum x": "--grad-accum is 'x': expected an integer or auto;",
    "--steps": "--steps needs 1 value after it",
    "tinny": "; did you mean tiny?;",
    "--dtype float8": "--dtype is 'float8': expected one of",
    "tiny extra": "unexpected argument extra",
    "--learning-rate nan": "learning_rate is nan: expected a positive number",
    # The flags of other programs, and slips.
    "--stepz 5": "unknown flag --stepz: did you mean --steps?; see train.py --help",
    "--epochs=3": "unknown flag --epochs: the length is set by --steps or --minutes,",
    "--max_iters 1": "did you mean --steps?",
    "--dropout 1": "did you mean --model.dropout?",  # a setting of the model
    "--no-bias 1": "did you mean --model.no-bias?",
    "--warmup 1": "did you mean --warmup-steps?",  # the beginning
    "--dat 1": "did you mean --data?",  # and not --mesh.data
    "--file-system x": "unknown flag --file-system; see train.py --help",  # nothing absurd
}


@pytest.mark.parametrize("typed", UNREADABLE)
def test_an_unreadable_flag_is_one_line(typed):
    message = refusal(*typed.split())
    assert UNREADABLE[typed] in message
    assert "\n" not in message and "---" not in message


def test_every_guess_names_a_flag(capsys):
    for module in (train_flags, sample_flags):
        with pytest.raises(SystemExit):
            module.parse_args(["--help"], "")
        help_text = capsys.readouterr().out
        for meant in module.GUESSES:
            assert not meant.startswith("--") or f"  {meant.split()[0]} " in help_text, meant


def test_text_on_standard_input_becomes_a_file(tmp_path, monkeypatch):
    """The same text the same file, so that the same command continues its run."""
    monkeypatch.setattr(cli, "cache_folder", lambda: tmp_path)
    paths = []
    for content in (b"some text", b"other text", b"some text"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        stdin, named = read("--data", "-", "named.txt").data
        assert stdin.read_bytes() == content and named == Path("named.txt")
        paths.append(stdin)
    assert paths[0] == paths[2] != paths[1]


def test_a_file_as_the_first_word_is_text(tmp_path):
    (tmp_path / "my.txt").write_text("text")
    assert refusal(str(tmp_path / "my.txt")).endswith(f"--data {tmp_path / 'my.txt'}")


def test_help_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as leaving:
        read("gpt2", "--seed", "5", "--help")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())  # lines are folded to the width of the terminal
    assert "Pretrain a GPT" in words
    assert "Total number of optimizer steps. (default: 19000)" in words
    assert "(default: gpt2)" in words
    assert not set("│╭╮╰╯\x1b") & set(text)


def leave(main, capsys) -> tuple[int, str]:
    """The exit code and standard error of an entry point."""
    with pytest.raises(SystemExit) as leaving:
        cli.run(main)
    return leaving.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "stderr"),
    [
        (lambda argv: None, 0, ""),
        (lambda argv: 1, 1, ""),
        (raising(SystemExit(0)), 0, ""),
        (raising(UserError("no such thing")), 2, "error: no such thing\n"),
        (raising(Failed("it diverged")), 1, "error: it diverged\n"),
        (raising(OSError(errno.ENOENT, "missing", "gone.txt")), 2, "error: gone.txt: missing\n"),
        (raising(OSError(errno.ENOSPC, "full")), 2, "error: full\n"),
    ],
)
def test_exit_codes(main, code, stderr, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_discard_stdout", lambda: None)
    assert leave(main, capsys) == (code, stderr)


@pytest.mark.parametrize("take", [lambda: np.empty(2**60, np.int8), lambda: jnp.zeros(10**14)])
def test_too_little_memory_is_one_line(take, capsys):
    """NumPy's error, and XLA's."""
    code, stderr = leave(lambda argv: take(), capsys)
    assert code == 2 and stderr.startswith("error: out of memory: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "bug")])
def test_our_own_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


# In a process of its own: pipes, caches, memory, Ctrl-C.


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


def python(code: str, **environment: str) -> str:
    """Standard output of `code` in a process of its own, which must succeed."""
    done = run_python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("program", ["train.py", "-m gpt.bench"])
def test_without_the_environment_it_says_what_to_type(program):
    """With -S Python finds none of the packages."""
    done = run_python("-S", *program.split(), "--help")
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
    said = python(WHERE, HOME=str(tmp_path / "file"), XDG_CACHE_HOME="", TMPDIR=home)
    folder, existed = said.split()
    assert Path(folder).parent == tmp_path and existed == "True"
    assert not Path(folder).exists()


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    """Where the user wants them, else in the cache folder, unless that is turned off. Numbers of 64
    bits are: Muon's state would have some, and no checkpoint has a digest for them."""
    monkeypatch.setattr(cli, "_keep_freed_memory", lambda: None)
    monkeypatch.setattr(cli, "cache_folder", lambda: tmp_path)
    for environment, cache, kept, enabled in (
        ({"JAX_COMPILATION_CACHE_DIR": "mine"}, True, "mine", None),
        ({}, True, str(tmp_path / "xla"), None),
        ({}, False, None, "false"),
    ):
        monkeypatch.setattr(cli.os, "environ", environment | {"JAX_ENABLE_X64": "1"})
        cli.prepare_jax(cache=cache)
        assert cli.os.environ["JAX_ENABLE_X64"] == "0"
        assert cli.os.environ.get("JAX_COMPILATION_CACHE_DIR") == kept
        assert cli.os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == enabled


OURS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


@pytest.mark.parametrize(
    ("environment", "plugin", "expected"),
    [
        ({}, "jax_plugins", OURS),
        ({"XLA_FLAGS": "--xla_dump_to=x"}, "jax_plugins", f"--xla_dump_to=x {OURS}"),
        ({"JAX_PLATFORMS": "cpu"}, "jax_plugins", None),
        ({}, "libtpu", None),
    ],
)
def test_determinism_is_asked_of_xla_where_a_gpu_may_be(environment, plugin, expected, monkeypatch):
    """Beside the user's own flags. Other platforms need none."""
    monkeypatch.setattr(cli.os, "environ", dict(environment))
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == plugin or None)
    cli.make_deterministic()
    assert cli.os.environ.get("XLA_FLAGS") == expected


def test_flags_that_contradict_determinism_are_refused(monkeypatch):
    environment = {"XLA_FLAGS": "--xla_dump_to=x --xla_gpu_autotune_level=4"}
    monkeypatch.setattr(cli.os, "environ", environment)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == "jax_plugins" or None)
    with pytest.raises(UserError, match="XLA_FLAGS has --xla_gpu_autotune_level=4: drop one"):
        cli.make_deterministic()


BEFORE_THE_BACKEND = """
import sys
import train
from gpt import cli

def make_deterministic():
    from jax._src import xla_bridge
    print(xla_bridge.backends_are_initialized())
    sys.exit()

cli.make_deterministic = make_deterministic
train.main(sys.argv[1:])
"""


def test_xla_is_asked_before_jax_starts_its_backend(finished):
    """Which reads the flags once. The settings of a run that continues are read before."""
    done = run_python("-c", BEFORE_THE_BACKEND, "--resume", finished, "--deterministic")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("told", "plugin", "expected"),
    [
        ("cpu", "libtpu", True),
        (None, None, True),
        (None, "jax_plugins", False),
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
    done = run_python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


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
