"""Every setting of a model and of a run, checked at construction. Knows nothing but errors."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from tyro.conf import Suppress

from gpt.errors import UserError, require

Dtype = Literal["float32", "bfloat16"]
VOCAB_MULTIPLE = 128  # accelerators tile by 128, and sharded tables need a divisor


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer; the defaults are those of GPT-2's architecture."""

    vocab_size: Suppress[int] = 256  # tokens; decided by the tokenizer
    context_length: int = 256
    """Longest sequence the model can attend over, tokens."""
    n_layers: int = 4
    """Transformer blocks."""
    n_heads: int = 4
    """Query heads per block; must divide d_model."""
    n_kv_heads: int | None = None
    """Key/value heads per block; must divide n_heads (default: n_heads)."""
    d_model: int = 128
    """Width of the residual stream."""
    d_ff: int | None = None
    """Width of the MLP (default: 4 x d_model)."""
    bias: bool = True
    """Biases in the linear layers and in LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of fresh weights (GPT-2: 0.02; narrow models learn faster from more)."""
    dropout: float = 0.0
    """Probability of dropping an activation while training: embedding, attention, residual."""
    param_dtype: Dtype = "float32"
    """Type in which weights are kept and optimized."""
    compute_dtype: Dtype | None = None
    """Type of the matrix products (default: --dtype)."""
    cache_dtype: Dtype | None = None
    """Type of the cached keys and values (default: the compute type)."""

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model"):
            positive(f"model.{name}", getattr(self, name))
        for name in ("n_kv_heads", "d_ff"):
            if getattr(self, name) is not None:
                positive(f"model.{name}", getattr(self, name))
        require(
            self.d_model % self.n_heads == 0,
            f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}: "
            "every head needs the same whole width",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_heads {self.n_heads} is not divisible by model.n_kv_heads {self.kv_heads}: "
            "every key/value head serves the same number of query heads",
        )
        require(
            0 <= self.init_std < math.inf,
            f"model.init_std is {self.init_std}: expected zero or more",
        )
        require(
            0 <= self.dropout < 1, f"model.dropout is {self.dropout}: expected 0 <= dropout < 1"
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head, H."""
        return self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """Width of the MLP, F."""
        return self.d_ff or 4 * self.d_model

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 128."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def computing_in(self, dtype: Dtype) -> "ModelConfig":
        """The same model with its open types filled: products in `dtype`, the cache likewise."""
        compute = self.compute_dtype or dtype
        return dataclasses.replace(
            self, compute_dtype=compute, cache_dtype=self.cache_dtype or compute
        )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis of the mesh; -1 takes what the others leave."""

    data: int = -1
    """Copies of the model, each with its own rows of the batch (-1: all remaining devices)."""
    fsdp: int = 1
    """Devices among which weights and optimizer state are split, each with its own rows too."""
    tensor: int = 1
    """Devices among which heads, MLP and vocabulary are split."""

    def __post_init__(self):
        sizes = [self.data, self.fsdp, self.tensor]
        require(
            all(n >= 1 or n == -1 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh {tuple(sizes)}: expected positive sizes, at most one of them -1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. One step is one optimizer update on `batch_size` sequences."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokenizer: str = "byte"
    """byte, char, bpe (trained on the data), gpt2, cl100k_base, o200k_base, or a file's path."""
    vocab_size: int = 4096
    """Entries of a trained BPE, end-of-text included (tokenizer bpe alone)."""
    steps: int = 2000
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Sequences in one optimizer step, over all devices."""
    seq_len: int | None = None
    """Tokens in a training sequence; sets the model's context (default: model.context-length)."""
    grad_accum: int = 1
    """Micro-batches into which one step's batch is split to save memory."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate at the last step, where the cosine ends."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.99
    """AdamW: decay of the second moment."""
    weight_decay: float = 0.1
    """AdamW: decoupled decay, on matrices and embeddings alone."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    remat: bool = True
    """Recompute each block in the backward pass: a quarter of the memory for activations."""
    dtype: Dtype | None = None
    """Type of the computation (default: float32 on CPU, bfloat16 on accelerators)."""
    seed: int = 0
    """Seed of the weights, the order of the data and the dropout."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 250
    """Steps between evaluations on held-out text."""
    eval_tokens: int = 131_072
    """Most held-out tokens one evaluation reads; 0 reads all of them."""
    sample_every: int = 500
    """Steps between printed samples; 0 for none."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Latest checkpoints to keep."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "grad_accum", "log_every", "eval_every", "save_every"):
            positive(name, getattr(self, name))
        positive("keep", self.keep)
        positive("vocab_size", self.vocab_size)
        for name in ("warmup_steps", "eval_tokens", "sample_every", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} is {value}: expected zero or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}: expected 0 <= {name} < 1")
        require(
            0 < self.learning_rate < math.inf,
            f"learning_rate is {self.learning_rate}: expected a positive number",
        )
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate is {self.min_learning_rate}: expected between 0 and "
            f"learning_rate {self.learning_rate}",
        )
        require(
            self.batch_size % self.grad_accum == 0,
            f"batch_size {self.batch_size} is not divisible by grad_accum {self.grad_accum}: "
            "micro-batches must be of one size",
        )
        require(0 <= self.seed < 2**31, f"seed is {self.seed}: expected 0 <= seed < 2^31")
        if self.seq_len is not None:
            positive("seq_len", self.seq_len)
            model = dataclasses.replace(self.model, context_length=self.seq_len)
            object.__setattr__(self, "model", model)  # a position never trained would be noise

    @property
    def window(self) -> int:
        """Tokens in a training sequence, T."""
        return self.seq_len or self.model.context_length


