"""Print the plan: each program's memory per device, what it sends to other devices, and on a GPU
its kernels and expected time."""

import json
import math
import re
import time
from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from rich import filesize

from gpt import sharding
from gpt.config import TrainConfig
from gpt.data import tokenizers
from gpt.errors import is_out_of_memory
from gpt.plan import collectives, devices, kernels, program_text, programs
from gpt.plan.devices import Chip
from gpt.training import memory_plan, run_plan, step_functions, train_state
from gpt.training.metrics import make_console
from gpt.wording import counted

PUBLIC_SIZES = {"gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}
N_LONGEST = 10  # kernels to list


def print_plan(args) -> int:
    """Compile the run of train.py's flags `args`, print its plan, and return the exit code.

    Raises UserError if the mesh does not suit the model.
    """
    log = make_console(quiet=False).print

    # The mesh, and the config completed as the text and the machine would complete it.
    chip = None
    limit = args.memory_bytes
    if args.topology:
        found, chip = devices.topology_devices(args.topology)
        limit = limit or chip.usable_bytes
    else:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
        found = jax.devices()
    mesh = sharding.make_mesh(args.config.mesh, found)
    config = completed(args.config, "bfloat16" if chip else "float32")
    config = memory_plan.resolve_auto(config, mesh, limit or math.inf)
    notes = step_functions.require_even_split(config, mesh)

    # The run, and the arrays kept on each device.
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    state = state_bytes(config, mesh)
    on_device = ", ".join(f"{name} {filesize.decimal(n_bytes)}" for name, n_bytes in state.items())
    log(f"devices        {mesh.size} ({args.topology or 'virtual, of this CPU'}): {sizes}")
    for line in [*run_plan.describe(config, mesh), *notes]:
        log(line)
    log(f"on a device    {on_device}")
    if chip:
        log(
            "times          not measured; from the data sheet: "
            f"{chip.flops_per_second / 1e12:,.0f} TFLOP/s in bfloat16, "
            f"{chip.bytes_per_second / 1e9:,.0f} GB/s of memory, "
            f"{chip.link_bytes_per_second / 1e9:,.0f} GB/s to other devices"
        )
        if chip.is_gpu:
            log(
                "               expected: at these rates; likely: at the shares of them that an "
                "H200 has reached"
            )

    # Each program, as soon as it is compiled.
    described = []
    for program in programs.planned(config, mesh):
        begun = time.perf_counter()
        try:
            compiled = program.compile()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lacking = shortfall(str(error))
            log(f"{program.name:14} DOES NOT FIT: {lacking}")
            described.append({"name": program.name, "does_not_fit": lacking})
            continue
        seconds = time.perf_counter() - begun
        log(f"{program.name:14} {memory_line(compiled, limit)}; compiled in {seconds:.0f} s")
        figures = describe(program, compiled, mesh, chip)
        for line in program_lines(figures):
            log(line)
        described.append(figures)
    if args.json:
        plan = {"topology": args.topology, "state_bytes": state, "programs": described}
        args.json.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return 0


def completed(config: TrainConfig, default_dtype: str) -> TrainConfig:
    """The config with the vocabulary and dtypes that the text and the machine would decide."""
    sizes = PUBLIC_SIZES | {"bpe": config.vocab_size, "char": config.model.vocab_size}
    n_vocab = sizes.get(config.tokenizer)
    if n_vocab is None:
        n_vocab = tokenizers.create(config.tokenizer, lambda: (), config.vocab_size).n_vocab
    return config.completed(n_vocab, default_dtype)


def state_bytes(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes per device of weights, optimizer state and averaged weights."""
    state = train_state.abstract_state(config, mesh)
    parts = {"weights": state.params, "optimizer": state.opt_state, "average": state.ema_params}
    found = {}
    for name, tree in parts.items():
        arrays = jax.tree.leaves(tree)
        if arrays:
            sizes = [a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in arrays]
            found[name] = sum(sizes)
    return found


def describe(
    program: programs.PlannedProgram, compiled: jax.stages.Compiled, mesh: Mesh, chip: Chip | None
) -> dict:
    """One program's figures per device as JSON values. Unknown ones are None: the minimum time on
    virtual devices, and kernels and expected times on anything but a GPU."""
    text = program_text.read(compiled.as_text())
    sent = collectives.find(text, mesh.shape)
    sent_over: dict[str, dict[str, dict]] = {}
    for one in sent:
        kinds = sent_over.setdefault("+".join(one.axes) or "none", {})
        total = kinds.setdefault(one.kind, {"bytes": 0, "runs": 0})
        total["bytes"] += one.sent_bytes
        total["runs"] += one.n_runs

    floor = None
    if chip:
        by_memory = program.read_bytes / chip.bytes_per_second
        floor = max(program.flops / chip.flops_per_second, by_memory)
    totals = dict.fromkeys(("runs", "moved_bytes", "flops", "seconds", "likely_seconds"))
    longest = []
    if chip and chip.is_gpu:
        found = kernels.find(text, chip, mesh, sent)
        totals = {figure: sum(getattr(kernel, figure) for kernel in found) for figure in totals}
        longest = kernels.longest(found, N_LONGEST)
    turns = [text.count_turns(loop) for loop in text.of_kind("while")]

    return {
        "name": program.name,
        "given_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "sent": sent_over,
        "kernels": totals["runs"],
        "moved_bytes": totals["moved_bytes"],
        "flops": totals["flops"],
        "expected_seconds": totals["seconds"],
        "likely_seconds": totals["likely_seconds"],
        "floor_seconds": floor,
        "bound": "MBU" if program.read_bytes else "MFU",
        "data_dependent_loops": turns.count(None),
        "conditionals": len(text.of_kind("conditional")),
        "top": [vars(kernel) for kernel in longest],
    }


def memory_line(compiled: jax.stages.Compiled, limit: float | None) -> str:
    """A program's memory on a device, and whether it fits in `limit` bytes."""
    given = compiled.memory_analysis().argument_size_in_bytes
    need = memory_plan.need_of(compiled)
    line = (
        f"given {filesize.decimal(given)}, temporaries {filesize.decimal(need.temporary)}, in all "
        f"{filesize.decimal(need.total)}"
    )
    if limit is None:
        return line
    verdict = "fits" if need.total <= limit else "DOES NOT FIT"
    return f"{line} of {filesize.decimal(limit)}: {verdict}"


def program_lines(figures: dict) -> Iterator[str]:
    """What a program sends over each set of mesh axes, how long it takes, and its slowest kernels;
    largest first. Sends of less than a kilobyte are left out."""
    over_axes = []
    for axes, kinds in figures["sent"].items():
        listed = ", ".join(f"{total['runs']} {kind}" for kind, total in kinds.items())
        over_axes.append((sum(total["bytes"] for total in kinds.values()), axes, listed))
    for n_bytes, axes, listed in sorted(over_axes, reverse=True):
        if n_bytes >= 1000:
            yield f"  sends over {axes}: {filesize.decimal(n_bytes)} ({listed})"

    floor, expected = figures["floor_seconds"], figures["expected_seconds"]
    if floor is not None:
        yield f"  takes at least {floor * 1e3:,.3f} ms"
    if expected is None:
        return
    loops, branches = figures["data_dependent_loops"], figures["conditionals"]
    for word in ("expected", "likely"):
        seconds = figures[f"{word}_seconds"]
        share = f", {floor / seconds:.0%} {figures['bound']}"
        if loops:
            share = f", with one turn of {counted(loops, 'loop')} whose length depends on data"
        yield f"  {word}: {seconds * 1e3:,.3f} ms{share}"
    yield (
        f"  {figures['kernels']:,} kernels, {figures['moved_bytes'] / 1e9:,.2f} GB, "
        f"{figures['flops'] / 1e12:,.3f} TFLOP, {counted(branches, 'branch')}"
    )
    yield "   expected    likely"
    yield "         ms        ms    runs         MB     GFLOP  kernel, and the line it comes from"
    for kernel in figures["top"]:
        yield (
            f"  {kernel['seconds'] * 1e3:9.3f} {kernel['likely_seconds'] * 1e3:9.3f} "
            f"{kernel['runs']:7,} "
            f"{kernel['moved_bytes'] / 1e6:10,.1f} {kernel['flops'] / 1e9:9,.1f}  "
            f"{kernel['name']}  {kernel['line']}"
        )


def shortfall(message: str) -> str:
    """A compiler's out-of-memory message in a few words."""
    sizes = re.findall(r"\b\d[\d.]*[KMGT]\b", message)
    return f"takes {sizes[0]}iB of {sizes[1]}iB" if len(sizes) > 1 else message.splitlines()[0]
