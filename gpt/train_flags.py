"""train.py's flags and their checks, without JAX, so that `--help` and refusals are quick.

A new run's settings come from the preset named by the first word, overridden by flags
(`parse_args`). A continued run keeps its own settings, overridden by flags (training/resume.py).
`complete_config` (training/auto_settings.py) chooses whatever is still unset or `auto`.
"""

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt import cli, terminal
from gpt.config import TrainConfig, optional
from gpt.data.options import DataOptions
from gpt.errors import (
    NonNegativeInt,
    PositiveInt,
    above_zero,
    check_fields,
    positive,
    require,
    require_file_path,
)
from gpt.presets import PRESETS

Tracker = Literal["tensorboard", "wandb", "trackio"]
# Our flag, or advice, for names that other programs use.
GUESSES = {
    "--learning-rate": "lr max-lr",
    "--min-learning-rate": "min-lr lr-min",
    "the length is set by --steps or --minutes, and the plan says how many epochs that is": (
        "epochs num-epochs num-train-epochs"
    ),
    "--steps": "max-iters max-steps num-steps iterations iters",
    "--seq-len": "block-size context-size max-seq-len seq-length",
    "--model.n-layers": "n-layer num-layers layers depth",
    "--model.n-heads": "n-head num-heads heads",
    "--model.d-model": "n-embd hidden-size width dim",
    "--grad-accum": "gradient-accumulation-steps accumulate",
    "--eval-every": "eval-interval eval-steps val-every",
    "--log-every": "log-interval logging-steps",
    "--save-every": "save-interval save-steps checkpoint-every",
    "--clip-norm": "grad-clip max-grad-norm clip",
    "--data": "input dataset file text corpus train-data",
    "--out": "output output-dir out-dir run-name name",
    "--warmup-steps": "warmup-iters warmup-ratio",
    "--dtype": "precision fp16 bf16 amp",
    "--log-to": "tensorboard wandb wandb-log report-to",
    "--schedule": "lr-schedule lr-scheduler scheduler",
    "--init-from": "pretrained from-pretrained checkpoint finetune",
    "the first word names the model: train.py gpt2": "model preset",
    "settings are flags, and the first word names a preset of them: train.py gpt2 --steps 500": (
        "config config-file"
    ),
    cli.HOW_DEVICES_ARE_CHOSEN: "device gpu cuda cpu tpu",
}
# Contradictory flags: any of the first with any of the second, and why.
CONTRADICTIONS = (
    ("minutes", "steps", "choose one"),
    ("minutes", "resume", "--minutes sets the number of steps of a new run"),
    ("extend", "steps", "--extend adds to the run's steps"),
    ("resume", "out overwrite init_from", "--resume uses the run's own folder and weights"),
    ("devices", "topology", "choose virtual devices of this CPU, or accelerators"),
    ("devices topology", "data init_from resume", "a plan reads no text and no weights"),
)


@dataclass(frozen=True)
class Processes:
    """How this process finds the others in its run: by flags, or by a launcher's variables.

    SLURM, Open MPI, Kubernetes and Cloud TPU are recognized.
    """

    coordinator: Annotated[str | None, optional("HOST:PORT")] = None
    """Address that process 0 listens on; not needed under a launcher."""
    num_processes: Annotated[int | None, optional("INT"), positive] = None
    """Number of processes training together; 1: this one alone, whatever a launcher has set."""
    process_id: Annotated[int | None, optional("INT")] = None
    """Index of this process, from 0; process 0 writes logs and checkpoint metadata."""
    heartbeat: PositiveInt = 60
    """Seconds without a heartbeat after which a process counts as dead and all others exit."""

    def __post_init__(self):
        check_fields(self)
        given = [x is not None for x in (self.coordinator, self.num_processes, self.process_id)]
        alone = self.num_processes == 1 and self.coordinator is None
        require(
            alone or all(given) or not any(given),
            "--coordinator HOST:PORT, --num-processes N and --process-id I belong together: give "
            "all three, or none under a launcher (SLURM, Open MPI, Kubernetes, Cloud TPU), or "
            "--num-processes 1 to train in this process alone",
        )
        require(
            self.process_id is None or 0 <= self.process_id < self.num_processes,
            f"--process-id is {self.process_id}: expected 0 to {(self.num_processes or 1) - 1}, "
            f"since --num-processes is {self.num_processes}",
        )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            require(
                bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
                f"--coordinator is {self.coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476",
            )


