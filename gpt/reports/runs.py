"""A run's folder as the report reads it: its log, its samples, its settings. Knows no HTML.

A run may still be going: a torn last line is left out, and what it has not written yet is missing.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt import checkpoint
from gpt.config import TrainConfig, from_json, to_json
from gpt.errors import UserError, require
from gpt.presets import PRESETS
from gpt.training.metrics import read_metrics
from gpt.training.resume import flat

LARGEST = 1e300
MOST_SAMPLES = 12
MOST_CHARACTERS = 2000  # of a sample
IMPORTED = "it was imported and has not been trained here: its settings are the model's alone"
DECIDED = {"model.vocab_size", "model.compute_dtype", "model.cache_dtype"}  # by the run itself


@dataclass(frozen=True)
class Run:
    """`records`: the lines of metrics.jsonl. `config`, `about`: of the newest whole checkpoint,
    None where there is none yet. `note`: why there is not all that one would expect."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    samples: list[tuple[int, str]]
    config: TrainConfig | None
    about: dict[str, Any]
    note: str
    written: datetime | None

    @property
    def imported(self) -> bool:
        """Whether its weights came from elsewhere and it was never trained here."""
        return isinstance(self.about.get("source"), dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings by dotted name, as far as they are known: how a model was trained that was
        imported is not, and what its checkpoint says of it are defaults."""
        known = flat(to_json(self.config)) if self.config else {}
        return {k: v for k, v in known.items() if k.startswith("model.") or not self.imported}

    @property
    def training(self) -> list[dict[str, Any]]:
        """The lines about steps, as distinct from those about evaluations."""
        return [record for record in self.records if "seconds" in record]

    @property
    def last_step(self) -> int:
        """The last step that the log knows of."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def fingerprint(self) -> str:
        """That of the text it was trained on."""
        text = self.about.get("data")
        return str(text.get("fingerprint")) if isinstance(text, dict) else "unknown"

    @property
    def paths(self) -> list[str] | None:
        """Where its text was, as typed; none for the default; None if the run does not say."""
        text = self.about.get("data")
        paths = text.get("paths") if isinstance(text, dict) else None
        good = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        return paths if good else None

    @property
    def seams(self) -> list[tuple[dict, dict]]:
        """The last line of each process but the last, and the first line of the next."""
        return [(a, b) for a, b in pairwise(self.training) if is_seam(a, b)]

    @property
    def restarts(self) -> list[int]:
        """The step from which each later process went on; of old logs, the first that it logged."""
        began = [(after.get("since_step"), after["step"]) for _, after in self.seams]
        return [told if is_number(told) else first for told, first in began]

    @property
    def skipped(self) -> list[int]:
        """The steps by whose line more updates were skipped than by the line before."""
        counts = [(0, 0), *zip(*self.series("skipped"), strict=True)]
        return [step for (_, before), (step, now) in pairwise(counts) if now > before]

    @property
    def seconds(self) -> float:
        """Seconds of training, those of each process added."""
        ends = [before for before, _ in self.seams] + self.training[-1:]
        return sum(line["seconds"] for line in ends)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was a number."""
        found = [(r["step"], r[name]) for r in self.records if is_number(r.get(name))]
        return [step for step, _ in found], [value for _, value in found]


def is_seam(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two lines come from two processes: the later one began at another step, or its
    seconds fall back."""
    began = [line.get("since_step") for line in (before, after)]
    return began[0] != began[1] or after["seconds"] < before["seconds"]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that can be drawn; true and false are none."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def read_run(folder: Path, name: str) -> Run:
    """What there is of a run; UserError if the folder holds none."""
    require(folder.is_dir(), f"no folder {folder}: expected a run's folder made by train.py")
    path = folder / "metrics.jsonl"
    numbered = [(r, r["step"], r.get("seconds", 0)) for r in read_metrics(path)]
    records = [r for r, *numbers in numbered if all(map(is_number, numbers))]
    require(
        bool(records or checkpoint.steps(folder)),
        f"{folder} holds neither metrics.jsonl nor a checkpoint: expected a run's folder",
    )
    written = datetime.fromtimestamp(path.stat().st_mtime) if path.exists() else None
    samples = read_samples(folder / "samples.jsonl")
    return Run(name, folder, records, samples, *read_settings(folder), written)


def read_settings(folder: Path) -> tuple[TrainConfig | None, dict[str, Any], str]:
    """The settings in the newest whole checkpoint and all that it says; or why there are none."""
    if not checkpoint.steps(folder):
        return None, {}, "it has no checkpoint yet, and its settings are kept there"
    try:
        _, about, _ = checkpoint.latest_good(
            folder, lambda step: checkpoint.read_metadata(folder, step)
        )
        note = IMPORTED if isinstance(about.get("source"), dict) else ""
        return from_json(TrainConfig, about["train"]), about, note
    except UserError as error:
        return None, {}, f"its settings cannot be read: {error}"


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Some of what the model wrote over the run, with the steps: evenly, the last among them."""
    found = {}
    for record in read_metrics(path):
        if isinstance(record.get("text"), str):
            found[record["step"]] = record["text"][:MOST_CHARACTERS]
    steps = sorted(found)
    n = min(len(steps), MOST_SAMPLES)
    chosen = {steps[round(i * (len(steps) - 1) / max(n - 1, 1))] for i in range(n)}
    return [(step, found[step]) for step in sorted(chosen)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Each run under a name of its own: its folder's, or the path where two are called the same."""
    short = [folder.resolve().name for folder in folders]
    names = [
        name if short.count(name) == 1 else str(folder)
        for name, folder in zip(short, folders, strict=True)
    ]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, a value for each run (None: unknown)."""
    known = [run.settings for run in runs]
    found = {}
    for name in flat(to_json(TrainConfig())):
        values = {repr(settings[name]) for settings in known if name in settings}
        if len(values) > 1:
            found[name] = [settings.get(name) for settings in known]
    return found


def command_of(run: Run, python: str = "python") -> str:
    """The command that trains this again beside it: the preset that needs the fewest flags, and
    these; text and weights by the paths that were typed. `python`: as one types it."""
    start = run.about.get("init_from")
    wanted = flags_apart(run.config, all_of_model=isinstance(start, str))
    name = min(wanted, key=lambda preset: len(wanted[preset]))
    words = ["--data", *run.paths] if run.paths else []
    words += ["--init-from", start] if isinstance(start, str) else []
    nameless = run.folder.name in ("", "..")  # as "." is, to which nothing can be appended
    folder = run.folder.resolve() if nameless else run.folder
    out = ["--out", f"{folder}-again"]
    return shlex.join([python, "train.py", name, *wanted[name], *words, *out])


def flags_apart(config: TrainConfig, all_of_model: bool = False) -> dict[str, list[str]]:
    """For each preset the flags that lead from it to `config`; with `all_of_model` every setting of
    the model is one: --init-from takes what no flag says from another run, not from the preset."""
    settings = flat(to_json(config))
    ignored = DECIDED | ({"model.context_length"} if config.seq_len else set())
    return {
        name: [
            word
            for key, before in flat(to_json(preset)).items()
            if key not in ignored
            and (settings[key] != before or (all_of_model and key.startswith("model.")))
            for word in flag(key, settings[key])
        ]
        for name, preset in PRESETS.items()
    }


def flag(name: str, value: Any) -> list[str]:
    """A setting as people type it: `--model.d-model 64`, `--model.no-bias`."""
    *place, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*place, last if value else f"no-{last}"])]
    return ["--" + ".".join([*place, last]), str(value)]
