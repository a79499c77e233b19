"""docs/weights.md, each command run on generated stand-in weights."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import standin_tokenizers
import standins
from programs import call
from safetensors.numpy import load_file

from gpt.convert.hf_config import FAMILIES, to_hf_config
from gpt.errors import UserError
from gpt.presets import PRESETS

DOC = Path(__file__).parents[2] / "docs/weights.md"
PROGRAMS = {
    "train.py": ("train",),
    "sample.py": ("sample",),
    "-m gpt.convert": ("gpt/convert/__main__",),
}


def commands():
    """The lines of its blocks that are typed, as words."""
    text = DOC.read_text("utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    typed = [block for language, block in blocks if not language]
    return [shlex.split(line) for block in typed for line in block.splitlines()]


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_command_runs(sampled, tmp_path, text, monkeypatch):
    """By default without those that compile the sampler, which other tests do with such runs."""
    c = standins.GPT2 | {"vocab_size": 257, "n_layer": 1, "eos_token_id": 256}
    folder = standins.write(tmp_path / "gpt2", c)
    standin_tokenizers.write_bytes(folder)
    (tmp_path / "my.txt").write_bytes(text.read_bytes())
    monkeypatch.chdir(tmp_path)
    ran = []
    for python, *words in commands():
        assert python == "python"
        name, rest = (words[0], words[1:]) if words[0] != "-m" else (" ".join(words[:2]), words[2:])
        if name == "sample.py" and not sampled:
            continue
        rest = [{"200": "3", "20": "1", "40": "4"}.get(word, word) for word in rest]
        unsampled = ["--sample-every", "0"] if name == "train.py" else []
        done = call(*PROGRAMS[name], *rest, *unsampled)
        assert done.code == 0, (words, done.err)
        ran.append(name)
    assert len(ran) == (7 if sampled else 3)
    theirs, ours = (load_file(name + "/model.safetensors") for name in ("gpt2", "mine"))
    moved = [np.abs(ours[name] - theirs[name]).max() for name in theirs]
    assert 0 < max(moved) < 2e-4, "three steps of 3e-5 from the weights that came in"


def test_what_it_says_of_the_presets():
    kinds = {"shakespeare-char": "gpt2", "modern": "qwen3", "gpt2-xl": "gpt2"}
    for name, kind in kinds.items():
        assert to_hf_config(PRESETS[name].model)[0]["model_type"] == kind
    with pytest.raises(UserError, match=r"Llama's needs --model\.no-bias;"):
        to_hf_config(PRESETS["tiny"].model)
    without = dataclasses.replace(PRESETS["tiny"].model, bias=False)
    assert to_hf_config(without)[0]["model_type"] == "qwen3"


def test_every_family_it_names_is_one():
    rows = re.findall(r"^\| (`.*?) \|", DOC.read_text("utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(FAMILIES)
