"""train.py and sample.py, called in this process as a shell would call them; a small text."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from gpt import checkpoint, cli, distributed, hardware
from gpt.training import step_functions, step_timer

ROOT = Path(__file__).parent.parent
SHAPE = [
    *("--tokenizer", "byte", "--seq-len", "16", "--batch-size", "4", "--grad-accum", "2"),
    *("--model.n-layers", "2", "--model.d-model", "16", "--model.n-heads", "2"),
]
STEPS = [
    *("--steps", "12", "--warmup-steps", "2", "--model.dropout", "0.1"),
    *("--learning-rate", "1e-3", "--min-learning-rate", "1e-4"),
]
EVERY = ["--log-every", "1", "--eval-every", "5", "--save-every", "4", "--sample-every", "7"]
TINY = [*SHAPE, *STEPS, *EVERY]
WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "over", "hill", "river", "and", "then")
TIMINGS = ("seconds", *step_timer.SPEED_FIELDS)


@dataclass(frozen=True)
class Done:
    """How a program left, and what it said."""

    code: int
    out: str
    err: str


@functools.cache
def program(name: str) -> ModuleType:
    """A script or an entry point as a module, by its path without `.py`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@functools.cache
def keep_compiled() -> None:
    """Compile each program of these tests once: every run compiles its own steps."""
    jax.config.update("jax_compilation_cache_dir", str(cli.cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # which has noticed, by now, that there was none


# Settings that change nothing in the compiled steps: runs that differ in them share their steps.
NOT_COMPILED = {
    "deterministic": False,
    "tokenizer": "byte",
    "log_every": 1,
    "eval_every": 1,
    "eval_tokens": 0,
    "sample_every": 0,
    "save_every": 1,
    "keep": 1,
    "keep_best": 0,
    "keep_going": False,
    "max_bad_steps": 1,
}
compile_steps_anew = functools.cache(step_functions.compile_steps)


def compile_steps(config, mesh):
    """The steps of a run, compiled once for all runs of these tests that have the same."""
    return compile_steps_anew(dataclasses.replace(config, **NOT_COMPILED), mesh)


step_functions.compile_steps = compile_steps


def call(name: str, *argv) -> Done:
    """`python NAME.py ARGV...`, without a process of its own and the surroundings of one."""
    keep_compiled()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(cli, "prepare_jax", lambda cache=True: None),
        mock.patch.object(distributed, "connect", lambda *_: None),
        # Measuring it takes seconds, and only a fraction of it is shown.
        mock.patch.object(hardware, "matmul_rate", lambda dtype: 1e13),
        mock.patch.object(hardware, "read_rate", lambda n_bytes: 1e11),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run(lambda _: program(name).main([str(word) for word in argv]))
        except SystemExit as leaving:
            return Done(leaving.code, out.getvalue(), err.getvalue())


def run_python(*words, **environment: str) -> subprocess.CompletedProcess:
    """`python WORDS...` as a process of its own, in the project's folder."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def succeed(name: str, *argv) -> Done:
    """Call a program, which must go well."""
    done = call(name, *argv)
    assert done.code == 0, done.err
    return done


def refuse(words: str, name: str, *argv) -> Done:
    """Call a program, which must end with exit code 2 and one error that has these words."""
    done = call(name, *argv)
    assert done.code == 2 and done.err.count("error: ") == 1, done.err
    assert words in done.err[done.err.index("error: ") :]
    return done


def sample(folder, *argv) -> str:
    """What sample.py prints."""
    return succeed("sample", folder, *argv).out


def refuse_constant(word: str):
    raise AssertionError(f"{word} is no JSON")


def objects(folder, *argv) -> list[dict]:
    """What sample.py prints with --json, which must be strict JSON."""
    lines = sample(folder, *argv, "--json").splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def write_text(path: Path, seed: int = 0) -> Path:
    """Two hundred lines of a few English words."""
    chosen = random.Random(seed).choices(WORDS, k=1600)
    lines = [" ".join(chosen[i : i + 8]) for i in range(0, len(chosen), 8)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the content of each file, None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


def stored_shapes(folder: Path, step: int, tree: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a tree of a checkpoint, by name."""
    described = checkpoint.read_record(folder, step)["arrays"][tree]
    return {name: jax.ShapeDtypeStruct(d["shape"], d["dtype"]) for name, d in described.items()}


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by tree and name: weights, optimizer, step."""
    found = {}
    for tree in ("params", "optimizer"):
        shapes = stored_shapes(folder, step, tree)
        restored = checkpoint.restore(folder, step, tree, shapes)
        found |= {f"{tree}/{name}": np.asarray(array) for name, array in restored.items()}
    return found


def bits(tree) -> list[tuple[str, bytes]]:
    """Type and bits of the arrays of a tree."""
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def same_bits(a, b) -> bool:
    """Whether two trees of arrays are alike and hold the same bits."""
    return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)


def read_lines(folder: Path) -> list[dict]:
    """The lines of a run's metrics, without what time they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def same_losses(a: Path, b: Path) -> bool:
    """Whether two runs agree within rounding where both have a line.

    Not their weights: a bias of the keys has no gradient, and Adam makes whole steps of rounding.
    """
    mine, other = ({x["step"]: x["loss"] for x in read_lines(f) if "loss" in x} for f in (a, b))
    both = sorted(mine.keys() & other.keys())
    return len(both) > 3 and np.allclose(
        [mine[n] for n in both], [other[n] for n in both], rtol=1e-5, atol=0
    )
