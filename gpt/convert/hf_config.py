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
REQUIRED: Any = object()

# Fields that change what a model computes, each with the one value that this model implements.
FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
# Features of other models, refused wherever they are set: models with code or quantized weights of
# their own, mixtures of experts, factors and caps on scores and logits, attention of other forms.
UNSUPPORTED = re.compile(
    r"auto_map|quantization_config|.*experts.*|moe_.*|router_.*|.*soft_?cap.*|.*_multiplier|"
    r"logits?_scal.*|.*embed\w*_scal.*|query_pre_attn_scalar|clip_qkv|qk_layernorm|use_qk_norm|"
    r"(use_)?alibi|(use_)?parallel_\w+|attention_chunk_size|no_rope_layers?|.*attention_sinks?.*"
)
# Fields that say nothing about the function: names, types, training, and how text is generated.
IGNORED = re.compile(
    r"architectures|model_type|transformers_version|transformers\.js_config|_name_or_path|dtype|"
    r"torch_dtype|use_cache|(bos|eos|pad|unk|sep)_token_id|attention_dropout|summary_.*|"
    r"task_specific_params|_num_labels|(id2label|label2id)|output_.*|return_dict|torchscript|"
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
            return kind()
        if not is_of(value, kind):
            self.problems.append(f"{name} is {brief(value)}, expected {kind.__name__}")
            return kind()
        if kind in LARGEST and not abs(value) <= LARGEST[kind]:  # NaN too
            self.problems.append(f"{name} is {brief(value)}, expected a smaller number")
            return kind()
        return kind(value)

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

    def unused(self) -> list[str]:
        """The fields that nothing has read, without those known to be harmless."""
        left = [n for n, value in self.values.items() if n not in self.read and value is not None]
        return [name for name in left if not IGNORED.fullmatch(name)]


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
    settings["init_std"] = fields.get("initializer_range", float, ModelConfig.init_std)
    for name, expected in FIXED.items():
        fields.expect(name, expected)
    unused = fields.unused()
    for name in unused:
        if UNSUPPORTED.fullmatch(name) and values[name] not in (False, 0, {}, []):
            fields.problems.append(f"{name} is {brief(values[name])}, which is not supported")
    require(
        not fields.problems,
        f"config.json describes a model that cannot be imported: {'; '.join(fields.problems)}",
    )
    return ModelConfig(**settings), FAMILIES[kind], unused


def read_gpt2(f: Fields) -> dict[str, Any]:
    activation = f.get("activation_function", str, "gelu_new")
    if activation not in ACTIVATIONS:
        f.problems.append(
            f"activation_function is {brief(activation)}, expected one of {', '.join(ACTIVATIONS)}"
        )
    dropouts = {f.get(f"{place}_pdrop", float, 0.1) for place in ("embd", "attn", "resid")}
    return {
        "vocab_size": f.get("vocab_size", int),
        "context_length": f.get("n_positions", int),
        "n_layers": f.get("n_layer", int),
        "n_heads": f.get("n_head", int),
        "d_model": f.get("n_embd", int),
        "d_ff": f.get("n_inner", int, None),
        "mlp": ACTIVATIONS.get(activation),
        "norm_epsilon": f.get("layer_norm_epsilon", float, 1e-5),
        "tied": f.get("tie_word_embeddings", bool, True),
        # One rate for all places is all that ours has; it matters to training alone.
        "dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
    }


def read_llama(f: Fields, kind: str) -> dict[str, Any]:
    """The fields of Llama, Mistral, Qwen2 and Qwen3."""
    f.expect("hidden_act", "silu")
    context_length = f.get("max_position_embeddings", int)
    check_window(f, kind, context_length)
    n_heads = f.get("num_attention_heads", int)

    if kind in ("llama", "qwen3"):
        attention_bias = f.get("attention_bias", bool, False)
    else:
        f.expect("attention_bias", False)  # these two settle their biases whatever the file says
        attention_bias = False

    return read_rope(f) | {
        "vocab_size": f.get("vocab_size", int),
        "context_length": context_length,
        "n_layers": f.get("num_hidden_layers", int),
        "n_heads": n_heads,
        "n_kv_heads": f.get("num_key_value_heads", int, n_heads if kind == "llama" else REQUIRED),
        "d_model": f.get("hidden_size", int),
        "d_head": f.get("head_dim", int, 128 if kind == "qwen3" else None),
        "d_ff": f.get("intermediate_size", int),
        "norm": "rms",
        "norm_epsilon": f.get("rms_norm_eps", float, 1e-6),
        "mlp": "swiglu",
        "qk_norm": kind == "qwen3",
        "tied": f.get("tie_word_embeddings", bool, False),
        "bias": False,
        "qkv_bias": attention_bias or kind == "qwen2",
        "out_bias": attention_bias,
        "mlp_bias": f.get("mlp_bias", bool, False) if kind == "llama" else False,
    }


def check_window(f: Fields, kind: str, context_length: int) -> None:
    """Add a problem if attention does not look back over the whole context."""
    layers = f.get("layer_types", list, [])
    if any(layer != "full_attention" for layer in layers):
        f.problems.append(
            f"layer_types is {brief(layers)}, only 'full_attention' everywhere is supported"
        )
    # Qwen's window has a switch, off by default; transformers gives Mistral one of 4,096 tokens
    # where the field is absent.
    has_switch = kind in ("qwen2", "qwen3")
    switched_on = f.get("use_sliding_window", bool, not has_switch)
    absent = "sliding_window" not in f.values
    window = f.get("sliding_window", int, 4096 if kind == "mistral" and absent else None)
    if window is not None and window < context_length and (switched_on or not has_switch):
        f.problems.append(
            f"sliding_window is {window}, less than max_position_embeddings {context_length}; "
            "only attention over the whole context is supported"
        )


def read_rope(f: Fields) -> dict[str, Any]:
    """RoPE's base and scaling: in rope_parameters as transformers 5 writes them, or in rope_theta
    and rope_scaling as before."""
    new = f.get("rope_parameters", dict, {})
    old = f.get("rope_scaling", dict, {})
    if new and old and new != old:
        f.problems.append("rope_scaling and rope_parameters are both there, and differ")
    rope = Fields(new or old, f.problems)
    rope.expect("partial_rotary_factor", 1.0)

    bases = {one.get("rope_theta", float, None) for one in (f, rope)} - {None}
    if len(bases) > 1:
        f.problems.append(f"there are two values of rope_theta: {brief(sorted(bases))}")
    settings: dict[str, Any] = {"positions": "rope", "rope_theta": max(bases, default=10_000.0)}

    older_name = rope.get("type", str, "default")
    kind = rope.get("rope_type", str, older_name)
    if kind == "llama3":
        settings["rope_factor"] = rope.get("factor", float)
        settings["rope_low"] = rope.get("low_freq_factor", float)
        settings["rope_high"] = rope.get("high_freq_factor", float)
        settings["rope_context"] = rope.get("original_max_position_embeddings", int)
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
        flags = dict.fromkeys(min(gpt2, llama, key=len).values())  # each once
        raise UserError(
            "transformers has no form for this model: "
            f"GPT-2's does not have {', '.join(gpt2)}; Llama's does not have {', '.join(llama)}. "
            f"A model trained with {' '.join(flags)} can be exported"
        )
    if not gpt2:
        kind = "gpt2"
        values = gpt2_fields(c)
    else:
        kind = llama_kind(c)
        values = llama_fields(c, kind)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "use_cache": True,
    }
    return common | values, FAMILIES[kind]


