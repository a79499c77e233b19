"""The flags of sample.py, the mode that they ask for, and which of them cannot be combined."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt import cli, terminal
from gpt.config import DTYPES, ONE_DEVICE, Dtype, MeshConfig, Quantize, Weights, optional
from gpt.errors import PositiveInt, UserError, check_fields, positive, require
from gpt.sampling.settings import Prefix, Settings

DEFAULT = Settings()
# The flag, or what to do, for names that other programs have.
GUESSES = {
    "--max-new-tokens": "max-tokens max-length length num-tokens",
    "--num-samples": "n num-return-sequences samples",
    "--beam-width": "beam beams num-beams",
    "--prompt": "start text input",
    "--prompt-file": "file input-file",
    "--temperature 0": "greedy no-sample",
    "--show-probs": "logprobs",
    "the run's folder is the first word: sample.py runs/tiny": "model checkpoint ckpt run out",
    cli.HOW_DEVICES_ARE_CHOSEN: "device gpu cuda cpu tpu",
}
EARLY_STOPPING = tyro.conf.arg(metavar="{True,False,never}")


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
    prefix: Annotated[Prefix | None, optional("{bos,eos,none}", "as the tokenizer does")] = None
    """What precedes each text: beginning-of-text, end-of-text or nothing. By default what the
    model's tokenizer puts there, or else end-of-text before a scored text and an empty prompt."""
    interactive: bool = False
    """Complete each line that you type. Ctrl-C ends the completion, Ctrl-D the program."""
    settings: Annotated[tyro.conf.UseAppendAction[Settings], tyro.conf.arg(name="")] = DEFAULT
    draft: Annotated[Path | None, optional("RUN")] = None
    """Folder of a smaller model with the same tokenizer, which proposes the tokens of --speculate
    in place of looking them up."""
    beam_width: PositiveInt = 1
    """Above 1: search for the likeliest texts, following this many at once, instead of sampling;
    --num-samples is then how many of the best to print."""
    length_penalty: float = 1.0
    """Beam search: exponent of the length that divides a text's log-probability."""
    early_stopping: Annotated[bool | Literal["never"], EARLY_STOPPING] = False
    """Beam search: stop as soon as enough texts have ended (True), when no other is likely to beat
    them (False), or when none can (never), as in Hugging Face transformers."""
    show_probs: Annotated[int | None, optional("INT"), positive] = None
    """Show this many likeliest next tokens, after prefill and at each step; * marks the chosen one.
    Each new number compiles another loop."""
    score: Annotated[str | None, optional("TEXT")] = None
    """Do not sample: print how likely this text is, token by token."""
    score_file: Annotated[Path | None, optional("FILE")] = None
    """Do not sample: score a file of text of any length; - is standard input."""
    score_ids: Annotated[str | None, optional("IDS")] = None
    """Do not sample: score token ids, separated by spaces: "1 2 3"."""
    window: Annotated[int | None, optional("INT", "the context"), positive] = None
    """Scoring: tokens that are read at once; a longer text is read in several windows."""
    stride: Annotated[int | None, optional("INT", "half the window"), positive] = None
    """Scoring: tokens from one window to the next; a smaller stride gives each token more context
    and takes longer."""
    check: bool = False
    """Do not sample: check the cache contract on this model; exit code 1 if it does not hold."""
    json: bool = False
    """Print JSON, one object per completion, as soon as it ends; seconds leave compilation out."""
    verbose: bool = False
    """Report the programs that were compiled, with their shapes and seconds."""
    step: Annotated[int | None, optional("INT", "the newest")] = None
    """Use the checkpoint of this step."""
    dtype: Annotated[Dtype | None, optional(DTYPES, "float32 on CPU, else bfloat16")] = None
    """Data type to compute in."""
    weights: Annotated[Weights | None, optional("{ema,raw}", "the average if one is kept")] = None
    """The average over the run, or the last weights."""
    quantize: Annotated[Quantize | None, optional("{int8}")] = None
    """Keep matrices as int8: a quarter of the memory; --score shows what this does to the loss."""
    mesh: MeshConfig = ONE_DEVICE
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""


