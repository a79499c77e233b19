"""Completions from a trained model: python sample.py CHECKPOINT [flags].

    python sample.py runs/tiny --prompt "def " --num-samples 2

The run's folder holds everything that is needed: the shape of the model, its weights and its
tokenizer. Text streams to standard output as it is generated; everything else goes to standard
error.
"""

import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli, terminal
from gpt.config import DTYPES, ONE_DEVICE, Dtype, MeshConfig, Quantize, Weights, optional
from gpt.errors import UserError, each, positive, require
from gpt.sampling.settings import Settings

AVERAGE = "the average where one is kept"
DEFAULT = Settings()


@dataclass(frozen=True)
class Args:
    """What to sample, and how."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder, as train.py made it."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; --prompt=TEXT if it begins with a hyphen. Without one, or with an empty
    one, generation starts from end-of-text."""
    prompt_file: Annotated[Path | None, optional("FILE")] = None
    """A file of text to continue, its last newline included; - is standard input."""
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, separated by spaces: "1 2 3"."""
    interactive: bool = False
    """Complete each line that you type. Ctrl-C ends the completion, Ctrl-D the program."""
    settings: Annotated[tyro.conf.UseAppendAction[Settings], tyro.conf.arg(name="")] = DEFAULT
    beam_width: int = 1
    """Above 1: search for the likeliest texts, following this many at once, instead of sampling;
    --num-samples are then the best ones found."""
    length_penalty: float = 1.0
    """Beam search: exponent of the length that divides a text's log-probability."""
    show_probs: Annotated[int | None, optional("INT")] = None
    """Show this many likeliest next tokens, after prefill and at each step; * marks the chosen one.
    Each number of them compiles the loop anew."""
    score: Annotated[str | None, optional("TEXT")] = None
    """Do not sample: print how likely this text is, token by token."""
    score_file: Annotated[Path | None, optional("FILE")] = None
    """Do not sample: score a file of text of any length; - is standard input."""
    score_ids: Annotated[str | None, optional("IDS")] = None
    """Do not sample: score token ids, separated by spaces: "1 2 3"."""
    stride: Annotated[int | None, optional("INT", "half the context")] = None
    """Scoring text longer than the context: tokens from one window to the next; fewer give each
    token more context, and take longer."""
    check: bool = False
    """Do not sample: check the cache contract on this model; exit code 1 if it does not hold."""
    json: bool = False
    """Print JSON, one object per completion, as soon as it ends; seconds leave compilation out."""
    verbose: bool = False
    """Report the programs that were compiled, with their shapes and seconds."""
    step: Annotated[int | None, optional("INT", "the newest")] = None
    """Take the checkpoint of this step."""
    dtype: Annotated[Dtype | None, optional(DTYPES, "float32 on CPU, else bfloat16")] = None
    """Type of the computation."""
    weights: Annotated[Weights | None, optional("{ema,raw}", AVERAGE)] = None
    """The average over the run, or the last weights."""
    quantize: Annotated[Quantize | None, optional("{int8}")] = None
    """Keep matrices as int8: a quarter of their memory; --score tells what it does to the loss."""
    mesh: MeshConfig = ONE_DEVICE
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""


def main(argv: list[str]) -> int:
    """Load the model and do what the flags ask for; the exit code."""
    terminal.prepare_streams()
    args, mode = parse_args(argv)
    inputs = read_inputs(args)
    cli.prepare_jax(cache=args.compile_cache)
    import gpt

    model = gpt.load(args.checkpoint, args.step, args.dtype, args.weights, args.mesh, args.quantize)
    if model.weights == "ema":
        terminal.note("note: these are the averaged weights; --weights raw for the last ones")
    for text in model.notes:
        terminal.note(f"note: {text}")

    code = 0
    if mode == "generate":
        completions = generate(model, args, inputs)
        terminal.note(terminal.describe_end(completions, model.config.context_length))
    elif mode == "interactive":
        converse(model, args)
    elif mode == "beam":
        completions = search(model, args, inputs)
        context_length = model.config.context_length
        terminal.note(terminal.describe_end(completions, context_length, may_slide=False))
    elif mode == "score":
        score(model, args, inputs[0])
    else:
        code = check(model)

    if args.verbose:
        from gpt.compile_log import compilations

        terminal.note(terminal.describe_programs(compilations.each))
    return code


