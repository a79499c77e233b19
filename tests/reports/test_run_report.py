"""The report: what it shows of runs, whole, torn and long."""

import dataclasses
import json
import re
import shutil

import pytest
from programs import succeed
from reports.made_up import write_run

from gpt.reports import run_report
from gpt.reports.run_report import draw_chart, read_runs


@pytest.fixture(scope="module")
def trained_run(trained):
    (run,) = read_runs([trained[1]])
    return run


def test_a_trained_run_is_shown_with_its_settings(trained, trained_run, text):
    page = run_report.build_report([trained_run])
    assert "12, complete" in page and "<td>model.d_model</td><td>16</td>" in page
    assert f"<td>text</td><td>{text}</td>" in page
    assert re.findall("<figcaption>(step [0-9]+)<", page) == ["step 7", "step 12"]
    titles = re.findall('<svg role="img" aria-label="(.*?)"', page)
    assert {"Loss", "Validation, bits per byte", "Learning rate", "Gradient norm"} <= set(titles)
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids))
    assert "src=" not in page and "@import" not in page and "<script" not in page


def test_runs_are_compared(trained, trained_run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(trained[1], tmp_path / name)
    first, second = read_runs([tmp_path / "one", tmp_path / "two"])
    page = run_report.build_report([first, second])
    assert "No setting differs" in page and 'var(--run-1)"></span>two</th>' in page

    # Settings that one of them does not have are no difference.
    models_own = {k: v for k, v in first.settings.items() if k.startswith("model.")}
    imported = dataclasses.replace(first, settings=models_own | {"model.d_model": 24})
    page = run_report.build_report([imported, second])
    table = page[page.index("<h3>Differences") : page.index("<details>")]
    assert re.findall("<tr>(<td>.*)</tr>", table) == [
        "<td>model.d_model</td><td>24</td><td>16</td>"
    ]
    assert [run.name for run in read_runs([trained[1]] * 2)] == [str(trained[1])] * 2


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(trained_run):
    other = dataclasses.replace(trained_run, tokenizer=b"another", name="other")
    unknown = dataclasses.replace(trained_run, tokenizer=None)
    page = run_report.build_report([trained_run, other])
    assert "different tokenizers" in page and 'aria-label="Validation, bits per byte"' in page
    assert 'aria-label="Loss"' not in page
    assert 'aria-label="Loss"' in run_report.build_report([trained_run, unknown])


def test_an_imported_model_has_no_training_settings(trained, monkeypatch):
    honest = run_report.checkpoint.read_metadata
    source = {"source": {"model_type": "llama"}}
    monkeypatch.setattr(run_report.checkpoint, "read_metadata", lambda *a: honest(*a) | source)
    settings, note = run_report.read_settings(trained[1])
    assert "imported and not trained here" in note
    assert settings["model.d_model"] == 16 and all(name.startswith("model.") for name in settings)


def test_a_run_that_is_still_training(tmp_path):
    """No checkpoint, torn last lines, a restart and skipped updates."""
    folder = write_run(tmp_path / "going", restart=120)
    (run,) = read_runs([folder])
    assert run.restarts == [119]
    page = run_report.build_report([run])
    assert "no checkpoint yet" in page and "last update" in page
    assert "<td>training time</td><td>0:00:40</td>" in page  # of both processes
    assert 'id="loss-restart-0-119"' in page
    assert page.count("<figcaption>step ") == run_report.MAX_SAMPLES and "step 200<" in page
    (triangles,) = [
        line for line in draw_chart("Loss", [run]).axes[0].lines if line.get_marker() == "v"
    ]
    assert triangles.get_xdata().tolist() == [100]


def test_damaged_settings_are_noted(finished):
    for path in (finished / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    (run,) = read_runs([finished])
    assert run.settings == {} and run.note.startswith("its settings cannot be read: ")
    assert "Loss" in run_report.build_report([run])


def test_names_and_samples_cannot_become_part_of_the_page(tmp_path):
    evil = "<script>alert(1)</script>&\u202e\x1b[2J 今天 \ud800"
    folder = write_run(tmp_path / "_<img onerror=x>$^$1", text=evil)
    succeed("gpt/report", folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;\\u202e\\x1b[2J 今天 ?" in page
    assert "<img" not in page and "<script" not in page
    assert "</span>_&lt;img onerror=x&gt;$^$1</th>" in page


def test_a_long_run_with_a_peak_is_small_and_on_a_logarithmic_scale(tmp_path):
    figure = draw_chart("Gradient norm", read_runs([write_run(tmp_path / "long", n_steps=30_000)]))
    assert figure.axes[0].get_yscale() == "log"
    assert len(run_report.to_svg(figure, "Gradient norm")) < 3e5


def test_a_short_run_has_whole_steps_and_a_linear_scale(tmp_path):
    axes = draw_chart("Loss", read_runs([write_run(tmp_path / "short", n_steps=8)])).axes[0]
    assert axes.get_yscale() == "linear"
    ticks = axes.xaxis.get_major_locator()()
    assert all(tick == int(tick) for tick in ticks)


def test_figures_of_tasks_stand_beside_the_curves(tmp_path):
    """Those that training wrote as a chart too; of those at one step the last one written."""
    for name in ("trained", "later", "never"):
        write_run(tmp_path / name)
    lines = [{"step": step, "quiz/acc": step / 400} for step in (50, 100, 200)]
    with (tmp_path / "trained/metrics.jsonl").open("a") as file:
        file.writelines("\n" + json.dumps(line) for line in lines)
    quick = {"step": 200, "quiz/acc": 0.75, "quiz/acc_stderr": 0.25, "limit": 4}
    whole = {"step": 200, "quiz/acc": 0.625, "quiz/acc_stderr": 0.01, "quiz/ppl,strict": None}
    path = tmp_path / "later/evaluations.jsonl"
    path.write_text(f"{json.dumps(quick)}\n{json.dumps(whole)}\n")
    runs = read_runs([tmp_path / name for name in ("trained", "later", "never")])
    page = run_report.build_report(runs)
    cells = re.search("<td>quiz/acc</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", page).groups()
    small = "<br><small>step 200"
    assert cells == (f"0.5000{small}</small>", f"0.6250 ± 0.0100{small}</small>", "–")
    assert "<td>quiz/ppl,strict</td><td>–</td><td>–</td>" in page
    assert 'aria-label="quiz/acc"' in page and "quiz/ppl" not in re.findall("aria-label=.*", page)
    path.write_text(f"{json.dumps(whole)}\n{json.dumps(quick)}\n")
    page = run_report.build_report(read_runs([tmp_path / "later"]))
    assert f"0.7500 ± 0.2500{small}, the first 4 questions</small>" in page
    assert 'aria-label="quiz/acc"' not in page
