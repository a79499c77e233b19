"""config.json of the GPT-2 and Llama families: read into a ModelConfig, and written from one.

Fields that are known are read; fields that would change what the model computes, in a way that
ours cannot, are refused by name; the rest is reported and ignored, so that a new field of the next
transformers stops no import.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from gpt.config import ModelConfig
from gpt.convert.hf_weights import GPT2, LLAMA, Family
from gpt.errors import UserError, is_of, require

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ACTIVATIONS = {  # theirs to ours
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}

LARGEST = {int: 2**31 - 1, float: 3e38}  # what int32 and float32 can hold

# Fields that mean the same as one of ours: our name, the type, and the value where it is absent.
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

# Features that change what a model computes and that ours has not, refused wherever they are on:
# code and quantized weights of its own, encoders, mixtures of experts, factors and caps on scores
# and logits, attention of other forms.
UNSUPPORTED = re.compile(
    r"auto_map|quantization_config|pruned_heads|add_cross_attention|is_encoder_decoder|"
    r"tie_encoder_decoder|scale_attn_by_inverse_layer_idx|rope_interleaved|use_mrope|"
    r".*experts.*|moe_.*|router_.*|.*soft_?cap.*|.*_multiplier|logits?_scal.*|.*embed\w*_scal.*|"
    r"query_pre_attn_scalar|clip_qkv|qk_layernorm|use_qk_norm|(use_)?alibi|(use_)?parallel_\w+|"
    r"attention_chunk_size|no_rope_layers?|.*attention_sinks?.*"
)
# Fields that say nothing about the function: names, types, training, and how text is generated.
IGNORED = re.compile(
    r"architectures|model_type|transformers_version|transformers\.js_config|_name_or_path|dtype|"
    r"torch_dtype|use_cache|(bos|eos|pad|unk|sep)_token_id|attention_dropout|summary_.*|"
    r"task_specific_params|_num_labels|id2label|label2id|output_.*|return_dict|torchscript|"
    r"gradient_checkpointing|pretraining_tp|n_ctx|is_llama_config|max_window_layers"
)


@dataclass
class Fields:
    """The fields of a JSON object as they are read, and all that is found to be wrong with them."""

    values: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def get(self, name: str, kind: Any, default: Any = REQUIRED) -> Any:
        """The field `name` of type `kind`, or `default` where it is null or absent.

        A wrong value is added to `problems`, and an empty one of its type is returned.
        """
        self.read.add(name)
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if value is None:
            self.problems.append(f"{name} is missing")
        elif not is_of(value, kind):
            self.problems.append(f"{name} is {brief(value)}, expected {kind.__name__}")
        elif kind in LARGEST and not abs(value) <= LARGEST[kind]:  # NaN too
            self.problems.append(f"{name} is {brief(value)}, expected a smaller number")
        else:
            return kind(value)
        return kind()

    def get_all(self, table: dict[str, tuple[str, type, Any]]) -> dict[str, Any]:
        """The fields of a table, under our names."""
        return {
            ours: self.get(theirs, kind, default) for theirs, (ours, kind, default) in table.items()
        }

    def expect(self, name: str, expected: Any) -> None:
        """Add a problem unless the field `name` is null, absent or `expected`."""
        self.read.add(name)
        value = self.values.get(name)
        # 1 is as good as 1.0 here, but True is not 1.
        same_kind = isinstance(value, bool) == isinstance(expected, bool)
        if value is not None and not (same_kind and value == expected):
            self.problems.append(
                f"{name} is {brief(value)}, which changes what the model computes; only "
                f"{expected!r} is supported"
            )


def brief(value: Any) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- reading


def read_config(values: dict[str, Any]) -> tuple[ModelConfig, Family, list[str]]:
    """The model that a config.json describes, how its tensors are named, and the fields ignored.

    UserError lists all that is missing, of a wrong type, or not supported.
    """
    kind = values.get("model_type")
    require(
        isinstance(kind, str) and kind in FAMILIES,
        f"config.json: model_type is {brief(kind)}, expected one of {', '.join(FAMILIES)}",
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
            fields.problems.append(f"{name} is {brief(value)}, which is not supported")
    require(
        not fields.problems,
        f"config.json describes a model that cannot be imported: {'; '.join(fields.problems)}",
    )
    return ModelConfig(**settings), FAMILIES[kind], unused


def read_gpt2(f: Fields) -> dict[str, Any]:
    f.expect("scale_attn_weights", True)
    activation = f.get("activation_function", str, "gelu_new")
    if activation not in ACTIVATIONS:
        f.problems.append(
            f"activation_function is {brief(activation)}, expected one of {', '.join(ACTIVATIONS)}"
        )
    # One rate for all places is all that ours has; it matters to training alone.
    dropouts = {f.get(f"{place}_pdrop", float, 0.1) for place in ("embd", "attn", "resid")}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    return f.get_all(GPT2_FIELDS) | {"mlp": ACTIVATIONS.get(activation), "dropout": dropout}


def read_llama(f: Fields, kind: str) -> dict[str, Any]:
    """The fields of Llama, Mistral, Qwen2 and Qwen3."""
    f.expect("hidden_act", "silu")
    settings = f.get_all(LLAMA_FIELDS) | read_rope(f)
    check_window(f, kind, settings["context_length"])
    if kind != "llama":
        f.get("num_key_value_heads", int)  # required: transformers' own defaults differ
    if kind == "qwen3":
        settings["d_head"] = settings["d_head"] or 128

    # Where Mistral and Qwen2 have biases does not depend on what the file says.
    if kind in ("llama", "qwen3"):
        attention_bias = f.get("attention_bias", bool, False)
    else:
        f.expect("attention_bias", False)
        attention_bias = False
    return settings | {
        "norm": "rms",
        "mlp": "swiglu",
        "qk_norm": kind == "qwen3",
        "bias": False,
        "qkv_bias": attention_bias or kind == "qwen2",
        "out_bias": attention_bias,
        "mlp_bias": kind == "llama" and f.get("mlp_bias", bool, False),
    }


def check_window(f: Fields, kind: str, context_length: int) -> None:
    """Add a problem if attention does not look back over the whole context."""
    layers = f.get("layer_types", list, [])
    if any(layer != "full_attention" for layer in layers):
        f.problems.append(
            f"layer_types is {brief(layers)}, only 'full_attention' everywhere is supported"
        )
    # Qwen's window has a switch, off by default. Mistral's is 4,096 tokens where the field is
    # absent (not null).
    switch = f.get("use_sliding_window", bool, False)
    has_switch = kind in ("qwen2", "qwen3")
    absent = "sliding_window" not in f.values
    window = f.get("sliding_window", int, 4096 if kind == "mistral" and absent else None)
    if window is not None and window < context_length and (switch or not has_switch):
        f.problems.append(
            f"sliding_window is {window}, less than max_position_embeddings {context_length}; "
            "only attention over the whole context is supported"
        )


def read_rope(f: Fields) -> dict[str, Any]:
    """RoPE's base and scaling: in rope_parameters as transformers 5 writes them, or in rope_theta
    and rope_scaling as before."""
    f.expect("partial_rotary_factor", 1.0)
    new = f.get("rope_parameters", dict, {})
    old = f.get("rope_scaling", dict, {})
    if new and old and new != old:
        f.problems.append("rope_scaling and rope_parameters are both there, and differ")
    rope = Fields(new or old, f.problems)
    rope.expect("partial_rotary_factor", 1.0)

    bases = {one.get("rope_theta", float, None) for one in (f, rope)} - {None}
    if len(bases) > 1:
        f.problems.append(f"there are two values of rope_theta: {brief(sorted(bases))}")
    settings = {"positions": "rope", "rope_theta": max(bases, default=10_000.0)}

    older_name = rope.get("type", str, "default")
    kind = rope.get("rope_type", str, older_name)
    if kind == "llama3":
        settings |= rope.get_all(ROPE_SCALING_FIELDS)
    elif kind != "default":
        f.problems.append(f"rope_type is {brief(kind)}, expected default or llama3")
    return settings


# ---------------------------------------------------------------- writing


def to_hf_config(c: ModelConfig) -> tuple[dict[str, Any], Family]:
    """A config.json for `c`, and the names of its tensors.

    UserError lists what no form of transformers expresses, and the flags that would change it.
    """
    gpt2, llama = gpt2_obstacles(c), llama_obstacles(c)
    if gpt2 and llama:
        flags = dict.fromkeys(flag for _, flag in min(gpt2, llama, key=len))  # each once
        raise UserError(
            "transformers has no form for this model: "
            f"GPT-2's does not have {', '.join(reason for reason, _ in gpt2)}; "
            f"Llama's does not have {', '.join(reason for reason, _ in llama)}. "
            f"A model trained with {' '.join(flags)} can be exported"
        )
    kind = llama_kind(c) if gpt2 else "gpt2"
    values = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "use_cache": True}
    values |= gpt2_fields(c) if kind == "gpt2" else llama_fields(c, kind)
    return values, FAMILIES[kind]


def gpt2_obstacles(c: ModelConfig) -> list[tuple[str, str]]:
    """What `c` has and GPT-2's form has not, each with the flag that would change it.

    A bias that the format requires and the model lacks is written as zeros.
    """
    wide = c.head_width * c.n_heads != c.d_model
    obstacles = [
        (c.positions != "learned", f"{c.positions} positions", "--model.positions learned"),
        (c.norm != "layer", "RMSNorm", "--model.norm layer"),
        (c.norm_place != "pre", "norms after the sums", "--model.norm-place pre"),
        (c.gated_mlp, "SwiGLU", "--model.mlp gelu_tanh"),
        (c.kv_heads != c.n_heads, "shared key/value heads", f"--model.n-kv-heads {c.n_heads}"),
        (wide, f"heads of width {c.head_width}", "--model.d-head None"),
        (c.qk_norm, "QK-norm", "--model.no-qk-norm"),
        (c.logit_softcap != 0, "a cap on the logits", "--model.logit-softcap 0"),
    ]
    return [(reason, flag) for holds, reason, flag in obstacles if holds]


def llama_obstacles(c: ModelConfig) -> list[tuple[str, str]]:
    """What `c` has and no form of Llama, Qwen2 or Qwen3 has, each with the flag to change it."""
    no_norm_bias = "--model.no-bias" if c.norm_bias is None else "--model.norm-bias False"
    no_mlp_bias = "--model.no-bias" if c.mlp_bias is None else "--model.mlp-bias False"
    qwen3_mlp_bias = c.qk_norm and c.biased("mlp")
    obstacles = [
        (c.positions != "rope", f"{c.positions} positions", "--model.positions rope"),
        (c.norm != "rms", "LayerNorm", "--model.norm rms"),
        (c.biased("norm"), "biases of the norms", no_norm_bias),
        (c.norm_place != "pre", "norms after the sums", "--model.norm-place pre"),
        (not c.gated_mlp, f"{c.mlp} without a gate", "--model.mlp swiglu"),
        (qwen3_mlp_bias, "QK-norm beside biases of the MLP", no_mlp_bias),
        (c.logit_softcap != 0, "a cap on the logits", "--model.logit-softcap 0"),
    ]
    return [(reason, flag) for holds, reason, flag in obstacles if holds]


def llama_kind(c: ModelConfig) -> str:
    """The model_type that has exactly these parts."""
    if c.qk_norm:
        return "qwen3"
    plain_heads = c.head_width * c.n_heads == c.d_model
    if c.biased("qkv") and not c.biased("out") and not c.biased("mlp") and plain_heads:
        return "qwen2"
    return "llama"


def gpt2_fields(c: ModelConfig) -> dict[str, Any]:
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.mlp)
    values = {theirs: getattr(c, ours) for theirs, (ours, _, _) in GPT2_FIELDS.items()}
    values |= {"n_ctx": c.context_length, "activation_function": activation}
    return values | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), c.dropout)


def llama_fields(c: ModelConfig, kind: str) -> dict[str, Any]:
    c = replace(c, n_kv_heads=c.kv_heads, d_head=c.head_width, d_ff=c.ff_width)
    values = {theirs: getattr(c, ours) for theirs, (ours, _, _) in LLAMA_FIELDS.items()}
    values |= {"hidden_act": "silu", "attention_dropout": c.dropout}
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = c.biased("qkv") or c.biased("out")
    if kind == "llama":
        values["mlp_bias"] = c.biased("mlp")
    else:
        values["use_sliding_window"] = False

    # RoPE in the form that every transformers since 4.43 reads.
    values |= {"rope_theta": c.rope_theta, "rope_scaling": None}
    if c.rope_factor != 1:
        scaling = {theirs: getattr(c, ours) for theirs, (ours, _, _) in ROPE_SCALING_FIELDS.items()}
        values["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return values


def with_declared_biases(c: ModelConfig, family: Family) -> ModelConfig:
    """The model with every bias that its exported form declares; those it lacks will be zeros."""
    if family is GPT2:
        return replace(c, bias=True, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    if llama_kind(c) == "qwen2":
        return c
    biased = c.biased("qkv") or c.biased("out")
    return replace(c, qkv_bias=biased, out_bias=biased)
