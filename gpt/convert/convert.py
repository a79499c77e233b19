"""Convert a model folder in the Hugging Face format to a run folder, and back.

Both directions create a new folder, whole or not at all. Notes for the user go to `log`; nothing is
printed.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig, Weights, from_json, to_json
from gpt.convert import hf_weights
from gpt.convert.hf_config import read_config, to_hf_config
from gpt.convert.hf_tokenizer import export_tokenizer, import_tokenizer
from gpt.convert.hf_weights import FLOATS, WEIGHTS, Family, read_json, shorten
from gpt.data import tokenizers
from gpt.data.hf_tokenizer import HFTokenizer
from gpt.errors import UserError, require
from gpt.model import transformer
from gpt.sampling.language_model import choose_tree

Log = Callable[[str], None]


@dataclass(frozen=True)
class HFModel:
    """A complete model folder whose weights have not been read yet.

    values: its config.json. unused_fields: fields of it that were ignored.
    """

    values: dict[str, Any]
    config: ModelConfig
    family: Family
    tensors: dict[str, Any]
    unused_fields: list[str]

    def read_params(self) -> dict[str, Any]:
        """The stacked weights on the first device; UserError if any is not finite."""
        return hf_weights.read_params(self.config, self.family, self.tensors)


def open_model(folder: Path) -> HFModel:
    """The model in a folder; UserError if its files or config.json cannot be used."""
    stored = hf_weights.open_folder(folder)
    values = read_json(folder / "config.json")
    config, family, unused_fields = read_config(values)
    tensors = hf_weights.match_tensors(config, family, stored)
    # float16 and mixed types become float32.
    is_bfloat16 = all(tensor.get_dtype() == "BF16" for tensor in tensors.values())
    config = replace(config, param_dtype="bfloat16" if is_bfloat16 else "float32")
    return HFModel(values, config, family, tensors, unused_fields)


def import_model(source: Path, dest: Path, ids_only: bool, log: Log) -> ModelConfig:
    """Import the model in the folder `source` as step 0 of the new run folder `dest`.

    ids_only: leave its tokenizer out. Raises UserError, writing nothing, if something in `source`
    cannot be used.
    """
    with new_folder(dest) as folder:
        model = open_model(source)
        config = model.config
        tokenizer = import_tokenizer(source, model.values, config.vocab_size, ids_only, log)
        if model.unused_fields:
            log(f"fields of config.json not used: {shorten(model.unused_fields)}")
        dtypes = sorted({tensor.get_dtype() for tensor in model.tensors.values()})
        if len(dtypes) > 1:
            log(f"weights of several types ({', '.join(dtypes)}) are kept as {config.param_dtype}")

        about = {
            "model": to_json(config),
            "train": to_json(TrainConfig(model=config)),
            "tokenizer": tokenizers.to_json(tokenizer),
            "data": {"fingerprint": "imported"},
            "source": {"model_type": model.values["model_type"], "dtypes": dtypes},
            "step": 0,
        }
        params = model.read_params()
        with checkpoint.CheckpointManager(folder, keep=1, low_memory=True) as writer:
            writer.save(0, {"params": params}, about, wait=True)
        tokenizers.save(tokenizer, folder / "tokenizer.json")
    return config


def export_model(
    run: Path, dest: Path, step: int | None, weights: Weights | None, log: Log
) -> dict[str, Any]:
    """Export a checkpoint of `run` to the new folder `dest`; returns its config.json.

    step: which checkpoint (default: the newest intact one). weights: the average over the run or
    the last weights (default: the average if one is kept). Raises UserError, writing nothing, if
    transformers cannot represent the model or its tokenizer.
    """
    checkpoint.require_run(run)

    def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        about = checkpoint.read_metadata(run, step)
        config = from_json(ModelConfig, about["model"])
        to_hf_config(config)  # refuse an unsupported model before reading its arrays
        tree = choose_tree(run, about, weights)
        return about, checkpoint.restore(run, step, tree, transformer.abstract(config))

    with new_folder(dest) as folder:
        if step is not None:
            about, params = read(step)
        else:
            _, (about, params), damaged = checkpoint.latest_good(run, read)
            for note in damaged:
                log(f"{note}; using an earlier checkpoint")

        # Tensors keep the weights' dtype, or get float16 if the model was imported from it.
        config = from_json(ModelConfig, about["model"])
        dtype = {"float32": "F32", "bfloat16": "BF16"}[config.param_dtype]
        if about.get("source", {}).get("dtypes") == ["F16"]:
            dtype = "F16"

        # config.json gets the imported ids, or our end-of-text as both beginning and end.
        tokenizer = tokenizers.from_json(about["tokenizer"])
        end = tokenizer.eot_token if tokenizer.eot_token >= 0 else None
        special_ids = {"bos_token_id": end, "eos_token_id": end}
        if isinstance(tokenizer, HFTokenizer):
            special_ids = tokenizer.special_ids
        elif isinstance(tokenizer, tokenizers.IdTokenizer):
            special_ids = {"bos_token_id": None, "eos_token_id": end}
        values, family = to_hf_config(config)
        values |= {"dtype": FLOATS[dtype].name} | special_ids
        for name, content in {"config.json": values, "generation_config.json": special_ids}.items():
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        # An imported generation_config.json is exported unchanged.
        for name, content in export_tokenizer(tokenizer, config.context_length).items():
            (folder / name).write_bytes(content)

        # The architecture may declare biases that the model lacks; they are written as zeros.
        declared, _, _ = read_config(values)
        shapes = hf_weights.tensor_shapes(declared, family)
        tensors = hf_weights.to_tensors(declared, family, params, FLOATS[dtype])
        hf_weights.write_safetensors(folder / WEIGHTS, shapes, dtype, tensors)
    return values


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to fill, next to `dest`: renamed to `dest`, or removed if filling it fails.

    UserError if `dest` already exists (an empty folder does not count) or cannot be written.
    """
    taken = any(dest.iterdir()) if dest.is_dir() else dest.exists()
    require(not taken, f"{dest} already exists: choose a new folder, or remove it first")
    parent = dest.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=parent) as scratch:
            # Only the owner may read a temporary folder; a folder inside has the usual permissions.
            folder = Path(scratch) / "folder"
            folder.mkdir()
            yield folder
            os.replace(folder, dest.resolve())
    except OSError as error:
        # The error names a file that cannot be opened, such as one of the source's.
        what = error.filename or f"{dest} cannot be written"
        raise UserError(f"{what}: {error.strerror or error}") from None
