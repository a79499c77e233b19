"""Our ModelConfig as a config.json, or why neither family can express it.

The inverse of fields.py. Knows no tensors and no files.
"""

from dataclasses import replace
from typing import Any

from gpt.config import ModelConfig
from gpt.convert.fields import ACTIVATIONS
from gpt.convert.layout import GPT2, LLAMA, Family
from gpt.errors import UserError

CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def describe(c: ModelConfig) -> tuple[dict[str, Any], Family]:
    """A config.json for `c`, and the naming of its tensors; UserError lists what stands against."""
    gpt2, llama = against_gpt2(c), against_llama(c)
    if not gpt2:
        kind, values, family = "gpt2", describe_gpt2(c), GPT2
    elif not llama:
        kind, family = kind_of_llama(c), LLAMA
        values = describe_llama(c, kind)
    else:
        raise UserError(
            f"transformers has no form for this model: GPT-2's cannot express {'; '.join(gpt2)}, "
            f"and Llama's cannot express {'; '.join(llama)}"
        )
    common = {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "use_cache": True,
    }
    return common | values, family


def listed(faults: dict[str, bool]) -> list[str]:
    """The faults that hold."""
    return [fault for fault, holds in faults.items() if holds]


def against_gpt2(c: ModelConfig) -> list[str]:
    """What GPT-2's form cannot express. A bias that it wants and we have not is one of zeros."""
    return listed(
        {
            f"{c.positions} positions": c.positions != "learned",
            "RMSNorm": c.norm != "layer",
            "norms after the sums": c.norm_place != "pre",
            "SwiGLU": c.mlp == "swiglu",
            "shared key/value heads": c.kv_heads != c.n_heads,
            f"heads of width {c.head_width}": c.head_width * c.n_heads != c.d_model,
            "QK-norm": c.qk_norm,
            "a cap on the logits": c.logit_softcap != 0,
        }
    )


def against_llama(c: ModelConfig) -> list[str]:
    """What no form of Llama, Qwen2 or Qwen3 can express."""
    return listed(
        {
            f"{c.positions} positions": c.positions != "rope",
            "LayerNorm": c.norm != "rms",
            "RMSNorm with biases": c.norm == "rms" and c.biased("norm"),
            "norms after the sums": c.norm_place != "pre",
            f"{c.mlp} without a gate": c.mlp != "swiglu",
            "QK-norm beside biases of the MLP": c.qk_norm and c.biased("mlp"),
            "a cap on the logits": c.logit_softcap != 0,
        }
    )


def kind_of_llama(c: ModelConfig) -> str:
    """Which of the forms has just these parts."""
    if c.qk_norm:
        return "qwen3"
    plain_heads = c.head_width * c.n_heads == c.d_model
    plain = not c.biased("out") and not c.biased("mlp") and plain_heads
    return "qwen2" if c.biased("qkv") and plain else "llama"


def describe_gpt2(c: ModelConfig) -> dict[str, Any]:
    """GPT-2's fields."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "activation_function": names[c.mlp],
        "n_positions": c.context_length,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_embd": c.d_model,
        "n_inner": c.d_ff,
        "layer_norm_epsilon": c.norm_epsilon,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), c.dropout),
    }


def describe_llama(c: ModelConfig, kind: str) -> dict[str, Any]:
    """The fields of Llama and of those that are almost it."""
    values = {
        "hidden_act": "silu",
        "max_position_embeddings": c.context_length,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.kv_heads,
        "hidden_size": c.d_model,
        "intermediate_size": c.ff_width,
        "rms_norm_eps": c.norm_epsilon,
        "attention_dropout": c.dropout,
    } | describe_rope(c)
    biased = c.biased("qkv") or c.biased("out")
    match kind:
        case "llama":
            own = {"attention_bias": biased, "mlp_bias": c.biased("mlp"), "head_dim": c.head_width}
        case "qwen3":
            own = {"attention_bias": biased, "head_dim": c.head_width, "use_sliding_window": False}
        case _:
            own = {"use_sliding_window": False}
    return values | own


def describe_rope(c: ModelConfig) -> dict[str, Any]:
    """RoPE's fields, in the form that every transformers since 4.43 reads."""
    if c.rope_factor == 1:
        return {"rope_theta": c.rope_theta, "rope_scaling": None}
    scaling = {
        "rope_type": "llama3",
        "factor": c.rope_factor,
        "low_freq_factor": c.rope_low,
        "high_freq_factor": c.rope_high,
        "original_max_position_embeddings": c.rope_context,
    }
    return {"rope_theta": c.rope_theta, "rope_scaling": scaling}


def with_biases(c: ModelConfig, family: Family) -> ModelConfig:
    """The model with every bias that its form declares: those that it has not are zeros there."""
    if family is GPT2:
        return replace(c, bias=True, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    if kind_of_llama(c) == "qwen2":
        return c
    biased = c.biased("qkv") or c.biased("out")
    return replace(c, qkv_bias=biased, out_bias=biased)
