"""Time the kernels of the training step, prefill and decode loop on this machine's GPU, next to
what the plan expects of each.

    python benchmarks/gpu_kernels.py --preset gpt2 --batch-size 32 --trace FOLDER

Each program runs under JAX's profiler, whose kernel times are then added up by instruction.
"Expected" is what `train.py --dry-run --topology` would say of the same program: the slowest of a
kernel's bytes, FLOPs and launch, at the card's data-sheet rates. The difference between a run and
its kernels is the time in which the GPU ran no kernel.

Inside CUDA graphs the profiler does not name the instructions; to see them all, disable graphs with
XLA_FLAGS=--xla_gpu_enable_command_buffer=
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpt import cli
from gpt.config import Remat
from gpt.errors import UserError, require

N_LISTED = 25
N_RUNS = 5  # under the profiler, after as many without it


@dataclass(frozen=True)
class Command:
    """What to measure."""

    preset: str = "gpt2"
    """The model, with random weights."""
    batch_size: int = 32
    """Rows per training step."""
    remat: Remat = "none"
    """What the backward pass recomputes."""
    rows: int = 8
    """Prompts per batch."""
    prompt_length: int = 1024
    """Tokens per prompt in prefill. The decode loop starts after an eighth as many."""
    programs: str = "train,prefill,decode"
    """Programs to measure, separated by commas."""
    trace: Path | None = None
    """Keep the profiler's files in this folder."""
    json: Path | None = None
    """Write all figures to this file."""


def main(argv: list[str]) -> int:
    """Measure each program; return the exit code."""
    command = cli.parse(Command, argv, program="gpu_kernels.py", description=__doc__)
    cli.prepare_jax(cache=False)
    import jax

    from gpt.plan.devices import CHIPS

    kind = jax.devices()[0].device_kind
    names = [name for name in CHIPS if name.upper() in kind.upper()]
    if not names:
        raise UserError(f"no data sheet for {kind}: expected one of {', '.join(CHIPS)}")
    chip = CHIPS[names[0]]

    makers = {"train": training_step, "prefill": prefill, "decode": decode_loop}
    chosen = command.programs.split(",")
    unknown = [name for name in chosen if name not in makers]
    require(not unknown, f"--programs {command.programs}: expected some of {', '.join(makers)}")
    results = []
    for name in chosen:
        compiled, run = makers[name](command)
        figures = {"program": name, **measure(command, name, compiled, run, chip)}
        results.append(figures)
        show(figures)
        if command.json:
            described = {"device": kind, "jax": jax.__version__, "programs": results}
            command.json.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return 0


def training_step(command: Command):
    """The compiled step, and a function that runs it."""
    from gpt import sharding
    from gpt.bench.measure import random_batch
    from gpt.config import ONE_DEVICE
    from gpt.presets import preset
    from gpt.training import step_functions, train_state

    config = preset(command.preset)
    config = dataclasses.replace(
        config,
        model=config.model.computing_in("bfloat16"),
        dtype="bfloat16",
        batch_size=command.batch_size,
        grad_accum=1,
        remat=command.remat,
        unroll=command.remat == "none",
    )
    mesh = sharding.make_decoding_mesh(ONE_DEVICE)
    step = step_functions.compile_train_step(config, mesh)
    state = train_state.make_state(config, mesh)
    tokens_ABU = random_batch(config, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, tokens_ABU)
        return metrics

    return step, run


def decoding(command: Command, n_tokens: int):
    """Model config, weights, and the result of reading prompts of `n_tokens`."""
    from gpt.bench import __main__ as bench
    from gpt.bench import measure

    args = bench.Args(preset=command.preset, dtype="bfloat16")
    _, config, _, make_params = bench.choose_model(args)
    params = make_params()
    cell = measure.Cell(command.rows, n_tokens, config.context_length - n_tokens)
    state, sampling = measure.read_prompts(config, params, cell, measure.Times())
    return config, params, state, sampling


def prefill(command: Command):
    """The compiled prefill, and a function that runs it."""
    import jax.numpy as jnp
    import numpy as np

    from gpt.sampling import engine

    config, params, *_ = decoding(command, 8)
    shape = (command.rows, command.prompt_length)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=shape))
    tokens_BT = tokens_BT.astype(jnp.int32)
    n_B = jnp.full(command.rows, command.prompt_length, jnp.int32)
    compiled = engine.prefill.lower(config, params, tokens_BT, n_B).compile()
    return compiled, lambda: compiled(params, tokens_BT, n_B)


