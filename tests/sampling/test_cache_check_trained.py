"""`sample.py --check` on trained runs of every position, norm and head variant, in both types."""

from itertools import product

import pytest
from programs import TINY, call

POSITIONS = ("learned", "sinusoidal", "rope", "none")
HEADS = {
    "one pair a head": [],
    "grouped": ["--model.n-kv-heads", "2"],
    "one pair for all, normalised": ["--model.n-kv-heads", "1", "--model.qk-norm"],
}
NORMS = [("layer", "pre"), ("rms", "pre"), ("layer", "post"), ("rms", "post")]
HEAD_ENDS = [
    [],
    ["--model.no-tied", "--model.no-bias"],
    ["--model.logit-softcap", "15", "--model.mlp", "swiglu"],
]


def variants():
    """Every pair of positions and heads; over them each norm, place and end comes round."""
    for i, (positions, heads) in enumerate(product(POSITIONS, HEADS)):
        norm, place = NORMS[(i + i // 4) % 4]
        flags = ["--model.positions", positions, "--model.norm", norm, "--model.norm-place", place]
        yield pytest.param(
            [*flags, *HEADS[heads], *HEAD_ENDS[i % 3]], id=f"{positions}, {heads}, {norm} {place}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("flags", list(variants()))
def test_the_contract_holds_on_a_trained_run(flags, text, tmp_path):
    wide = ["--model.n-heads", "4", "--model.d-model", "32", "--seq-len", "64", "--steps", "60"]
    done = call(
        "train", *TINY, *wide, "--learning-rate", "1e-2", *flags, "--data", text, "--out", tmp_path
    )
    assert done.code == 0, done.err
    for dtype in ("float32", "bfloat16"):
        checked = call("sample", tmp_path, "--check", "--dtype", dtype)
        assert checked.code == 0, checked.out + checked.err
        assert "the cache contract holds" in checked.out
