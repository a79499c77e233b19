"""Samples from a model in training, and its scores on --eval-tasks."""

import contextlib
import importlib.util
import io
from typing import TYPE_CHECKING

from gpt import distributed, sharding
from gpt.config import ONE_DEVICE
from gpt.errors import require

if TYPE_CHECKING:
    from gpt.sampling.language_model import LanguageModel

# The sampler and lm-eval are imported inside functions, so that training starts without them.


def language_model_of(run, weights: dict) -> "LanguageModel | None":
    """The model of a run in training. `run` has `config`, `tokenizer` and the `mesh` that holds the
    stacked `weights`.

    If several processes train, the first gets the model on one of its devices, the others None.
    """
    weights = distributed.copy_to_first_process(weights)
    if weights is None:
        return None
    from gpt.sampling.language_model import LanguageModel, for_decoding

    mesh = run.mesh
    if distributed.is_multi_process():
        mesh = sharding.make_decoding_mesh(ONE_DEVICE)
    config = run.config.model
    params = for_decoding(config, mesh, None, weights)
    mesh = mesh if mesh.size > 1 else None
    return LanguageModel(config.for_sampling(), params, run.tokenizer, step=0, mesh=mesh)


def write_sample(run, weights: dict) -> str | None:
    """What a model in training writes without a prompt; None if `language_model_of` returns None.
    Raises UserError if the model or its cache does not fit."""
    model = language_model_of(run, weights)
    return None if model is None else str(model.generate(max_new_tokens=200))


def load_tasks(run) -> list | None:
    """The tasks of --eval-tasks with their data; None without the flag, and an empty list in
    processes that do not evaluate. Raises UserError in all processes if they cannot be loaded."""
    args = run.args
    if args.eval_tasks is None or args.is_trial:
        return None
    with distributed.fail_together():
        require(
            importlib.util.find_spec("lm_eval") is not None,
            "--eval-tasks needs lm-eval, which is not installed: pip install -e '.[eval]', or "
            "train without the flag",
        )
        if not distributed.is_first():
            return []
        from gpt.evaluate import harness

        harness.require_text(run.tokenizer)
        names = [name for name in args.eval_tasks.split(",") if name]
        require(bool(names), "--eval-tasks is empty: expected names separated by commas")
        return harness.load_tasks(names, args.eval_tasks_path)


def evaluate_tasks(run, tasks: list, weights: dict) -> dict[str, float] | None:
    """The scores of a run's stacked `weights` on its tasks; None in processes that do not
    evaluate."""
    model = language_model_of(run, weights)
    if model is None:
        return None
    from gpt.evaluate import harness

    limit = run.args.eval_tasks_limit
    with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars
        results = harness.evaluate(harness.GPTJax(model=model), tasks, limit)
    return harness.figures(results) | {"limit": limit}
