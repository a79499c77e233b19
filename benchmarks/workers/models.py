"""The models of the comparison by name, and their weights: the same ones in every process."""

import jax
import numpy as np

from gpt.config import ModelConfig
from gpt.model import transformer
from gpt.presets import preset

LLAMA = ModelConfig(  # SmolLM2-135M's shape (Ben Allal et al. 2025)
    49152,
    context_length=8192,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    d_model=576,
    d_ff=1536,
    positions="rope",
    rope_theta=100_000.0,
    norm="rms",
    mlp="swiglu",
    bias=False,
)


def model_config(name: str) -> ModelConfig:
    """The config of llama or of a preset, computed in float32."""
    config = LLAMA if name == "llama" else preset(name).model
    return config.computing_in("float32")


def random_weights(config: ModelConfig) -> dict:
    """Stacked weights, which depend on nothing but the config.

    Drawn by NumPy, one array after another: a JAX program would need several times their memory.
    """
    noise = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        numbers = noise.standard_normal(leaf.shape, np.float32)
        numbers *= np.float32(config.init_std)
        return numbers

    return jax.tree_util.tree_map_with_path(draw, transformer.abstract(config))
