"""The plan as lines: what each program takes of a device, and what it sends to the others."""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh
from rich.console import Console

from gpt import flops, sharding
from gpt.config import TrainConfig
from gpt.data import tokenizers
from gpt.errors import is_out_of_memory
from gpt.plan import arithmetic, chips, collectives, programs
from gpt.training import memory_plan, train_state, train_step

MB = 10**6
PUBLIC_SIZES = {"gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}
WHAT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "reduce"}
WHAT |= {collectives.SUMMED_GATHER: "gather"}
DONE = {"gather": "gathered", "reduce": "reduced"}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, on one device. Bytes; FLOPs by cost.py.

    `given`: what it is handed (weights, optimizer, cache, tokens); `need`: that and temporaries.
    `read`: what it must at least read of its memory, 0 where FLOPs decide.
    """

    name: str
    seconds: float
    given: int
    need: memory_plan.Need
    flops: float
    found: list[collectives.Collective]
    predicted: dict[arithmetic.Row, int]
    read: int = 0

    @property
    def sent(self) -> float:
        """Bytes that leave the device."""
        return sum(one.sent_bytes for one in self.found)

    def moved(self) -> Counter:
        """Bytes by (what, axes), as arithmetic.py counts them."""
        rows = Counter()
        for one in self.found:
            rows[WHAT.get(one.kind, one.kind), one.axes] += one.n_bytes * one.turns
        return rows

    def work_seconds(self, chip: chips.Chip) -> float:
        """Time of the arithmetic at the chip's peak, or of its reads where they take longer."""
        return max(self.flops / chip.flops, self.read / chip.memory_rate)

    def efficiency(self, chip: chips.Chip) -> tuple[float, float]:
        """Share of the time in which a chip works: if nothing of what is sent hides behind the
        work, and if all that can does."""
        work, links = self.work_seconds(chip), self.sent / chip.ring_rate
        return work / (work + links), work / max(work, links)


def settle(config: TrainConfig, accum_is_free: bool, n_shards: int, dtype: str) -> TrainConfig:
    """The config with what text, machine and mesh would decide: vocabulary, types and, where the
    user left it open, micro-batches that the devices can share."""
    sizes = PUBLIC_SIZES | {"bpe": config.vocab_size, "char": config.model.vocab_size}
    name = config.tokenizer
    size = sizes.get(name) or tokenizers.create(name, lambda: (), config.vocab_size).n_vocab
    config = config.completed(size, dtype)
    parts = range(config.grad_accum, 0, -1) if accum_is_free else ()
    shared = (n for n in parts if config.batch_size % (n * n_shards) == 0)
    return dataclasses.replace(config, grad_accum=next(shared, config.grad_accum))


def timed(compile_program: Callable, *args) -> tuple[jax.stages.Compiled, float]:
    """What a function compiles, and the seconds that it took."""
    begun = time.perf_counter()
    return compile_program(*args), time.perf_counter() - begun


def train_program(config: TrainConfig, mesh: Mesh, tpu: bool) -> Program:
    """The training step."""
    compiled, seconds = timed(train_step.compile_train_step, config, mesh)
    tokens = config.batch_size * config.window
    total = flops.train_flops_per_token(config.model) * tokens / mesh.size
    found = collectives.find(compiled.as_text(), mesh.shape)
    predicted = arithmetic.training(config, mesh, tpu)
    given, need = compiled.memory_analysis().argument_size_in_bytes, memory_plan.need_of(compiled)
    return Program("training step", seconds, given, need, total, found, predicted)


def prefill_program(config: TrainConfig, mesh: Mesh) -> Program:
    """Reading prompts."""
    c, rows, length = config.model, programs.count_rows(mesh), programs.prompt_length(config.model)
    compiled, seconds = timed(programs.compile_prefill, c, mesh)
    total = rows * flops.forward_flops(c, length, n_logit_positions=1) / mesh.size
    predicted = arithmetic.decoding(c, mesh, rows, length)
    return sampling_program("prefill", compiled, seconds, total, predicted, mesh)


def decode_program(config: TrainConfig, mesh: Mesh) -> Program:
    """One step with the cache of a full context."""
    c, rows, slots = config.model, programs.count_rows(mesh), config.model.context_length
    compiled, seconds = timed(programs.compile_decode, c, mesh)
    total = rows * flops.forward_flops(c, 1, slots - 1, 1) / mesh.size
    predicted = arithmetic.decoding(c, mesh, rows, 1)
    cache = programs.abstract_cache(c, mesh, rows, slots)
    read = programs.bytes_on_device((programs.abstract_weights(c, mesh), cache))
    return sampling_program("decode step", compiled, seconds, total, predicted, mesh, read)


def sampling_program(name, compiled, seconds, flops, predicted, mesh, read=0) -> Program:
    """A program of sampling."""
    found = collectives.find(compiled.as_text(), mesh.shape)
    given, need = compiled.memory_analysis().argument_size_in_bytes, memory_plan.need_of(compiled)
    return Program(name, seconds, given, need, flops, found, predicted, read)


