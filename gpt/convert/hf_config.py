"""Read a config.json of the GPT-2 or Llama family into a ModelConfig, and write one.

Known fields are read. Fields that change what the model computes in a way ours cannot are refused
by name. The rest are reported and ignored, so that a new field in a transformers release
breaks no import.
"""

import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from gpt.config import ModelConfig, flags_to_export
from gpt.convert.hf_weights import GPT2, LLAMA, Family
from gpt.errors import is_of, require

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
ACTIVATIONS = {  # theirs to ours
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}

# Fields that mean the same as one of ours: our name, the type, and the default.
REQUIRED: Any = object()
GPT2_FIELDS = {
    "vocab_size": ("vocab_size", int, REQUIRED),
    "n_positions": ("context_length", int, REQUIRED),
    "n_layer": ("n_layers", int, REQUIRED),
    "n_head": ("n_heads", int, REQUIRED),
    "n_embd": ("d_model", int, REQUIRED),
    "n_inner": ("d_ff", int, None),
    "layer_norm_epsilon": ("norm_epsilon", float, 1e-5),
    "tie_word_embeddings": ("tied", bool, True),
    "initializer_range": ("init_std", float, 0.02),
}
LLAMA_FIELDS = {
    "vocab_size": ("vocab_size", int, REQUIRED),
    "max_position_embeddings": ("context_length", int, REQUIRED),
    "num_hidden_layers": ("n_layers", int, REQUIRED),
    "num_attention_heads": ("n_heads", int, REQUIRED),
    "num_key_value_heads": ("n_kv_heads", int, None),
    "hidden_size": ("d_model", int, REQUIRED),
    "head_dim": ("d_head", int, None),
    "intermediate_size": ("d_ff", int, REQUIRED),
    "rms_norm_eps": ("norm_epsilon", float, 1e-6),
    "tie_word_embeddings": ("tied", bool, False),
    "initializer_range": ("init_std", float, 0.02),
}
ROPE_SCALING_FIELDS = {
    "factor": ("rope_factor", float, REQUIRED),
    "low_freq_factor": ("rope_low", float, REQUIRED),
    "high_freq_factor": ("rope_high", float, REQUIRED),
    "original_max_position_embeddings": ("rope_context", int, REQUIRED),
}

# Features that change what a model computes and that ours lacks, refused if switched on: custom
# code, quantized weights, encoders, mixtures of experts, scaling and capping of scores and logits,
# other forms of attention.
UNSUPPORTED = re.compile(
    r"auto_map|quantization_config|pruned_heads|add_cross_attention|is_encoder_decoder|"
    r"tie_encoder_decoder|scale_attn_by_inverse_layer_idx|rope_interleaved|use_mrope|"
    r".*experts.*|moe_.*|router_.*|.*soft_?cap.*|.*_multiplier|logits?_scal.*|.*embed\w*_scal.*|"
    r"query_pre_attn_scalar|clip_qkv|qk_layernorm|use_qk_norm|(use_)?alibi|(use_)?parallel_\w+|"
    r"attention_chunk_size|no_rope_layers?|.*attention_sinks?.*"
)
# Fields that do not change what the model computes: names, types, training, text generation.
IGNORED = re.compile(
    r"architectures|model_type|transformers_version|transformers\.js_config|_name_or_path|dtype|"
    r"torch_dtype|use_cache|(bos|eos|pad|unk|sep)_token_id|attention_dropout|summary_.*|"
    r"task_specific_params|_num_labels|id2label|label2id|output_.*|return_dict|torchscript|"
    r"gradient_checkpointing|pretraining_tp|n_ctx|is_llama_config|max_window_layers"
)


@dataclass
class Fields:
    """Reads the fields of a JSON object and collects all problems with them."""

    values: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def get(self, name: str, kind: Any, default: Any = REQUIRED) -> Any:
        """The field `name` of type `kind`, or `default` if it is null or absent.

        A wrong value is added to `problems`, and an empty value of that type returned.
        """
        self.read.add(name)
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if is_of(value, kind):
            return kind(value)
        if value is None:
            self.problems.append(f"{name} is missing")
        else:
            self.refuse(name, value, kind.__name__)
        return kind()

    def get_all(self, table: dict[str, tuple[str, type, Any]]) -> dict[str, Any]:
        """The fields of `table` under our names."""
        return {
            ours: self.get(theirs, kind, default) for theirs, (ours, kind, default) in table.items()
        }

    def expect(self, name: str, expected: Any) -> None:
        """Add a problem unless the field `name` is null, absent or `expected`."""
        self.read.add(name)
        value = self.values.get(name)
        if value is not None and value != expected:
            self.refuse(name, value, f"{expected!r}, the only supported value")

    def refuse(self, name: str, value: Any, expected: str) -> None:
        self.problems.append(f"{name} is {reprlib.repr(value)}, expected {expected}")


# ---------------------------------------------------------------- reading


def read_config(values: dict[str, Any]) -> tuple[ModelConfig, Family, list[str]]:
    """The model that a config.json describes, how its tensors are named, and the ignored fields.

    UserError lists everything missing, of the wrong type, or not supported.
    """
    kind = values.get("model_type")
    require(
        isinstance(kind, str) and kind in FAMILIES,
        f"config.json: model_type is {reprlib.repr(kind)}, expected one of {', '.join(FAMILIES)}",
    )
    fields = Fields(values)
    settings = read_gpt2(fields) if kind == "gpt2" else read_llama(fields, kind)
    unused = []
    for name, value in values.items():
        if name in fields.read or value is None or IGNORED.fullmatch(name):
            continue
        if not UNSUPPORTED.fullmatch(name):
            unused.append(name)
        elif value not in (False, 0, {}, []):
            fields.refuse(name, value, "none: this feature is not supported")
    require(
        not fields.problems,
        f"config.json describes a model that cannot be imported: {'; '.join(fields.problems)}",
    )
    return ModelConfig(**settings), FAMILIES[kind], unused


