"""Checkpoints come back to the bit, on any mesh, or say what is wrong with them."""

import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import run_python, same_bits

from gpt import checkpoint
from gpt.checkpoint import FORMAT, CheckpointManager, Damaged
from gpt.digest import digest, digest_array
from gpt.errors import UserError

METADATA = {"text": "今天", "none": None, "fraction": 0.1, "nested": {"list": [1, 2]}}


def params(seed: int = 0):
    return {
        "blocks": {
            "q": jax.random.normal(jax.random.key(seed), (4, 8, 16)),
            "scale": jax.random.normal(jax.random.key(seed + 1), (4, 8), jnp.bfloat16),
        },
        "dotted.name": jnp.arange(5, dtype=jnp.int32) + seed,
        "mask": jnp.array([1, 0, 1], jnp.int8),
        "scalar": jnp.float32(3 + seed),
        "bits": jnp.array([0, 2**32 - 1], jnp.uint32),
        "odd": jnp.array([jnp.nan, -jnp.inf, -0.0]),
    }


def state(seed: int = 0):
    """Trees as a training run has them: nested dicts, an optimizer's NamedTuples, a tuple."""
    weights = params(seed)
    return {"params": weights, "opt": (optax.adamw(1e-3).init(weights), jnp.int32(seed))}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def save(folder, *steps):
    with CheckpointManager(folder, keep=10) as writer:
        for step in steps:
            writer.save(step, state(step), METADATA | {"step": step})


def files_of(folder, step):
    return sorted(p for p in checkpoint.step_dir(folder, step).rglob("*") if p.is_file())


def newest_metadata(folder):
    return checkpoint.latest_good(folder, lambda step: checkpoint.read_metadata(folder, step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2, to read from or to copy."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def mine(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_trees_and_metadata_come_back_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/mine", 2)  # a relative path
    assert checkpoint.read_metadata("runs/mine", 2) == METADATA | {"step": 2}
    for name, tree in state(2).items():
        assert same_bits(checkpoint.restore("runs/mine", 2, name, abstract(tree)), tree)


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
    assert checkpoint.saved_steps(tmp_path) == [2, 5]
    save_with_losses(tmp_path, {6: 1.5, 7: 2.5}, best=2)  # by another process
    assert checkpoint.saved_steps(tmp_path) == [2, 6, 7]

    # A loss that was changed on disk does not count.
    path = checkpoint.step_dir(tmp_path, 6) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("1.5", "0.5"))
    save_with_losses(tmp_path, {8: 2.6}, best=1)
    assert checkpoint.saved_steps(tmp_path) == [2, 8]
    save_with_losses(tmp_path, {9: 0.5}, best=1)
    assert checkpoint.saved_steps(tmp_path) == [9]


def test_a_save_that_is_tried_leaves_nothing(tmp_path):
    with CheckpointManager(tmp_path, keep=1) as writer:
        writer.try_save(state(), {})
        assert not list((tmp_path / "checkpoints").iterdir())
        writer.save(0, state(3), {})
    assert same_bits(checkpoint.restore(tmp_path, 0, "params", abstract(params())), params(3))


def test_steps_past_the_resumed_one_are_replaced(tmp_path):
    save(tmp_path, 1, 2, 3)
    with CheckpointManager(tmp_path, keep=2, resumed=1) as writer:
        # Nothing is lost before there is a new one.
        assert checkpoint.saved_steps(tmp_path) == [1, 2, 3]
        writer.save(2, state(20), {"step": 20})
    assert checkpoint.saved_steps(tmp_path) == [1, 2]
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


# Damage is passed over by name, or nothing has changed: never in silence.


