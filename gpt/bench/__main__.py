"""Measure prefill and decode separately, as fractions of this machine's measured peak.

    python -m gpt.bench runs/tiny
    python -m gpt.bench --preset gpt2 --prompt-lengths 128,512 --batch-sizes 1,8

Prints a card and a table. If standard output is a pipe or a file, its last line is the whole result
as JSON.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli, terminal
from gpt.config import BY_PLATFORM, DTYPES, ONE_DEVICE, Dtype, MeshConfig, Quantize, Remat, optional
from gpt.errors import not_negative, positive, require, require_file_path
from gpt.presets import preset

PROMPT_LENGTHS = [128, 512]
NEW_TOKENS = 64


@dataclass(frozen=True)
class Args:
    """What to measure."""

    checkpoint: Annotated[tyro.conf.Positional[Path | None], optional("[CHECKPOINT]")] = None
    """A run's folder, as made by train.py."""
    preset: Annotated[str | None, optional("NAME", "tiny")] = None
    """Random weights of this preset instead of a checkpoint."""
    prompt_lengths: Annotated[
        str | None, optional("N,N,...", "those of 128,512 that fit the context")
    ] = None
    """Tokens per prompt, separated by commas."""
    batch_sizes: Annotated[
        str | None, optional("N,N,...", "1,8; with --train the preset's micro-batch")
    ] = None
    """Rows per sampled batch or training step, separated by commas."""
    new_tokens: Annotated[int | None, optional("INT", "64, or half of a shorter context")] = None
    """Tokens sampled per row; prefill yields the first."""
    train: bool = False
    """Measure the preset's training step at each batch size, instead of sampling."""
    grad_accum: int = 1
    """With --train: micro-batches per batch."""
    remat: Annotated[Remat | None, optional("{none,products,blocks}", "the preset's")] = None
    """With --train: what the backward pass recomputes."""
    repeats: int = 5
    """Measurements per cell, after one run to compile."""
    dtype: Annotated[Dtype | None, optional(DTYPES, BY_PLATFORM)] = None
    """Data type to compute in."""
    quantize: Annotated[Quantize | None, optional("{int8}")] = None
    """Store matrices and embedding tables as int8."""
    top_p: Annotated[float | None, optional("FLOAT", "greedy")] = None
    """Sample at temperature 1 with this top-p, as sample.py does with --top-p."""
    speculate: int = 0
    """Also measure speculative decoding with this many proposals per step, as sample.py does with
    --speculate."""
    draft: Annotated[Path | None, optional("RUN")] = None
    """With --speculate: run folder of a smaller model that makes the proposals, in place of lookup
    in the text."""
    prompt_file: Annotated[
        Path | None, optional("FILE", "what the model itself writes without a prompt")
    ] = None
    """With --speculate: text to cut into prompts of the measured lengths."""
    mesh: MeshConfig = ONE_DEVICE
    verbose: bool = False
    """Also show compile time, host-driven decode steps and peak memory."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Also write the result to this file."""
    plot: Annotated[Path | None, optional("FILE")] = None
    """Plot prefill and decode under the machine's roofline, to this .png or .svg."""
    compare: Annotated[tuple[Path, Path] | None, optional("OLD NEW")] = None
    """Compare two --json results, older first, without measuring."""
    fail_if_slower: Annotated[str | None, optional("SHARE")] = None
    """With --compare: exit with code 1 if any figure is slower by more than this share, such as 5%,
    and by more than the noise."""
    formulas: bool = False
    """Print how FLOPs and bytes are counted, without measuring."""


