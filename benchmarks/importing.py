"""Peak memory while importing a random model with gpt2-xl's shapes, relative to its file's size.

    python benchmarks/importing.py [PRESET] [float32|float16|bfloat16]

Writes the model and the run to a temporary folder, which is removed at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.convert.hf_config import to_hf_config  # noqa: E402
from gpt.convert.hf_weights import (  # noqa: E402
    FLOATS,
    WEIGHTS,
    tensor_shapes,
    write_safetensors,
)
from gpt.presets import preset  # noqa: E402

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
N_RANDOM = 2**24  # numbers sampled once; every tensor is cut from them


def write_model(folder: Path, name: str, dtype: str) -> int:
    """Write a model folder with the preset's shapes and random weights; return its file's bytes."""
    config = preset(name).model
    values, family = to_hf_config(config)
    shapes = tensor_shapes(config, family)
    noise = np.random.default_rng(0).normal(0, 0.02, N_RANDOM).astype(FLOATS[TYPES[dtype]])

    def tensors() -> Iterator[np.ndarray]:
        for i, shape in enumerate(shapes.values()):
            yield np.resize(np.roll(noise, i * 977), shape)

    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": 50256}))
    write_safetensors(folder / WEIGHTS, shapes, TYPES[dtype], tensors())
    return (folder / WEIGHTS).stat().st_size


def measure(name: str, dtype: str) -> dict[str, float]:
    """The file's bytes, and the importing process's peak bytes and seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        source.mkdir()
        size = write_model(source, name, dtype)
        command = [sys.executable, "-m", "gpt.convert", "import", source, Path(scratch) / "run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        # Usage of this child only; RUSAGE_CHILDREN would include earlier ones.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: the import ended with exit code {process.returncode}")
    peak = usage.ru_maxrss * 1024  # KiB on Linux
    return {"file_bytes": size, "peak_bytes": peak, "ratio": peak / size, "seconds": seconds}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="gpt2-xl")
    parser.add_argument("dtype", nargs="?", default="float32", choices=TYPES)
    args = parser.parse_args(argv)
    figures = measure(args.preset, args.dtype)
    print(json.dumps({"preset": args.preset, "dtype": args.dtype} | figures))


if __name__ == "__main__":
    cli.run(main)
