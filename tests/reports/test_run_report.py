"""The report, read as text: what it shows of runs, whole, torn and long, and what it escapes."""

import dataclasses
import html
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_up import write_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from programs import TINY, call, read_lines

from gpt import cli, presets
from gpt.config import TrainConfig, from_json, to_json
from gpt.reports import chart, curves, runs
from gpt.reports.run_report import commands
from gpt.training.metrics import smoothed
from gpt.training.resume import flat


def report(*argv):
    """python -m gpt.report ARGV, which must go well."""
    done = call("gpt/report", *argv)
    assert done.code == 0, done.err
    return done.out


def data_of(text):
    """What the page's script draws from."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_a_trained_run_is_shown_with_its_command(trained, tmp_path):
    """The real thing: curves, settings, and a command that leads back to the same settings."""
    assert [step for step, _ in runs.read_samples(trained[1] / "samples.jsonl")] == [7, 12]
    report(trained[1], "--out", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "12, complete" in text and "Validation, bits a byte" in text
    assert {"loss", "bits", "learning_rate", "grad_norm"} <= data_of(text).keys()
    assert '<th scope="col">setting</th>' in text and "model.d_model" in text
    assert "src=" not in text and "http" not in re.sub("Content-Security|http-equiv", "", text)


def test_the_command_parses_back_to_the_settings(trained):
    (run,) = runs.read_runs([trained[1]])
    words = runs.command_of(run).split()
    assert left_open(run, words, presets.PRESETS[words[2]]) <= runs.DECIDED


def left_open(run, words, default):
    """The settings that a command's flags do not bring from `default` to the run's."""
    flags = words[3 : words.index("--data")]
    read = cli.parse(TrainConfig, flags, program="x", description="", default=default)
    return {name for name, _ in flat(to_json(read)).items() ^ flat(to_json(run.config)).items()}


def test_the_command_on_the_page_makes_the_same_run(text, tmp_path, monkeypatch):
    """Pasted where it was typed: the paths are those, with their spaces."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "my text.txt")
    assert call("train", *TINY, "--data", "my text.txt", "--out", "a run").code == 0
    report("a run", "--out", "a.html")
    shown = re.findall(r"<pre[^>]*>(python train.py.*?)</pre>", Path("a.html").read_text("utf-8"))
    (command,) = map(html.unescape, shown)
    done = call("train", *shlex.split(command)[2:])
    assert done.code == 0, done.err
    assert read_lines(Path("a run")) == read_lines(Path("a run-again"))


@pytest.mark.parametrize("folder", [".", "..", "../run"])
def test_the_command_names_a_new_folder_for_a_run_seen_from_within(folder, finished, monkeypatch):
    (finished / "inner").mkdir()
    monkeypatch.chdir(finished / "inner" if folder == ".." else finished)
    (run,) = runs.read_runs([Path(folder)])
    *_, flag, out = shlex.split(runs.command_of(run))
    assert flag == "--out" and Path(out).resolve() == finished.resolve().with_name("run-again")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"fingerprint": "0"}, "Name its text with <code>--data</code>"),
        ({"fingerprint": "0", "paths": []}, "Python's standard library"),
        ({"fingerprint": "0", "paths": [7]}, "Name its text with <code>--data</code>"),
        (None, "Name its text with <code>--data</code>"),
    ],
)
def test_a_run_that_does_not_say_where_its_text_was(trained, data, said):
    (run,) = runs.read_runs([trained[1]])
    run = runs.Run(**(vars(run) | {"about": run.about | {"data": data}}))
    assert said in commands([run]) and "--data /" not in commands([run])


def test_the_weights_that_a_run_began_from_are_named(trained):
    (run,) = runs.read_runs([trained[1]])
    run = runs.Run(**(vars(run) | {"about": run.about | {"init_from": "runs/gpt2 a"}}))
    assert "--init-from 'runs/gpt2 a' --out" in runs.command_of(run)
    words = shlex.split(runs.command_of(run, "my python/bin"))
    assert words[0] == "my python/bin"
    preset = presets.PRESETS[words[2]]
    adopted = dataclasses.replace(preset, model=presets.PRESETS["gpt2"].model)  # as train.py does
    assert left_open(run, words, adopted) <= runs.DECIDED


