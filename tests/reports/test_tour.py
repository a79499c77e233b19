"""The tour's page, read as text: what it says of a prompt in any script, and how large it is."""

import html
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from made_up import made_up_journey
from programs import call

from gpt.reports import html as page
from gpt.reports import tour, tour_recorder
from gpt.reports.spelling import spell_all
from gpt.sampling.settings import Settings


def data_of(text):
    """What the page's script draws from."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def draw_again(text):
    """The command on a page, and what sample.py draws by it, as a page shows it."""
    (shown,) = re.findall(r"<code>([^<]* sample\.py .*?)</code>", text)
    words = shlex.split(html.unescape(shown))
    done = call("sample", *words[words.index("sample.py") + 1 :], "--json")
    return words, html.escape(json.loads(done.out)["text"])


@pytest.fixture(scope="module")
def toured(trained, tmp_path_factory):
    """The page of a Chinese and hostile prompt through a trained run."""
    path = tmp_path_factory.mktemp("tour") / "tour.html"
    argv = [trained[1], "--prompt", "天<b>气", "--max-new-tokens", "4", "--out", path]
    done = call("gpt/tour", *argv)
    assert done.code == 0, done.err
    return path.read_text(encoding="utf-8")


def test_a_prompt_in_chinese_is_text_and_its_tokens_bytes(toured):
    assert "天&lt;b&gt;气" in toured and "<b>气" not in toured
    assert "\\xe5" in toured and 'title="part of 天"' in toured
    assert data_of(toured)["tokens"][0] == ["\\xe5", 1, "天"]
    assert toured.count("<script") == 2 and "src=" not in toured


def test_the_page_holds_the_numbers_that_were_recorded(trained, toured):
    from gpt.sampling.language_model import load

    settings = Settings(max_new_tokens=4, temperature=0.8, top_k=50, top_p=0.9)
    noted, data = tour_recorder.take_tour(load(trained[1]), "天<b>气", settings), data_of(toured)
    for name in ("scores", "weights"):
        packed = page.unpack(data[name])
        assert np.abs(packed - noted.map(name)).max() <= data[name]["width"] / 65535
    assert page.unpack(data["q"]).shape == noted.joined("q").shape
    assert (
        data["prefilled"] == len(noted.prompt_ids) and data["following"][:-1] == noted.read_ids[1:]
    )


def test_the_command_on_the_page_writes_its_text(trained, tmp_path):
    """Of an older checkpoint, too, in a type and with weights that were asked for."""
    chosen = ["--step", "8", "--dtype", "bfloat16", "--weights", "raw"]
    argv = ["--prompt", "the ", "--max-new-tokens", "9", "--temperature", "0.12345678"]
    argv += ["--out", tmp_path / "a.html"]
    assert call("gpt/tour", trained[1], *chosen, *argv).code == 0
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    words, written = draw_again(text)
    assert words[words.index("--temperature") + 1] == "0.12345678"
    assert " ".join(chosen) in " ".join(words)
    assert f"<pre>the <b>{written}</b></pre>" in text


def test_a_prompt_of_ids_that_breaks_off_in_a_character(trained, tmp_path):
    argv = ["--prompt-ids", "116 229 164", "--max-new-tokens", "3", "--out", tmp_path / "a.html"]
    done = call("gpt/tour", trained[1], *argv)
    assert done.code == 0, done.err
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert data_of(text)["prefilled"] == 3
    assert f"<pre>t<b>{draw_again(text)[1]}</b></pre>" in text


def test_prefill_and_each_step_say_what_they_read_and_wrote(toured):
    assert toured.count('<article class="step"') == 4
    assert "Wrote slots 0 to 8" in toured and "Read back nothing: it was empty" in toured
    assert "Wrote slot 9" in toured and "Read back 11 positions" in toured
    assert toured.count('class="slot written"') == 9 + 3 + 1  # and one in the key
    assert '<th scope="col">top-p</th>' in toured and "operations a byte" in toured


def test_shapes_are_those_of_both_regimes(toured):
    assert "[1, 9, 2, 8]" in toured and "[1, 1, 2, 8]" in toured  # queries, BTNH
    assert "[1, 2, 1, 9, 9]" in toured  # scores, BKGTS


def test_the_largest_promised_page_stays_small():
    """64 tokens over 12 layers of 12 heads of width 64."""
    journey, model = made_up_journey(12, 12, 64, T=57, n_new=8)
    assert len(journey.read_ids) == 64
    text = tour.build(journey, model, tour.Source(Path("runs/x")), Settings())
    assert len(text.encode()) < 15e6


def test_packing_keeps_five_digits():
    array = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    packed = page.pack(array)
    assert np.abs(page.unpack(packed) - array).max() <= packed["width"] / 65535
    assert page.unpack(page.pack(np.zeros((0, 3)))).shape == (0, 3)
    assert np.all(page.unpack(page.pack(np.full(4, 2.5), 0, 5)) == np.float32(2.5000381))


def test_spelling_of_whole_half_and_mixed_tokens():
    tokens = [b" \n", "气".encode(), " 天".encode()[:2], " 天".encode()[2:], b"\xff", b"\x1b"]
    spelled = spell_all(range(6), lambda ids: b"".join(tokens[i] for i in ids))
    assert [one.text for one in spelled] == ["␣⏎", "气", "␣\\xe5", "\\xa4\\xa9", "\\xff", "\\x1b"]
    assert [one.half for one in spelled] == [False, False, True, True, True, False]
    assert [one.whole for one in spelled] == ["", "", "␣天", "␣天", "", ""]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a"], "--out"),
        (["--out", "no/such/a.html"], "there is no folder"),
        (["--prompt", "a" * 40, "--out", "{folder}/a.html"], "at most the model's context of 16"),
        (["--temperature", "-1", "--out", "a.html"], "--temperature is -1"),
        (["--prompt", "a", "--prompt-ids", "1", "--out", "a.html"], "exclude each other"),
        (["--prompt-ids", "one", "--out", "a.html"], "--prompt-ids 'one': expected whole numbers"),
        (["--prompt-ids", "257", "--out", "a.html"], "token id 257 in the prompt: expected a"),
    ],
)
def test_mistakes_are_one_line(argv, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a relative --out would be
    done = call("gpt/tour", trained[1], *(word.format(folder=tmp_path) for word in argv))
    assert done.code == 2 and done.err.startswith("error: ") and message in done.err
    assert done.err.count("\n") == 1 and not list(tmp_path.iterdir())
