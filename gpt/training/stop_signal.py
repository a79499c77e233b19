"""Ending a run early without losing it: signals become an exit code that the loop looks at."""

import os
import signal
import socket
import threading
from collections.abc import Callable

from gpt import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = "stopping       the run is saved after this step; Ctrl-C again stops at once"


class StopSignal:
    """While open, Ctrl-C and SIGTERM become a `code` to leave with: 130 or 143, 0 before.

    Until `defer` is called nothing can be lost, and they raise KeyboardInterrupt(code); then they
    only set `code`, and `tell` hears of it. A second Ctrl-C ends the process at once, whatever
    the main thread is doing, after a call of `let_go`.

    Of several processes the one that gets a signal lets the others know: SIGTERM is JAX's, whose
    preemption service chooses the step that all stop at, and Ctrl-C is handed to it as SIGTERM.
    """

    def __init__(self, tell: Callable[[str], None], let_go: Callable[[], None]):
        self.tell, self.let_go = tell, let_go
        self.code, self.deferred, self.first, self.reached = 0, False, 0, False

    def __enter__(self) -> "StopSignal":
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.descriptor = signal.set_wakeup_fd(self.theirs.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        ours = SIGNALS[:1] if distributed.is_multi_process() else SIGNALS
        self.before = {number: signal.signal(number, self.note) for number in ours}
        return self

    def defer(self, first: int) -> None:
        """From now on a signal is only noted; the next step is the one after `first`."""
        self.deferred, self.first = True, first

    def ends(self, step: int) -> bool:
        """Whether the run ends after `step`, or should have before: the same in all processes, each
        of which asks."""
        if not distributed.is_multi_process():
            return bool(self.code)
        self.reached |= distributed.preempted(step - self.first)
        if self.reached and not self.code:
            self.code = 128 + signal.SIGTERM
            self.tell(NOTICE)
        return self.reached

    def note(self, number: int, _) -> None:
        """The handler of both signals. Python runs it when the main thread is back in Python."""
        self.code = self.code or 128 + number
        if not self.deferred:
            raise KeyboardInterrupt(self.code)
        if distributed.is_multi_process():
            os.kill(os.getpid(), signal.SIGTERM)

    def watch(self) -> None:
        """See each signal as it comes: compiling keeps the main thread out of Python for long."""
        seen = 0
        while number := self.ours.recv(1):
            if number[0] == signal.SIGINT and seen:
                self.let_go()
                os._exit(128 + signal.SIGINT)
            if number[0] in SIGNALS:
                seen += 1
                if self.deferred and seen == 1:
                    self.tell(NOTICE)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.descriptor)
        self.theirs.close()
        self.thread.join()
        self.ours.close()
