"""llama.cpp reads our weights from the files that benchmarks/gguf_writer.py writes, and says the
same: the comparison of speeds is one of equals."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is not built here: make bench-peers does it"
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gguf_writer  # noqa: E402  (needs gguf)
from workers import models  # noqa: E402

from gpt.config import ModelConfig  # noqa: E402
from gpt.model import transformer  # noqa: E402

SMALL = ModelConfig(
    331, context_length=256, n_layers=3, n_heads=6, n_kv_heads=2, d_model=96, d_ff=160,
    positions="rope", norm="rms", norm_epsilon=1e-3, mlp="swiglu", bias=False, init_std=0.2,
)  # fmt: skip
KINDS = {
    "tied": {},
    "untied": {"tied": False},
    "far wavelengths": {"rope_theta": 5e5},
    "wide heads, each its own keys": {"d_head": 32, "n_kv_heads": None},
}


def random_weights(config):
    """No norm at its initial value: ones would hide a swap."""
    noise = np.random.default_rng(1).standard_normal
    return jax.tree.map(
        lambda a: a + 0.1 * noise(a.shape, np.float32), models.random_weights(config)
    )


def read_back(path, **options):
    """llama.cpp's model of a file; its cache in float32, so that there is one way to round."""
    kept = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **kept | options
    )


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A config, our weights, and llama.cpp's model that holds the same."""
    config = replace(SMALL, **KINDS[request.param])
    params = random_weights(config)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_writer.write(config, params, "f32", path)
    return config, params, read_back(path)


def logits_of(model, ids):
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def our_logits(config, params, ids):
    forward = jax.jit(transformer.forward, static_argnums=0)
    return np.asarray(forward(config, params, np.array([ids])))[0]


def token_ids(config, length):
    return np.random.default_rng(2).integers(config.vocab_size, size=length).tolist()


def test_logits(pair):
    config, params, model = pair
    ids = token_ids(config, 160)
    expected = logits_of(model, ids)
    assert expected.std() > 0.3, "logits so flat that they would agree by themselves"
    difference = np.abs(our_logits(config, params, ids) - expected).max()
    assert difference < 5e-5 * np.abs(expected).max()


def test_eight_bits_are_near(tmp_path):
    """Weights and, by llama.cpp, activations rounded to 8 bits: noise, and not another model."""
    params = random_weights(SMALL)
    gguf_writer.write(SMALL, params, "q8_0", tmp_path / "model.gguf")
    ids = token_ids(SMALL, 100)
    theirs = logits_of(read_back(tmp_path / "model.gguf"), ids)
    ours = our_logits(SMALL, params, ids)
    assert 1e-3 < (ours - theirs).std() / ours.std() < 0.2
