"""Orbax, kept from the terminal. Knows nothing of what is saved."""

import logging
import sys
import warnings
from typing import Any


def hush_orbax() -> None:
    """Keep orbax's own reports from the terminal: every failure it meets is raised as well.

    It logs through absl. And beside a read that fails it abandons others, for each of which
    Python prints a traceback: later, from other threads, when its event loop is closed.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.msg)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report, abandoned = sys.unraisablehook, ("Event loop is closed", "TensorStore")

    def hook(args: Any) -> None:
        if not any(words in str(args.exc_value) for words in abandoned):
            report(args)

    sys.unraisablehook = hook
