#!/usr/bin/env bash
# What a GPU machine should be asked, in under nine minutes; nothing is fetched.
#
#     benchmarks/gpu.sh [OUT]            OUT: folder of the results (default benchmarks/results)
#
# 1. Numbers: fused attention against the plain form in bfloat16; a small run in bfloat16, and the
#    cache contract on it in bfloat16 and in float32.
# 2. Training: tokens/s and MFU of gpt2 and gpt2-medium.
# 3. Prefill and decode of gpt2 at batch 1, 8, 32 and 128, prompts of 128 and 960 tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-benchmarks/results}
mkdir -p "$out"
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT

"$python" -c 'import jax; print(jax.__version__, jax.devices())'

echo "== numbers"
"$python" benchmarks/parity.py
"$python" train.py tiny --steps 200 --dtype bfloat16 --out "$run/tiny" --sample-every 0
for dtype in bfloat16 float32; do
  "$python" sample.py "$run/tiny" --check --dtype "$dtype"
done

echo "== training"
"$python" -m gpt.bench --train --preset gpt2 --batch-sizes 8,16,32 --repeats 5 \
  --json "$out/gpu-train-gpt2.json" | sed '$d'
"$python" -m gpt.bench --train --preset gpt2-medium --batch-sizes 8,16 --repeats 5 \
  --json "$out/gpu-train-gpt2-medium.json" | sed '$d'

echo "== prefill and decode"
"$python" -m gpt.bench --preset gpt2 --batch-sizes 1,8,32,128 --prompt-lengths 128,960 \
  --new-tokens 64 --repeats 5 --json "$out/gpu-sample-gpt2.json" --plot "$out/gpu-roofline.png" \
  | sed '$d'
