"""The flags of sample.py, the mode they select, and which of them cannot be combined."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt import cli, terminal
from gpt.config import DTYPES, ONE_DEVICE, Dtype, MeshConfig, Quantize, Weights, optional
from gpt.errors import PositiveInt, UserError, check_fields, positive, require
from gpt.sampling.settings import Prefix, Settings

DEFAULT = Settings()
# The flag, or advice, for the names that other programs use.
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
    """A run folder made by train.py."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; write --prompt=TEXT if it begins with a hyphen. If missing or empty,
    generation starts from end-of-text."""
    prompt_file: Annotated[Path | None, optional("FILE")] = None
    """Text file to continue, including its last newline; - reads standard input."""
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Space-separated token ids to continue: "1 2 3"."""
    prefix: Annotated[Prefix | None, optional("{bos,eos,none}", "as the tokenizer does")] = None
    """Token to put before each text: beginning-of-text, end-of-text or none. By default whatever
    the tokenizer adds, or else end-of-text before scored texts and empty prompts."""
    interactive: bool = False
    """Complete each line you type. Ctrl-C stops the completion, Ctrl-D quits."""
    settings: Annotated[tyro.conf.UseAppendAction[Settings], tyro.conf.arg(name="")] = DEFAULT
    draft: Annotated[Path | None, optional("RUN")] = None
    """Run folder of a smaller model with the same tokenizer, to propose the tokens for --speculate
    instead of looking them up in the text."""
    beam_width: PositiveInt = 1
    """If above 1, run beam search with this many beams instead of sampling; --num-samples is then
    how many of the best texts to print."""
    length_penalty: float = 1.0
    """Beam search: divide a text's log-probability by its length to this power."""
    early_stopping: Annotated[bool | Literal["never"], EARLY_STOPPING] = False
    """Beam search: once enough texts have ended, stop immediately (True), when no other is likely
    to beat them (False), or when none can (never), as in Hugging Face transformers."""
    show_probs: Annotated[int | None, optional("INT"), positive] = None
    """Show this many of the likeliest next tokens, after prefill and at each step; * marks the
    chosen one. Each new value compiles another loop."""
    score: Annotated[str | None, optional("TEXT")] = None
    """Instead of sampling, print how likely this text is, token by token."""
    score_file: Annotated[Path | None, optional("FILE")] = None
    """Instead of sampling, score a text file of any length; - reads standard input."""
    score_ids: Annotated[str | None, optional("IDS")] = None
    """Instead of sampling, score space-separated token ids: "1 2 3"."""
    window: Annotated[int | None, optional("INT", "the context"), positive] = None
    """Scoring: tokens per window; a longer text is read in several windows."""
    stride: Annotated[int | None, optional("INT", "half the window"), positive] = None
    """Scoring: tokens from one window to the next; a smaller stride gives tokens more context but
    takes longer."""
    check: bool = False
    """Instead of sampling, check the cache contract on this model; exit code 1 if it is broken."""
    json: bool = False
    """Print a JSON object for each completion as soon as it ends; times exclude compilation."""
    verbose: bool = False
    """List the compiled programs with their shapes and compile times."""
    step: Annotated[int | None, optional("INT", "the newest")] = None
    """Use the checkpoint from this step."""
    dtype: Annotated[Dtype | None, optional(DTYPES, "float32 on CPU, else bfloat16")] = None
    """Dtype for computation."""
    weights: Annotated[Weights | None, optional("{ema,raw}", "the average if one is kept")] = None
    """Use the averaged weights (ema) or the last ones (raw)."""
    quantize: Annotated[Quantize | None, optional("{int8}")] = None
    """Store matrices as int8, a quarter of the memory; --score shows the effect on the loss."""
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
# The flags that have an effect in each mode, besides the mesh flags.
USED_BY = {
    "generate": MODEL | PROMPTS | SETTINGS | DRAWING | {"prefix", "json"},
    "interactive": MODEL | SETTINGS | DRAWING | {"prefix", "interactive"},
    "beam": MODEL | PROMPTS | BEAM | {"prefix", "json"},
    "score": MODEL | SCORES | {"prefix", "window", "stride", "json"},
    "check": MODEL | {"check"},
}


def parse_args(argv: list[str], description: str) -> tuple[Args, str]:
    """The flags and the mode they select; UserError for flags that cannot be combined or have no
    effect."""
    if len(argv) > 1 and not argv[0].startswith("-") and not argv[1].startswith("-"):
        raise UserError(f"unexpected argument {argv[1]!r}: to continue a text, use --prompt TEXT")
    args = cli.parse(Args, argv, program="sample.py", description=description, guesses=GUESSES)
    check_fields(args)
    # If a token had two biases, only the last would be kept.
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
        "--draft needs --speculate, the number of tokens to propose per step: add --speculate 4",
    )
    require(
        mode != "beam" or args.settings.num_samples <= args.beam_width,
        f"--num-samples is {args.settings.num_samples}: it must not exceed --beam-width, "
        f"{args.beam_width}",
    )
    return args, mode


def read_inputs(args: Args) -> list:
    """The prompts, or the one text to score, each as text or token ids."""
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
        # Reading it unasked could swallow the rest of a shell loop's or script's own input.
        terminal.note(
            "note: standard input is not read; use --prompt-file - to read a prompt from it"
        )
    return [*args.prompt] or [""]
