"""Fused attention: when it is chosen, and that it is the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from programs import program

from gpt import sharding
from gpt.config import MeshConfig, ModelConfig, TrainConfig
from gpt.errors import UserError
from gpt.model import attention, blockwise_attention, flash_attention, transformer
from gpt.sampling import engine
from gpt.sharding import AXES
from gpt.training import step_functions
from gpt.training.loss import attention_for

CONFIG = ModelConfig(64, context_length=32, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32)
CONFIG = CONFIG.computing_in("bfloat16")
TOKENS = jnp.zeros((2, 8), int)


@pytest.fixture
def seen(monkeypatch):
    """Shapes of queries and keys that a kernel is asked for, planted here: the plain form."""
    asked = []

    def kernel(q, k, v):
        asked.append((q.shape, k.shape))
        return attention.plain_attention(q, k, v)

    def fits(n_tokens, width, dtype):
        return dtype == jnp.bfloat16

    monkeypatch.setitem(flash_attention.KERNELS, flash_attention.platform(), (kernel, fits))
    return asked


def test_splash_attention_is_attention(monkeypatch):
    """Interpreted: the kernel that a TPU compiles, over several tiles, for grouped queries."""
    parity = program("benchmarks/parity")
    interpreted = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", interpreted)
    monkeypatch.setattr(flash_attention, "TILES", (128,))
    arrays = parity.inputs(T=256, N=2, K=1, H=24, B=1)
    assert parity.agree(parity.compare(flash_attention.by_splash, arrays))
    assert not parity.agree(parity.compare(lambda q, k, v: parity.plain(q * 1.05, k, v), arrays))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_attention_in_blocks_is_attention(n_kv_heads):
    """The form of a CPU: values and gradients, and no query reads a later slot."""
    rng = np.random.default_rng(0)
    q_BTNH, weight_BTNH = jnp.asarray(rng.normal(size=(2, 2, 256, 4, 8)), jnp.float32)
    k_BKSH, v_BKSH = jnp.asarray(rng.normal(size=(2, 2, n_kv_heads, 256, 8)), jnp.float32)
    assert flash_attention.kernel_for(q_BTNH) is blockwise_attention.by_blocks
    results = []
    for attend in (flash_attention.fused_attention, attention.plain_attention):

        @jax.jit
        def mix_of(q, k, v, attend=attend):
            return attend(q, k, v)

        mix, gradient = jax.vjp(mix_of, q_BTNH, k_BKSH, v_BKSH)
        results.append([mix, *gradient(weight_BTNH)])
        mix = mix_of(q_BTNH, k_BKSH, v_BKSH)
        changed = mix_of(q_BTNH, k_BKSH.at[:, :, 200:].set(9.0), v_BKSH)
        assert np.array_equal(mix[:, :200], changed[:, :200])
        assert not np.allclose(mix[:, 200:], changed[:, 200:])
    for ours, plain in zip(*results, strict=True):
        assert np.abs(ours - plain).max() <= 2e-6 * np.abs(plain).max()


def test_training_and_prefill_choose_the_kernel(seen):
    params = transformer.abstract(CONFIG)
    # Dropout keeps from it only where it is on: evaluation and sampling give no keys.
    forward = functools.partial(transformer.forward, dataclasses.replace(CONFIG, dropout=0.5))
    keys = jax.random.split(jax.random.key(1), 2)
    jax.eval_shape(forward, params, TOKENS, dropout_key_B=keys)
    assert not seen
    jax.eval_shape(forward, params, TOKENS)
    assert seen == [((2, 8, 4, 8), (2, 2, 8, 8))]  # blocks are scanned over: traced once
    unstacked = jax.eval_shape(transformer.unstack, params)
    lengths = jnp.ones(2, int)
    cache, _ = jax.eval_shape(functools.partial(engine.prefill, CONFIG), unstacked, TOKENS, lengths)
    assert len(seen) == 3  # one for each of two layers more
    # Not on top of a cache, nor in a type that the kernel does not take.
    jax.eval_shape(functools.partial(engine.extend, CONFIG), unstacked, cache, TOKENS, lengths)
    exact = dataclasses.replace(CONFIG, compute_dtype="float32")
    jax.eval_shape(functools.partial(transformer.forward, exact), params, TOKENS)
    assert len(seen) == 3


def test_a_run_chooses_the_plain_form_or_insists_on_the_kernel(seen, monkeypatch):
    config = TrainConfig(model=CONFIG, attention="fused", grad_accum=1)
    params = transformer.abstract(CONFIG)
    plain = dataclasses.replace(config, attention="plain")
    jax.eval_shape(functools.partial(step_functions.objective, plain), params, TOKENS)
    assert not seen
    jax.eval_shape(functools.partial(step_functions.objective, config), params, TOKENS)
    assert seen
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    deterministic = dataclasses.replace(config, deterministic=True)
    for possible in (config, deterministic):
        assert step_functions.require_even_split(possible, mesh) == []
    for refused in ({"dropout": 0.1}, {"compute_dtype": "float32"}):
        model = dataclasses.replace(CONFIG, **refused)
        with pytest.raises(UserError, match="--attention fused: no kernel fits"):
            step_functions.require_even_split(dataclasses.replace(config, model=model), mesh)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    with pytest.raises(UserError, match="cannot be combined with --deterministic on a GPU"):
        step_functions.require_even_split(deterministic, mesh)


@pytest.mark.parametrize(
    ("n_tokens", "precision", "fits"),
    [(384, "default", True), (384, "highest", False), (192, "default", False)],
)
def test_a_tpu_needs_whole_tiles_and_no_higher_precision(n_tokens, precision, fits):
    with jax.default_matmul_precision(precision):
        assert flash_attention.fits_splash(n_tokens, 64, jnp.bfloat16) == fits


def test_a_deterministic_run_on_a_gpu_does_without_cudnn(monkeypatch):
    """Long sequences in blocks, short ones by the plain form."""
    monkeypatch.setattr(flash_attention, "platform", lambda: "gpu")
    monkeypatch.setitem(flash_attention.KERNELS, "gpu", (pytest.fail, lambda *_: True))
    monkeypatch.setattr(flash_attention, "on_each_device", lambda kernel, *_: kernel)
    attend = attention_for(TrainConfig(CONFIG, deterministic=True))
    long, short = (jnp.ones((1, T, 2, 8), jnp.bfloat16) for T in (256, 20))
    assert attend(long, long, long) is blockwise_attention.by_blocks
    mix = attend(short, short.swapaxes(1, 2), short.swapaxes(1, 2))
    assert np.array_equal(mix, short)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_shape", "k_shape"),
    [
        (8, 4, (2, 16, 4, 8), (2, 2, 16, 8)),
        (8, 1, (2, 16, 4, 8), (2, 4, 16, 8)),  # one for each query head
        (3, 1, (2, 16, 3, 8), (2, 1, 16, 8)),  # neither divides: all on each device
    ],
)
def test_each_device_of_a_mesh_does_its_rows_and_heads(heads, kv_heads, q_shape, k_shape, seen):
    """Traced for a mesh that is not here."""
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    shapes = (8, 16, heads, 8), (8, kv_heads, 16, 8), (8, kv_heads, 16, 8)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        mix = jax.eval_shape(lambda q, k, v: flash_attention.fused_attention(q, k, v), *arrays)
    assert mix.shape == shapes[0] and seen == [(q_shape, k_shape)]


@pytest.mark.parametrize(
    ("kind", "fits", "fits_wide_heads"),
    [
        ("NVIDIA H100 80GB HBM3", True, True),
        ("NVIDIA GH200 480GB", True, True),
        ("NVIDIA A100-SXM4-40GB", True, False),
        ("NVIDIA GeForce RTX 2080 Ti", False, False),
        ("Tesla V100-SXM2-16GB", False, False),
        ("AMD Instinct MI300X", False, False),
    ],
)
def test_cudnn_is_chosen_by_the_gpu_that_is_compiled_for(kind, fits, fits_wide_heads, monkeypatch):
    """Which need not be here, as when a plan is made for it: no GPU of this machine is asked."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    types = (AxisType.Auto,) * 3
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert flash_attention.platform() == "gpu"
        assert flash_attention.fits_cudnn(1024, 64, jnp.bfloat16) == fits
        assert not flash_attention.fits_cudnn(1024, 60, jnp.bfloat16)
        # JAX allows wider heads by the GPU that it finds, and here it finds none.
        assert not flash_attention.fits_cudnn(1024, 256, jnp.bfloat16)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert flash_attention.fits_cudnn(1024, 256, jnp.bfloat16) == fits_wide_heads


@pytest.mark.parametrize("n_times", [1, 2])
def test_a_token_sees_its_row_as_far_as_it_stands(n_times):
    """A token that is read twice sees the same both times."""
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).normal(size=(3, 16, 2, 8)), "float32")
        for i in range(3)
    )
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    pos_BT = jnp.array([[3], [15], [0]])
    one = attention.plain_attention(q[:, :1], k, v, pos_BT, None)
    tokens = jnp.repeat(q[:, :1], n_times, axis=1)
    again = pos_BT + jnp.arange(n_times)
    mix = flash_attention.decode_attention(tokens, k, v, again, None)
    assert all(np.array_equal(mix[:, i], one[:, 0]) for i in range(n_times))
