#!/usr/bin/env bash
# What to measure on a GPU that is there for ten minutes. Nothing is downloaded.
#
#     benchmarks/gpu.sh [OUT]            OUT: folder of the results (default benchmarks/results)
#
# Every step has a time limit of its own, and its output is in OUT as soon as it ends; a step that
# fails or runs out of time is named at the end and does not keep the next ones from running.
# PYTHON names the interpreter, SECONDS_IN_ALL the time after which no further step begins.
#
# 1. Numbers in bfloat16: fused attention against the plain form, and a trained model whose cached
#    answers are compared with uncached ones.
# 2. Training: tokens per second and MFU of gpt2 at 8, 16 and 32 rows, without recomputation and
#    with each block recomputed.
# 3. Prefill and greedy decode of gpt2 at 1, 8, 32 and 128 rows, and sampling with top-p from the
#    small model of step 1, with the default flags, with loops and branches inside CUDA graphs, and
#    without CUDA graphs.
# 4. Exact resume: a run stopped and continued, compared with one that was not, as it is and with
#    --deterministic.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-benchmarks/results}
seconds_in_all=${SECONDS_IN_ALL:-600}
mkdir -p "$out"
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
failed=()

# step NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds; output in OUT/gpu-NAME.txt
step() {
  local name=$1 limit=$2
  shift 2
  if ((SECONDS >= seconds_in_all)); then
    echo "== $name: not run, after $SECONDS s"
    failed+=("$name")
    return
  fi
  local began=$SECONDS
  echo "== $name"
  timeout -k 5 "$limit" "$@" 2>&1 | grep -v '^{' | tee "$out/gpu-$name.txt"
  local status=${PIPESTATUS[0]}
  echo "== $name: exit code $status after $((SECONDS - began)) s" | tee -a "$out/gpu-$name.txt"
  if ((status != 0)); then failed+=("$name"); fi
}

graphs() { # the flag that says what goes into a CUDA graph, beside the user's own flags
  echo "${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=$1"
}

step device 60 "$python" -c 'import jax; print(jax.__version__, jax.devices()[0].device_kind)'

step parity 60 "$python" benchmarks/parity.py
step tiny 90 "$python" train.py tiny --steps 200 --dtype bfloat16 --out "$run/tiny" --sample-every 0
step check 120 "$python" sample.py "$run/tiny" --check --dtype bfloat16

train=("$python" -m gpt.bench --train --preset gpt2 --batch-sizes 8,16,32 --repeats 5)
step train-gpt2 120 "${train[@]}" --remat none --json "$out/gpu-train-gpt2.json"
step train-gpt2-blocks 90 "${train[@]}" --remat blocks --json "$out/gpu-train-gpt2-blocks.json"

decode=("$python" -m gpt.bench --preset gpt2 --batch-sizes 1,8,32,128 --prompt-lengths 128
  --new-tokens 64 --repeats 5)
step decode 120 "${decode[@]}" --json "$out/gpu-decode-gpt2.json" --plot "$out/gpu-roofline.svg"
step decode-whole-graphs 90 env XLA_FLAGS="$(graphs +WHILE,+CONDITIONAL)" \
  "${decode[@]}" --json "$out/gpu-decode-whole-graphs.json"
step decode-no-graphs 90 env XLA_FLAGS="$(graphs '')" \
  "${decode[@]}" --json "$out/gpu-decode-no-graphs.json"

# Whole calls with top-p, of the small model.
top_p=("$python" benchmarks/sampling.py "$run/tiny" --repeats 5)
step top-p 60 "${top_p[@]}"
step top-p-whole-graphs 60 env XLA_FLAGS="$(graphs +WHILE,+CONDITIONAL)" "${top_p[@]}"
step top-p-no-graphs 60 env XLA_FLAGS="$(graphs '')" "${top_p[@]}"

for flag in --no-deterministic --deterministic; do
  step "resume$flag" 60 "$python" train.py tiny --steps 40 --verify-resume "$flag" --out "$run/resume"
done

if ((${#failed[@]} > 0)); then
  echo "did not succeed: ${failed[*]}"
  exit 1
fi
