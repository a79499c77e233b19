"""sample.py as a real process: terminals, pipes, full disks, Ctrl-C."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT, run_python

termios = pytest.importorskip("termios", reason="signals and terminals of POSIX")
ENDLESS = ["--max-new-tokens", "100000000", "--on-context-full", "slide", "--ignore-eos"]
PATIENCE = 300  # seconds for a slow machine
# Make the terminal on standard input one's own, as a shell does, so that its Ctrl-C arrives.
OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
OWN += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def start(*argv, **options):
    return subprocess.Popen([sys.executable, ROOT / "sample.py", *argv], **options)


def test_a_real_process_refuses_in_one_line():
    done = run_python("sample.py", "gone")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no folder gone") and done.stderr.count("\n") == 1


def test_ctrl_c_ends_with_130_and_a_closed_pipe_with_0(folder):
    """Both in the middle of a text that would never end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = [folder, "--prompt", "the ", *ENDLESS]
    with start(*argv, **pipes) as stopped, start(*argv, **pipes) as closed:
        for process in (stopped, closed):
            assert process.stdout.read(20).startswith(b"the ")
        stopped.send_signal(signal.SIGINT)
        closed.stdout.close()
        assert (stopped.wait(PATIENCE), closed.wait(PATIENCE)) == (130, 0)
        assert (stopped.stderr.read(), closed.stderr.read()) == (b"", b"")


class Typist:
    """A person at a terminal of their own, with a program in it."""

    def __init__(self, *argv, **environment):
        self.master, slave = os.openpty()
        modes = termios.tcgetattr(slave)
        modes[3] |= termios.NOFLSH  # or the kernel drops, after Ctrl-C, what is shown meanwhile
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        command = [sys.executable, "-c", OWN, ROOT / "sample.py", *argv]
        environment = {**os.environ, "TERM": "dumb", "PYTHONUTF8": "1", **environment}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        os.close(slave)
        self.seen = b""

    def wait_for(self, found, again: bytes = b"") -> str:
        """All that the terminal has shown since the last time, once it is `found` in there; while
        nothing comes, `again` is pressed every five seconds."""
        end, turn = time.monotonic() + PATIENCE, 5 if again else PATIENCE
        while not found(self.seen.decode("utf-8", "replace")):
            ready, _, _ = select.select([self.master], [], [], turn)
            assert ready or time.monotonic() < end, f"only {self.seen!r} was seen"
            if ready:
                self.seen += os.read(self.master, 65536)
            else:
                self.press(again)
        shown, self.seen = self.seen.decode("utf-8", "replace"), b""
        return shown

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)


@pytest.mark.slow
def test_a_conversation(folder, tmp_path):
    """Typed lines are completed; Ctrl-C ends a completion, Ctrl-D the program."""
    hot = ["--temperature", "5"]  # draws every byte there is
    typist = Typist(folder, "--interactive", *ENDLESS, *hot, XDG_CACHE_HOME=str(tmp_path))
    typist.wait_for(lambda shown: shown.endswith("> "))
    typist.press(b"the \n")
    shown = typist.wait_for(lambda shown: len(shown) > 3000)
    assert "\r\nthe " in shown
    obeyed = {c for c in shown if ord(c) < 32 or 126 < ord(c) < 160} - {"\r", "\n", "\t"}
    assert not obeyed and "\\x1b" in shown
    typist.press(b"\x03")
    shown = typist.wait_for(lambda shown: shown.endswith("> "))
    assert "stopped by Ctrl-C" in shown
    typist.press(b"a cat\n")
    assert "a cat" in typist.wait_for(lambda shown: len(shown) > 1000)
    typist.press(b"\x03")
    typist.wait_for(lambda shown: shown.endswith("> "))
    typist.press(b"dropped")
    typist.wait_for(lambda shown: shown.endswith("dropped"))
    # An interrupt between a key and the wait for the next one is noticed by readline with the next.
    typist.press(b"\x03")
    typist.wait_for(lambda shown: shown.endswith("\n> "), again=b"\x03")
    typist.press(b"\x04")
    assert typist.process.wait(PATIENCE) == 0
    os.close(typist.master)
