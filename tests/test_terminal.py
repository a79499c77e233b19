"""What entry points show on a terminal and read from it."""

import contextlib
import io
import os
import re
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import cli, sample_flags, terminal, train_flags
from gpt.errors import UserError
from gpt.sampling.completion import Completion
from gpt.wording import counted


class Terminal(io.StringIO):
    """A standard stream that says it is a terminal."""

    def isatty(self):
        return True


def pipe(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), "utf-8")


# What is shown.


def test_what_a_terminal_would_obey_is_spelled_out(monkeypatch):
    """On a terminal alone: a pipe gets the text to the byte."""
    for text, shown in (
        ("\x1b[2Jhello\n\tworld", "\\x1b[2Jhello\n\tworld"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("x\u202ey\u2066z", "x\\u202ey\\u2066z"),
        ("今天 é 🎉 \\x1b \ufffd", "今天 é 🎉 \\x1b \ufffd"),
    ):
        for stream, expected in ((Terminal(), shown), (io.StringIO(), text)):
            monkeypatch.setattr(sys, "stdout", stream)
            terminal.write(text)
            assert stream.getvalue() == expected


def test_no_text_fails_for_the_locale(monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    monkeypatch.setattr(sys, "stdin", pipe(b"a\xff\n"))
    with pytest.raises(SystemExit):
        cli.run(lambda argv: terminal.write("é天"))
    assert latin.buffer.getvalue() == b"\xe9\\u5929"
    assert sys.stdin.readline() == "a\ufffd\n"


def test_tokens_are_spelled():
    spelled = [terminal.spell(token) for token in (b" a", "天".encode(), b"\xe5\xa4", b"\x1b")]
    assert spelled == ["' a'", "'天'", r"b'\xe5\xa4'", r"'\x1b'"]


def test_a_table_holds_the_drawn_token_even_if_it_is_not_among_the_likeliest():
    tokenizer = SimpleNamespace(decode_bytes=bytes)
    top = [[(97, 0.6), (99, 0.2)], [(97, 0.5)], [(97, 0.25)]]
    done = SimpleNamespace(token_ids=[97, 98], logprobs=[-0.5, -3.0], top=top)
    done.finish_reason = None
    first, second = (terminal.probability_tables(done, n, tokenizer) for n in (0, 1))
    assert first.splitlines() == [
        "after prefill", "  *  60.0000%  'a'", "     20.0000%  'c'",
        "step 1", "     50.0000%  'a'", "  *   4.9787%  'b'",
    ]  # fmt: skip
    assert first.endswith(second) and second.startswith("step 1")
    done.finish_reason, done.end_id = "eos", 42
    assert terminal.probability_tables(done, 2, tokenizer).splitlines() == [
        "step 2", "     25.0000%  'a'", "  * <=25.0000%  '*'"
    ]  # fmt: skip


def completion(reason, decode=0.5, n_tokens=9, proposed=0):
    done = Completion("", [1] * 8, 0, 0, token_ids=[1] * n_tokens, finish_reason=reason)
    seconds = {"prefill_seconds": 0.01, "decode_seconds": decode}
    return replace(done, **seconds, proposed=proposed, accepted=proposed // 2)


def test_the_end_is_told_in_words():
    one = terminal.describe_end([completion("context")], 16)
    assert one.startswith("prefill 10.0 ms, decode 0.50 s, 16 tokens/s per row (compilation ex")
    assert one.endswith("stopped by context; the model's context of 16 tokens is full")
    several = [completion("eos"), completion("length", 0.7, n_tokens=1), completion("eos")]
    assert terminal.describe_end(several, 64).endswith(
        "decode 0.70 s (compilation excluded); stopped by eos (2 times), length; "
        "--max-new-tokens for more"
    )
    for proposed, said in ((6, "6 of 12 proposed tokens accepted"), (0, "0 tokens proposed")):
        both = [completion("eos", proposed=proposed)] * 2
        assert f"per row, {said}" in terminal.describe_end(both, 64, speculates=True)
    outgrown = terminal.describe_end([completion("length"), completion("length", n_tokens=10)], 16)
    assert "context of 16 tokens, so the model saw only the last 8 to 16 of them" in outgrown


def test_a_number_agrees_with_its_noun():
    found = [counted(1, "file"), counted(0, "file"), counted(2000, "file"), counted(3, "branch")]
    assert found == ["1 file", "0 files", "2,000 files", "3 branches"]


# Rows.


@given(st.lists(st.lists(st.text(min_size=1, max_size=3), min_size=1), min_size=1), st.randoms())
def test_rows_never_interleave(texts, random):
    """In whatever order and pieces they come, and the current one is never kept waiting."""
    order = [row for row, pieces in enumerate(texts) for _ in pieces]
    random.shuffle(order)
    n_given = [0] * len(texts)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        output = terminal.InOrder(len(texts))
        for row in order:
            n_given[row] += 1
            output.add(row, texts[row][n_given[row] - 1], n_given[row] == len(texts[row]))
            expected = ""
            for pieces, n in zip(texts, n_given, strict=True):
                expected += "".join(pieces[:n])
                if n < len(pieces):
                    break
            assert out.getvalue() == expected


@pytest.mark.parametrize(
    ("texts", "shown", "shown_at_the_end_of_a_line"),
    [
        (["open", "", ""], "open", "open\n"),
        (["closed\n", "", ""], "closed\n", "closed\n"),
        (["", "", ""], "", ""),
        (["open", "lost", "ended\n"], "open\nended\n", "open\nended\n"),
    ],
)
def test_an_interruption_loses_no_row_that_has_ended(
    texts, shown, shown_at_the_end_of_a_line, capsys
):
    for end_line, expected in ((False, shown), (True, shown_at_the_end_of_a_line)):
        output = terminal.InOrder(3)
        for row, text in enumerate(texts):
            output.add(row, text, ended=text.startswith("ended"))
        output.flush(end_line)
        assert capsys.readouterr().out == expected


# What is read.


def test_ids_are_numbers_with_spaces_between():
    assert terminal.parse_ids("--prompt-ids", " 1 2\n-3 ") == [1, 2, -3]
    assert terminal.parse_ids("--prompt-ids", "") == []
    for text in ("1,2", "1_0", "٣", "+1", "1.", "9" * 5000):
        with pytest.raises(UserError, match=f"--prompt-ids '{re.escape(text)}': expected integers"):
            terminal.parse_ids("--prompt-ids", text)


def test_a_file_is_read_to_the_byte(tmp_path, capsys, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes("a\r\n天\n\n".encode())
    assert terminal.read_text("--prompt-file", path) == "a\r\n天\n\n"
    assert capsys.readouterr().err == ""
    path.write_bytes(b"a\xe5\xa4\nb")
    assert terminal.read_text("--prompt-file", path) == "a\ufffd\nb"
    assert capsys.readouterr().err.startswith(f"note: --prompt-file {path} is not valid UTF-8: ")
    monkeypatch.setattr(sys, "stdin", pipe(b"from a pipe\r\n"))
    assert terminal.read_text("--prompt-file", terminal.Path("-")) == "from a pipe\r\n"


def test_text_that_is_piped_in_without_being_asked_for_is_left_with_a_note(capsys, monkeypatch):
    """A shell's loop or script may be what is there. /dev/null holds nothing, and stays silent."""
    read, write = os.pipe()
    os.write(write, b"def ")
    nothing = os.open(os.devnull, os.O_RDONLY)

    def sample(argv):
        sample_flags.read_inputs(sample_flags.parse_args(argv, "")[0])

    def train(argv):
        train_flags.parse_args(argv, "")

    for stdin, main, argv, flag in (
        (read, sample, ["run"], "--prompt-file"),
        (read, sample, ["run", "--prompt", "def "], None),
        (read, train, [], "--data"),
        (read, train, ["--data", "my.txt"], None),
        (nothing, sample, ["run"], None),
    ):
        with open(stdin, closefd=False) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            main(argv)
        said = f"note: standard input is not read; use {flag} - to read" if flag else ""
        assert capsys.readouterr().err[: len(said) or None] == said
    assert os.read(read, 9) == b"def "


def test_lines_of_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", pipe(b"one\n two \r\n\nlast"))
    assert list(terminal.read_lines()) == ["one", " two ", "", "last"]


@pytest.mark.parametrize(("stdout", "question"), [(Terminal, "> "), (io.StringIO, "")])
def test_lines_that_are_typed(stdout, question, monkeypatch, capsys):
    """Ctrl-C drops a line, Ctrl-D ends; a pipe gets completions alone. The keys are named once."""
    answers, asked = ["a", KeyboardInterrupt, "b", EOFError], []

    def answer(question):
        asked.append(question)
        one = answers.pop(0)
        if isinstance(one, type):
            raise one
        return one

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", stdout())
    monkeypatch.setattr("builtins.input", answer)
    assert list(terminal.read_lines()) == ["a", "b"]
    assert asked == [question] * 4 and not sys.stdout.getvalue()
    assert capsys.readouterr().err.count("Ctrl-D quits") == 1


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), terminal.deferred_interrupt() as pressed:
        assert not pressed.is_set()
        signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
