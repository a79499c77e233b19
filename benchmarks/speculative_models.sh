#!/bin/bash
# Makes the models with which benchmarks/speculative.py measures a draft, unless they exist, and
# measures: runs/gpt2-python, of gpt2's size but with a vocabulary of 4,096 and a context of 256, trained on
# Python's source; and runs/gpt2-draft, two layers that learn to imitate it from what it writes.
# About 50 minutes on two quiet cores.
set -euo pipefail
large=runs/gpt2-python
draft=runs/gpt2-draft

if [ ! -d $large ]; then
    python train.py gpt2 --tokenizer bpe --vocab-size 4096 --seq-len 256 --batch-size 8 \
        --warmup-steps 50 --minutes "${LARGE_MINUTES:-30}" --out $large
fi
if [ ! -d $draft ]; then
    for seed in $(seq "${SEEDS:-32}"); do
        python sample.py $large --num-samples 64 --max-new-tokens 255 --ignore-eos \
            --temperature 1 --seed "$seed" --json
    done >$large/written.jsonl
    python train.py gpt2 --data $large/written.jsonl --tokenizer $large/tokenizer.json \
        --seq-len 256 --batch-size 8 --warmup-steps 50 --minutes "${DRAFT_MINUTES:-8}" \
        --model.n-layers 2 --model.d-model 256 --model.n-heads 4 --out $draft
fi
python benchmarks/speculative.py --large $large --draft $draft "$@"