@dataclass(frozen=True)
class Args:
    """What to train, on what, and where to keep it."""

    preset: tyro.conf.Positional[Literal[tuple(PRESETS)]] = "tiny"
    """Named settings to start from; flags override them."""
    data: Annotated[tuple[Path, ...] | None, optional("PATH [PATH ...]", "Python's source")] = None
    """Text in any format, or tokens: files, folders, patterns; - is standard input. Several
    sources: A=0.7 B=0.3."""
    data_options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(
        default_factory=DataOptions
    )
    out: Annotated[Path | None, optional("DIR", "runs/PRESET")] = None
    """The run's folder. If it already holds a run, that run continues."""
    overwrite: bool = False
    """Start over: remove the run in --out."""
    resume: Annotated[Path | None, optional("DIR")] = None
    """Continue the run in this folder with its own settings and its own text."""
    extend: Annotated[NonNegativeInt, tyro.conf.arg(metavar="STEPS")] = 0
    """With --resume: train this many steps beyond the end of the run, at its schedule's last
    learning rate."""
    init_from: Annotated[Path | None, optional("DIR")] = None
    """Start from another run's weights, tokenizer and model settings."""
    minutes: Annotated[float | None, optional("M"), above_zero] = None
    """Train for about this many minutes, not counting compilation and reading the text. A few steps
    are timed first to set the number of steps, and with it the schedule."""
    dry_run: bool = False
    """Print what this would train, and stop."""
    verify_resume: bool = False
    """Check on a few steps that stopping and continuing changes no bit; exit code 1 if it does."""
    memory_gb: Annotated[float | None, optional("GB", "as detected"), above_zero] = None
    """Memory per device in 10^9 bytes, for --dry-run and for auto settings."""
    devices: Annotated[int | None, optional("INT"), positive] = None
    """With --dry-run: plan for this many virtual devices on this CPU."""
    topology: Annotated[str | None, optional("NAME")] = None
    """With --dry-run: plan for TPUs or GPUs that this machine lacks, using their own compiler:
    v5e:16x16, h100:8."""
    json: Annotated[Path | None, optional("FILE")] = None
    """With --devices or --topology: also write the plan to this file."""
    log_to: Annotated[tuple[Tracker, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Also send metrics, samples and settings to DIR/tensorboard, Weights & Biases or Trackio."""
    eval_tasks: Annotated[str | None, optional("NAME,NAME,...")] = None
    """lm-eval tasks to evaluate the model on during training (docs/evaluate.md)."""
    eval_tasks_every: Annotated[PositiveInt, tyro.conf.arg(metavar="STEPS")] = 1000
    """Steps between evaluations on these tasks; one always follows the last step."""
    eval_tasks_limit: PositiveInt = 200
    """Maximum number of questions per task, starting with the first."""
    eval_tasks_path: Annotated[Path | None, optional("DIR")] = None
    """A folder with your own tasks."""
    profile: Annotated[NonNegativeInt, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps to trace for XProf after a short warm-up, in DIR/profile; 0: none."""
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = Processes()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = PRESETS["tiny"]

    def __post_init__(self):
        check_fields(self)
        require(self.data != (), "--data needs at least one path")
        folder = self.eval_tasks_path
        require(folder is None or folder.is_dir(), f"--eval-tasks-path {folder}: no such folder")
        require(
            self.extend == 0 or self.resume is not None,
            "--extend adds steps to an existing run: add --resume DIR",
        )
        if self.plans_absent:
            require(self.dry_run, "--devices and --topology only plan: add --dry-run")
        if self.json is not None:
            require(self.plans_absent, "--json writes a plan: add --devices or --topology")
            require_file_path("--json", self.json)

    @property
    def is_trial(self) -> bool:
        """Whether the command must leave nothing on disk."""
        return self.dry_run or self.verify_resume

    @property
    def plans_absent(self) -> bool:
        """Whether the command only plans for devices that this machine lacks."""
        return self.devices is not None or self.topology is not None

    @property
    def memory_bytes(self) -> float | None:
        """Memory per device; None: as detected."""
        return None if self.memory_gb is None else self.memory_gb * 1e9


def parse_args(argv: list[str], description: str) -> Args:
    """Parse the flags; all other settings come from the preset named by the first word, or `tiny`.

    UserError for a flag that cannot be read.
    """
    for word in argv:
        # An empty path would mean the current folder; --out "$OUT" passes one if OUT is unset.
        name = word or "a flag"
        is_empty = word == "" or (word.startswith("--") and word.endswith("="))
        require(not is_empty, f"{name} has an empty value: fill it in, or leave the flag out")
    first = argv[0] if argv else ""
    preset = first if first in PRESETS else "tiny"
    require(
        first.startswith("-") or preset == first or not Path(first).is_file(),
        f"{first} is a file, but the first word must be a preset: train on it with --data {first}",
    )
    default = Args(preset=preset, config=PRESETS[preset])
    options = {"program": "train.py", "description": description, "guesses": GUESSES}
    args = cli.parse(Args, argv, default=default, **options)
    require(args.preset == preset, f"{args.preset} must come first: train.py {args.preset} ...")
    given = {name for name in cli.flags_given(argv) if getattr(args, name, True) is not False}
    for names, others, why in CONTRADICTIONS:
        for pair in itertools.product(names.split(), others.split()):
            one, other = map(terminal.flag, pair)
            message = f"{one} and {other} cannot be combined: {why}"
            require(not given.issuperset(pair), message)
    require(
        args.resume is None or first not in PRESETS,
        f"--resume takes all settings from the run: drop the preset {first}",
    )
    names_no_text = args.data is None and not args.resume and not args.plans_absent
    if names_no_text and terminal.has_piped_text():
        terminal.note("note: standard input is not read; use --data - to read text from it")
    if args.data and Path("-") in args.data:
        kept = cli.keep_stdin()
        args = replace(args, data=tuple(kept if one == Path("-") else one for one in args.data))
    return args
