"""metrics.jsonl survives crashes and resumes, and the terminal is told how the run goes."""

import contextlib
import dataclasses
import io
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gpt.config import ModelConfig, TrainConfig
from gpt.training import loss_curve, metrics, step_timer
from gpt.training.metrics import RunLog, open_metrics, read_metrics

CONFIG = TrainConfig(
    model=ModelConfig(context_length=32), steps=40, batch_size=4, log_every=10, eval_every=20
)
METRICS = {"loss": jnp.float32(3.5), "learning_rate": 1e-3, "grad_norm": 0.25, "skipped": 0}


def plain_console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def open_log(out, first=0, config=CONFIG, console=None):
    """A run's log, to be closed."""
    return contextlib.closing(RunLog(out, first, config, console or plain_console(), 1e15))


def run(out, first=0, console=None, until=40, sample_every=99):
    """A run's log from `first` on, with an evaluation every 20 steps."""
    with open_log(out, first, console=console) as log:
        for step in range(first + 1, until + 1):
            log.write_step(step, METRICS)
            if step % 20 == 0:
                log.evaluation(step, 3.25, 1.5)
            if step % sample_every == 0:
                log.sample(step, f"今天 after {first}")


def steps_in(path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_resumed_run_has_every_line_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(tmp_path, until=34, sample_every=15)  # dies after the checkpoint of step 20
    for torn in (path, tmp_path / "samples.jsonl"):
        with torn.open("a") as file:
            file.write('{"step": 34, "lo')
    run(tmp_path, first=20, sample_every=15)
    samples = [(r["step"], r["text"]) for r in read_metrics(tmp_path / "samples.jsonl")]
    assert samples == [(15, "今天 after 0"), (30, "今天 after 20")]
    assert steps_in(path) == [10, 20, 20, 30, 40, 40]
    assert not list(tmp_path.glob("*.new"))
    first, *_, last = read_metrics(path)
    names = "step loss learning_rate grad_norm skipped tokens tokens_per_second seconds since_step "
    names += "mfu step_seconds_p50 step_seconds_p90 step_seconds_p99"
    assert set(first) == set(names.split())
    assert (first["loss"], first["grad_norm"], first["tokens"]) == (3.5, 0.25, 10 * 4 * 32)
    assert last == {"step": 40, "val_loss": 3.25, "val_bits_per_byte": 1.5}


def test_what_is_not_a_number_is_null(tmp_path):
    with open_log(tmp_path) as log:
        log.write_step(10, METRICS | {"loss": jnp.nan, "grad_norm": jnp.inf})
        log.evaluation(10, math.nan, -math.inf)
    train, evaluation = read_metrics(tmp_path / "metrics.jsonl")  # at once, not only at the end
    assert (train["loss"], train["grad_norm"], train["learning_rate"]) == (None, None, 1e-3)
    assert (evaluation["val_loss"], evaluation["val_bits_per_byte"]) == (None, None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@settings(max_examples=50)
@given(cut=st.integers(0, 400), step=st.integers(0, 60), noise=st.binary(max_size=30))
def test_any_torn_file_resumes_with_the_whole_lines_up_to_the_step(
    tmp_path_factory, cut, step, noise
):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    records = [{"step": n, "loss": n / 10} for n in range(10, 60, 10)]
    data = "".join(json.dumps(r) + "\n" for r in records).encode()[:cut]
    path.write_bytes(data + noise)
    whole = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    open_metrics(path, step).close()
    kept = read_metrics(path)
    assert kept[: len(whole)] == [r for r in whole if r["step"] <= step]
    assert all(r["step"] <= step for r in kept)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_crash_while_resuming_loses_nothing(tmp_path, monkeypatch):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        open_metrics(tmp_path / "metrics.jsonl", 20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_speed_is_of_the_window_alone_and_leaves_out_pauses(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(step_timer, "time", clock)
    with open_log(tmp_path, 20) as log:
        for step in range(21, 41):
            if step == 26:
                clock.now += 30
                log.timer.skip_until_now()
            clock.now += 0.5 if step <= 30 else 0.125
            log.write_step(step, METRICS)
    slow, fast = read_metrics(tmp_path / "metrics.jsonl")
    assert (slow["tokens_per_second"], fast["tokens_per_second"]) == (256, 1024)
    assert (slow["seconds"], fast["seconds"]) == (35, 36.25)
    assert (slow["tokens"], fast["tokens"]) == (30 * 128, 40 * 128)


def test_without_a_terminal_there_are_a_few_plain_lines(tmp_path):
    console = plain_console()
    run(tmp_path, console=console)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("step 10/40  loss 3.5000  ") and lines[0].endswith(" left")
    assert lines[1] == "step 20  validation loss 3.2500, 1.5000 bits per byte"
    assert lines[2].startswith("step 40/40  loss 3.5000  ")  # 20 and 30 came too soon after
    assert lines[4].startswith("step time      p50 ") and "of the measured peak" in lines[4]
    assert len(lines) == 5 and "\x1b" not in console.file.getvalue()


def test_a_terminal_has_a_bar_and_evaluations_above_it(tmp_path):
    console = plain_console(terminal=True)
    run(tmp_path, console=console)
    said = console.file.getvalue()
    assert "40/40" in said and "\x1b" in said
    assert "tokens/s" in said and "validation loss 3.2500" in said


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_line_that_finds_no_room_ends_the_run_unless_it_is_to_go_on(keep_going, tmp_path):
    config = dataclasses.replace(CONFIG, keep_going=keep_going)
    with open_log(tmp_path, config=config) as log:
        log.file.close()
        log.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - the log closes it
        if keep_going:
            log.write_step(10, METRICS)
        else:
            with pytest.raises(OSError, match="No space left"):
                log.write_step(10, METRICS)


def test_smoothing_is_centred_and_keeps_a_line_straight():
    line = [float(n) for n in range(200)]
    assert loss_curve.smoothed(line) == pytest.approx(line)
    assert loss_curve.smoothed([]) == []
    assert loss_curve.smoothed([0.0, 1.0] * 100)[100] == pytest.approx(0.5, abs=0.1)


def test_the_curves_are_a_labelled_picture(tmp_path):
    run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 45, "loss": null}\n{"step": 50, "lo')
    figure = loss_curve.save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert "nats" in axes.get_ylabel() and "steps" in axes.get_xlabel()
    assert axes.get_title(loc="left") == "Validation loss 3.250 after 40 steps"
    batches, mean, validation = [list(line.get_xdata()) for line in axes.lines]
    assert batches == mean == [10, 20, 30, 40] and validation == [20, 40]
    loss_curve.save_loss_curve(tmp_path / "absent", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