def test_runs_are_overlaid_and_their_differences_listed(trained, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(trained[1], tmp_path / name)
    first, second = runs.read_runs([tmp_path / "one", tmp_path / "two"])
    assert runs.differences([first, second]) == {}
    changed = to_json(second.config) | {"learning_rate": 0.5}
    second = runs.Run(**(vars(second) | {"config": from_json(TrainConfig, changed)}))
    rate = first.config.learning_rate
    assert runs.differences([first, second]) == {"learning_rate": [rate, 0.5]}
    report(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    labels = {curve["label"] for curve in data_of(text)["bits"]["curves"]}
    assert labels == {"one", "two"} and "No setting differs" in text


def test_a_run_that_is_still_going(tmp_path):
    """No checkpoint, a torn last line in both files, a restart and skipped updates."""
    going = write_run(tmp_path / "going", restart=120)
    (run,) = runs.read_runs([going])
    assert run.restarts == [120] and run.skipped == [100] and run.last_step == 200
    assert run.seconds == pytest.approx(0.2 * 119 + 0.2 * 81)
    report(going, "--out", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "no checkpoint yet" in text and "last heard of" in text
    assert 'class="restart"' in text and 'class="skip"' in text
    assert text.count("<figcaption>step ") == runs.MOST_SAMPLES and "step 200<" in text


def test_a_process_killed_after_one_line_is_a_restart(tmp_path):
    """Its seconds do not fall back: the step from which the next one went on tells."""
    lines = [
        {"step": 1, "loss": 5.0, "seconds": 1.0, "since_step": 0},
        {"step": 2, "loss": 4.0, "seconds": 1.1, "since_step": 1},
        {"step": 3, "loss": 3.0, "seconds": 2.0, "since_step": 1},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    (run,) = runs.read_runs([tmp_path])
    assert run.restarts == [1] and run.seconds == 3.0


def test_numbers_that_no_run_writes_are_passed_over(tmp_path):
    """A file from elsewhere: NaN, infinities, what no float holds, text."""
    folder, large = write_run(tmp_path / "a"), "1" + 400 * "0"
    with (folder / "metrics.jsonl").open("a") as file:
        for value in ("NaN", "-Infinity", large, '"x"', "[]", "true"):
            file.write(f'\n{{"step": 7, "loss": {value}, "skipped": {value}, "seconds": 1}}')
            file.write(f'\n{{"step": 7, "loss": 1, "seconds": {value}}}')
            file.write(f'\n{{"step": 7, "loss": 1, "seconds": 2, "since_step": {value}}}')
        file.write(f'\n{{"step": {large}, "loss": 1, "seconds": 1}}')
    report(folder, "--out", tmp_path / "a.html", "--png", tmp_path)
    (run,) = runs.read_runs([folder])
    assert run.last_step == 200 and max(run.series("loss")[1]) < 10


def test_what_runs_and_samples_say_is_escaped(tmp_path):
    """Neither a sample nor a folder's name can become a part of the page."""
    evil = "<script>alert(1)</script>&\u202e\x1b[2J 今天 \ud800"
    folder = write_run(tmp_path / "<img onerror=x>", text=evil)
    report(folder, "--out", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;\\u202e\\x1b[2J 今天 ?" in text
    assert "<img" not in text and text.count("<script") == 2


def test_a_long_run_stays_small(tmp_path):
    """100,000 steps, each logged: no peak is lost, and the file is far below 3 MB."""
    write_run(tmp_path / "long", n_steps=100_000)
    report(tmp_path / "long", "--out", tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 1e6
    (run,) = runs.read_runs([tmp_path / "long"])
    steps, values = curves.thin(*run.series("grad_norm"))
    assert len(steps) <= 2 * curves.BUCKETS + 2 and values.max() == 400.0
    assert list(steps) == sorted(set(steps)) and (steps[0], steps[-1]) == (1, 100_000)


def listen(monkeypatch):
    """A list that takes the legend of each picture."""
    legends, honest = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda *a, **k: legends.append(honest(*a, **k)))
    return legends


def test_pictures_alone(tmp_path, monkeypatch):
    """Of a run whose name would be a formula, and hidden."""
    legends = listen(monkeypatch)
    write_run(tmp_path / "_cost$^$1", restart=50)
    said = report(tmp_path / "_cost$^$1", "--png", tmp_path / "pictures")
    assert legends[0].get_texts()[0].get_text() == r" _cost\$^\$1 training"
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {f"{name}.png" for name in (
        "loss", "bits", "learning_rate", "grad_norm", "speed", "mfu", "step_seconds")}  # fmt: skip
    assert all((tmp_path / "pictures" / name).read_bytes()[1:4] == b"PNG" for name in names)
    assert said.count(".png\n") == 7


def test_a_picture_of_a_run_with_any_name(tmp_path, monkeypatch):
    """Bytes that are no text, and letters that hardly a font has, without a warning."""
    legends, curve = listen(monkeypatch), curves.Curve(0, "", np.arange(3), np.arange(3.0))
    panel = curves.Panel("a", "A", "", [curve])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chart.save_picture(panel, ["今天\ue123\udcff"], tmp_path)
    assert legends[0].get_texts()[0].get_text() == " 今天\ue123? "


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "a.html"], "no run given"),
        (["nowhere", "--out", "a.html"], "no folder nowhere: expected a run's folder"),
        (["{empty}", "--out", "a.html"], "holds neither metrics.jsonl nor a checkpoint"),
        (["{run}"], "nothing to write: expected --out FILE.html"),
        (["{run}", "--out", "no/such/a.html"], "there is no folder"),
        (["{run}", "--out", "{empty}"], "is a folder; name a file in it"),
        (["{run}", "--out", "a.html", "--png", "{run}/metrics.jsonl"], "is no folder; expected"),
        (["nowhere", "--png", "{run}/metrics.jsonl/new"], "metrics.jsonl is no folder"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a relative --out would be
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    words = [word.format(empty=tmp_path / "empty", run=tmp_path / "run") for word in argv]
    done = call("gpt/report", *words)
    assert done.code == 2 and done.err.startswith("error: ") and message in done.err
    assert done.err.count("\n") == 1 and not list(tmp_path.glob("*.html"))


def test_the_smooth_curve_is_the_one_of_the_run_log():
    values = np.random.default_rng(0).normal(5, 1, 500).tolist()
    assert np.allclose(curves.smooth(values), smoothed(values))


def test_steps_of_a_short_run_are_whole(tmp_path, monkeypatch):
    shown, honest = [], Figure.savefig

    def listen_to_ticks(figure, place):
        honest(figure, place)
        shown.extend(label.get_text() for label in figure.axes[0].get_xticklabels())

    monkeypatch.setattr(Figure, "savefig", listen_to_ticks)
    panel = curves.Panel("a", "A", "", [curves.Curve(0, "", np.arange(3), np.ones(3))])
    chart.save_picture(panel, ["run"], tmp_path)
    assert {"0", "1", "2"} <= set(shown) and len(set(shown)) == len(shown)
    assert re.findall(">([^<]+)</span>", chart.labels_x(panel)) == ["0", "1", "2"]


def test_a_peak_makes_the_scale_logarithmic():
    flat_, peaked = np.ones(50) + np.arange(50) / 50, np.ones(50)
    peaked[20] = 1000.0
    for values, log in ((flat_, False), (peaked, True)):
        panel = curves.Panel("a", "A", "", [curves.Curve(0, "", np.arange(50), values)])
        assert panel.log is log
        shares = panel.up(values)
        assert shares.min() >= 0 and shares.max() <= 1
