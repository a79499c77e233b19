"""Stop a run early without losing it: a signal becomes a request that the loop checks."""

import os
import signal
import socket
import threading
from collections.abc import Callable

from jax.experimental.multihost_utils import reached_preemption_sync_point

from gpt import distributed

# Terminals and schedulers send these signals to end a program, or to announce that they will.
# Windows lacks some of them.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
NOTICE = "stopping       the run is saved after this step; Ctrl-C again stops at once"
TOO_EARLY = "stopping       as soon as possible; nothing new is saved; Ctrl-C again stops at once"


class StopSignal:
    """A context manager that turns Ctrl-C, SIGTERM and the like into an exit `code`: 128 plus the
    signal's number, or 0 if none has arrived.

    Until `defer` is called there is nothing to save, and a signal raises KeyboardInterrupt(code) as
    soon as Python runs again (a compilation cannot be interrupted). Afterwards it only sets `code`.
    Either way `log` gets a notice immediately. A Ctrl-C after any earlier signal calls
    `before_exit` and ends the process immediately, whatever the main thread is doing. Signals
    that were ignored before, such as SIGHUP under nohup, stay ignored.

    If several processes train, the one that gets a signal informs the others: JAX's preemption
    service handles SIGTERM and chooses the step after which all stop, and the other signals are
    passed on to it as SIGTERM.
    """

    def __init__(self, log: Callable[[str], None], before_exit: Callable[[], None]):
        self.log = log
        self.before_exit = before_exit
        self.code = 0
        self.deferred = False
        self.steps_done = 0
        self.reached_sync_point = False

    def __enter__(self) -> "StopSignal":
        # Python runs a handler only once the main thread is back in Python, which a compilation can
        # delay for minutes. So a thread reads signals from a socket as they arrive.
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.previous_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

        self.previous_handlers = {}
        for number in SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            handled_by_jax = number == signal.SIGTERM and distributed.is_multi_process()
            if not ignored and not handled_by_jax:
                self.previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def defer(self, steps_done: int) -> None:
        """From now on only note signals. `steps_done`: the step that the run starts from."""
        self.deferred = True
        self.steps_done = steps_done

    def must_end_after(self, step: int) -> bool:
        """Whether the run must end after `step`, or should have ended before. Every process asks
        this after every step, and all get the same answer."""
        if not distributed.is_multi_process():
            return bool(self.code)
        # JAX picks a step that no process has passed. This takes about 20 microseconds.
        self.reached_sync_point |= reached_preemption_sync_point(step - self.steps_done)
        if self.reached_sync_point and not self.code:
            self.code = 128 + signal.SIGTERM
            self.log(NOTICE)
        return self.reached_sync_point

    def _handle(self, number: int, _frame) -> None:
        self.code = self.code or 128 + number
        if not self.deferred:
            raise KeyboardInterrupt(self.code)
        if distributed.is_multi_process():
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        """In a thread: log a notice of the first signal, and exit on a Ctrl-C after it."""
        n_seen = 0
        while received := self.reader.recv(1):
            number = received[0]
            if number == signal.SIGINT and n_seen:
                self.before_exit()
                os._exit(128 + signal.SIGINT)
            if number in SIGNALS:
                n_seen += 1
                if n_seen == 1:
                    self.log(NOTICE if self.deferred else TOO_EARLY)

    def __exit__(self, *_) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.previous_fd)
        self.writer.close()
        self.thread.join()
        self.reader.close()
