"""--eval-tasks: lm-eval's tasks on a model in training."""

import contextlib
import importlib.util
import io

from gpt import distributed
from gpt.errors import require
from gpt.sampling import language_model


def load_tasks(run) -> list:
    """The tasks of a run with their data; none in processes that do not evaluate. UserError in all
    processes if they cannot be loaded."""
    args = run.args
    with distributed.exit_together():
        require(
            importlib.util.find_spec("lm_eval") is not None,
            "--eval-tasks are those of lm-eval, which is not installed: "
            "pip install -e '.[eval]', or train without it",
        )
        if not distributed.is_first():
            return []
        from gpt.evaluate import harness

        harness.require_text(run.tokenizer)
        names = [name for name in args.eval_tasks.split(",") if name]
        require(bool(names), "--eval-tasks names nothing: expected names separated by commas")
        return harness.load_tasks(names, args.eval_tasks_path)


def evaluate_tasks(run, tasks: list, weights: dict) -> dict[str, float] | None:
    """The figures of the stacked `weights` of a run on its tasks; None in processes that do not
    evaluate."""
    model = language_model.in_training(run, weights)
    if model is None:
        return None
    from gpt.evaluate import harness

    limit = run.args.eval_tasks_limit
    with contextlib.redirect_stderr(io.StringIO()):  # hides the harness's bars
        results = harness.evaluate(harness.GPTJax(model=model), tasks, limit)
    return harness.figures(results) | {"limit": limit}
