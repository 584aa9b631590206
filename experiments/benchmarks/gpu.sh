#!/usr/bin/env bash
# Every GPU figure of the project in one call, correctness first: run from the repository's root on a machine with one CUDA GPU.
#     bash experiments/benchmarks/gpu.sh | tee experiments/benchmarks/gpu-<date>.txt      # or of some parts: gpu.sh gpu_wan.beside ...
# Python packages must be there (pip install -e . or wheels); nothing is downloaded. A part that fails does not stop the others.
set -uo pipefail
PYTHON=${PYTHON:-python3}
HERE=experiments/benchmarks
errors=$(mktemp)
export PYTHONPATH=${PYTHONPATH:-.} HYDRA_FULL_ERROR=1 PYTHONUNBUFFERED=1
echo "date $(date -u +%Y-%m-%d) commit ${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
failed=0
parts=("$@")
((${#parts[@]})) || parts=(gpu.correctness gpu.demo gpu_wan.beside gpu_wan.cached gpu_wan.compiled gpu_wan.planned gpu.training gpu.training_wan gpu.speed)
for part in "${parts[@]}"; do
    echo "-- $part"
    $PYTHON $HERE/${part%.*}.py ${part#*.} 2>"$errors" || { failed=1; tail -n 25 "$errors"; echo "$part: FAIL"; }
done
exit $failed
