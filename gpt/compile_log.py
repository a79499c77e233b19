"""What this process has compiled, and a stopwatch that leaves compilation out.

Both listen to jax's monitoring events, whose names are jax's own affair: pyproject.toml bounds its
version, and a test sees to it that a compilation is noticed.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax

COMPILE_EVENTS = "/jax/core/compile/"  # one event each for tracing, lowering and compiling
COMPILED = COMPILE_EVENTS + "backend_compile_duration"  # the last of them
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # comes before COMPILED of the same program


@dataclass(frozen=True)
class Program:
    """A compiled program: the name of its function, the seconds of tracing, lowering and compiling,
    whether it was found in the cache on disk, and what it was compiled for ("batch 2, bucket 32").
    """

    name: str
    seconds: float
    cached: bool
    sizes: str = ""


@dataclass
class Compilations:
    """What this process has compiled so far: programs and seconds in total, and each in turn."""

    programs: int = 0
    seconds: float = 0.0
    each: list[Program] = field(default_factory=list)
    unfinished: dict[str, float] = field(default_factory=dict, repr=False)  # seconds, by name
    cache_hit: bool = field(default=False, repr=False)  # for the program that comes next
    sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def of(self, **sizes: int) -> Iterator[None]:
        """Note these sizes with each program compiled in the block, beside those of blocks
        around it; sizes of 0 are left out."""
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
    """Warns of programs that decoding compiles for a shape at which it has already run.

    The first chunk at a shape may compile, those after it should not.
    """

    def __init__(self):
        self.shapes_seen = set()
        self.n_programs = 0

    def begin(self) -> None:
        self.n_programs = compilations.programs

    def end(self, shape: tuple, capacity: int) -> None:
        """After a chunk. `shape`: all that its programs depend on; `capacity`: of the cache."""
        if shape in self.shapes_seen and compilations.programs > self.n_programs:
            warnings.warn(
                f"a program was compiled in the middle of decoding at an unchanged shape "
                f"(capacity {capacity}): this costs time and should not happen; please report it",
                stacklevel=3,
            )
        self.shapes_seen.add(shape)


@dataclass
class Stopwatch:
    """`with watch:` adds the seconds spent inside to `seconds`, those of compilation to
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