def state_bytes(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes on one device of weights, optimizer and average, by the table of shardings."""
    state = train_state.abstract_state(config, mesh)
    parts = {"weights": state.params, "optimizer": state.opt_state, "average": state.ema_params}
    return {name: programs.bytes_on_device(tree) for name, tree in parts.items() if tree}


def print_plan(command, preset: TrainConfig) -> int:
    """Plan for what a command line asks; the exit code. UserError for what does not fit.

    `command`: has the flags of train.py as fields; `preset`: where its settings came from.
    """
    tell = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True).print
    chip, asked = None, command.train
    if command.topology:
        devices, chip = chips.topology_devices(command.topology)
    else:
        devices = chips.virtual_devices(command.devices)
    mesh = sharding.make_mesh(asked.mesh, devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    free = asked.grad_accum == preset.grad_accum
    config = settle(asked, free, shards, "bfloat16" if chip else "float32")
    notes = train_step.require_fit(config, mesh)
    stated = command.memory_gb and int(command.memory_gb * 10**9)
    for line in [*about(config, asked, mesh, command), *notes]:
        tell(line)
    for line in lines(config, mesh, chip, stated):
        tell(line)
    return 0


def about(config: TrainConfig, asked: TrainConfig, mesh: Mesh, command) -> Iterator[str]:
    """Lines about the devices and the run."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    where = command.topology or "virtual, of this CPU"
    c, tokens = config.model, config.batch_size * config.window
    yield f"devices        {mesh.size} ({where}): {sizes}"
    yield (
        f"model          {flops.parameters(c):,} parameters, vocabulary {c.vocab_size:,}, products "
        f"in {c.compute_dtype}"
    )
    yield (
        f"batch          {config.batch_size} x {config.window} = {tokens:,} tokens a step, in "
        f"{config.grad_accum} micro-batch(es)"
    )
    if config.grad_accum != asked.grad_accum:
        rows = config.batch_size // asked.grad_accum
        yield (
            f"note: the preset's {asked.grad_accum} micro-batches of {rows} sequences do not "
            f"divide among the devices; train with --grad-accum {config.grad_accum}"
        )


def lines(config: TrainConfig, mesh: Mesh, chip, stated: int | None) -> Iterator[str]:
    """Lines about each program, as soon as it is compiled. `stated`: bytes of a device."""
    limit = stated or (chip.memory if chip else None)
    state = state_bytes(config, mesh)
    listed = ", ".join(f"{name} {n / MB:,.1f} MB" for name, n in state.items())
    yield f"on a device    {listed}"
    for make in (
        lambda: train_program(config, mesh, tpu=chip is not None),
        lambda: prefill_program(config, mesh),
        lambda: decode_program(config, mesh),
    ):
        try:
            program = make()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield f"does not fit: {shortfall(str(error))}"
            continue
        yield from memory_lines(program, limit)
        yield from traffic_lines(program)
        if chip:
            yield expectation(program, chip)


def shortfall(message: str) -> str:
    """What a compiler says of the memory that is missing."""
    told = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", message)
    told = told or re.search(r"Used (\S+) of (\S+) hbm", message)
    return f"takes {told[1]}iB of {told[2]}iB" if told else message.splitlines()[0]


def memory_lines(program: Program, limit: int | None) -> Iterator[str]:
    """What a program takes of a device."""
    need = program.need
    room = "" if limit is None else f" of {limit / MB:,.0f} MB: "
    room += "" if limit is None else "fits" if need.total <= limit else "DOES NOT FIT"
    yield (
        f"{program.name:14} given {program.given / MB:,.1f} MB, temporaries "
        f"{need.temporary / MB:,.1f} MB, in all {need.total / MB:,.1f} MB{room}; "
        f"{program.flops / 1e9:,.2f} GFLOP; compiled in {program.seconds:.0f} s"
    )


def traffic_lines(program: Program) -> Iterator[str]:
    """What a program sends, beside what arithmetic expects."""
    moved = program.moved()
    for what, axes in sorted({*moved, *program.predicted}, key=lambda row: -moved[row]):
        ours = [c for c in program.found if (WHAT.get(c.kind, c.kind), c.axes) == (what, axes)]
        kinds = Counter()
        for one in ours:
            kinds[one.kind] += one.turns
        listed = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
        expected = program.predicted.get((what, axes), 0) / MB
        yield (
            f"  {DONE.get(what, what)} over {'+'.join(axes) or 'none'}: "
            f"{moved[what, axes] / MB:,.3f} MB, predicted {expected:,.3f} MB ({listed})"
        )


def expectation(program: Program, chip: chips.Chip) -> str:
    """How well a chip would be used, by its vendor's figures."""
    least, most = program.efficiency(chip)
    work, links = program.work_seconds(chip), program.sent / chip.ring_rate
    return (
        f"  expected: work {work * 1e3:,.3f} ms at the chip's peak, {program.sent / MB:,.1f} MB "
        f"sent in {links * 1e3:,.3f} ms: efficiency {least:.0%} (no overlap) to {most:.0%}"
    )