PROMPTS = {"prompt", "prompt_file", "prompt_ids"}
SCORES = {"score", "score_file", "score_ids"}
SETTINGS = {field.name for field in fields(Settings)}
BEAM = {"beam_width", "length_penalty", "early_stopping", "max_new_tokens", "num_samples"}
BEAM |= {"logit_bias", "repetition_penalty", "ignore_eos", "temperature"}
MODEL = {"step", "dtype", "weights", "quantize", "compile_cache", "verbose"}
DRAWING = {"beam_width", "show_probs", "draft"}
# The flags that have an effect in each mode, beside those of the mesh.
USED_BY = {
    "generate": MODEL | PROMPTS | SETTINGS | DRAWING | {"prefix", "json"},
    "interactive": MODEL | SETTINGS | DRAWING | {"prefix", "interactive"},
    "beam": MODEL | PROMPTS | BEAM | {"prefix", "json"},
    "score": MODEL | SCORES | {"prefix", "window", "stride", "json"},
    "check": MODEL | {"check"},
}


def parse_args(argv: list[str], description: str) -> tuple[Args, str]:
    """The flags, and the mode that they ask for; UserError for flags that cannot be combined or
    have no effect."""
    if len(argv) > 1 and not argv[0].startswith("-") and not argv[1].startswith("-"):
        raise UserError(f"unexpected argument {argv[1]!r}: to continue a text, use --prompt TEXT")
    args = cli.parse(Args, argv, program="sample.py", description=description, guesses=GUESSES)
    check_fields(args)
    # Of two biases for the same token only the last would be left.
    n_biases = sum(word.partition("=")[0] in ("--logit-bias", "--logit_bias") for word in argv)
    require(
        n_biases <= len(args.settings.logit_bias),
        "--logit-bias names a token twice: expected one bias for each token",
    )

    given = {name for name in cli.flags_given(argv) if getattr(args, name, None) is not False}
    sources = sorted(given & (PROMPTS | SCORES | {"check", "interactive"}))
    require(
        len(sources) < 2,
        f"{' and '.join(map(terminal.flag, sources))} cannot be combined: choose one",
    )
    mode = "generate"
    if args.check:
        mode = "check"
    elif given & SCORES:
        mode = "score"
    elif args.beam_width > 1:
        mode = "beam"
    elif args.interactive:
        mode = "interactive"

    useless = {name for name in given - USED_BY[mode] if not name.startswith("mesh.")}
    if mode == "beam" and args.settings.temperature > 0:
        useless |= given & {"temperature"}
    for name in sorted(useless):
        flag = terminal.flag(name)
        if mode == "generate":
            needed = "--score" if name in ("window", "stride") else "--beam-width"
            raise UserError(f"{flag} needs {needed}: add that, or leave {flag} out")
        reason = "--beam-width" if mode == "beam" else terminal.flag(sources[0])
        raise UserError(f"{flag} has no effect with {reason}: leave it out")
    require(
        args.draft is None or args.settings.speculate > 0,
        "--draft needs --speculate, the tokens to propose in a step: add --speculate 4",
    )
    require(
        mode != "beam" or args.settings.num_samples <= args.beam_width,
        f"--num-samples is {args.settings.num_samples}: it must not exceed --beam-width, "
        f"{args.beam_width}",
    )
    return args, mode


def read_inputs(args: Args) -> list:
    """The prompts, or the text to score: texts or token ids."""
    if args.score is not None:
        return [args.score]
    if args.score_file is not None:
        return [terminal.read_text("--score-file", args.score_file)]
    if args.score_ids is not None:
        return [terminal.parse_ids("--score-ids", args.score_ids)]
    if args.prompt_file is not None:
        return [terminal.read_text("--prompt-file", args.prompt_file)]
    if args.prompt_ids:
        return [terminal.parse_ids("--prompt-ids", ids) for ids in args.prompt_ids]
    if not args.prompt and not args.check and not args.interactive and terminal.has_piped_text():
        # Not read unasked: a loop or a script that the shell reads from there would lose its rest.
        terminal.note(
            "note: standard input is not read; use --prompt-file - to read a prompt from it"
        )
    return [*args.prompt] or [""]