def generate(model, args: Args, prompts: list, interrupted=lambda: False) -> list:
    """Complete the prompts, and show each completion as it grows, or as JSON when it has ended;
    until all have ended, or `interrupted()`."""
    from gpt.sampling.generate import stream

    settings, top = args.settings, args.show_probs or 0
    if args.json:
        show = partial(terminal.json_piece, with_top=top > 0)
    else:
        show = terminal.CompletionText(len(prompts), settings.num_samples, top, model.tokenizer)

    completions = {}
    with terminal.InOrder(len(prompts) * settings.num_samples) as output:
        for piece in stream(model, prompts, settings, top=top):
            completions[piece.row] = piece.completion
            output.add(piece.row, show(piece), ended=piece.completion.finish_reason is not None)
            if interrupted():
                output.flush(end_line=True)
                break
    return list(completions.values())


def converse(model, args: Args) -> None:
    """Complete line after line, each a prompt of its own, until there are no more."""
    from gpt.sampling.generate import require_usable

    require_usable(model, [args.settings], args.show_probs or 0)
    for line in terminal.read_lines(cli.cache_folder() / "prompts"):
        prompt = terminal.typed_text("the line", line)
        try:
            with terminal.deferred_interrupt() as pressed:
                completions = generate(model, args, [prompt], pressed.is_set)
            terminal.note(terminal.describe_end(completions, model.config.context_length))
        except UserError as error:
            if not sys.stdout.isatty():
                terminal.write("\n")  # one output line for each line of a pipe
            terminal.note(f"error: {error}")


def search(model, args: Args, prompts: list) -> list:
    """Show the likeliest texts that beam search finds after each prompt, the best first."""
    from gpt.sampling import beam_search

    settings = beam_search.BeamSettings(
        width=args.beam_width,
        n_best=args.settings.num_samples,
        length_penalty=args.length_penalty,
        max_new_tokens=args.settings.max_new_tokens,
        logit_bias=args.settings.logit_bias,
        repetition_penalty=args.settings.repetition_penalty,
        ignore_eos=args.settings.ignore_eos,
    )
    several = len(prompts) * settings.n_best > 1
    found = beam_search.search(model, prompts, settings)
    for i, hypotheses in enumerate(found):
        for one in hypotheses:
            if args.json:
                values = terminal.completion_json(one) | {"score": one.score}
                terminal.write(terminal.to_json(values) + "\n")
            elif several:
                terminal.write(terminal.header(i, one.sample, f", score {one.score:.4f}"))
                terminal.write(f"{one}\n\n")
            else:
                terminal.write(f"{one}\n")
        if len(hypotheses) < settings.n_best:
            terminal.note(f"note: prompt {i + 1} has only {len(hypotheses)} texts")
    return [one for hypotheses in found for one in hypotheses]


def score(model, args: Args, text: str | list[int]) -> None:
    """Print the log-probability of each token, their mean in the usual units, and what quantizing
    adds to it."""
    import gpt

    result = model.score(text, args.stride)
    added = None
    if args.quantize:
        # The same checkpoint, though a newer one may have been saved by now.
        exact = gpt.load(args.checkpoint, model.step, args.dtype, args.weights, args.mesh)
        added = result.mean_nll - exact.score(text, args.stride).mean_nll
    if args.json:
        values = result.to_json()
        if added is not None:
            values["quantization_nll"] = added
        print(terminal.to_json(values))
        return
    for token, logprob in zip(result.token_ids, result.logprobs, strict=True):
        print(f"{logprob:9.4f}  {terminal.spell(model.tokenizer.decode_bytes([token]))}")
    print(result)
    if added is not None:
        print(f"{args.quantize} changes the loss by {added:+.4f} nats per token")


