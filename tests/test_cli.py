"""The part every entry point shares: flags, errors, exit codes, caches, JAX's surroundings."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from gpt import cli
from gpt.config import TrainConfig
from gpt.errors import UserError
from gpt.presets import PRESETS, preset

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Command:
    """A command like train.py's."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")] = "tiny"
    """Settings to start from."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: PRESETS["tiny"]
    )
    data: tuple[Path, ...] = ()
    """Text files."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where to stop."""
    overwrite: bool = False
    """Start afresh."""


@dataclass(frozen=True)
class Required:
    """A command like sample.py's."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder."""
    temperature: float = 1.0
    """0 is greedy."""


def read(*argv: str) -> Command:
    name = cli.peek(Command, list(argv), "preset", default=Command())
    return cli.parse(
        Command,
        list(argv),
        program="train.py",
        description="Pretraining.",
        default=Command(preset=name, train=preset(name)),
    )


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as refused:
        read(*argv)
    return str(refused.value)


@pytest.mark.parametrize(
    "argv",
    [
        ("gpt2", "--steps", "5"),
        ("--steps", "5", "gpt2"),
        ("--steps=5", "gpt2"),
        ("--overwrite", "gpt2", "--steps", "5"),
        ("--data", "a", "b", "--steps", "5", "gpt2"),
    ],
)
def test_the_preset_may_stand_anywhere(argv):
    command = read(*argv)
    assert (command.preset, command.train.steps, command.train.model.n_layers) == ("gpt2", 5, 12)


@pytest.mark.parametrize("argv", [(), ("--tokenizer", "gpt2"), ("--data", "gpt2", "--seed", "1")])
def test_a_flags_value_is_no_preset(argv):
    assert read(*argv).preset == "tiny"
    assert read(*argv).train.model == PRESETS["tiny"].model


def test_settings_are_checked_against_the_chosen_preset():
    assert read("gpt2", "--model.n-heads", "6").train.model.head_width == 128
    assert "model.d_model 768 is not divisible" in refusal("--model.n-heads", "5", "gpt2")


def test_an_unknown_preset_lists_the_known_ones():
    assert refusal("gpt-2").startswith("no preset named 'gpt-2': choose one of tiny, ")


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_hyphens_and_underscores_are_one(flag):
    assert read(flag, "64").train.batch_size == 64
    assert read("--model.n_layers", "2", "--mesh.data", "4").train.mesh.data == 4


def test_repeated_and_listed_values():
    command = read("--stop", "a", "--stop=--b", "--data", "x", "y", "--overwrite")
    assert command.stop == ("a", "--b")
    assert command.data == (Path("x"), Path("y"))
    assert command.overwrite


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--stepz", "5"), ("--stepz", "perhaps you meant --steps INT")),
        (("--steps", "many"), ("--steps", "'many'", "expected --steps INT")),
        (("--steps",), ("--steps", "Missing value")),
        (("--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
        (("--mesh.data", "x"), ("--mesh.data", "'x'")),
        (("tiny", "extra"), ("extra",)),
        (("--steps", "a" * 150), ("a" * 150, "expected --steps INT")),
    ],
)
def test_an_unreadable_flag_is_one_line(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words)
    assert "see train.py --help" in message
    assert "\n" not in message
    assert "---" not in message


WORDS = st.text() | st.sampled_from(["--", "-h", "-", "--steps", "--no-remat", "--data=", "@x"])


@given(st.lists(WORDS, max_size=4))
def test_wild_arguments_raise_nothing_but_user_errors(argv):
    try:
        read("--seed", "1", *argv)
    except UserError as error:
        assert str(error)
    except SystemExit as leaving:
        assert leaving.code == 0 and "-h" in argv


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_the_config_refuses_what_the_parser_can_read(number):
    assert refusal("--learning-rate", number).startswith(f"learning_rate is {float(number)}: exp")


def test_errors_keep_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    refusal("--stepz", "5")
    assert os.environ["COLUMNS"] == "77"
    monkeypatch.delenv("COLUMNS")
    refusal("--stepz", "5")
    assert "COLUMNS" not in os.environ


