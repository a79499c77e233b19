"""The plan train.py prints before it starts: what the run computes and the memory it needs."""

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import Mesh
from rich import filesize

from gpt import flops, hardware
from gpt.config import TrainConfig, flags_to_export
from gpt.data.token_files import Dataset
from gpt.errors import is_out_of_memory
from gpt.training.memory_plan import (
    MEMORY_ADVICE,
    Need,
    expected_need,
    need_of,
    optimizer_bytes,
)
from gpt.training.step_functions import compile_train_step
from gpt.wording import counted

# What the backward pass recomputes for each value of --remat.
RECOMPUTED = {"none": "nothing", "products": "all but matrix products", "blocks": "each block"}
# Repeated text is worth less and less after four passes, and almost nothing after about forty
# (Muennighoff et al. 2023).
MANY_PASSES = 40
SMALL_TEXT = 250_000  # tokens of a trained vocabulary, about a megabyte


def describe(
    config: TrainConfig,
    mesh: Mesh,
    dataset: Dataset | None = None,
    minutes: float | None = None,
) -> list[str]:
    """The plan's lines: the model, its bytes on all devices together, and what the run computes.

    `dataset`: None before the text is loaded. `minutes`: how long to train, if the number of steps
    is not known yet.
    """
    model = config.model
    weights = flops.weight_bytes(model)
    flops_per_token = flops.train_flops_per_token(model)
    tokens_per_step = config.batch_size * config.sequence_length
    lines = [
        f"model          {counted(model.n_layers, 'block')}, width {model.d_model}, MLP "
        f"{model.ff_width}, {counted(model.n_heads, 'head')} "
        f"({counted(model.kv_heads, 'key/value head')}), context {model.context_length}, "
        f"vocabulary {model.vocab_size:,}",
        f"choices        positions {model.positions}, norm {model.norm} {model.norm_place}, mlp "
        f"{model.mlp}, schedule {config.schedule}",
        f"parameters     {flops.parameters(model):,}",
        f"weights        {filesize.decimal(weights)} in {model.param_dtype}",
        f"gradients      {filesize.decimal(weights)}",
        f"optimizer      {filesize.decimal(optimizer_bytes(config))}, {config.optimizer}",
    ]
    if config.ema_decay:
        average = flops.weight_bytes(model, "float32")
        lines.append(f"average        {filesize.decimal(average)}, used to evaluate and sample")
    lines += [
        f"computation    {model.compute_dtype}, {flops_per_token / 1e6:,.2f} MFLOP per token to "
        "train",
        f"batch          {config.batch_size} x {config.sequence_length} = {tokens_per_step:,} "
        f"tokens per step, in {counted(config.grad_accum, 'micro-batch')}, on "
        f"{counted(mesh.size, 'device')}: {mesh.devices.flat[0].device_kind}",
        f"recomputes     {RECOMPUTED[config.remat]}; a step is expected to take about "
        f"{filesize.decimal(expected_need(config, mesh).total)} on each device",
    ]
    if config.deterministic:
        lines.append(
            "deterministic  uses slower kernels on GPUs; on CPUs and TPUs results are the same in "
            "every run without this flag"
        )
    if minutes is None:
        lines += describe_length(config, dataset)
    else:
        lines.append(
            f"run            as many steps as fit in about {minutes:g} min, not counting reading "
            "the text, compiling and writing samples"
        )
    if model.param_dtype == "bfloat16":
        # With 8 significant bits, neighbouring numbers differ by 1/256 to 1/128 of their value.
        lines.append(
            "note: bfloat16 weights lose every update below 1/512 of the weight: expect a higher "
            "loss than with --model.param-dtype float32"
        )
    gpt2, llama = flags_to_export(model)
    if gpt2 and llama:
        lines.append(
            "note: python -m gpt.convert cannot export this model to transformers; "
            f"with {' '.join(min(gpt2, llama, key=len))} it could"
        )
    return lines


def describe_length(config: TrainConfig, dataset: Dataset | None) -> list[str]:
    """The plan's lines on the run's length; `dataset`: None before the text is loaded."""
    tokens = config.steps * config.batch_size * config.sequence_length
    passes = 0.0
    epochs = ""
    if dataset is not None:
        passes = tokens / len(dataset.train)
        epochs = f" ({passes:,.2f} epochs)"
    lines = [
        f"run            {counted(config.steps, 'step')}, {tokens:,} tokens{epochs}, "
        f"{tokens * flops.train_flops_per_token(config.model):.3g} FLOPs"
    ]
    if passes > MANY_PASSES:
        fewer = math.ceil(config.steps * MANY_PASSES / passes)
        lines.append(
            f"note: {passes:,.0f} passes over this text: expect the model to memorize it; use "
            f"--steps {fewer} for {MANY_PASSES} passes, or --model.dropout 0.2"
        )
    if dataset is not None and config.tokenizer == "bpe" and len(dataset.train) < SMALL_TEXT:
        lines.append(
            "note: on so little text a character-level model learns more: "
            "python train.py shakespeare-char --data PATH"
        )
    if config.extra_steps:
        lines.append(
            f"extended       by {counted(config.extra_steps, 'step')}, trained at the schedule's "
            f"last learning rate, {config.min_learning_rate:g}"
        )
    return lines


def print_memory(
    config: TrainConfig, mesh: Mesh, memory_bytes: float | None, log: Callable[[str], None]
) -> None:
    """Print one device's memory: what the compiled step needs, and how large a micro-batch would
    fit.

    `memory_bytes`: a device's memory (None: that of a local device).
    """
    limit, source = hardware.memory()
    if memory_bytes is not None:
        limit, source = memory_bytes, "--memory-gb"

    def need_with(rows: int) -> Need:
        """The need with micro-batches of `rows`; infinite if the compiler runs out of memory."""
        resized = dataclasses.replace(config, batch_size=rows * config.grad_accum)
        try:
            return need_of(compile_train_step(resized, mesh))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Need(math.inf, math.inf)

    # A step's memory grows about linearly with its rows, so a line through two sizes tells how many
    # would fit.
    rows = config.batch_size // config.grad_accum
    n_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    log("compiling      a step of this size and one of twice the size, to measure their memory")
    need = need_with(rows)
    most = 0
    if need.total < math.inf:
        row_bytes = max((need_with(2 * rows).total - need.total) / rows, 1)
        most = max(rows + int((limit - need.total) / row_bytes), 0) // n_shards * n_shards

    gradients = flops.weight_bytes(config.model) // (mesh.size // mesh.shape["data"])
    activations = max(need.temporary - gradients, 0)
    fits = f"about {most:,} fit" if most else "none fits"
    advice = f": {MEMORY_ADVICE}" if rows > most else ""
    limit_text = f"on each device, which has {filesize.decimal(limit)} ({source})"
    if need.total < math.inf:
        log(
            f"activations    {filesize.decimal(activations)} besides the gradients, as XLA plans "
            "the compiled step"
        )
        log(f"in all         {filesize.decimal(need.total)} {limit_text}")
    else:
        log(f"in all         more than fits {limit_text}")
    log(f"micro-batch    {rows} sequences; {fits}{advice}")
