"""Evaluate a model on lm-eval tasks: python -m gpt.evaluate RUN --tasks NAMES

    python -m gpt.evaluate runs/tiny --tasks python_code
    python -m gpt.evaluate runs/gpt2 --tasks hellaswag,lambada_openai --limit 200

Needs lm-eval: pip install -e '.[eval]'. The results are printed as a table and saved in the
run's folder for its report.
"""

import importlib.util
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli, terminal
from gpt.config import (
    BY_PLATFORM,
    DTYPES,
    ONE_DEVICE,
    Dtype,
    MeshConfig,
    Quantize,
    Weights,
    optional,
)
from gpt.errors import not_negative, positive, require, require_file_path
from gpt.sampling.settings import Prefix

BOOTSTRAP_ITERS = 1000  # for standard errors without a formula; their own error is then 2 %


@dataclass(frozen=True)
class Args:
    """Which model to evaluate, and on what."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder, from train.py or gpt.convert."""
    tasks: Annotated[str, tyro.conf.arg(metavar="NAME,NAME,...")]
    """Tasks, groups or patterns, separated by commas."""
    include_path: Annotated[Path | None, optional("DIR")] = None
    """A folder of your own tasks, each a YAML file with its data next to it."""
    limit: Annotated[int | None, optional("INT", "all")] = None
    """Use only the first INT questions of each task: for a quick look, not for comparisons."""
    num_fewshot: Annotated[int | None, optional("INT", "what the task says")] = None
    """Solved examples before each question."""
    batch_size: int = 16
    """Answers per batch."""
    prefix: Annotated[Prefix | None, optional("{bos,eos,none}", "as the tokenizer does")] = None
    """The token to put before each text. An empty context is always replaced by a token."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Write the harness's full results to this file."""
    step: Annotated[int | None, optional("INT", "the newest")] = None
    """Use the checkpoint from this step."""
    dtype: Annotated[Dtype | None, optional(DTYPES, BY_PLATFORM)] = None
    """Data type to compute in."""
    weights: Annotated[Weights | None, optional("{ema,raw}", "the average if one is kept")] = None
    """The average over the run, or the last weights."""
    quantize: Annotated[Quantize | None, optional("{int8}")] = None
    """Store matrices and embedding tables as int8."""
    mesh: MeshConfig = ONE_DEVICE
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, program="python -m gpt.evaluate", description=__doc__)
    names = [name for name in args.tasks.split(",") if name]
    require(bool(names), "--tasks is empty: expected names separated by commas")
    positive("--batch-size", args.batch_size)
    if args.limit is not None:
        positive("--limit", args.limit)
    if args.num_fewshot is not None:
        not_negative("--num-fewshot", args.num_fewshot)
    if args.json is not None:
        require_file_path("--json", args.json)
    if args.include_path is not None:
        require(args.include_path.is_dir(), f"--include-path {args.include_path}: no such folder")
    require(
        importlib.util.find_spec("lm_eval") is not None,
        "--tasks needs lm-eval, which is not installed: pip install -e '.[eval]'",
    )
    cli.prepare_jax(cache=args.compile_cache)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # or lm-eval would fork a process that runs JAX
    import gpt
    from gpt.evaluate import harness
    from gpt.training.metrics import to_line

    model = gpt.load(
        args.run, args.step, args.dtype, args.weights, args.mesh, args.quantize, args.prefix
    )
    for text in model.notes:
        terminal.note(f"note: {text}")
    lm = harness.GPTJax(model=model, batch_size=args.batch_size)
    tasks = harness.load_tasks(names, args.include_path)
    results = harness.evaluate(lm, tasks, args.limit, args.num_fewshot, BOOTSTRAP_ITERS)

    terminal.write(harness.describe(results))
    if lm.n_cut:
        terminal.note(
            f"note: {lm.n_cut:,} contexts exceed the model's {model.config.context_length:,} "
            "tokens and were cut from the left"
        )
    settings = {
        "n_cut": lm.n_cut,
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "prefix": args.prefix,
        "weights": model.weights,
        "dtype": model.config.compute_dtype,
        "quantize": args.quantize,
        "lm_eval": results["lm_eval_version"],
        "time": datetime.now().isoformat(timespec="seconds"),
    }
    record = {"step": model.step} | harness.figures(results) | settings
    path = args.run / "evaluations.jsonl"
    with path.open("ab") as file:
        file.write(to_line(record))
    if args.json is not None:
        whole = results | {"run": str(args.run), "step": model.step, "settings": settings}
        args.json.write_text(json.dumps(whole, default=str, indent=1) + "\n", encoding="utf-8")
    report = cli.command("-m", "gpt.report", str(args.run))
    terminal.note(f"saved in {path}; to see it next to the curves: {report}")


if __name__ == "__main__":
    cli.run(main)
