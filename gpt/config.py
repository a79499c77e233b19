"""All model and training settings, checked at construction."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Suppress

from gpt.errors import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    above_zero,
    check_fields,
    positive,
    require,
)

Dtype = Literal["float32", "bfloat16"]
PositionKind = Literal["learned", "sinusoidal", "rope", "none"]
NormKind = Literal["layer", "rms"]
NormPlace = Literal["pre", "post"]
MlpKind = Literal["relu", "gelu", "gelu_tanh", "relu2", "swiglu"]  # model/layers.py: ACTIVATIONS
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "wsd"]
Remat = Literal["auto", "none", "products", "blocks"]
AttentionKind = Literal["auto", "plain", "fused"]
AUTO = "auto"  # for grad_accum and remat: memory_plan.resolve_auto fits them to a device's memory
Quantize = Literal["int8"]
Weights = Literal["ema", "raw"]  # the average over the run, or the last weights
VOCAB_MULTIPLE = 128  # accelerators tile by 128, and sharded tables must divide evenly


def optional(metavar: str, default: str = ""):
    """An optional flag, shown in `--help` with its `metavar` and, where tyro would print None, its
    `default` in words."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


DTYPES = "{float32,bfloat16}"
BY_PLATFORM = "float32 on CPU, bfloat16 on accelerators"
FF_WIDTH = "4 x d_model; swiglu 8/3 x d_model"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only Transformer; the defaults are GPT-2's."""

    vocab_size: Suppress[PositiveInt] = 256  # tokens; set by the tokenizer
    context_length: PositiveInt = 256
    """Longest sequence the model can attend over, tokens."""
    n_layers: PositiveInt = 4
    """Transformer blocks."""
    n_heads: PositiveInt = 4
    """Query heads per block; must divide d_model."""
    n_kv_heads: Annotated[int | None, optional("INT", "n_heads"), positive] = None
    """Key/value heads per block; must divide n_heads."""
    d_model: PositiveInt = 128
    """Width of the residual stream."""
    d_head: Annotated[int | None, optional("INT", "d_model / n_heads"), positive] = None
    """Width of one head."""
    d_ff: Annotated[int | None, optional("INT", FF_WIDTH), positive] = None
    """Width of the MLP."""
    positions: PositionKind = "learned"
    """Position encoding: `learned` adds a learned table, `sinusoidal` the sinusoids of Vaswani et
    al. 2017, `rope` rotates queries and keys (Su et al. 2021), `none` relies on the causal mask.
    All refuse text longer than the context: a table has no entry there, and the others were never
    trained on such positions (Press et al. 2022)."""
    rope_theta: PositiveFloat = 10_000.0
    """RoPE: base of the wavelengths."""
    rope_factor: PositiveFloat = 1.0
    """RoPE scaling as in Llama 3.1: low frequencies are divided by this (1: no scaling)."""
    rope_low: PositiveFloat = 1.0
    """Scaled RoPE: a frequency is low if it makes fewer turns than this within rope_context."""
    rope_high: float = 4.0
    """Scaled RoPE: a frequency that makes more turns than this within rope_context is kept; those
    between rope_low and rope_high are interpolated."""
    rope_context: PositiveInt = 8192
    """Scaled RoPE: the context, in tokens, that the model was originally trained with."""
    norm: NormKind = "layer"
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
    norm_place: NormPlace = "pre"
    """pre: before each sublayer and at the end (GPT-2); post: after each sum (Vaswani et al.)."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance before the square root."""
    mlp: MlpKind = "gelu_tanh"
    """MLP activation; swiglu adds a third matrix as a gate (Shazeer 2020)."""
    qk_norm: bool = False
    """Normalize each head's queries and keys, before RoPE (Dehghani et al. 2023)."""
    logit_softcap: NonNegativeFloat = 0.0
    """Squash logits into (-cap, cap) by tanh (Gemma 2); 0: off."""
    tied: bool = True
    """Use the embedding table as the head."""
    bias: bool = True
    """Use biases everywhere, unless one of the next four flags says otherwise."""
    norm_bias: Annotated[bool | None, optional("{True,False}", "bias")] = None
    """Use biases in the norms."""
    qkv_bias: Annotated[bool | None, optional("{True,False}", "bias")] = None
    """Use biases in the query, key and value projections."""
    out_bias: Annotated[bool | None, optional("{True,False}", "bias")] = None
    """Use a bias in the attention output projection."""
    mlp_bias: Annotated[bool | None, optional("{True,False}", "bias")] = None
    """Use biases in the MLP."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of initial weights (GPT-2: 0.02; narrow models learn faster with more)."""
    dropout: Fraction = 0.0
    """Dropout probability in training: embedding, attention, residual."""
    param_dtype: Dtype = "float32"
    """Data type of stored weights."""
    compute_dtype: Annotated[Dtype | None, optional(DTYPES, "--dtype")] = None
    """Data type of matrix products."""
    cache_dtype: Annotated[Dtype | None, optional(DTYPES, "the compute type")] = None
    """Data type of cached keys and values."""

    def __post_init__(self):
        check_fields(self, "model.")
        above_zero("model.rope_high - model.rope_low", self.rope_high - self.rope_low)
        require(
            self.d_head is not None or self.d_model % self.n_heads == 0,
            f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}: "
            "choose a divisor, or give --model.d-head",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_heads {self.n_heads} is not divisible by model.n_kv_heads {self.kv_heads}: "
            "every key/value head serves the same number of query heads",
        )
        require(
            self.positions != "rope" or self.head_width % 2 == 0,
            f"heads of width {self.head_width} cannot be rotated in pairs: use an even width",
        )
        require(
            self.positions != "sinusoidal" or self.d_model % 2 == 0,
            f"model.d_model is {self.d_model}: sinusoidal positions need an even width",
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head, H."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """MLP width, F. With a gate the default is 8/3 of the model width, rounded to a multiple of
        8, which keeps the number of weights about the same (Shazeer 2020)."""
        if self.d_ff:
            return self.d_ff
        if self.gated_mlp:
            return 8 * max(round(self.d_model / 3), 1)
        return 4 * self.d_model

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a third matrix as a gate."""
        return self.mlp == "swiglu"

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of weights that write to the residual stream (GPT-2, 2.3)."""
        return self.init_std / math.sqrt(2 * self.n_layers)

    def biased(self, part: str) -> bool:
        """Whether a part ("norm", "qkv", "out" or "mlp") has biases."""
        parts = {"norm": self.norm_bias, "qkv": self.qkv_bias, "out": self.out_bias}
        own = (parts | {"mlp": self.mlp_bias})[part]
        return self.bias if own is None else own

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 128."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def computing_in(self, dtype: Dtype) -> "ModelConfig":
        """The same model, computing in `dtype` and caching in the compute dtype, unless these are
        set."""
        compute = self.compute_dtype or dtype
        cached = self.cache_dtype or compute
        return dataclasses.replace(self, compute_dtype=compute, cache_dtype=cached)

    def for_sampling(self) -> "ModelConfig":
        """The same model with weights in the compute dtype, unless that is wider: decoding is as
        fast as weights can be read."""
        narrow = "bfloat16" in (self.param_dtype, self.compute_dtype)
        return dataclasses.replace(self, param_dtype="bfloat16" if narrow else "float32")


def flags_to_export(config: ModelConfig) -> tuple[list[str], list[str]]:
    """The flags that would make a model exportable as GPT-2, and as Llama, Qwen2 or Qwen3.

    A list is empty if the model can already be exported in that form.
    """
    no_norm_bias = "--model.no-bias" if config.norm_bias is None else "--model.norm-bias False"
    no_mlp_bias = "--model.no-bias" if config.mlp_bias is None else "--model.mlp-bias False"
    both = {
        "--model.norm-place pre": config.norm_place != "pre",
        "--model.logit-softcap 0": config.logit_softcap != 0,
    }
    gpt2 = {
        "--model.positions learned": config.positions != "learned",
        "--model.norm layer": config.norm != "layer",
        "--model.mlp gelu_tanh": config.gated_mlp,
        f"--model.n-kv-heads {config.n_heads}": config.kv_heads != config.n_heads,
        "--model.d-head None": config.head_width * config.n_heads != config.d_model,
        "--model.no-qk-norm": config.qk_norm,
    }
    llama = {
        "--model.positions rope": config.positions != "rope",
        "--model.norm rms": config.norm != "rms",
        "--model.mlp swiglu": not config.gated_mlp,
        no_norm_bias: config.biased("norm"),
    }
    # Qwen3, the format with QK-norm, has no MLP biases.
    if config.qk_norm and config.biased("mlp"):
        llama[no_mlp_bias] = True
    return tuple(
        [flag for flag, is_needed in (form | both).items() if is_needed] for form in (gpt2, llama)
    )


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; -1: all remaining devices."""

    data: int = -1
    """Model replicas, each with its own batch rows (-1: all remaining devices)."""
    fsdp: int = 1
    """Devices to shard weights and optimizer state over, each with its own batch rows too."""
    tensor: int = 1
    """Devices to shard heads, MLP and vocabulary over."""

    def __post_init__(self):
        check_fields(self, "mesh.")
        sizes = [self.data, self.fsdp, self.tensor]
        require(
            all(n >= 1 or n == -1 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh {tuple(sizes)}: expected positive sizes, at most one of them -1",
        )


ONE_DEVICE = MeshConfig(data=1)


@dataclass(frozen=True)
class TrainConfig:
    """Training settings. One step is one optimizer update on `batch_size` sequences."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokenizer: str = "byte"
    """byte, char, bpe (trained on the data), gpt2, cl100k_base, o200k_base, or a file's path."""
    vocab_size: PositiveInt = 4096
    """Vocabulary size of a trained BPE, including end-of-text (only for --tokenizer bpe)."""
    steps: PositiveInt = 2000
    """Total number of optimizer steps."""
    # How many of these come after the schedule has ended (train.py --extend).
    extra_steps: Suppress[NonNegativeInt] = 0
    batch_size: PositiveInt = 16
    """Sequences per optimizer step, across all devices."""
    seq_len: Annotated[int | None, optional("INT", "model.context-length"), positive] = None
    """Tokens per training sequence; this becomes the model's context too, since untrained positions
    would be noise."""
    grad_accum: Annotated[int | Literal["auto"], tyro.conf.arg(metavar="INT|auto")] = 1
    """Micro-batches to split each step's batch into, to save memory; auto: the fewest expected to
    fit. Results change only by rounding."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises linearly to its peak."""
    beta1: Fraction = 0.9
    """AdamW: decay of the first moment."""
    beta2: Fraction = 0.99
    """AdamW: decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate; only for matrices and embeddings."""
    optimizer: Optimizer = "adamw"
    """adamw for all weights, or muon (Jordan et al. 2024) for the blocks' matrices and adamw for
    the rest."""
    muon_learning_rate: PositiveFloat = 0.02
    """Muon: peak learning rate of the matrices it updates; follows the same schedule."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up. cosine, linear: decay to the minimum over all steps; wsd:
    constant, then linear decay to the minimum over the last decay_fraction of the steps."""
    decay_fraction: float = 0.2
    """wsd: fraction of the steps over which the learning rate falls."""
    label_smoothing: Fraction = 0.0
    """Fraction of each target spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of log(sum of exp(logits)) squared in the loss (PaLM, section 5)."""
    ema_decay: Fraction = 0.0
    """Per-step decay of an exponential moving average of the weights, kept as well; 0: none."""
    clip_norm: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0 turns clipping off."""
    max_bad_steps: PositiveInt = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient; their updates are
    skipped."""
    remat: Remat = "blocks"
    """What the backward pass recomputes instead of storing: none, products (all but matrix
    products) or blocks (each from its input: a third more work). auto: blocks on a CPU; elsewhere
    the first of the three that should fit in memory (none also turns --unroll on)."""
    unroll: bool = False
    """Compile the blocks one after another instead of as a loop: compilation takes longer, but a
    CPU that does not recompute trains faster."""
    attention: AttentionKind = "auto"
    """How training computes attention. plain: matrix products over all tokens. fused: the
    accelerator's own kernel, or blocks of queries on a CPU; an error if it does not fit. auto:
    fused if it fits, else plain."""
    deterministic: bool = False
    """Make results on GPUs identical from run to run, with XLA flags and without cuDNN's attention;
    both cost speed. CPUs and TPUs give identical results anyway."""
    dtype: Annotated[Dtype | None, optional(DTYPES, BY_PLATFORM)] = None
    """Data type to compute in."""
    seed: int = 0
    """Seed for initial weights, data order and dropout."""
    log_every: PositiveInt = 10
    """Steps between logged metrics."""
    eval_every: PositiveInt = 250
    """Steps between evaluations on held-out text."""
    eval_tokens: NonNegativeInt = 131_072
    """Maximum number of held-out tokens per evaluation; 0: all of them."""
    sample_every: NonNegativeInt = 500
    """Steps between printed samples; 0 for none."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Number of latest checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Number of checkpoints with the lowest validation loss to keep as well; unless 0, every
    checkpoint is evaluated."""
    keep_going: bool = False
    """Keep training when a checkpoint cannot be written, for example on a full disk."""

    def __post_init__(self):
        check_fields(self)
        require(
            0 < self.decay_fraction <= 1,
            f"decay_fraction is {self.decay_fraction}: expected 0 < decay_fraction <= 1",
        )
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate is {self.min_learning_rate}: expected between 0 and "
            f"learning_rate {self.learning_rate}",
        )
        if self.grad_accum != AUTO:
            positive("grad_accum", self.grad_accum)
            require(
                self.batch_size % self.grad_accum == 0,
                f"batch_size {self.batch_size} is not divisible by grad_accum {self.grad_accum}: "
                "micro-batches must have the same size",
            )
        for n, name in ((self.seed, "seed"), (self.steps, "steps")):
            require(0 <= n < 2**31, f"{name} is {n}: expected 0 <= {name} < 2^31")

    @property
    def schedule_steps(self) -> int:
        """Steps over which the learning rate rises and falls; later steps keep its last value."""
        return self.steps - self.extra_steps

    @property
    def decay_start(self) -> int:
        """wsd: the step at which the learning rate begins to fall."""
        return self.schedule_steps - max(1, round(self.schedule_steps * self.decay_fraction))

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sequence, T."""
        return self.seq_len or self.model.context_length

    def completed(self, vocab_size: int, dtype: Dtype) -> "TrainConfig":
        """The config with unset values filled in: the vocabulary size, the context from `seq_len`,
        and `dtype` for unset dtypes. `auto` settings stay `auto`."""
        dtype = self.dtype or dtype
        model = dataclasses.replace(
            self.model, vocab_size=vocab_size, context_length=self.sequence_length
        ).computing_in(dtype)
        return dataclasses.replace(self, model=model, seq_len=None, dtype=dtype)


def to_json(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(kind: type, values: dict[str, Any]):
    """A config of class `kind` from to_json's values; UserError for an unknown field."""
    require(isinstance(values, dict), f"{kind.__name__}: expected a JSON object, got {values!r}")
    fields = {f.name for f in dataclasses.fields(kind)}
    for name in values:
        require(name in fields, f"{kind.__name__} has no field {name!r}: made by another version?")
    nested = {"model": ModelConfig, "mesh": MeshConfig}
    return kind(**{k: from_json(nested[k], v) if k in nested else v for k, v in values.items()})
