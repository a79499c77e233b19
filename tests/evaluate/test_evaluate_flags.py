"""python -m gpt.evaluate without lm-eval: what it refuses before anything is loaded."""

import importlib.util

import pytest
from programs import call


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "--tasks ,": "--tasks names nothing: expected names separated by commas",
        "--tasks a --limit 0": "--limit is 0: expected at least 1",
        "--tasks a --batch-size 0": "--batch-size is 0: expected at least 1",
        "--tasks a --num-fewshot -1": "--num-fewshot is -1: expected zero or more",
        "--tasks a --include-path nowhere": "--include-path nowhere: no such folder",
        "--tasks a --json nowhere/a.json": "--json nowhere/a.json: folder",
        "--tasks a": "lm-eval, which is not installed: pip install -e '.[eval]'",
    }.items(),
)
def test_what_is_refused(flags, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = call("gpt/evaluate/__main__", "run", *flags.split())
    assert done.code == 2 and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
