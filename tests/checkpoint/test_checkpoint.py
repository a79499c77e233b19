"""Checkpoints come back to the bit, on any mesh, or say what is wrong with them."""

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
    same_bits,
    save,
    state,
)

from gpt import checkpoint
from gpt.checkpoint import CheckpointManager, Damaged
from gpt.digest import digest, digest_array
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


# The digest sees any one changed element, and agrees with an independent computation.


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16"]
SHAPES = [(), (7,), (3, 1, 5), (2, 3, 4, 5)]


def in_numpy(x: np.ndarray) -> int:
    """The digest in 64-bit integers, element by element."""
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}").astype(np.uint64)
    low = np.uint64(2**32 - 1)
    h = bits ^ (np.arange(bits.size, dtype=np.uint64) * np.uint64(0x9E3779B1) & low)
    h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & low
    h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & low
    return int(np.sum(h ^ (h >> np.uint64(16))) % 2**32)


def test_it_agrees_with_numpy_for_every_type_and_shape():
    random, tree = np.random.default_rng(0), {}
    for dtype in DTYPES:
        for shape in SHAPES:
            values = random.normal(scale=50, size=shape)
            tree[f"{dtype} {shape}"] = jnp.asarray(values).astype(dtype)
    assert digest(tree) == {name: in_numpy(np.asarray(x)) for name, x in tree.items()}


@pytest.mark.parametrize("axis", [None, 0])
def test_any_flipped_bit_is_seen(axis):
    x = np.arange(100, dtype=np.float32).reshape(4, 25)
    flipped = np.repeat(x[None], 3200, axis=0)
    for i in range(3200):
        flipped[i].reshape(-1).view(np.uint32)[i // 32] ^= np.uint32(1 << i % 32)
    digests = jax.jit(jax.vmap(lambda x: digest_array(x, axis)))(flipped)
    assert not np.any(np.asarray(digests) == digest_array(jnp.asarray(x), axis))


def test_exchanged_elements_are_seen():
    x = jnp.arange(12.0).reshape(3, 4)
    both = digest({"x": x, "rows": x[::-1], "columns": x[:, ::-1]})
    assert len(set(both.values())) == 3
    assert digest({"x": jnp.zeros(4)}) != digest({"x": -jnp.zeros(4)})
