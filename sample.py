"""Completions from a checkpoint, and nothing but the checkpoint.

    python sample.py runs/tiny --prompt "def " --num-samples 2

The shape of the model, its weights and its tokenizer all lie in the run's folder. Text streams to
standard output as it is drawn; everything else goes to standard error.
"""

import collections
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt import cli, terminal
from gpt.config import ONE_DEVICE, Dtype, MeshConfig, Quantize, Weights
from gpt.errors import UserError, each, positive, require
from gpt.sampling.output_order import Rows
from gpt.sampling.settings import Settings

DEFAULT = Settings()
BIAS = ("--logit-bias", "--logit_bias")
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
    """Show this many likeliest next tokens, after prefill and at each step; * marks the drawn.
    Each number of them compiles the loop anew."""
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
    """Print JSON, one object a completion, as soon as it ends; seconds leave compilation out."""
    verbose: bool = False
    """Report the programs that were compiled, with their shapes and seconds."""
    step: int | None = None
    """Take the checkpoint of this step (default: the newest)."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    weights: Weights | None = None
    """The average over the run or the last weights (default: the average where one is kept)."""
    quantize: Quantize | None = None
    """Keep matrices as int8: a quarter of their memory; --score tells what it does to the loss."""
    mesh: MeshConfig = ONE_DEVICE
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""


def refuse(command: Command) -> None:
    """UserError for what can be refused before anything is loaded."""
    c, scores = command, ("score", "score_file", "score_ids")
    doing = ("check", *scores, "prompt", "prompt_file", "prompt_ids", "interactive")
    given = [terminal.flag(name) for name in doing if getattr(c, name) not in (None, False, ())]
    require(len(given) < 2, f"{' and '.join(given)} exclude each other: choose one")
    scoring = any(getattr(c, name) is not None for name in scores)
    require(not (c.json and c.check), "--check prints no JSON: drop --json")
    require(not (c.json and c.interactive), "--interactive prints no JSON: drop --json")
    require(scoring or c.stride is None, "--stride is for scoring: add --score or drop it")
    each(positive, c, "stride show_probs beam_width")
    beam = ["beam_width"] * (c.beam_width > 1) + ["length_penalty"] * (c.length_penalty != 1)
    if scoring or c.check:
        idle = changed(c.settings) + beam + ["show_probs"] * (c.show_probs is not None)
        require(not idle, f"{given[0]} draws nothing: drop {' '.join(map(terminal.flag, idle))}")
    for text in c.settings.stop:
        terminal.require_text("--stop", text)
    if c.beam_width > 1:
        refuse_beam(c)
    require(c.beam_width > 1 or not beam, "--length-penalty is for beam search: add --beam-width")


def refuse_beam(command: Command) -> None:
    """UserError for flags that beam search has no use for."""
    c = command
    idle = [name for name in changed(c.settings) if name not in BEAM_TAKES]
    idle = [name for name in idle if name != "temperature" or c.settings.temperature]
    idle += [name for name in ("interactive", "show_probs") if getattr(c, name)]
    words = " ".join(map(terminal.flag, idle))
    require(not idle, f"--beam-width {c.beam_width} neither draws nor streams: drop {words}")
    n = c.settings.num_samples
    require(n <= c.beam_width, f"--num-samples {n}: a beam of {c.beam_width} has no more texts")


def changed(settings: Settings) -> list[str]:
    """Fields that the user has set."""
    names = [field.name for field in dataclasses.fields(settings)]
    return [name for name in names if getattr(settings, name) != getattr(DEFAULT, name)]


def read_prompts(command: Command) -> list[str] | list[list[int]]:
    """What to continue, texts or token ids; bytes that are no text become U+FFFD."""
    if command.interactive:
        terminal.require_input("--interactive")
    if command.prompt_file:
        return [terminal.read_text("--prompt-file", command.prompt_file)]
    if command.prompt_ids:
        return [terminal.parse_ids("--prompt-ids", text) for text in command.prompt_ids]
    return [terminal.as_text("--prompt", text) for text in command.prompt or ("",)]


def read_scored(command: Command) -> str | list[int] | None:
    """What to score; None for nothing."""
    if command.score_file:
        return terminal.read_text("--score-file", command.score_file)
    if command.score_ids is not None:
        return terminal.parse_ids("--score-ids", command.score_ids)
    return None if command.score is None else terminal.as_text("--score", command.score)


def main(argv: list[str]) -> int:
    """Load the model and do what the flags ask; the exit code."""
    terminal.fill_streams()
    with terminal.as_typed(Command, Settings):
        command = cli.parse(Command, argv, program="sample.py", description=__doc__)
        biases = sum(word.partition("=")[0] in BIAS for word in argv)
        good = biases <= len(command.settings.logit_bias)  # of two the last alone would be left
        require(good, "--logit-bias names a token twice: expected one bias for each token")
        refuse(command)
        return obey(command)


def obey(command: Command) -> int:
    """Load the model and do what the flags ask; the exit code."""
    terminal.accept_any_text()
    prompts, scored = read_prompts(command), read_scored(command)
    cli.prepare_jax(cache=command.compile_cache)
    from gpt.sampling.language_model import load

    c = command
    whole = functools.partial(load, c.checkpoint, dtype=c.dtype, weights=c.weights, mesh=c.mesh)
    model = whole(step=c.step, quantize=c.quantize)
    averaged = "these are the averaged weights; --weights raw for the last ones"
    for said in [averaged] * (model.weights == "ema") + model.notes:
        print(f"note: {said}", file=sys.stderr)
    code = 0
    if command.check:
        code = print_checks(model)
    elif scored is not None:
        print_score(model, command, scored, functools.partial(whole, step=model.step))
    elif command.interactive:
        converse(model, command)
    else:
        complete(model, command, prompts)
    if command.verbose:
        from gpt.compile_log import compilations

        print(terminal.describe_programs(compilations.each), file=sys.stderr)
    return code


def complete(model, command: Command, prompts: list) -> None:
    """Completions of all prompts: searched or drawn, as JSON or as text that streams."""
    draw = print_json if command.json else print_stream
    done = (print_search if command.beam_width > 1 else draw)(model, command, prompts)
    report(model, done, slides=command.beam_width == 1)


def converse(model, command: Command) -> None:
    """Complete line after line, each a prompt of its own, until there are no more."""
    from gpt.sampling import generate

    generate.require_usable(model, [command.settings], command.show_probs or 0)
    for line in terminal.read_lines(cli.cache_folder() / "prompts"):
        prompt = terminal.as_text("the line", line)
        try:
            with terminal.patient_interrupt() as pressed:
                report(model, print_stream(model, command, [prompt], pressed.is_set))
        except UserError as error:
            terminal.write("\n" * (not sys.stdout.isatty()))  # to tell lines of a pipe apart
            print(f"error: {error}", file=sys.stderr)


def print_stream(model, command: Command, prompts: list, stopped=lambda: False) -> list:
    """Completions as text while it is drawn, until they end or it is `stopped`; all of them."""
    from gpt.sampling import generate

    top, n_samples = command.show_probs or 0, command.settings.num_samples
    several = len(prompts) * n_samples > 1
    rows, shown, done = Rows(len(prompts) * n_samples), collections.Counter(), {}
    with terminal.leaving(rows):
        for piece in generate.stream(model, prompts, command.settings, top=top):
            row, one, text = piece.row, piece.completion, ""
            if row not in done:
                text += terminal.label(*divmod(row, n_samples)) * several + one.prompt * (not top)
            done[row] = one
            text += terminal.tables(one, shown[row], model.tokenizer) if top else piece.text
            shown[row] = len(one.top)
            if one.finish_reason:
                text += str(one) * bool(top) + "\n" * (1 + several)
            terminal.write(rows.push(row, text, bool(one.finish_reason)))
            if stopped():
                terminal.write(rows.leave(end_line=True))
                break
    return list(done.values())


def print_json(model, command: Command, prompts: list) -> list:
    """Completions as JSON, each as soon as it and those before it have ended; all of them."""
    from gpt.sampling import generate

    top, rows, done = command.show_probs, Rows(len(prompts) * command.settings.num_samples), {}
    with terminal.leaving(rows):
        for piece in generate.stream(model, prompts, command.settings, top=top or 0):
            done[piece.row] = one = piece.completion
            if one.finish_reason:
                extra = {"top": one.top} if top else {}
                line = terminal.to_json(terminal.completion_json(one) | extra) + "\n"
                terminal.write(rows.push(piece.row, line, ended=True))
    return list(done.values())


def print_search(model, command: Command, prompts: list) -> list:
    """What beam search finds after each prompt, the best first; all of it."""
    from gpt.sampling import beam_search

    fields = {name: getattr(command.settings, name) for name in BEAM_TAKES - {"num_samples"}}
    n_best, penalty = command.settings.num_samples, command.length_penalty
    settings = beam_search.BeamSettings(command.beam_width, n_best, penalty, **fields)
    several = len(prompts) * n_best > 1
    for i, found in enumerate(told := beam_search.search(model, prompts, settings)):
        for one in found:
            head = terminal.label(i, one.sample, f", score {one.score:.4f}") * several
            if command.json:
                line = terminal.to_json(terminal.completion_json(one) | {"score": one.score})
                terminal.write(line + "\n")
            else:
                terminal.write(f"{head}{one}\n" + "\n" * several)
        if len(found) < n_best:
            print(f"note: prompt {i + 1} has only {len(found)} texts", file=sys.stderr)
    return [one for found in told for one in found]


def report(model, done: list, slides: bool = True) -> None:
    """How the completions went, on standard error; `slides`: whether a full context could slide."""
    print(terminal.describe_end(done, model.config.context_length, slides), file=sys.stderr)


def print_score(model, command: Command, scored: str | list[int], load) -> None:
    """Log-probabilities of the tokens, their mean in the usual units, and what quantizing adds to
    it; `load()` gives this checkpoint, not one saved since, as it was trained."""
    s = model.score(scored, command.stride)
    lost = s.mean_nll - load().score(scored, command.stride).mean_nll if command.quantize else None
    if command.json:
        extra = {"quantization_nll": lost} if command.quantize else {}
        print(terminal.to_json(s.to_json() | extra))
        return
    for token, logprob in zip(s.token_ids, s.logprobs, strict=True):
        print(f"{logprob:9.4f}  {terminal.spell(model.tokenizer.decode_bytes([token]))}")
    print(s)
    if command.quantize:
        print(f"{command.quantize} changes the loss by {lost:+.4f} nats a token")


def print_checks(model) -> int:
    """Each check of the cache contract with its largest difference; 1 if one fails."""
    from gpt.sampling.cache_check import run_checks

    failed = 0
    for check in run_checks(model.config, model.params, model.mesh):
        print(check)
        failed += not check.passed
    print("the cache contract holds" if not failed else f"{failed} checks FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
