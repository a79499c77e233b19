"""Programs compiled by the TPU's own compiler for chips that are not here (needs libtpu)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from programs import ROOT

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
LAYERS = 4
OURS = "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS"  # without them: as a user compiles
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in OURS} | {"PYTHONPATH": str(ROOT)}


def needs_compiler(test):
    """Slow, and only where libtpu is installed."""
    absent = pytest.mark.skipif(not HAS_COMPILER, reason="needs libtpu: pip install libtpu")
    return pytest.mark.slow(absent(test))


def run(*words):
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=1500
    )


def compiled(what, *sizes):
    """What on_tpu.py finds for a mesh of these sizes."""
    done = run(ROOT / "tests" / "plan" / "on_tpu.py", what, *map(str, sizes))
    assert done.returncode == 0, done.stderr
    assert "nvoluntary" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fsdp():
    return compiled("collectives", 1, 16, 1)


@pytest.fixture(scope="module")
def mixed():
    return compiled("collectives", 2, 4, 2)


def moved(program, kinds, axes):
    """Bytes of the collectives of these kinds over these axes."""
    found = program["found"]
    return sum(n * n_runs for kind, over, n, n_runs in found if kind in kinds and over == axes)


def predicted(program, what, axes):
    return sum(n for kind, over, n in program["predicted"] if (kind, over) == (what, axes))


@needs_compiler
@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_fsdp_gathers_and_scatters_the_predicted_bytes(name, request):
    """Windowed and fused collectives included; small gradients may be reduced whole, which counts
    too."""
    train = request.getfixturevalue(name)["train"]
    gathered = moved(train, ["all-gather"], ["fsdp"])
    assert gathered == pytest.approx(predicted(train, "gather", ["fsdp"]), rel=0.01)
    reduced = moved(train, ["reduce-scatter", "all-reduce"], ["fsdp"])
    assert reduced == pytest.approx(predicted(train, "reduce", ["fsdp"]), rel=0.05)
    assert moved(train, ["reduce-scatter"], ["fsdp"]) > 0
    if name == "fsdp":
        # Gradients of blocks are scattered; the lookup's is summed whole.
        lookup = (50_304 + 1024) * 768 * 4
        scattered = moved(train, ["reduce-scatter"], ["fsdp"])
        whole = predicted(train, "reduce", ["fsdp"])
        assert scattered == pytest.approx(whole - lookup, rel=0.05)


@needs_compiler
def test_tensor_parallelism_holds_two_reductions_per_block_forward(mixed):
    """And two back, and one when a block is computed again; prefill has those of forward alone."""

    def reductions_of_the_stream(program):
        """Runs of each reduction of a whole residual stream over tensor."""
        stream = 8 * 1024 * 768 * 2
        kinds = ["all-reduce", "reduce-scatter"]
        found = mixed[program]["found"]
        return [
            t for kind, axes, n, t in found if kind in kinds and (axes, n) == (["tensor"], stream)
        ]

    in_blocks = [n_runs for n_runs in reductions_of_the_stream("train") if n_runs == LAYERS]
    assert sum(in_blocks) == 5 * LAYERS
    assert sum(reductions_of_the_stream("prefill")) == 2 * LAYERS


@needs_compiler
def test_decoding_moves_neither_weights_nor_cache(mixed):
    """The largest thing that moves are the logits of the rows."""
    decode = mixed["decode"]
    logits = 8 * 50_304 * 4
    assert max(n for _, _, n, _ in decode["found"]) <= logits
    total = sum(n * n_runs for _, _, n, n_runs in decode["found"])
    assert total == pytest.approx(sum(n for *_, n in decode["predicted"]), rel=0.05)
    assert total < mixed["cache"] / 10 and total < mixed["state"]["weights"] / 10
    # The step is given its state. Tiles of 8 x 128 are filled up, which costs a little.
    assert mixed["train"]["given"] == pytest.approx(sum(mixed["state"].values()), rel=0.1)


@needs_compiler
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_fused_attention_compiles_and_takes_less_memory(sizes):
    """Forward, forward again, and two kernels back; they never meet the scores of all pairs."""
    found = compiled("attention", *sizes)
    assert found["fused"]["kernels"] == [4, 2] and found["plain"]["kernels"] == [0, 0]
    train, prefill = zip(found["fused"]["temporary"], found["plain"]["temporary"], strict=True)
    assert train[0] < 0.8 * train[1] and prefill[0] < 0.5 * prefill[1]


@needs_compiler
def test_the_command_line_compiles_for_chips(tmp_path):
    small = ["--model.n-layers", "1", "--model.d-model", "128", "--model.n-heads", "2"]
    flags = ["--dry-run", "--topology", "v5e:2x2", "--seq-len", "128", "--batch-size", "16"]
    done = run(ROOT / "train.py", "gpt2", *small, *flags, "--grad-accum", "1", "--mesh.fsdp", "4")
    assert done.returncode == 0, done.stderr
    assert "4 (v5e:2x2): data 1 x fsdp 4 x tensor 1" in done.stderr
    assert done.stderr.count("of 16,000 MB: fits") == 3


@needs_compiler
def test_a_slice_that_does_not_exist_is_refused():
    done = run(ROOT / "train.py", "gpt2", "--dry-run", "--topology", "v5e:3x5x7")
    assert done.returncode == 2 and done.stderr.startswith("error: --topology v5e:3x5x7")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(HAS_COMPILER, reason="libtpu is here")
def test_without_the_compiler_it_says_what_to_install():
    done = run(ROOT / "train.py", "gpt2", "--dry-run", "--topology", "v5e:4x4")
    assert done.returncode == 2 and "pip install libtpu" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
