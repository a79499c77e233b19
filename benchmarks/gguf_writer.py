"""Write our weights as a GGUF file of the Llama architecture, for llama.cpp.

    python benchmarks/gguf_writer.py llama q8_0 FILE

Needs the `gguf` package (the extra `peers`). The file has no tokenizer: token ids go in and out.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from gpt.config import ModelConfig
from gpt.convert.hf_config import to_hf_config
from gpt.convert.hf_weights import tensor_shapes, to_tensors
from gpt.errors import require

KINDS = {"f32": gguf.LlamaFileType.ALL_F32, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def write(config: ModelConfig, params: dict, kind: str, path: Path) -> None:
    """Write stacked `params` in float32, or with every matrix in 8-bit blocks ("q8_0").

    Raises UserError unless the model is a plain Llama: no biases, no RoPE scaling.
    """
    values, family = to_hf_config(config)
    plain = values["model_type"] == "llama" and not config.bias and config.rope_factor == 1
    require(plain, "this model is not a plain Llama, the only form that can be written")
    writer = gguf.GGUFWriter(path, "llama")
    describe_model(writer, config)
    writer.add_file_type(KINDS[kind])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    shapes = tensor_shapes(config, family)
    tensors = to_tensors(config, family, params, np.dtype(np.float32))
    for name, tensor in zip(shapes, tensors, strict=True):
        theirs = names.get_name(name, (".weight",))
        add(writer, theirs, in_turn(config, name, tensor), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe_model(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    """The fields from which llama.cpp builds the model."""
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c.context_length)
    writer.add_block_count(c.n_layers)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.ff_width)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_width)
    writer.add_value_length(c.head_width)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_rope_dimension_count(c.head_width)
    writer.add_rope_freq_base(c.rope_theta)


def in_turn(c: ModelConfig, name: str, tensor: np.ndarray) -> np.ndarray:
    """Query and key rows in llama.cpp's order: its RoPE rotates pairs (2i, 2i + 1) of a head, ours
    (i, i + H/2)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    halves = tensor.reshape(-1, 2, c.head_width // 2, c.d_model)
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    """Add a tensor; norms stay in float32, as in llama.cpp's own files."""
    tensor = np.ascontiguousarray(tensor)
    if kind == "f32" or tensor.ndim == 1:
        writer.add_tensor(name, tensor)
        return
    blocks = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(tensor, blocks), raw_dtype=blocks)


if __name__ == "__main__":
    from workers import models

    name, kind, path = sys.argv[1:]
    config = models.model_config(name)
    write(config, models.random_weights(config), kind, Path(path))