def gpt2_obstacles(c: ModelConfig) -> dict[str, str]:
    """What GPT-2's form cannot express, each with the flags without which it is not there.

    A bias that the form has and the model lacks is no obstacle: it is written as zeros.
    """
    found = {}
    if c.positions != "learned":
        found[f"{c.positions} positions"] = "--model.positions learned"
    if c.norm != "layer":
        found["RMSNorm"] = "--model.norm layer"
    if c.norm_place != "pre":
        found["norms after the sums"] = "--model.norm-place pre"
    if c.mlp == "swiglu":
        found["SwiGLU"] = "--model.mlp gelu_tanh"
    if c.kv_heads != c.n_heads:
        found["shared key/value heads"] = f"--model.n-kv-heads {c.n_heads}"
    if c.head_width * c.n_heads != c.d_model:
        found[f"heads of width {c.head_width}"] = "--model.d-head None"
    if c.qk_norm:
        found["QK-norm"] = "--model.no-qk-norm"
    if c.logit_softcap:
        found["a cap on the logits"] = "--model.logit-softcap 0"
    return found


def llama_obstacles(c: ModelConfig) -> dict[str, str]:
    """What no form of Llama, Qwen2 or Qwen3 can express, each with the flags to avoid it."""
    found = {}
    if c.positions != "rope":
        found[f"{c.positions} positions"] = "--model.positions rope"
    if c.norm != "rms":
        found["LayerNorm"] = "--model.norm rms"
    if c.biased("norm"):
        own = c.norm_bias is not None
        found["biases of the norms"] = "--model.norm-bias False" if own else "--model.no-bias"
    if c.norm_place != "pre":
        found["norms after the sums"] = "--model.norm-place pre"
    if c.mlp != "swiglu":
        found[f"{c.mlp} without a gate"] = "--model.mlp swiglu"
    if c.qk_norm and c.biased("mlp"):
        own = c.mlp_bias is not None
        flag = "--model.mlp-bias False" if own else "--model.no-bias"
        found["QK-norm beside biases of the MLP"] = flag
    if c.logit_softcap:
        found["a cap on the logits"] = "--model.logit-softcap 0"
    return found


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
    return {
        "activation_function": activation,
        "n_positions": c.context_length,
        "n_ctx": c.context_length,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_embd": c.d_model,
        "n_inner": c.d_ff,
        "layer_norm_epsilon": c.norm_epsilon,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
    }


def llama_fields(c: ModelConfig, kind: str) -> dict[str, Any]:
    # RoPE in the form that every transformers since 4.43 reads.
    scaling = None
    if c.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low,
            "high_freq_factor": c.rope_high,
            "original_max_position_embeddings": c.rope_context,
        }
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
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = c.biased("qkv") or c.biased("out")
        values["head_dim"] = c.head_width
    if kind == "llama":
        values["mlp_bias"] = c.biased("mlp")
    else:
        values["use_sliding_window"] = False
    return values


def with_declared_biases(c: ModelConfig, family: Family) -> ModelConfig:
    """The model with every bias that its exported form declares; those it lacks will be zeros."""
    if family is GPT2:
        return replace(c, bias=True, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    if llama_kind(c) == "qwen2":
        return c
    biased = c.biased("qkv") or c.biased("out")
    return replace(c, qkv_bias=biased, out_bias=biased)
