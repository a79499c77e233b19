"""config.json of the GPT-2 and Llama families, to a ModelConfig and back.

Nothing is guessed: a field that would change the function and that we do not have, or do not know,
is refused by its name. Knows no tensors and no files.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt.config import ModelConfig
from gpt.convert.layout import GPT2, LLAMA, Family
from gpt.errors import is_of, require

ACTIVATIONS = {  # theirs to ours
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
MOST, LARGEST = 2**31 - 1, 3e38  # what int32 and float32 have room for
# What says nothing of the function: names, types, training, and how text is generated.
HARMLESS = re.compile(
    "architectures|model_type|transformers_version|transformers.js_config|_name_or_path|dtype|"
    "torch_dtype|use_cache|(bos|eos|pad|unk|sep|decoder_start)_token_id|attention_dropout|"
    "(embd|attn|resid)_pdrop|summary_.*|task_specific_params|_?num_labels|"
    "id2label|label2id|problem_type|output_.*|return_dict|use_return_dict|torchscript|"
    "chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|is_llama_config|is_decoder|"
    "n_ctx|n_special|predict_special_tokens|reorder_and_upcast_attn|max_window_layers|"
    "_?attn_implementation.*|do_sample|temperature|top_[kp]|(max|min)_(new_)?(length|tokens)|"
    "num_beams|num_return_sequences|repetition_penalty|length_penalty|finetuning_task|"
    "use_bfloat16|tokenizer_class|prefix|keys_to_ignore_at_inference|unsloth_(version|fixed)"
)
# What must be off, or absent: the architecture has it, ours has not.
OFF = ("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder", "use_mrope")
OFF += ("scale_attn_by_inverse_layer_idx", "rope_interleaved")


@dataclass
class Fields:
    """The fields of a config.json that have not been read yet."""

    left: dict[str, Any]

    def take(self, name: str, kind: Any, default: Any = ...) -> Any:
        """The field `name`, of type `kind`; `default` where it is null or absent."""
        value = self.left.pop(name, None)
        if value is None:
            require(default is not ..., f"config.json lacks {name}: nothing is guessed")
            return default
        require(
            is_of(value, kind) and not (kind is int and abs(value) > MOST),
            f"config.json: {name} is {brief(value)}: expected {kind.__name__}",
        )
        return value

    def number(self, name: str, default: Any = ...) -> float:
        """The field `name` as a number that float32 has room for."""
        value = self.take(name, float, default)
        good = abs(value) <= LARGEST
        require(good, f"config.json: {name} is {brief(value)}: expected a smaller number")
        return float(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """UserError unless the field `name` is one of `allowed`, null or absent."""
        value = self.left.pop(name, None)
        good = value is None or any(type(value) is type(a) and value == a for a in allowed)
        choice = " or ".join(map(repr, allowed)) or "nothing"
        require(
            good,
            f"config.json: {name} is {brief(value)}, which changes the function of the model in a "
            f"way that this one cannot: expected {choice}",
        )

    def finish(self) -> None:
        """UserError if a field is left that may change the function."""
        for name in OFF:
            self.expect(name, False)
        self.expect("pruned_heads", {})
        for name, value in self.left.items():
            require(
                value is None or HARMLESS.fullmatch(name) is not None,
                f"config.json: {brief(name)} is {brief(value)}: a field that this converter does "
                "not know may change the function of the model; nothing is guessed",
            )


def brief(value: Any) -> str:
    """A value in a few words."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_config(values: dict[str, Any]) -> tuple[ModelConfig, Family]:
    """The model that a config.json describes, and its naming; UserError names the wrong field."""
    kind = values.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    require(known, f"config.json: model_type is {brief(kind)}: expected {', '.join(FAMILIES)}")
    family, read = FAMILIES[kind]
    fields = Fields(dict(values))
    settings = read(fields, kind)
    settings["init_std"] = fields.number("initializer_range", ModelConfig.init_std)
    fields.finish()
    return ModelConfig(**settings), family


def read_gpt2(f: Fields, kind: str) -> dict[str, Any]:
    """GPT-2's fields."""
    activation = f.take("activation_function", str, "gelu_new")
    require(
        activation in ACTIVATIONS,
        f"config.json: activation_function is {brief(activation)}: expected one of "
        + ", ".join(ACTIVATIONS),
    )
    f.expect("scale_attn_weights", True)
    drops = {f.number(f"{place}_pdrop", 0.1) for place in ("embd", "attn", "resid")}
    return {
        "vocab_size": f.take("vocab_size", int),
        "context_length": f.take("n_positions", int),
        "n_layers": f.take("n_layer", int),
        "n_heads": f.take("n_head", int),
        "d_model": f.take("n_embd", int),
        "d_ff": f.take("n_inner", int, None),
        "mlp": ACTIVATIONS[activation],
        "norm_epsilon": f.number("layer_norm_epsilon", 1e-5),
        "tied": f.take("tie_word_embeddings", bool, True),
        "dropout": drops.pop() if len(drops) == 1 else 0.0,  # training's alone
    }


