#!/usr/bin/env bash
# Everything that the CUDA suite measures, in three calls of less than ten minutes each, for a machine lent that long:
#   benchmarks/cuda/calls.sh small|checks|7b FOLDER
# Results go to FOLDER as they come: cuda_PART_NAME.csv and .md, and cuda_log_NAME.txt of what failed. PYTHON=... takes
# another Python, BUDGET_S=... other than 520 seconds.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
call=$1 folder=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
case $call in
small) what=(--ready 12 --parts speed --anyway --models smollm2-135m tinyllama-1.1b --rounds 2) ;;
checks) what=(--ready 12 --parts correctness memory --context-gb 8 12 16 24) ;;
7b)
    # PEFT at its defaults recomputes nothing: eight padded examples of this model may not fit in 80 GB.
    what=(--parts speed --anyway --models llama-2-7b --rounds 2 --batch-size 6 --ready 6)
    what+=(--frameworks lit_lora peft lit_lora_bf16 liger liger_bf16 peft_without_cudnn peft_liger)
    ;;
*) echo "$call: small, checks or 7b" >&2; exit 2 ;;
esac
exec "${PYTHON:-python3}" -m benchmarks.cuda.suite --budget-s "${BUDGET_S:-520}" --output "$folder" --name "$call" \
    "${what[@]}"
