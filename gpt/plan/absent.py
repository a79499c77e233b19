"""Print the plan: what each program takes of a device, and what it sends to the others."""

import dataclasses
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

import jax
from jax.sharding import Mesh
from rich.console import Console

from gpt import flops, sharding
from gpt.config import TrainConfig
from gpt.data import tokenizers
from gpt.errors import is_out_of_memory
from gpt.plan import collectives, devices, programs
from gpt.training import memory_plan, train_state, train_step

MB = 10**6
PUBLIC_SIZES = {"gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}


def print_plan(args, preset_config: TrainConfig) -> int:
    """Compile what `args`, the flags of train.py, ask for, and print what it takes; the exit code.

    `preset_config` is what the flags began from. UserError if the mesh does not suit the model.
    """
    log = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True).print

    # The mesh, and a config as text and machine would complete it.
    limit = None  # bytes of memory of a device
    if args.topology:
        found, limit = devices.topology_devices(args.topology)
    else:
        found = devices.virtual_devices(args.devices)
    if args.memory_gb:
        limit = int(args.memory_gb * devices.GB)
    mesh = sharding.make_mesh(args.train.mesh, found)
    config = completed(args.train, "bfloat16" if args.topology else "float32")
    if args.train.grad_accum == preset_config.grad_accum:
        config = with_micro_batches_that_divide(config, mesh)
    notes = train_step.require_fit(config, mesh)

    for line in [*run_lines(args, config, mesh), *notes]:
        log(line)

    # Each program, as soon as it is compiled.
    for name, compile_program in (
        ("training step", partial(train_step.compile_train_step, config, mesh)),
        ("prefill", partial(programs.compile_prefill, config.model, mesh)),
        ("decode step", partial(programs.compile_decode, config.model, mesh)),
    ):
        begun = time.perf_counter()
        try:
            compiled = compile_program()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log(f"{name:14} DOES NOT FIT: {shortfall(str(error))}")
            continue
        seconds = time.perf_counter() - begun
        log(f"{name:14} {memory_line(compiled, limit)}; compiled in {seconds:.0f} s")
        for line in traffic_lines(compiled, mesh):
            log(line)
    return 0


def completed(config: TrainConfig, default_dtype: str) -> TrainConfig:
    """The config with what the text and the machine would decide: vocabulary and types."""
    sizes = PUBLIC_SIZES | {"bpe": config.vocab_size, "char": config.model.vocab_size}
    n_vocab = sizes.get(config.tokenizer)
    if n_vocab is None:
        n_vocab = tokenizers.create(config.tokenizer, lambda: (), config.vocab_size).n_vocab
    return config.completed(n_vocab, default_dtype)


def with_micro_batches_that_divide(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The config with the largest grad_accum, at most its own, whose micro-batches divide among
    the devices; unchanged if there is none."""
    n_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for grad_accum in range(config.grad_accum, 0, -1):
        if config.batch_size % (grad_accum * n_shards) == 0:
            return dataclasses.replace(config, grad_accum=grad_accum)
    return config


def state_bytes(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes on one device of weights, optimizer state and averaged weights."""
    state = train_state.abstract_state(config, mesh)
    parts = {"weights": state.params, "optimizer": state.opt_state, "average": state.ema_params}
    return {name: programs.bytes_on_device(tree) for name, tree in parts.items() if tree}


def run_lines(args, config: TrainConfig, mesh: Mesh) -> Iterator[str]:
    """Lines about the devices and the run."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    n_tokens = config.batch_size * config.sequence_length
    yield f"devices        {mesh.size} ({args.topology or 'virtual, of this CPU'}): {sizes}"
    yield (
        f"model          {flops.parameters(config.model):,} parameters, vocabulary "
        f"{config.model.vocab_size:,}, products in {config.model.compute_dtype}"
    )
    yield (
        f"batch          {config.batch_size} x {config.sequence_length} = {n_tokens:,} tokens per "
        f"step, in {config.grad_accum} micro-batch(es)"
    )
    if config.grad_accum != args.train.grad_accum:
        n_rows = config.batch_size // args.train.grad_accum
        yield (
            f"note: the preset's {args.train.grad_accum} micro-batches of {n_rows} sequences do "
            f"not divide among the devices; train with --grad-accum {config.grad_accum}"
        )
    parts = state_bytes(config, mesh).items()
    yield "on a device    " + ", ".join(f"{name} {n / MB:,.1f} MB" for name, n in parts)


def memory_line(compiled: jax.stages.Compiled, limit: int | None) -> str:
    """What a program takes of a device, and whether that is within `limit` bytes."""
    given = compiled.memory_analysis().argument_size_in_bytes
    need = memory_plan.need_of(compiled)
    line = (
        f"given {given / MB:,.1f} MB, temporaries {need.temporary / MB:,.1f} MB, in all "
        f"{need.total / MB:,.1f} MB"
    )
    if limit is None:
        return line
    verdict = "fits" if need.total <= limit else "DOES NOT FIT"
    return f"{line} of {limit / MB:,.0f} MB: {verdict}"


def traffic_lines(compiled: jax.stages.Compiled, mesh: Mesh) -> Iterator[str]:
    """What a program sends over each axis of the mesh, or set of axes; most first."""
    sent: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for one in collectives.find(compiled.as_text(), mesh.shape):
        axes = "+".join(one.axes) or "none"
        sent[axes] += one.sent_bytes
        kinds[axes][one.kind] += one.n_runs
    for axes, n_bytes in sent.most_common():
        listed = ", ".join(f"{n} {kind}" for kind, n in kinds[axes].items())
        yield f"  sends over {axes}: {n_bytes / MB:,.3f} MB ({listed})"


def shortfall(message: str) -> str:
    """What a compiler says about missing memory, in few words."""
    sizes = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", message)
    if sizes is None:
        sizes = re.search(r"Used (\S+) of (\S+) hbm", message)
    if sizes is None:
        return message.splitlines()[0]
    return f"takes {sizes[1]}iB of {sizes[2]}iB"
