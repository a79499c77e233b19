"""What every contestant does: warm up, say so, then one turn for each line that it is sent."""

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
        spent = work()
        spent = time.perf_counter() - begun if spent is None else spent
        print(f"seconds {spent}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak {peak * (1 if sys.platform == 'darwin' else 1024)}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def decode_step(complete: Callable[[int], object], new: int) -> float:
    """Seconds a decode step: what `new` tokens take more than the first, which is the prefill's."""
    return (timed(lambda: complete(new + 1)) - timed(lambda: complete(1))) / new
