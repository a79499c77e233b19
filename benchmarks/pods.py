"""Make the table of docs/parallelism.md: three models on TPU slices, compiled without a TPU.

    python benchmarks/pods.py [ROW ...]        needs libtpu, no TPU; some minutes per row

ROW is a model and a number of chips, such as gpt2-xl/64 (default: all). The TPU's own compiler
compiles the training step on one mesh, and prefill and decode on the mesh that suits sampling.
Results go to benchmarks/results/pods.json; the table of all results there is printed.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from pathlib import Path

from gpt import cli

cli.prepare_absent()
sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import predicted_bytes  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from gpt import flops, sharding  # noqa: E402
from gpt.config import AUTO, MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from gpt.errors import is_out_of_memory, require  # noqa: E402
from gpt.plan import absent, devices, programs  # noqa: E402
from gpt.plan.programs import PlannedProgram  # noqa: E402
from gpt.presets import PRESETS  # noqa: E402
from gpt.training import memory_plan, step_functions  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "pods.json"
SLICES = {8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}
LLAMA = ModelConfig(
    32_000,
    2048,
    n_layers=32,
    n_heads=32,
    d_model=4096,
    d_ff=11_008,
    positions="rope",
    norm="rms",
    mlp="swiglu",
    bias=False,
    tied=False,
)  # Touvron et al. 2023, table 2
MODELS = {
    "gpt2": PRESETS["gpt2"],
    "gpt2-xl": PRESETS["gpt2-xl"],
    "llama-7b": TrainConfig(model=LLAMA, batch_size=512, grad_accum=AUTO, remat=AUTO),
}
# (data, fsdp, tensor) for training, and for sampling
MESHES = {
    "gpt2/8": ((8, 1, 1), (8, 1, 1)),
    "gpt2/64": ((64, 1, 1), (64, 1, 1)),
    "gpt2/256": ((256, 1, 1), (256, 1, 1)),
    "gpt2-xl/8": ((1, 8, 1), (8, 1, 1)),
    "gpt2-xl/64": ((1, 64, 1), (64, 1, 1)),
    "gpt2-xl/256": ((4, 64, 1), (256, 1, 1)),
    "llama-7b/8": ((1, 8, 1), (1, 1, 8)),
    "llama-7b/64": ((1, 64, 1), (8, 1, 8)),
    "llama-7b/256": ((4, 64, 1), (32, 1, 8)),
}
HEAD = (
    "| model, chips | mesh | state, MB | training step, MB of 16,000 | sent, MB | work, ms"
    " | links, ms | efficiency | prefill 8 rows, MB | decode step, MB | at best, ms |"
)


def figures(program: PlannedProgram, mesh: Mesh, chip: devices.Chip, predicted: Counter) -> dict:
    """One program as JSON values, in seconds and bytes per chip, or how far it is from fitting."""
    begun = time.perf_counter()
    try:
        compiled = program.compile()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"does_not_fit": absent.shortfall(str(error))}
    compile_seconds = time.perf_counter() - begun

    # Time to compute at the chip's peak, and to send everything over one ring: without overlap
    # the two add up; with full overlap the longer one counts.
    plan = absent.describe(program, compiled, mesh, chip)
    totals = [total for kinds in plan["sent"].values() for total in kinds.values()]
    sent = sum(total["bytes"] for total in totals)
    work, links = plan["floor_seconds"], sent / chip.link_bytes_per_second
    moved = predicted_bytes.moved(plan, mesh.shape)
    return {
        "given": plan["given_bytes"],
        "total": memory_plan.need_of(compiled).total,
        "flops": program.flops,
        "sent": sent,
        "moved": [[*row, n] for row, n in moved.items()],
        "predicted": [[*row, n] for row, n in predicted.items()],
        "work_seconds": work,
        "link_seconds": links,
        "efficiency": [work / (work + links), work / max(work, links)],
        "compile_seconds": compile_seconds,
    }


def measure(row: str) -> dict:
    """A row's programs and sizes, as JSON values."""
    model, n = row.split("/")
    found, chip = devices.topology_devices(SLICES[int(n)])
    training, sampling = (sharding.make_mesh(MeshConfig(*sizes), found) for sizes in MESHES[row])

    # This tokenizer leaves the model's vocabulary size alone.
    config = dataclasses.replace(MODELS[model], tokenizer="char")
    config = absent.completed(config, "bfloat16")
    config = memory_plan.resolve_auto(config, training, chip.usable_bytes)
    step_functions.require_even_split(config, training)
    train, *_ = programs.planned(config, training)
    _, prefill, decode, _ = programs.planned(config, sampling)

    c, n_rows = config.model, programs.count_rows(sampling)
    n_prompt = programs.prompt_length(c)
    by_step = predicted_bytes.training(config, training, tpu=True)
    by_prefill = predicted_bytes.decoding(c, sampling, n_rows, n_prompt)
    by_decode = predicted_bytes.decoding(c, sampling, n_rows, 1)
    return {
        "parameters": flops.parameters(c),
        "grad_accum": config.grad_accum,
        "state": absent.state_bytes(config, training),
        "train": figures(train, training, chip, by_step),
        "prefill": figures(prefill, sampling, chip, by_prefill),
        "decode": figures(decode, sampling, chip, by_decode),
        "jax": jax.__version__,
    }


def taken(program: dict) -> str:
    """MB used on a chip, or how far the program is from fitting."""
    return program.get("does_not_fit") or f"{program['total'] / 1e6:,.0f}"


def line(row: str, found: dict) -> str:
    """One line of the table."""
    train, decode = found["train"], found["decode"]
    sizes = " x ".join(str(n) for n in MESHES[row][0])
    cells = [row.replace("/", ", "), sizes, f"{sum(found['state'].values()) / 1e6:,.0f}"]
    cells += [taken(train)]
    if "sent" in train:
        least, most = train["efficiency"]
        cells += [f"{train['sent'] / 1e6:,.0f}", f"{train['work_seconds'] * 1e3:,.0f}"]
        cells += [f"{train['link_seconds'] * 1e3:,.0f}", f"{least:.0%} to {most:.0%}"]
    else:
        cells += [""] * 4
    cells += [taken(found["prefill"]), taken(decode)]
    best = decode.get("work_seconds", 0) + decode.get("link_seconds", 0)
    return "| " + " | ".join([*cells, f"{best * 1e3:.2f}" if best else ""]) + " |"


def main(argv: list[str]) -> None:
    """Measure the named rows, or all; write the results and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(MESHES)}")
    rows = parser.parse_args(argv).rows or list(MESHES)
    unknown = ", ".join(row for row in rows if row not in MESHES)
    require(not unknown, f"{unknown}: expected rows of {', '.join(MESHES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in rows:
        results[row] = measure(row)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(line(row, results[row]), file=sys.stderr)
    print(HEAD, "|---" * HEAD.count(" |") + "|", sep="\n")
    for row in MESHES:
        if row in results:
            print(line(row, results[row]))


if __name__ == "__main__":
    cli.run(main)