def read_llama(f: Fields, kind: str) -> dict[str, Any]:
    """The fields of Llama and of those that are almost it."""
    n_heads, context = f.take("num_attention_heads", int), f.take("max_position_embeddings", int)
    f.expect("hidden_act", "silu")
    read_window(f, kind, context)
    if kind not in ("llama", "qwen3"):  # biases are settled there, whatever is written
        f.expect("attention_bias", False)
    attention = f.take("attention_bias", bool, False)
    default_width = 128 if kind == "qwen3" else None  # transformers' own
    return read_rope(f) | {
        "vocab_size": f.take("vocab_size", int),
        "context_length": context,
        "n_layers": f.take("num_hidden_layers", int),
        "n_heads": n_heads,
        "n_kv_heads": f.take("num_key_value_heads", int, n_heads if kind == "llama" else ...),
        "d_model": f.take("hidden_size", int),
        "d_head": f.take("head_dim", int, default_width),
        "d_ff": f.take("intermediate_size", int),
        "norm": "rms",
        "norm_epsilon": f.number("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "qk_norm": kind == "qwen3",
        "tied": f.take("tie_word_embeddings", bool, False),
        "bias": False,
        "qkv_bias": attention or kind == "qwen2",
        "out_bias": attention,
        "mlp_bias": f.take("mlp_bias", bool, False) if kind == "llama" else False,
    }


def read_window(f: Fields, kind: str, context: int) -> None:
    """UserError if attention looks back less far than the context."""
    layers = f.take("layer_types", list, [])
    require(
        all(layer == "full_attention" for layer in layers),
        f"config.json: layer_types has {brief(layers)}: only full_attention is known",
    )
    on = f.take("use_sliding_window", bool, kind == "mistral")  # which has no such switch
    named = "sliding_window" in f.left
    window = f.take("sliding_window", int, None)
    if kind == "mistral" and not named:
        window = 4096  # transformers' own
    require(
        window is None or window >= context or (not on and kind in ("qwen2", "qwen3")),
        f"config.json: sliding_window is {window}, less than max_position_embeddings {context}: "
        "only attention over the whole context is known",
    )


def read_rope(f: Fields) -> dict[str, Any]:
    """RoPE's base and stretching, in the old fields or the new one that holds them all."""
    f.expect("partial_rotary_factor", 1.0, 1)
    new, old = f.take("rope_parameters", dict, {}), f.take("rope_scaling", dict, {})
    require(
        not (new and old) or new == old,
        "config.json has rope_scaling and rope_parameters, and they differ: drop one",
    )
    rope = Fields(dict(new or old))
    kind = rope.take("rope_type", str, None) or rope.take("type", str, "default")
    rope.expect("type", kind)
    rope.expect("partial_rotary_factor", 1.0, 1)
    bases = {g.number("rope_theta") for g in (f, rope) if g.left.get("rope_theta") is not None}
    require(len(bases) <= 1, f"config.json gives several rope_theta: {brief(sorted(bases))}")
    found: dict[str, Any] = {"positions": "rope", "rope_theta": bases.pop() if bases else 1e4}
    if kind == "llama3":
        found["rope_factor"] = rope.number("factor")
        found["rope_low"] = rope.number("low_freq_factor")
        found["rope_high"] = rope.number("high_freq_factor")
        found["rope_context"] = rope.take("original_max_position_embeddings", int)
    else:
        known = kind == "default"
        require(known, f"config.json: rope_type is {brief(kind)}: expected default or llama3")
    for name, value in rope.left.items():
        require(value is None, f"config.json: RoPE's {brief(name)} is {brief(value)}: not known")
    return found


FAMILIES: dict[str, tuple[Family, Callable[[Fields, str], dict[str, Any]]]] = {
    "gpt2": (GPT2, read_gpt2),
    "llama": (LLAMA, read_llama),
    "mistral": (LLAMA, read_llama),
    "qwen2": (LLAMA, read_llama),
    "qwen3": (LLAMA, read_llama),
}
