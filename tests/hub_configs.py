"""config.json as models on the Hugging Face hub have it, field for field, and the same made small.

Fields and values are those of the models' own files; only what says how large they are is changed.
"""

import json

GPT2 = json.loads("""{
"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null,
"summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
"summary_use_proj": true, "vocab_size": 50257,
"task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "output_past": true
}""")
TINYLLAMA = json.loads("""{
"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
"eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
"intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0",
"use_cache": true, "vocab_size": 32000
}""")
SMOLLM2 = json.loads("""{
"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 960,
"initializer_range": 0.02, "intermediate_size": 2560, "is_llama_config": true,
"max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 15, "num_hidden_layers": 32, "num_key_value_heads": 5, "pad_token_id": 2,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
"rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
"transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152
}""")
LLAMA3 = json.loads("""{
"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
"max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
"rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
"torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
"vocab_size": 128256
}""")
QWEN2 = json.loads("""{
"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
"model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
"num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
"sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
"use_sliding_window": false, "vocab_size": 151936
}""")
QWEN3 = json.loads("""{
"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
"max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
"tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
"use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}""")
MISTRAL = json.loads("""{
"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
"eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
"tie_word_embeddings": false, "torch_dtype": "bfloat16",
"transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 32768
}""")
# What PretrainedConfig of transformers 4 writes beside, where a program asks for all defaults.
DEFAULTS_OF_4 = json.loads("""{
"add_cross_attention": false, "bad_words_ids": null, "begin_suppress_tokens": null,
"chunk_size_feed_forward": 0, "cross_attention_hidden_size": null,
"decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false,
"early_stopping": false, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty":
null, "finetuning_task": null, "forced_bos_token_id": null, "forced_eos_token_id": null,
"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": false, "is_encoder_decoder": false,
"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
"min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
"num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false,
"output_scores": false, "pad_token_id": null, "prefix": null, "problem_type": null,
"pruned_heads": {}, "remove_invalid_values": false, "repetition_penalty": 1.0,
"return_dict": true, "return_dict_in_generate": false, "sep_token_id": null,
"suppress_tokens": null, "task_specific_params": null, "temperature": 1.0,
"tf_legacy_loss": false, "tie_encoder_decoder": false, "tokenizer_class": null, "top_k": 50,
"top_p": 1.0, "torch_dtype": null, "torchscript": false, "typical_p": 1.0,
"use_bfloat16": false
}""")


def saved_again(c):
    """A config as transformers 5 writes it: `dtype`, and RoPE's fields in one object."""
    old = ("torch_dtype", "rope_theta", "rope_scaling")
    rope = {"rope_type": "default", "rope_theta": c["rope_theta"]} | (c.get("rope_scaling") or {})
    fields = {"dtype": c["torch_dtype"], "pad_token_id": None, "rope_parameters": rope}
    if c["model_type"].startswith("qwen"):
        fields |= {"layer_types": ["full_attention"] * c["num_hidden_layers"]}
        fields |= {"sliding_window": None}
    kept = {name: value for name, value in c.items() if name not in old}
    return kept | fields | {"transformers_version": "5.23.0"}


CONFIGS = {
    "gpt2": GPT2,
    "SmolLM2-360M-Instruct": SMOLLM2,
    "TinyLlama-1.1B": TINYLLAMA,
    "Llama-3.2-1B": LLAMA3,
    "Llama-3.2-1B, saved again": saved_again(LLAMA3),
    "Qwen2.5-0.5B": QWEN2,
    "Qwen3-0.6B": QWEN3,
    "Qwen3-0.6B, saved again": saved_again(QWEN3),
    "Mistral-7B-v0.3": MISTRAL,
}


def small(c):
    """`c` with all its fields and heads, but few layers, narrow ones, and few tokens."""
    if c["model_type"] == "gpt2":
        narrow = {"n_embd": 4 * c["n_head"], "n_layer": 2, "n_positions": 64, "n_ctx": 64}
        return c | narrow | {"vocab_size": 300}
    heads = c["num_attention_heads"]
    sizes = {"hidden_size": 4 * heads, "num_hidden_layers": 2, "intermediate_size": 40}
    sizes |= {"max_position_embeddings": 64, "vocab_size": 300}
    if "head_dim" in c:  # as wide, against the others, as it was
        sizes["head_dim"] = 4 * heads * c["head_dim"] // c["hidden_size"]
    if c.get("sliding_window"):
        sizes["sliding_window"] = 64
    if "layer_types" in c:
        sizes["layer_types"] = c["layer_types"][:2]
    for name in ("rope_scaling", "rope_parameters"):
        if "original_max_position_embeddings" in (c.get(name) or {}):
            sizes[name] = c[name] | {"original_max_position_embeddings": 32}
    return c | sizes
