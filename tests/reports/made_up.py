"""Runs and journeys to make pages of, made up or small."""

import json
import math
import types

import numpy as np

from gpt.config import ModelConfig
from gpt.data import tokenizers
from gpt.reports import tour_recorder


def write_run(folder, n_steps=200, restart=None, torn=True, text="a b", loss=2.0):
    """A run's log and samples as train.py writes them, without its checkpoints."""
    folder.mkdir(parents=True)
    lines, began = [], 0
    for step in range(1, n_steps + 1):
        began = step - 1 if step == restart else began
        wave = math.sin(step)
        lines.append(
            {
                "step": step,
                "loss": loss + 6 * math.exp(-6 * step / n_steps) + 0.2 * wave,
                "learning_rate": 1e-3 * (1 - step / n_steps),
                "grad_norm": 1.5 + wave if step != n_steps // 2 else 400.0,
                "skipped": 0 if step < n_steps // 2 else 2,
                "tokens": step * 2048,
                "tokens_per_second": 9000 + 500 * wave,
                "seconds": 0.2 * (step - began),
                "mfu": 0.3 + 0.02 * wave,
                "step_seconds_p50": 0.2,
                "step_seconds_p99": 0.3,
            }
        )
        if step % (n_steps // 8) == 0:
            held = lines[-1]["loss"] + 0.1
            lines.append({"step": step, "val_loss": held, "val_bits_per_byte": held * 0.4})
    text_lines = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text_lines + ('\n{"step": 9, "lo' if torn else "\n"))
    samples = [{"step": n_steps * i // 20, "text": f"{text} {i}"} for i in range(1, 21)]
    torn_sample = '\n{"step": 3, "te'
    written = "\n".join(json.dumps(sample) for sample in samples) + torn_sample
    (folder / "samples.jsonl").write_text(written)
    return folder


def made_up_journey(n_layers, n_heads, width, T, n_new, prompt=None):
    """A journey of random numbers in the shapes of a real one, and a model to tell of."""
    config = ModelConfig(257, 1024, n_layers=n_layers, n_heads=n_heads, d_model=n_heads * width)
    letters, draws = tokenizers.create("byte", lambda: (), 0), np.random.default_rng(0)
    ids = letters.encode_ordinary(prompt) if prompt else draws.integers(32, 120, T).tolist()
    T, readings, drawings = len(ids), [], []
    for i in range(n_new):
        first, n = (T + i - 1, 1) if i else (0, T)
        S = T + n_new if i else T
        kept = {
            "q": draws.normal(size=(n_layers, n, n_heads, width)),
            "k": draws.normal(size=(n_layers, n_heads, S, width)),
            "v": draws.normal(size=(n_layers, n_heads, S, width)),
            "scores": draws.normal(size=(n_layers, n, n_heads, S)),
            "weights": draws.random(size=(n_layers, n, n_heads, S)),
            "mix": draws.normal(size=(n_layers, n, n_heads, width)),
        }
        tokens = [65 + i - 1] if i else ids
        written = list(range(first, first + n))
        readings.append(tour_recorder.Reading(tokens, first, kept, np.zeros((n, 257)), written, S))
        shares = draws.dirichlet(np.ones(257))
        cut = np.where(shares > 0.005, shares, 0)
        drawings.append(tour_recorder.Drawing(65 + i, {"the model": shares, "top-p": cut}, 0.5))
    shape = (n_layers + 1, T + n_new - 1, tour_recorder.LENS_TOP)
    lens = draws.integers(0, 257, shape), draws.random(shape)
    text = letters.decode(ids)
    journey = tour_recorder.Journey(
        config, text, ids, readings, drawings, list(range(n_layers + 1)), *lens
    )
    return journey, types.SimpleNamespace(config=config, tokenizer=letters, step=7)
