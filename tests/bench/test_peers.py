"""benchmarks/peers.py with planted contestants: turns and ratios."""

import json
import sys

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


def plant(folder, script, name, seconds):
    fields = {"workers": str(ROOT / "benchmarks/workers"), "log": str(folder / "log")}
    (folder / script).write_text(PLANTED.format(name=name, seconds=seconds, **fields))


def test_turns_and_ratio(monkeypatch, tmp_path):
    peers = program("benchmarks/peers")
    plant(tmp_path, "ours.py", "a", 0.5)
    plant(tmp_path, "with_transformers.py", "b", 2.0)
    monkeypatch.setattr(peers, "WORKERS", tmp_path)
    out = tmp_path / "peers.json"
    out.write_text(json.dumps({"results": [{"row": "kept"}, {"row": "decode gpt2 1"}]}))
    monkeypatch.setattr(peers, "table", str)
    argv = ["--rows", "decode gpt2 1", "--repeats", "4", "--python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["peers.py", *argv, "--out", str(out)])
    peers.main()
    kept, measured = json.loads(out.read_text())["results"]
    assert kept == {"row": "kept"}
    assert (measured["ours"], measured["theirs"], measured["ratio"]) == (0.5, 2.0, [4.0] * 3)
    assert measured["our_peak_bytes"] > 1e6 and {"date", "machine", "python"} <= set(measured)
    assert (tmp_path / "log").read_text() == "aaa" + "bbb" + "ab" * 4, "warmed up, then in turn"
