"""Completions from a checkpoint, and nothing but the checkpoint.

    python sample.py runs/tiny --prompt "def " --num-samples 2

The shape of the model, its weights and its tokenizer all lie in the run's folder. Text streams to
standard output as it is drawn; everything else goes to standard error.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gpt import cli
from gpt.config import Dtype, Weights
from gpt.errors import require
from gpt.sampling.settings import Settings

DEFAULT_SETTINGS = Settings()


@dataclass(frozen=True)
class Command:
    """What to sample, and how."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder, as train.py made it."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeat the flag for several (default: one that is empty)."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = DEFAULT_SETTINGS
    step: int | None = None
    """Take the checkpoint of this step (default: the newest)."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    weights: Weights | None = None
    """The average over the run or the last weights (default: the average where one is kept)."""
    score: str | None = None
    """Do not sample: print how likely this text is, token by token."""
    check: bool = False
    """Do not sample: check the cache contract on this model; exit code 1 if it does not hold."""
    json: bool = False
    """Print JSON, one object a completion; its seconds leave compilation out."""

    @property
    def prompts(self) -> list[str]:
        """The prompts as text: bytes from the shell that are none become U+FFFD."""
        from gpt.tokenizer import without_lone_surrogates

        return [without_lone_surrogates(prompt) for prompt in self.prompt or ("",)]


def main(argv: list[str]) -> int:
    """Load the model and do what the flags ask; the exit code."""
    command = cli.parse(Command, argv, program="sample.py", description=__doc__)
    asked = {"--check": command.check, "--score": command.score is not None}
    asked["--prompt"] = bool(command.prompt)
    given = [flag for flag, on in asked.items() if on]
    require(len(given) < 2, f"{' and '.join(given)} exclude each other: choose one")
    require(not (command.check and command.json), "--check prints no JSON: drop --json")
    cli.prepare_jax()
    from gpt.sampling.language_model import load

    model = load(command.checkpoint, command.step, command.dtype, command.weights)
    if model.weights == "ema":
        print(
            "note: these are the averaged weights; --weights raw for the last ones", file=sys.stderr
        )
    for note in model.notes:
        print(f"note: {note}; using step {model.step}", file=sys.stderr)
    if command.check:
        return print_checks(model)
    if command.score is not None:
        return print_score(model, command)
    return print_json(model, command) if command.json else print_stream(model, command)


def print_stream(model, command: Command) -> int:
    """Completions as text. One streams; several are printed whole, each below its label."""
    prompts = command.prompts
    labelled = len(prompts) * command.settings.num_samples > 1
    lead = prompts[0]  # printed with the first piece: the model may refuse it
    for piece in model.stream(prompts, **dataclasses.asdict(command.settings)):
        if not labelled:
            print(lead + piece.text, end="", flush=True)
            lead = ""
        elif piece.completion.finish_reason:
            print(f"--- {label(piece.row, command)} ---\n{piece.completion}\n", flush=True)
    if not labelled:
        print()
    report_speed(piece.completion)
    return 0


def label(row: int, command: Command) -> str:
    """Which prompt and which sample a row is."""
    prompt, sample = divmod(row, command.settings.num_samples)
    return f"prompt {prompt + 1}, sample {sample + 1}"


def report_speed(done) -> None:
    """A line about the two phases, on standard error."""
    rate = f", {done.tokens_per_second:.0f} tokens/s a row" if done.tokens_per_second else ""
    print(
        f"prefill {done.prefill_seconds * 1e3:.1f} ms, decode {done.decode_seconds:.2f} s{rate} "
        f"(compilation left out); stopped by {done.finish_reason}",
        file=sys.stderr,
    )


def print_json(model, command: Command) -> int:
    """One JSON object a completion, in the order of the prompts."""
    for completion in model.generate(command.prompts, **dataclasses.asdict(command.settings)):
        print(json.dumps(completion_json(completion), ensure_ascii=False))
    return 0


def completion_json(completion) -> dict[str, Any]:
    """A completion as JSON values."""
    names = ("prompt", "text", "token_ids", "logprobs", "finish_reason")
    names += ("prefill_seconds", "decode_seconds", "tokens_per_second", "seed", "sample")
    return {name: getattr(completion, name) for name in names}


def print_score(model, command: Command) -> int:
    """Log-probabilities of the text's tokens, and their mean in the usual units."""
    score = model.score(command.score)
    totals = {n: getattr(score, n) for n in ("mean_nll", "bits_per_byte", "perplexity")}
    if command.json:
        lists = {"token_ids": score.token_ids, "logprobs": score.logprobs}
        print(json.dumps({"tokens": len(score.token_ids), **totals, **lists}))
        return 0
    for token, logprob in zip(score.token_ids, score.logprobs, strict=True):
        piece = model.tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
        print(f"{logprob:9.4f}  {piece!r}")
    print(
        f"{len(score.token_ids)} tokens: {score.mean_nll:.4f} nats a token, "
        f"{score.bits_per_byte:.4f} bits a byte, perplexity {score.perplexity:.2f}"
    )
    return 0


def print_checks(model) -> int:
    """Each check of the cache contract with its largest difference; 1 if one fails."""
    from gpt.sampling.check import run_checks

    failed = 0
    for check in run_checks(model.config, model.params):
        verdict = "ok    " if check.passed else "FAILED"
        print(f"{verdict} {check.name}: {check.largest:.2e} (allowed {check.allowed:.2e})")
        failed += not check.passed
    print("the cache contract holds" if not failed else f"{failed} checks FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
