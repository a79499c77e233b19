"""Seconds of work with the seconds of compilation taken out. Knows nothing but jax's own events."""

import time
from dataclasses import dataclass, field

import jax

COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering and compiling, one event each
COMPILED = COMPILE_EVENTS + "backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"  # comes before the COMPILED of the same program


@dataclass(frozen=True)
class Program:
    """One that was compiled: the name of its function, seconds from tracing on, and whether it was
    found in the cache on disk, whole."""

    name: str
    seconds: float
    cached: bool


@dataclass
class Compilations:
    """What this process has compiled so far: programs and seconds, and each one in turn."""

    programs: int = 0
    seconds: float = 0.0
    each: list[Program] = field(default_factory=list)
    unfinished: dict[str, float] = field(default_factory=dict, repr=False)  # seconds, by name
    found: bool = field(default=False, repr=False)

    def record(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        """Listener of jax's duration events."""
        if not event.startswith(COMPILE_EVENTS):
            return
        self.seconds += seconds
        name = fun_name.removeprefix("jit(").removesuffix(")")
        self.unfinished[name] = self.unfinished.get(name, 0.0) + seconds
        if event == COMPILED:
            self.programs += 1
            self.each.append(Program(name, self.unfinished.pop(name), self.found))
            self.found = False

    def notice(self, event: str, **_) -> None:
        """Listener of jax's other events."""
        self.found |= event == FOUND


compilations = Compilations()
jax.monitoring.register_event_duration_secs_listener(compilations.record)
jax.monitoring.register_event_listener(compilations.notice)


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