def main(argv: list[str]) -> int:
    """Measure every cell and show the result; return the exit code."""
    args = cli.parse(Args, argv, program="python -m gpt.bench", description=__doc__)
    check(args)
    if args.formulas:
        from gpt import flops

        print(flops.describe())
        return 0
    if args.compare:
        return compare(*args.compare, args.fail_if_slower)

    cli.prepare_jax(cache=False)  # a cached program would hide its compile time
    result = measure_training(args) if args.train else measure_sampling(args)
    if args.speculate > 0:
        add_speculation(args, result)

    from rich.console import Console

    from gpt.bench import report

    del result["incomplete"]
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    Console(width=report.WIDTH).print(report.card(result, args.verbose))
    rows = [report.cell_row(cell, args.verbose) for cell in result["cells"]]
    Console(width=report.TABLE_WIDTH).print(report.make_table(rows))
    if args.speculate > 0:
        rows = [report.speculation_row(cell) for cell in result["cells"]]
        Console(width=report.TABLE_WIDTH).print(report.make_table(rows))
    if args.plot:
        report.draw_roofline(result, args.plot)
    if not sys.stdout.isatty():
        print(json.dumps(result))
    return 0


def check(args: Args) -> None:
    """Raise UserError for invalid arguments, before anything is loaded."""
    require(
        args.checkpoint is None or args.preset is None,
        "a checkpoint and --preset cannot be combined: choose one",
    )
    positive("--repeats", args.repeats)
    positive("--grad-accum", args.grad_accum)
    not_negative("--speculate", args.speculate)
    require(
        args.new_tokens is None or args.new_tokens >= 2,
        f"--new-tokens {args.new_tokens}: expected at least 2, since decoding begins with the "
        "second token",
    )
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            require_file_path(flag, path)
    require(
        args.plot is None or args.plot.suffix in (".png", ".svg"),
        f"--plot {args.plot}: expected a name that ends in .png or .svg",
    )
    if args.train:
        for_sampling = {
            "a checkpoint": args.checkpoint,
            "--plot": args.plot,
            "--new-tokens": args.new_tokens,
            "--prompt-lengths": args.prompt_lengths,
            "--quantize": args.quantize,
            "--top-p": args.top_p,
            "--speculate": args.speculate,
        }
        given = [flag for flag, value in for_sampling.items() if value]
        require(not given, f"--train measures a preset's training step: drop {' and '.join(given)}")
    require(
        args.top_p is None or 0 < args.top_p <= 1,
        f"--top-p {args.top_p}: expected a probability above 0 and at most 1",
    )
    require(
        args.speculate == 0 or args.checkpoint is not None,
        "--speculate needs a trained model, since text from random weights cannot be predicted: "
        "give a run's folder",
    )
    for flag, is_given, needed, is_there in (
        ("--grad-accum", args.grad_accum > 1, "--train", args.train),
        ("--remat", args.remat, "--train", args.train),
        ("--draft", args.draft, "--speculate", args.speculate),
        ("--prompt-file", args.prompt_file, "--speculate", args.speculate),
        ("--fail-if-slower", args.fail_if_slower, "--compare", args.compare),
    ):
        require(not is_given or is_there, f"{flag} needs {needed}: add it, or drop {flag}")


def measure_sampling(args: Args) -> dict:
    """Measure prefill and decode in every cell, smallest first; return the result."""
    from gpt import hardware
    from gpt.bench import measure
    from gpt.sharding import on_mesh

    name, config, mesh, make_params = choose_model(args)
    prompt_lengths, new_tokens = choose_lengths(args, config.context_length)
    int8 = args.quantize is not None
    cells = [
        measure.Cell(batch, length, new_tokens, int8, args.top_p)
        for batch in parse_sizes("--batch-sizes", args.batch_sizes or "1,8")
        for length in prompt_lengths
    ]
    measure.require_memory(config, cells[-1])

    # The machine's ceilings, then the cells.
    terminal.note("measuring matrix products and reading memory")
    n_bytes, _ = measure.step_cost(config, cells[-1])
    ceilings = hardware.ceilings(n_bytes, config.compute_dtype)
    result = measure.describe_machine(name, config, ceilings, args.repeats, int8)
    if args.top_p is not None:
        result["top_p"] = args.top_p
    params = make_params()
    with on_mesh(mesh):
        for cell in cells:
            sizes = f"batch {cell.batch}, prompt {cell.prompt_length}"
            terminal.note(f"{sizes}: compiling prefill and decode")
            measured = measure.measure_cell(config, params, cell, args.repeats, ceilings)
            add_cell(args, result, measured)
    return result


