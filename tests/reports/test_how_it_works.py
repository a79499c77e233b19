"""docs/how-it-works.md: its pictures are drawn, its ablations take away what they say."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt.config import ModelConfig
from gpt.model import attention, transformer

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
CONFIG = ModelConfig(64, 16, n_layers=2, n_heads=2, d_model=16, positions="none", init_std=0.3)


def script(name):
    """A script of docs or benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def numbers(text):
    return [float(word) for word in re.findall(r"-?[0-9.]*[0-9]", text)]


def test_the_pencil_page_is_what_attention_computes(capsys):
    """Its program runs; its table and its two vectors are those of the model's own attention."""
    (program,) = re.findall("```python\n(.*?)```", GUIDE, re.DOTALL)
    names = {}
    exec(program, names)
    q_H, k_SH, v_SH = names["q"][5], names["k"], names["v"]
    mix_H = names["mixed"][0, 5, 0]
    printed = numbers(capsys.readouterr().out)
    assert np.allclose(printed, np.concatenate([q_H, mix_H]), atol=1e-6)

    # Values that are rows of the identity matrix give the weights.
    parts = [jnp.eye(8)[None, None, :7, half : half + 4] for half in (0, 4)]
    query = names["q"][None, :, None]
    outputs = [attention.attend(query, k_SH[None, None], part, None, None) for part in parts]
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
    script("docs/pictures.py").main()
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
    yield script("benchmarks/ablations.py")
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


def test_shared_projections_leave_the_keys_unused(ablations, params):
    other = params | {"blocks": jax.tree.map(jnp.copy, params["blocks"])}
    other["blocks"]["attention"]["k"]["kernel"] *= 2
    assert not np.allclose(logits(params), logits(other))
    ablations.share_queries_and_keys()
    assert np.array_equal(logits(params), logits(other))


def test_unscaled_scores_are_those_of_longer_queries(ablations, params):
    longer = params | {"blocks": jax.tree.map(jnp.copy, params["blocks"])}
    longer["blocks"]["attention"]["q"]["kernel"] *= CONFIG.head_width**0.5
    expected = logits(longer)
    ablations.leave_scores_unscaled()
    assert np.allclose(logits(params), expected, atol=1e-4)


def test_without_residuals_silent_blocks_pass_nothing_on(ablations, params):
    silent = params | {"blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}
    assert np.std(logits(silent)) > 0.1
    ablations.leave_out_residuals()
    transformer.abstract_model.cache_clear()
    assert np.all(logits(silent) == 0)
