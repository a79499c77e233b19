"""docs/how-it-works.md: its pictures are drawn, its ablations take away what they say."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT, program

from gpt.config import ModelConfig
from gpt.model import attention, transformer

GUIDE = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
CONFIG = ModelConfig(64, 16, n_layers=2, n_heads=2, d_model=16, positions="none", init_std=0.3)


@pytest.mark.slow
def test_the_pictures_of_the_guide_are_drawn(trained, tmp_path, monkeypatch):
    """By the script that it names. Its commands, and whether the pictures are there: test_docs."""
    argv = ["pictures.py", str(trained[1]), "--prompt", "a cat", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    program("docs/pictures").main()
    shown = set(re.findall(r"\]\((\w+\.svg)\)", GUIDE))
    assert shown == {path.name for path in tmp_path.glob("*.svg")}
    assert all((ROOT / "docs" / name).exists() for name in shown)


@pytest.mark.parametrize(
    "ablation",
    ["share_queries_and_keys", "leave_scores_unscaled", "leave_out_residuals", "leave_out_mask"],
)
def test_an_ablation_takes_something_away(ablation, monkeypatch):
    """Its patches, undone afterwards, reach the model; without the mask the next token is seen."""
    monkeypatch.setattr(attention.Attention, "project", attention.Attention.project)
    monkeypatch.setattr(attention, "visible", attention.visible)
    monkeypatch.setitem(transformer.BLOCKS, "pre", transformer.BLOCKS["pre"])
    params = transformer.init(CONFIG, jax.random.key(0))

    def logits(*tokens):
        return np.asarray(transformer.forward(CONFIG, params, jnp.array([tokens]))[0])

    before = logits(5, 6, 7, 8)
    assert np.array_equal(before[0], logits(5, 6, 7, 9)[0])
    transformer.abstract_model.cache_clear()
    getattr(program("benchmarks/ablations"), ablation)()
    try:
        after = logits(5, 6, 7, 8)
        assert not np.allclose(before, after, atol=1e-3)
        sees_the_next = not np.allclose(after[0], logits(5, 6, 7, 9)[0])
        assert sees_the_next == (ablation == "leave_out_mask")
    finally:
        transformer.abstract_model.cache_clear()
