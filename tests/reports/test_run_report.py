"""The report: what it shows of runs, whole, torn and long, and the command that repeats them."""

import dataclasses
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import call, read_lines
from reports.made_up import write_run

from gpt import cli, presets
from gpt.config import TrainConfig, to_json
from gpt.reports import run_report
from gpt.reports.run_report import command_to_repeat, draw_chart, flatten, read_runs

CHARTS = {chart.name: chart for chart in run_report.CHARTS}


def report(*argv):
    """The output of python -m gpt.report ARGV, which must succeed."""
    done = call("gpt/report", *argv)
    assert done.code == 0, done.err
    return done.out


def build(*folders):
    return run_report.build_report(read_runs(folders))


def changed(run, **metadata):
    return dataclasses.replace(run, metadata=run.metadata | metadata)


def settings_left_out(run, preset):
    """The settings that the command's flags do not bring from `preset` to the run's."""
    words = shlex.split(command_to_repeat(run))
    flags = words[3 : words.index("--data")]
    parsed = cli.parse(TrainConfig, flags, program="", description="", default=preset)
    pairs = flatten(to_json(parsed)).items() ^ flatten(to_json(run.config)).items()
    return {name for name, _ in pairs}


def test_a_trained_run_is_shown_with_its_settings(trained):
    text = build(trained[1])
    assert "12, complete" in text and "<td>model.d_model</td><td>16</td>" in text
    assert re.findall("<figcaption>(step [0-9]+)<", text) == ["step 7", "step 12"]
    titles = re.findall('<svg role="img" aria-label="(.*?)"', text)
    assert {"Loss", "Validation, bits per byte", "Learning rate", "Gradient norm"} <= set(titles)
    ids = re.findall(r'\bid="(.*?)"', text)
    assert len(ids) == len(set(ids))
    assert "src=" not in text and "@import" not in text and "<script" not in text


def test_the_command_on_the_page_repeats_the_run(trained):
    _, folder = trained
    (command,) = re.findall(r"<pre[^>]*>(python train.py.*?)</pre>", build(folder))
    done = call("train", *shlex.split(html.unescape(command))[2:])
    assert done.code == 0, done.err
    assert read_lines(folder) == read_lines(folder.with_name(f"{folder.name}-again"))


@pytest.mark.parametrize("folder", [".", "..", "../run"])
def test_a_run_seen_from_within_is_repeated_beside_it(folder, finished, monkeypatch):
    (finished / "inner").mkdir()
    monkeypatch.chdir(finished / "inner" if folder == ".." else finished)
    *_, flag, out = shlex.split(command_to_repeat(read_runs([Path(folder)])[0]))
    assert flag == "--out" and Path(out).resolve() == finished.resolve().with_name("run-again")


def test_the_command_names_text_and_weights_as_far_as_they_are_known(trained):
    (run,) = read_runs([trained[1]])
    preset = presets.PRESETS[command_to_repeat(run).split()[2]]
    assert settings_left_out(run, preset) <= run_report.DERIVED
    for data, said in (
        ({"fingerprint": "0"}, "Add <code>--data</code>"),
        ({"fingerprint": "0", "paths": []}, "standard library"),
        (None, "Add <code>--data</code>"),
    ):
        section = run_report.commands_section([changed(run, data=data)])
        assert said in section and "--data /" not in section

    # --init-from takes the model from the other run, so that all its settings must be flags.
    run = changed(run, init_from="runs/gpt2 a")
    assert "--init-from 'runs/gpt2 a' --out" in command_to_repeat(run)
    other_model = dataclasses.replace(preset, model=presets.PRESETS["gpt2"].model)
    assert settings_left_out(run, other_model) <= run_report.DERIVED


