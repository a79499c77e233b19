"""Log-likelihoods through lm-eval: our adapter against its own for transformers on torch.

    .venv-parity/bin/python benchmarks/evaluation.py

Both run the same random GPT-2 (124 M weights) in float32 on the CPU, on random ids in the lengths
of multiple-choice and cloze tasks, with the same batch size, in turns, compilation left out. Prints
answers per second in each turn, the median ratio of neighbouring turns, and the largest difference.
"""

import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import standin_tokenizers
import standins

import gpt
from gpt.convert.convert import import_model


@dataclass(frozen=True)
class Args:
    """What to compare."""

    questions: int = 24
    """Questions of each kind."""
    batch_size: int = 16
    """Answers per batch, for both."""
    repeats: int = 3
    """Turns for each."""
    one_thread: bool = False
    """Compare single-threaded CPU time, which depends less on other work on the machine; run with
    `OMP_NUM_THREADS=1 taskset -c 0`."""
    layers: int = 12
    """Number of blocks; everything else is as in the smallest GPT-2."""


KINDS = {  # context tokens, number of answers, tokens per answer
    "4 answers of 5 to 40 tokens after 30 to 120": ((30, 120), 4, (5, 40)),
    "4 answers of 1 token after 100 to 300": ((100, 300), 4, (1, 1)),
    "1 answer of 1 to 3 tokens after 60 to 110": ((60, 110), 1, (1, 3)),
}


def main() -> None:
    """Make the model, and compare each kind of task."""
    args = tyro.cli(Args, description=__doc__)
    clock = time.perf_counter
    if args.one_thread:
        import torch

        clock = time.process_time
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = make_adapters(Path(folder), args)
        for name, (context, n_answers, answer) in KINDS.items():
            rng = random.Random(0)

            def ids(least_and_most, rng=rng):
                return rng.choices(range(256), k=rng.randint(*least_and_most))

            requests = []
            for _ in range(args.questions):
                shared = ids(context)
                requests += [(None, shared, ids(answer)) for _ in range(n_answers)]
            compare(name, requests, theirs, ours, args.repeats, clock)


def make_adapters(folder: Path, args: Args) -> tuple:
    """The same model for both: the harness's adapter and ours."""
    from lm_eval.models.huggingface import HFLM

    from gpt.evaluate.harness import GPTJax

    shape = {"vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": args.layers}
    c = standins.with_context(standins.GPT2 | shape, 1024) | {"eos_token_id": 256}
    weights = {name: array * 0.1 for name, array in standins.tensors(c).items()}
    standins.write(folder / "theirs", c, weights)
    standin_tokenizers.write_bytes(folder / "theirs")
    import_model(folder / "theirs", folder / "run", ids_only=False, log=print)
    theirs = HFLM(str(folder / "theirs"), device="cpu", dtype="float32", batch_size=args.batch_size)
    return theirs, GPTJax(model=gpt.load(folder / "run"), batch_size=args.batch_size)


def compare(name: str, requests: list, theirs, ours, repeats: int, clock) -> None:
    """Time both in turns and print the comparison."""
    answers = ours._loglikelihood_tokens(requests, disable_tqdm=True)  # compiles
    rates = {"theirs": [], "ours": []}
    for _ in range(repeats):
        for who, lm in (("theirs", theirs), ("ours", ours)):
            start = clock()
            found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            rates[who].append(len(requests) / (clock() - start))
            if who == "theirs":
                difference = max(abs(a[0] - b[0]) for a, b in zip(answers, found, strict=True))
    ratios = [ours / theirs for theirs, ours in zip(*rates.values(), strict=True)]
    print(
        f"{name}: {statistics.median(ratios):.2f} times as fast; largest difference "
        f"{difference:.1e} nats"
    )
    for who, values in rates.items():
        print(f"  {who}: {', '.join(f'{value:.2f}' for value in values)} answers/s")


if __name__ == "__main__":
    main()
