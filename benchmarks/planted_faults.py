"""Plant one-line faults in a copy of the project: which test notices each?

    python benchmarks/planted_faults.py [--only NAME ...] [--whole]

For each fault in the table below, change one line of the copy and run the tests listed with it
until one fails. A fault that no test notices is a gap in the suite. --whole: if these tests pass,
run the whole default suite. The exit code is 1 if a fault was not noticed, and 2 if one cannot be
planted because its line was rewritten or its tests were renamed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
NO_TESTS = 5  # pytest's exit code
LONGEST = 3600  # seconds that tests may take, since a fault may make a loop endless


class Fault(NamedTuple):
    """`old` occurs once in `file` and becomes `new`; `tests`: the files that should notice it."""

    name: str
    old: str
    new: str
    file: str
    tests: list[str]


def faults_in(file: str, tests: str, *rows: tuple[str, str, str]) -> list[Fault]:
    """A fault for each (name, old, new) of `rows`; `tests`: files in tests/, without `.py`."""
    names = [f"tests/{name}.py" for name in tests.split()]
    return [Fault(*row, f"gpt/{file}.py", names) for row in rows]


FAULTS = [
    # The model.
    *faults_in("model/attention", "model/test_choices",
        ("mask", "<= pos[:, :, None]", "<= pos[:, :, None] + 1"),
        ("scale", "/ math.sqrt(H), MASKED", "/ H, MASKED"),
        ("grouped queries", "K, N // K, H).transpose(0, 2, 3,", "N // K, K, H).transpose(0, 3, 2,"),
    ),
    *faults_in("model/positions", "model/test_choices",
        ("rotation", "b * cos + a * sin", "b * cos - a * sin"),
        ("rotation through the cache", "None else pos_BT\n", "None else pos_BT + 1\n"),
        ("scaling of frequencies", "kept + (1 - kept) / config", "1 - kept + kept / config"),
    ),
    *faults_in("model/layers", "model/test_choices model/test_transformer",
        ("epsilon", ", epsilon=self.epsilon)", ", epsilon=0.0)"),
        ("bias of norms", "y = y + self.bias[...]\n", "y = y\n"),
        ("gelu", "jax.nn.gelu, approximate=False", "jax.nn.gelu, approximate=True"),
        ("scale of dropout", "jnp.where(kept, x / (1 - rate), 0)", "jnp.where(kept, x, 0)"),
    ),
    *faults_in("model/transformer", "model/test_choices",
        ("residual", 'x_BTD = x_BTD + dropout(y_BTD, dropout_key_B, self.dropout, site="mlp")',
         'x_BTD = dropout(y_BTD, dropout_key_B, self.dropout, site="mlp")'),
        ("untied head", "if self.head is None else self.head[...]", ""),
    ),
    *faults_in("model/int8", "model/test_int8", ("int8's range", "LEVELS = 127", "LEVELS = 128")),
    # The cache.
    *faults_in("model/transformer", "sampling/test_cache_check",
        ("slot of a token", "cache.length_B[:, None] + jnp", "cache.length_B[:1, None] + jnp"),
    ),
    *faults_in("model/kv_cache", "model/test_transformer sampling/test_cache_check",
        ("length of a row", "self.length_B + n_B)", "self.length_B + jnp.max(n_B))"),
        ("growth", "(0, capacity - cache.capacity)", "(capacity - cache.capacity, 0)"),
        ("overflow", 'mode="drop"', 'mode="clip"'),
    ),
    *faults_in("sampling/engine", "sampling/test_generate",
        ("row that has ended", "running_B.astype(jnp.int32)), logits",
         "jnp.ones_like(token_B)), logits"),
        ("prompt in pieces", "jnp.where((more_B > 0)[:, None], after_BV, logits_BV)", "after_BV"),
    ),
    # Sampling.
    *faults_in("sampling/sampler", "sampling/test_sampler",
        ("top-k", "jnp.minimum(top_k_B, V), V)", "jnp.minimum(top_k_B + 1, V), V)"),
        ("top-p", "top_p_B * weight_BV.sum(-1))", "top_p_B)"),
        ("min-p", "jnp.log(min_p_B)", "jnp.log2(min_p_B)"),
        ("noise of a position", "(seed), sample), position)", "(seed), sample), 0)"),
        ("noise of a sample", "(seed), sample), position)", "(seed), 0), position)"),
        ("penalty", "x_BV / penalty_B1, x_BV * penalty_B1", "x_BV / penalty_B1, x_BV / penalty_B1"),
        ("place in a block", "target_B - before_B)", "target_B)"),
    ),
    *faults_in("sampling/decode_loop", "sampling/test_generate",
        ("tokens that were seen", "token_B].set(True)", "token_B].set(False)"),
        ("end of text", "(has_ended_B, 0, state", "(has_ended_B, state.remaining_B - 1, state"),
    ),
    *faults_in("sampling/speculation", "sampling/test_rows",
        ("accepted token too many", "jnp.pad(is_right_BN, [(0, 0), (1, 0)]",
         "jnp.pad(is_right_BN[:, :-1], [(0, 0), (2, 0)]"),
        ("position after a refusal", "cache=cache.advanced(n_kept_B)",
         "cache=cache.advanced(n_kept_B + (n_kept_B % T > 0))"),
        ("stale slot of the cache", "cache=cache.advanced(", "cache=state.cache.advanced("),
        ("noise by step", "+ 1 + jnp.arange(T)", "+ 1 + 0 * jnp.arange(T)"),
        ("penalty of a proposal", "seen_TBV.append(seen_BV)", "seen_TBV.append(state.seen_BV)"),
    ),
    *faults_in("sampling/speculation", "sampling/test_speculation",
        ("cache of the draft", "draft_cache = replace(draft_cache, length_B=state.cache.length_B)",
         "draft_cache = draft_cache"),
    ),
    *faults_in("sampling/generate", "sampling/test_generate",
        ("sliding", "ids[-kept - 1 : -1]", "ids[-kept:]"),
    ),
    *faults_in("sampling/beam_search", "sampling/test_beam_search",
        ("cache of a beam", "kv.select(state.cache, parent_B)", "state.cache"),
    ),
    *faults_in("sampling/completion", "sampling/test_text_stream",
        ("stop string", "matches.append((start + len(stop), start))",
         "matches.append((start, start))"),
    ),
    *faults_in("sampling/special_ids", "sampling/test_special_ids",
        ("one of several ends", "ends=tuple(ends),", "ends=tuple(ends)[:1],"),
    ),
    *faults_in("sampling/completion", "sampling/test_generate",
        ("noise of a prompt", "return zlib.crc32(", "return 0 * zlib.crc32("),
    ),
    *faults_in("sampling/scoring", "sampling/test_scoring",
        ("piece of a window", "kv.grow(cache, width).advanced(T)", "kv.grow(cache, width)"),
    ),
    # Loss and optimizer.
    *faults_in("model/transformer", "training/test_loss",
        ("padded vocabulary", "jnp.where(ids_C < config.vocab_size, logits_MC, MASKED)",
         "logits_MC"),
    ),
    *faults_in("training/loss", "training/test_loss",
        ("shift", "tokens_BU[:, 1:]", "tokens_BU[:, :-1]"),
        ("online softmax", "running_sum_M * jnp.exp(running_max_M - new_max_M)", "running_sum_M"),
    ),
    *faults_in("training/step_functions", "training/test_train_step",
        ("weights of evaluation", "jnp.sum(losses_BT * weight_BT), ", "jnp.sum(losses_BT), "),
    ),
    *faults_in("training/step_functions", "training/test_optimizer training/test_train_step",
        ("mean of micro-batches", "return minimized / A, loss / A", "return minimized, loss / A"),
        ("dropout of a step", "jax.random.key(config.seed), step)",
         "jax.random.key(config.seed), 0)"),
        ("dropout of a row", "(jnp.arange(A * B))", "(jnp.arange(A * B) % B)"),
        ("decay of the average", "jnp.minimum(config.ema_decay", "jnp.maximum(config.ema_decay"),
    ),
    *faults_in("training/step_functions", "training/test_nonfinite",
        ("bad gradient", "jnp.isfinite(loss) & jnp.isfinite(grad_norm)", "jnp.isfinite(loss)"),
    ),
    *faults_in("training/optimizer", "training/test_optimizer",
        ("decay of norms", 'not in ("bias", "scale")', 'not in ("bias",)'),
        ("first step", "linear_schedule(peak / (warmup + 1), peak", "linear_schedule(0.0, peak"),
        ("order of clipping", "(clipping, optimizer)", "(optimizer, clipping)"),
        ("second moment", "b2=config.beta2", "b2=config.beta1"),
    ),
    # Data and resuming.
    *faults_in("data/batches", "data/test_batches",
        ("order of windows", "permute(place, key, n_windows) *", "place *"),
        ("stride of windows", "n_windows) * np.uint64(seq_len)",
         "n_windows) * np.uint64(seq_len - 1)"),
        ("epoch", "seed)) ^ epoch)", "seed)))"),
        ("targets counted twice", "(target >= first[", "(target + 1 >= first["),
    ),
    *faults_in("data/prepare", "data/test_prepare",
        ("end of a document", "if last and marks_ends:", "if marks_ends:"),
        ("what a kill left", "file.truncate(saved", "file.seek(saved"),
        ("held-out documents", "digest[:8], \"little\") < threshold",
         "digest[:8], \"little\") >= threshold"),
    ),
    *faults_in("data/formats", "data/test_formats",
        ("separators", "documents = split_documents(text, separator)", "documents = [text]"),
        ("column of parquet", "columns=[column], use", "columns=None, use"),
    ),
    *faults_in("data/tokenizers", "data/test_tokenizers",
        ("end of text of characters", "self.eot_token = len(characters)\n",
         "self.eot_token = len(characters) - 1\n"),
        ("size of a bpe", "            vocab_size - 1,\n", "            vocab_size,\n"),
    ),
    *faults_in("training/data_loader", "test_mesh",
        ("rows of a device", "return read(first, end)", "return read(0, end - first)"),
    ),
    *faults_in("training/data_loader", "test_train",
        ("tokens after a resume", "load, steps_done, until)", "load, 0, until - steps_done)"),
    ),
    *faults_in("training/train_state", "test_train",
        ("average after a resume", 'step, "ema_params", like.ema_params)',
         'step, "params", like.ema_params)'),
    ),
    # Checkpoints.
    *faults_in("checkpoint", "test_checkpoint",
        ("digests", 'if found[leaf] != described[leaf]["digest"]]', "if False]"),
        ("the best", "(self._losses[step], -step)", "(-self._losses[step], -step)"),
        ("falling back", "in reversed(saved_steps(folder)):", "in saved_steps(folder):"),
    ),
    *faults_in("digest", "test_checkpoint",
        ("digest of the order", "bits ^ (index * jnp.uint32(0x9E3779B1))", "bits"),
    ),
    # Meshes and other people's models.
    *faults_in("sharding", "test_sharding",
        ("axis of the mlp", '"mlp": ("tensor",)', '"mlp": ()'),
        ("layout of moments", "in range(len(path)):", "in range(1):"),
    ),
    *faults_in("convert/hf_weights", "convert/test_weights",
        ("transposition", "tensor.T if weight.is_transposed else tensor", "tensor"),
    ),
    *faults_in("convert/hf_config", "convert/test_config",
        ("base of rotations", 'rope.get("rope_theta", float, older_theta)', "older_theta"),
        ("tied by default", '("tied", bool, False)', '("tied", bool, True)'),
    ),
    # Measuring.
    *faults_in("flops", "test_flops",
        ("flops of training", "return 3 * forward_flops", "return 2 * forward_flops"),
        ("flops of the mask", "n_tokens * (n_tokens + 1) // 2", "n_tokens * n_tokens"),
        ("bytes of the cache", "return 2 * c.n_layers * batch", "return c.n_layers * batch"),
    ),
    *faults_in("bench/measure", "bench/test_bench",
        ("seconds of a step", "sum(chunks) / (cell.new_tokens - 1)",
         "sum(chunks) / cell.new_tokens"),
    ),
    *faults_in("training/step_timer", "training/test_metrics",
        ("pauses", "        self.last_at = time.perf_counter()", "        pass"),
    ),
]  # fmt: skip


def copy_project(copy: Path) -> None:
    """Copy what git tracks or does not ignore, with dates, by which Python detects old bytecode."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def find_problems(faults: list[Fault]) -> list[str]:
    """A line for each fault that cannot be planted or has no tests."""
    problems = []
    for fault in faults:
        path = ROOT / fault.file
        found = path.read_text(encoding="utf-8").count(fault.old) if path.exists() else 0
        if found != 1:
            problems.append(f"{fault.name}: {fault.old!r} occurs {found} times in {fault.file}")
        missing = [test for test in fault.tests if not (ROOT / test).exists()]
        problems += [f"{fault.name}: there is no {test}" for test in missing]
    return problems