def read_gpt2(fields: Fields) -> dict[str, Any]:
    fields.expect("scale_attn_weights", True)
    activation = fields.get("activation_function", str, "gelu_new")
    if activation not in ACTIVATIONS:
        fields.refuse("activation_function", activation, f"one of {', '.join(ACTIVATIONS)}")
    # Ours has one dropout rate for all places; it matters only for training.
    dropouts = {fields.get(f"{place}_pdrop", float, 0.1) for place in ("embd", "attn", "resid")}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    return fields.get_all(GPT2_FIELDS) | {"mlp": ACTIVATIONS.get(activation), "dropout": dropout}


def read_llama(fields: Fields, kind: str) -> dict[str, Any]:
    fields.expect("hidden_act", "silu")
    settings = fields.get_all(LLAMA_FIELDS) | read_rope(fields)
    if kind != "llama":
        fields.get("num_key_value_heads", int)  # required: transformers' own defaults differ
    if kind == "qwen3":
        settings["d_head"] = settings["d_head"] or 128

    # Attention must cover the whole context. Qwen's window has a switch, off by default; Mistral's
    # is 4,096 tokens if the field is absent (not null).
    layers = fields.get("layer_types", list, [])
    if any(layer != "full_attention" for layer in layers):
        fields.refuse("layer_types", layers, "'full_attention' everywhere")
    is_absent = "sliding_window" not in fields.values
    window = fields.get("sliding_window", int, 4096 if kind == "mistral" and is_absent else None)
    is_on = fields.get("use_sliding_window", bool, False) or kind not in ("qwen2", "qwen3")
    if window is not None and window < settings["context_length"] and is_on:
        expected = f"max_position_embeddings, {settings['context_length']}, or more"
        fields.refuse("sliding_window", window, expected)

    # Mistral's and Qwen2's biases do not depend on the file.
    if kind in ("llama", "qwen3"):
        attention_bias = fields.get("attention_bias", bool, False)
    else:
        fields.expect("attention_bias", False)
        attention_bias = False
    return settings | {
        "norm": "rms",
        "mlp": "swiglu",
        "qk_norm": kind == "qwen3",
        "bias": False,
        "qkv_bias": attention_bias or kind == "qwen2",
        "out_bias": attention_bias,
        "mlp_bias": kind == "llama" and fields.get("mlp_bias", bool, False),
    }


def read_rope(fields: Fields) -> dict[str, Any]:
    """RoPE's base and scaling, from transformers 5's rope_parameters or the earlier rope_theta and
    rope_scaling."""
    fields.expect("partial_rotary_factor", 1.0)
    older = fields.get("rope_scaling", dict, {})
    rope = Fields(fields.get("rope_parameters", dict, older) or older, fields.problems)
    rope.expect("partial_rotary_factor", 1.0)
    older_theta = fields.get("rope_theta", float, 10_000.0)
    settings = {"positions": "rope", "rope_theta": rope.get("rope_theta", float, older_theta)}
    older_kind = rope.get("type", str, "default")
    kind = rope.get("rope_type", str, older_kind)
    if kind == "llama3":
        settings |= rope.get_all(ROPE_SCALING_FIELDS)
    elif kind != "default":
        fields.refuse("rope_type", kind, "default or llama3")
    return settings


# ---------------------------------------------------------------- writing


def to_hf_config(config: ModelConfig) -> tuple[dict[str, Any], Family]:
    """A config.json for `config`, and how its tensors are named.

    A bias that the architecture declares but `config` lacks must be written as zeros. Raises
    UserError with the flags that would help if transformers cannot represent the model.
    """
    gpt2, llama = flags_to_export(config)
    if not gpt2:
        names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp]
        require(bool(names), f"ACTIVATIONS of {__name__} has no name for {config.mlp}")
        values = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        values |= {theirs: getattr(config, ours) for theirs, (ours, _, _) in GPT2_FIELDS.items()}
        values |= {"n_ctx": config.context_length, "activation_function": names[0]}
        values |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        return values, GPT2

    require(
        not llama,
        f"transformers has no architecture for this model: GPT-2's needs {' '.join(gpt2)}, and "
        f"Llama's needs {' '.join(llama)}; a model trained with either can be exported",
    )
    values = {theirs: getattr(config, ours) for theirs, (ours, _, _) in LLAMA_FIELDS.items()}
    values |= {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ff_width,
        "hidden_act": "silu",
        "attention_dropout": config.dropout,
    }

    # Whichever of Llama, Qwen2 and Qwen3 has exactly these parts.
    plain_heads = config.head_width * config.n_heads == config.d_model
    only_qkv_biased = config.biased("qkv") and not config.biased("out") and not config.biased("mlp")
    attention_bias = config.biased("qkv") or config.biased("out")
    if config.qk_norm:
        values |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        values |= {"attention_bias": attention_bias}
    elif only_qkv_biased and plain_heads:
        values |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    else:
        values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        values |= {"attention_bias": attention_bias, "mlp_bias": config.biased("mlp")}

    # RoPE in the form that every transformers release since 4.43 reads.
    values |= {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_factor != 1:
        scaling = {
            theirs: getattr(config, ours) for theirs, (ours, _, _) in ROPE_SCALING_FIELDS.items()
        }
        values["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return values, LLAMA
