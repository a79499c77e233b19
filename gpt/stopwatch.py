"""Seconds of work with the seconds of compilation taken out. Knows nothing but jax's own events."""

import time
from dataclasses import dataclass, field

import jax

COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering and compiling, one event each
COMPILED = COMPILE_EVENTS + "backend_compile_duration"


@dataclass
class Compilations:
    """What this process has compiled so far: programs and seconds."""

    programs: int = 0
    seconds: float = 0.0

    def record(self, event: str, seconds: float, **_) -> None:
        """Listener of jax's duration events."""
        if event.startswith(COMPILE_EVENTS):
            self.seconds += seconds
            self.programs += event == COMPILED


compilations = Compilations()
jax.monitoring.register_event_duration_secs_listener(compilations.record)


@dataclass
class Stopwatch:
    """`with watch:` adds to `seconds` the time spent inside, less what went into compiling.

    `compile_seconds` and `programs` hold what was taken out. The caller waits for the device.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    programs: int = 0
    started: tuple = field(default=(), repr=False)

    def __enter__(self) -> "Stopwatch":
        self.started = (time.perf_counter(), compilations.seconds, compilations.programs)
        return self

    def __exit__(self, *_) -> None:
        begun, compile_seconds, programs = self.started
        compiled = compilations.seconds - compile_seconds
        self.compile_seconds += compiled
        self.programs += compilations.programs - programs
        self.seconds += max(time.perf_counter() - begun - compiled, 0.0)
