"""Bytes that a GPU is expected to move per token, with and without speculation.

    python benchmarks/speculative_bytes.py [--preset gpt2] [--topology h100:1] [--speculate 4]

Compiles the decode loop for the GPU, which this machine need not have, with 1 and 8 rows and a
full-context cache: plain, and with looked-up proposals. A step's bytes and time are counted as in
`train.py --dry-run --topology` (docs/parallelism.md). A row that accepts n proposals gains n + 1
tokens in a step.

Needs XLA's compiler for GPUs, which `pip install -e '.[cuda]'` installs.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpt import cli
from gpt.wording import counted


@dataclass(frozen=True)
class Command:
    """What to compile."""

    preset: str = "gpt2"
    """The model, in bfloat16."""
    topology: str = "h100:1"
    """One device, as train.py --dry-run names it."""
    speculate: int = 4
    """Proposals per step."""


def main(argv: list[str]) -> int:
    """Print a line per number of rows; return the exit code."""
    command = cli.parse(Command, argv, program="speculative_bytes.py", description=__doc__)
    import jax
    import jax.numpy as jnp

    from gpt import presets, sharding
    from gpt.config import MeshConfig
    from gpt.plan import absent, devices, programs
    from gpt.sampling import decode_loop, generate, speculation

    found, chip = devices.topology_devices(command.topology)
    mesh = sharding.make_mesh(MeshConfig(), found)
    config = presets.preset(command.preset).model.computing_in("bfloat16").for_sampling()
    chunk = generate.chunk_size(sharding.platform_of(found[0]))
    weights = programs.abstract_weights(config, mesh)

    def count(name: str, function, *args, **static) -> tuple[float, float]:
        """Bytes moved by one step of a chunk, and its expected seconds."""
        with sharding.on_mesh(mesh):
            placed = jax.tree.map(partial(programs.place_rows, mesh), args)
            compiled = function(*placed, **static).compile()
        program = programs.PlannedProgram(name, lambda: compiled, flops=0)
        figures = absent.describe(program, compiled, mesh, chip)
        return figures["moved_bytes"] / chunk, figures["expected_seconds"] / chunk

    for n_rows in (1, 8):
        state, sampling = programs.abstract_decoding(config, mesh, n_rows)
        active_B = jax.ShapeDtypeStruct((n_rows,), jnp.bool_)
        text_BR = jax.ShapeDtypeStruct((n_rows, config.context_length), jnp.int32)
        proposing = jax.eval_shape(
            partial(speculation.start_speculation, has_draft=False),
            state.remaining_B,
            text_BR,
            state.token_B,
        )

        def lower_plain(*args):
            return decode_loop.decode_chunk.lower(config, weights, *args, size=chunk)

        def lower_speculative(*args):
            shape = speculation.ChunkShape(chunk, command.speculate, top=0, draft=None)
            return speculation.speculate_chunk.lower(config, (weights, None), *args, shape)

        plain, plain_seconds = count("plain", lower_plain, state, sampling, active_B)
        read, seconds = count(
            "speculative", lower_speculative, state, proposing, sampling, active_B
        )
        per_token = [
            f"{n}: {read / (n + 1) / n_rows / 1e6:,.1f}" for n in range(command.speculate + 1)
        ]
        print(
            f"{command.preset} on {command.topology}, {counted(n_rows, 'row')}: a plain step moves "
            f"{plain / 1e6:,.1f} MB ({plain / n_rows / 1e6:,.1f} a token) in "
            f"{plain_seconds * 1e3:.3f} ms, one with {command.speculate} proposals "
            f"{read / 1e6:,.1f} MB in {seconds * 1e3:.3f} ms; MB a token by accepted proposals: "
            f"{', '.join(per_token)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
