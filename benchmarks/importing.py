"""Peak memory of importing a model of gpt2-xl's shapes, weights at random, against its file.

    python benchmarks/importing.py [PRESET] [float32|float16|bfloat16]

Writes the model's folder and the run's into a temporary one, and removes both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
BLOCK = 2**24  # numbers drawn once; every tensor is cut from them

from gpt import cli  # noqa: E402
from gpt.convert.describe import describe  # noqa: E402
from gpt.convert.layout import tensor_shapes  # noqa: E402
from gpt.convert.tensorfile import FLOATS, WHOLE, write_file  # noqa: E402
from gpt.errors import require  # noqa: E402
from gpt.presets import preset  # noqa: E402

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_model(folder: Path, name: str, dtype: str) -> int:
    """A folder of the preset's shapes with random weights; the bytes of its file."""
    config = preset(name).model
    values, family = describe(config)
    shapes = tensor_shapes(config, family)
    shapes = {family.whole_name(n): shape for n, shape in shapes.items()}
    noise = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(FLOATS[TYPES[dtype]])

    def tensors():
        for i, shape in enumerate(shapes.values()):
            yield np.resize(np.roll(noise, i * 977), shape)

    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": 50256}))
    write_file(folder / WHOLE, shapes, TYPES[dtype], tensors())
    return (folder / WHOLE).stat().st_size


def measure(name: str, dtype: str) -> dict[str, float]:
    """Bytes of the file, peak bytes of the process that imports it, and its seconds."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model"
        source.mkdir()
        size = write_model(source, name, dtype)
        command = [sys.executable, "-m", "gpt.convert", "import", source, Path(place) / "run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, none from before
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: the import left with {process.returncode}")
    peak = usage.ru_maxrss * 1024  # KiB on Linux
    return {"file_bytes": size, "peak_bytes": peak, "ratio": peak / size, "seconds": seconds}


def main(argv: list[str]) -> None:
    """Measure one model in one type."""
    name, dtype, *more = [*argv, *("gpt2-xl", "float32")[len(argv) :]]
    require(not more, f"{' '.join(more)}: expected a preset and a type alone")
    require(dtype in TYPES, f"{dtype}: expected {', '.join(TYPES)}")
    print(json.dumps({"preset": name, "dtype": dtype} | measure(name, dtype)))


if __name__ == "__main__":
    cli.run(main)
