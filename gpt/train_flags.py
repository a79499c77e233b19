"""The flags of train.py and their checks, without JAX: `--help` and a refusal are quick.

The settings of a run are those of the preset that the first word names, with the flags over them
(`parse_args`). A run that continues takes its own, with the flags over them (training/resume.py).
What is still open or `auto` is chosen by `complete_config` (training/auto_settings.py).
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
# The flag, or what to do, for names that other programs have.
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
# Flags that contradict each other: any of the first with any of the second, and why.
CONTRADICTIONS = (
    ("minutes", "steps", "choose one"),
    ("minutes", "resume", "--minutes sets the number of steps of a new run"),
    ("extend", "steps", "--extend adds to the steps that the run has"),
    ("resume", "out overwrite init_from", "--resume takes the folder and the weights of the run"),
    ("devices", "topology", "choose virtual devices of this CPU, or accelerators"),
    ("devices topology", "data init_from resume", "a plan reads no text and no weights"),
)


@dataclass(frozen=True)
class Processes:
    """How this process finds the others of its run: by flags, or by what a launcher has set.

    SLURM, Open MPI, Kubernetes and Cloud TPU are recognized.
    """

    coordinator: Annotated[str | None, optional("HOST:PORT")] = None
    """Address at which process 0 listens; not needed under a launcher."""
    num_processes: Annotated[int | None, optional("INT"), positive] = None
    """Number of processes that train together; 1: this one alone, whatever a launcher has set."""
    process_id: Annotated[int | None, optional("INT")] = None
    """Number of this process, from 0; process 0 writes logs and checkpoint metadata."""
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
    """A set of settings, named by the first word. Flags override it."""
    data: Annotated[tuple[Path, ...] | None, optional("PATH [PATH ...]", "Python's source")] = None
    """Text in any format, or tokens: files, folders, patterns; - is standard input. Several
    sources: A=0.7 B=0.3."""
    data_options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(
        default_factory=DataOptions
    )
    out: Annotated[Path | None, optional("DIR", "runs/PRESET")] = None
    """Folder of the run. If it holds a run, that run continues."""
    overwrite: bool = False
    """Start afresh: remove the run that --out holds."""
    resume: Annotated[Path | None, optional("DIR")] = None
    """Continue the run in this folder with its own settings and its own text."""
    extend: Annotated[NonNegativeInt, tyro.conf.arg(metavar="STEPS")] = 0
    """With --resume: train this many steps beyond the end of the run, at the last learning rate of
    its schedule."""
    init_from: Annotated[Path | None, optional("DIR")] = None
    """Start from the weights, the tokenizer and the model settings of another run."""
    minutes: Annotated[float | None, optional("M"), above_zero] = None
    """Train for about this many minutes. A few steps are measured first to set the number of steps,
    and with it the schedule. Reading the text and compiling are not counted."""
    dry_run: bool = False
    """Print what this would train, and stop."""
    verify_resume: bool = False
    """Prove on a few steps that stopping and continuing changes no bit; exit code 1 if it does."""
    memory_gb: Annotated[float | None, optional("GB", "what is found here"), above_zero] = None
    """Memory of one device in 10^9 bytes, for --dry-run and for settings that are auto."""
    devices: Annotated[int | None, optional("INT"), positive] = None
    """With --dry-run: plan for this many virtual devices on this CPU."""
    topology: Annotated[str | None, optional("NAME")] = None
    """With --dry-run: plan for TPUs or GPUs that this machine does not have, with their own
    compiler: v5e:16x16, h100:8."""
    json: Annotated[Path | None, optional("FILE")] = None
    """With --devices or --topology: also write the plan to this file."""
    log_to: Annotated[tuple[Tracker, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Also send metrics, samples and settings to DIR/tensorboard, Weights & Biases or Trackio."""
    eval_tasks: Annotated[str | None, optional("NAME,NAME,...")] = None
    """Tasks of lm-eval to evaluate the model on while it trains (docs/evaluate.md)."""
    eval_tasks_every: Annotated[PositiveInt, tyro.conf.arg(metavar="STEPS")] = 1000
    """Steps between evaluations on these tasks; another one follows the last step."""
    eval_tasks_limit: PositiveInt = 200
    """Ask only this many questions of each task, the first ones."""
    eval_tasks_path: Annotated[Path | None, optional("DIR")] = None
    """A folder with tasks of your own."""
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
        """Whether the command only plans for devices that this machine does not have."""
        return self.devices is not None or self.topology is not None

    @property
    def memory_bytes(self) -> float | None:
        """Memory of one device; None: what is found here."""
        return None if self.memory_gb is None else self.memory_gb * 1e9


def parse_args(argv: list[str], description: str) -> Args:
    """The flags, with the rest of the settings from the preset that the first word names, else from
    `tiny`; UserError for a flag that cannot be read."""
    for word in argv:
        # An empty path would be the current folder; --out "$OUT" gives one if OUT is not set.
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
