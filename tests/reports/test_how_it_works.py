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


@pytest.fixture
def ablations(monkeypatch):
    """The script, whose patches are undone afterwards."""
    monkeypatch.setattr(attention.Attention, "project", attention.Attention.project)
    monkeypatch.setattr(attention, "visible", attention.visible)
    monkeypatch.setitem(transformer.BLOCKS, "pre", transformer.BLOCKS["pre"])
    transformer.abstract_model.cache_clear()
    yield program("benchmarks/ablations")
    transformer.abstract_model.cache_clear()


@pytest.fixture(scope="module")
def params():
    return transformer.init(CONFIG, jax.random.key(0))


def logits(params, tokens=(5, 6, 7, 8)):
    return np.asarray(transformer.forward(CONFIG, params, jnp.array([tokens]))[0])


def test_without_the_mask_the_next_token_is_seen(ablations, params):
    assert np.array_equal(logits(params)[0], logits(params, (5, 6, 7, 9))[0])
    ablations.leave_out_mask()
    assert not np.allclose(logits(params)[0], logits(params, (5, 6, 7, 9))[0])


def with_projection(params, name, factor):
    """The weights with one projection of attention multiplied."""
    changed = params | {"blocks": jax.tree.map(jnp.copy, params["blocks"])}
    changed["blocks"]["attention"][name]["kernel"] *= factor
    return changed


def test_shared_projections_leave_the_keys_unused(ablations, params):
    other = with_projection(params, "k", 2)
    assert not np.allclose(logits(params), logits(other))
    ablations.share_queries_and_keys()
    assert np.array_equal(logits(params), logits(other))


def test_unscaled_scores_are_those_of_longer_queries(ablations, params):
    expected = logits(with_projection(params, "q", CONFIG.head_width**0.5))
    ablations.leave_scores_unscaled()
    assert np.allclose(logits(params), expected, atol=1e-4)


def test_without_residuals_silent_blocks_pass_nothing_on(ablations, params):
    silent = params | {"blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}
    assert np.std(logits(silent)) > 0.1
    ablations.leave_out_residuals()
    transformer.abstract_model.cache_clear()
    assert np.all(logits(silent) == 0)
