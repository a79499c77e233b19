"""What all entry points share: command-line parsing, exit codes, JAX setup.

Only entry points import this file: train.py, sample.py, gpt/report.py, gpt/tour.py and the
gpt/*/__main__.py. It imports neither JAX nor NumPy, which keeps `--help` quick.
"""

import ast
import atexit
import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib.util
import io
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

if importlib.util.find_spec("tyro") is None:
    print(
        "error: this project's dependencies are not installed: run `make setup` once, "
        "then `source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gpt.errors import Failed, UserError, is_out_of_memory, require
from gpt.wording import counted

Args = TypeVar("Args")

# File-system errors that a user causes and can fix.
USER_OS_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)

HOW_DEVICES_ARE_CHOSEN = (
    "JAX uses the accelerator it was installed for (pip install -e '.[cuda]' or '.[tpu]'), else "
    "the CPU; put JAX_PLATFORMS=cpu before the command to stay on the CPU"
)


def parse(
    kind: type[Args],
    argv: list[str],
    *,
    program: str,
    description: str,
    default: Args = tyro.MISSING_NONPROP,
    guesses: dict[str, str] | None = None,
) -> Args:
    """Parse `argv` into the dataclass `kind`; fields it does not mention come from `default`.

    `--help` prints every flag and exits with code 0. Raises a one-line UserError for flags that
    cannot be parsed; the dataclasses' own UserErrors pass through. `guesses` is for `suggest`.
    """
    # tyro's help omits flags that were given, so pass --help alone, after any subcommand.
    has_subcommands = typing.get_origin(kind) in (typing.Union, types.UnionType)
    subcommand = argv[:1] if has_subcommands and argv and not argv[0].startswith("-") else []
    help_argv = [*subcommand, "--help"]

    def run_tyro(argv: list[str]) -> Args:
        """Parse `argv`; what tyro prints, help or a message, ends up in `printed`."""
        with constructors, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return tyro.cli(kind, prog=program, description=description, args=argv, default=default)

    printed = io.StringIO()
    try:
        asks_for_help = "--help" in argv or "-h" in argv
        return run_tyro(help_argv if asks_for_help else argv)
    except SystemExit as leaving:
        if not leaving.code:
            print(printed.getvalue(), end="")
            raise
        message = printed.getvalue()

    # Lines of dashes separate a title, the problem, and perhaps flags with their help.
    _title, problem, *_ = re.split(r"\n *-{5,} *\n", message)
    sentence = reword(" ".join(problem.split()))
    unknown = re.match(r"Unrecognized options: (--[^,=]+)", sentence)
    if unknown:
        with contextlib.suppress(SystemExit):
            run_tyro(help_argv)
        pattern = r"^  (--[\w.-]+)(?:, (--[\w.-]+))?"
        lines = re.findall(pattern, printed.getvalue(), re.MULTILINE)
        flags = [flag for line in lines for flag in line if flag]
        guess = suggest(unknown[1], flags, guesses or {})
        sentence = f"unknown flag {unknown[1]}{guess}"
    raise UserError(f"{sentence}; see {program} --help")


# The tyro messages that `reword` knows.
UNKNOWN_WORDS = re.compile(r"Unrecognized options: ([^-].*)")
MISSING = re.compile(r"Missing from .*?: (\S+) (.*?)\.? \(required\)")
NO_VALUE = re.compile(r"Missing value for argument '(.*?)'\. Expected (\d+)")
NO_CHOICE = re.compile(r"invalid choice '(.*?)' for argument '(.*?)'\. .*? of (\(.*\))")
NO_PAIR = re.compile(r"Error parsing (--\S+): Failed to parse key-value pairs")
NO_NUMBER = re.compile(r"Error parsing (--\S+): .*(int\(\)|to float).*?: ('.*?')")
NO_WORD = re.compile(r"does not match choices \('(\w+)',\)")  # with NO_NUMBER: "auto", or "None"


