"""train.py --init-from: starting from another run."""

import shutil

import jax
import numpy as np
from programs import EVERY, TINY, call, snapshot, stored_shapes, write_text

from gpt import checkpoint, cli, train_flags
from gpt.data import tokenizers
from gpt.presets import PRESETS
from gpt.training import resume

# TINY, but for the settings of the model.
RUN = [
    *("--batch-size", "4", "--grad-accum", "2", "--steps", "12", "--warmup-steps", "2"),
    *("--learning-rate", "1e-3", "--min-learning-rate", "1e-4", *EVERY),
]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_run_takes_weights_tokenizer_and_model_of_another(trained, tmp_path, monkeypatch):
    """Text in another file, and a tokenizer of its own, which is not used."""
    kept = []

    def initial_state(*args):
        state = honest(*args)
        kept.append(jax.tree.map(np.array, state))  # the first step consumes it
        return state

    honest = resume.initial_state
    monkeypatch.setattr(resume, "initial_state", initial_state)
    argv = ["--data", write_text(tmp_path / "t", seed=2), "--out", tmp_path / "run"]
    argv += ["--tokenizer", "char"]
    done = call("train", *RUN, *argv, "--init-from", trained[1])
    assert done.code == 0, done.err
    weights = checkpoint.restore(trained[1], 12, "params", stored_shapes(trained[1], 12, "params"))
    assert bits(kept[0].params) == bits(weights) and kept[0].step == 0
    source = checkpoint.read_metadata(trained[1], 12)
    began = checkpoint.read_metadata(tmp_path / "run", 12)
    assert began["model"] == source["model"]
    assert tokenizers.load(tmp_path / "run" / "tokenizer.json").name == "byte"
    assert began["init_from"] == str(trained[1])

    # Continued without --init-from, by a command that gives the model itself.
    shutil.rmtree(checkpoint.step_dir(tmp_path / "run", 12))
    done = call("train", *TINY, *argv)
    assert done.code == 0 and "continues" in done.err, done.err
    assert checkpoint.read_metadata(tmp_path / "run", 12)["init_from"] == str(trained[1])


def test_model_flags_win_over_the_other_run_even_with_the_value_of_the_preset(trained, tmp_path):
    """The other run has 2 layers of width 16, 2 heads, a dropout of 0.1, and a context of 16."""
    preset = PRESETS["tiny"].model
    flags = ["--model.dropout", str(preset.dropout), f"--model.n_heads={preset.n_heads}"]
    argv = [*flags, "--model.no-bias", "--init-from", str(trained[1])]
    args = train_flags.parse_args(argv, "")
    args = resume.with_model_of_source(args, tmp_path / "run", cli.flags_given(argv))
    model = args.train.model
    assert (preset.dropout, preset.n_heads) != (0.1, 2)  # else this shows nothing
    assert (model.dropout, model.n_heads, model.bias) == (preset.dropout, preset.n_heads, False)
    assert (model.n_layers, model.d_model, model.context_length) == (2, 16, 16)
    assert model.compute_dtype == preset.compute_dtype


def test_init_from_another_shape_lists_the_shapes(text, trained, tmp_path):
    argv = [*TINY, "--model.d-model", "32", "--data", text, "--init-from", trained[1]]
    done = call("train", *argv, "--out", tmp_path / "run")
    assert done.code == 2
    assert "\n  tokens: stored (384, 16), expected (384, 32)\n" in done.err
    assert snapshot(tmp_path) == {}