def add_speculation(args: Args, result: dict) -> None:
    """Measure decoding with and without proposals in every cell, and add the figures to
    `result`."""
    from gpt.bench import measure
    from gpt.sampling.language_model import load

    options = {"dtype": args.dtype, "mesh": args.mesh, "quantize": args.quantize}
    model = load(args.checkpoint, **options)
    if args.draft is not None:
        model = model.with_draft(load(args.draft, **options))
    for cell in result["cells"]:
        n_rows, n_tokens = cell["batch"], cell["prompt_length"]
        terminal.note(f"batch {n_rows}, prompt {n_tokens}: {args.speculate} proposals")
        prompts = choose_prompts(args, model, n_rows, n_tokens)
        cell["speculation"] = measure.measure_speculation(
            model, prompts, cell, args.speculate, args.repeats, result["ceilings"]
        )
    result["speculation_prompts"] = str(args.prompt_file or "written by the model")


def choose_prompts(args: Args, model, n_rows: int, n_tokens: int) -> list[list[int]]:
    """Token ids of realistic prompts: successive pieces of --prompt-file, or text that the model
    writes without a prompt, with one seed per row."""
    from gpt.sampling.settings import Settings

    if args.prompt_file is None:
        settings = Settings(max_new_tokens=n_tokens, ignore_eos=True, num_samples=n_rows)
        return [one.token_ids for one in model.generate([""], settings)]
    text = terminal.read_text("--prompt-file", args.prompt_file)
    ids = model.tokenizer.encode_ordinary(text)
    require(
        len(ids) >= n_rows * n_tokens,
        f"--prompt-file {args.prompt_file} has {len(ids):,} tokens: expected at least "
        f"{n_rows * n_tokens:,}, {n_tokens} for each of {n_rows} rows; give a longer text or "
        "smaller --batch-sizes or --prompt-lengths",
    )
    return [ids[row * n_tokens : (row + 1) * n_tokens] for row in range(n_rows)]


