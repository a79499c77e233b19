"""A trained model as an object: weights ready for decoding, config and tokenizer."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from gpt import checkpoint, hardware, sharding
from gpt.config import (
    ONE_DEVICE,
    Dtype,
    MeshConfig,
    ModelConfig,
    Quantize,
    TrainConfig,
    Weights,
    from_json,
)
from gpt.data import tokenizers
from gpt.errors import require
from gpt.model import int8, transformer
from gpt.sampling import beam_search, generate, scoring
from gpt.sampling.completion import Completion, Piece
from gpt.sampling.prompts import pad_prompts, read_prompt
from gpt.sampling.settings import Prefix, Settings
from gpt.sampling.special_ids import SpecialIds, find_special_ids

Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
PerPrompt = Settings | Sequence[Settings] | None
forward = jax.jit(transformer.forward, static_argnums=0)


@dataclass(frozen=True)
class LanguageModel:
    """A trained model, as returned by `gpt.load`.

    `params`: the weights, one subtree per layer. `step`: training steps done. `weights`: "ema" for
    their average over the run, or "raw". `notes`: messages from loading. `mesh`: the devices the
    model is split over; None for one. `prefix`: what precedes every prompt and scored text; by
    default whatever the tokenizer adds, or else end-of-text before scored texts and empty prompts.
    `draft`: see `with_draft`.
    """

    config: ModelConfig
    params: dict = field(repr=False)
    tokenizer: tokenizers.Tokenizer = field(repr=False)
    step: int
    weights: Weights = "raw"
    notes: tuple[str, ...] = field(default=(), repr=False)
    mesh: Mesh | None = field(default=None, repr=False)
    prefix: Prefix | None = None
    draft: "LanguageModel | None" = field(default=None, repr=False)

    def with_draft(self, draft: "LanguageModel") -> "LanguageModel":
        """This model with a smaller one to propose the tokens for `Settings.speculate`. UserError
        if the draft has a different tokenizer or a shorter context."""
        require(
            tokenizers.to_json(self.tokenizer) == tokenizers.to_json(draft.tokenizer),
            "the draft has a different tokenizer: expected a model with the same one, such as a "
            "smaller model trained on the same data",
        )
        wanted, found = self.config.context_length, draft.config.context_length
        require(
            found >= wanted,
            f"the draft has a context of {found} tokens: expected at least the model's, {wanted}",
        )
        return replace(self, draft=draft)

    @functools.cached_property
    def special_ids(self) -> SpecialIds:
        """The ids that are not text."""
        return find_special_ids(self.tokenizer)

    def generate(
        self, prompt: Prompts = "", settings: PerPrompt = None, **fields
    ) -> Completion | list[Completion]:
        """Complete one or more prompts, each text or token ids.

        `settings`: one Settings for all prompts, or a list with one per prompt; or pass its fields
        by name. One prompt with one sample gives a Completion (print it to see the text), otherwise
        a list, prompt by prompt.
        """
        prompts, is_one = as_list(prompt)
        completions = generate.complete(self, prompts, as_settings(settings, fields))
        return completions[0] if is_one and len(completions) == 1 else completions

    def stream(self, prompt: Prompts = "", settings: PerPrompt = None, **fields) -> Iterator[Piece]:
        """Like `generate`, but yield pieces of text as they appear."""
        prompts, _ = as_list(prompt)
        return generate.stream(self, prompts, as_settings(settings, fields))

    def search(self, prompt: Prompts = "", **settings) -> list:
        """Beam search: the likeliest completions of a prompt, best first, each with its `score`;
        for several prompts, a list of such lists. `settings`: the fields of BeamSettings."""
        prompts, is_one = as_list(prompt)
        found = beam_search.search(self, prompts, beam_search.BeamSettings(**settings))
        return found[0] if is_one else found

    def score(
        self, text: str | Sequence[int], stride: int | None = None, window: int | None = None
    ) -> scoring.Score:
        """Per-token log-probabilities of a text (or of token ids), mean loss, bits per byte and
        perplexity. `stride`, `window`: see gpt/sampling/scoring.py."""
        return scoring.score(self, text, stride, window)

    def logits(self, text: str | Sequence[int]) -> np.ndarray:
        """Next-token logits after each token of a text (or of token ids), float32 [T, V]."""
        prompt = read_prompt(self, text)
        tokens_BT, n_B = pad_prompts([prompt.ids], self.config.context_length)
        with sharding.on_mesh(self.mesh):
            logits_BTV = forward(self.config, self.params, tokens_BT)
        return np.asarray(logits_BTV)[0, : n_B[0]]

    def module(self) -> transformer.GPT:
        """The model as a Flax NNX module: `model.module()(tokens_BT)` gives logits."""
        return transformer.bind(self.config, self.params)


def as_list(prompt: Prompts) -> tuple[Sequence[str] | Sequence[Sequence[int]], bool]:
    """The prompts as a list, and whether a single one (text or token ids) was given."""
    if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer))):
        return [prompt], True
    return prompt, False


def as_settings(settings: PerPrompt, fields: dict) -> Settings | Sequence[Settings]:
    """The settings as given, or built from `fields`."""
    require(settings is None or not fields, "give settings or their fields by name, not both")
    return Settings(**fields) if settings is None else settings


def load(
    run: str | Path,
    step: int | None = None,
    dtype: Dtype | None = None,
    weights: Weights | None = None,
    mesh: MeshConfig = ONE_DEVICE,
    quantize: Quantize | None = None,
    prefix: Prefix | None = None,
) -> LanguageModel:
    """Load a model from a run folder: the newest whole checkpoint, or the one at `step`.

    `dtype`: dtype of the computation (default: float32 on CPU, bfloat16 on accelerators).
    `weights`: "ema", their average over the run, or "raw" (default: the average if one is kept).
    `mesh`: devices over which to split rows (data) and heads, MLP and vocabulary (tensor).
    `quantize`: "int8" to store matrices and tables as int8, with a scale per output (default:
    none). `prefix`: see LanguageModel. UserError if the checkpoint is missing or damaged, lacks the
    requested average or prefix, or cannot be divided over the mesh.
    """
    run = Path(run).expanduser()
    checkpoint.require_run(run)
    for name, value, kind in (
        ("dtype", dtype, Dtype),
        ("weights", weights, Weights),
        ("quantize", quantize, Quantize),
        ("prefix", prefix, Prefix),
    ):
        words = get_args(kind)
        expected = f"expected one of {', '.join(words)}"
        require(value is None or value in words, f"{name} is {value!r}: {expected}")
    dtype = dtype or hardware.default_dtype()
    devices = sharding.make_decoding_mesh(mesh)

    def read(step: int) -> LanguageModel:
        metadata = checkpoint.read_metadata(run, step)
        config = from_json(ModelConfig, metadata["model"]).computing_in(dtype)
        notes = transformer.require_even_split(config, devices, fsdp=False)
        tree = choose_tree(run, metadata, weights)
        if tree == "ema_params":
            notes.append("these are the averaged weights; use --weights raw for the last ones")

        # Each device reads its own part of the stacked weights.
        shapes = transformer.abstract(config)
        axes = transformer.logical_axes(config)
        shardings = sharding.state_shardings(devices, axes, shapes, sharding.DECODING_RULES)
        like = sharding.with_shardings(shapes, shardings)
        stacked = checkpoint.restore(run, step, tree, like)

        return LanguageModel(
            config.for_sampling(),
            for_decoding(config, devices, quantize, stacked),
            tokenizers.from_json(metadata["tokenizer"]),
            step,
            weights="ema" if tree == "ema_params" else "raw",
            notes=tuple(notes),
            mesh=devices if devices.size > 1 else None,
            prefix=prefix,
        )

    damaged = []
    if step is not None:
        model = read(step)
    else:
        _, model, damaged = checkpoint.latest_good(run, read)
    notes = [f"{note}; using step {model.step}" for note in damaged]
    before = model.special_ids.prefix(prefix)
    if before:
        name = model.tokenizer.decode_bytes(before).decode("utf-8", "replace")
        advice = "" if prefix else "; --prefix none leaves it out"
        notes.append(f"every prompt and scored text follows {name!r}{advice}")
    return replace(model, notes=(*model.notes, *notes))


def choose_tree(run: str | Path, metadata: dict[str, Any], weights: Weights | None) -> str:
    """The checkpoint tree with the requested weights: by default the average, if one is kept.
    Raises UserError if the average is requested but was not kept."""
    has_average = from_json(TrainConfig, metadata["train"]).ema_decay > 0
    require(
        has_average or weights != "ema",
        f"weights is ema, but {run} has no averaged weights: leave it out",
    )
    if has_average and weights != "raw":
        return "ema_params"
    return "params"


def for_decoding(config: ModelConfig, mesh: Mesh, quantize: Quantize | None, params: dict) -> dict:
    """Convert stacked weights for decoding on `mesh`: one subtree per layer, in the `param_dtype`
    of `config.for_sampling()`."""

    def convert(params: dict) -> dict:
        params = transformer.unstack(params)
        params = int8.quantize(params) if quantize else params
        return transformer.cast(params, config.for_sampling().param_dtype)

    axes = transformer.logical_axes(config, stacked=False)
    axes = int8.quantize_axes(axes) if quantize else axes
    shapes = jax.eval_shape(convert, params)
    shardings = sharding.state_shardings(mesh, axes, shapes, sharding.DECODING_RULES)
    return jax.jit(convert, out_shardings=shardings)(params)