def test_runs_are_compared(trained, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(trained[1], tmp_path / name)
    first, second = read_runs([tmp_path / "one", tmp_path / "two"])
    text = run_report.build_report([first, second])
    assert "No setting differs" in text and ">two training</text>" in text
    slower = dataclasses.replace(second.config, learning_rate=0.5)
    second = dataclasses.replace(second, config=slower)
    rate = first.config.learning_rate
    assert run_report.differences([first, second]) == {"learning_rate": [rate, 0.5]}


def test_an_imported_model_has_no_training_settings(trained):
    (run,) = read_runs([trained[1]])
    imported = dataclasses.replace(changed(run, source={"format": "llama"}), records=[])
    text = run_report.build_report([imported])
    assert "imported, not trained here" in text and "<td>model.d_model</td>" in text
    assert "learning_rate" not in text and "last update" not in text
    wider = dataclasses.replace(run.config.model, d_model=24)
    config = dataclasses.replace(run.config, model=wider, learning_rate=0.5)
    imported = dataclasses.replace(imported, config=config)
    assert run_report.differences([imported, run]) == {"model.d_model": [24, 16]}


def test_a_run_that_is_still_training(tmp_path):
    """No checkpoint, torn last lines, a restart and skipped updates."""
    folder = write_run(tmp_path / "going", restart=120)
    (run,) = read_runs([folder])
    assert run.restarts == [120]
    assert run.skipped_steps == [100] and run.last_step == 200
    assert run.seconds == pytest.approx(0.2 * 119 + 0.2 * 81)
    text = build(folder)
    assert "no checkpoint yet" in text and "last update" in text
    assert 'id="loss-restart-120"' in text and 'id="loss-skipped-100"' in text
    assert text.count("<figcaption>step ") == run_report.MAX_SAMPLES and "step 200<" in text


def test_a_process_killed_after_one_line_is_a_restart(tmp_path):
    """Its seconds do not start again, but it continued from another step."""
    lines = [
        {"step": 1, "loss": 5.0, "seconds": 1.0, "since_step": 0},
        {"step": 2, "loss": 4.0, "seconds": 1.1, "since_step": 1},
        {"step": 3, "loss": 3.0, "seconds": 2.0, "since_step": 1},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    (run,) = read_runs([tmp_path])
    assert run.restarts == [1] and run.seconds == 3.0


def test_values_that_are_not_numbers_are_skipped(tmp_path):
    folder, large = write_run(tmp_path / "a"), "1" + 400 * "0"
    with (folder / "metrics.jsonl").open("a") as file:
        for value in ("NaN", "-Infinity", large, '"x"', "[]", "true"):
            file.write(f'\n{{"step": 7, "loss": {value}, "skipped": {value}, "seconds": 1}}')
            file.write(f'\n{{"step": 7, "loss": 1, "seconds": {value}}}')
            file.write(f'\n{{"step": 7, "loss": 1, "seconds": 2, "since_step": {value}}}')
        file.write(f'\n{{"step": {large}, "loss": 1, "seconds": 1}}')
    (run,) = read_runs([folder])
    assert run.last_step == 200 and max(run.series("loss")[1]) < 10
    assert ">loss" not in run_report.build_report([run])


def test_names_and_samples_cannot_become_part_of_the_page(tmp_path):
    """Nor formulas or hidden labels of the charts."""
    evil = "<script>alert(1)</script>&\u202e\x1b[2J 今天 \ud800"
    folder = write_run(tmp_path / "_<img onerror=x>$^$1", text=evil)
    out = report(folder, "--out", tmp_path / "a.html", "--png", tmp_path / "png")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;\\u202e\\x1b[2J 今天 ?" in text
    assert "<img" not in text and "<script" not in text
    assert "_&lt;img onerror=x&gt;$^$1 training</text>" in text
    pictures = list((tmp_path / "png").iterdir())
    assert {path.stem for path in pictures} == set(CHARTS) and out.count(".png\n") == len(CHARTS)
    assert all(path.read_bytes()[1:4] == b"PNG" for path in pictures)


def test_a_long_run_stays_small_and_keeps_its_peaks(tmp_path):
    write_run(tmp_path / "long", n_steps=30_000)
    (run,) = read_runs([tmp_path / "long"])
    figure = draw_chart(CHARTS["grad_norm"], [run])
    svg = run_report.to_svg(figure, CHARTS["grad_norm"])
    assert len(svg) < 3e5
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    (x, y) = axes.transData.transform((15_000, 400))  # of the peak, in pixels; in SVG y goes down
    scale = 72 / figure.dpi
    peak_y = figure.get_figheight() * 72 - y * scale
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", svg), float)
    assert np.min(np.hypot(*(points - [x * scale, peak_y]).T)) < 1


def test_a_short_run_has_whole_steps_and_a_linear_scale(tmp_path):
    write_run(tmp_path / "short", n_steps=8)
    axes = draw_chart(CHARTS["loss"], read_runs([tmp_path / "short"])).axes[0]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] >= 0
    ticks = axes.xaxis.get_major_locator()()
    assert all(tick == int(tick) for tick in ticks)


def test_the_mean_does_not_lag():
    values = np.linspace(5, 1, 500)
    assert np.allclose(run_report.running_mean(values), values)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "a.html"], "no run given"),
        (["nowhere", "--out", "a.html"], "no folder nowhere: expected a run's folder"),
        (["{empty}", "--out", "a.html"], "holds neither metrics.jsonl nor a checkpoint"),
        (["{run}"], "nothing to write: expected --out FILE.html"),
        (["{run}", "--out", "no/such/a.html"], "does not exist"),
        (["{run}", "--out", "{empty}"], "is a folder; give the name of a file"),
        (["{run}", "--out", "a.html", "--png", "{run}/metrics.jsonl/new"], "is not a folder"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a relative --out would be
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", n_steps=8)
    words = [word.format(empty=tmp_path / "empty", run=tmp_path / "run") for word in argv]
    done = call("gpt/report", *words)
    assert done.code == 2 and done.err.startswith("error: ") and message in done.err
    assert done.err.count("\n") == 1 and not list(tmp_path.glob("*.html"))
