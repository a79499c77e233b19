"""Our engine as a model for lm-eval, EleutherAI's evaluation harness, under the name gpt-jax.

`evaluate` runs loaded tasks on a LanguageModel. Run as a program, this file is lm-eval's own
command line with our model registered: python -m gpt.evaluate.harness --model gpt-jax
--model_args run=RUN ... takes every flag of `lm_eval`. Neither lm-eval nor this file imports torch.
"""

import contextlib
import difflib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from gpt.config import MeshConfig
from gpt.data.tokenizers import IdTokenizer, without_lone_surrogates
from gpt.errors import UserError, require
from gpt.evaluate import likelihood
from gpt.sampling import generate, language_model
from gpt.sampling.settings import Settings

TASKS = Path(__file__).parent / "tasks"  # our own
BATCH_SIZE = 16
MAX_NEW_TOKENS = 256  # if a task sets no limit, as in the harness
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NO_EFFECT = {"do_sample", "until", "max_gen_toks"}  # read by name in `_prompt`


@register_model("gpt-jax")
class GPTJax(TemplateLM):
    """A LanguageModel for the harness: `model` itself or, from the harness's command line, a `run`
    folder and arguments of `gpt.load`, with `data` and `tensor` for the mesh.

    `n_cut`: requests so far whose context was cut from the left to fit. `model.prefix` precedes
    each text; an empty context and a rolled text always get a prefix token.
    """

    def __init__(
        self,
        run: str | None = None,
        model: language_model.LanguageModel | None = None,
        batch_size: int | str | None = None,
        data: int = 1,
        tensor: int = 1,
        **options,
    ):
        super().__init__()
        for name in ("device", "max_batch_size"):  # lm_eval flags that mean nothing here
            options.pop(name, None)
        if model is None:
            require(run is not None, "--model_args has no run: expected run=FOLDER")
            mesh = MeshConfig(data=data, tensor=tensor)
            model = language_model.load(run, mesh=mesh, **options)
        require_text(model.tokenizer)
        self.model = model
        self.without_prefix = replace(model, prefix=None)  # for ids, which have one already
        self.batch_size = BATCH_SIZE if batch_size in (None, "auto") else int(batch_size)
        self.n_cut = 0

    # Tokenization, as in the harness's adapter for transformers.

    @property
    def eot_token_id(self) -> int:
        return self.model.special_ids.prefix("eos")[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context and precedes a rolled text: beginning-of-text if
        the model has one, else end-of-text."""
        special = self.model.special_ids
        has_bos = special.bos is not None and self.model.prefix != "eos"
        return special.bos if has_bos else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids of a text, preceded by the model's prefix."""
        ids = self.model.tokenizer.encode_ordinary(without_lone_surrogates(string))
        if add_special_tokens is False:
            return ids
        return self.model.special_ids.prefix(self.model.prefix) + ids

    # The methods the harness calls.

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        """(log-likelihood, is greedy) per ((context, continuation), context ids, answer ids)."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        room = self.model.config.context_length + 1
        self.n_cut += sum(len(context) + len(answer) > room for context, answer in pairs)
        found = [None] * len(pairs)
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in likelihood.loglikelihoods(self.model, pairs, self.batch_size):
                for number, one in batch.items():
                    found[number] = one
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], one)
                bar.update(len(batch))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text."""
        found = []
        for request in tqdm(requests, desc="rolling log-likelihoods", disable=disable_tqdm):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            found.append(likelihood.rolling_loglikelihood(self.model, ids))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to one of its stop strings."""
        prompts = [self._prompt(*request.args) for request in requests]
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i][0]))
        found = [None] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), self.batch_size):
                numbers = longest_first[start : start + self.batch_size]
                ids, settings = zip(*[prompts[number] for number in numbers], strict=True)
                completions = generate.complete(self.without_prefix, ids, settings)
                for number, completion in zip(numbers, completions, strict=True):
                    found[number] = completion.text
                    args = requests[number].args
                    self.cache_hook.add_partial("generate_until", args, completion.text)
                bar.update(len(numbers))
        return found

    def _prompt(self, context: str, wanted: dict[str, Any]) -> tuple[list[int], Settings]:
        """A context's ids, cut from the left to leave room for the generated text, and the sampling
        settings. A model whose context is too short for both keeps half of it for the prompt."""
        wanted = normalize_gen_kwargs(wanted, MAX_NEW_TOKENS)
        unknown = wanted.keys() - {*SAMPLING, *NO_EFFECT}
        require(
            not unknown,
            f"a task generates with {', '.join(sorted(unknown))}, which this sampler does not "
            f"support: expected only {', '.join(SAMPLING)}; leave out this task",
        )
        context_length = self.model.config.context_length
        n_new = wanted["max_gen_toks"]
        if n_new >= context_length:
            n_new = max(1, context_length // 2)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.n_cut += len(ids) > context_length - n_new
        settings = {name: wanted[name] for name in SAMPLING if name in wanted}
        if not wanted["do_sample"]:
            settings["temperature"] = 0.0
        stop = tuple(text for text in wanted["until"] if text)
        return ids[-(context_length - n_new) :], Settings(n_new, stop=stop, **settings)


def require_text(tokenizer) -> None:
    """Raise UserError if the model has no tokenizer, since tasks are text."""
    require(
        not isinstance(tokenizer, IdTokenizer),
        "the model has no tokenizer, but tasks are text: import it from a folder that has one",
    )


def load_tasks(names: Sequence[str], include_path: Path | None) -> list:
    """The tasks and groups with these names, and their data: from `include_path` first, then our
    own, then the harness's. A name may be a pattern such as `arc_*`.

    Raises UserError for an unknown name or a task whose data cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # no progress messages
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of its 5 tries
    own_folders = [TASKS] if include_path is None else [TASKS, include_path.absolute()]
    managers = [TaskManager(include_path=own_folders, include_defaults=False)]
    if not all(managers[0].match_tasks([name]) for name in names):
        # Listing all of the harness's tasks takes seconds.
        managers.append(TaskManager())

    found = []
    for name in names:
        manager = next((one for one in managers if one.match_tasks([name])), None)
        if manager is None:
            known = [task for one in managers for task in one.all_tasks]
            close = difflib.get_close_matches(name, known, n=3)
            advice = f"did you mean {' or '.join(close)}?" if close else "see `lm_eval ls tasks`"
            raise UserError(
                f"unknown task {name!r}: expected an lm-eval task, or one from the folder given "
                f"with --include-path; {advice}"
            )
        for match in manager.match_tasks([name]):
            found += load_task(match, manager, include_path)
    return found


def load_task(name: str, manager: TaskManager, include_path: Path | None) -> list:
    """The task or group with that name, or the tasks with that tag, and their data; UserError if
    the data cannot be read."""
    entry = manager.task_index[name]
    # Relative data paths start at the user's task file, or at a folder with copies of the hub's
    # data.
    folder = (include_path or Path()).absolute()
    if entry.yaml_path and not entry.yaml_path.is_relative_to(Path(lm_eval.__file__).parent):
        folder = entry.yaml_path.parent
    try:
        with contextlib.chdir(folder):
            loaded = manager.load([name])
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        place = (entry.cfg or {}).get("dataset_path", "json")
        advice = ""
        if place != "json":
            advice = (
                f"; without a network, put a copy of the hub's folder {place} at {folder / place}"
                ", or give another folder that holds it with --include-path"
            )
        raise UserError(f"the data of task {name} cannot be read: {reason}{advice}") from None
    group = loaded.get("groups", {}).get(name)
    return [group] if group else list(loaded["tasks"].values())


def evaluate(
    lm: GPTJax,
    tasks: Sequence,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap_iters: int = 0,
) -> dict[str, Any]:
    """The harness's results for a model on loaded tasks.

    `limit`: documents per task, for a quick look. `num_fewshot`: examples before each question,
    overriding the task's number. `bootstrap_iters`: resamples for the standard errors, 0 for none.
    """
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints progress to stdout
        return lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=bootstrap_iters,
            log_samples=False,
            task_manager=TaskManager(include_defaults=False),
        )


def figures(results: dict[str, Any]) -> dict[str, float]:
    """All numbers in the harness's results by `task/metric`, such as hellaswag/acc_norm."""
    found = {}
    for task, values in (results["results"] | results.get("groups", {})).items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if "," in name and isinstance(value, float):
                more = "" if filtered == "none" else f",{filtered}"
                found[f"{task}/{metric}{more}"] = value
    return found


def describe(results: dict[str, Any]) -> str:
    """The harness's own tables: tasks, then groups if there are any."""
    tables = [lm_eval.utils.make_table(results)]
    if results.get("groups"):
        tables.append(lm_eval.utils.make_table(results, "groups"))
    return "\n".join(tables)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
