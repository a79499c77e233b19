"""Kernels and collectives, read from text such as XLA prints for a compiled program."""

from pathlib import Path

import pytest

from gpt.plan import collectives, kernels, program_text
from gpt.plan.devices import Chip

TEXT = Path(__file__).with_name("gpu_program.txt").read_text()
PROGRAM = program_text.read(TEXT.replace("PACKAGE", str(program_text.PACKAGE)))
CHIP = Chip(memory_bytes=1e9, bytes_per_second=1e9, flops_per_second=1e9, link_bytes_per_second=1e9)
KERNELS = {kernel.name: kernel for kernel in kernels.find(PROGRAM, CHIP, mesh=None)}


def test_a_product_reads_its_factors_and_writes_its_result():
    """Attention of a library has two under a causal mask; one of float32 takes twice as long."""
    product, attention, single = (
        KERNELS[name] for name in ("gemm_fusion.3", "attention.1", "gemm.1")
    )
    assert product.moved_bytes == 8 * 64 * 2 + 64 * 32 * 4 + 8 * 32 * 4
    assert product.flops == 2 * 8 * 64 * 32
    assert product.seconds == product.flops / 1e9  # longer than its bytes take
    assert attention.flops == 2 * 2 * (2 * 4 * 128 * 128) * 64 / 2
    assert single.flops == 2 * (8 * 32) * 64
    assert single.seconds == 2 * single.flops / 1e9


def test_what_is_likely_is_limited_by_what_a_card_has_reached():
    for name, reached in (
        ("gemm.1", kernels.REACHED_PRODUCTS),
        ("attention.1", kernels.REACHED_ATTENTION),
        ("copy.7", kernels.REACHED_MEMORY),
    ):
        kernel = KERNELS[name]
        assert kernel.likely_seconds == pytest.approx(kernel.seconds / reached)


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
        launches = kernel.runs * kernels.LAUNCH_SECONDS
        assert kernel.seconds == kernel.likely_seconds == pytest.approx(launches)


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


# What a compiled program sends.


MESH = {"data": 2, "fsdp": 4, "tensor": 2}
FSDP = "replica_groups=[4,4]<=[2,4,2]T(0,2,1)"


def find(text: str, mesh: dict = MESH) -> list[collectives.Collective]:
    return collectives.find(program_text.read(text), mesh)


def rows(text: str, mesh: dict = MESH) -> list[tuple]:
    return [(c.kind, c.n_bytes, c.axes, len(c.group), c.n_runs) for c in find(text, mesh)]


def test_a_collective_in_a_loop_counts_for_each_turn():
    """A ring sends all but a device's own part, and of a sum twice."""
    gather, reduce = find(f"""
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %p = (s32[], f32[8,4]) parameter(0)
  %x = f32[2,4]{{1,0}} get-tuple-element(%p), index=1
  %s = (f32[2,4]{{1,0}}, f32[8,4]{{1,0}}) all-gather-start(%x), channel_id=1, {FSDP}
  ROOT %d = f32[8,4]{{1,0}} all-gather-done(%s)
}}

%cond (p.1: (s32[], f32[8,4])) -> pred[] {{
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  %b = f32[2]{{0}} constant({{1, 2}})
  %w = (s32[], f32[8,4]) while(%a), condition=%cond, body=%body
  %s.2 = (f32[8,4]{{1,0}}, f32[2]{{0}}) all-reduce(%a, %b), replica_groups={{{{0,1}},{{2,3}}}}
}}
""")[::-1]
    assert (gather.kind, gather.n_bytes, gather.axes, gather.n_runs) == (
        *("all-gather", 8 * 4 * 4, ("fsdp",), 12),
    )
    assert gather.sent_bytes == 12 * 128 * 3 / 4
    assert (reduce.kind, reduce.n_bytes, reduce.axes) == ("all-reduce", 136, ("tensor",))
    assert reduce.sent_bytes == 2 * 136 / 2


def test_pieces_of_one_gather_fused_with_products_count_once():
    """One collective cut in pieces bears one channel; two of them, two."""
    pieces, calls = "", ""
    for name, channel in (("a", 5), ("b", 5), ("c", 6), ("d", 5)):
        pieces += f"""%{name} (p: bf16[4]) -> bf16[16] {{
  %p = bf16[4]{{0}} parameter(0)
  ROOT %g.{name} = bf16[16]{{0}} all-gather(%p), channel_id={channel}, {FSDP}
}}
"""
        calls += f"  %f.{name} = bf16[16]{{0}} fusion(%x), kind=kCustom, calls=%{name}\n"
    text = f"{pieces}\nENTRY %main (x: bf16[4]) -> bf16[4] {{\n{calls}}}"
    assert rows(text) == [("all-gather", 32, ("fsdp",), 4, 1)] * 2


@pytest.mark.parametrize(("role", "kind"), [("ag", "all-gather"), ("rs", "reduce-scatter")])
def test_a_windowed_product_is_the_collective_that_it_stands_for(role, kind):
    """Its loop passes parts round in both directions, several in a turn."""
    ring = "source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
    body = f"%wide.windowed_dot_general_body_{role}.3"
    text = f"""
{body} (p: (bf16[8], u32[])) -> (bf16[8], u32[]) {{
  %x = bf16[8]{{0}} get-tuple-element(%p), index=0
  %s = (bf16[8]{{0}}, bf16[8]{{0}}, u32[], u32[]) collective-permute-start(%x), channel_id=1, {ring}
  %d = bf16[8]{{0}} collective-permute-done(%s)
  %t = bf16[8]{{0}} collective-permute(%d), channel_id=2, {ring}
}}

%cond (p.1: (bf16[8], u32[])) -> pred[] {{
  %n = u32[] constant(2)
}}

ENTRY %main (a: bf16[8]) -> bf16[8] {{
  %w = (bf16[8], u32[]) while(%t), condition=%cond, body={body}
}}
"""
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    assert rows(text, mesh) == [(kind, 64, ("fsdp",), 4, 1)]


def test_a_fused_reduction_and_slice_is_a_reduce_scatter():
    text = f"""
%all-reduce-scatter.2 (p: f32[16]) -> f32[4] {{
  %p = f32[16]{{0}} parameter(0)
  %r = f32[16]{{0}} all-reduce(%p), channel_id=9, {FSDP}, to_apply=%add
}}

ENTRY %main (a: f32[16]) -> f32[4] {{
  ROOT %f = f32[4]{{0}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
}}
"""
    assert rows(text) == [("reduce-scatter", 64, ("fsdp",), 4, 1)]


@pytest.mark.parametrize(
    ("spelled", "group"),
    [
        ("replica_groups=[4,4]<=[8,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=[8,2]<=[16]", [0, 1]),
        ("replica_groups={{1,9},{0,8}}", [1, 9]),
        ("replica_groups={}", list(range(16))),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", list(range(0, 16, 2))),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}", [0, 1, 8, 9]),
        ("replica_groups=mesh['a'=8,'b'=2] {'a':(1)2}", [0, 8]),
        ("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}", [0, 2, 4, 6]),
        ("source_target_pairs={{0,4},{4,8},{8,12},{12,0},{1,5}}", [0, 4, 8, 12]),
    ],
)
def test_groups_in_each_of_xlas_spellings(spelled, group):
    line = f"  %x = f32[] all-reduce(%y), {spelled}, to_apply=%add"
    assert collectives.first_group(line, 16) == group
