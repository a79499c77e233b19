"""benchmarks/peers.py with planted contestants: turns, ratios, and what is left out."""

import json
import sys

import pytest
from programs import ROOT, program

PLANTED = """
import sys
sys.path.insert(0, {workers!r})
from turns import serve
def work():
    open({log!r}, "a").write({name!r})
    return {seconds}
serve(work)
"""


@pytest.fixture
def peers():
    return program("benchmarks/peers")


def run(peers, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, argv)])
    peers.main()


def plant(folder, script, name, seconds):
    fields = {"workers": str(ROOT / "benchmarks/workers"), "log": str(folder / "log")}
    (folder / script).write_text(PLANTED.format(name=name, seconds=seconds, **fields))


def test_turns_and_ratio(peers, monkeypatch, tmp_path):
    plant(tmp_path, "ours.py", "a", 0.5)
    plant(tmp_path, "with_transformers.py", "b", 2.0)
    monkeypatch.setattr(peers, "WORKERS", tmp_path)
    out = tmp_path / "peers.json"
    out.write_text(json.dumps({"results": [{"row": "kept"}, {"row": "decode gpt2 1"}]}))
    monkeypatch.setattr(peers, "table", str)
    row = ("--rows", "decode gpt2 1", "--repeats", 4, "--python", sys.executable, "--out", out)
    run(peers, monkeypatch, *row)
    kept, measured = json.loads(out.read_text())["results"]
    assert kept == {"row": "kept"}
    assert (measured["ours"], measured["theirs"], measured["ratio"]) == (0.5, 2.0, [4.0] * 3)
    assert measured["our_peak_bytes"] > 1e6 and {"date", "machine", "python"} <= set(measured)
    assert (tmp_path / "log").read_text() == "aaa" + "bbb" + "ab" * 4, "warmed up, then in turn"


def test_what_is_not_there_is_left_out_with_a_reason(peers, monkeypatch, tmp_path, capsys):
    rows = ("--rows", "train nano", "decode llama 1", "prefill llama 128")
    run(peers, monkeypatch, *rows, "--python", "/bin/false", "--out", tmp_path / "peers.json")
    nano, llama = sorted(capsys.readouterr().err.splitlines(), reverse=True)
    assert "train nano" in nano and "--nanogpt" in nano
    assert "prefill llama 128, decode llama 1" in llama and "C++ compiler" in llama
    assert not (tmp_path / "peers.json").exists()
