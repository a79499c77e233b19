"""The reader of program text, on a small text such as XLA prints for a GPU."""

import pytest

from gpt.plan import kernels, program_text
from gpt.plan.devices import Chip

PROGRAM = program_text.read(f"""HloModule jit_step, is_scheduled=true

FileNames
1 "{program_text.PACKAGE}/sampling/engine.py"
2 "{program_text.PACKAGE}/model/layers.py"
3 "/usr/lib/python3/site-packages/optax/transform.py"

FunctionNames
1 "decode_step"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=91 end_line=91 column=19 end_column=56}}
2 {{file_name_id=2 function_name_id=1 line=111 end_line=112 column=1 end_column=5}}
3 {{file_name_id=3 function_name_id=1 line=7 end_line=7 column=1 end_column=5}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=3 parent_frame_id=1}}

%fused_dot (p.1: bf16[8,64], p.2: f32[64,32]) -> f32[8,32] {{
  %p.1 = bf16[8,64]{{1,0}} parameter(0)
  %p.2 = f32[64,32]{{1,0}} parameter(1)
  %convert.1 = bf16[64,32]{{1,0}} convert(%p.2)
  ROOT %dot.1 = f32[8,32]{{1,0}} dot(%p.1, %convert.1), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}
}}

%fused_lookup (p.3: f32[1000,64], p.4: s32[8]) -> f32[8,64] {{
  %p.3 = f32[1000,64]{{1,0}} parameter(0)
  %p.4 = s32[8]{{0}} parameter(1)
  %view.1 = f32[1000,64]{{1,0}} bitcast(%p.3)
  ROOT %gather.1 = f32[8,64]{{1,0}} gather(%view.1, %p.4), offset_dims={{1}}
}}

%fused_update (p.5: bf16[8,1024,64], p.6: s32[8,2], p.7: bf16[8,64]) -> bf16[8,1024,64] {{
  %p.5 = bf16[8,1024,64]{{2,1,0}} parameter(0)
  %p.6 = s32[8,2]{{1,0}} parameter(1)
  %p.7 = bf16[8,64]{{1,0}} parameter(2)
  ROOT %scatter.1 = bf16[8,1024,64]{{2,1,0}} scatter(%p.5, %p.6, %p.7), to_apply=%assign
}}

%body (s.1: (s32[], f32[8,32])) -> (s32[], f32[8,32]) {{
  %s.1 = (s32[], f32[8,32]{{1,0}}) parameter(0)
  %x.1 = f32[8,32]{{1,0}} get-tuple-element(%s.1), index=1
  %copy.7 = f32[8,32]{{1,0}} copy(%x.1), metadata={{op_name="a" stack_frame_id=3}}
  ROOT %t.1 = (s32[], f32[8,32]{{1,0}}) tuple(%x.1, %copy.7)
}}

%until_constant (s.2: (s32[], f32[8,32])) -> pred[] {{
  %limit.1 = s32[] constant(12)
  ROOT %less.1 = pred[] compare(%i.1, %limit.1), direction=LT
}}

%until_all_are_done (s.3: (s32[], f32[8,32])) -> pred[] {{
  %limit.2 = s32[] constant(16)
  %less.2 = pred[] compare(%i.2, %limit.2), direction=LT
  ROOT %and.1 = pred[] and(%less.2, %any.1)
}}

ENTRY %main (a: bf16[8,64], b: f32[64,32], table: f32[1000,64]) -> f32[8,32] {{
  %a = bf16[8,64]{{1,0}} parameter(0)
  %b = f32[64,32]{{1,0}} parameter(1)
  %table = f32[1000,64]{{1,0}} parameter(2)
  %ids = s32[8]{{0}} parameter(3)
  %cache = bf16[8,1024,64]{{2,1,0}} parameter(4)
  %gemm_fusion.3 = f32[8,32]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%fused_dot, \
metadata={{op_name="b" stack_frame_id=2}}
  %lookup.1 = f32[8,64]{{1,0}} fusion(%table, %ids), kind=kLoop, calls=%fused_lookup
  %update.1 = bf16[8,1024,64]{{2,1,0}} fusion(%cache, %ids, %a), kind=kInput, calls=%fused_update
  %known = (s32[], f32[8,32]{{1,0}}) while(%t.0), condition=%until_all_are_done, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
  %counted = (s32[], f32[8,32]{{1,0}}) while(%t.0), condition=%until_constant, body=%body
  %unknown = (s32[], f32[8,32]{{1,0}}) while(%t.0), condition=%until_all_are_done, body=%body
  %either = f32[8,32]{{1,0}} conditional(%pred, %a, %a), branch_computations={{%fused_dot, %body}}
  %q = bf16[2,128,4,64]{{3,2,1,0}} parameter(5)
  %attention.1 = (bf16[2,4,128,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={{"intermediate_tensor_shape": \
{{"dimensions": ["2", "4", "128", "128"]}}, "mask_type": "CAUSAL", "bmm1_dot_dimension_numbers": \
{{"lhs_contracting_dimensions": ["3"]}}}}
  %gemm.1 = (f32[8,32]{{1,0}}, s8[4]{{0}}) custom-call(%b, %b), \
custom_call_target="__cublas$gemm", \
backend_config={{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["0"]}}}}
  ROOT %result = f32[8,32]{{1,0}} copy(%gemm_fusion.3)
}}
""")
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
