"""What every worker does: warm up, print "ready", then work once for each line that it is sent."""

import resource
import sys
import time
from collections.abc import Callable


def serve(work: Callable[[], float | None]) -> None:
    """`work()` does the work once; it returns its seconds, or None to be timed as a whole."""
    for _ in range(3):
        work()
    print("ready 0", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        seconds = work()
        if seconds is None:
            seconds = time.perf_counter() - begun
        print(f"seconds {seconds}", flush=True)

    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak_bytes *= 1024  # Linux counts in kilobytes
    print(f"peak {peak_bytes}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def decode_step(complete: Callable[[int], object], new_tokens: int) -> float:
    """Seconds per decode step. The first token is prefill's, so it is measured alone and taken off
    the time of `new_tokens` more."""
    longer = timed(lambda: complete(new_tokens + 1))
    return (longer - timed(lambda: complete(1))) / new_tokens
