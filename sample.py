"""Generate text from a trained model: python sample.py CHECKPOINT [flags].

    python sample.py runs/tiny --prompt "def " --num-samples 2

The run folder holds everything needed: config, weights and tokenizer. Text streams to standard
output as it is generated; everything else goes to standard error.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace

from gpt import cli, sample_flags, terminal
from gpt.errors import UserError
from gpt.sample_flags import Args
from gpt.wording import counted


def main(argv: list[str]) -> int:
    """Load the model, run the mode that the flags select, and return the exit code."""
    args, mode = sample_flags.parse_args(argv, __doc__)
    inputs = sample_flags.read_inputs(args)
    cli.prepare_jax(cache=args.compile_cache)
    import gpt
    from gpt.sampling.generate import stream

    model = gpt.load(
        args.checkpoint, args.step, args.dtype, args.weights, args.mesh, args.quantize, args.prefix
    )
    if args.draft is not None:
        draft = gpt.load(args.draft, dtype=args.dtype, mesh=args.mesh, quantize=args.quantize)
        model = model.with_draft(draft)
    for text in model.notes:
        terminal.note(f"note: {text}")

    code = 0
    if mode == "generate":
        pieces = stream(model, inputs, args.settings, top=args.show_probs or 0)
        show(pieces, model, args, len(inputs))
    elif mode == "interactive":
        converse(model, args)
    elif mode == "beam":
        search(model, args, inputs)
    elif mode == "score":
        score(model, args, inputs[0])
    else:
        code = check(model)

    if args.verbose:
        from gpt.compile_log import compilations

        terminal.note(terminal.describe_programs(compilations.each))
    return code


def show(pieces: Iterable, model, args: Args, n_prompts: int, interrupted=lambda: False) -> None:
    """Print completions as they grow, or each as JSON once it has ended. Stop when `interrupted()`
    returns True."""
    n_samples = args.settings.num_samples
    as_text = terminal.CompletionText(
        n_prompts, n_samples, args.show_probs or 0, model.tokenizer, args.json
    )
    output = terminal.InOrder(n_prompts * n_samples)
    completions = {}
    try:
        for piece in pieces:
            completions[piece.row] = piece.completion
            output.add(piece.row, as_text(piece), ended=piece.completion.finish_reason is not None)
            if interrupted():
                output.flush(end_line=True)
                break
    except (KeyboardInterrupt, UserError):
        output.flush(end_line=sys.stdout.isatty())
        raise
    speculates = args.settings.speculate > 0
    terminal.note(
        terminal.describe_end(list(completions.values()), model.config.context_length, speculates)
    )


def converse(model, args: Args) -> None:
    """Complete each line typed, until the input ends."""
    from gpt.sampling.generate import stream

    top = args.show_probs or 0
    stream(model, [[0]], args.settings, top=top)  # reject bad settings before a line is typed
    for i, line in enumerate(terminal.read_lines()):
        # Each line gets its own seed, so that repeating a line gives another sample.
        settings = replace(args.settings, seed=(args.settings.seed + i) % 2**31)
        try:
            with terminal.deferred_interrupt() as pressed:
                pieces = stream(model, [line], settings, top=top)
                show(pieces, model, args, n_prompts=1, interrupted=pressed.is_set)
        except UserError as error:
            if not sys.stdout.isatty():
                terminal.write("\n")  # one output line per line of a pipe
            terminal.note(f"error: {error}")


def search(model, args: Args, prompts: list) -> None:
    """Print the likeliest completions that beam search finds for each prompt, best first."""
    from gpt.sampling import beam_search
    from gpt.sampling.completion import Piece

    settings = beam_search.BeamSettings(
        width=args.beam_width,
        n_best=args.settings.num_samples,
        length_penalty=args.length_penalty,
        early_stopping=args.early_stopping,
        max_new_tokens=args.settings.max_new_tokens,
        logit_bias=args.settings.logit_bias,
        repetition_penalty=args.settings.repetition_penalty,
        ignore_eos=args.settings.ignore_eos,
    )
    as_text = terminal.CompletionText(len(prompts), settings.n_best, 0, model.tokenizer, args.json)
    every = []
    for i, completions in enumerate(beam_search.search(model, prompts, settings)):
        for one in completions:
            row = i * settings.n_best + one.sample
            terminal.write(as_text(Piece(row, one.text, one)))
        every += completions
    terminal.note(terminal.describe_end(every, model.config.context_length))


def score(model, args: Args, text: str | list[int]) -> None:
    """Print each token's log-probability, the mean loss in the usual units, and how much
    quantization adds to it."""
    import gpt

    result = model.score(text, args.stride, args.window)
    added = None
    if args.quantize:
        # The same step, even if a newer checkpoint has been saved since.
        exact = gpt.load(
            args.checkpoint, model.step, args.dtype, args.weights, args.mesh, prefix=args.prefix
        )
        added = result.mean_nll - exact.score(text, args.stride, args.window).mean_nll
    if args.json:
        values = result.to_json()
        if added is not None:
            values["quantization_nll"] = added
        print(json.dumps(values))
        return
    for line in terminal.scored_tokens(result, model.tokenizer):
        print(line)
    print(result)
    if added is not None:
        print(f"{args.quantize} changes the loss by {added:+.4f} nats per token")


def check(model) -> int:
    """Print the largest difference in each check of the cache contract; return 1 if one fails."""
    from gpt.sampling.cache_check import run_checks

    n_failed = 0
    for result in run_checks(model):
        print(result)
        n_failed += not result.passed
    print(f"{counted(n_failed, 'check')} FAILED" if n_failed else "the cache contract holds")
    return int(n_failed > 0)


if __name__ == "__main__":
    cli.run(main)
