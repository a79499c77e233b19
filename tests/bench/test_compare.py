"""Two results side by side: noise is no difference, a tenth slower is one."""

import json

import numpy as np
import pytest

from gpt.bench import __main__ as bench
from gpt.bench import compare, roofline, vendor
from gpt.errors import UserError

NOISE = 0.03  # spread of the repeats, as a share


def result(rng, slower=1.0, repeats=5):
    """A result of two cells whose decode steps are `slower` times as long."""

    def times(seconds):
        return (seconds * rng.lognormal(0, NOISE, repeats)).tolist()

    cells = []
    for batch in (1, 8):
        prefill, decode = times(0.01 * batch), times(0.001 * slower)
        cells.append(
            {
                "batch": batch,
                "prompt_length": 128,
                "new_tokens": 64,
                "prefill": {
                    "seconds_of_repeats": prefill,
                    "seconds": 0.01 * batch,
                    "flops": 1e9,
                    "bytes": 1e7,
                },
                "decode": {
                    "seconds_per_step_of_repeats": decode,
                    "seconds_per_step": 0.001,
                    "flops_per_step": 1e6 * batch,
                    "bytes_per_step": 1e6,
                },
            }
        )
    rates = {"matmul_flops_per_second": 1e12, "read_bytes_per_second": 1e11}
    return {"cells": cells, "device": "cpu", "precision": "float32", "model": "m", "jax": "1"} | {
        "ceilings": rates
    }


def test_two_samples_of_one_distribution_are_no_difference_19_times_in_20():
    rng = np.random.default_rng(0)
    chances = [
        compare.permutation_test(rng.lognormal(0, NOISE, 5), rng.lognormal(0, NOISE, 5))
        for _ in range(1000)
    ]
    assert 0.03 < np.mean(np.array(chances) < compare.LEVEL) < 0.07


@pytest.mark.parametrize("repeats", [5, 12])
def test_a_tenth_slower_is_a_difference(repeats):
    """In the figure that is slower, and no more often than chance in the other."""
    rng = np.random.default_rng(1)
    decode, prefill = [], []
    for _ in range(50):
        old, new = result(rng, repeats=repeats), result(rng, 1.1, repeats)
        for change in compare.compare(old, new):
            (decode if change.name == "decode step" else prefill).append(change)
    assert np.mean([change.verdict == "slower" for change in decode]) > 0.95
    assert np.mean([change.differs for change in prefill]) < 0.12
    assert all(change.low < change.ratio < change.high for change in decode)


def test_faster_is_not_slower():
    rng = np.random.default_rng(2)
    changes = list(compare.compare(result(rng), result(rng, 0.7)))
    assert {c.verdict for c in changes if c.name == "decode step"} == {"faster"}
    assert compare.too_slow(changes, 0.0) == [] or all(
        c.name == "prefill" for c in compare.too_slow(changes, 0.0)
    )


@pytest.fixture
def files(tmp_path):
    """An older result, one as fast, one a third slower."""
    rng, paths = np.random.default_rng(3), []
    for i, slower in enumerate((1.0, 1.0, 1.35)):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(result(rng, slower)))
    return paths


def test_the_exit_code_says_whether_it_became_slower(files, capsys):
    old, same, slow = map(str, files)
    assert bench.main(["--compare", old, same, "--fail-if-slower", "5%"]) == 0
    assert bench.main(["--compare", old, slow]) == 0
    assert bench.main(["--compare", old, slow, "--fail-if-slower", "50%"]) == 0
    assert bench.main(["--compare", old, slow, "--fail-if-slower", "5%"]) == 1
    said = capsys.readouterr()
    assert "no difference" in said.out and "slower" in said.out
    assert "decode step is slower by 3" in said.err


def test_other_circumstances_are_told(files, capsys):
    other = json.loads(files[1].read_text()) | {"device": "another"}
    files[1].write_text(json.dumps(other))
    bench.main(["--compare", str(files[0]), str(files[1])])
    assert "device: cpu before, another after" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"cells": []}', '{"cells": [{"prefill": {}}]}', "[" * 9999]
)
def test_a_file_that_is_no_result_is_refused(files, content):
    files[1].write_text(content)
    with pytest.raises(UserError, match=r"1\.json is no result|no cell in common"):
        bench.main(["--compare", str(files[0]), str(files[1])])
    with pytest.raises(UserError, match="there is no file"):
        bench.main(["--compare", str(files[0]), str(files[0]) + "x"])


@pytest.mark.parametrize("share", ["-1", "five", "nan", "-3%", "%"])
def test_a_share_that_is_none_is_refused(files, share):
    with pytest.raises(UserError, match="--fail-if-slower"):
        bench.main(["--compare", str(files[0]), str(files[1]), f"--fail-if-slower={share}"])


def test_the_roof_tells_the_regimes(tmp_path):
    """Balance 10 FLOP a byte: prefill at 100 is above it, decode at 1 and 8 below."""
    told = result(np.random.default_rng(4))
    assert roofline.balance(told) == 10
    assert roofline.regime(told, "prefill").endswith("bound by arithmetic")
    assert "1.0 to 8.0 FLOP a byte" in roofline.regime(told, "decode")
    assert roofline.regime(told, "decode").endswith("bound by memory")
    for name in ("roof.png", "roof.svg"):
        roofline.draw(told, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_the_vendor_is_quoted_or_unknown():
    assert vendor.find("NVIDIA H200") == (989e12, 4.8e12)
    assert "989 TFLOP/s" in vendor.describe("NVIDIA H200")
    assert vendor.describe("cpu, 2 cores").endswith("unknown")
