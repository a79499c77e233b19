"""The dry run: what a run would take, by arithmetic, before anything is built."""

from gpt import cost
from gpt.config import TrainConfig

MIB = 2**20


def optimizer_bytes(config: TrainConfig) -> int:
    """Bytes of the optimizer's moments: two of each weight; muon keeps one of a block's matrix."""
    c = config.model
    spared = c.n_layers * cost.block_matrices(c) if config.optimizer == "muon" else 0
    return 2 * cost.weight_bytes(c) - spared * cost.ITEM_BYTES[c.param_dtype]


def describe(config: TrainConfig, n_devices: int, n_tokens: int) -> list[str]:
    """Lines about the model, the bytes it needs in all and what the run computes.

    `n_tokens`: tokens of the training text.
    """
    c, tokens = config.model, config.batch_size * config.window
    weights = cost.weight_bytes(c)
    flops = cost.train_flops_per_token(c)
    total = tokens * config.steps
    return [
        f"model          {c.n_layers} blocks, width {c.d_model}, {c.n_heads} heads ({c.kv_heads} "
        f"of keys), context {c.context_length}, vocabulary {c.vocab_size:,}",
        f"choices        positions {c.positions}, norm {c.norm} {c.norm_place}, mlp {c.mlp}, "
        f"schedule {config.schedule}",
        f"parameters     {cost.parameters(c):,}",
        f"weights        {weights / MIB:,.1f} MiB in {c.param_dtype}",
        f"gradients      {weights / MIB:,.1f} MiB",
        f"optimizer      {optimizer_bytes(config) / MIB:,.1f} MiB, {config.optimizer}",
        *(
            [f"average        {weights / MIB:,.1f} MiB, evaluated and sampled from"]
            * bool(config.ema_decay)
        ),
        f"computation    {c.compute_dtype}, {flops / 1e6:,.2f} MFLOP a token to train",
        f"batch          {config.batch_size} x {config.window} = {tokens:,} tokens a step, "
        f"in {config.grad_accum} micro-batch(es), on {n_devices} device(s)",
        f"run            {config.steps:,} steps, {total:,} tokens "
        f"({total / max(n_tokens, 1):,.2f} epochs), {total * flops:.3g} FLOPs",
    ]
