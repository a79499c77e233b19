"""Seconds of work with the seconds of compilation taken out. Knows nothing but jax's own events."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax

COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering and compiling, one event each
COMPILED = COMPILE_EVENTS + "backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"  # comes before the COMPILED of the same program


@dataclass(frozen=True)
class Program:
    """One that was compiled: the name of its function, seconds from tracing on, and whether it was
    found in the cache on disk, whole. `sizes`: what it is for, such as "batch 2, bucket 32"."""

    name: str
    seconds: float
    cached: bool
    sizes: str = ""


@dataclass
class Compilations:
    """What this process has compiled so far: programs and seconds, and each one in turn."""

    programs: int = 0
    seconds: float = 0.0
    each: list[Program] = field(default_factory=list)
    unfinished: dict[str, float] = field(default_factory=dict, repr=False)  # seconds, by name
    found: bool = field(default=False, repr=False)
    sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def of(self, **sizes: int) -> Iterator[None]:
        """Programs that are compiled within are noted as those for these sizes and the ones around
        them; 0 is left out."""
        before, self.sizes = self.sizes, self.sizes | sizes
        try:
            yield
        finally:
            self.sizes = before

    def record(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        """Listener of jax's duration events."""
        if not event.startswith(COMPILE_EVENTS):
            return
        self.seconds += seconds
        name = fun_name.removeprefix("jit(").removesuffix(")")
        self.unfinished[name] = self.unfinished.get(name, 0.0) + seconds
        if event == COMPILED:
            self.programs += 1
            sizes = ", ".join(f"{size} {n}" for size, n in self.sizes.items() if n)
            self.each.append(Program(name, self.unfinished.pop(name), self.found, sizes))
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
