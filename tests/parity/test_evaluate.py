"""The same weights through the harness's own adapter of transformers, and through ours."""

import json
import random

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

import huggingface_hub  # noqa: E402
import lm_eval  # noqa: E402
import programs  # noqa: E402
import standin_tokenizers  # noqa: E402
import standins  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from programs import WORDS, call, refuse, succeed  # noqa: E402

from gpt.evaluate import harness  # noqa: E402

CONTEXT = 64
FORMS = {  # a model's shape, the form of its tokenizer, and the tokenizer's special tokens
    "gpt2": (standins.GPT2, "GPT-2", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "llama": (
        standins.LLAMA,
        "Llama 3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
output_type: {kind}
"""
TASKS = {
    "choices": ("multiple_choice", "doc_to_choice: choices\ndoc_to_target: answer\n"),
    "cloze": ("loglikelihood", 'doc_to_target: "{{last}}"\n'),
    "rolling": ("loglikelihood_rolling", 'doc_to_target: "{{text}}"\n'),
    "writing": (
        "generate_until",
        'doc_to_target: ""\ngeneration_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 20}\n',
    ),
}


def write_tasks(folder, model):
    """Four tasks with random words: short and long contexts, an empty one, and ones too long; among
    the answers are some that this model finds the likeliest."""
    rng = random.Random(0)

    def words(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    documents = {name: [] for name in TASKS}
    for number in range(24):
        text = words(1, 12)
        if number % 6 == 0:
            text = words(40, 60)
        choices = [f" {words(1, n)}" for n in (1, 3, 6, 12)]
        documents["choices"].append({"text": text, "choices": choices, "answer": number % 4})
        documents["cloze"].append({"text": text, "last": f" {words(1, 2)}"})
        documents["rolling"].append({"text": f"{text}\n"})
        documents["writing"].append({"text": text})
        likeliest = model.generate(text[:40], max_new_tokens=1, temperature=0).text
        documents["cloze"].append({"text": text[:40], "last": likeliest or "the"})
    documents["cloze"].append({"text": "", "last": "the cat"})
    for name, (kind, more) in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind) + more)
        lines = [json.dumps(document) for document in documents[name]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_model(folder, form):
    """A folder as transformers has it, with random weights and a small tokenizer."""
    c, tokenizer_form, special = FORMS[form]
    tokenizer = standin_tokenizers.make(tokenizer_form)
    about = json.loads(tokenizer)
    ids = {token["content"]: token["id"] for token in about["added_tokens"]}
    # No ids without a token: we never draw one, and transformers may.
    n_vocab = max(*about["model"]["vocab"].values(), *ids.values()) + 1
    c = standins.with_context(c, CONTEXT) | {"vocab_size": n_vocab}
    c |= {"bos_token_id": ids[special["bos_token"]], "eos_token_id": ids[special["eos_token"]]}
    # Quiet: torch adds log-likelihoods up in float32, whose rounding is 1e-4 from 1,000 nats on.
    weights = {name: array / 2 for name, array in standins.tensors(c).items()}
    standins.write(folder, c, weights)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    about = special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def responses(lm, tasks):
    """What a model answered to each request of each task."""
    results = lm_eval.simple_evaluate(lm, tasks=tasks, log_samples=True, bootstrap_iters=0)
    found = {}
    for name, samples in results["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        found[name] = [one for sample in samples for (one,) in sample["resps"]]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_that_of_the_harness_on_torch(form, tmp_path):
    write_model(tmp_path / "theirs", form)
    for way in (("import", "theirs", "run"), ("export", "run", "exported")):
        succeed("gpt/convert/__main__", way[0], tmp_path / way[1], tmp_path / way[2])
    ours = harness.GPTJax(str(tmp_path / "run"), batch_size=8)
    write_tasks(tmp_path, ours.model)
    torch.set_num_threads(1)
    # With its cache of logits, equal tokens split elsewhere into context and answer get wrong ones.
    options = {"device": "cpu", "dtype": "float32", "batch_size": 4, "logits_cache": False}
    theirs = HFLM(str(tmp_path / "exported"), **options)
    assert theirs.max_length == CONTEXT
    expected = responses(theirs, harness.load_tasks(list(TASKS), tmp_path))
    found = responses(ours, harness.load_tasks(list(TASKS), tmp_path))

    assert found["writing"] == expected.pop("writing")
    assert len(set(found["writing"])) > 8
    n_greedy = 0
    for name, answers in expected.items():
        assert len(answers) == {"choices": 96, "cloze": 49, "rolling": 24}[name]
        for mine, other in zip(found[name], answers, strict=True):
            if name != "rolling":
                assert mine[1] == other[1]
                n_greedy += mine[1]
                mine, other = mine[0], other[0]
            assert mine == pytest.approx(other, abs=1e-4, rel=0)
    assert n_greedy > 0
    assert ours.n_cut > 4 * 4


def evaluate(*argv):
    return call("gpt/evaluate/__main__", *argv)


def test_a_task_of_ours_on_a_run(finished, tmp_path):
    """Without a network: the table, the run's folder, its report, and the whole result."""
    whole = tmp_path / "whole.json"
    done = evaluate(finished, "--tasks", "python_code", "--limit", "10", "--json", whole)
    assert done.code == 0, done.err
    assert "|python_code|" in done.out and "|acc_norm|" in done.out
    (line,) = (finished / "evaluations.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["limit"]) == (12, 10) and record["n_cut"] > 0
    results = json.loads(whole.read_text())["results"]["python_code"]
    assert results["acc,none"] == record["python_code/acc"]
    page = tmp_path / "page.html"
    succeed("gpt/report", finished, "--out", page)
    assert "<td>python_code/acc_norm</td>" in page.read_text()


def test_what_cannot_be_evaluated(finished, tmp_path, monkeypatch):
    """One line each, and nothing written."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    own = "task: {}\ndataset_path: {}\n{}output_type: loglikelihood_rolling\ndoc_to_target: text\n"
    for name, place in (("here", "json"), ("there", "nobody/nothing")):
        files = "dataset_kwargs: {data_files: missing.jsonl}\n" if name == "here" else ""
        (tmp_path / f"{name}.yaml").write_text(own.format(name, place, files))
    there = f"put a copy of the hub's folder nobody/nothing at {tmp_path}/nobody/nothing"
    for task, message in {
        "here": f"the data of task here cannot be read: Unable to find '{tmp_path}/missing.jsonl'",
        "there": there,
        "python_cod": "unknown task 'python_cod': expected an lm-eval task, or one from the ",
    }.items():
        done = evaluate(finished, "--tasks", task, "--include-path", tmp_path)
        assert done.code == 2 and message in done.err, done.err
        assert len([line for line in done.err.splitlines() if "error" in line]) == 1
    write_model(tmp_path / "theirs", "gpt2")
    (tmp_path / "theirs/tokenizer.json").unlink()
    (tmp_path / "theirs/tokenizer_config.json").unlink()
    succeed("gpt/convert/__main__", "import", tmp_path / "theirs", tmp_path / "bare")
    done = evaluate(tmp_path / "bare", "--tasks", "python_code")
    assert done.code == 2 and "the model has no tokenizer, but tasks are text" in done.err
    assert not (tmp_path / "bare/evaluations.jsonl").exists()


def test_the_harness_finds_the_adapter_by_name(finished):
    lm = get_model("gpt-jax").create_from_arg_string(f"run={finished},step=12", {"device": "cpu"})
    assert lm.model.step == 12 and lm.batch_size == harness.BATCH_SIZE


def test_tasks_while_it_trains(text, tmp_path):
    """Every few steps and at the end: lines of metrics.jsonl, and a curve in the report."""
    argv = [*programs.SHAPE, *programs.STEPS, "--data", text, "--out", tmp_path / "run"]
    tasks = ["--eval-tasks", "python_code", "--eval-tasks-every", "5", "--eval-tasks-limit", "4"]
    done = succeed("train", *argv, *tasks)
    name = "python_code/acc"
    lines = [line for line in programs.read_lines(tmp_path / "run") if name in line]
    assert [line["step"] for line in lines] == [5, 10, 12] and lines[0]["limit"] == 4
    assert f"step 10  {name} {lines[1][name]:.4f}" in done.err
    succeed("gpt/report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert f'aria-label="{name}"' in (tmp_path / "page.html").read_text()

    flags = ["--overwrite", "--eval-tasks", "python_cod"]
    refuse("unknown task 'python_cod'", "train", *argv, *flags)
    assert len(programs.read_lines(tmp_path / "run")) > 3  # the old run is still there