def check(model) -> int:
    """Print each check of the cache contract with its largest difference; 1 if one fails."""
    from gpt.sampling.cache_check import run_checks

    n_failed = 0
    for result in run_checks(model.config, model.params, model.mesh):
        print(result)
        n_failed += not result.passed
    if n_failed:
        print(f"{n_failed} checks FAILED")
        return 1
    print("the cache contract holds")
    return 0


PROMPTS = {"prompt", "prompt_file", "prompt_ids"}
SCORES = {"score", "score_file", "score_ids"}
SETTINGS = {field.name for field in fields(Settings)}
BEAM_SETTINGS = {
    "max_new_tokens",
    "num_samples",
    "logit_bias",
    "repetition_penalty",
    "ignore_eos",
    "temperature",
}
# The flags that each mode uses, beside those about the model and the machine, which all do.
USED_BY = {
    "generate": PROMPTS | SETTINGS | {"beam_width", "show_probs", "json"},
    "interactive": SETTINGS | {"interactive", "beam_width", "show_probs"},
    "beam": PROMPTS | BEAM_SETTINGS | {"beam_width", "length_penalty", "json"},
    "score": SCORES | {"stride", "json"},
    "check": {"check"},
}
USED_BY_ALL = {"step", "dtype", "weights", "quantize", "compile_cache", "verbose"}
NEEDS = {"stride": "--score", "length_penalty": "--beam-width"}


def parse_args(argv: list[str]) -> tuple[Args, str]:
    """The flags, and the mode that they ask for; UserError for flags that exclude each other or
    have no effect."""
    args = cli.parse(Args, argv, program="sample.py", description=__doc__)
    each(positive, args, "stride show_probs beam_width")
    # Of two biases for the same token only the last would be left.
    n_biases = sum(word.partition("=")[0] in ("--logit-bias", "--logit_bias") for word in argv)
    require(
        n_biases <= len(args.settings.logit_bias),
        "--logit-bias names a token twice: expected one bias for each token",
    )
    given = {name for name in cli.flags_given(argv) if getattr(args, name, None) is not False}

    what = sorted(given & (PROMPTS | SCORES | {"check", "interactive"}))
    require(
        len(what) < 2,
        f"{' and '.join(map(terminal.flag, what))} exclude each other: choose one",
    )
    mode = "generate"
    if args.check:
        mode = "check"
    elif given & SCORES:
        mode = "score"
    elif args.interactive:
        mode = "interactive"
    elif args.beam_width > 1:
        mode = "beam"

    for name in sorted(given):
        if name in USED_BY[mode] | USED_BY_ALL or name.startswith("mesh."):
            continue
        flag = terminal.flag(name)
        if mode == "generate":
            raise UserError(f"{flag} needs {NEEDS[name]}: add that, or leave {flag} out")
        reason = terminal.flag(what[0]) if what and mode != "beam" else "--beam-width"
        raise UserError(f"{flag} has no effect with {reason}: leave it out")
    if mode == "beam":
        require(
            "temperature" not in given or args.settings.temperature == 0,
            "--temperature has no effect with --beam-width: leave it out",
        )
        require(
            args.settings.num_samples <= args.beam_width,
            f"--num-samples is {args.settings.num_samples}: it must not exceed --beam-width, "
            f"{args.beam_width}",
        )
    require(
        mode != "interactive" or args.beam_width == 1,
        "--beam-width has no effect with --interactive: leave it out",
    )
    return args, mode


def read_inputs(args: Args) -> list:
    """The prompts, or the text to score: texts or token ids."""
    if args.interactive:
        terminal.require_input("--interactive")
    if args.score is not None:
        return [terminal.typed_text("--score", args.score)]
    if args.score_file is not None:
        return [terminal.read_text("--score-file", args.score_file)]
    if args.score_ids is not None:
        return [terminal.parse_ids("--score-ids", args.score_ids)]
    if args.prompt_file is not None:
        return [terminal.read_text("--prompt-file", args.prompt_file)]
    if args.prompt_ids:
        return [terminal.parse_ids("--prompt-ids", ids) for ids in args.prompt_ids]
    return [terminal.typed_text("--prompt", text) for text in args.prompt or ("",)]


if __name__ == "__main__":
    cli.run(main)
