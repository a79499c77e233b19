"""Speculative decoding against plain decoding: tokens per second, and seconds to compile.

    python benchmarks/speculative.py [RUN] [--large RUN --draft RUN]
    bash benchmarks/speculative_models.sh [RUN]          makes these two runs first

Texts of 200 tokens in float32, with 1 row and with 8.
- RUN, a model trained on Python source (such as a run of `train.py tiny`), continues source that
  fills half of its context, at temperatures 0 and 0.8, until the context is full.
- A 135 M Llama-style model with random weights samples random text, which cannot be predicted, and
  text that repeats itself, because a bias allows only one token.
- The large model continues source in the same way, with proposals from the draft. In place of
  GPT-2's published weights, `bash benchmarks/speculative_models.sh` trains a model of gpt2's size
  with a vocabulary of 4,096, and a two-layer draft that learns to imitate its output. After such
  short training, its text is easier to predict than GPT-2's.

Runs with and without --speculate take turns. Seconds cover decoding without compilation: medians,
and the middle half of the repeats. Compile times are for the loop alone, both programs fresh.
"""

import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent / "workers"))

from gpt import cli

ROOT = Path(__file__).parent.parent
LOOPS = ("decode_chunk", "speculate_chunk")
SOURCES = ["cli", "errors", "digest", "config", "flops", "hardware", "checkpoint", "sharding"]


@dataclass(frozen=True)
class Command:
    """What to measure."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Run folder of a model trained on Python source."""
    large: Path | None = None
    """Run folder of the model that --draft imitates."""
    draft: Path | None = None
    """Run folder of the model that makes proposals for --large."""
    speculate: int = 4
    """Proposals per step."""
    repeats: int = 7
    """Measurements of each."""
    new_tokens: int = 200
    """Tokens per text."""


def llama():
    """The Llama-style model, with random weights and no tokenizer."""
    import models

    from gpt.data.tokenizers import IdTokenizer
    from gpt.model import transformer
    from gpt.sampling.language_model import LanguageModel

    config = dataclasses.replace(models.model_config("llama"), context_length=1024)
    params = transformer.unstack(models.random_weights(config))
    tokenizer = IdTokenizer(config.vocab_size, -1)
    return LanguageModel(config.for_sampling(), params, tokenizer, step=0)


def compare(name: str, model, prompts: list, settings, command: Command) -> None:
    """Print tokens per second over all rows, with and without proposals, and their ratio."""
    from gpt.compile_log import compilations

    plain = dataclasses.replace(settings, max_new_tokens=command.new_tokens, ignore_eos=True)
    ways = {"plain": plain, "speculative": dataclasses.replace(plain, speculate=command.speculate)}
    compile_seconds = {}
    texts = {}
    rates = {way: [] for way in ways}
    for turn in range(command.repeats + 1):
        for way, chosen in ways.items():
            before = len(compilations.each)
            done = model.generate(prompts, chosen)
            texts[way] = [one.token_ids for one in done]
            if turn == 0:
                loops = [p.seconds for p in compilations.each[before:] if p.name in LOOPS]
                compile_seconds[way] = statistics.mean(loops) if loops else None
            else:
                n_tokens = sum(len(one.token_ids) - 1 for one in done)
                rates[way].append(n_tokens / max(one.decode_seconds for one in done))

    ratios = [b / a for a, b in zip(rates["plain"], rates["speculative"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    n_accepted = sum(one.accepted for one in done)
    n_readings = sum(len(one.token_ids) - 1 for one in done) - n_accepted
    same = sum(a == b for a, b in zip(texts["plain"], texts["speculative"], strict=True))
    compiled = ""  # by an earlier case
    if None not in compile_seconds.values():
        compiled = (
            f"; a loop compiled in {compile_seconds['plain']:.1f} and "
            f"{compile_seconds['speculative']:.1f} s"
        )
    print(
        f"{name}, rows {len(prompts)}: {statistics.median(rates['plain']):,.0f} and "
        f"{statistics.median(rates['speculative']):,.0f} tokens/s, ratio {ratio:.2f} ({low:.2f} to "
        f"{high:.2f}); {1 + n_accepted / n_readings:.2f} tokens per reading; {n_accepted} of "
        f"{sum(one.proposed for one in done)} proposals accepted; {same} of {len(done)} texts the "
        f"same{compiled}",
        flush=True,
    )


def compare_on_source(name: str, model, command: Command) -> None:
    """Print a line per number of rows and temperature; the model continues Python source."""
    from gpt.sampling.settings import Settings

    sources = [(ROOT / "gpt" / f"{source}.py").read_text() for source in SOURCES]
    half = model.config.context_length // 2
    prompts = [model.tokenizer.encode_ordinary(source)[:half] for source in sources]
    for n_rows in (1, 8):
        for temperature in (0.0, 0.8):
            settings = Settings(temperature=temperature, on_context_full="stop")
            compare(
                f"{name} at temperature {temperature}", model, prompts[:n_rows], settings, command
            )


def main(argv: list[str]) -> int:
    """Measure everything; return the exit code."""
    command = cli.parse(Command, argv, program="speculative.py", description=__doc__)
    cli.prepare_jax(cache=False)
    import gpt
    from gpt.sampling.settings import Settings

    if command.checkpoint is not None:
        compare_on_source("source", gpt.load(command.checkpoint), command)
    if command.large is not None and command.draft is not None:
        model = gpt.load(command.large).with_draft(gpt.load(command.draft))
        compare_on_source("source with a draft", model, command)

    model = llama()
    random_text = Settings(temperature=1.0)
    one_token = Settings(logit_bias={7: 1e9})
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(8, 64)).tolist()
    for n_rows in (1, 8):
        compare("random text of a Llama form", model, ids[:n_rows], random_text, command)
        compare("repeating text of a Llama form", model, ids[:n_rows], one_token, command)
    return 0


if __name__ == "__main__":
    cli.run(main)
