"""What every entry point shares: reading flags, leaving well, preparing JAX.

An entry point's room: train.py, sample.py, gpt/report.py, gpt/tour.py and the gpt/*/__main__.py use
it, nothing else does. It knows no model and imports neither JAX nor NumPy, so that `--help` is
quick.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import importlib.util
import io
import os
import platform
import re
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from gpt import distributed
from gpt.errors import Failed, UserError, is_out_of_memory, require

Kind = TypeVar("Kind")
USER_OS_ERRORS = (FileNotFoundError, FileExistsError, PermissionError)
USER_OS_ERRORS += (IsADirectoryError, NotADirectoryError)
NO_NUMBER = (  # Python's words for what is none, and a user's
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number"),
    (r"could not convert string to float: (.*)", r"\1 is no number"),
)
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)


def parse(
    kind: type[Kind],
    argv: list[str],
    *,
    program: str,
    description: str,
    default: Kind | None = None,
) -> Kind:
    """`argv` read into the dataclass `kind`; what it does not mention comes from `default`.

    `--help` prints every flag and leaves with exit code 0. Raises UserError, one line that names
    the flag, for what cannot be read; the dataclasses' own refusals pass through.
    """
    given = {} if default is None else {"default": default}
    read = functools.partial(tyro.cli, kind, prog=program, description=description, **given)
    helping = "--help" in argv or "-h" in argv
    if helping:  # what else stands there would be missing from the help, but for a subcommand
        several = typing.get_origin(kind) in (typing.Union, types.UnionType)
        argv = [*argv[: int(several and argv[0] not in ("-h", "--help"))], "--help"]
    width = contextlib.nullcontext() if helping else environment("COLUMNS", "10000")
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), width:
            return read(args=argv)
    except SystemExit as leaving:
        if leaving.code:
            raise UserError(_sentence(err.getvalue(), program)) from None
        print("\n".join(line.rstrip() for line in _without_none(out.getvalue()).splitlines()))
        raise


def require_full_words(argv: list[str]) -> None:
    """UserError for an empty value: as a path it is this folder, where "$OUT" is not set."""
    bare = [word for word in argv if not word or (word.startswith("--") and word.endswith("="))]
    require(not bare, f"{(bare or [''])[0] or 'a flag'} has an empty value: fill it in, or drop it")


def peek(kind: type, argv: list[str], name: str, *, default: Any) -> Any:
    """What `argv` gives for the field `name` of `kind`, before any value is checked.

    For a field, such as the preset, that decides the defaults of all the others. Where `argv`
    cannot be read the field's default is returned: `parse` will say what is wrong.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_unchecked)
    words = [word for word in argv if word not in ("-h", "--help")]
    silence = io.StringIO()
    try:
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            return tyro.cli(kind, args=words, default=default, registry=registry)[name]
    except SystemExit:
        return getattr(default, name)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line and leave with its exit code, 0 for None.

    A user's mistake, or too little memory, is one `error: ` line on standard error and exit code 2,
    what Failed the same with 1; Ctrl-C is 130, or what the KeyboardInterrupt holds; a reader that
    closes the pipe (`| head`) ends the program quietly. Anything else is our bug and keeps its
    traceback.
    """
    try:
        try:
            code = main(sys.argv[1:]) or 0
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be answered
    except UserError as error:
        code = _refuse(str(error))
    except Failed as error:
        code = _refuse(str(error), code=1)
    except BrokenPipeError:
        _drop_stdout()
        code = 0
    except OSError as error:
        if not (isinstance(error, USER_OS_ERRORS) or error.errno in USER_ERRNOS):
            raise
        _drop_stdout()
        code = _refuse(_explain(error))
    except KeyboardInterrupt as stopped:
        sys.stderr.flush()
        # At once: the end of the interpreter crashes on a compilation broken off.
        os._exit(*stopped.args or (130,))
    except Exception as error:
        if is_out_of_memory(error):
            code = _refuse("out of memory: ask for less at once, or for a smaller model")
        elif not distributed.is_connected():
            raise
        else:
            traceback.print_exc()
            code = 1
    _leave(code)


def interpreter() -> str:
    """`python` as it is typed here: by its path where its environment lies below this folder and
    is not activated, so that what is printed can be pasted."""
    path, here = Path(sys.executable), Path.cwd()
    hidden = path.is_relative_to(here) and os.environ.get("VIRTUAL_ENV") != sys.prefix
    return str(path.relative_to(here)) if hidden else "python"


def cache_folder() -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/gpt-jax` or `~/.cache/gpt-jax`.

    Made when asked for. Where the home cannot be written, a folder that lasts as long as the
    process.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "gpt-jax"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home at all
        pass
    return Path(_temporary_cache().name)


def prepare_jax(cache: bool = True) -> None:
    """Set JAX up through the environment; call it before JAX is imported.

    What the user has set stays. `cache` keeps compiled programs between runs; without it none is
    read or written, wherever the user keeps them.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter, not its errors
    if cache:
        _keep_programs()
    else:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if _only_cpu():
        _keep_memory()


