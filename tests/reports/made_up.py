"""Small inputs for the pages: a run's log, and the record of a tour with random numbers."""

import json
import math
import types

import numpy as np

from gpt.config import ModelConfig
from gpt.data import tokenizers
from gpt.reports.tour_recorder import LENS_TOP, ModelCall, SampledToken, TourRecord


def write_run(folder, n_steps=200, restart=None, text="a b", loss=2.0):
    """A run's log and samples as train.py writes them, each with a torn last line; no checkpoint.

    Two updates are skipped in the middle, where the gradient has a peak of 400. `restart`: the
    first step of a second process.
    """
    folder.mkdir(parents=True)
    lines, began = [], 0
    for step in range(1, n_steps + 1):
        if step == restart:
            began = step - 1
        wave = math.sin(step)
        line = {
            "step": step,
            "loss": loss + 6 * math.exp(-6 * step / n_steps) + 0.2 * wave,
            "learning_rate": 1e-3 * (1 - step / n_steps),
            "grad_norm": 400.0 if step == n_steps // 2 else 1.5 + wave,
            "skipped": 0 if step < n_steps // 2 else 2,
            "tokens": step * 2048,
            "tokens_per_second": 9000 + 500 * wave,
            "seconds": 0.2 * (step - began),
            "since_step": began,
            "mfu": 0.3 + 0.02 * wave,
            "step_seconds_p50": 0.2,
            "step_seconds_p99": 0.3,
        }
        lines.append(line)
        if step % (n_steps // 8) == 0:
            val_loss = line["loss"] + 0.1
            lines.append({"step": step, "val_loss": val_loss, "val_bits_per_byte": val_loss * 0.4})
    samples = [{"step": n_steps * i // 20, "text": f"{text} {i}"} for i in range(1, 21)]
    for name, records in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        text_lines = [json.dumps(record) for record in records] + ['{"step": 9, "te']
        (folder / name).write_text("\n".join(text_lines))
    return folder


def random_record(n_layers, n_heads, width, T, n_new):
    """A tour's record in the shapes of a real one, and the model that it needs."""
    config = ModelConfig(257, 1024, n_layers=n_layers, n_heads=n_heads, d_model=n_heads * width)
    tokenizer = tokenizers.create("byte", lambda: (), 0)
    rng = np.random.default_rng(0)
    prompt_ids = rng.integers(32, 120, T).tolist()
    calls, sampled = [], []
    for i in range(n_new):
        first, n, S = (T + i - 1, 1, T + n_new) if i else (0, T, T)
        arrays = {name: rng.normal(size=(n_layers, n, n_heads, width)) for name in ("q", "mix")}
        arrays |= {name: rng.normal(size=(n_layers, n_heads, S, width)) for name in ("k", "v")}
        arrays |= {name: rng.random((n_layers, n, n_heads, S)) for name in ("scores", "weights")}
        tokens = [65 + i - 1] if i else prompt_ids
        calls.append(ModelCall(tokens, first, arrays, np.zeros((n, 257))))
        probs = rng.dirichlet(np.ones(257))
        stages = {"the model": probs, "top-p": np.where(probs > 0.005, probs, 0)}
        sampled.append(SampledToken(65 + i, stages, 0.5))
    lens_shape = (n_layers + 1, T + n_new - 1, LENS_TOP)
    record = TourRecord(
        config, tokenizer.decode(prompt_ids), prompt_ids, calls, sampled,
        list(range(n_layers + 1)), rng.integers(0, 257, lens_shape), rng.random(lens_shape),
    )  # fmt: skip
    return record, types.SimpleNamespace(config=config, tokenizer=tokenizer, step=7)