def decode_loop(command: Command):
    """The compiled decode loop for one chunk, with a full-context cache, and a function that runs
    it, always from the same position."""
    import jax
    import jax.numpy as jnp

    from gpt.sampling import generate
    from gpt.sampling.decode_loop import decode_chunk

    config, params, state, sampling = decoding(command, command.prompt_length // 8)
    state = generate.grow(config, state, config.context_length)
    active_B = jnp.ones(command.rows, bool)
    chunk = generate.chunk_size(jax.default_backend())
    compiled = decode_chunk.lower(config, params, state, sampling, active_B, size=chunk).compile()
    length_B, remaining_B = jax.device_get((state.cache.length_B, state.remaining_B))

    def run():
        nonlocal state
        cache = dataclasses.replace(state.cache, length_B=jnp.asarray(length_B))
        state = dataclasses.replace(state, cache=cache, remaining_B=jnp.asarray(remaining_B))
        state, sampled = compiled(params, state, sampling, active_B)
        return sampled

    return compiled, run


def measure(command: Command, name: str, compiled, run: Callable, chip) -> dict:
    """Seconds of a run and of each kind of kernel in it, with what the plan expects."""
    import jax

    from gpt import sharding
    from gpt.config import ONE_DEVICE
    from gpt.hardware import timed
    from gpt.plan import kernels, program_text

    # Without the profiler.
    timed(run)
    seconds = [timed(run)[0] for _ in range(N_RUNS)]

    # With the profiler.
    with tempfile.TemporaryDirectory() as temporary:
        folder = command.trace / name if command.trace else Path(temporary)
        with jax.profiler.trace(folder):
            for _ in range(N_RUNS):
                jax.block_until_ready(run())
        (file,) = folder.rglob("*.xplane.pb")
        traced = read_trace(file)

    # The plan of the same program, by the names of its instructions.
    mesh = sharding.make_decoding_mesh(ONE_DEVICE)
    text = program_text.read(compiled.as_text())
    if command.trace:
        (command.trace / f"{name}.hlo").write_text(compiled.as_text(), encoding="utf-8")
    planned = kernels.find(text, chip, mesh)
    expected = {one.name: one for one in planned}
    kinds: dict[tuple[str, str], dict] = {}
    for (instruction, kernel), (n_runs, spent) in traced.items():
        plan = expected.get(instruction)
        line = plan.line if plan else ""
        short = instruction.split(".")[0] or kernel
        one = kinds.setdefault((short, line), {"name": short, "line": line, "kernel": kernel})
        one["runs"] = one.get("runs", 0) + n_runs / N_RUNS
        one["seconds"] = one.get("seconds", 0) + spent / N_RUNS
        one.setdefault("instructions", set()).add(instruction)
    for one in kinds.values():
        found = [expected[i] for i in one.pop("instructions") if i in expected]
        one["expected_seconds"] = sum(kernel.seconds for kernel in found)
        one["moved_bytes"] = sum(kernel.moved_bytes for kernel in found)
        one["flops"] = sum(kernel.flops for kernel in found)
    longest = sorted(kinds.values(), key=lambda one: -one["seconds"])
    return {
        "seconds": statistics.median(seconds),
        "seconds_of_repeats": seconds,
        "kernel_seconds": sum(one["seconds"] for one in longest),
        "kernels": sum(one["runs"] for one in longest),
        "expected_seconds": sum(one.seconds for one in planned),
        "expected_kernels": sum(one.runs for one in planned),
        "top": longest[:N_LISTED],
    }


def read_trace(file: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """Runs and seconds of all kernels, by instruction ("" if unknown) and kernel name."""
    import jax

    runs: Counter[tuple[str, str]] = Counter()
    seconds: Counter[tuple[str, str]] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                key = str(stats.get("hlo_op", "")), event.name
                runs[key] += 1
                seconds[key] += event.duration_ns / 1e9
    return {key: (runs[key], seconds[key]) for key in runs}


def show(figures: dict) -> None:
    """Print one program's figures."""
    print(
        f"{figures['program']}: {figures['seconds'] * 1e3:,.3f} ms a run, of which kernels "
        f"{figures['kernel_seconds'] * 1e3:,.3f} ({figures['kernels']:,.0f} of them); expected "
        f"{figures['expected_seconds'] * 1e3:,.3f} ({figures['expected_kernels']:,})"
    )
    print("  measured  expected    runs         MB     GFLOP  kernel, and its line")
    for one in figures["top"]:
        print(
            f"{one['seconds'] * 1e3:10.3f}{one['expected_seconds'] * 1e3:10.3f}{one['runs']:8,.0f}"
            f"{one['moved_bytes'] / 1e6:11,.1f}{one['flops'] / 1e9:10,.1f}  {one['name']}"
            f"  {one['line']}  {one['kernel'][:60]}"
        )


if __name__ == "__main__":
    cli.run(main)