def first_failure(copy: Path, *tests: str) -> str | None:
    """The first of `tests` that fails; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    # Tests marked `exact` run separately (tests/conftest.py).
    for marked in ("not slow and not parity and not exact", "exact and not slow"):
        try:
            done = subprocess.run(
                [*command, "-n", "0", "-m", marked],
                cwd=copy, env=environment, capture_output=True, text=True, timeout=LONGEST,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "the tests time out"
        if done.returncode not in (0, NO_TESTS):
            failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            return failed[1] if failed else f"pytest ends with code {done.returncode}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these faults alone")
    parser.add_argument("--whole", action="store_true", help="then run the whole default suite")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only is None or fault.name in args.only]
    problems = find_problems(faults)
    if problems or not faults:
        print("error:", "\n".join(problems) or f"no fault has one of the names {args.only}")
        return 2

    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        copy = Path(folder)
        copy_project(copy)

        # The tests must pass without a fault, or their failures would mean nothing.
        failure = first_failure(copy, *sorted({test for fault in faults for test in fault.tests}))
        if failure:
            print(f"error: a test fails without any fault: {failure}")
            return 2

        n_missed = 0
        for fault in faults:
            original = (ROOT / fault.file).read_text(encoding="utf-8")
            faulty = original.replace(fault.old, fault.new)
            (copy / fault.file).write_text(faulty, encoding="utf-8")
            failure = first_failure(copy, *fault.tests)
            if failure is None and args.whole:
                failure = first_failure(copy, "tests")
            shutil.copy2(ROOT / fault.file, copy / fault.file)
            n_missed += failure is None
            print(f"{fault.name:28} {failure or 'NOT NOTICED'}", flush=True)

    print(f"{len(faults) - n_missed} of {len(faults)} faults were noticed")
    return 1 if n_missed else 0


if __name__ == "__main__":
    sys.exit(main())
