"""Two results side by side, the roofline, and the vendors' figures. Nothing here is timed."""

import json

import numpy as np
import pytest

from gpt.bench import __main__ as bench
from gpt.bench import report
from gpt.errors import UserError

NOISE = 0.03  # spread of the repeats, as a share


def result(rng, slower=1.0):
    """A result of two cells whose decode steps are `slower` times as long."""
    cells = []
    for batch in (1, 8):
        prefill = {"flops": 1e9, "bytes": 1e7, "seconds": 0.01 * batch}
        prefill["seconds_of_repeats"] = (0.01 * batch * rng.lognormal(0, NOISE, 5)).tolist()
        decode = {"flops_per_step": 1e6 * batch, "bytes_per_step": 1e6, "seconds_per_step": 0.001}
        repeats = (0.001 * slower * rng.lognormal(0, NOISE, 5)).tolist()
        decode["seconds_per_step_of_repeats"] = repeats
        sizes = {"batch": batch, "prompt_length": 128, "new_tokens": 64}
        cells.append(sizes | {"prefill": prefill, "decode": decode})
    ceilings = {"matmul_flops_per_second": 1e12, "read_bytes_per_second": 1e11}
    names = {"device": "cpu", "precision": "float32", "model": "m", "jax": "1"}
    return names | {"cells": cells, "ceilings": ceilings}


def test_noise_is_called_a_difference_once_in_twenty():
    rng = np.random.default_rng(0)
    pairs = rng.lognormal(0, NOISE, (1000, 2, 5))
    changes = [report.compare_repeats("cell", "figure", old, new) for old, new in pairs]
    assert 0.03 < np.mean([change.verdict != "no difference" for change in changes]) < 0.07


def test_the_ratio_is_of_medians_and_the_spread_of_quartiles():
    change = report.compare_repeats(
        "cell", "figure", [1.0, 2.0, 3.0, 4.0, 90.0], [8.0, 8.0, 8.0, 9.0, 90.0]
    )
    assert change.ratio == 8 / 3 and change.spread == pytest.approx(2 / 3 + 1 / 8)
    assert change.verdict == "slower"
    assert report.compare_repeats("cell", "figure", [8.0, 9.0], [1.0, 2.0]).verdict == "faster"


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
    printed = capsys.readouterr()
    assert "no difference" in printed.out and "decode step is slower by 3" in printed.err
    assert "prefill is slower" not in printed.err


def test_a_changed_machine_is_the_first_thing_said(files, capsys):
    old, new = str(files[0]), files[1]
    bench.main(["--compare", old, str(new)])
    same = capsys.readouterr().out
    assert same.startswith("the machine is the same within 5%: ") and "verdict" in same

    # Then nothing is said about the program.
    slower = json.loads(files[2].read_text())
    slower["ceilings"]["read_bytes_per_second"] *= 0.8
    new.write_text(json.dumps(slower))
    assert bench.main(["--compare", old, str(new)]) == 0
    first, second, *table = capsys.readouterr().out.splitlines()
    assert first.startswith("the machine CHANGED between the runs: ")
    assert "reading memory 0.80x as fast" in first and second.startswith("no verdict: ")
    assert "1.3" in "".join(table) and not {"slower", "verdict"} & {*" ".join(table).split()}
    with pytest.raises(UserError, match="the machine has changed between"):
        bench.main(["--compare", old, str(new), "--fail-if-slower", "5%"])

    new.write_text(json.dumps(slower | {"device": "another"}))
    bench.main(["--compare", old, str(new)])
    assert "CHANGED: cpu before, another now\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"cells": [{"prefill": {}}]}'])
def test_what_cannot_be_compared_is_refused(files, content):
    files[1].write_text(content)
    with pytest.raises(UserError, match=r"1\.json is not a result"):
        report.read_result(files[1])
    one = report.read_result(files[0])
    with pytest.raises(UserError, match="no cell in common"):
        report.changes_between(one, one | {"cells": []})


@pytest.mark.parametrize("share", ["five", "nan", "-3%"])
def test_a_share_that_is_not_one_is_refused(share):
    with pytest.raises(UserError, match="--fail-if-slower"):
        report.parse_share(share)


def test_the_roofline_shows_what_limits_each_phase(tmp_path):
    """Balance 10 FLOP per byte: prefill at 100 is above it, decode at 1 and 8 below."""
    measured = result(np.random.default_rng(4))
    assert report.balance(measured) == 10
    assert report.regime(measured, "prefill").startswith("limited by compute")
    assert "1.0 to 8.0 FLOP per byte" in report.regime(measured, "decode")
    assert report.regime(measured, "decode").startswith("limited by memory")
    report.draw_roofline(measured, tmp_path / "roof.svg")
    drawn = (tmp_path / "roof.svg").read_text()
    assert "arithmetic intensity" in drawn and "8 x 128" in drawn


def test_the_vendor_is_quoted_where_it_is_known():
    measured = result(np.random.default_rng(4))
    measured |= {"parameters": 1, "weight_bytes": 4, "weights": "float32", "repeats": 5}
    assert "vendor" not in report.card(measured, verbose=True).renderable
    card = report.card(measured | {"device": "NVIDIA H200"}, verbose=True)
    assert "989 TFLOP/s in bfloat16 and 4.80 TB/s" in card.renderable
