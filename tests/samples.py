"""sample.py called on a run: what it prints, as text and as JSON."""

import json

from programs import call

BRIEF = ["--max-new-tokens", "12"]
TWO = ["--prompt", "the ", "--prompt", "a cat"]


def sample(folder, *argv):
    """What sample.py prints, which must go well."""
    done = call("sample", folder, *argv)
    assert done.code == 0, done.err
    return done.out


def refuse_constant(word):
    raise AssertionError(f"{word} is no JSON")


def objects(folder, *argv):
    """What it prints with --json, which must be strict JSON."""
    lines = sample(folder, *argv, "--json").splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]
