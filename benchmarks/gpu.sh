#!/usr/bin/env bash
# What to measure on a GPU that is there for ten minutes. Nothing is downloaded.
#
#     benchmarks/gpu.sh [OUT [GROUP...]]     OUT: folder of the results (default benchmarks/results)
#                                            GROUP: numbers, training, decoding, kernels, resume
#
# Every step has a time limit of its own, and its output is in OUT as soon as it ends; a step that
# fails or runs out of time is named at the end and does not keep the next ones from running.
# PYTHON names the interpreter, SECONDS_IN_ALL the time after which no further step begins. All
# groups take some ten minutes on an H200; without GROUP they run in this order:
#
# numbers   bfloat16: fused attention against the plain form, and a trained model whose cached
#           answers are compared with uncached ones.
# training  Tokens per second and MFU of gpt2 at 8, 16 and 32 rows, without recomputation, and at 32
#           with each block recomputed.
# kernels   Each kernel of gpt2's training step, prefill and decode loop, measured beside expected.
# decoding  Prefill and decode of gpt2 at 1, 8, 32 and 128 rows, greedy and with top-p; with the
#           default flags, with loops and branches inside CUDA graphs, and without CUDA graphs.
# resume    A run stopped and continued, compared with one that was not, as it is and with
#           --deterministic.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-benchmarks/results}
if (($# > 0)); then shift; fi
groups=" ${*:-numbers training kernels decoding resume} "
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

wanted() { # whether a group was asked for
  [[ $groups == *" $1 "* ]]
}

graphs() { # the flag that says what goes into a CUDA graph, beside the user's own flags
  echo "${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=$1"
}

step device 60 "$python" -c 'import jax; print(jax.__version__, jax.devices()[0].device_kind)'

if wanted numbers; then
  step parity 60 "$python" benchmarks/parity.py
  step tiny 90 "$python" train.py tiny --steps 200 --dtype bfloat16 --out "$run/tiny" \
    --sample-every 0
  step check 150 "$python" sample.py "$run/tiny" --check --dtype bfloat16
fi

if wanted training; then
  train=("$python" -m gpt.bench --train --preset gpt2 --repeats 5)
  step train-gpt2 150 "${train[@]}" --batch-sizes 8,16,32 --remat none \
    --json "$out/gpu-train-gpt2.json"
  step train-gpt2-blocks 60 "${train[@]}" --batch-sizes 32 --remat blocks \
    --json "$out/gpu-train-gpt2-blocks.json"
fi

if wanted kernels; then
  step kernels 150 env XLA_FLAGS="$(graphs '')" "$python" benchmarks/gpu_kernels.py \
    --json "$out/gpu-kernels.json" --trace "$out/trace"
  step kernels-graphs 90 "$python" benchmarks/gpu_kernels.py --programs decode \
    --json "$out/gpu-kernels-graphs.json" --trace "$out/trace-graphs"
fi

if wanted decoding; then
  decode=("$python" -m gpt.bench --preset gpt2 --prompt-lengths 128 --new-tokens 64 --repeats 5)
  step decode 120 "${decode[@]}" --batch-sizes 1,8,32,128 --json "$out/gpu-decode-gpt2.json" \
    --plot "$out/gpu-roofline.svg"
  step top-p 120 "${decode[@]}" --batch-sizes 1,8,32,128 --top-p 0.9 \
    --json "$out/gpu-decode-top-p.json"
  step decode-whole-graphs 90 env XLA_FLAGS="$(graphs +WHILE,+CONDITIONAL)" \
    "${decode[@]}" --batch-sizes 1,32 --json "$out/gpu-decode-whole-graphs.json"
  step decode-no-graphs 90 env XLA_FLAGS="$(graphs '')" \
    "${decode[@]}" --batch-sizes 1,32 --json "$out/gpu-decode-no-graphs.json"
fi

if wanted resume; then
  for flag in --no-deterministic --deterministic; do
    step "resume$flag" 90 "$python" train.py tiny --steps 40 --verify-resume "$flag" \
      --out "$run/resume"
  done
fi

if ((${#failed[@]} > 0)); then
  echo "did not succeed: ${failed[*]}"
  exit 1
fi
