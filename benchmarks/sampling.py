"""The cost of sampling, by maximum context length and by number of rows.

    python benchmarks/sampling.py runs/tiny

1. 64 tokens after a prompt of 64, with the same weights at context lengths 256 and 4,096 (with
   RoPE no weight depends on it): the cache grows with the text, so both must cost the same.
2. Tokens per second over all rows, at 1, 8 and 32 rows.

Times whole calls of `generate` on the host's clock: prefill, decoding and detokenizing. Contestants
take turns; results are medians and the middle half of the repeats.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpt import cli
from gpt.errors import require


@dataclass(frozen=True)
class Command:
    """What to measure."""

    checkpoint: tyro.conf.Positional[Path]
    """Run folder of a model with rotary positions."""
    repeats: int = 40
    """Measurements of each."""


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def take_turns(works: dict, repeats: int) -> dict[object, list[float]]:
    """Seconds of each piece of work, measured in turns after two calls that warm up."""
    times = {name: [] for name in works}
    for i in range(repeats + 2):
        for name, work in works.items():
            spent = seconds(work)
            if i >= 2:
                times[name].append(spent)
    return times


def spread(values: list[float]) -> str:
    """The median and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:,.5g} ({low:,.5g} to {high:,.5g})"


def compare_contexts(model, repeats: int) -> None:
    """Print milliseconds for 64 tokens after 64, and the ratio of each pair."""
    from gpt.sampling.settings import Settings

    require(model.config.positions == "rope", "expected a model with rotary positions")
    settings = Settings(max_new_tokens=64, ignore_eos=True, top_p=0.9)
    prompt = list(range(64))

    def work(context: int) -> Callable[[], object]:
        config = dataclasses.replace(model.config, context_length=context)
        other = dataclasses.replace(model, config=config)
        return lambda: other.generate([prompt], settings)

    times = take_turns({context: work(context) for context in (256, 4096)}, repeats)
    for context, values in times.items():
        print(f"context {context:>5}: {spread([1e3 * value for value in values])} ms")
    ratios = [long / short for short, long in zip(times[256], times[4096], strict=True)]
    print(f"ratio of a pair, 4096 to 256: {spread(ratios)}")


def compare_rows(model, repeats: int) -> None:
    """Print tokens per second over all rows, for 64 tokens after a prompt of 64."""
    from gpt.sampling.settings import Settings

    settings = Settings(max_new_tokens=64, ignore_eos=True, top_p=0.9)
    prompts = [[(row + i) % 256 for i in range(64)] for row in range(32)]
    works = {
        rows: lambda rows=rows: model.generate(prompts[:rows], settings) for rows in (1, 8, 32)
    }
    for rows, values in take_turns(works, repeats).items():
        rates = [64 * rows / value for value in values]
        print(f"{rows:>2} rows: {spread(rates)} tokens/s, all together")


def main(argv: list[str]) -> int:
    """Measure both; return the exit code."""
    command = cli.parse(Command, argv, program="sampling.py", description=__doc__)
    cli.prepare_jax()
    from gpt.sampling.language_model import load

    model = load(command.checkpoint)
    compare_contexts(model, command.repeats)
    compare_rows(model, command.repeats)
    return 0


if __name__ == "__main__":
    cli.run(main)
