"""A model's folder in the Hugging Face form becomes a run's folder of ours. Prints nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gpt import checkpoint
from gpt.config import ModelConfig, TrainConfig, to_json
from gpt.convert import strict_json, tensorfile, tokenizers_in, weights
from gpt.convert.fields import read_config
from gpt.convert.place import making, require_new
from gpt.data import tokenizers
from gpt.errors import require


def open_source(folder: Path) -> tuple[weights.Source, dict[str, Any]]:
    """The weights of a model's folder, proved to be whole and not yet read, and its config.json."""
    stored = tensorfile.open_folder(folder)
    require((folder / "config.json").is_file(), f"{folder} has no config.json: it decides")
    values = strict_json.read(folder / "config.json")
    return weights.match(*read_config(values), stored), values


def read_params(source: weights.Source) -> dict[str, Any]:
    """All weights as stacked arrays on the first device, no more than one of them twice at once."""
    params: dict[str, Any] = {}
    for path in source.leaves():
        *folders, name = path.split("/")
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = jax.block_until_ready(jax.device_put(source.read(path)))
    return params


def bring_in(source: Path, dest: Path, ids_only: bool, tell: Callable[[str], None]) -> ModelConfig:
    """Import the model in the folder `source` as step 0 of a run's folder `dest`, made for it.

    `ids_only`: leave its tokenizer out. `tell` hears what is worth knowing. UserError, with nothing
    written, if anything in `source` is not understood to the last detail.
    """
    require_new(dest)
    found, values = open_source(source)
    tokenizer = tokenizers_in.read(source, values, found.config.vocab_size, ids_only, tell)
    params = read_params(found)
    dtypes = sorted({one.dtype for one in found.tensors.values()})
    if len(dtypes) > 1:
        tell(
            f"weights of several types ({', '.join(dtypes)}) are kept as {found.config.param_dtype}"
        )
    about = {
        "model": to_json(found.config),
        "train": to_json(TrainConfig(model=found.config)),
        "tokenizer": tokenizers.to_json(tokenizer),
        "data": {"fingerprint": "imported"},
        "source": {"model_type": values["model_type"], "dtypes": dtypes},
        "step": 0,
    }
    with making(dest) as folder:
        with checkpoint.sparing(), checkpoint.Writer(folder, keep=1) as writer:
            writer.save(0, {"params": params}, about, wait=True)
        tokenizers.save(tokenizer, folder / "tokenizer.json")
    return found.config
