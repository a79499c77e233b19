"""Ending a run early without losing it: signals become an exit code that the loop looks at."""

import signal


class StopSignal:
    """While open, Ctrl-C and SIGTERM do not end the process: `code` says how it should leave.

    130 after Ctrl-C, 143 after SIGTERM, 0 otherwise. A second Ctrl-C ends it at once.
    """

    def __init__(self):
        self.code = 0

    def __enter__(self) -> "StopSignal":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, _) -> None:
        """The handler of both signals."""
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
