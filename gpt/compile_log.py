"""A log of what this process has compiled, and a stopwatch that excludes compilation.

Both listen to JAX's monitoring events. Their names are not public API, so pyproject.toml bounds
JAX's version, and a test checks that a compilation is noticed.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax

COMPILE_EVENTS = "/jax/core/compile/"  # one event each for tracing, lowering and compiling
COMPILED = COMPILE_EVENTS + "backend_compile_duration"  # the last of them
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # comes before the same program's COMPILED


@dataclass(frozen=True)
class Program:
    """A compiled program: its function's name, the seconds spent tracing, lowering and compiling,
    whether it came from the cache on disk, and its sizes ("batch 2, bucket 32").
    """

    name: str
    seconds: float
    cached: bool
    sizes: str = ""


@dataclass
class Compilations:
    """What this process has compiled so far: totals of programs and seconds, and each program."""

    programs: int = 0
    seconds: float = 0.0
    each: list[Program] = field(default_factory=list)
    unfinished: dict[str, float] = field(default_factory=dict, repr=False)  # seconds, by name
    cache_hit: bool = field(default=False, repr=False)  # for the next program
    sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def of(self, **sizes: int) -> Iterator[None]:
        """Record these sizes with each program compiled in the block, along with those of
        enclosing blocks; sizes of 0 are left out."""
        outer = self.sizes
        self.sizes = outer | sizes
        try:
            yield
        finally:
            self.sizes = outer

    def on_duration(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if not event.startswith(COMPILE_EVENTS):
            return
        self.seconds += seconds
        name = fun_name.removeprefix("jit(").removesuffix(")")
        self.unfinished[name] = self.unfinished.get(name, 0.0) + seconds
        if event == COMPILED:
            self.programs += 1
            sizes = ", ".join(f"{size} {n}" for size, n in self.sizes.items() if n)
            self.each.append(Program(name, self.unfinished.pop(name), self.cache_hit, sizes))
            self.cache_hit = False

    def on_event(self, event: str, **_) -> None:
        if event == CACHE_HIT:
            self.cache_hit = True


compilations = Compilations()
jax.monitoring.register_event_duration_secs_listener(compilations.on_duration)
jax.monitoring.register_event_listener(compilations.on_event)


class RecompilationCheck:
    """Warns if decoding compiles a program at a shape it has already run at.

    The first chunk at a shape may compile; later ones should not.
    """

    def __init__(self):
        self.shapes_seen = set()
        self.n_programs = 0

    def begin(self) -> None:
        self.n_programs = compilations.programs

    def end(self, shape: tuple, capacity: int) -> None:
        """Call after a chunk. `shape`: all its programs depend on; `capacity`: the cache's."""
        if shape in self.shapes_seen and compilations.programs > self.n_programs:
            warnings.warn(
                f"a program was compiled in the middle of decoding at an unchanged shape "
                f"(capacity {capacity}): this costs time and should not happen; please report it",
                stacklevel=3,
            )
        self.shapes_seen.add(shape)


@dataclass
class Stopwatch:
    """`with watch:` adds the time spent inside to `seconds`, except compilation, which goes to
    `compile_seconds`.

    Block until the device is ready inside the `with`, or its work is not measured.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    started: tuple = field(default=(), repr=False)

    def __enter__(self) -> "Stopwatch":
        self.started = (time.perf_counter(), compilations.seconds)
        return self

    def __exit__(self, *_) -> None:
        start, compile_seconds = self.started
        elapsed = time.perf_counter() - start
        compiled = compilations.seconds - compile_seconds
        self.compile_seconds += compiled
        self.seconds += max(elapsed - compiled, 0.0)
