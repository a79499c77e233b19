"""The pages of a model that was imported, without a tokenizer and without a history."""

import pytest
import standins
from programs import call

from gpt.reports import runs


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run's folder of a Llama without a tokenizer."""
    folder = tmp_path_factory.mktemp("imported")
    source = standins.write(folder / "in", standins.LLAMA)
    done = call("gpt/convert/__main__", "import", source, folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


def test_a_report_shows_the_model_and_invents_no_training(imported, tmp_path):
    assert call("gpt/report", imported, "--out", tmp_path / "a.html").code == 0
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "imported, not trained here" in text and "its settings are the model" in text
    assert "<td>model.d_model</td><td>24</td>" in text
    assert "learning_rate" not in text and "2,000" not in text and "last heard of" not in text


def test_beside_a_trained_run_only_models_differ(imported, trained):
    apart = runs.differences(runs.read_runs([imported, trained[1]]))
    assert apart["model.d_model"] == [24, 16]
    assert all(name.startswith("model.") for name in apart)


def test_a_prompt_of_ids_is_toured(imported, tmp_path):
    argv = ["--prompt-ids", " 5  17 250", "--max-new-tokens", "3", "--out", tmp_path / "a.html"]
    done = call("gpt/tour", imported, *argv)
    assert done.code == 0, done.err
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "How “&lt;5&gt;&lt;17&gt;&lt;250&gt;” goes" in text
    assert "--prompt-ids &#x27;5 17 250&#x27; --max-new-tokens 3" in text


@pytest.mark.parametrize("argv", [[], ["--prompt", "text"]])
def test_a_tour_of_text_without_a_tokenizer_asks_for_ids(argv, imported, tmp_path):
    done = call("gpt/tour", imported, *argv, "--out", tmp_path / "a.html")
    assert done.code == 2 and "came without a tokenizer" in done.err
    assert '--prompt-ids "1 2 3"\n' in done.err and "--score-ids" not in done.err
    assert done.err.count("\n") == 1 and not list(tmp_path.iterdir())