def prepare_absent() -> None:
    """Set JAX up to compile for devices that are not here; call it before JAX is imported.

    This CPU alone is used. The rest keeps the TPU's compiler, where there is one, from looking for
    the machine that it would be part of.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken: several may


@contextlib.contextmanager
def environment(name: str, value: str):
    """The environment with `name` set to `value` for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _without_none(text: str) -> str:
    """tyro's help without the None that a flag is when it is not given, its columns kept."""
    text = re.sub(r"\{None\}\|(\S+)(  )", lambda m: m[1] + " " * len("{None}|") + m[2], text)
    return re.sub(r"\s*\(default:\s+(None)?\)", "", text.replace("{None}|", ""))


def _sentence(complaint: str, program: str) -> str:
    """One line that says what tyro says in sections under a title: the mistake, then a hint."""
    parts = re.split(r"^ *-{3,} *$", complaint, flags=re.MULTILINE)
    said = " ".join(parts[min(1, len(parts) - 1)].split()).removeprefix("Error parsing ")
    for words, ours in NO_NUMBER:
        said = re.sub(words, ours, said)
    flags = re.findall(r"^ *(--\S.*?) *$", parts[2], re.MULTILINE) if len(parts) > 3 else []
    lead = "perhaps you meant" if "Perhaps" in complaint else "expected"
    hint = f"; {lead} {' or '.join(flags)}" if flags else ""
    return f"{said.rstrip('.')}{hint}; see {program} --help"


def _unchecked(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A rule for tyro that reads a dataclass into a dict, past its own checks."""
    if not dataclasses.is_dataclass(info.type):
        return None
    fields = tuple(
        StructFieldSpec(name, hint, getattr(info.default, name))
        for name, hint in typing.get_type_hints(info.type, include_extras=True).items()
    )
    return StructConstructorSpec(dict, fields)


def _refuse(message: str, code: int = 2) -> int:
    """Print a user's mistake, or another's; return its exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def _leave(code: int) -> NoReturn:
    """End with an exit code; after a mistake without the other processes, who do not know of it:
    the interpreter's end would wait for them."""
    if code in (1, 2) and distributed.is_connected():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _explain(error: OSError) -> str:
    """What the system refused, with the path where it is known."""
    path = f"{error.filename}: " if error.filename is not None else ""
    return f"{path}{error.strerror or error}"


def _drop_stdout() -> None:
    """Let nothing more reach standard output, so that leaving cannot fail on it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    """A cache for this process alone, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="gpt-jax-")


def _keep_programs() -> None:
    """Keep every compiled program on disk: even a small one costs more to compile than to read."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _only_cpu() -> bool:
    """Whether JAX will run on the CPU: told so, or without a plug-in for anything else."""
    told = os.environ.get("JAX_PLATFORMS")
    if told:
        return told == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _keep_memory() -> None:
    """Tell glibc to keep freed memory: XLA frees and maps its temporaries at each step.

    Page faults were a third of a training step. One arena for all threads would be faster still
    by 5 %, but what other threads keep would lie between the temporaries, and GPT-2's 3 GB grow to
    6 within ten steps. Any other C library is left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)
