"""Checkpoints come back to the bit, on any mesh, or say what is wrong with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import (
    METADATA,
    abstract,
    files_of,
    newest_metadata,
    params,
    restore_all,
    run_python,
    same_bits,
    save,
    state,
)

from gpt import checkpoint
from gpt.checkpoint import CheckpointManager, Damaged
from gpt.digest import digest
from gpt.errors import UserError


def test_trees_and_metadata_come_back_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/mine", 2)  # a relative path
    metadata, restored = restore_all("runs/mine", 2)
    assert metadata == METADATA | {"step": 2}
    assert same_bits(restored, state(2))


def test_one_tree_is_restored_without_the_others(mine):
    shutil.rmtree(checkpoint.step_dir(mine, 2) / "opt")
    like = abstract(params())
    assert same_bits(checkpoint.restore(mine, 2, "params", like), params(2))
    with pytest.raises(Damaged, match="opt"):
        checkpoint.restore(mine, 2, "opt", abstract(state()["opt"]))


def test_buffers_may_be_donated_while_the_save_runs(tmp_path):
    train = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.arange(1_000_000, dtype=jnp.float32)
    with CheckpointManager(tmp_path, keep=3) as writer:
        for step in range(3):
            writer.save(step, {"params": {"x": x}}, {})
            for _ in range(3):
                x = train(x)
    for step in range(3):
        restored = checkpoint.restore(tmp_path, step, "params", {"x": abstract(x)})["x"]
        assert np.array_equal(restored, np.arange(1_000_000, dtype=np.float32) + 3 * step)


def save_with_losses(folder, losses, best):
    with CheckpointManager(folder, keep=1, keep_best=best) as writer:
        for step, loss in losses.items():
            writer.save(step, {"params": {"x": jnp.ones(3)}}, {}, loss=loss)


def test_the_latest_are_kept_and_those_of_lowest_loss(tmp_path):
    save_with_losses(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None}, best=1)
    assert checkpoint.steps(tmp_path) == [2, 5]
    save_with_losses(tmp_path, {6: 1.5, 7: 2.5}, best=2)  # by another process
    assert checkpoint.steps(tmp_path) == [2, 6, 7]

    # A loss that was changed on disk does not count.
    path = checkpoint.step_dir(tmp_path, 6) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("1.5", "0.5"))
    save_with_losses(tmp_path, {8: 2.6}, best=1)
    assert checkpoint.steps(tmp_path) == [2, 8]
    save_with_losses(tmp_path, {9: 0.5}, best=1)
    assert checkpoint.steps(tmp_path) == [9]


def test_saving_the_latest_step_again_does_nothing(mine):
    before = {p: p.stat().st_mtime_ns for p in files_of(mine, 2)}
    with CheckpointManager(mine, keep=5) as writer:
        writer.save(2, state(7), {}, wait=True)
    assert {p: p.stat().st_mtime_ns for p in files_of(mine, 2)} == before


def test_a_save_that_is_tried_leaves_nothing(tmp_path):
    with CheckpointManager(tmp_path, keep=1) as writer:
        writer.try_save(state(), {})
        assert not list((tmp_path / "checkpoints").iterdir())
        writer.save(0, state(3), METADATA | {"step": 0})
    assert same_bits(restore_all(tmp_path, 0)[1], state(3))


def test_steps_past_the_resumed_one_are_replaced(tmp_path):
    save(tmp_path, 1, 2, 3)
    with CheckpointManager(tmp_path, keep=2, resumed=1) as writer:
        assert checkpoint.steps(tmp_path) == [1, 2, 3]  # nothing is lost before there is a new one
        writer.save(2, state(20), {"step": 20})
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.read_metadata(tmp_path, 2) == {"step": 20}


def test_another_dtype_is_cast_after_verifying(saved):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params())
    restored = checkpoint.restore(saved, 2, "params", like)
    assert same_bits(restored, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(2)))


def test_shapes_that_differ_are_listed(saved):
    like = abstract(params())
    like["blocks"]["q"] = jax.ShapeDtypeStruct((4, 8, 32), jnp.float32)
    like["new"] = like.pop("mask")
    with pytest.raises(UserError) as caught:
        checkpoint.restore(saved, 2, "params", like)
    message = str(caught.value)
    assert "blocks/q: stored (4, 8, 16), expected (4, 8, 32)" in message
    assert "new: stored none, expected (3,)" in message
    assert "mask: stored (3,), expected none" in message
    assert "dotted" not in message and not isinstance(caught.value, Damaged)


def test_a_folder_or_a_step_that_is_not_there_is_named(saved, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no checkpoint in .*: expected a run's folder"):
            newest_metadata(folder)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*: it has \[1, 2\]"):
        checkpoint.read_metadata(saved, 3)


MESH = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests/checkpoint")
import trees as t
from gpt import checkpoint
from gpt.digest import digest

folder = sys.argv[1]
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
specs = [P(None, ("a", "b")), P("b", None, "a")]

def on(spec):
    def one(x):
        fits = x.ndim >= max(2, len(spec)) and x.size
        sharding = NamedSharding(mesh, spec if fits else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(one, t.abstract(t.params()))

for spec in specs:  # written on one device, read onto each of these
    restored = checkpoint.restore(folder, 2, "params", on(spec))
    assert restored["blocks"]["q"].sharding.spec == (spec if len(spec) <= 3 else P())
    assert t.same_bits(restored, t.params(2)), spec
    assert digest(restored) == digest(t.params(2)), spec
with checkpoint.CheckpointManager(folder, 5) as writer:  # written sharded, read onto one device
    writer.save(3, {"params": restored | checkpoint.restore(folder, 2, "params", on(specs[0]))}, {})
assert t.same_bits(checkpoint.restore(folder, 3, "params", t.abstract(t.params())), t.params(2))
print(json.dumps(digest(restored)))
"""


def test_digests_and_arrays_are_the_same_on_a_mesh_of_eight(mine):
    done = run_python(MESH, mine)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digest(params(2))
    written_there = checkpoint.restore(mine, 3, "params", abstract(params()))
    assert same_bits(written_there, params(2))
