"""What a compiled program sends, read from XLA's text."""

import pytest

from gpt.plan.collectives import Collective, find, first_group

MESH = {"data": 2, "fsdp": 4, "tensor": 2}

LOOP = """HloModule step

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]) parameter(0)
  %x = f32[2,4]{1,0} get-tuple-element(%p), index=1
  %g = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,4]<=[2,4,2]T(0,2,1), \
dimensions={0}
}

%cond (p.1: (s32[], f32[8,4])) -> pred[] {
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[2]{0} constant({1, 2})
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body
  %s = (f32[8,4]{1,0}, f32[2]{0}) all-reduce(%a, %b), channel_id=2, \
replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}, to_apply=%add
}
"""


def test_a_collective_in_a_loop_counts_for_each_turn():
    reduce, gather = find(LOOP, MESH)  # those of the program itself come first
    assert gather == Collective("all-gather", 128, ("fsdp",), 4, 12)
    assert reduce == Collective("all-reduce", 136, ("tensor",), 2, 1)  # all of a tuple

    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert find(known, MESH)[1].n_runs == 7  # known trip counts go before constants


def test_rings_send_all_but_a_devices_own_part():
    reduce, gather = find(LOOP, MESH)  # those of the program itself come first
    assert gather.sent_bytes == 12 * 128 * 3 / 4
    assert reduce.sent_bytes == 2 * 136 / 2


def test_pieces_of_one_gather_fused_with_products_count_once():
    """One collective cut in pieces bears one channel; two of them, two."""

    def piece(name, channel):
        return (
            f"%{name} (p: bf16[4]) -> bf16[16] {{\n"
            "  %p = bf16[4]{0} parameter(0)\n"
            f"  ROOT %g.{name} = bf16[16]{{0}} all-gather(%p), channel_id={channel}, "
            "replica_groups=[4,4]<=[16], dimensions={0}\n}\n\n"
        )

    names = [("a", 5), ("b", 5), ("c", 6), ("d", 5)]
    calls = "".join(
        f"  %f.{name} = bf16[16]{{0}} fusion(%x), kind=kCustom, calls=%{name}\n"
        for name, _ in names
    )
    text = (
        "".join(piece(*one) for one in names) + f"ENTRY %main (x: bf16[4]) -> bf16[4] {{\n{calls}}}"
    )
    found = find(text, MESH)
    assert [one.n_bytes for one in found] == [32, 32]


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
    assert find(text, {"data": 1, "fsdp": 4, "tensor": 2}) == [
        Collective(kind, 64, ("fsdp",), 4, 1)
    ]


def test_a_fused_reduction_and_slice_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.2 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %r = f32[16]{0} all-reduce(%p), channel_id=9, replica_groups=[4,4]<=[16], to_apply=%add
}

ENTRY %main (a: f32[16]) -> f32[4] {
  ROOT %f = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
}
"""
    (one,) = find(text, {"data": 4, "fsdp": 4})
    assert one == Collective("reduce-scatter", 64, ("fsdp",), 4, 1)


def test_the_start_of_an_asynchronous_gather_counts_and_its_end_does_not():
    text = """
ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), channel_id=1, replica_groups=[4,4]<=[16]
  ROOT %d = f32[16]{0} all-gather-done(%s)
}
"""
    (one,) = find(text, {"data": 4, "fsdp": 4})
    assert one.n_bytes == 64 and one.axes == ("fsdp",)


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
    assert first_group(f"  %x = f32[] all-reduce(%y), {spelled}, to_apply=%add", 16) == group
