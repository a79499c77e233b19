"""A run's folder of ours becomes a model's folder in the Hugging Face form. Prints nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt import checkpoint
from gpt.config import ModelConfig, Weights, from_json
from gpt.convert import tokenizers_out, weights
from gpt.convert.describe import describe, with_biases
from gpt.convert.layout import Family, tensor_shapes
from gpt.convert.place import making, require_new
from gpt.convert.tensorfile import FLOATS, WHOLE, write_file
from gpt.data import tokenizers
from gpt.errors import require
from gpt.model import transformer
from gpt.sampling.language_model import choose_tree

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
KEPT = {"float32": "F32", "bfloat16": "BF16"}


def give_out(
    run: Path, dest: Path, step: int | None, which: Weights | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Export the newest whole checkpoint of `run`, or that of `step`, to the new folder `dest`.

    `which`: the average over the run or the last weights (default: the average where one is kept).
    `tell` hears of damaged checkpoints that are passed over. Returns the config.json. UserError,
    with nothing written, if no form of transformers expresses the model or its tokenizer.
    """
    require(run.is_dir(), f"no folder {run}: expected a run's folder")
    require_new(dest)
    about, params, notes = open_run(run, step, which)
    for note in notes:
        tell(f"{note}; an earlier checkpoint is used")
    config, tokenizer = read_about(about)
    values, family = describe(config)
    dtype = dtype_of(about, config)
    values |= {"dtype": NAMES[dtype]} | ends(tokenizer)
    with making(dest) as folder:
        tokenizers_out.write(tokenizer, folder, config.context_length)
        tokenizers_out.write_json(folder / "config.json", values)
        tokenizers_out.write_json(folder / "generation_config.json", ends(tokenizer))
        write_weights(folder / WHOLE, with_biases(config, family), family, params, dtype)
    return values


def open_run(
    run: Path, step: int | None, which: Weights | None
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What a checkpoint says of itself, its stacked weights, and a line for each damaged one.

    What cannot be exported is refused before an array is read.
    """

    def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        about = checkpoint.read_metadata(run, step)
        config, _ = read_about(about)
        describe(config)
        tree = choose_tree(run, about, which)
        return about, checkpoint.restore(run, step, tree, transformer.abstract(config))

    if step is not None:
        return *read(step), []
    _, found, notes = checkpoint.latest_good(run, read)
    return *found, notes


def read_about(about: dict[str, Any]) -> tuple[ModelConfig, tokenizers.Tokenizer]:
    """The model and the tokenizer that a checkpoint describes."""
    return from_json(ModelConfig, about["model"]), tokenizers.from_json(about["tokenizer"])


def dtype_of(about: dict[str, Any], config: ModelConfig) -> str:
    """The type of the tensors: that of the weights here, or float16 if just imported from it."""
    imported = about.get("source")
    halves = isinstance(imported, dict) and imported.get("dtypes") == ["F16"]
    return "F16" if halves else KEPT[config.param_dtype]


def ends(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The id that texts begin after and end with."""
    end = tokenizer.eot_token if tokenizer.eot_token >= 0 else None
    return {"bos_token_id": end, "eos_token_id": end}


def write_weights(
    path: Path, config: ModelConfig, family: Family, params: dict[str, Any], dtype: str
) -> None:
    """Write model.safetensors, tensor by tensor, under the names that transformers has."""
    shapes = tensor_shapes(config, family)
    shapes = {family.whole_name(name): shape for name, shape in shapes.items()}
    tensors = weights.tensors_of(config, family, params, FLOATS[dtype])
    write_file(path, shapes, dtype, tensors)