def damages(data: bytes, flips: int, random: np.random.Generator):
    """The file deleted, cut in half, and with one bit flipped, `flips` times."""
    yield None
    yield data[: len(data) // 2]
    for _ in range(flips):
        flipped = bytearray(data)
        flipped[random.integers(len(data))] ^= 1 << random.integers(8)
        yield bytes(flipped)


@pytest.mark.parametrize("flips", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_any_damage_to_the_newest_falls_back_or_changes_nothing(flips, tmp_path):
    with CheckpointManager(tmp_path, keep=2) as manager:
        for step in (1, 2):
            manager.save(step, {"params": params(step)}, METADATA | {"step": step})

    def load(step):
        restored = checkpoint.restore(tmp_path, step, "params", abstract(params()))
        return checkpoint.read_metadata(tmp_path, step), restored

    random, fallbacks = np.random.default_rng(0), 0
    for path in files_of(tmp_path, 2):
        whole = path.read_bytes()
        for data in damages(whole, flips, random):
            path.unlink() if data is None else path.write_bytes(data)
            step, (metadata, restored), notes = checkpoint.latest_good(tmp_path, load)
            assert metadata == METADATA | {"step": step} and same_bits(restored, params(step))
            assert len(notes) == 2 - step and all("checkpoints/2" in note for note in notes)
            fallbacks += step == 1
        path.write_bytes(whole)
    assert fallbacks > 10


def test_a_flipped_bit_in_the_weights_names_the_array(mine):
    data_files = [path for path in files_of(mine, 2) if "params/ocdbt.process_0/d" in str(path)]
    path = max(data_files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    at = data.find(np.asarray(params(2)["blocks"]["q"]).tobytes()[:8])  # stored as it is, if found
    data[at if at >= 0 else len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"2/params is damaged: blocks/q: not what was saved"):
        checkpoint.restore(mine, 2, "params", abstract(params()))


def test_an_error_that_is_no_damage_is_not_passed_over(saved):
    def load(step):
        raise UserError("another model")

    with pytest.raises(UserError, match=r"^another model$"):
        checkpoint.latest_good(saved, load)


def test_a_checkpoint_of_another_version_is_refused(mine, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", FORMAT + 1)
    save(mine, 3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="checkpoints/3 was made by another version"):
        newest_metadata(mine)


# What orbax does besides raising


QUIET = """
import sys
import jax
from gpt import checkpoint

folder, x = sys.argv[1], jax.numpy.ones((8, 16))
trees = {"params": {str(i): x for i in range(7)}, "opt": {"x": x}}
with checkpoint.CheckpointManager(folder, keep=2) as manager:
    for step in (1, 2, 3):
        manager.save(step, trees, {})
load = lambda step: [checkpoint.restore(folder, step, *named) for named in trees.items()]
for name in ("opt/_METADATA", "params/manifest.ocdbt"):  # orbax fails early, or among many reads
    path = checkpoint.step_dir(folder, 3) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    step, _, damaged = checkpoint.latest_good(folder, load)
    assert step == 2 and len(damaged) == 1, (step, damaged)
    path.write_bytes(whole)
"""


def test_orbax_reaches_the_terminal_neither_in_success_nor_in_damage(tmp_path):
    done = run_python("-c", QUIET, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# A save that fails, and one that is killed

FULL = """
import os, resource, signal, sys, time
import jax
from gpt import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trees = {"params": {"x": jax.random.normal(jax.random.key(0), (300, 1000))}}
with checkpoint.CheckpointManager(sys.argv[1], keep=1) as manager:
    manager.save(1, trees, {}, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for step in (2, 3):
        try:
            manager.save(step, trees, {})
            time.sleep(0.5)  # for threads in the background to log what they meet
            manager.wait()
        except checkpoint.SaveFailed as error:
            assert f"step {step} could not be saved" in str(error), error
            assert "the last good one is step 1" in str(error), error
        else:
            raise SystemExit("a save without room succeeded")
    assert os.listdir(sys.argv[1] + "/checkpoints") == ["1"]  # the room is free again
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    os.mkdir(sys.argv[1] + "/checkpoints/2.orbax-checkpoint-tmp")  # a slow thread of that save
    manager.save(3, trees, {}, wait=True)
    assert os.listdir(sys.argv[1] + "/checkpoints") == ["3"]
    manager.save(4, trees, {})
    sys.stdout.flush()
    os._exit(9)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_save_that_fails_or_is_killed_harms_nothing_and_leaves_nothing(tmp_path):
    done = run_python("-c", FULL, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")

    # Killed in the middle of a save; as it may have been quick, a partly written one is made sure.
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    killed = checkpoint.saved_steps(tmp_path)
    assert killed in ([3], [4], [3, 4])
    assert newest_metadata(tmp_path)[::2] == (killed[-1], [])
    save(tmp_path, 6)
    assert set(os.listdir(tmp_path / "checkpoints")) == {*map(str, killed), "6"}
