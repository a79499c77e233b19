"""The part every entry point shares: flags, errors, exit codes, caches, JAX's surroundings."""

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st
from programs import call

from gpt import cli
from gpt.config import TrainConfig
from gpt.errors import UserError
from gpt.presets import PRESETS, preset

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Command:
    """A command like train.py's."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")] = "tiny"
    """Settings to start from."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: PRESETS["tiny"]
    )
    data: tuple[Path, ...] = ()
    """Text files."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where to stop."""
    overwrite: bool = False
    """Start afresh."""


@dataclass(frozen=True)
class Required:
    """A command like sample.py's."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder."""
    temperature: float = 1.0
    """0 is greedy."""


def read(*argv: str) -> Command:
    name = cli.peek(Command, list(argv), "preset", default=Command())
    return cli.parse(
        Command,
        list(argv),
        program="train.py",
        description="Pretraining.",
        default=Command(preset=name, train=preset(name)),
    )


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as refused:
        read(*argv)
    return str(refused.value)


@pytest.mark.parametrize(
    "argv",
    [
        ("gpt2", "--steps", "5"),
        ("--steps", "5", "gpt2"),
        ("--steps=5", "gpt2"),
        ("--overwrite", "gpt2", "--steps", "5"),
        ("--data", "a", "b", "--steps", "5", "gpt2"),
    ],
)
def test_the_preset_may_stand_anywhere(argv):
    command = read(*argv)
    assert (command.preset, command.train.steps, command.train.model.n_layers) == ("gpt2", 5, 12)


@pytest.mark.parametrize("argv", [(), ("--tokenizer", "gpt2"), ("--data", "gpt2", "--seed", "1")])
def test_a_flags_value_is_no_preset(argv):
    assert read(*argv).preset == "tiny"
    assert read(*argv).train.model == PRESETS["tiny"].model


def test_settings_are_checked_against_the_chosen_preset():
    assert read("gpt2", "--model.n-heads", "6").train.model.head_width == 128
    assert "model.d_model 768 is not divisible" in refusal("--model.n-heads", "5", "gpt2")


def test_an_unknown_preset_lists_the_known_ones():
    assert refusal("gpt-2").startswith("no preset named 'gpt-2': choose one of tiny, ")


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_hyphens_and_underscores_are_one(flag):
    assert read(flag, "64").train.batch_size == 64
    assert read("--model.n_layers", "2", "--mesh.data", "4").train.mesh.data == 4


def test_repeated_and_listed_values():
    command = read("--stop", "a", "--stop=--b", "--data", "x", "y", "--overwrite")
    assert command.stop == ("a", "--b")
    assert command.data == (Path("x"), Path("y"))
    assert command.overwrite


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--stepz", "5"), ("--stepz", "perhaps you meant --steps INT")),
        (("--steps", "many"), ("--steps", "'many' is no whole number; expected --steps INT")),
        (("--learning-rate", "1e"), ("--learning-rate: '1e' is no number", "FLOAT")),
        (("--steps",), ("--steps", "Missing value")),
        (("--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
        (("--mesh.data", "x"), ("--mesh.data", "'x'")),
        (("tiny", "extra"), ("extra",)),
        (("--steps", "a" * 150), ("a" * 150, "expected --steps INT")),
    ],
)
def test_an_unreadable_flag_is_one_line(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words)
    assert "see train.py --help" in message
    assert "\n" not in message
    assert "---" not in message


WORDS = st.text() | st.sampled_from(["--", "-h", "-", "--steps", "--no-remat", "--data=", "@x"])


@given(st.lists(WORDS, max_size=4))
def test_wild_arguments_raise_nothing_but_user_errors(argv):
    try:
        read("--seed", "1", *argv)
    except UserError as error:
        assert str(error)
    except SystemExit as leaving:
        assert leaving.code == 0 and "-h" in argv


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_the_config_refuses_what_the_parser_can_read(number):
    assert refusal("--learning-rate", number).startswith(f"learning_rate is {float(number)}: exp")


def test_errors_keep_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    refusal("--stepz", "5")
    assert os.environ["COLUMNS"] == "77"
    monkeypatch.delenv("COLUMNS")
    refusal("--stepz", "5")
    assert "COLUMNS" not in os.environ


@pytest.mark.parametrize(
    "argv", [("gpt2", "--help"), ("-h", "gpt2"), ("--seed", "5", "--help", "gpt2")]
)
def test_help_shows_the_presets_defaults_in_plain_columns(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        read(*argv)
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())  # lines are folded to the terminal's width
    assert "Pretraining." in words
    assert "Optimizer steps of the whole run. (default: 19000)" in words
    assert "PRESET Settings to start from. (default: gpt2)" in words
    assert not set("│╭╮╰╯\x1b") & set(text)
    assert text == "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_help_says_nothing_of_none_and_keeps_its_columns():
    text = call("train", "--help").out
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert "{None}" not in text and "(default: None)" not in " ".join(text.split())
    assert lines["--out"].index("Folder") == lines["--steps"].index("Optimizer")
    assert lines["--data"].index("Text files") == lines["--steps"].index("Optimizer")


def test_a_command_without_defaults():
    words = {"program": "sample.py", "description": ""}
    made = cli.parse(Required, ["runs/tiny", "--temperature", "0"], **words)
    assert made == Required(Path("runs/tiny"), 0.0)
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
    ],
)
def test_a_refused_file_is_named(number, path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
    code, stderr = leave(raising(OSError(number, os.strerror(number), path)), capsys)
    assert (code, stderr) == (2, f"error: {path}: {os.strerror(number)}\n")


def test_a_full_disk_has_no_path(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
    code, stderr = leave(raising(OSError(errno.ENOSPC, "No space left on device")), capsys)
    assert (code, stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("take", [lambda: np.empty(2**60, np.int8), lambda: jnp.zeros(10**14)])
def test_too_little_memory_is_one_line(take, capsys):
    """NumPy's error, and XLA's."""
    code, stderr = leave(lambda argv: take(), capsys)
    assert code == 2 and stderr.startswith("error: out of memory: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "bug"), TypeError("bug")])
def test_our_own_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))
