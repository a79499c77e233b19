"""A prompt on its way through the model, written down by the forward pass itself.

Nothing is computed a second time in another way: a recorder enters by the `attend` door, calls the
model's own attention and keeps what passed. Shape letters: see model/transformer.py; P counts the
positions that were read, by prefill and then by decode steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt.config import ModelConfig
from gpt.errors import require
from gpt.model import kv_cache as kv
from gpt.model import transformer
from gpt.model.attention import Attend, attend
from gpt.sampling import engine, generate, sampler
from gpt.sampling.sampler import Draw
from gpt.sampling.settings import Settings

LENS_TOP = 5  # likeliest tokens kept of each layer's prediction
MOST_BYTES = 14_000_000  # of recorded numbers, as a page holds them


@dataclass(frozen=True)
class Reading:
    """One call of the model. `kept`: q_LTNH, k_LKSH, v_LKSH, scores_LTNS, weights_LTNS, mix_LTNH.

    `logits_TV` of each token that was read; `written`: the cache's slots that it changed.
    """

    tokens: list[int]
    first: int  # position of the first of the tokens
    kept: dict[str, np.ndarray]
    logits_TV: np.ndarray
    written: list[int]
    capacity: int


@dataclass(frozen=True)
class Drawing:
    """How a token was drawn. `stages`: probabilities [V] as each setting left them, by name.

    `uniform`: the number that picked it, None where the likeliest was taken.
    """

    token: int
    stages: dict[str, np.ndarray]
    uniform: float | None


@dataclass(frozen=True)
class Journey:
    """All of it: a prefill and decode steps, what was drawn after each, the logit lens.

    `lens_ids`, `lens_probs` [layers, P, K]: what the residual stream would predict after each
    layer; `lens_layers` names them, 0 for the embedding. `by_ids`: the prompt was given as ids,
    and `prompt` is what they spell.
    """

    config: ModelConfig
    prompt: str
    prompt_ids: list[int]
    readings: list[Reading]
    drawings: list[Drawing]
    lens_layers: list[int]
    lens_ids: np.ndarray
    lens_probs: np.ndarray
    by_ids: bool = False

    @property
    def read_ids(self) -> list[int]:
        """Tokens that the model has read, P of them."""
        return [token for reading in self.readings for token in reading.tokens]

    def joined(self, name: str) -> np.ndarray:
        """`q` or `mix`, [L, P, N, H], of all readings."""
        return np.concatenate([reading.kept[name] for reading in self.readings], axis=1)

    def cached(self, name: str) -> np.ndarray:
        """`k` or `v`, [L, K, P, H], as the last reading found them in the cache."""
        return self.readings[-1].kept[name][:, :, : len(self.read_ids)]

    def map(self, name: str) -> np.ndarray:
        """`scores` or `weights`, [L, N, P, P]; 0 where a key did not exist yet."""
        P = len(self.read_ids)
        parts = []
        for reading in self.readings:
            part_LTNS = reading.kept[name][..., :P]
            parts.append(np.pad(part_LTNS, [(0, 0)] * 3 + [(0, P - part_LTNS.shape[-1])]))
        return np.concatenate(parts, axis=1).transpose(0, 2, 1, 3)


def recorder(kept: list) -> Attend:
    """The model's attention, which also appends to `kept` what it was given and what it made."""

    def look(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop):
        mix_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, pos_BT, drop)
        seen = {
            "q": q_BTNH,
            "k": k_BKSH,
            "v": v_BKSH,
            "scores": dot(q_BTNH, k_BKSH),
            "weights": find_weights(q_BTNH, k_BKSH, pos_BT, drop),
            "mix": mix_BTNH,
        }
        kept.append({name: array[0].astype(jnp.float32) for name, array in seen.items()})
        return mix_BTNH

    return look


