"""Models of transformers with random weights, for the comparisons that need torch."""

from dataclasses import dataclass, field
from typing import Any

import jax
import torch
import transformers

from gpt.convert.convert import open_model
from gpt.model import transformer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"vocab_size": 300, "n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Kind:
    """A family and the fields that differ from its small model."""

    family: str
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self):
        """The config of transformers."""
        small = GPT2 if self.family == "GPT2" else LLAMA
        fields = small | NO_IDS | self.fields
        return getattr(transformers, f"{self.family}Config")(attn_implementation="eager", **fields)


KINDS = {
    "gpt2": Kind("GPT2"),
    "gpt2, untied": Kind("GPT2", {"tie_word_embeddings": False}),
    "gpt2, exact gelu": Kind("GPT2", {"activation_function": "gelu"}),
    "gpt2, relu, narrow mlp": Kind("GPT2", {"activation_function": "relu", "n_inner": 100}),
    "gpt2, large epsilon": Kind("GPT2", {"layer_norm_epsilon": 1e-2}),
    "gpt2, one head": Kind("GPT2", {"n_head": 1, "n_layer": 1, "n_embd": 48, "vocab_size": 97}),
    "llama": Kind("Llama"),
    "llama, tied": Kind("Llama", {"tie_word_embeddings": True}),
    "llama, far wavelengths": Kind("Llama", {"rope_parameters": {"rope_theta": 5e5}}),
    "llama 3": Kind("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama, one kv head": Kind("Llama", {"num_key_value_heads": 1}),
    "llama, every kv head": Kind("Llama", {"num_key_value_heads": 4}),
    "llama, attention biases": Kind("Llama", {"attention_bias": True}),
    "llama, mlp biases": Kind("Llama", {"mlp_bias": True}),
    "llama, wide heads": Kind("Llama", {"head_dim": 32}),
    "llama, large epsilon": Kind("Llama", {"rms_norm_eps": 1e-2}),
    "mistral, no window": Kind("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": Kind("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied": Kind("Qwen2"),
    "qwen3": Kind("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3, biases": Kind("Qwen3", {"head_dim": 16, "attention_bias": True}),
}


def make(config, seed: int = 0, loud: float = 0.2):
    """transformers' model, no weight at its initial value: a zero bias would hide a bug."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * loud)
    return model


def read(folder):
    """Our config and stacked weights of a folder that transformers has saved."""
    model = open_model(folder)
    params = model.read_params()
    expected = transformer.abstract(model.config)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, params, expected)
    assert all(jax.tree.leaves(same))
    return model.config, params


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """The `n` tokens that transformers finds likeliest after `prompt`, one by one."""
    ids = torch.tensor([prompt])
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
    )
    return done[0, len(prompt) :].tolist()


def logits_of(model, ids):
    """transformers' logits of a batch of token ids."""
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()
