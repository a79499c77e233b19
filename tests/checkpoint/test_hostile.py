"""A checkpoint from a stranger is refused in a sentence, before memory is taken or code is run."""

import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import checkpoint
from gpt.checkpoint import Damaged
from gpt.checkpoint.record import MOST_JSON, seal
from gpt.errors import UserError


def forge(folder, at, **changes):
    """Change what a checkpoint says of itself, and seal it anew as anyone can."""
    path = checkpoint.place_of(folder, at) / "_CHECKPOINT_METADATA"
    outer = json.loads(path.read_text())
    record = outer["custom_metadata"] | changes
    record.pop("sha256")
    path.write_text(json.dumps(outer | {"custom_metadata": seal(record)}))


def claim(shape, dtype="float32"):
    """A tree of one array, as a record describes it."""
    return {"params": {"x": {"shape": shape, "dtype": dtype, "digest": 0}}}


def like(shape):
    return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}


def test_arrays_larger_than_all_memory_are_refused_before_it_is_taken(mine):
    forge(mine, 2, arrays=claim([10**8, 10**7]))
    with pytest.raises(UserError, match=r"asks for 3,725,290\.3 GiB, more than the .* here"):
        checkpoint.restore(mine, 2, "params", like((10**8, 10**7)))


def test_shapes_that_the_files_do_not_have_are_damage(mine):
    forge(mine, 2, arrays=claim([1000]))
    with pytest.raises(Damaged, match="2/params is damaged"):
        checkpoint.restore(mine, 2, "params", like((1000,)))


def test_metadata_larger_than_any_are_not_read(mine):
    for path in ("_CHECKPOINT_METADATA", "params/_METADATA"):
        with (checkpoint.place_of(mine, 2) / path).open("r+b") as file:
            size = file.seek(0, 2)
            file.truncate(MOST_JSON + 1)  # a hole: it takes no disk
        with pytest.raises(Damaged, match=r"67,108,865 bytes"):
            checkpoint.read_metadata(mine, 2)
        with (checkpoint.place_of(mine, 2) / path).open("r+b") as file:
            file.truncate(size)
    assert checkpoint.read_metadata(mine, 2)["step"] == 2


def test_a_renamed_step_is_not_taken_for_another(mine):
    checkpoint.place_of(mine, 2).rename(checkpoint.place_of(mine, 100))
    with pytest.raises(Damaged, match="it was saved as step 2"):
        checkpoint.read_metadata(mine, 100)


def test_what_the_metadata_lack_is_named(mine):
    with pytest.raises(UserError, match="does not say its 'tokenizer'"):
        checkpoint.read_metadata(mine, 2)["tokenizer"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ARRAY = st.fixed_dictionaries(
    {"shape": JSON | st.just([4]), "dtype": JSON | st.just("int32"), "digest": JSON}
)
WILD = JSON | st.dictionaries(st.just("params"), JSON | st.dictionaries(st.just("x"), JSON | ARRAY))


@settings(max_examples=60)
@given(arrays=WILD, metadata=JSON, step=JSON)
def test_wild_records_are_refused_in_a_sentence(saved, arrays, metadata, step):
    path = checkpoint.place_of(saved, 1) / "_CHECKPOINT_METADATA"
    whole = path.read_text()
    try:
        forge(saved, 1, arrays=arrays, metadata=metadata, step=step)
        with pytest.raises(UserError):
            checkpoint.restore(saved, 1, "params", like((4,)))
    finally:
        path.write_text(whole)


@settings(max_examples=60)
@given(content=st.binary(max_size=30) | JSON.map(lambda x: json.dumps(x).encode()))
def test_wild_files_are_refused_in_a_sentence(saved, content):
    path = checkpoint.place_of(saved, 1) / "_CHECKPOINT_METADATA"
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(UserError):
            checkpoint.read_metadata(saved, 1)
    finally:
        path.write_bytes(whole)