def positive(name: str, value: int) -> None:
    """Raise UserError unless `value` is at least 1."""
    require(value >= 1, f"{name} is {value}: expected at least 1")


def preset(name: str) -> TrainConfig:
    """The named preset, or UserError with the list of names."""
    require(name in PRESETS, f"no preset named {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def gpt2(n_layers: int, n_heads: int, d_model: int) -> TrainConfig:
    """GPT-2 (Radford et al. 2019, Table 2) with the schedule of the 124M reproduction."""
    shape = ModelConfig(50257, 1024, n_layers, n_heads, d_model=d_model)
    return TrainConfig(
        model=shape,
        tokenizer="gpt2",
        steps=19_000,
        batch_size=512,
        grad_accum=32,
        learning_rate=6e-4,
        min_learning_rate=6e-5,
        warmup_steps=700,
        beta2=0.95,
        sample_every=1000,
        save_every=1000,
    )


PRESETS = {
    "tiny": TrainConfig(
        model=ModelConfig(
            4096, context_length=256, n_layers=4, n_heads=4, d_model=128, init_std=0.06
        ),
        tokenizer="bpe",
        steps=1200,
        batch_size=8,
        learning_rate=3e-3,
        min_learning_rate=3e-4,
    ),
    "shakespeare-char": TrainConfig(
        model=ModelConfig(
            128, context_length=64, n_layers=4, n_heads=4, d_model=128, bias=False, init_std=0.06
        ),
        tokenizer="char",
        batch_size=12,
        eval_tokens=0,
    ),
    "gpt2": gpt2(12, 12, 768),
    "gpt2-medium": gpt2(24, 16, 1024),
    "gpt2-large": gpt2(36, 20, 1280),
    "gpt2-xl": gpt2(48, 25, 1600),
}


def to_json(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(kind: type, values: dict[str, Any]):
    """A config of class `kind` from to_json's values; UserError names a field that is not one."""
    require(isinstance(values, dict), f"{kind.__name__}: expected a JSON object, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        require(name in fields, f"{kind.__name__} has no field {name!r}: made by another version?")
    nested = {"model": ModelConfig, "mesh": MeshConfig}
    made = {k: from_json(nested[k], v) if k in nested else v for k, v in values.items()}
    try:
        return kind(**made)
    except TypeError as error:
        raise UserError(f"{kind.__name__} cannot be read: {error}") from None
