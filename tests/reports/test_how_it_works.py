"""docs/how-it-works.md: its pictures are drawn, its ablations take away what they say."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT, program

from gpt.config import ModelConfig
from gpt.model import attention, flash_attention, transformer

GUIDE = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
CONFIG = ModelConfig(64, 16, n_layers=2, n_heads=2, d_model=16, positions="none", init_std=0.3)


def numbers(text):
    return [float(word) for word in re.findall(r"-?[0-9.]*[0-9]", text)]


def test_the_pencil_page_is_what_attention_computes(capsys):
    """Its program runs; its table and its two vectors are those of the model's own attention."""
    (code,) = re.findall("```python\n(.*?)```", GUIDE, re.DOTALL)
    names = {}
    exec(code, names)
    q_H, k_SH, v_SH = names["q"][5], names["k"], names["v"]
    mix_H = names["mixed"][0, 5, 0]
    printed = numbers(capsys.readouterr().out)
    assert np.allclose(printed, np.concatenate([q_H, mix_H]), atol=1e-6)

    # Values that are rows of the identity matrix give the weights.
    parts = [jnp.eye(8)[None, None, :7, half : half + 4] for half in (0, 4)]
    query = names["q"][None, :, None]
    outputs = [attention.plain_attention(query, k_SH[None, None], part) for part in parts]
    weights_S = np.concatenate([output[0, 5, 0] for output in outputs])[:7]

    table = re.findall(r"^\| ([写代码的中年人]) \|(.*)\|$", GUIDE, re.MULTILINE)
    assert "".join(token for token, _ in table) == "写代码的中年人"
    for s, (_, row) in enumerate(table):
        key, score, scaled, masked, power, weight, value = map(numbers, row.split("|"))
        assert key == k_SH[s].tolist() and value == v_SH[s].tolist()
        assert score == [float(q_H @ k_SH[s])] and scaled == [score[0] / 2]
        assert masked == (scaled if s <= 5 else [])
        assert power[0] == pytest.approx(math.exp(scaled[0]) if s <= 5 else 0, abs=5e-4)
        assert weight[0] == pytest.approx(weights_S[s], abs=5e-4)
    query, output = re.findall(r"\*\*\[(.*?)\]\*\*", GUIDE)
    assert numbers(query) == q_H.tolist()
    assert numbers(output) == pytest.approx(mix_H.tolist(), abs=5.1e-4)


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
    monkeypatch.setattr(flash_attention, "KERNELS", dict(flash_attention.KERNELS))
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