def dot(q_BTNH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """q k for every query and key, before scale and mask, [B, T, N, S] in float32."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BKSH->BTKGS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    return scores.reshape(B, T, N, S)


def find_weights(q_BTNH: jax.Array, k_BKSH: jax.Array, pos_BT, drop) -> jax.Array:
    """The weights that `attend` mixes values by, [B, T, N, S].

    They are what it makes of values that are the rows of an identity: slot s alone has a 1 in
    column s. As many columns at a time as a head is wide.
    """
    S, H = k_BKSH.shape[2:]
    identity_SC = jnp.eye(S, math.ceil(S / H) * H, dtype=k_BKSH.dtype)
    parts = [
        attend(q_BTNH, k_BKSH, jnp.broadcast_to(part_SH, k_BKSH.shape), pos_BT, drop)
        for part_SH in jnp.split(identity_SC, identity_SC.shape[1] // H, axis=1)
    ]
    return jnp.concatenate(parts, axis=-1)[..., :S]


@partial(jax.jit, static_argnames="config")
def look_on(config: ModelConfig, params: dict, cache: kv.KVCache, tokens_BT: jax.Array):
    """Read tokens on top of a cache, which is kept: the new cache, logits_BTV, what passed."""
    kept: list[dict] = []
    model = transformer.bind(config, params)
    x_BTD, cache = model.hidden(tokens_BT, cache, attend=recorder(kept))
    logits_BTV = model.unembed(x_BTD)
    layers = jax.tree.map(lambda *arrays: jnp.stack(arrays), *kept)
    return cache.advanced(jnp.int32(tokens_BT.shape[1])), logits_BTV, layers


def read(config: ModelConfig, params: dict, cache: kv.KVCache, tokens: Sequence[int]):
    """A Reading of `tokens`, and the cache after it."""
    first = int(cache.length_B[0])
    after, logits_BTV, kept = look_on(config, params, cache, jnp.array([tokens], jnp.int32))
    kept = {name: np.asarray(array) for name, array in kept.items()}
    written = changed(cache, after)
    logits_TV = np.asarray(logits_BTV[0])
    return Reading(list(tokens), first, kept, logits_TV, written, after.capacity), after


def changed(before: kv.KVCache, after: kv.KVCache) -> list[int]:
    """The slots of row 0 in which two caches differ, in any layer; all, if there were none."""
    if not before.capacity:
        return list(range(after.capacity))
    pairs = zip((*before.k, *before.v), (*after.k, *after.v), strict=True)
    differ_S = sum(np.asarray(jnp.any(a[0] != b[0], axis=(0, 2))).astype(int) for a, b in pairs)
    return np.flatnonzero(differ_S).tolist()


def draw_one(
    logits_V: np.ndarray, rows: Draw, names: tuple[str, ...], seen_V: np.ndarray, position: int
) -> Drawing:
    """Draw the token at `position` of the text as sample.py does, and note each stage."""
    batch = logits_V[None], rows, seen_V[None], np.array([position], np.int32)
    token, uniform, stages = jax.device_get(draw_noting(*batch, names))
    greedy = float(rows.temperature[0]) == 0
    shares = dict(zip(("the model", *names), stages, strict=True))
    return Drawing(int(token), shares, None if greedy else float(uniform))


@partial(jax.jit, static_argnames="names")
def draw_noting(logits_BV, rows: Draw, seen_BV, position_B, names: tuple[str, ...]):
    """The token drawn in row 0, the number that picked it, and probabilities: the model's own,
    then after each of the settings `names`."""
    token_B = sampler.sample(logits_BV, rows, seen_BV, position_B)
    adjusted_BV = sampler.adjust(logits_BV, rows, seen_BV)
    now = replace(rows, top_k=rows.top_k * 0, top_p=rows.top_p * 0 + 1, min_p=rows.min_p * 0)
    stages = [logits_BV]
    for name in names:
        field = name.replace("-", "_")
        if name in ("top-k", "top-p", "min-p"):
            now = replace(now, **{field: getattr(rows, field)})
        stages.append(adjusted_BV if name == "penalty" else sampler.filtered(adjusted_BV, now))
    shares = [jax.nn.softmax(stage_BV[0]) for stage_BV in stages]
    return token_B[0], sampler.uniform(rows, position_B)[0], shares


def stages_of(settings: Settings) -> tuple[str, ...]:
    """The settings that change the distribution before the draw, in their order."""
    s = settings
    names = ["penalty"] if s.repetition_penalty != 1 or s.logit_bias or s.ignore_eos else []
    if s.temperature == 0:
        return tuple(names)
    on = {"temperature": s.temperature != 1, "top-k": s.top_k > 0, "top-p": s.top_p < 1}
    on |= {"min-p": s.min_p > 0}
    return (*names, *(name for name, wanted in on.items() if wanted))


def require_size(config: ModelConfig, n_positions: int) -> None:
    """UserError if so many positions make more numbers than a page should hold."""
    L, N, K, H = config.n_layers, config.n_heads, config.kv_heads, config.head_width

    def size(P: int) -> float:
        return L * P * (2 * N * P + (N + 2 * K) * H) * 2 * 4 / 3

    fits = max((P for P in range(1, 1024) if size(P) <= MOST_BYTES), default=1)
    require(
        n_positions <= fits,
        f"the prompt and what is drawn make {n_positions} positions: a page of this model holds "
        f"{fits}; give a shorter prompt or a smaller --max-new-tokens",
    )


def take_tour(model, prompt: generate.Prompt, settings: Settings) -> Journey:
    """Read `prompt`, text or token ids, draw up to `settings.max_new_tokens` after it, and write
    all of it down.

    `model`: as `gpt.load` returns it, on one device. UserError if it does not fit the context or
    a page, or gives no numbers.
    """
    config, params, eot = model.config, model.params, model.tokenizer.eot_token
    text, ids, _ = generate.read_prompt(model, prompt)
    room, T = config.context_length, len(ids)
    fits = len(ids) <= room
    require(fits, f"the prompt has {T} tokens: expected at most the model's context of {room}")
    n_new = min(settings.max_new_tokens, room + 1 - T)
    require_size(config, T + n_new - 1)
    rows = generate.row_settings([settings], config.vocab_size, eot)
    seen_V = np.zeros(config.vocab_size, bool)
    seen_V[ids] = True
    reading, cache = read(config, params, kv.empty(config, 1), ids)
    readings, drawings = [reading], []
    cache = engine.grow(cache, engine.bucket(T + n_new - 1, room))
    while True:
        require(
            bool(np.isfinite(reading.logits_TV).all()),
            "the model's output is not a number: its training diverged or its weights are damaged; "
            "take another checkpoint",
        )
        place = T + len(drawings)
        drawing = draw_one(reading.logits_TV[-1], rows, stages_of(settings), seen_V, place)
        drawings.append(drawing)
        if drawing.token == eot or len(drawings) == n_new:
            break
        seen_V[drawing.token] = True
        reading, cache = read(config, params, cache, [drawing.token])
        readings.append(reading)
    read_ids = [token for reading in readings for token in reading.tokens]
    lens = look_through(config, params, read_ids)
    return Journey(config, text, ids, readings, drawings, *lens, not isinstance(prompt, str))


def look_through(config: ModelConfig, params: dict, tokens: Sequence[int]):
    """The logit lens (nostalgebraist 2020): layers, ids and probabilities of their predictions.

    The same forward pass, ended early: a model of the first n blocks.
    """
    tokens_BT = jnp.array([tokens], jnp.int32)
    layers = list(range(0 if config.norm_place == "pre" else 1, config.n_layers + 1))
    found = [end_early(config, params, tokens_BT, n) for n in layers]
    ids, probs = (np.stack([np.asarray(part) for part in parts]) for parts in zip(*found))  # noqa: B905
    return layers, ids, probs


def end_early(config: ModelConfig, params: dict, tokens_BT: jax.Array, n_layers: int):
    """Likeliest next tokens after the first `n_layers` blocks: ids and probabilities [T, K].

    Not compiled as a whole: that would be a program for each number of layers. After none: one
    block whose weights are zero, which adds nothing to the embedding.
    """
    blocks = {i: params["blocks"][i] for i in range(max(n_layers, 1))}
    if not n_layers:
        blocks = jax.tree.map(jnp.zeros_like, blocks)
    short = replace(config, n_layers=len(blocks))
    logits_BTV = transformer.forward(short, params | {"blocks": blocks}, tokens_BT)
    probs_TK, ids_TK = jax.lax.top_k(
        jax.nn.softmax(logits_BTV[0]), min(LENS_TOP, config.vocab_size)
    )
    return ids_TK, probs_TK