def measure_training(args: Args) -> dict:
    """Measure the training step at every batch size, smallest first; return the result."""
    from gpt import flops, hardware, sharding
    from gpt.bench import measure
    from gpt.training import memory_plan

    name = args.preset or "tiny"
    config = preset(name)
    dtype = args.dtype or hardware.default_dtype()
    config = dataclasses.replace(config, model=config.model.computing_in(dtype), dtype=dtype)
    mesh = sharding.make_decoding_mesh(args.mesh)
    trained = memory_plan.resolve_auto(config, mesh)
    micro_batch = str(trained.batch_size // trained.grad_accum)

    terminal.note("measuring matrix products and reading memory")
    ceilings = hardware.ceilings(flops.weight_bytes(config.model), dtype)
    result = measure.describe_machine(name, config.model, ceilings, args.repeats)
    for batch_size in parse_sizes("--batch-sizes", args.batch_sizes or micro_batch):
        terminal.note(f"batch {batch_size}: compiling the training step")
        sized = dataclasses.replace(config, batch_size=batch_size, grad_accum=args.grad_accum)
        if args.remat is not None:
            sized = dataclasses.replace(sized, remat=args.remat, unroll=args.remat == "none")
        add_cell(args, result, measure.measure_train_step(sized, mesh, args.repeats, ceilings))
    return result


def add_cell(args: Args, result: dict, cell: dict) -> None:
    """Show and save a cell as soon as it is measured, so that stopping the benchmark loses only the
    cell in progress."""
    from gpt.bench import report

    result["cells"].append(cell)
    columns = report.cell_row(cell, verbose=True)
    terminal.note("; ".join(f"{' '.join(name.split())}: {text}" for name, text in columns))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")


def choose_model(args: Args):
    """The model's name, config and mesh, and a function that makes its weights."""
    import jax

    from gpt import hardware, sharding
    from gpt.model import transformer
    from gpt.sampling.language_model import for_decoding, load

    if args.checkpoint:
        loaded = load(args.checkpoint, dtype=args.dtype, mesh=args.mesh, quantize=args.quantize)
        name = f"{args.checkpoint}, step {loaded.step}"
        return name, loaded.config, loaded.mesh, lambda: loaded.params

    name = args.preset or "tiny"
    config = preset(name).model.computing_in(args.dtype or hardware.default_dtype())
    mesh = sharding.make_decoding_mesh(args.mesh)
    transformer.require_even_split(config, mesh, fsdp=False)

    def make_params() -> dict:
        # Two programs: in a single one, the compiler would generate each layer's weights
        # separately, which took more than a minute to compile for gpt2 on a GPU.
        shapes, axes = transformer.abstract(config), transformer.logical_axes(config)
        shardings = sharding.state_shardings(mesh, axes, shapes, sharding.DECODING_RULES)
        init = jax.jit(partial(transformer.init, config), out_shardings=shardings)
        return for_decoding(config, mesh, args.quantize, init(jax.random.key(0)))

    return f"{name}, random weights", config.for_sampling(), mesh, make_params


def choose_lengths(args: Args, context: int) -> tuple[list[int], int]:
    """Prompt lengths and number of new tokens. Defaults are chosen to fit `context`; raises
    UserError if the user's values do not fit."""
    if args.prompt_lengths is None:
        new_tokens = args.new_tokens or min(NEW_TOKENS, context // 2)
        lengths = [n for n in PROMPT_LENGTHS if n + new_tokens <= context]
        lengths = lengths or [max(context - new_tokens, 1)]
    else:
        lengths = parse_sizes("--prompt-lengths", args.prompt_lengths)
        new_tokens = args.new_tokens or min(NEW_TOKENS, max(context - lengths[-1], 2))
    require(
        lengths[-1] + new_tokens <= context,
        f"prompts of {lengths[-1]} tokens and {new_tokens} new ones exceed the model's context of "
        f"{context}: choose fewer with --prompt-lengths and --new-tokens",
    )
    return lengths, new_tokens


def parse_sizes(flag: str, text: str) -> list[int]:
    """`8,1,8` as [1, 8]; UserError unless all are positive integers."""
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = [0]
    require(
        sizes[0] >= 1,
        f"{flag} {text}: expected positive integers separated by commas: {flag} 1,8",
    )
    return sizes


def compare(old_path: Path, new_path: Path, fail_if_slower: str | None) -> int:
    """Print what changed between two results; return 1 if a figure is slower than allowed."""
    from rich.console import Console

    from gpt.bench import report

    allowed = report.parse_share(fail_if_slower or "0%")
    old, new = report.read_result(old_path), report.read_result(new_path)
    changes = report.changes_between(old, new)
    is_same_machine, line = report.compare_machines(old, new)
    print(line)
    if not is_same_machine:
        print(
            "no verdict: the cause may be the program or the machine; close other programs and "
            "measure both again, one right after the other"
        )
    for name in ("precision", "weights", "model", "jax", "incomplete"):
        if old.get(name) != new.get(name):
            terminal.note(f"note: {name}: {old.get(name)} before, {new.get(name)} now")

    rows = []
    for one in changes:
        row = [("cell", one.cell), ("figure", one.name), ("new / old", f"{one.ratio:.3f}")]
        row.append(("spread", f"±{one.spread:.3f}"))
        if is_same_machine:
            row.append(("verdict", one.verdict))
        rows.append(row)
    Console(width=report.TABLE_WIDTH).print(report.make_table(rows, justify="left"))
    require(
        is_same_machine or fail_if_slower is None,
        "--fail-if-slower cannot decide: the machine has changed between the two results",
    )
    if fail_if_slower is None:
        return 0

    slow = [one for one in changes if one.verdict == "slower" and one.ratio > 1 + allowed]
    for one in slow:
        terminal.note(f"{one.cell}: {one.name} is slower by {one.ratio - 1:.0%}")
    return 1 if slow else 0


if __name__ == "__main__":
    cli.run(main)
