"""Named settings to start from: `train.py PRESET`."""

import dataclasses

from gpt.config import AUTO, ModelConfig, TrainConfig
from gpt.errors import require


def gpt2(n_layers: int, n_heads: int, d_model: int) -> TrainConfig:
    """GPT-2 (Radford et al. 2019, Table 2) with the schedule of the 124M reproduction."""
    return TrainConfig(
        model=ModelConfig(50257, 1024, n_layers, n_heads, d_model=d_model),
        tokenizer="gpt2",
        steps=19_000,
        batch_size=512,
        grad_accum=AUTO,
        remat=AUTO,
        learning_rate=6e-4,
        min_learning_rate=6e-5,
        warmup_steps=700,
        beta2=0.95,
        sample_every=1000,
        save_every=1000,
    )


# The decoder of Vaswani et al. 2017, base model: sinusoidal positions, ReLU, post-norm.
TRANSFORMER_2017 = dataclasses.replace(
    gpt2(6, 8, 512),
    model=ModelConfig(
        50257,
        512,
        n_layers=6,
        n_heads=8,
        d_model=512,
        positions="sinusoidal",
        norm_place="post",
        mlp="relu",
        dropout=0.1,
    ),
    steps=100_000,
    batch_size=64,
    warmup_steps=4000,
    learning_rate=7e-4,  # the paper's 1/sqrt(d_model * warmup) peak
    min_learning_rate=0.0,
    beta2=0.98,
    weight_decay=0.0,
    label_smoothing=0.1,
)

# About 125M parameters, with the design choices of small models of the 2020s.
MODERN = dataclasses.replace(
    gpt2(12, 12, 768),
    model=ModelConfig(
        50257,
        1024,
        n_layers=12,
        n_heads=12,
        n_kv_heads=4,
        d_model=768,
        d_ff=2304,
        positions="rope",
        norm="rms",
        mlp="swiglu",
        qk_norm=True,
        bias=False,
    ),
    optimizer="muon",
    schedule="wsd",
    z_loss=1e-4,
    min_learning_rate=0.0,
)

PRESETS = {
    "tiny": TrainConfig(
        model=ModelConfig(
            4096,
            context_length=256,
            n_layers=4,
            n_heads=4,
            d_model=128,
            positions="rope",
            norm="rms",
            mlp="swiglu",
            qk_norm=True,
            bias=False,
            init_std=0.06,
        ),
        tokenizer="bpe",
        optimizer="muon",
        grad_accum=AUTO,
        remat=AUTO,
        steps=1200,
        batch_size=8,
        learning_rate=3e-3,
        min_learning_rate=3e-4,
    ),
    "shakespeare-char": TrainConfig(
        model=ModelConfig(
            128, context_length=64, n_layers=4, n_heads=4, d_model=128, bias=False, init_std=0.06
        ),
        tokenizer="char",
        batch_size=12,
        grad_accum=AUTO,
        remat="none",
        unroll=True,
        eval_tokens=0,
    ),
    "gpt2": gpt2(12, 12, 768),
    "gpt2-medium": gpt2(24, 16, 1024),
    "gpt2-large": gpt2(36, 20, 1280),
    "gpt2-xl": gpt2(48, 25, 1600),
    "transformer-2017": TRANSFORMER_2017,
    "modern": MODERN,
}


def preset(name: str) -> TrainConfig:
    """The named preset, or UserError with the list of names."""
    require(name in PRESETS, f"no preset named {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
