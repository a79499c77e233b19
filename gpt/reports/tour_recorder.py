"""Record a prompt's way through a model, from the forward pass itself.

The `attend` argument of the forward pass calls the model's own attention and keeps its inputs and
outputs. Shape letters: gpt/model/transformer.py; P is the number of positions read, first by
prefill, then by decode steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich import filesize

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.model.attention import plain_attention
from gpt.sampling import engine, sampler
from gpt.sampling.prompts import Prompt, read_prompt
from gpt.sampling.sampler import SamplingParams
from gpt.sampling.settings import Settings

LENS_TOP = 5  # likeliest tokens kept per layer's prediction
MAX_BYTES = 14_000_000  # of recorded arrays, as encoded in the page


@dataclass(frozen=True)
class ModelCall:
    """One call of the model: the prefill, or a decode step.

    `arrays`, for every layer: q_LTNH, k_LKSH, v_LKSH, scores_LTNS, weights_LTNS, mix_LTNH.
    `logits_TV`: after each token read.
    """

    tokens: list[int]
    first_position: int
    arrays: dict[str, np.ndarray]
    logits_TV: np.ndarray

    @property
    def n_slots(self) -> int:
        """Cache slots after the call."""
        return self.arrays["k"].shape[2]


@dataclass(frozen=True)
class SampledToken:
    """How a token was chosen.

    `stages`: the model's probabilities [V], then those after each setting, by name. `uniform`: the
    random number that picked the token; None if the likeliest was taken.
    """

    token: int
    stages: dict[str, np.ndarray]
    uniform: float | None


@dataclass(frozen=True)
class TourRecord:
    """The prefill and the decode steps, the token sampled after each, and the logit lens.

    `lens_ids`, `lens_probs` [layers, P, LENS_TOP]: what the residual stream predicts after each of
    `lens_layers`, where 0 is the embedding.
    """

    config: ModelConfig
    prompt: str
    prompt_ids: list[int]
    calls: list[ModelCall]
    sampled: list[SampledToken]
    lens_layers: list[int]
    lens_ids: np.ndarray
    lens_probs: np.ndarray

    @property
    def read_ids(self) -> list[int]:
        """The P tokens that the model has read."""
        return [token for call in self.calls for token in call.tokens]

    def by_position(self, name: str) -> np.ndarray:
        """`q` or `mix` of all calls, [L, P, N, H]."""
        return np.concatenate([call.arrays[name] for call in self.calls], axis=1)

    def cached(self, name: str) -> np.ndarray:
        """`k` or `v` as the last call read them from the cache, [L, K, P, H]."""
        return self.calls[-1].arrays[name][:, :, : len(self.read_ids)]

    def attention_map(self, name: str) -> np.ndarray:
        """`scores` or `weights`, [L, N, P, P]; 0 where the key did not exist yet."""
        P = len(self.read_ids)
        rows = []
        for call in self.calls:
            rows_LTNS = call.arrays[name][..., :P]
            rows.append(np.pad(rows_LTNS, [(0, 0)] * 3 + [(0, P - rows_LTNS.shape[-1])]))
        return np.concatenate(rows, axis=1).transpose(0, 2, 1, 3)


def record_tour(model, prompt: Prompt, settings: Settings) -> TourRecord:
    """Read `prompt`, text or token ids, and sample up to `settings.max_new_tokens` after it.

    `model`: as `gpt.load` returns it, on one device. Raises UserError if the text exceeds the
    model's context or what a page can hold, or if the model's output is not finite.
    """
    config, params = model.config, model.params
    context = config.context_length
    read = read_prompt(model, prompt)
    T = len(read.ids)
    require(
        len(read.ids) <= context,
        f"the prompt has {T} tokens: expected at most the model's context of {context}",
    )
    n_new = min(settings.max_new_tokens, context + 1 - T)
    require_page_size(config, T + n_new - 1)

    # Prefill, then grow the cache for everything that follows.
    call, cache = call_model(config, params, kv.empty(config, 1), read.ids)
    cache = engine.grow(cache, engine.bucket(T + n_new - 1, context))
    calls = [call]
    sampled = []

    # Sample a token and read it, until the last one.
    bias_BV = [sampler.logit_bias(model, settings)]
    sampling = sampler.sampling_params([settings], bias_BV, [read])
    names = active_settings(settings)
    seen_V = np.zeros(config.vocab_size, bool)
    seen_V[read.ids] = True
    while True:
        require(
            bool(np.isfinite(call.logits_TV).all()),
            "the model's output is not a number: its training diverged or its weights are damaged; "
            "use another checkpoint",
        )
        position_B = np.array([T + len(sampled)], np.int32)
        drawn = sample_recording(call.logits_TV[-1:], sampling, seen_V[None], position_B, names)
        token, uniform, stages = jax.device_get(drawn)
        stages = dict(zip(("the model", *names), stages, strict=True))
        number = None if settings.temperature == 0 else float(uniform)
        sampled.append(SampledToken(int(token), stages, number))
        if token in model.special_ids.ends or len(sampled) == n_new:
            break
        seen_V[token] = True
        call, cache = call_model(config, params, cache, [int(token)])
        calls.append(call)

    read_ids = [token for call in calls for token in call.tokens]
    lens = logit_lens(config, params, read_ids)
    return TourRecord(config, read.text, read.ids, calls, sampled, *lens)


def require_page_size(config: ModelConfig, n_positions: int) -> None:
    """Raise UserError if the arrays for this many positions are too large for a page."""
    L, N, K, H = config.n_layers, config.n_heads, config.kv_heads, config.head_width
    n_numbers = L * n_positions * (2 * N * n_positions + (N + 2 * K) * H)
    n_bytes = n_numbers * 2 * 4 / 3  # two bytes each, as base64
    require(
        n_bytes <= MAX_BYTES,
        f"a page of {n_positions} positions of this model would have {filesize.decimal(n_bytes)}: "
        f"expected at most {filesize.decimal(MAX_BYTES)}; give a shorter prompt or a smaller "
        "--max-new-tokens",
    )


# A call of the model


def call_model(config: ModelConfig, params: dict, cache: kv.KVCache, tokens: Sequence[int]):
    """Read `tokens` after those in `cache`; return a ModelCall and the new cache."""
    tokens_BT = jnp.array([tokens], jnp.int32)
    new_cache, logits_BTV, arrays = forward_recording(config, params, cache, tokens_BT)
    call = ModelCall(
        tokens=list(tokens),
        first_position=int(cache.length_B[0]),
        arrays={name: np.asarray(array) for name, array in arrays.items()},
        logits_TV=np.asarray(logits_BTV[0]),
    )
    return call, new_cache


@partial(jax.jit, static_argnames="config")
def forward_recording(config: ModelConfig, params: dict, cache: kv.KVCache, tokens_BT: jax.Array):
    """The forward pass: the new cache, logits_BTV, and the arrays of every layer."""
    layers: list[dict] = []

    def recording_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, _):
        B, T, N, H = q_BTNH.shape
        K, S = k_BKSH.shape[1:3]

        # Attention passes its weights to the dropout function; this one keeps them.
        kept = []

        def keep(weights_BKGTS):
            kept.append(weights_BKGTS)
            return weights_BKGTS

        mix_BTNH = plain_attention(q_BTNH, k_BKSH, v_BKSH, pos_BT, keep)
        (weights_BKGTS,) = kept
        weights_BTKGS = weights_BKGTS.transpose(0, 3, 1, 2, 4)

        # Every query times every key, before scaling and masking.
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        product = "BTKGH,BKSH->BTKGS"
        scores_BTKGS = jnp.einsum(product, q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
        arrays = {
            "q": q_BTNH,
            "k": k_BKSH,
            "v": v_BKSH,
            "scores": scores_BTKGS.reshape(B, T, N, S),
            "weights": weights_BTKGS.reshape(B, T, N, S),
            "mix": mix_BTNH,
        }
        layers.append({name: array[0].astype(jnp.float32) for name, array in arrays.items()})
        return mix_BTNH

    model = transformer.bind(config, params)
    x_BTD, cache = model.hidden(tokens_BT, cache, attend=recording_attention)
    logits_BTV = model.unembed(x_BTD)
    arrays = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return cache.advanced(jnp.int32(tokens_BT.shape[1])), logits_BTV, arrays


# A sampled token


def active_settings(settings: Settings) -> tuple[str, ...]:
    """The settings that change the distribution, in order of application."""
    s = settings
    filters = s.temperature != 0
    active = {
        "penalty": s.repetition_penalty != 1 or bool(s.logit_bias) or s.ignore_eos,
        "temperature": s.temperature not in (0, 1),
    }
    for name, token_filter in sampler.FILTERS.items():
        active[name.replace("_", "-")] = filters and getattr(s, name) != token_filter.off
    return tuple(name for name, is_active in active.items() if is_active)


@partial(jax.jit, static_argnames="names")
def sample_recording(logits_BV, rows: SamplingParams, seen_BV, position_B, names: tuple[str, ...]):
    """Row 0's token, the random number that picked it, and the probabilities [V] before and after
    each of the settings `names`."""
    token_B = sampler.sample(logits_BV, rows, seen_BV, position_B)
    adjusted_BV = sampler.adjust_logits(logits_BV, rows, seen_BV)

    # Turn all filters off, then on one by one.
    filters = {
        field: jnp.full_like(rows.filters[field], token_filter.off)
        for field, token_filter in sampler.FILTERS.items()
    }
    stages = [logits_BV]
    for name in names:
        field = name.replace("-", "_")
        if field in sampler.FILTERS:
            filters = filters | {field: rows.filters[field]}
        if name == "penalty":
            stages.append(adjusted_BV)
        else:
            stages.append(sampler.filter_logits(adjusted_BV, replace(rows, filters=filters)))
    probs = [jax.nn.softmax(stage_BV[0]) for stage_BV in stages]
    return token_B[0], sampler.uniform(rows, position_B)[0], probs


# The logit lens (nostalgebraist 2020)


def logit_lens(config: ModelConfig, params: dict, tokens: Sequence[int]):
    """Apply the head to the residual stream after each layer: the layers, and ids and probabilities
    [layers, P, LENS_TOP] of the likeliest next tokens.

    A post-norm model has no residual stream before its first layer, so its layers begin at 1. Not
    jitted, since each number of layers would compile separately.
    """
    first = 0 if config.norm_place == "pre" else 1
    layers = list(range(first, config.n_layers + 1))
    ids, probs = [], []
    for n_layers in layers:
        blocks = {i: params["blocks"][i] for i in range(max(n_layers, 1))}
        if n_layers == 0:  # a block of zeros adds nothing to the embedding
            blocks = jax.tree.map(jnp.zeros_like, blocks)
        shorter = replace(config, n_layers=len(blocks))
        logits_BTV = transformer.forward(shorter, params | {"blocks": blocks}, jnp.array([tokens]))
        probs_TV = jax.nn.softmax(logits_BTV[0])
        top_probs, top_ids = jax.lax.top_k(probs_TV, min(LENS_TOP, config.vocab_size))
        ids.append(top_ids)
        probs.append(top_probs)
    return layers, np.stack(ids), np.stack(probs)
