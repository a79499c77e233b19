"""The flags of train.py and their checks, without JAX: `--help` and a refusal are quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt import cli, distributed
from gpt.config import TrainConfig, optional
from gpt.errors import above_zero, not_negative, require
from gpt.presets import PRESETS


@dataclass(frozen=True)
class Args:
    """What to train, on what, and where to keep it."""

    preset: tyro.conf.Positional[Literal[tuple(PRESETS)]] = "tiny"
    """A set of settings, named by the first word. Flags override it."""
    data: Annotated[tuple[Path, ...] | None, optional("PATH [PATH ...]", "Python's source")] = None
    """Text files, folders of text, or prepared tokens."""
    out: Annotated[Path | None, optional("DIR", "runs/PRESET")] = None
    """Folder of the run. If it holds a run, that run continues."""
    overwrite: bool = False
    """Start afresh: remove the run that --out holds."""
    init_from: Annotated[Path | None, optional("DIR")] = None
    """Start from the weights, the tokenizer and the model settings of another run."""
    dry_run: bool = False
    """Print what this would train, and stop."""
    verify_resume: bool = False
    """Prove on a few steps that stopping and continuing changes no bit; exit code 1 if it does."""
    memory_gb: Annotated[float | None, optional("GB", "what is found here")] = None
    """With --dry-run: memory of one device, in 10^9 bytes."""
    devices: Annotated[int | None, optional("INT")] = None
    """With --dry-run: plan for this many devices that are not here, virtual ones of this CPU."""
    topology: Annotated[str | None, optional("NAME")] = None
    """With --dry-run: plan for TPUs that are not here, by their own compiler: v5e:16x16."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in DIR/tensorboard (needs tensorboardX)."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps to trace for XProf after a short warm-up, in DIR/profile; 0: none."""
    compile_cache: bool = True
    """Keep compiled programs in your cache folder for the next run."""
    processes: Annotated[distributed.Processes, tyro.conf.arg(name="")] = (
        distributed.FROM_ENVIRONMENT
    )
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = PRESETS["tiny"]

    def __post_init__(self):
        require(self.data != (), "--data names nothing: give at least one path")
        not_negative("profile", self.profile)
        if self.memory_gb is not None:
            above_zero("memory_gb", self.memory_gb)

    @property
    def is_trial(self) -> bool:
        """Whether it must leave nothing behind."""
        return self.dry_run or self.verify_resume


def parse_args(argv: list[str], description: str) -> Args:
    """The flags, with the rest of the settings from the preset that the first word names, else from
    `tiny`; UserError for a flag that cannot be read."""
    cli.require_no_empty_values(argv)
    preset = argv[0] if argv and argv[0] in PRESETS else "tiny"
    default = Args(preset=preset, train=PRESETS[preset])
    args = cli.parse(Args, argv, program="train.py", description=description, default=default)
    require(args.preset == preset, f"{args.preset} must come first: train.py {args.preset} ...")
    return args