@pytest.mark.parametrize(
    "argv", [("gpt2", "--help"), ("-h", "gpt2"), ("--seed", "5", "--help", "gpt2")]
)
def test_help_shows_the_presets_defaults_in_plain_columns(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        read(*argv)
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())  # lines are folded to the terminal's width
    assert "Pretraining." in words
    assert "Optimizer steps of the whole run. (default: 19000)" in words
    assert "PRESET Settings to start from. (default: gpt2)" in words
    assert not set("│╭╮╰╯\x1b") & set(text)
    assert text == "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_a_command_without_defaults():
    words = {"program": "sample.py", "description": ""}
    made = cli.parse(Required, ["runs/tiny", "--temperature", "0"], **words)
    assert made == Required(Path("runs/tiny"), 0.0)
    with pytest.raises(UserError, match="CHECKPOINT"):
        cli.parse(Required, [], **words)


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
        (raising(UserError("no such thing")), 2, "error: no such thing\n"),
        (raising(SystemExit(0)), 0, ""),
    ],
)
def test_exit_codes(main, code, stderr, capsys):
    assert leave(main, capsys) == (code, stderr)


@pytest.mark.parametrize(
    ("number", "path"),
    [
        (errno.ENOENT, "gone.txt"),
        (errno.EACCES, "closed.txt"),
        (errno.EISDIR, "folder"),
        (errno.ENOTDIR, "file/below"),
        (errno.EROFS, "disc"),
        (errno.ENAMETOOLONG, "long"),
    ],
)
def test_a_refused_file_is_named(number, path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
    code, stderr = leave(raising(OSError(number, os.strerror(number), path)), capsys)
    assert (code, stderr) == (2, f"error: {path}: {os.strerror(number)}\n")


def test_a_full_disk_has_no_path(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
    code, stderr = leave(raising(OSError(errno.ENOSPC, "No space left on device")), capsys)
    assert (code, stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "bug"), TypeError("bug")])
def test_our_own_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


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


WHERE = "from gpt.cli import cache_folder; print(cache_folder(), cache_folder().is_dir())"


def test_the_cache_folder(tmp_path):
    folder = tmp_path / "own"
    assert python(WHERE, XDG_CACHE_HOME=str(folder)) == f"{folder / 'gpt-jax'} True"
    home = str(tmp_path)
    at_home = python(WHERE, HOME=home, XDG_CACHE_HOME=None)
    assert at_home == f"{tmp_path / '.cache' / 'gpt-jax'} True"
    assert python(WHERE, HOME=home, XDG_CACHE_HOME="") == at_home


def test_without_a_home_the_cache_lives_as_long_as_the_process(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = python(WHERE, HOME=str(tmp_path / "file"), XDG_CACHE_HOME=None, TMPDIR=str(tmp_path))
    folder, existed = said.split()
    assert Path(folder).parent == tmp_path and existed == "True"
    assert not Path(folder).exists()


COMPILE = """
from gpt.cli import prepare_jax
prepare_jax()
import jax
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))).item())
"""


def test_compiled_programs_are_kept(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    assert python(COMPILE, **environment) == "262144.0"
    assert list((tmp_path / "gpt-jax" / "xla").iterdir())


def test_programs_are_not_kept_where_that_is_turned_off(tmp_path):
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    mine |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    python(COMPILE.replace("prepare_jax()", "prepare_jax(cache=False)"), **mine)
    assert not (tmp_path / "mine").exists()
    python(COMPILE, **mine)
    assert list((tmp_path / "mine").iterdir())


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(cli, "_keep_memory", lambda: None)
    monkeypatch.setattr(cli.os, "environ", {"JAX_COMPILATION_CACHE_DIR": "mine"})
    cli.prepare_jax()
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


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
    assert cli.interpreter() == "python"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert cli.interpreter() == ".venv/bin/python"
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert cli.interpreter() == "python"
