"""The reader of program text, on a small text such as XLA prints for a GPU."""

from pathlib import Path

import pytest

from gpt.plan import kernels, program_text
from gpt.plan.devices import Chip

TEXT = Path(__file__).with_name("gpu_program.txt").read_text()
PROGRAM = program_text.read(TEXT.replace("PACKAGE", str(program_text.PACKAGE)))
CHIP = Chip(memory_bytes=1e9, bytes_per_second=1e9, flops_per_second=1e9, link_bytes_per_second=1e9)
KERNELS = {kernel.name: kernel for kernel in kernels.find(PROGRAM, CHIP, mesh=None)}


def test_a_product_reads_its_factors_and_writes_its_result():
    product = KERNELS["gemm_fusion.3"]
    assert product.moved_bytes == 8 * 64 * 2 + 64 * 32 * 4 + 8 * 32 * 4
    assert product.flops == 2 * 8 * 64 * 32
    assert product.seconds == product.flops / 1e9  # longer than its bytes take


def test_products_of_libraries_count():
    """Attention of two products under a causal mask; a product of float32 takes twice as long."""
    assert KERNELS["attention.1"].flops == 2 * 2 * (2 * 4 * 128 * 128) * 64 / 2
    assert KERNELS["gemm.1"].flops == 2 * (8 * 32) * 64
    assert KERNELS["gemm.1"].seconds == 2 * KERNELS["gemm.1"].flops / 1e9


def test_of_a_table_only_rows_are_read_and_of_a_cache_only_rows_written():
    assert KERNELS["lookup.1"].moved_bytes == 2 * (8 * 64 * 4) + 8 * 4
    assert KERNELS["update.1"].moved_bytes == 2 * (8 * 64 * 2) + 8 * 2 * 4


def test_loops_count_each_turn_and_those_that_depend_on_data_one():
    n_runs = PROGRAM.n_runs["body"]
    assert n_runs == 5 + 12 + 1 + 1  # known, counted to a constant, unknown, and as a branch
    assert KERNELS["copy.7"].runs == n_runs
    assert KERNELS["copy.7"].moved_bytes == n_runs * 2 * (8 * 32 * 4)
    assert [PROGRAM.count_turns(loop) for loop in PROGRAM.of_kind("while")].count(None) == 1
    assert len(PROGRAM.of_kind("conditional")) == 1


def test_a_kernel_takes_at_least_its_launch():
    fast = Chip(1e9, bytes_per_second=1e15, flops_per_second=1e15, link_bytes_per_second=1e15)
    for kernel in kernels.find(PROGRAM, fast, mesh=None):
        assert kernel.seconds == pytest.approx(kernel.runs * kernels.LAUNCH_SECONDS)


def test_the_line_is_the_innermost_one_of_this_project():
    assert KERNELS["gemm_fusion.3"].line == "gpt/model/layers.py:111"
    assert KERNELS["copy.7"].line == "gpt/sampling/engine.py:91"  # and not a line of optax
    assert KERNELS["result"].line == ""


def test_kernels_of_one_kind_are_listed_together_longest_first():
    one, two = (kernels.Kernel(f"add.{i}", "a.py:1", 2, 10, 0, 1.0) for i in (1, 2))
    other = kernels.Kernel("add.3", "a.py:2", 1, 1, 1, 1.5)
    last = kernels.Kernel("copy", "", 1, 1, 1, 0.5)
    assert kernels.longest([one, last, two, other], 2) == [
        kernels.Kernel("add", "a.py:1", 4, 20, 0, 2.0),
        kernels.Kernel("add", "a.py:2", 1, 1, 1, 1.5),
    ]


@pytest.mark.parametrize(
    ("nodes", "rate"), [([0, 0, 0, 0], 450), ([0, 1, 2, 3], 50), ([0] * 8 + [1] * 8, 400)]
)
def test_between_nodes_a_ring_uses_the_network_of_all_its_gpus(nodes, rate):
    assert kernels.link_rate(Chip(1, 1, 1, 450, 50), nodes) == rate
