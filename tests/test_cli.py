"""The part every entry point shares: flags, errors, exit codes, caches, JAX's surroundings."""

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import program

from gpt import cli, sample_flags, train_flags
from gpt.errors import UserError
from gpt.presets import PRESETS

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Required:
    """A command like sample.py's."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder."""
    temperature: float = 1.0
    """0 is greedy."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where to stop."""


def read(*argv: str):
    """The flags of train.py."""
    return train_flags.parse_args(list(argv), program("train").__doc__)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as refused:
        read(*argv)
    return str(refused.value)


def test_the_first_word_may_be_a_preset():
    args = read("gpt2", "--steps", "5")
    assert (args.preset, args.train.steps, args.train.model.n_layers) == ("gpt2", 5, 12)
    assert read("--tokenizer", "gpt2").train.model == PRESETS["tiny"].model
    assert refusal("--steps", "5", "gpt2") == "gpt2 must come first: train.py gpt2 ..."
    assert "'gpt-2'" in refusal("gpt-2") and "shakespeare-char" in refusal("gpt-2")


def test_settings_are_checked_against_the_chosen_preset():
    assert read("gpt2", "--model.n-heads", "6").train.model.head_width == 128
    assert "model.d_model 768 is not divisible" in refusal("gpt2", "--model.n-heads", "5")


def test_hyphens_and_underscores_are_one():
    assert read("--batch-size", "64") == read("--batch_size", "64")
    assert read("--model.n_layers", "2", "--mesh.data", "4").train.mesh.data == 4
    assert read("--data", "x", "y", "--overwrite").data == (Path("x"), Path("y"))


def test_the_flags_that_were_given():
    argv = ["gpt2", "--model.n-layers", "2", "--steps=5", "--no-overwrite", "--model.no-bias"]
    assert cli.flags_given(argv) == {"model.n_layers", "steps", "overwrite", "model.bias"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--stepz", "5"), ("no flag --stepz: did you mean --steps?;",)),
        (("--steps", "many"), ("--steps", "'many'")),
        (("--steps",), ("--steps", "Missing value")),
        (("--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
        (("--mesh.data", "x"), ("--mesh.data", "'x'")),
        (("tiny", "extra"), ("extra",)),
        (("--learning-rate", "nan"), ("learning_rate is nan: expected a positive number",)),
    ],
)
def test_an_unreadable_flag_is_one_line(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words)
    assert "\n" not in message and "---" not in message


@pytest.mark.parametrize(
    ("guessed", "meant"),
    [
        ("--lr", "--learning-rate?"),
        ("--epochs=3", "--steps?"),
        ("--max_iters", "--steps?"),
        ("--block-size", "--seq-len?"),
        ("--n-layer", "--model.n-layers?"),
        ("--dropout", "--model.dropout?"),  # a setting of the model
        ("--model.n-layer", "--model.n-layers?"),
        ("--no-bias", "--model.no-bias?"),
        ("--warmup", "--warmup-steps?"),  # the beginning
        ("--device", "JAX_PLATFORMS=cpu"),
        ("--config", "names a preset"),
    ],
)
def test_the_flag_of_another_program_is_told_apart(guessed, meant):
    message = refusal("gpt2", guessed, "1")
    assert message.startswith(f"there is no flag {guessed.partition('=')[0]}: ")
    assert meant in message and " or --" not in message and message.endswith("see train.py --help")


def test_nothing_absurd_is_suggested():
    assert refusal("--file-system", "x") == "there is no flag --file-system; see train.py --help"
    assert cli.suggest("--topk", ["--top-k", "--stop"], {}) == ": did you mean --top-k?"


def test_every_guess_names_a_flag(capsys):
    for module in (train_flags, sample_flags):
        with pytest.raises(SystemExit):
            module.parse_args(["--help"], "")
        help_text = capsys.readouterr().out
        for meant in module.GUESSES.values():
            assert not meant.startswith("--") or f"  {meant.split()[0]} " in help_text, meant


def test_text_on_standard_input_becomes_a_file(tmp_path, monkeypatch):
    """The same text the same file, so that the same command continues its run."""
    monkeypatch.setattr(cli, "cache_folder", lambda: tmp_path)
    paths = []
    for content in (b"some text", b"other text", b"some text"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        stdin, named = read("--data", "-", "named.txt").data
        assert stdin.read_bytes() == content and named == Path("named.txt")
        paths.append(stdin)
    assert paths[0] == paths[2] != paths[1]


def test_a_file_as_the_first_word_is_text(tmp_path):
    (tmp_path / "my.txt").write_text("text")
    assert refusal(str(tmp_path / "my.txt")).endswith(f"--data {tmp_path / 'my.txt'}")


WORDS = st.text() | st.sampled_from(["--", "-h", "-", "--steps", "--no-tied", "--data=", "@x"])


@settings(max_examples=25)
@given(st.lists(WORDS, max_size=4))
def test_wild_arguments_raise_nothing_but_user_errors(argv):
    try:
        read("--seed", "1", *argv)
    except UserError as error:
        assert str(error)
    except SystemExit as leaving:
        assert leaving.code == 0 and "-h" in argv


def test_help_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as leaving:
        read("gpt2", "--seed", "5", "--help")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())  # lines are folded to the width of the terminal
    assert "Pretrain a GPT" in words
    assert "Optimizer steps of the whole run. (default: 19000)" in words
    assert "(default: gpt2)" in words
    assert not set("│╭╮╰╯\x1b") & set(text)


def test_a_command_without_defaults():
    words = {"program": "sample.py", "description": ""}
    argv = ["runs/tiny", "--temperature", "0", "--stop", "a", "--stop=--b"]
    assert cli.parse(Required, argv, **words) == Required(Path("runs/tiny"), 0.0, ("a", "--b"))
    with pytest.raises(UserError, match="CHECKPOINT"):
        cli.parse(Required, [], **words)


def leave(main, capsys) -> tuple[int, str]:
    """The exit code and standard error of an entry point."""
    with pytest.raises(SystemExit) as leaving:
        cli.run(main)
    return leaving.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "stderr"),
    [
        (lambda argv: None, 0, ""),
        (lambda argv: 1, 1, ""),
        (raising(UserError("no such thing")), 2, "error: no such thing\n"),
        (raising(SystemExit(0)), 0, ""),
    ],
)
def test_exit_codes(main, code, stderr, capsys):
    assert leave(main, capsys) == (code, stderr)


@pytest.mark.parametrize(
    ("number", "path"),
    [
        (errno.ENOENT, "gone.txt"),
        (errno.EACCES, "closed.txt"),
        (errno.EISDIR, "folder"),
        (errno.ENOTDIR, "file/below"),
        (errno.EROFS, "disc"),
        (errno.ENAMETOOLONG, "long"),
        (errno.ENOSPC, None),
    ],
)
def test_a_failure_of_the_file_system_is_one_line_with_the_path(number, path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_discard_stdout", lambda: None)
    code, stderr = leave(raising(OSError(number, os.strerror(number), path)), capsys)
    prefix = f"{path}: " if path else ""
    assert (code, stderr) == (2, f"error: {prefix}{os.strerror(number)}\n")


@pytest.mark.parametrize("take", [lambda: np.empty(2**60, np.int8), lambda: jnp.zeros(10**14)])
def test_too_little_memory_is_one_line(take, capsys):
    """NumPy's error, and XLA's."""
    code, stderr = leave(lambda argv: take(), capsys)
    assert code == 2 and stderr.startswith("error: out of memory: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "bug"), TypeError("bug")])
def test_our_own_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))
