"""Completions from a checkpoint, and nothing but the checkpoint.

    python sample.py runs/tiny --prompt "def " --num-samples 2

The shape of the model, its weights and its tokenizer all lie in the run's folder. Text streams to
standard output as it is drawn; everything else goes to standard error.
"""

import collections
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gpt import cli, console
from gpt.config import ONE_DEVICE, Dtype, MeshConfig, Weights
from gpt.errors import UserError, positive, require
from gpt.sampling.settings import Settings

DEFAULT = Settings()
BEAM_TAKES = {"max_new_tokens", "num_samples", "logit_bias", "repetition_penalty", "ignore_eos"}


@dataclass(frozen=True)
class Command:
    """What to sample, and how."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder, as train.py made it."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; --prompt=TEXT where it begins with a hyphen (default: one that is empty,
    which starts from end-of-text)."""
    prompt_file: Path | None = None
    """A file of text to continue, its last newline included; - is standard input."""
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, spaces between: "1 2 3"."""
    interactive: bool = False
    """Complete each line that you type. Ctrl-C ends the completion, Ctrl-D the program."""
    settings: Annotated[tyro.conf.UseAppendAction[Settings], tyro.conf.arg(name="")] = DEFAULT
    beam_width: int = 1
    """Above 1: search for the likeliest texts, following this many at once, and draw nothing;
    --num-samples are then the best ones found."""
    length_penalty: float = 1.0
    """Beam search: exponent of the length that divides a text's log-probability."""
    show_probs: int | None = None
    """Show this many likeliest next tokens, after prefill and at each step; * marks the drawn."""
    score: str | None = None
    """Do not sample: print how likely this text is, token by token."""
    score_file: Path | None = None
    """Do not sample: score a file of text of any length; - is standard input."""
    score_ids: str | None = None
    """Do not sample: score token ids, spaces between: "1 2 3"."""
    stride: int | None = None
    """Scoring text longer than the context: tokens from one window to the next; fewer give each
    token more context, and take longer (default: half the context)."""
    check: bool = False
    """Do not sample: check the cache contract on this model; exit code 1 if it does not hold."""
    json: bool = False
    """Print JSON, one object a completion; its seconds leave compilation out."""
    verbose: bool = False
    """Report the programs that were compiled, and the shapes they are for."""
    step: int | None = None
    """Take the checkpoint of this step (default: the newest)."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    weights: Weights | None = None
    """The average over the run or the last weights (default: the average where one is kept)."""
    mesh: MeshConfig = ONE_DEVICE
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""


def refuse(command: Command) -> None:
    """UserError for what can be refused before anything is loaded."""
    c, scores = command, ("score", "score_file", "score_ids")
    doing = ("check", *scores, "prompt", "prompt_file", "prompt_ids", "interactive")
    given = [flag(name) for name in doing if getattr(c, name) not in (None, False, ())]
    require(len(given) < 2, f"{' and '.join(given)} exclude each other: choose one")
    scoring = any(getattr(c, name) is not None for name in scores)
    require(not (c.json and c.check), "--check prints no JSON: drop --json")
    require(not (c.json and c.interactive), "--interactive prints no JSON: drop --json")
    require(scoring or c.stride is None, "--stride is for scoring: add --score or drop it")
    for name in ("stride", "show_probs"):
        positive(name, 1 if getattr(c, name) is None else getattr(c, name))
    positive("beam_width", c.beam_width)
    beam = ["beam_width"] * (c.beam_width > 1) + ["length_penalty"] * (c.length_penalty != 1)
    if scoring or c.check:
        idle = changed(c.settings) + beam + ["show_probs"] * (c.show_probs is not None)
        require(not idle, f"{given[0]} draws nothing: drop {' '.join(map(flag, idle))}")
    if c.beam_width > 1:
        refuse_beam(c)
    require(c.beam_width > 1 or not beam, "--length-penalty is for beam search: add --beam-width")


def refuse_beam(command: Command) -> None:
    """UserError for flags that beam search has no use for."""
    c = command
    idle = [name for name in changed(c.settings) if name not in BEAM_TAKES]
    idle = [name for name in idle if name != "temperature" or c.settings.temperature]
    idle += [name for name in ("interactive", "show_probs") if getattr(c, name)]
    words = " ".join(map(flag, idle))
    require(not idle, f"--beam-width {c.beam_width} neither draws nor streams: drop {words}")
    n = c.settings.num_samples
    require(n <= c.beam_width, f"--num-samples {n}: a beam of {c.beam_width} has no more texts")


def changed(settings: Settings) -> list[str]:
    """Fields that the user has set."""
    names = [field.name for field in dataclasses.fields(settings)]
    return [name for name in names if getattr(settings, name) != getattr(DEFAULT, name)]


def flag(name: str) -> str:
    """`top_k` as people type it."""
    return "--" + name.replace("_", "-")


def read_prompts(command: Command) -> list[str] | list[list[int]]:
    """What to continue, texts or token ids; bytes from the shell that are none become U+FFFD."""
    from gpt.tokenizer import without_lone_surrogates

    if command.prompt_file:
        return [console.read_text("--prompt-file", command.prompt_file)]
    if command.prompt_ids:
        return [console.parse_ids("--prompt-ids", text) for text in command.prompt_ids]
    return [without_lone_surrogates(prompt) for prompt in command.prompt or ("",)]


def read_scored(command: Command) -> str | list[int] | None:
    """What to score; None for nothing."""
    if command.score_file:
        return console.read_text("--score-file", command.score_file)
    if command.score_ids is not None:
        return console.parse_ids("--score-ids", command.score_ids)
    return command.score


def main(argv: list[str]) -> int:
    """Load the model and do what the flags ask; the exit code."""
    command = cli.parse(Command, argv, program="sample.py", description=__doc__)
    refuse(command)
    console.accept_any_text()
    prompts, scored = read_prompts(command), read_scored(command)
    cli.prepare_jax(cache=command.compile_cache)
    from gpt.sampling.language_model import load

    c = command
    model = load(c.checkpoint, c.step, c.dtype, c.weights, c.mesh)
    if model.weights == "ema":
        note("these are the averaged weights; --weights raw for the last ones")
    for said in model.notes:
        note(said)
    code = 0
    if command.check:
        code = print_checks(model)
    elif scored is not None:
        print_score(model, command, scored)
    elif command.interactive:
        converse(model, command)
    else:
        complete(model, command, prompts)
    if command.verbose:
        from gpt.stopwatch import compilations

        print(console.describe_programs(compilations.each), file=sys.stderr)
    return code


def note(text: str) -> None:
    """A line on standard error."""
    print(f"note: {text}", file=sys.stderr)


def complete(model, command: Command, prompts: list) -> None:
    """Completions of all prompts: searched or drawn, as JSON or as text that streams."""
    from gpt.sampling import generate

    if command.beam_width > 1:
        done = print_search(model, command, prompts)
    elif command.json:
        done = generate.complete(model, prompts, command.settings, top=command.show_probs or 0)
        for completion in done:
            print(console.to_json(completion_json(completion)))
    else:
        done = print_stream(model, command, prompts)
    report(model, command, done)


def converse(model, command: Command) -> None:
    """Complete line after line, each a prompt of its own, until there are no more."""
    for line in console.read_lines(cli.cache_folder() / "prompts"):
        try:
            with console.patient_interrupt() as pressed:
                report(model, command, print_stream(model, command, [line], pressed.is_set))
        except UserError as error:
            console.write("\n")
            print(f"error: {error}", file=sys.stderr)


def print_stream(model, command: Command, prompts: list, stopped=lambda: False) -> list:
    """Completions as text while it is drawn, until they end or it is `stopped`; all of them."""
    from gpt.sampling import generate

    top, n_samples = command.show_probs or 0, command.settings.num_samples
    several = len(prompts) * n_samples > 1
    rows, shown, done = console.Rows(len(prompts) * n_samples), collections.Counter(), {}
    for piece in generate.stream(model, prompts, command.settings, top=top):
        row, completion, text = piece.row, piece.completion, ""
        if row not in done:
            text += console.label(*divmod(row, n_samples)) * several + completion.prompt * (not top)
        done[row] = completion
        text += console.tables(completion, shown[row], model.tokenizer) if top else piece.text
        shown[row] = len(completion.token_ids)
        if completion.finish_reason:
            text += str(completion) * bool(top) + "\n" * (1 + several)
        console.write(rows.push(row, text, bool(completion.finish_reason)))
        if stopped():
            console.write("\n")
            break
    return list(done.values())


def print_search(model, command: Command, prompts: list) -> list:
    """What beam search finds after each prompt, the best first; all of it."""
    from gpt.sampling import beam

    fields = {name: getattr(command.settings, name) for name in BEAM_TAKES - {"num_samples"}}
    n_best, penalty = command.settings.num_samples, command.length_penalty
    settings = beam.BeamSettings(command.beam_width, n_best, penalty, **fields)
    several = len(prompts) * n_best > 1
    for i, found in enumerate(told := beam.search(model, prompts, settings)):
        for one in found:
            head = console.label(i, one.sample, f", score {one.score:.4f}") * several
            if command.json:
                print(console.to_json(completion_json(one) | {"score": one.score}))
            else:
                console.write(f"{head}{one}\n" + "\n" * several)
        if len(found) < n_best:
            note(f"prompt {i + 1} has only {len(found)} texts")
    return [one for found in told for one in found]


def completion_json(completion) -> dict[str, Any]:
    """A completion as JSON values."""
    names = ("prompt", "text", "token_ids", "logprobs", "finish_reason")
    names += ("prefill_seconds", "decode_seconds", "tokens_per_second", "seed", "sample")
    names += ("top",) * bool(completion.top)
    return {name: getattr(completion, name) for name in names}


def report(model, command: Command, done: list) -> None:
    """How the completions went, on standard error; their shapes where asked for."""
    print(console.describe_end(done, model.config.context_length), file=sys.stderr)
    if command.verbose:
        from gpt.sampling.engine import bucket

        n, limit = max(len(one.prompt_ids) for one in done), model.config.context_length
        used = max(len(one.prompt_ids) + len(one.token_ids) for one in done) - 1
        sizes = [bucket(min(n, limit), limit)]
        while sizes[-1] < min(used, limit):
            sizes.append(bucket(sizes[-1] + 1, limit))
        print(f"prompts in a bucket of {sizes[0]} tokens, caches of {sizes} slots", file=sys.stderr)


def print_score(model, command: Command, scored: str | list[int]) -> None:
    """Log-probabilities of the tokens, and their mean in the usual units."""
    from gpt.sampling.score import score

    s = score(model, scored, command.stride)
    totals = {name: getattr(s, name) for name in ("mean_nll", "bits_per_byte", "perplexity")}
    if command.json:
        lists = {"token_ids": s.token_ids, "logprobs": s.logprobs}
        sizes = {"context": s.context, "stride": s.stride}
        print(console.to_json({"tokens": len(s.token_ids)} | totals | lists | sizes))
        return
    for token, logprob in zip(s.token_ids, s.logprobs, strict=True):
        print(f"{logprob:9.4f}  {console.spell(model.tokenizer.decode_bytes([token]))}")
    print(
        f"{len(s.token_ids)} tokens: {s.mean_nll:.4f} nats a token, {s.bits_per_byte:.4f} bits a "
        f"byte, perplexity {s.perplexity:.2f} (context {s.context}, stride {s.stride})"
    )


def print_checks(model) -> int:
    """Each check of the cache contract with its largest difference; 1 if one fails."""
    from gpt.sampling.check import run_checks

    failed = 0
    for check in run_checks(model.config, model.params, model.mesh):
        print(check)
        failed += not check.passed
    print("the cache contract holds" if not failed else f"{failed} checks FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