def reword(problem: str) -> str:
    """A tyro message about the command line, in plainer words if its form is known."""
    if found := UNKNOWN_WORDS.match(problem):
        return f"unexpected argument {found[1]}: each value needs its own flag before it"
    if found := MISSING.match(problem):
        return f"{found[1]} is missing: {found[2]}"
    if found := NO_VALUE.match(problem):
        return f"{found[1]} needs {counted(int(found[2]), 'value')} after it"
    if found := NO_CHOICE.match(problem):
        word, argument = found[1], found[2]
        choices = [choice for choice in ast.literal_eval(found[3]) if choice != "None"]
        subject = f"{argument} is {word!r}" if argument.startswith("--") else repr(word)
        close = difflib.get_close_matches(word, choices, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        return f"{subject}: expected one of {', '.join(choices)}{guess}"
    if found := NO_PAIR.match(problem):
        return f"{found[1]} needs two numbers after it, the first an integer"
    if found := NO_NUMBER.match(problem):
        expected = ["a number" if found[2] == "to float" else "an integer"]
        expected += [word for word in NO_WORD.findall(problem) if word != "None"]
        return f"{found[1]} is {found[3]}: expected {' or '.join(expected)}"
    return problem.rstrip(".")


def suggest(flag: str, known: list[str], guesses: dict[str, str]) -> str:
    """What the user may have meant by an unknown flag, as the rest of a sentence.

    `guesses` maps a flag of ours, or a sentence of advice, to the names that other programs use,
    separated by spaces.
    """
    name = flag.removeprefix("--").rpartition(".")[2].replace("_", "-").lower()
    meant = next((ours for ours, theirs in guesses.items() if name in theirs.split()), None)
    if meant and not meant.startswith("--"):
        return f": {meant}"
    if meant is None:
        # `n-layers` is enough for `--model.n-layers`, and so is a flag's prefix.
        # If two flags share their last word, prefer --data to --mesh.data.
        nested_first = sorted(known, key=lambda one: -one.count("."))
        by_last_word = {one.removeprefix("--").rpartition(".")[2]: one for one in nested_first}
        begin_alike = [word for word in by_last_word if word.startswith(name)]
        close = begin_alike or difflib.get_close_matches(name, by_last_word, n=2, cutoff=0.8)
        meant = " or ".join(by_last_word[word] for word in close[:3])
    return f": did you mean {meant}?" if meant else ""


constructors = ConstructorRegistry()


@constructors.primitive_rule
def _parse_path(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """How tyro reads a path: `~` is expanded, since shells leave it alone in `--out=~/runs`.
    UserError for a URL such as gs://bucket/run, which would be taken for a local folder."""

    def read(words: list[str]) -> Path:
        (word,) = words
        require(
            not re.match("[a-z][a-z0-9+.-]*://|www[.]", word),
            f"{word} is a URL: fetch it first (curl -LO {word}), or mount its storage "
            "(gcsfuse, s3fs, rclone), and give the path of the file or folder",
        )
        return Path(os.path.expanduser(word))

    if type_info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda instance: isinstance(instance, Path),
        str_from_instance=lambda path: [str(path)],
    )


def flags_given(argv: list[str]) -> set[str]:
    """The flags on the command line as field names, such as `model.n_layers` or `overwrite`."""
    given = set()
    for word in argv:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            given.add(name.replace(".no_", ".").removeprefix("no_"))
    return given


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line and exit with the code it returns (None: 0).

    A user's mistake, or running out of memory, prints one line starting with `error: ` and exits
    with code 2; Failed does the same with code 1. Ctrl-C exits with 130, or with the code in the
    KeyboardInterrupt. If the reader closes the pipe (`| head`), the program ends quietly. Anything
    else is a bug in this project and keeps its traceback.
    """
    # Never fail on a character that the locale lacks: escape output that cannot be encoded, and
    # read input that cannot be decoded as U+FFFD.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)

    try:
        try:
            code = main(sys.argv[1:]) or 0
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be handled
    except BrokenPipeError:
        _discard_stdout()
        code = 0
    except KeyboardInterrupt as interrupt:
        sys.stderr.flush()
        # Exit immediately: Python's shutdown crashes if a compilation was interrupted.
        os._exit(interrupt.args[0] if interrupt.args else 130)
    except Exception as error:
        message = explain(error)
        if message is None:
            if not _is_connected():
                raise
            traceback.print_exc()
            code = 1
        else:
            if isinstance(error, OSError):  # perhaps from standard output
                _discard_stdout()
            print(f"error: {message}", file=sys.stderr)
            code = 1 if isinstance(error, Failed) else 2
    if code in (1, 2) and _is_connected():
        # The other processes do not know, and an orderly shutdown would wait for them.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """The line shown to the user for an error; None for a bug in this project."""
    if isinstance(error, UserError | Failed):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: use a smaller batch, a shorter text or a smaller model"
    if isinstance(error, USER_OS_ERRORS) or getattr(error, "errno", None) in USER_ERRNOS:
        reason = error.strerror or str(error)
        return reason if error.filename is None else f"{error.filename}: {reason}"
    return None


def _is_connected() -> bool:
    """Whether this process is training together with others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _discard_stdout() -> None:
    """Discard the rest of standard output, so that exiting cannot fail on it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(script: str, *words: str) -> str:
    """A shell command to paste. Python is `python`, or its relative path if its environment is
    inside the current folder and not activated."""
    python = Path(sys.executable)
    here = Path.cwd()
    if python.is_relative_to(here) and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        return shlex.join([str(python.relative_to(here)), script, *words])
    return shlex.join(["python", script, *words])


@functools.cache
def cache_folder() -> Path:
    """The cache folder, created if missing: `$XDG_CACHE_HOME/gpt-jax`, else `~/.cache/gpt-jax`; if
    that is not writable, a temporary folder that lasts as long as the process."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpt-jax"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home folder is known
        pass
    folder = Path(tempfile.mkdtemp(prefix="gpt-jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def keep_stdin() -> Path:
    """Save standard input to a file that a later run finds again: the same text always has the same
    name in the cache folder."""
    content = sys.stdin.buffer.read()
    path = cache_folder() / "stdin" / f"{hashlib.sha256(content).hexdigest()[:16]}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def prepare_jax(cache: bool = True) -> None:
    """Configure JAX through the environment; call this before JAX is imported.

    Variables the user has set are kept, except JAX_ENABLE_X64: none of our dtypes has 64 bits, and
    it would widen some numbers. `cache` keeps compiled programs on disk between runs; without it
    none are read or written, wherever the user keeps them.
    """
    environ = os.environ
    environ["JAX_ENABLE_X64"] = "0"
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's errors, not its warnings
    if cache:
        # Even a small program takes longer to compile than to read from disk.
        environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
        environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    else:
        environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if _only_cpu():
        _keep_freed_memory()


# According to xla.proto, the first flag rules out operations whose result depends on thread order,
# and also choosing kernels by timing them; the second flag states the latter explicitly.
DETERMINISTIC_FLAGS = {"--xla_gpu_deterministic_ops": "true", "--xla_gpu_autotune_level": "0"}


def make_deterministic() -> None:
    """Add the XLA_FLAGS that make GPU programs give the same result from run to run. Call this
    before JAX starts its backend, which reads the flags once.

    UserError if XLA_FLAGS contradicts them.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    rules_out_gpus = platforms and not re.search("cuda|rocm|gpu", platforms)
    if rules_out_gpus or importlib.util.find_spec("jax_plugins") is None:
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = dict(word.split("=", 1) for word in flags if "=" in word)
    for flag, value in DETERMINISTIC_FLAGS.items():
        found = given.get(flag, value)
        require(
            found == value,
            f"--deterministic sets {flag}={value}, but XLA_FLAGS has {flag}={found}: drop one of "
            "them",
        )
        flags.append(f"{flag}={value}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def prepare_absent() -> None:
    """Configure JAX to compile for absent devices; call this before JAX is imported.

    Only the CPU is used. The TPU settings keep the TPU compiler, if installed, from looking for the
    machine it would be part of.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so several may


def _only_cpu() -> bool:
    """Whether JAX will run on the CPU, by choice or for lack of any other plug-in."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, because XLA frees and remaps its temporaries at each step.

    Page faults took a third of a training step. One arena for all threads would be another 5 %
    faster, but memory held by other threads would then lie between the temporaries, and GPT-2's
    3 GB would grow to 6 within ten steps. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)
